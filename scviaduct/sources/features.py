"""Features of several modalities beside each other: one list, one CSR.

Memory: each modality is read by its own slabs, and of each at most one is held while their rows are joined. Where a
modality keeps its cells in an order of its own, its part of what is asked for is held until it is in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
from scipy import sparse

from scviaduct.errors import SourceError
from scviaduct.sources.counts import GeneTarget, Rows, assemble
from scviaduct.sources.obs import normal
from scviaduct.sources.source import MAX_VAR_COLUMNS, without_genes
from scviaduct.values import GeneTable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy.typing as npt

    from scviaduct.sources.filters import ValueFilter
    from scviaduct.values import LongArray


class Matrix(Protocol):
    """What is read by rows."""

    def read(self, rows: LongArray, target: GeneTarget) -> Iterator[Rows]:
        """Selected rows in order, a slab at a time."""


class Vars(Protocol):
    """The identifiers of a matrix's features, by column."""

    index: str
    columns: tuple[str, ...]

    def __len__(self) -> int: ...

    def is_text(self, name: str) -> bool:
        """Whether a column holds text."""

    def read(self, name: str, start: int, stop: int) -> pa.Array:
        """Rows ``[start, stop)`` of a column or of the index."""


class Names:
    """Features that have a name and nothing else.

    Parameters
    ----------
    names
        One per feature.
    """

    index = "index"
    columns: tuple[str, ...] = ()

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)

    def __len__(self) -> int:
        return len(self._names)

    def is_text(self, name: str) -> bool:
        """Names are text."""
        return name == self.index

    def read(self, name: str, start: int, stop: int) -> pa.Array:
        """Some of the names, whatever the column."""
        del name
        return pa.array(self._names[start:stop], pa.string())


@dataclass(frozen=True, slots=True)
class Part:
    """One matrix of a file.

    Attributes
    ----------
    name
        What the file calls the modality; empty for a file of one matrix.
    modality
        One per feature, canonical; empty if the file does not say.
    matrix, var
        Counts, and the features' identifiers.
    where
        File and element of ``var``, for messages.
    layer, why
        Where the counts are, and why they were chosen.
    at
        int64, shape ``(n_cells,)``; row of each cell in the matrix, -1 for a cell that the modality lacks. None if the
        matrix has the rows of obs.
    """

    name: str
    modality: tuple[str, ...]
    matrix: Matrix
    var: Vars
    where: str
    layer: str
    why: str
    at: LongArray | None = None

    def read(self, rows: LongArray, target: GeneTarget) -> Iterator[Rows]:
        """Counts of some cells in their order; no counts for a cell that the modality lacks."""
        if self.at is None:
            return self.matrix.read(rows, target)
        at = self.at[rows]
        there = np.flatnonzero(at >= 0)
        if (np.diff(at[there]) > 0).all():
            return _spread(self.matrix.read(at[there], target), there, len(rows))
        order = np.argsort(at[there], kind="stable")
        held = assemble(self.matrix.read(at[there][order], target))
        return _spread(iter([_in_order(held, order)]), there, len(rows))

    def genes(self) -> dict[str, list[str]]:
        """Identifiers by column, ``"index"`` first."""
        names = [name for name in self.var.columns if self.var.is_text(name)][:MAX_VAR_COLUMNS]
        held = {"index": self.var.index, **{name: name for name in names if name != "index"}}
        return {label: self._column(name).fill_null("").to_pylist() for label, name in held.items()}

    def absent(self, chosen: ValueFilter) -> npt.NDArray[np.bool_]:
        """Features that a filter leaves out."""
        return ~chosen.mask(pa.table({name: self._column(name) for name in chosen.columns}))

    def _column(self, name: str) -> pa.Array:
        return normal(self.var.read(name, 0, len(self.var)), name, self.where)


