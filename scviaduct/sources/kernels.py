"""The compiled passes of a read: genes selected and renumbered, rows assembled and put in order.

Decoding is the wall of a read, 13 to 16 ns a value of a Census on one core, and what follows must not be another. numpy
and scipy pass over the values ten times, with a copy at each; here it is one pass over what was decoded (2 to 4 ns a
value) and one over what was selected (1 to 2 ns where genes keep their order, 5 to 10 where they do not). numba
compiles them, because it is installed already (scanpy and umap-learn need it), needs no compiler where scviaduct is
installed, and keeps what it compiled. Cython or C++ would mean a wheel for each platform of a project that ships as a
folder; tiledbsoma's own compressor of coordinates is private, starts threads and selects no genes.

Rows are not sorted by comparing. A row's columns are marked in a bitmap and its values added up by column; reading the
bitmap gives them in order, and counts that share a column come out as one. That is linear in the values.

Import this module where counts are read, not before: numba takes a quarter of a second. Arrays that are only read may
be read-only, and must be for what is compiled to be found again (:func:`given`): numba tells the two apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scviaduct.compiling import compiled
from scviaduct.lanes import LANES, lowest
from scviaduct.sources.registers import alike, in_registers, selected, taken

if TYPE_CHECKING:
    import numpy.typing as npt

    from scviaduct.values import FloatArray, IntArray, LongArray

    Marks = npt.NDArray[np.uint64]

_SEQUENCE = np.uint64(0x03F79D71B4CB0A89)
"""A de Bruijn sequence: the top six bits of its product with a power of two tell which."""
_ONE, _SIX, _TOP = np.uint64(1), np.uint64(6), np.uint64(58)
_LOW = np.uint64(63)
_LANES = np.uint64(LANES)
_BIT = np.zeros(64, np.uint8)
_BIT[[((int(_SEQUENCE) << bit) % 2**64) >> 58 for bit in range(64)]] = np.arange(64)


def given[T: np.generic](array: npt.NDArray[T]) -> npt.NDArray[T]:
    """A read-only, contiguous view, the one kind of array that kernels are compiled to read."""
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view


def scratch(n_genes: int) -> tuple[FloatArray, Marks]:
    """Sums and marks of one row, empty as kernels leave them."""
    return np.zeros(n_genes, np.float32), np.zeros(-(-n_genes // 64), np.uint64)


@compiled()
def _mark(columns: IntArray, values: FloatArray, first: int, last: int, sums: FloatArray, marks: Marks) -> None:
    """Add some values of a row to its sums; zeros are passed over."""
    for i in range(first, last):
        value = values[i]
        if value != 0:
            column = np.uint64(np.uint32(columns[i]))
            marks[column >> _SIX] |= _ONE << (column & _LOW)
            sums[column] += value


@compiled()
def _emit(columns: IntArray, values: FloatArray, first: int, sums: FloatArray, marks: Marks) -> np.int64:
    """Write a row's sums in order of their columns, and clear them; where the row ends."""
    end = np.uint64(first)
    for word in range(len(marks)):
        left = marks[word]
        marks[word] = 0
        start = np.uint64(word) << _SIX
        while left:
            lowest = left & (~left + _ONE)
            column = start + np.uint64(_BIT[(lowest * _SEQUENCE) >> _TOP])
            columns[end], values[end] = np.int32(column), sums[column]
            sums[column] = 0
            left ^= lowest
            end += _ONE
    return np.int64(end)


