"""What one process holds of an index, and answers of it: a slice, of all segments or of some."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Self

import numpy as np
import pyarrow as pa

from scviaduct.allocator import keep_memory
from scviaduct.store.index.kernels import gather
from scviaduct.store.index.scanning import SLOT, Block, Found, scan_blocks, scan_lists, threaded
from scviaduct.store.search.hits import OWN
from scviaduct.store.search.selection import selected

if TYPE_CHECKING:
    from scviaduct.store.index.opened import Index
    from scviaduct.store.search.device import DeviceVectors
    from scviaduct.values import FloatArray, IntArray, LongArray

GATHERED = 1 << 20
"""Selected cells up to which their vectors are copied together: 150 MB of 30 dimensions. Above, all cells of a list are
compared and those that are not selected are passed over."""
_COPY = 16
"""What copying a selected vector costs, in comparisons of a vector with a query: an estimate, not measured."""
_KEPT = 4
"""Selections that are kept, so that the same condition is evaluated once."""
_PLACE = (1 << SLOT) - 1


@dataclass(slots=True)
class Selection:
    """Cells that a condition selects.

    Attributes
    ----------
    elements
        Number of each segment to its selected vectors, int64, ascending.
    counts
        int64, shape ``(lists,)``: selected cells of each list.
    asked
        Queries that were compared with all of them so far.
    flat, listed
        Copies of the vectors as one list, and in their lists, with the slot of each; made when they are first needed.
    """

    elements: dict[int, LongArray]
    counts: LongArray
    asked: int = 0
    flat: tuple[Block, LongArray] | None = None
    listed: tuple[Block, LongArray] | None = None

    @property
    def cells(self) -> int:
        """Number of them."""
        return int(self.counts.sum())


class Slice:
    """Segments of an index, and what is asked of them.

    Parameters
    ----------
    index
        Opened, with the segments of this slice.
    threads
        That queries are spread over; None for one a core of this process.
    device
        Vectors on a GPU, which exact searches of all cells use; None for the CPU.
    """

    def __init__(self, index: Index, threads: int | None = None, device: DeviceVectors | None = None) -> None:
        keep_memory()  # what a batch takes would be given back after it, and its pages cleared and faulted in again
        self.index = index
        self._threads, self._device = threads, device
        self._selections: OrderedDict[str, Selection] = OrderedDict()

    @cached_property
    def _blocks(self) -> list[Block]:
        return [Block.of(*one) for one in self.index.segments.items()]

    @cached_property
    def _columns(self) -> dict[int, Columns]:
        return {number: Columns.of(segment.table) for number, segment in self.index.segments.items()}

    def sizes(self) -> LongArray:
        """Cells of each list, int64, shape ``(lists,)``."""
        none = np.zeros(self.index.lists, np.int64)
        return sum((segment.sizes for segment in self.index.segments.values()), none)

    def count(self, where: str) -> LongArray:
        """Selected cells of each list, int64, shape ``(lists,)``."""
        return self._select(where).counts

    def exact(self, latent: FloatArray, k: int, where: str | None) -> Found:
        """The k nearest of all cells, or of the selected ones; each is compared."""
        if where is None and self._device is not None:
            return self._device.nearest(latent, k)
        if where is None:
            return threaded(lambda part: scan_blocks(self._blocks, part, k), latent, threads=self._threads)
        selection = self._select(where)
        selection.asked += len(latent)
        others = self.index.manifest.cells - selection.cells
        if selection.cells > GATHERED or selection.asked * others < _COPY * selection.cells:
            blocks = self._masked(selection)
            return threaded(lambda part: scan_blocks(blocks, part, k), latent, threads=self._threads)
        selection.flat = selection.flat or self._gathered(selection, in_lists=False)
        block, slots = selection.flat
        return _named(threaded(lambda part: scan_blocks([block], part, k), latent, threads=self._threads), slots)

    def probe(
        self,
        latent: FloatArray,
        k: int,
        where: str | None,
        order: LongArray | IntArray,
        upto: LongArray,
        bounds: FloatArray,
    ) -> Found:
        """The k nearest among the cells of some lists.

        Parameters
        ----------
        latent, k, where
            Queries, neighbours of each, and what these fulfil.
        order, upto, bounds
            Lists of each query, and how far it looks, as :func:`scviaduct.store.index.scanning.scan_lists` takes them.
        """
        slots, blocks = None, self._blocks
        if where is not None:
            selection = self._select(where)
            if selection.cells > GATHERED:
                blocks = self._masked(selection)
            else:
                selection.listed = selection.listed or self._gathered(selection, in_lists=True)
                blocks, slots = [selection.listed[0]], selection.listed[1]
        found = threaded(
            lambda *part: scan_lists(blocks, part[0], k, *part[1:]), latent, order, upto, bounds, threads=self._threads
        )
        return found if slots is None else _named(found, slots)

    def members(self, where: str, limit: int | None) -> tuple[LongArray, LongArray]:
        """Positions and slots of the selected cells, by position."""
        selection = self._select(where)
        positions = [self.index.segments[n].positions(at) for n, at in selection.elements.items()]
        slots = [(n << SLOT) + at for n, at in selection.elements.items()]
        whole, named = np.concatenate([*positions, np.zeros(0, np.int64)]), np.concatenate([*slots, np.zeros(0, int)])
        order = np.argsort(whole, kind="stable")[:limit]
        return whole[order], named[order]

    def vectors(self, slots: LongArray) -> FloatArray:
        """Vectors of slots of this slice, float32, shape ``(n, dimensions)``."""
        out = np.empty((len(slots), self.index.manifest.dimensions), np.float32)
        for number, segment in self.index.segments.items():
            here = np.flatnonzero(slots >> SLOT == number)
            out[here] = segment.vectors(slots[here] & _PLACE)
        return out

    def take(self, slots: LongArray) -> pa.Table:
        """Rows of slots of this slice, in their order and without the columns of ``hits.OWN``; text is plain."""
        numbers = slots >> SLOT
        parts: list[pa.Table] = []
        order: list[LongArray] = []
        for number in self.index.segments:
            here = np.flatnonzero(numbers == number)
            if len(here) or not parts:
                parts.append(self._columns[number].take(pa.array(slots[here] & _PLACE)))
                order.append(here)
        if len(parts) == 1:
            return parts[0]
        back = np.argsort(np.concatenate(order), kind="stable")
        return pa.concat_tables(parts).take(pa.array(back))

    def _select(self, where: str) -> Selection:
        known = self._selections.pop(where, None)
        if known is None:
            elements = {n: selected(segment, where) for n, segment in self.index.segments.items()}
            counts = np.zeros(self.index.lists, np.int64)
            for number, at in elements.items():
                inside = np.searchsorted(at, self.index.segments[number].offsets)
                counts += np.diff(inside)
            known = Selection(elements, counts)
        self._selections[where] = known
        while len(self._selections) > _KEPT:
            self._selections.popitem(last=False)
        return known

    def _masked(self, selection: Selection) -> list[Block]:
        """All blocks, with the selected vectors marked."""
        blocks = []
        for number, elements in selection.elements.items():
            segment = self.index.segments[number]
            mask = np.zeros(len(segment.members), bool)
            mask[elements] = True
            blocks.append(Block.of(number, segment, mask))
        return blocks

    def _gathered(self, selection: Selection, *, in_lists: bool) -> tuple[Block, LongArray]:
        """The selected vectors, copied together; slots of them."""
        counts = selection.counts if in_lists else np.array([selection.cells])
        offsets = np.concatenate([[0], np.cumsum(counts)])
        at, d = offsets[:-1].copy(), self.index.manifest.dimensions
        x = np.empty(selection.cells * d, np.float32)
        positions, slots = np.empty(selection.cells, np.int32), np.empty(selection.cells, np.int64)
        for number, elements in selection.elements.items():
            segment = self.index.segments[number]
            places = _places(segment.offsets, elements, at)
            positions[places], slots[places] = segment.positions(elements), (number << SLOT) + elements
            gather(segment.x, segment.offsets, elements, d, at, offsets, x)
        return Block.plain(x, offsets, positions), slots


def _places(offsets: LongArray, elements: LongArray, at: LongArray) -> LongArray:
    """Where :func:`scviaduct.store.index.kernels.gather` puts vectors, given the next free place of each list."""
    if len(at) == 1:
        return np.arange(at[0], at[0] + len(elements))
    inside = np.searchsorted(elements, offsets)
    places: LongArray = np.arange(len(elements)) + np.repeat(at - inside[:-1], np.diff(inside))
    return places


def _named(found: Found, slots: LongArray) -> Found:
    """What was found among copies, with the slots of what they are copies of."""
    named = np.full(found.slot.shape, -1, np.int64)
    there = found.slot >= 0
    named[there] = slots[found.slot[there]]
    return Found(found.distance, found.position, named)


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of a segment's rows, to take some rows of: asking a table for each costs as much as a query.

    Attributes
    ----------
    schema
        Of what is taken: text is plain.
    arrays
        The columns.
    """

    schema: pa.Schema
    arrays: tuple[pa.Array, ...]

    @classmethod
    def of(cls, table: pa.Table) -> Self:
        """The columns of hits, of a table that is one batch; each that is taken costs 20 us, however few the rows."""
        table = table.drop_columns([name for name in OWN if name in table.column_names])
        kinds = [(one.name, pa.string() if pa.types.is_dictionary(one.type) else one.type) for one in table.schema]
        columns = (column.chunk(0) if column.num_chunks else pa.array([], column.type) for column in table.columns)
        return cls(pa.schema(kinds), tuple(columns))

    def take(self, at: pa.Array) -> pa.Table:
        """Some rows."""
        taken = [
            array.dictionary.take(array.indices.take(at)) if isinstance(array, pa.DictionaryArray) else array.take(at)
            for array in self.arrays
        ]
        return pa.Table.from_arrays(taken, schema=self.schema)
