"""Encoding on a GPU: counts travel narrowed and by themselves, and come back as latents.

The first layer takes a piece of cells as it arrives (:mod:`scviaduct.families.lane`,
:mod:`scviaduct.families.gather`) and sums each cell on its own. The layers behind it multiply the matrices of a step:
always of :data:`STEP` rows, filled up with zeros, so that each step runs the same kernels of cuBLAS and a cell's bits
do not depend on its neighbours.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import nn

from scviaduct.errors import DataError
from scviaduct.families.base import Covariates, Encoded
from scviaduct.families.gather import FirstLayer, kernel_of
from scviaduct.families.lane import Lane
from scviaduct.families.precision import multiplying

if TYPE_CHECKING:
    from collections.abc import Mapping

    from scviaduct.families.gather import Kernel
    from scviaduct.families.lane import Sent
    from scviaduct.families.network import Layer, Network
    from scviaduct.families.precision import Precision
    from scviaduct.values import FloatArray, IntArray, LongArray

STEP = 32_768
"""Cells that go through the dense layers at a time; a step takes Python some 0.4 ms, and 67 MB of 512 hidden units."""


@dataclass(frozen=True, slots=True)
class _Block:
    """What all steps of a block have in common.

    Attributes
    ----------
    n_cells
        Of the block.
    codes
        Per categorical covariate, batch first: int32 on the device, filled up to whole steps.
    numbers
        Continuous covariates, float32 on the device, filled up as well; None without.
    rows
        Per network, where its first layer looks the covariates up.
    results
        Per network: mean, location and variance of all cells, on the host; only the mean of further latents.
    """

    n_cells: int
    codes: list[torch.Tensor]
    numbers: torch.Tensor | None
    rows: Mapping[str, torch.Tensor | None]
    results: Mapping[str, tuple[torch.Tensor, ...]]


class DeviceEncoder:
    """Encodes sparse counts with networks on a CUDA device.

    Parameters
    ----------
    networks
        Name of each latent to the network that gives it, the main one first; on the device.
    device
        A CUDA device; on ``"cpu"`` the same steps run one after the other, which tests use.
    precision
        What dense layers multiply in: ``"float32"``, which equals scvi-tools to 1e-5 sd; ``"tf32"``; or ``"bf16"``, in
        which the first layer's weights are held, too. A run always maps in float32.
    kernel
        What runs the first layer; None for Triton where it is.
    feeders
        Threads that narrow counts: see :class:`~scviaduct.families.lane.Lane`.
    """

    def __init__(
        self,
        networks: Mapping[str, Network],
        device: str,
        *,
        precision: Precision = "float32",
        kernel: Kernel | None = None,
        feeders: int | None = None,
    ) -> None:
        self._networks = dict(networks)
        self._lane = Lane.of(device, feeders)
        self._precision = precision
        self._kernel, why = (kernel, "as told") if kernel else kernel_of(self._lane.device)
        self.path = f"{device}, first layer by {self._kernel}" + (f" ({why})" if why else "") + f", {precision}"
        self._firsts: dict[str, FirstLayer] = {}

    def reading(self, networks: Mapping[str, Network]) -> Self:
        """An encoder of networks with further categories; buffers are shared, and the genes' weights once made."""
        other = copy.copy(self)
        firsts = {name: first.reading(networks[name]) for name, first in self._firsts.items()}
        vars(other).update(_networks=dict(networks), _firsts=firsts)
        return other

    def _first_layers(self) -> dict[str, FirstLayer]:
        if not self._firsts:  # who opens a reference and encodes nothing holds its weights once
            dtype = torch.bfloat16 if self._precision == "bf16" else torch.float32
            self._firsts = {name: FirstLayer(each, self._kernel, dtype) for name, each in self._networks.items()}
        return self._firsts

    @torch.inference_mode()
    def encode(self, indptr: LongArray, indices: IntArray, data: FloatArray, covariates: Covariates) -> Encoded:
        """Encode a block: see :meth:`scviaduct.families.base.Encoder.encode`.

        The arrays that come back lie in pinned memory, where the device wrote them.

        Raises
        ------
        DataError
            If a count is of a gene that there is not, or a cell of a category that there is not.
        """
        main, *others = firsts = self._first_layers()
        n_genes = max(network.n_genes for network in self._networks.values())
        with self._lane.held(), multiplying(self._precision):
            block = self._block(len(indptr) - 1, covariates)
            hidden: dict[str, torch.Tensor] = {}
            for sent in self._lane.feed(indptr, indices, data, n_genes=n_genes, step=STEP):
                if sent.start % STEP == 0:
                    hidden = self._empty(min(STEP, block.n_cells - sent.start))
                self._first(sent, block, firsts, hidden)
                if sent.stop % STEP == 0 or sent.stop == block.n_cells:
                    self._finish(sent.stop, block, hidden)
        mean, location, variance = (part.numpy() for part in block.results[main])
        return Encoded(mean, location, variance, {name: block.results[name][0].numpy() for name in others})

    def _block(self, n_cells: int, covariates: Covariates) -> _Block:
        n_rows = -(-n_cells // STEP) * STEP
        codes = self._codes(covariates, n_cells, n_rows)
        numbers = covariates.continuous
        if numbers is not None:
            filled = np.zeros((n_rows, numbers.shape[1]), np.float32)
            filled[:n_cells] = numbers
            numbers = self._lane.send(filled)
        rows = {name: first.rows(codes) for name, first in self._first_layers().items()}
        results = {}
        for i, (name, network) in enumerate(self._networks.items()):
            n = len(network.mean.bias)
            results[name] = tuple(self._lane.result(n_cells, n) for _ in range(1 if i else 3))
        return _Block(n_cells, codes, numbers, rows, results)

    def _codes(self, covariates: Covariates, n_cells: int, n_rows: int) -> list[torch.Tensor]:
        """Codes of the categorical covariates, the batch first; without a batch, zeros are in its place."""
        batch, more = covariates.batch, covariates.categorical
        if batch is None and more is None:
            return []
        columns = [np.zeros(n_cells, np.int64) if batch is None else batch, *(() if more is None else more.T)]
        found = np.zeros((len(columns), n_rows), np.int32)
        for i, column in enumerate(columns):
            size = min(self._sizes(i), default=None)
            if size is not None and len(column) and (column.min() < 0 or column.max() >= size):
                raise DataError(
                    f"A cell has category {column[(column < 0) | (column >= size)][0]:,} of a covariate with {size:,}.",
                    "Extend the encoder by the adapters of new categories first.",
                )
            found[i, :n_cells] = column
        return list(self._lane.send(found))

    def _sizes(self, covariate: int) -> list[int]:
        """Categories that each layer knows which reads a covariate."""
        layers = [layer for network in self._networks.values() for layer in network.layers]
        tables = [layer.tables[covariate] for layer in layers if covariate < len(layer.tables)]
        return [len(table) for table in tables if table is not None]

    def _empty(self, n_cells: int) -> dict[str, torch.Tensor]:
        """Room for the first layers' sums of a step, zero where it has no cell."""
        found = {}
        for name, network in self._networks.items():
            sums = torch.empty((STEP, len(network.layers[0].bias)), dtype=torch.float32, device=self._lane.device)
            if n_cells < STEP:
                sums[n_cells:] = 0
            found[name] = sums
        return found

    def _first(
        self, sent: Sent, block: _Block, firsts: Mapping[str, FirstLayer], hidden: Mapping[str, torch.Tensor]
    ) -> None:
        low, high = sent.start % STEP, sent.start % STEP + sent.stop - sent.start
        for name, first in firsts.items():
            rows = block.rows[name]
            first(sent, rows if rows is None else rows[:, sent.start : sent.stop], hidden[name][low:high])

    def _finish(self, stop: int, block: _Block, hidden: Mapping[str, torch.Tensor]) -> None:
        """The layers behind the first for the step that ends at a cell, and its way back."""
        start = (stop - 1) // STEP * STEP
        rows = slice(start, start + STEP)
        codes = [code[rows] for code in block.codes]
        back = []
        for name, network in self._networks.items():
            first, *rest = network.layers
            sums = hidden[name]
            if block.numbers is not None and first.weight.shape[1] > network.n_genes:
                sums += nn.functional.linear(block.numbers[rows], first.weight[:, network.n_genes :])
            values = first.finish(sums)  # its covariates are in the sums
            for layer in rest:
                values = layer.finish(self._multiplied(layer, values), codes)
            location = self._multiplied(network.mean, values)
            variance = network.positive(self._multiplied(network.variance, values))
            mean = torch.softmax(location, dim=-1) if network.logistic_normal else location
            for target, source in zip(block.results[name], (mean, location, variance), strict=False):
                back.append((target[start:stop], source[: stop - start]))
        self._lane.give_back(back)

    def _multiplied(self, layer: Layer, values: torch.Tensor) -> torch.Tensor:
        if self._precision != "bf16":
            return nn.functional.linear(values, layer.weight, layer.bias)
        return nn.functional.linear(values.bfloat16(), layer.weight.bfloat16()).float() + layer.bias
