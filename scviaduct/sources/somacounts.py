"""Counts of some rows of a SOMA matrix, in memory that is bounded.

At a time, a read holds TileDB's buffers (three columns of ``BUFFER_BYTES``) with their mapped copies, and the selected
values of a slab: as many rows as fit ``SLAB_BYTES``, but never less than a tile has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import tiledbsoma
from scipy import sparse

from scviaduct.sources.counts import SLAB_BYTES, Rows
from scviaduct.sources.unreadable import MEND, UnreadableError, each

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scviaduct.sources.counts import GeneTarget
    from scviaduct.values import IntArray, LongArray

BUFFER_BYTES = 16 << 20
"""TileDB's buffer for each column; a Census's own default is 1 GiB."""
TILE_ROWS = 2048
"""Rows of a tile of X (the extent that TileDB-SOMA gives by default); a slab that splits one decodes it twice."""
SOMA_ERRORS = (tiledbsoma.SOMAError, RuntimeError, OSError)
"""What TileDB-SOMA raises over content that it cannot read."""
_SELECTED_BYTES = 24
"""What one selected value costs while its slab is assembled: row, column, value, and the same as CSR."""


def buffers() -> dict[str, int]:
    """TileDB configuration that bounds what a read holds."""
    return {"soma.init_buffer_bytes": BUFFER_BYTES}


def read_counts(matrix: Any, rows: LongArray, gene_at: IntArray, target: GeneTarget, where: str) -> Iterator[Rows]:
    """Counts of some rows, a few rows of tiles at a time.

    Read unordered and sorted while assembling: TileDB's own row-major order is several times slower. All genes are
    read and selected afterwards, which is faster than passing their coordinates.

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
    columns = np.append(target.columns, np.int32(-1))[gene_at]
    first, tiles = 0, 1
    while first < len(rows):
        last = min(first + tiles * TILE_ROWS, len(rows))
        if last < len(rows):
            edge = int(rows[last]) // TILE_ROWS * TILE_ROWS
            last = max(int(np.searchsorted(rows, edge)), first + 1)
        slab = _slab(matrix, rows[first:last], columns, target.n_genes, where)
        mean = max(1.0, len(slab.data) / (last - first))
        tiles = max(1, int(SLAB_BYTES / (_SELECTED_BYTES * mean * TILE_ROWS)))
        first = last
        yield slab


def _slab(matrix: Any, rows: LongArray, columns: IntArray, n_genes: int, where: str) -> Rows:
    low, high = int(rows[0]), int(rows[-1]) + 1
    # A selection with few gaps is read as one range, whose tiles TileDB decodes once.
    dense = high - low <= 2 * len(rows)
    position = _positions(rows) if dense else None
    at_row, at_gene, values = [], [], []
    coords = (slice(low, high - 1) if dense else pa.array(rows), slice(None))
    for table in each(lambda: matrix.read(coords).tables(), f"{where}, rows {low} to {high},", SOMA_ERRORS):
        joinids = table["soma_dim_0"].to_numpy()
        row = np.searchsorted(rows, joinids).astype(np.int32) if position is None else position[joinids - low]
        genes = table["soma_dim_1"].to_numpy()
        if len(genes) and int(genes.max()) >= len(columns):
            raise UnreadableError(f"{where} counts gene joinid {int(genes.max())}, beyond those of var.", MEND)
        column = columns[genes]
        value = table["soma_data"].to_numpy().astype(np.float32, copy=False)
        kept = (row >= 0) & (column >= 0) & (value != 0)
        at_row.append(row[kept])
        at_gene.append(column[kept])
        values.append(value[kept])
    if not values:
        return Rows(np.zeros(len(rows) + 1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))
    triplets = (np.concatenate(values), (np.concatenate(at_row), np.concatenate(at_gene)))
    compressed = sparse.coo_matrix(triplets, shape=(len(rows), n_genes)).tocsr()
    compressed.sum_duplicates()
    return Rows(compressed.indptr.astype(np.int64), compressed.indices.astype(np.int32, copy=False), compressed.data)


def _positions(rows: LongArray) -> IntArray:
    """Position of each joinid from the first row to the last, -1 for one that is not selected."""
    positions = np.full(int(rows[-1] - rows[0]) + 1, -1, np.int32)
    positions[rows - rows[0]] = np.arange(len(rows), dtype=np.int32)
    return positions
