"""The way of a block's counts to a GPU, and of latents back: copies that overlap with each other and the encoding.

A GPU copies from memory that the system may move (NumPy's) only by way of a buffer of the driver's, and the process
waits. From pinned memory it copies by itself. A lane therefore holds a few pinned buffers, as many on the GPU, and two
streams beside the one that computes. While a piece travels and those before it are encoded, threads already narrow the
next one into a buffer that has left. Only a buffer still on its way makes the process wait.

What binds is Python: a launch or a copy takes it 20 to 60 us, and waking a thread 40 (16 virtual cores beside an H100),
so pieces are large, and threads share one instead of each sending its own, which gave half of the rate.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from scviaduct.families.narrowing import COUNTS, Layout, cut, gene_type, narrow

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from scviaduct.values import FloatArray, IntArray, LongArray

PIECE = 6 << 20
"""Most counts of a piece, a step's at 2,000 genes: 18 MB, 0.3 ms on the way."""
_PART = 1 << 16
"""Fewest counts that a thread is woken for, 0.1 ms of its time."""
_AHEAD = 2
"""Pieces that threads are given before they are waited for, so that none is idle while another finishes."""
_SLOTS = _AHEAD + 2
"""Buffers: beside those, one travels and one is encoded."""
_FEEDERS = 8
"""Threads at most, unless told otherwise: with 12 and 16 of 16 virtual cores, waking them took what they gained."""
_TYPES = {
    np.dtype(np.uint8): torch.uint8,
    np.dtype(np.uint16): torch.uint16,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
}


@dataclass(frozen=True, slots=True)
class Sent:
    """A piece on the device; its tensors are valid until the next piece is asked for.

    Attributes
    ----------
    start, stop
        Its cells in the block.
    pointers
        int32, shape ``(stop - start + 1,)``.
    genes
        uint16 or int32, shape ``(nnz,)``.
    counts
        uint8, uint16 or float32, same shape.
    """

    start: int
    stop: int
    pointers: torch.Tensor
    genes: torch.Tensor
    counts: torch.Tensor


class _Slot:
    """A pinned buffer and its twin on the device; ``left`` and ``used`` mark when either is free."""

    def __init__(self, device: torch.device) -> None:
        module = torch.get_device_module(device)
        self.left, self.used = module.Event(), module.Event()
        self._device = device
        self._grow(0)

    def _grow(self, n_bytes: int) -> None:
        there = torch.empty(n_bytes, dtype=torch.uint8, device=self._device)
        here = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        self.here, self.there = here, there  # both or neither: the next block finds twins
        # What an allocator gives out, kernels of the computing stream may still use: the copy, on another, awaits them.
        self.used.record()

    def hold(self, layout: Layout) -> None:
        """Have room for a piece, once what the buffer held has left it."""
        self.left.synchronize()
        if layout.n_bytes > len(self.here):  # the first piece, the first of so wide counts, or one cell of very many
            self.used.synchronize()
            self._grow(max(layout.n_bytes, replace(layout, counts=PIECE).n_bytes))


@dataclass(slots=True)
class _Filling:
    """A piece that threads are writing, each a part of its counts."""

    piece: tuple[int, int]
    layout: Layout
    slot: _Slot
    parts: list[Future[bool]]


