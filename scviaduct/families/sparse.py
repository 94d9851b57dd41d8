"""The encoder of scvi-tools, evaluated on sparse counts.

scvi-tools makes every mini-batch dense, concatenates one-hot covariates to it, and multiplies it with the first layer's
weights; of the 2,000 genes of a typical model, 92 % of what it multiplies is zero. The first layer is a linear map of
``[log1p(x), covariates]``, so the same result comes from gathering the weights of the genes that a cell expresses,
scaled by ``log1p`` of their counts, and adding the looked-up columns of its categories. Batch normalisation in
evaluation mode is affine and is folded into the weights.

Each cell's first layer is summed on its own, in the order of its genes, so a latent does not depend on which cells
share its mini-batch there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_BLOCK_COLUMNS = 64
"""Hidden units gathered at a time when the weights outgrow a core's L2 cache: 8,000 genes x 64 float32 are 2 MB."""
_CACHE_BYTES = 2 << 20
CELLS = 1024
"""Cells encoded at a time; keeps the activations of 512 hidden units at 2 MB."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """A fully connected layer with its normalisation folded in.

    Attributes
    ----------
    weight
        float32, shape ``(n_hidden, n_in)``, of what comes from the layer below (for the first layer: of continuous
        covariates and embeddings, behind the genes).
    tables
        One per categorical covariate: float32, shape ``(n_categories, n_hidden)``; None for one that is not read.
    bias
        float32, shape ``(n_hidden,)``.
    finish
        Layer norm and activation.
    """

    weight: torch.Tensor
    tables: tuple[torch.Tensor | None, ...]
    bias: torch.Tensor
    finish: Callable[[torch.Tensor], torch.Tensor]

    def covariates(self, out: torch.Tensor, codes: Sequence[torch.Tensor]) -> torch.Tensor:
        """Add the columns of each cell's categories, in place."""
        for table, code in zip(self.tables, codes, strict=False):
            if table is not None:
                out += table[code]
        return out


def _fold(modules: Any, n_in: int, n_categories: Sequence[int], *, injected: bool) -> _Layer:
    """Split a layer of scvi-tools' ``FCLayers`` into its parts."""
    linear, norm, layer_norm, activation = list(modules)[:4]
    weight = linear.weight.detach().clone()
    bias = linear.bias.detach().clone() if linear.bias is not None else weight.new_zeros(len(weight))
    if norm is not None:
        scale = norm.weight.detach() / torch.sqrt(norm.running_var + norm.eps)
        weight *= scale[:, None]
        bias = (bias - norm.running_mean) * scale + norm.bias.detach()
    tables: list[torch.Tensor | None] = []
    column = n_in
    for n in n_categories:
        used = injected and n > 0
        tables.append(weight[:, column : column + n].T.contiguous() if used else None)
        column += n if used else 0
    steps = [module for module in (layer_norm, activation) if module is not None]

    def finish(hidden: torch.Tensor) -> torch.Tensor:
        for step in steps:
            hidden = step(hidden)
        return hidden

    return _Layer(weight[:, :n_in].contiguous(), tuple(tables), bias, finish)


class SparseEncoder:
    """scvi-tools' ``Encoder`` on sparse counts, in evaluation mode.

    Parameters
    ----------
    encoder
        ``module.z_encoder`` of a loaded model.
    n_genes
        Genes of the model; further inputs of its first layer are continuous covariates or a batch embedding.
    log_variational
        Whether counts pass through ``log1p`` first.
    """

    def __init__(self, encoder: Any, n_genes: int, *, log_variational: bool) -> None:
        layers = encoder.encoder
        self._log = log_variational
        self._n_genes = n_genes
        self._eps = encoder.var_eps
        self._var_activation = encoder.var_activation
        self._transform = encoder.z_transformation
        self._mean, self._var = encoder.mean_encoder, encoder.var_encoder
        self._layers: list[_Layer] = []
        for i, modules in enumerate(layers.fc_layers):
            injected = layers.inject_into_layer(i)
            n_in = modules[0].in_features - (layers.n_cov if injected else 0)
            self._layers.append(_fold(modules, n_in, layers.n_cat_list, injected=injected))
        genes = self._layers[0].weight[:, :n_genes].T.contiguous()
        wide = genes.numel() * genes.element_size() > _CACHE_BYTES
        self._genes = [part.contiguous() for part in genes.split(_BLOCK_COLUMNS, dim=1)] if wide else [genes]
        self._dense = self._layers[0].weight[:, n_genes:]

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
            float32, shape ``(n_cells, n_continuous)``; behind it the batch embedding where the model has one.

        Returns
        -------
        tuple of tensors
            Posterior mean and variance, float32 of shape ``(n_cells, n_latent)``, before any ``z_transformation``.
        """
        first, *rest = self._layers
        values = torch.log1p(data) if self._log else data
        parts = [
            nn.functional.embedding_bag(
                indices, part, indptr.to(indices.dtype), mode="sum", per_sample_weights=values, include_last_offset=True
            )
            for part in self._genes
        ]
        hidden = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        hidden = hidden + first.bias
        if continuous is not None and self._dense.shape[1]:
            hidden += continuous @ self._dense.T
        hidden = first.finish(first.covariates(hidden, codes))
        for layer in rest:
            hidden = layer.finish(layer.covariates(nn.functional.linear(hidden, layer.weight, layer.bias), codes))
        return self._mean(hidden), self._var_activation(self._var(hidden)) + self._eps