@compiled()
def align(
    starts: LongArray,
    stops: LongArray,
    genes: npt.NDArray[np.integer],
    values: npt.NDArray[np.generic],
    target: IntArray,
    indptr: LongArray,
    columns: IntArray,
    data: FloatArray,
    sums: FloatArray,
    marks: Marks,
) -> bool:
    """Rows of CSR with other columns.

    Parameters
    ----------
    starts, stops
        int64, shape ``(n_rows,)``; where each row lies in ``genes`` and ``values``.
    genes, values
        Shape ``(nnz,)``, of any integer and any real type.
    target
        int32; column of each gene, -1 for one that is dropped.
    indptr, columns, data
        The rows, written: int64 of shape ``(n_rows + 1,)``, whose first number says where they begin, int32 and float32
        with room for all values of the rows.
    sums, marks
        See :func:`scratch`.

    Returns
    -------
    bool
        Whether all genes are of ``target``; if not, what was written is void.
    """
    n_genes, filled = np.uint64(len(target)), np.uint64(indptr[0])
    given, room = np.uint64(len(genes)), np.uint64(len(columns))
    for row in range(len(starts)):
        first, in_order = filled, True
        # Unsigned positions spare a look for negative ones.
        i, stop = np.uint64(starts[row]), np.uint64(stops[row])
        # Sixteen at a time take half of the time: 0.6 us a cell that keeps 170 of 570 values.
        while in_registers() and i < stop and i + _LANES <= given and filled + _LANES <= room:
            filled, strange = selected(genes, values, target, columns, data, i, taken(stop - i), filled)
            if strange:
                return False
            i += _LANES
        # Written in any case, as in :func:`select`.
        while i < stop:
            gene = np.uint64(genes[i])
            if gene >= n_genes:
                return False
            column, value = target[gene], values[i]
            columns[filled], data[filled] = column, value
            filled += np.uint64((column >= 0) & (value != 0))
            i += _ONE
        for place in range(first + _ONE, filled):
            in_order &= columns[place] > columns[place - _ONE]
        if not in_order:
            _mark(columns, data, np.int64(first), np.int64(filled), sums, marks)
            filled = np.uint64(_emit(columns, data, np.int64(first), sums, marks))
        indptr[row + 1] = np.int64(filled)
    return True


@compiled()
def align_each(
    starts: LongArray,
    stops: LongArray,
    genes: npt.NDArray[np.integer],
    values: npt.NDArray[np.generic],
    targets: IntArray,
    indptr: LongArray,
    columns: IntArray,
    data: FloatArray,
    sums: FloatArray,
    marks: Marks,
    together: int,
) -> bool:
    """Rows of CSR with other columns, once for each of several references.

    Some rows are aligned to all of them before the next: they come out of memory once, which is half of the time.

    Parameters
    ----------
    starts, stops, genes, values, sums, marks
        As in :func:`align`; sums and marks of the widest reference.
    targets, indptr, columns, data
        As there, with a row for each reference; pointers begin with 0.
    together
        Rows at a time.
    """
    for first in range(0, len(starts), together):
        last = min(first + together, len(starts))
        for one in range(len(targets)):
            rows = starts[first:last], stops[first:last], genes, values, targets[one]
            if not align(*rows, indptr[one][first : last + 1], columns[one], data[one], sums, marks):
                return False
    return True


@compiled()
def select(
    rows: LongArray,
    genes: LongArray,
    values: FloatArray,
    chosen: LongArray,
    target: IntArray,
    columns: IntArray,
    data: FloatArray,
    run_rows: IntArray,
    run_starts: LongArray,
    sizes: LongArray,
) -> bool:
    """Append the selected values of some coordinates, zeros left out, as runs of one row each.

    Coordinates come out of TileDB a tile after the other and by row within each, so a run is a row's part of a tile:
    runs take little room, and what a row is looked up for is done once a run.

    Parameters
    ----------
    rows, genes, values
        int64, int64, float32, shape ``(n,)``, in any order.
    chosen
        int64, ascending; rows that are selected.
    target
        As in :func:`align`.
    columns, data
        int32 and float32; where values go. There must be room for ``n`` more.
    run_rows, run_starts
        int32 and int64; position in ``chosen`` of each run, and its start in ``columns``. Room for ``n`` more.
    sizes
        int64, shape ``(2,)``; values and runs that are there, counted on.

    Returns
    -------
    bool
        Whether all genes are of ``target``; if not, what was appended is void.
    """
    n, n_genes, filled, runs = np.uint64(len(rows)), np.uint64(len(target)), np.uint64(sizes[0]), sizes[1]
    position, i = np.int64(0), np.uint64(0)
    while i < n:
        row = rows[i]
        if position >= len(chosen) or chosen[position] != row:
            position = np.searchsorted(chosen, row)
        least = np.int32(2**31 - 1)
        if position < len(chosen) and chosen[position] == row:
            run_rows[runs], run_starts[runs] = position, np.int64(filled)
            runs += 1
            position += 1
            least = np.int32(0)
        while in_registers() and i + _LANES <= n:
            count = np.uint64(lowest(~alike(rows, i, row)))
            end, strange = selected(genes, values, target, columns, data, i, taken(count), filled)
            if strange:
                return False
            filled = end if least == 0 else filled
            i += count
            if count < _LANES:
                break
        # Written in any case and kept by counting on: where half of the genes are dropped, a branch is guessed wrong.
        while i < n and rows[i] == row:
            gene = np.uint64(genes[i])
            if gene >= n_genes:
                return False
            column, value = target[gene], values[i]
            columns[filled], data[filled] = column, value
            filled += np.uint64((column >= least) & (value != 0))
            i += _ONE
    sizes[0], sizes[1] = np.int64(filled), runs
    return True


