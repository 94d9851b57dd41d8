"""The encoder of scvi-tools, evaluated on sparse counts.

scvi-tools makes every mini-batch dense, concatenates one-hot covariates to it, and multiplies it with the first layer's
weights; of the 2,000 genes of a typical model, 92 % of what it multiplies is zero. The first layer is a linear map of
``[log1p(x), covariates]``, so the same result comes from gathering the weights of the genes that a cell expresses,
scaled by ``log1p`` of their counts, and adding the looked-up columns of its categories.

Each cell's first layer is summed on its own, in the order of its genes, so a latent does not depend on which cells
share its mini-batch there; nor do the layers behind it (:mod:`scviaduct.families.rowwise`).
"""

from __future__ import annotations

import copy
from functools import cached_property
from typing import TYPE_CHECKING, Self

import torch
from torch import nn

from scviaduct.families.rowwise import linear

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scviaduct.families.compiled import CompiledEncoder
    from scviaduct.families.network import Network

_BLOCK_COLUMNS = 64
"""Hidden units gathered at a time when the weights outgrow a core's L2 cache: 8,000 genes x 64 float32 are 2 MB."""
_CACHE_BYTES = 2 << 20
CELLS = 1024
"""Cells that PyTorch encodes at a time on a CPU; keeps the activations of 512 hidden units at 2 MB."""
GPU_CELLS = 32_768
"""The same on a GPU, where each step costs some twenty launches: activations of 512 hidden units are 67 MB."""


class SparseEncoder:
    """A network's encoder on sparse counts.

    Parameters
    ----------
    network
        On the device that encodes.
    gathers
        Whether it will be called; if not, the genes' weights are made only if it is after all.
    """

    def __init__(self, network: Network, *, gathers: bool = True) -> None:
        self._network = network
        self.arithmetic = f"PyTorch on {network.mean.bias.device}"
        self._dense = network.layers[0].weight[:, network.n_genes :]
        if gathers:
            self._genes  # noqa: B018 - made now, so that encoders with further categories share it

    @cached_property
    def _genes(self) -> list[torch.Tensor]:
        """The genes' weights, a row each."""
        network = self._network
        genes = network.layers[0].weight[:, : network.n_genes].T.contiguous()
        wide = genes.numel() * genes.element_size() > _CACHE_BYTES
        return [part.contiguous() for part in genes.split(_BLOCK_COLUMNS, dim=1)] if wide else [genes]

    def reading(self, network: Network) -> Self:
        """An encoder of a network with further categories; the genes' weights are shared if they are there."""
        other = copy.copy(self)
        vars(other).update(_network=network)
        return other

    def __call__(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        data: torch.Tensor,
        codes: Sequence[torch.Tensor] = (),
        continuous: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode cells.

        Parameters
        ----------
        indptr, indices, data
            Counts as CSR: int64 of shape ``(n_cells + 1,)``, int32 or int64 and float32 of shape ``(nnz,)``, on the
            device of the weights.
        codes
            Per categorical covariate, batch first: int64 of shape ``(n_cells,)``.
        continuous
            float32, shape ``(n_cells, n_continuous)``.

        Returns
        -------
        tuple of tensors
            Posterior mean and variance, float32 of shape ``(n_cells, n_latent)``, before any transformation of the
            latent.
        """
        network = self._network
        first, *rest = network.layers
        values = torch.log1p(data) if network.log_variational else data
        parts = [
            nn.functional.embedding_bag(
                indices, part, indptr.to(indices.dtype), mode="sum", per_sample_weights=values, include_last_offset=True
            )
            for part in self._genes
        ]
        hidden = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        hidden = hidden + first.bias
        if continuous is not None and self._dense.shape[1]:
            hidden += linear(continuous, self._dense)
        hidden = first.finish(hidden, codes)
        for layer in rest:
            hidden = layer(hidden, codes)
        return network.mean(hidden), network.positive(network.variance(hidden))

    def classify(self, location: torch.Tensor) -> torch.Tensor:
        """Probabilities of the labels, shape ``(n_cells, n_labels)``, of locations, ``(n_cells, n_latent)``."""
        for layer in self._network.classifier:
            location = layer(location)
        return torch.softmax(location, dim=-1)


def step_encoder(network: Network, device: str) -> SparseEncoder | CompiledEncoder:
    """What encodes: compiled kernels on a CPU, which take arrays and any number of cells, or PyTorch, with tensors."""
    if device != "cpu":
        return SparseEncoder(network, gathers=False)  # most only classify there: DeviceEncoder gathers
    from scviaduct.families.compiled import CompiledEncoder  # numba takes 0.4 s, and a GPU needs none

    return CompiledEncoder(network)