class Features:
    """All features of a source, modality after modality.

    Parameters
    ----------
    parts
        At least one.
    unselected
        bool, shape ``(n_genes,)``; features that ``modality=`` leaves out, None if it leaves out none.
    """

    def __init__(self, parts: Sequence[Part], unselected: npt.NDArray[np.bool_] | None = None) -> None:
        self.parts = tuple(parts)
        self.unselected = unselected
        self.n_genes = sum(len(part.var) for part in parts)

    def read(self, rows: LongArray, target: GeneTarget) -> Iterator[Rows]:
        """Counts of some rows, in order, in bounded slabs; a modality of which nothing is wanted is not read."""
        pieces, first = [], 0
        for part in self.parts:
            columns = target.columns[first : first + len(part.var)]
            first += len(columns)
            pieces.append((part, GeneTarget(columns, target.n_genes)))
        wanted = [(part, share) for part, share in pieces if (share.columns >= 0).any()] or pieces[:1]
        streams = [part.read(rows, share) for part, share in wanted]
        return streams[0] if len(streams) == 1 else _beside(streams, target.n_genes)

    def table(self, absent: npt.NDArray[np.bool_] | None) -> GeneTable:
        """Identifiers of all features; a column that a modality lacks is ``""`` there."""
        held = [(part.genes(), len(part.var)) for part in self.parts]
        names = dict.fromkeys(name for columns, _ in held for name in columns)
        joined = {name: [value for columns, size in held for value in columns.get(name, [""] * size)] for name in names}
        columns = {name: without_genes(values, absent) for name, values in joined.items()}
        return GeneTable(columns, self.modality())

    def modality(self) -> tuple[str, ...]:
        """One per feature; empty if none is known."""
        if not any(part.modality for part in self.parts):
            return ()
        return tuple(chain.from_iterable(part.modality or ("",) * len(part.var) for part in self.parts))

    def absent(self, chosen: ValueFilter | None, where: str) -> npt.NDArray[np.bool_] | None:
        """Features that are left out: by ``modality=``, and by a filter on var in the modalities that have its columns.

        Raises
        ------
        FilterError
            If no modality has them.
        """
        if chosen is None:
            return self.unselected
        able = [part for part in self.parts if {*chosen.columns} <= {*part.var.columns, part.var.index}]
        if not able:
            first = self.parts[0].var
            chosen.check((*first.columns, first.index), where)
        masks = [part.absent(chosen) if part in able else np.zeros(len(part.var), np.bool_) for part in self.parts]
        absent = np.concatenate(masks)
        return absent if self.unselected is None else absent | self.unselected

    def described(self) -> dict[str, str]:
        """Layers, reasons and sizes, for people."""
        if len(self.parts) == 1 and not self.parts[0].name:
            return {"layer": self.parts[0].layer, "why": self.parts[0].why}
        return {
            "layer": ", ".join(f"{part.name}:{part.layer}" for part in self.parts),
            "why": "; ".join(f"{part.name}: {part.why}" for part in self.parts),
        }

    def sizes(self) -> str:
        """How many features there are of each modality; empty if none is known."""
        told = self.modality()
        counts = {name: told.count(name) for name in dict.fromkeys(told)}
        return ", ".join(f"{count:,} {name or 'of no named modality'}" for name, count in counts.items())


def checked(part: Part, shape: tuple[int, int], cells: int, where: str) -> Part:
    """The part itself, if its matrix is of the shape that its cells and features make.

    Raises
    ------
    SourceError
        If it does not.
    """
    if shape != (cells, len(part.var)):
        rows, columns = shape
        raise SourceError(
            f"{part.layer} of {where} has {rows} cells and {columns} features, and should have {cells} and"
            f" {len(part.var)}.",
            "Write the file again with a current anndata or mudata.",
        )
    return part


def _spread(parts: Iterator[Rows], there: LongArray, cells: int) -> Iterator[Rows]:
    """Rows of the cells that are there, with rows of no counts between them for the others."""
    done, first = 0, 0
    for part in parts:
        last = first + len(part.indptr) - 1
        stop = int(there[last]) if last < len(there) else cells
        lengths = np.zeros(stop - done, np.int64)
        lengths[there[first:last] - done] = np.diff(part.indptr)
        yield Rows(np.concatenate(([0], np.cumsum(lengths))), part.indices, part.data)
        done, first = stop, last
    if done < cells:
        yield Rows(np.zeros(cells - done + 1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))


def _in_order(held: Rows, order: LongArray) -> Rows:
    """Rows put where they belong: row ``i`` goes to ``order[i]``."""
    # A matrix of width 1 more than any column: scipy only moves rows here.
    width = int(held.indices.max(initial=0)) + 1
    matrix = sparse.csr_matrix((held.data, held.indices, held.indptr), shape=(len(order), width))
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    moved = matrix[back]
    return Rows(moved.indptr.astype(np.int64), moved.indices.astype(np.int32, copy=False), moved.data)


def _beside(streams: Sequence[Iterator[Rows]], width: int) -> Iterator[Rows]:
    """Join streams of the same rows, whose slabs end at different rows."""
    nothing = Rows(np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))
    held = [nothing for _ in streams]
    while True:
        for i, stream in enumerate(streams):
            while len(held[i].indptr) == 1:
                part = next(stream, None)
                if part is None:
                    return
                held[i] = part
        rows = min(len(part.indptr) for part in held) - 1
        yield _sum([_head(part, rows) for part in held], rows, width)
        held = [_tail(part, rows) for part in held]


def _head(part: Rows, rows: int) -> Rows:
    end = int(part.indptr[rows])
    return Rows(part.indptr[: rows + 1], part.indices[:end], part.data[:end])


def _tail(part: Rows, rows: int) -> Rows:
    start = int(part.indptr[rows])
    return Rows(part.indptr[rows:] - start, part.indices[start:], part.data[start:])


def _sum(parts: Iterable[Rows], rows: int, width: int) -> Rows:
    """Rows whose columns are those of the block already, added."""
    # Pointers of 32 bits keep scipy's columns at 32 bits; a slab never has 2**31 values.
    matrices: list[Any] = [
        sparse.csr_matrix((part.data, part.indices, part.indptr.astype(np.int32)), shape=(rows, width))
        for part in parts
    ]
    whole = reduce(lambda left, right: left + right, matrices)
    return Rows(whole.indptr.astype(np.int64), whole.indices.astype(np.int32, copy=False), whole.data)