@compiled()
def by_row(run_rows: IntArray, n_rows: int) -> tuple[LongArray, IntArray]:
    """Runs in the order of their rows: where those of each row end, and the runs."""
    ends, order = np.zeros(n_rows + 1, np.int64), np.empty(len(run_rows), np.int32)
    for row in run_rows:
        ends[row + 1] += 1
    for row in range(n_rows):
        ends[row + 1] += ends[row]
    for run in range(len(run_rows)):
        row = run_rows[run]
        order[ends[row]] = run
        ends[row] += 1
    return ends[:n_rows], order


@compiled()
def _strictly(columns: IntArray, start: np.uint64, stop: np.uint64) -> bool:
    """Whether columns ascend, each once; without a branch, so that vectors do it."""
    wrong = False
    for i in range(start + _ONE, stop):
        wrong |= columns[i] <= columns[i - _ONE]
    return not wrong


@compiled()
def _copy(
    columns: IntArray,
    data: FloatArray,
    start: np.uint64,
    stop: np.uint64,
    out_columns: IntArray,
    out_data: FloatArray,
    end: np.uint64,
) -> np.uint64:
    """Copy some values behind what is there; where they end."""
    for i in range(stop - start):
        out_columns[end + i] = columns[start + i]
    for i in range(stop - start):
        out_data[end + i] = data[start + i]
    return end + (stop - start)


@compiled()
def join(
    columns: IntArray,
    data: FloatArray,
    run_rows: IntArray,
    run_starts: LongArray,
    ascending: bool,  # noqa: FBT001
    indptr: LongArray,
    out_columns: IntArray,
    out_data: FloatArray,
    sums: FloatArray,
    marks: Marks,
) -> None:
    """Put the runs of each row together, in order.

    Parameters
    ----------
    columns, data, run_rows, run_starts
        What :func:`select` appended; ``run_starts`` ends with where the last run does.
    ascending
        Whether columns ascend with genes, as they do where the reference has the source's order. Runs are then copied,
        and put in order only where they are not.
    indptr, out_columns, out_data
        The rows, written: int64 of shape ``(n_rows + 1,)``, int32 and float32 with room for all that was appended.
    sums, marks
        See :func:`scratch`.
    """
    ends, order = by_row(run_rows, len(indptr) - 1)
    end, done = np.uint64(0), 0
    indptr[0] = 0
    for row in range(len(ends)):
        first, before, in_order = end, np.int32(-1), ascending
        for at in range(done, ends[row]):
            start, stop = run_starts[order[at]], run_starts[order[at] + 1]
            if not ascending:
                _mark(columns, data, start, stop, sums, marks)
            elif start < stop:
                in_order &= (columns[start] > before) & _strictly(columns, np.uint64(start), np.uint64(stop))
                before = columns[stop - 1]
                end = _copy(columns, data, np.uint64(start), np.uint64(stop), out_columns, out_data, end)
        done = ends[row]
        if not in_order:
            _mark(out_columns, out_data, np.int64(first), np.int64(end), sums, marks)
            end = np.uint64(_emit(out_columns, out_data, np.int64(first), sums, marks))
        indptr[row + 1] = np.int64(end)
