"""Counts of some rows of a SOMA matrix, in memory that is bounded.

At a time, a read holds what TileDB decoded (``DECODED_BYTES``) with its buffers (three columns of ``BUFFER_BYTES``),
and the selected values of a slab: as many rows as fit ``SLAB_BYTES``, but never less than a tile has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import tiledbsoma

from scviaduct.sources.counts import SLAB_BYTES, Rows, cut
from scviaduct.sources.unreadable import MEND, UnreadableError, each

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from scviaduct.sources.counts import GeneTarget
    from scviaduct.values import IntArray, LongArray

BUFFER_BYTES = 16 << 20
"""TileDB's buffer for each column; a Census's own default is 1 GiB. Every table that it fills costs a thread: 20.3k,
22.4k, 23.1k, 21.5k and 23.6k cells per CPU-second at 4, 8, 16, 24 and 32 MiB, medians of 16."""
DECODED_BYTES = 64 << 20
"""What TileDB decodes before it fills buffers. From 32 to 256 MiB it takes the same time; without a limit it is the
whole slab."""
TILE_ROWS = 2048
"""Rows of a tile of X (the extent that TileDB-SOMA gives by default); a slab that splits one decodes it twice."""
SOMA_ERRORS = (tiledbsoma.SOMAError, RuntimeError, OSError)
"""What TileDB-SOMA raises over content that it cannot read."""
_ROOM = SLAB_BYTES // 8
"""Values for which there is room to begin with; what is not touched takes no memory."""
_SELECTED_BYTES = 16
"""What one selected value costs while its slab is assembled: column and value, and the same as CSR."""


def buffers() -> dict[str, int | str]:
    """TileDB configuration that bounds what a read holds.

    It decodes in one thread: readers are processes, and on their cores a second thread only waits. Requests to an
    object store still go out side by side. Freed memory is kept: given back after every query, as is TileDB's default,
    it is half of a read's time in page faults.

    Tiles of several fragments are merged as they are read, not put in order beforehand: TileDB 2.28 to 2.30 does that
    in a task that it does not wait for, and the process dies where a small read ends first (TileDB pull request 5723).
    """
    return {
        "soma.init_buffer_bytes": BUFFER_BYTES,
        "sm.mem.tile_upper_memory_limit": DECODED_BYTES,
        "sm.mem.malloc_trim": "false",
        "sm.query.sparse_global_order.preprocess_tile_merge": 0,
        "sm.compute_concurrency_level": 1,
        "soma.compute_concurrency_level": 1,
    }


def read_counts(matrix: Any, rows: LongArray, gene_at: IntArray, target: GeneTarget, where: str) -> Iterator[Rows]:
    """Counts of some rows, a few rows of tiles at a time.

    Read unordered and put in order while assembling: TileDB's own row-major order is several times slower. All genes
    are read and selected afterwards, which is faster than passing their coordinates.

    Parameters
    ----------
    matrix
        Open ``SparseNDArray``.
    rows
        int64, joinids of the cells, ascending.
    gene_at
        int32, position of the gene in the source's order by its joinid, -1 for a joinid that var lacks.
    target
        Where the genes go.
    where
        Layer and experiment, for messages.

    Yields
    ------
    Rows
        The next rows, in order.

    Raises
    ------
    UnreadableError
        If TileDB-SOMA cannot read them, or they count a gene beyond those of var.
    """
    staging = _Staging(np.append(target.columns, np.int32(-1))[gene_at], target.n_genes)
    first, tiles = 0, 1
    while first < len(rows):
        last = min(first + tiles * TILE_ROWS, len(rows))
        if last < len(rows):
            edge = int(rows[last]) // TILE_ROWS * TILE_ROWS
            last = max(int(np.searchsorted(rows, edge)), first + 1)
        slab = _slab(matrix, rows[first:last], staging, where)
        mean = max(1.0, len(slab.data) / (last - first))
        tiles = max(1, int(SLAB_BYTES / (_SELECTED_BYTES * mean * TILE_ROWS)))
        first = last
        yield slab


def _slab(matrix: Any, rows: LongArray, staging: _Staging, where: str) -> Rows:
    low, high = int(rows[0]), int(rows[-1]) + 1
    # A selection with few gaps is read as one range, whose tiles TileDB decodes once.
    dense = high - low <= 2 * len(rows)
    coords = (slice(low, high - 1) if dense else pa.array(rows), slice(None))
    for table in each(lambda: matrix.read(coords).tables(), f"{where}, rows {low} to {high},", SOMA_ERRORS):
        for batch in table.to_batches():
            genes = batch["soma_dim_1"].to_numpy()
            values = batch["soma_data"].to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
            if not staging.add(batch["soma_dim_0"].to_numpy(), genes, values, rows):
                raise UnreadableError(f"{where} counts gene joinid {int(genes.max())}, beyond those of var.", MEND)
    return staging.take(len(rows))


class _Staging:
    """Selected values on their way from tables to rows; its memory serves one slab after the other.

    Parameters
    ----------
    target
        int32; column of each gene by its joinid, -1 for one that is dropped.
    n_genes
        Width of the block.
    """

    def __init__(self, target: IntArray, n_genes: int) -> None:
        from scviaduct.sources import kernels

        self._kernels = kernels
        self._target = kernels.given(target)
        self._ascending = bool((np.diff(target[target >= 0]) > 0).all())
        self._scratch = kernels.scratch(n_genes)
        self._columns, self._values = np.empty(_ROOM, np.int32), np.empty(_ROOM, np.float32)
        self._run_rows, self._run_starts = np.empty(_ROOM, np.int32), np.empty(_ROOM, np.int64)
        self._sizes = np.zeros(2, np.int64)

    def add(self, rows: LongArray, genes: LongArray, values: npt.NDArray[np.float32], chosen: LongArray) -> bool:
        """Select of one table; whether all its genes are known."""
        given, (filled, runs) = self._kernels.given, self._sizes.tolist()
        self._columns = _with_room(self._columns, filled, len(rows))
        self._values = _with_room(self._values, filled, len(rows))
        self._run_rows = _with_room(self._run_rows, runs, len(rows))
        # One more start than runs: the end of the last one.
        self._run_starts = _with_room(self._run_starts, runs, len(rows) + 1)
        held = self._columns, self._values, self._run_rows, self._run_starts, self._sizes
        known = self._kernels.select(given(rows), given(genes), given(values), given(chosen), self._target, *held)
        return bool(known)

    def take(self, n_rows: int) -> Rows:
        """What was selected as rows, and begin anew."""
        filled, runs = self._sizes.tolist()
        self._sizes[:] = 0
        self._run_starts[runs] = filled
        indptr = np.empty(n_rows + 1, np.int64)
        columns, values = np.empty(filled, np.int32), np.empty(filled, np.float32)
        held = self._columns[:filled], self._values[:filled], self._run_rows[:runs], self._run_starts[: runs + 1]
        read = [self._kernels.given(array) for array in held]
        self._kernels.join(*read, self._ascending, indptr, columns, values, *self._scratch)
        return Rows(indptr, *cut(int(indptr[-1]), columns, values))


def _with_room[T: np.generic](array: npt.NDArray[T], filled: int, more: int) -> npt.NDArray[T]:
    """The array itself if there is room for more, else its first values in one of twice the size."""
    if len(array) >= filled + more:
        return array
    larger = np.empty(2 * (filled + more), array.dtype)
    larger[:filled] = array[:filled]
    return larger
