"""Nearest neighbours of query cells among a version's cells, with filters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import faiss
import numpy as np
import pyarrow as pa

from scviaduct.errors import InputError
from scviaduct.store.index import ensure_index, exact_neighbors
from scviaduct.store.where import parse_where

if TYPE_CHECKING:
    from scviaduct.store.index import Index
    from scviaduct.store.space import Space
    from scviaduct.values import FloatArray, LongArray

EXACT_UP_TO = 1_000_000
"""Selected cells up to which a filtered search compares with each of them. Searching an IVF index through a filter
loses neighbours in silence, most of all where the selected cells lie together."""
_KEY = ("source", "dataset_id", "observation_id")


@dataclass(frozen=True, slots=True)
class Queries:
    """Cells to find neighbours of.

    Attributes
    ----------
    datasets, ids
        Key of each, as the reply gives it.
    latent
        float32, shape ``(n_queries, n_latent)``.
    own
        int64, shape ``(n_queries,)``; position of each in the index if it is a stored cell, which is not its own
        neighbour; None for cells from elsewhere.
    """

    datasets: list[str]
    ids: list[str]
    latent: FloatArray
    own: LongArray | None = None


@dataclass(frozen=True, slots=True)
class Hits:
    """Neighbours, and how they were found.

    Attributes
    ----------
    table
        Columns ``query_dataset`` and ``query`` (the query cell's key), ``rank`` (from 1), ``distance`` (Euclidean, in
        latent space), the neighbour's key, label and
        its uncertainty, and the kept columns; sorted by query and rank.
    method
        ``exact``, ``exact on the selected cells`` or ``IVF-Flat``.
    recall
        Measured recall@30 of the index that was used; 1 where every candidate was compared.
    version
        Of the space.
    candidates
        Cells that could be neighbours.
    """

    table: pa.Table
    method: str
    recall: float
    version: int
    candidates: int


def stored_queries(space: Space, where: str, as_of: int | None = None, limit: int | None = None) -> Queries:
    """Stored cells as queries.

    Raises
    ------
    InputError
        If no cell with a latent fulfils ``where``.
    """
    index = ensure_index(space, as_of)
    found = np.flatnonzero(_selected(index, where))[:limit]
    if not len(found):
        raise InputError(
            f"No stored cell fulfils {where}.", "scviaduct export shows what labels and columns there are."
        )
    rows = index.rows.select(["dataset_id", "observation_id"]).take(pa.array(found))
    datasets, ids = (rows[name].to_pylist() for name in rows.column_names)
    return Queries(datasets, ids, np.ascontiguousarray(index.vectors[found]), found)


def search(
    space: Space, queries: Queries, k: int, *, where: str | None = None, as_of: int | None = None, exact: bool = False
) -> Hits:
    """Find the k nearest stored cells of each query.

    Without a filter an IVF index answers where there is one. With a filter that selects at most a million cells, every
    one of them is compared; with more, the IVF index is asked for the selected cells only, and looks into as many lists
    more as the filter leaves out cells.

    Parameters
    ----------
    space
        Where to search.
    queries
        Cells in the space's latent.
    k
        Neighbours of each; fewer come back if fewer cells are selected.
    where
        Condition that neighbours fulfil.
    as_of
        Version; None for the newest.
    exact
        Compare with every cell.

    Raises
    ------
    InputError
        If k is not positive, or the queries are of another latent size or not finite.
    FilterError
        If ``where`` does not parse.
    """
    if k < 1:
        raise InputError(f"k = {k} asks for no neighbour.", "Give at least 1, e.g. -k 30.")
    if queries.latent.shape[1] != space.n_latent:
        raise InputError(f"Queries have {queries.latent.shape[1]} dimensions, {space.name} has {space.n_latent}.", "")
    finite = np.isfinite(queries.latent).all(axis=1)
    if not finite.all():
        first = queries.ids[int(np.argmin(finite))]
        raise InputError(f"The latent of query '{first}' is not a number.", "Leave out the cells that were not mapped.")
    index = ensure_index(space, as_of)
    chosen = None if where is None else np.flatnonzero(_selected(index, where))
    candidates = index.manifest.cells if chosen is None else len(chosen)
    wanted = min(k + (queries.own is not None), candidates)
    latent = np.ascontiguousarray(queries.latent, np.float32)
    distance: FloatArray = np.empty((len(latent), 0), np.float32)
    found: LongArray = np.empty((len(latent), 0), np.int64)
    method, recall = "exact", 1.0
    if not wanted:
        pass
    elif chosen is not None and (exact or candidates <= EXACT_UP_TO or index.ivf is None):
        distance, found = exact_neighbors(np.ascontiguousarray(index.vectors[chosen]), latent, wanted)
        found, method, recall = chosen[found], "exact on the selected cells", 1.0
    elif exact or index.ivf is None:
        distance, found = exact_neighbors(index.vectors, latent, wanted)
    else:
        distance, found = _ivf(index, latent, wanted, chosen)
        method, recall = "IVF-Flat", index.manifest.recall
    table = _table(index, queries, distance, found, k)
    return Hits(table, method, recall, index.manifest.version, candidates)


def _selected(index: Index, where: str) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    condition = parse_where(where, index.rows.schema)
    marked = index.rows.select(list(condition.columns)).append_column("#", pa.array(np.arange(len(index.rows))))
    mask = np.zeros(len(index.rows), bool)
    mask[marked.filter(condition.expression)["#"].to_numpy()] = True
    return mask


def _ivf(index: Index, latent: FloatArray, k: int, chosen: LongArray | None) -> tuple[FloatArray, LongArray]:
    """Search the IVF index; a query whose lists held too few selected cells is compared with all of them."""
    manifest = index.manifest
    if chosen is None:
        distance, found = index.ivf.search(latent, k)
    else:
        probes = min(manifest.lists, int(np.ceil(manifest.probes * manifest.cells / len(chosen))))
        parameters = faiss.SearchParametersIVF(sel=faiss.IDSelectorBatch(chosen), nprobe=probes)
        distance, found = index.ivf.search(latent, k, params=parameters)
    short = np.flatnonzero((found < 0).any(axis=1))
    if len(short):
        vectors = index.vectors if chosen is None else np.ascontiguousarray(index.vectors[chosen])
        distance[short], again = exact_neighbors(vectors, latent[short], k)
        found[short] = again if chosen is None else chosen[again]
    return distance, found


def _table(index: Index, queries: Queries, distance: FloatArray, found: LongArray, k: int) -> pa.Table:
    """Hits as rows; a stored query is taken out of its own neighbours."""
    n, width = found.shape
    keep = np.ones(found.shape, bool)
    if queries.own is not None:
        keep = found != queries.own[:, None]
    keep &= np.cumsum(keep, axis=1) <= k
    rank = np.cumsum(keep, axis=1)
    query = np.repeat(np.arange(n), width).reshape(found.shape)[keep]
    rows = index.rows.take(pa.array(found[keep]))
    columns = {
        "query_dataset": pa.array(queries.datasets, pa.string()).take(pa.array(query)),
        "query": pa.array(queries.ids, pa.string()).take(pa.array(query)),
        "rank": pa.array(rank[keep].astype(np.int32)),
        "distance": pa.array(np.sqrt(np.maximum(distance[keep], 0)).astype(np.float32)),
    }
    rest = [name for name in rows.schema.names if name not in ("source_row", "unit", "unit_row", "run")]
    return pa.table(columns | {name: _plain(rows[name]) for name in rest})


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(pa.string()) if pa.types.is_dictionary(column.type) else column
