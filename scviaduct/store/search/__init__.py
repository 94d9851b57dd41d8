"""Nearest neighbours of query cells among a version's cells, with filters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scviaduct.store.search.fan import Slices
from scviaduct.store.search.hits import Hits, Queries
from scviaduct.store.search.searcher import Searcher
from scviaduct.store.search.slices import Slice

if TYPE_CHECKING:
    from scviaduct.store.space import Space

__all__ = ["Hits", "Queries", "Searcher", "Slice", "Slices", "search", "stored_queries"]


def stored_queries(space: Space, where: str, as_of: int | None = None, limit: int | None = None) -> Queries:
    """Stored cells as queries; see :meth:`Searcher.stored`."""
    return Searcher.open(space, as_of).stored(where, limit)


def search(
    space: Space, queries: Queries, k: int, *, where: str | None = None, as_of: int | None = None, exact: bool = False
) -> Hits:
    """Find the k nearest stored cells of each query; see :meth:`Searcher.search`.

    Opens the index for one search. To search often, open a :class:`Searcher` once.
    """
    return Searcher.open(space, as_of).search(queries, k, where, exact=exact)
