"""Picking cells out of blocks: samples of strata, and cells that were chosen by name, joined into one block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from scipy import sparse

from scviaduct.mapping.sampling import hashes_of
from scviaduct.sources.obs import as_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from scviaduct.values import CellBlock, LongArray


@dataclass(frozen=True, slots=True)
class Picked:
    """Some cells of a block, in the order of their hashes.

    Attributes
    ----------
    block
        The cells.
    hashes
        uint64, shape ``(n_cells,)``: seeded, of dataset and id.
    strata
        What stratum each is of; shape ``(n_cells,)``, of text.
    units, unit_rows
        Unit of each, and its row there.
    """

    block: CellBlock
    hashes: npt.NDArray[np.uint64]
    strata: npt.NDArray[np.object_]
    units: tuple[str, ...]
    unit_rows: LongArray


def subset(block: CellBlock, rows: LongArray) -> CellBlock:
    """Cells of a block, in the order of ``rows``."""
    shape = block.n_cells, block.n_genes
    counts = sparse.csr_matrix((block.data, block.indices, block.indptr), shape=shape)[rows]
    return replace(
        block,
        indptr=counts.indptr.astype(np.int64),
        indices=counts.indices.astype(np.int32),
        data=counts.data.astype(np.float32),
        rows=block.rows[rows],
        obs=block.obs.take(pa.array(rows)),
    )


def pick(unit: str, block: CellBlock, candidates: LongArray, column: str, cells: int, seed: int) -> Picked:
    """The cells of the smallest hashes of each stratum.

    Parameters
    ----------
    unit
        Id of the block's unit.
    block
        With the column.
    candidates
        Rows of the block to pick from.
    column
        obs column whose values are the strata; empty for a single one.
    cells
        Of each stratum, at most.
    seed
        Of the hashes.
    """
    ids = block.obs["observation_id"].combine_chunks().take(pa.array(candidates)).to_pylist()
    hashes = hashes_of(block.shard.dataset_id, ids, seed)
    strata = np.full(len(candidates), "", object)
    if column:
        values = as_text(block.obs[column].combine_chunks().take(pa.array(candidates)))
        strata = values.fill_null("").to_numpy(zero_copy_only=False).astype(object)
    chosen = _smallest(hashes, strata, cells)
    rows = candidates[chosen]
    return Picked(subset(block, rows), hashes[chosen], strata[chosen], (unit,) * len(rows), rows)


def join(parts: Sequence[Picked], cells: int) -> Picked:
    """One pick of the picks of parts, which no two parts share cells of; the order of the parts does not matter."""
    hashes = np.concatenate([part.hashes for part in parts])
    strata = np.concatenate([part.strata for part in parts])
    units = [unit for part in parts for unit in part.units]
    unit_rows = np.concatenate([part.unit_rows for part in parts])
    chosen = _smallest(hashes, strata, cells)
    block = subset(_stacked([part.block for part in parts]), chosen)
    return Picked(block, hashes[chosen], strata[chosen], tuple(units[i] for i in chosen), unit_rows[chosen])


def _smallest(hashes: npt.NDArray[np.uint64], strata: npt.NDArray[np.object_], cells: int) -> LongArray:
    """Positions of each stratum's smallest hashes, in the order of hashes."""
    order = np.argsort(hashes, kind="stable")
    taken: dict[str, int] = {}
    chosen = []
    for position in order.tolist():
        stratum = strata[position]
        taken[stratum] = taken.get(stratum, 0) + 1
        if taken[stratum] <= cells:
            chosen.append(position)
    return np.array(chosen, np.int64)


def _stacked(blocks: Sequence[CellBlock]) -> CellBlock:
    """Blocks one behind the other, under the shard of the first."""
    counts = [
        sparse.csr_matrix((block.data, block.indices, block.indptr), shape=(block.n_cells, block.n_genes))
        for block in blocks
    ]
    joined = sparse.vstack(counts, format="csr")
    plain = [_without_dictionaries(block.obs) for block in blocks]
    return replace(
        blocks[0],
        indptr=joined.indptr.astype(np.int64),
        indices=joined.indices.astype(np.int32),
        data=joined.data.astype(np.float32),
        rows=np.concatenate([block.rows for block in blocks]),
        obs=pa.concat_tables(plain, promote_options="permissive"),
    )


def _without_dictionaries(obs: pa.Table) -> pa.Table:
    columns = {
        name: as_text(obs[name].combine_chunks()) if pa.types.is_dictionary(obs.schema.field(name).type) else obs[name]
        for name in obs.column_names
    }
    return pa.table(columns)
