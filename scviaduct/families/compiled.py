"""A network's encoder on sparse counts with compiled kernels: what CPUs encode with.

It computes what :class:`scviaduct.families.sparse.SparseEncoder` does, in the same order of layers, some cells at a
time: few enough that what lies between two layers stays in a core's cache.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

from scviaduct.compiling import unkept
from scviaduct.errors import DataError, PackageError
from scviaduct.families import activations, kernels
from scviaduct.families.base import KERNELS
from scviaduct.families.rowwise import padded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scviaduct.families.network import Layer, Network
    from scviaduct.values import FloatArray, IntArray, LongArray

_CACHE_BYTES = 2 << 20
"""Weights of genes that stay in a core's second cache, or nearly."""
_CELLS = 256
"""Cells whose counts are gathered together then, so that their logarithms stay there, too."""
_TOGETHER = 1024
"""Cells that pass through the layers together: of 512 hidden units 2 MB. A pass takes 7 us of Python beside its
kernels."""
_NONE = np.empty(0, np.float32)


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
        float32, shape ``(n_blocks, n_in, width)``: outputs in blocks, the last filled with zeros.
    bias
        float32, shape ``(n_blocks * width,)``, filled likewise.
    """

    weights: FloatArray
    bias: FloatArray

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor, width: int = 0) -> Self:
        """Pack a layer.

        Parameters
        ----------
        weight, bias
            float32, shapes ``(n_out, n_in)`` and ``(n_out,)``.
        width
            Outputs of a block; 0 for what the kernels sum so many outputs with.
        """
        width = width or (kernels.NARROW if len(weight) <= kernels.NARROW else kernels.WIDTH)
        return cls(_packed(weight, width), _packed(bias[:, None], width).reshape(-1))

    def sums(self, n_cells: int) -> FloatArray:
        """Unset sums, of shape ``(>= n_cells, n_blocks * width)``."""
        return aligned(-(-n_cells // kernels.ROWS) * kernels.ROWS, len(self.bias))

    def multiply(self, values: FloatArray, sums: FloatArray) -> FloatArray:
        """Fill in the sums of a linear layer.

        Parameters
        ----------
        values
            float32, shape ``(n_cells, >= n_in)``.
        sums
            What :meth:`sums` made for as many cells.

        Returns
        -------
        ndarray
            The sums.
        """
        kernels.multiply(sums, _filled(values, len(sums), self.weights), self.weights, self.bias)
        return sums


class CompiledEncoder:
    """A network's encoder on sparse counts, on a CPU.

    Parameters
    ----------
    network
        On the CPU.

    Raises
    ------
    PackageError
        If the sizes of its layers do not fit each other.
    """

    def __init__(self, network: Network) -> None:
        _require_sizes(network)
        self._network = network
        told = f", compiled anew in every process: {unkept[0]}" if unkept else ""
        self.arithmetic = f"{KERNELS}{told}"
        first, *rest = network.layers
        self._genes = Packed.of(first.weight[:, : network.n_genes], first.bias, kernels.WIDTH)
        numbers = first.weight[:, network.n_genes :]
        self._numbers = _packed(numbers, kernels.WIDTH) if numbers.shape[1] else None
        self._rest = [Packed.of(layer.weight, layer.bias) for layer in rest]
        ends = network.mean, network.variance
        self._posterior = Packed.of(torch.cat([end.weight for end in ends]), torch.cat([end.bias for end in ends]))
        self._classifier = [Packed.of(layer.weight, layer.bias) for layer in network.classifier]

    def reading(self, network: Network) -> Self:
        """An encoder of a network with further categories; all weights are shared."""
        _require_sizes(network)
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
        """Encode cells, any number.

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
            If pointers are none, a gene or a category is none of the network's, or there are not as many codes or
            numbers as cells.
        """
        network, n_cells = self._network, len(indptr) - 1
        indptr, indices, data = _checked(indptr, indices, data)
        for told in (*codes, *(() if continuous is None else (continuous,))):
            if len(told) != n_cells:
                raise DataError(f"There are {n_cells:,} cells, and a covariate of {len(told):,}.", "Give one each.")
        mean, variance = (np.empty((n_cells, len(network.mean.bias)), np.float32) for _ in range(2))
        steps = [self._genes, *self._rest, self._posterior]
        room = [step.sums(min(n_cells, _TOGETHER)) for step in steps]
        end = activations.VARIANCES[network.variance_activation], network.variance_eps
        for start in range(0, n_cells, _TOGETHER):
            cells = slice(start, min(start + _TOGETHER, n_cells))
            own = [code[cells] for code in codes]
            hidden, *sums = (part[: -(-(cells.stop - start) // kernels.ROWS) * kernels.ROWS] for part in room)
            self._gather(hidden, indptr[start : cells.stop + 1], indices, data)
            if continuous is not None and self._numbers is not None:
                numbers = _filled(continuous[cells], len(hidden), self._numbers)
                kernels.multiply(hidden, numbers, self._numbers, _NONE)
            _finish(hidden, network.layers[0], own)
            for layer, packed, out in zip(network.layers[1:], self._rest, sums, strict=False):
                hidden = packed.multiply(hidden, out)
                _finish(hidden, layer, own)
            activations.posterior(self._posterior.multiply(hidden, sums[-1]), mean[cells], variance[cells], *end)
        return torch.from_numpy(mean), torch.from_numpy(variance)

    def classify(self, location: FloatArray) -> torch.Tensor:
        """Probabilities of the labels, shape ``(n_cells, n_labels)``, of locations, ``(n_cells, n_latent)``."""
        n_cells, n_latent = location.shape
        if n_latent != len(self._network.mean.bias):
            raise DataError(
                f"A location has {n_latent} dimensions, and the latent {len(self._network.mean.bias)}.",
                "Classify what this encoder gave.",
            )
        found = np.empty((n_cells, len(self._network.labels)), np.float32)
        room = [step.sums(min(n_cells, _TOGETHER)) for step in self._classifier]
        for start in range(0, n_cells, _TOGETHER):
            hidden = location[start : start + _TOGETHER]
            n_rows = -(-len(hidden) // kernels.ROWS) * kernels.ROWS
            for layer, packed, out in zip(self._network.classifier, self._classifier, room, strict=True):
                hidden = packed.multiply(hidden, out[:n_rows])
                _finish(hidden, layer)
            activations.softmax(hidden, found[start : start + _TOGETHER])
        return torch.from_numpy(found)

    def _gather(self, hidden: FloatArray, indptr: LongArray, indices: IntArray, data: FloatArray) -> None:
        weights, network = self._genes.weights, self._network
        together = _CELLS if weights.nbytes <= _CACHE_BYTES else _TOGETHER
        logs = kernels.LOGARITHMS if network.log_variational else _NONE
        if kernels.gather(hidden, weights, self._genes.bias, indptr, indices, data, logs, together):
            return
        wrong = indices[(indices < 0) | (indices >= weights.shape[1])]
        raise DataError(
            f"There is a count of gene {wrong[0]:,}, and the encoder reads {network.n_genes:,}.",
            "Align the counts to the reference's genes.",
        )


def _require_sizes(network: Network) -> None:
    """Refuse layers that do not fit each other: the kernels would read whatever lies behind an array's end."""
    first, ends = network.layers[0], (network.mean, network.variance)
    right = first.weight.shape[1] >= network.n_genes and network.mean.bias.shape == network.variance.bias.shape
    n_in = first.weight.shape[1]
    for layer in network.layers:
        right &= _fits(layer, n_in)
        n_in = len(layer.bias)
    right &= all(_fits(end, n_in) for end in ends)
    n_in = len(network.mean.bias)
    for layer in network.classifier:
        right &= _fits(layer, n_in)
        n_in = len(layer.bias)
    if not right or (network.labels and n_in != len(network.labels)):
        raise PackageError("The layers of an encoder do not fit each other.", "Add the reference again.")


