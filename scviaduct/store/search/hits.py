"""What is searched for, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from scviaduct.store.index.scanning import Found
    from scviaduct.values import FloatArray, LongArray

OWN = ("source_row", "unit", "unit_row", "run")
"""Columns that a hit does not have."""


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
        latent space), the neighbour's key, label and its uncertainty, and the kept columns; sorted by query and rank.
        A kept column that is called like one of the first four is ``cell.NAME`` here.
    method
        ``exact``, ``exact on the selected cells`` or ``IVF-Flat``.
    recall
        Measured share of the true neighbours that are found; 1 where every candidate was compared.
    version
        Of the space.
    candidates
        Cells that could be neighbours.
    measured
        What the recall was measured on; empty where every candidate was compared.
    """

    table: pa.Table
    method: str
    recall: float
    version: int
    candidates: int
    measured: str = ""


def kept_of(found: Found, own: LongArray | None, k: int) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    """Which of the neighbours are told, shape ``(n_queries, width)``: k of each query, and never the query itself."""
    keep = found.slot >= 0
    if own is not None:
        keep &= found.position != own[:, None]
    keep &= np.cumsum(keep, axis=1) <= k
    return keep


def hits_table(
    queries: Queries, found: Found, keep: np.ndarray[tuple[int, int], np.dtype[np.bool_]], rows: pa.Table
) -> pa.Table:
    """Hits as rows.

    Parameters
    ----------
    queries, found
        What was searched, and what was found.
    keep
        As :func:`kept_of` gives it.
    rows
        Rows of the kept neighbours, in their order, without the columns of :data:`OWN`.
    """
    query = pa.array(np.nonzero(keep)[0])
    columns = {
        "query_dataset": pa.array(queries.datasets, pa.string()).take(query),
        "query": pa.array(queries.ids, pa.string()).take(query),
        "rank": pa.array(np.cumsum(keep, axis=1)[keep].astype(np.int32)),
        "distance": pa.array(np.sqrt(found.distance[keep])),
    }
    for name, column in zip(rows.column_names, rows.columns, strict=True):
        told = name
        while told in columns:
            told = f"cell.{told}"
        columns[told] = column
    return pa.Table.from_arrays(list(columns.values()), names=list(columns))