class Lane:
    """Pinned buffers, streams and threads between this process and a device.

    Parameters
    ----------
    device
        A CUDA device; on ``"cpu"`` the same steps run without overlap, which tests use.
    feeders
        Threads that narrow counts; None for as many as PyTorch computes on, up to eight. In an actor that is one, which
        narrows what a hundred readers decode.
    """

    def __init__(self, device: str, feeders: int | None = None) -> None:
        self.device = torch.device(device)
        self.module: Any = torch.get_device_module(self.device)
        self.pinned = self.device.type == "cuda"
        if self.pinned and self.device.index is None:  # threads are told which, and have no current one
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._told = feeders
        self._slots: list[_Slot] = []
        self._busy = threading.Lock()
        self._compute: Any = None

    @classmethod
    @lru_cache
    def of(cls, device: str, feeders: int | None = None) -> Lane:
        """The lane that all encoders of this process share; they take turns."""
        return cls(device, feeders)

    @cached_property
    def feeders(self) -> int:
        """Threads that narrow counts."""
        return self._told or min(torch.get_num_threads(), _FEEDERS)

    @cached_property
    def pool(self) -> ThreadPoolExecutor:
        """The threads."""
        return ThreadPoolExecutor(self.feeders, "feeder")

    @cached_property
    def _out(self) -> Any:
        return self.module.Stream()

    @cached_property
    def _back(self) -> Any:
        return self.module.Stream()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The device is the current one, and the lane this thread's alone; what was to be returned is here then."""
        with self._busy, self.module.device(self.device) if self.pinned else contextlib.nullcontext():
            self._compute = self.module.current_stream()
            try:
                yield
            finally:
                if self.pinned:
                    self._back.synchronize()

    def feed(
        self, indptr: LongArray, indices: IntArray, data: FloatArray, *, n_genes: int, step: int
    ) -> Generator[Sent]:
        """Send a block a piece after the other.

        Parameters
        ----------
        indptr, indices, data
            Counts as CSR: int64 of shape ``(n_cells + 1,)``, int32 and float32.
        n_genes
            Genes that there are.
        step
            Cells of a step; no piece lies in two.

        Yields
        ------
        Sent
            In the order of the cells. The current stream waits for it by itself.

        Raises
        ------
        DataError
            If a count is of a gene that there is not.
        """
        pieces = cut(indptr, step, PIECE)
        block = _Block(self, indptr, indices, data, n_genes)
        ahead: deque[_Filling] = deque()
        try:
            for i in range(len(pieces)):
                for piece in pieces[i + len(ahead) : i + _AHEAD]:
                    ahead.append(block.begin(piece, self._slot()))
                filling = block.finish(ahead[0])
                ahead.popleft()
                for piece in pieces[i + _AHEAD : i + _AHEAD + 1]:
                    ahead.append(block.begin(piece, self._slot()))
                try:
                    yield self._send(filling)
                finally:
                    filling.slot.used.record(self._compute)
        finally:
            wait([part for filling in ahead for part in filling.parts])  # threads may still be writing

    def _slot(self) -> _Slot:
        """The buffer whose piece was sent longest ago."""
        self._slots.append(self._slots.pop(0) if len(self._slots) == _SLOTS else _Slot(self.device))
        return self._slots[-1]

    def _send(self, filling: _Filling) -> Sent:
        layout, slot = filling.layout, filling.slot
        there = slot.there[: layout.n_bytes]
        with self.module.stream(self._out):
            self._out.wait_event(slot.used)
            there.copy_(slot.here[: layout.n_bytes], non_blocking=True)
            slot.left.record(self._out)
        self._compute.wait_event(slot.left)
        pointers = there[: 4 * (layout.cells + 1)].view(torch.int32)
        genes = there[layout.genes_at : layout.genes_at + layout.counts * layout.gene.itemsize]
        counts = there[layout.counts_at :].view(_TYPES[layout.count])
        return Sent(*filling.piece, pointers, genes.view(_TYPES[layout.gene]), counts)

    def send(self, values: np.ndarray[Any, Any]) -> torch.Tensor:
        """Send an array of a block, once, on the current stream."""
        here = torch.empty(values.shape, dtype=_TYPES[values.dtype], pin_memory=self.pinned)
        here.numpy()[...] = values
        return here.to(self.device, non_blocking=True)

    def result(self, n_rows: int, n_columns: int) -> torch.Tensor:
        """Memory for a result, float32: pinned, so that it arrives by itself; PyTorch keeps it for the next block."""
        return torch.empty((n_rows, n_columns), dtype=torch.float32, pin_memory=self.pinned)

    def give_back(self, parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Copy what the current stream computes into results: target and source of each; :meth:`held` waits for it."""
        self._back.wait_stream(self._compute)
        with self.module.stream(self._back):
            for target, source in parts:
                target.copy_(source, non_blocking=True)
                if self.pinned:
                    source.record_stream(self._back)


class _Block:
    """A block on its way: its counts, and what they travel as so far."""

    def __init__(self, lane: Lane, indptr: LongArray, indices: IntArray, data: FloatArray, n_genes: int) -> None:
        self._lane, self._indptr, self._indices, self._data, self._n_genes = lane, indptr, indices, data, n_genes
        self._gene, self._width = gene_type(n_genes), 0

    def begin(self, piece: tuple[int, int], slot: _Slot) -> _Filling:
        """Have threads write a piece into a buffer that has left."""
        start, stop = piece
        counts = int(self._indptr[stop] - self._indptr[start])
        filling = _Filling(piece, Layout(stop - start, counts, self._gene, COUNTS[self._width]), slot, [])
        self._write(filling)
        return filling

    def finish(self, filling: _Filling) -> _Filling:
        """Wait for a piece; one whose counts do not fit is written again, wider, as those behind it are."""
        while wait(filling.parts) and not all(part.result() for part in filling.parts):
            self._width = max(self._width, COUNTS.index(filling.layout.count) + 1)
            filling.layout = replace(filling.layout, count=COUNTS[self._width])
            self._write(filling)
        return filling

    def _write(self, filling: _Filling) -> None:
        layout, (start, stop) = filling.layout, filling.piece
        filling.slot.hold(layout)
        pointers, genes, counts = layout.views(filling.slot.here.numpy())
        np.subtract(self._indptr[start : stop + 1], self._indptr[start], out=pointers, casting="unsafe")
        first, lane = int(self._indptr[start]), self._lane
        size = max(_PART, -(-layout.counts // lane.feeders))
        filling.parts = []
        for low in range(0, layout.counts, size):
            own, part = slice(low, low + size), slice(first + low, first + min(low + size, layout.counts))
            rows = self._indices[part], self._data[part], genes[own], counts[own]
            filling.parts.append(lane.pool.submit(narrow, *rows, self._n_genes))