def _fits(layer: Layer, n_in: int) -> bool:
    """Whether a layer reads so many values, and all that it adds or scales with is as wide as what it gives."""
    n_out, read = layer.weight.shape
    tables = [table.shape[1] for table in layer.tables if table is not None]
    widths = {len(layer.bias), *tables, *(len(part) for part in layer.norm or ())}
    return bool(read == n_in and widths == {n_out})


def _packed(weight: torch.Tensor, width: int) -> FloatArray:
    n_out, n_in = weight.shape
    n_blocks = -(-n_out // width)
    packed = aligned(n_blocks, n_in, width)
    packed[:] = 0
    for block, part in enumerate(weight.split(width)):
        packed[block, :, : len(part)] = part.T.numpy()
    return packed


def _finish(sums: FloatArray, layer: Layer, codes: Sequence[LongArray] = ()) -> None:
    """Add the columns of each cell's categories, normalise and activate, all in place."""
    for table, code in zip(layer.tables, codes, strict=False):
        if table is not None:
            if len(code) and not 0 <= int(code.min()) <= int(code.max()) < len(table):
                raise DataError(
                    f"A cell's category is {int(code.min())} or {int(code.max())}, and a layer has {len(table)}.",
                    "Fit an adapter for it, or name the column that the reference was trained with.",
                )
            kernels.add_rows(sums, table.numpy(), np.ascontiguousarray(code, np.int64))
    if layer.norm is not None:
        activations.normalise(sums, *(part.numpy() for part in layer.norm), layer.norm_eps)
    if layer.activation:
        activations.activate(sums, activations.CODES[layer.activation])


def _checked(indptr: LongArray, indices: IntArray, data: FloatArray) -> tuple[LongArray, IntArray, FloatArray]:
    """Counts as the kernels take them, which would read whatever lies behind an array's end."""
    if len(data) != len(indices) or indptr[0] != 0 or indptr[-1] != len(data) or (np.diff(indptr) < 0).any():
        raise DataError(
            f"Row pointers run from {indptr[0]:,} to {indptr[-1]:,}, over {len(indices):,} genes and {len(data):,}"
            " counts.",
            "They must rise from 0 to the number of counts.",
        )
    counts = np.ascontiguousarray(indices, np.int32), np.ascontiguousarray(data, np.float32)
    return np.ascontiguousarray(indptr, np.int64), *counts


def _filled(values: FloatArray, n_rows: int, weights: FloatArray) -> FloatArray:
    """Rows that the kernels multiply with weights, the last one repeated up to so many."""
    if values.shape[1] < weights.shape[1]:
        raise DataError(
            f"There are {values.shape[1]} values of each cell, and a layer reads {weights.shape[1]}.",
            "Give every continuous covariate that the reference was trained with.",
        )
    return np.ascontiguousarray(padded(values, n_rows), np.float32)
