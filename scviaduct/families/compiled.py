"""A network's encoder on sparse counts with compiled kernels: what CPUs encode with.

It computes what :class:`scviaduct.families.sparse.SparseEncoder` does, in the same order of layers, with the kernels of
:mod:`scviaduct.families.kernels` for everything that takes time; layer norm and the rarer activations, which depend on
a cell's own values alone, are PyTorch's.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import nn

from scviaduct.compiling import unkept
from scviaduct.errors import DataError
from scviaduct.families import kernels
from scviaduct.families.base import KERNELS
from scviaduct.families.network import ACTIVATIONS
from scviaduct.families.rowwise import elementwise, padded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scviaduct.families.network import Layer, Network
    from scviaduct.values import FloatArray, IntArray, LongArray

_RELU = repr(nn.ReLU())
_CACHE_BYTES = 2 << 20
"""Weights of genes that stay in a core's second cache, or nearly."""
_CELLS = 256
"""Cells whose counts are gathered together then, so that their logarithms stay there, too."""


def aligned(*shape: int) -> FloatArray:
    """A new float32 array of unset values that begins at a multiple of ``kernels.ALIGNMENT`` bytes."""
    n_bytes = 4 * math.prod(shape)
    raw = np.empty(n_bytes + kernels.ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % kernels.ALIGNMENT
    return raw[start : start + n_bytes].view(np.float32).reshape(shape)


@dataclass(frozen=True, slots=True)
class Packed:
    """Weights and biases as kernels read them.

    Attributes
    ----------
    weights
        float32, shape ``(n_blocks, n_in, kernels.WIDTH)``: outputs in blocks, the last filled with zeros.
    bias
        float32, shape ``(n_blocks * kernels.WIDTH,)``, filled likewise.
    """

    weights: FloatArray
    bias: FloatArray

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor) -> Self:
        """Pack a weight of shape ``(n_out, n_in)``."""
        return cls(_packed(weight), _packed(bias[:, None]).reshape(-1))

    def begin(self, n_cells: int) -> FloatArray:
        """Sums that are the bias yet, of shape ``(>= n_cells, n_blocks * kernels.WIDTH)``."""
        sums = aligned(-(-n_cells // kernels.ROWS) * kernels.ROWS, len(self.bias))
        sums[:] = self.bias
        return sums

    def product(self, values: FloatArray, n_cells: int) -> FloatArray:
        """A linear layer of values of shape ``(>= n_cells, >= n_in)``."""
        sums = self.begin(n_cells)
        kernels.multiply(sums, _filled(values, len(sums), self.weights), self.weights)
        return sums


class CompiledEncoder:
    """A network's encoder on sparse counts, on a CPU.

    Parameters
    ----------
    network
        On the CPU.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        told = f", compiled anew in every process: {unkept[0]}" if unkept else ""
        self.arithmetic = f"{KERNELS}{told}"
        first, *rest = network.layers
        self._genes = Packed.of(first.weight[:, : network.n_genes], first.bias)
        numbers = first.weight[:, network.n_genes :]
        self._numbers = _packed(numbers) if numbers.shape[1] else None
        self._rest = [Packed.of(layer.weight, layer.bias) for layer in rest]
        ends = network.mean, network.variance
        self._posterior = Packed.of(torch.cat([end.weight for end in ends]), torch.cat([end.bias for end in ends]))
        self._classifier = [Packed.of(layer.weight, layer.bias) for layer in network.classifier]

    def reading(self, network: Network) -> Self:
        """An encoder of a network with further categories; all weights are shared."""
        other = copy.copy(self)
        vars(other).update(_network=network)
        return other

    def __call__(
        self,
        indptr: LongArray,
        indices: IntArray,
        data: FloatArray,
        codes: Sequence[LongArray] = (),
        continuous: FloatArray | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode cells.

        Parameters
        ----------
        indptr, indices, data
            Counts as CSR: int64 of shape ``(n_cells + 1,)`` from 0, int32 and float32 of shape ``(nnz,)``.
        codes
            Per categorical covariate, batch first: int64 of shape ``(n_cells,)``.
        continuous
            float32, shape ``(n_cells, n_continuous)``.

        Returns
        -------
        tuple of tensors
            Posterior mean and variance, float32 of shape ``(n_cells, n_latent)``, before any transformation of the
            latent.

        Raises
        ------
        DataError
            If a gene or a category is none of the network's.
        """
        network, n_cells = self._network, len(indptr) - 1
        first, *rest = network.layers
        counts = _checked(indptr, indices, data, network.n_genes)
        weights, hidden = self._genes.weights, self._genes.begin(n_cells)
        together = _CELLS if weights.nbytes <= _CACHE_BYTES else max(n_cells, 1)
        kernels.gather(hidden, weights, *counts, network.log_variational, together)
        if continuous is not None and self._numbers is not None:
            kernels.multiply(hidden, _filled(continuous, len(hidden), self._numbers), self._numbers)
        _finish(hidden, first, codes)
        for layer, packed in zip(rest, self._rest, strict=True):
            hidden = packed.product(hidden, n_cells)
            _finish(hidden, layer, codes)
        out = torch.from_numpy(self._posterior.product(hidden, n_cells))[:n_cells]
        n_latent = len(network.mean.bias)
        return out[:, :n_latent], network.positive(out[:, n_latent : 2 * n_latent].contiguous())

    def classify(self, location: FloatArray) -> torch.Tensor:
        """Logits of the labels, float32 of shape ``(n_cells, n_labels)``, of locations, ``(n_cells, n_latent)``."""
        n_cells, hidden = len(location), location
        for layer, packed in zip(self._network.classifier, self._classifier, strict=True):
            hidden = packed.product(hidden, n_cells)
            _finish(hidden, layer)
        return torch.from_numpy(hidden)[:n_cells, : len(self._network.labels)]


def _packed(weight: torch.Tensor) -> FloatArray:
    n_out, n_in = weight.shape
    n_blocks = -(-n_out // kernels.WIDTH)
    packed = aligned(n_blocks, n_in, kernels.WIDTH)
    packed[:] = 0
    for block, part in enumerate(weight.split(kernels.WIDTH)):
        packed[block, :, : len(part)] = part.T.numpy()
    return packed


def _finish(sums: FloatArray, layer: Layer, codes: Sequence[LongArray] = ()) -> None:
    """Add the columns of each cell's categories, normalise and activate, all in place."""
    for table, code in zip(layer.tables, codes, strict=False):
        if table is not None:
            if len(code) > len(sums) or (len(code) and not 0 <= int(code.min()) <= int(code.max()) < len(table)):
                raise DataError(
                    f"A cell's category is {int(code.min())} or {int(code.max())}, and a layer has {len(table)}.",
                    "Fit an adapter for it, or name the column that the reference was trained with.",
                )
            kernels.add_rows(sums, table.numpy(), np.ascontiguousarray(code, np.int64))
    if layer.norm is None and layer.activation in ("", _RELU):
        if layer.activation:
            np.maximum(sums, 0, out=sums)
        return
    values, n_out = torch.from_numpy(sums), len(layer.bias)
    if layer.norm is not None:
        values[:, :n_out] = nn.functional.layer_norm(values[:, :n_out], (n_out,), *layer.norm, layer.norm_eps)
    if layer.activation:  # of the columns behind the last one, too: they fill vector registers (see `rowwise`)
        sums[:] = elementwise(ACTIVATIONS[layer.activation], values).numpy()


def _checked(
    indptr: LongArray, indices: IntArray, data: FloatArray, n_genes: int
) -> tuple[LongArray, IntArray, FloatArray]:
    """Counts as the kernels take them, which would read whatever lies behind an array's end."""
    if len(data) != len(indices) or indptr[0] != 0 or indptr[-1] != len(data) or (np.diff(indptr) < 0).any():
        raise DataError(
            f"Row pointers run from {indptr[0]:,} to {indptr[-1]:,}, over {len(indices):,} genes and {len(data):,}"
            " counts.",
            "They must rise from 0 to the number of counts.",
        )
    genes = np.ascontiguousarray(indices, np.int32)
    most = int(genes.view(np.uint32).max()) if len(genes) else 0  # a negative one is larger than any
    if most >= n_genes:
        raise DataError(
            f"There is a count of gene {np.uint32(most).view(np.int32):,}, and the encoder reads {n_genes:,}.",
            "Align the counts to the reference's genes.",
        )
    return np.ascontiguousarray(indptr, np.int64), genes, np.ascontiguousarray(data, np.float32)


def _filled(values: FloatArray, n_rows: int, weights: FloatArray) -> FloatArray:
    """Rows that the kernels multiply with weights, the last one repeated up to so many."""
    if values.shape[1] < weights.shape[1]:
        raise DataError(
            f"There are {values.shape[1]} values of each cell, and a layer reads {weights.shape[1]}.",
            "Give every continuous covariate that the reference was trained with.",
        )
    return np.ascontiguousarray(padded(values, n_rows), np.float32)
