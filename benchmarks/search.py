"""Searching latents: batches against peers at equal recall, single queries, and filters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.index import sizes
from benchmarks.peers import RECALL
from benchmarks.searchdata import FILTERS, Latents
from benchmarks.turns import Way, in_turns
from benchmarks.values import Figure, Ratio, Report

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.context import Context
    from benchmarks.values import Measurement

TITLE = "Search"
COUNTS = (
    "Queries per CPU-second on one core with one thread, 30 neighbours among a million latents of 30 dimensions, all"
    " queries in one call; positions and distances come out, as of the peers. Each peer probes the least that reaches a"
    " recall of .999 on them, ours probes what its index calibrated. A single query is the median of 300 by the"
    " clock. Recall under a filter is over 1,000 queries against comparing with every selected cell."
)
PEERS = {
    "tiledb-vector-search": ("TileDB vector search, IVF_FLAT", "benchmarks.peers:tiledb", "search_vs_tiledb"),
    "lancedb": ("Lance, IVF_FLAT", "benchmarks.peers:lance", "search_vs_lance"),
    "faiss-cpu": ("faiss HNSW", "benchmarks.peers:hnsw", ""),
    "usearch": ("usearch", "benchmarks.peers:usearch", ""),
}
_LANCE_QUERIES = 1000


def run(context: Context) -> Report:
    """Search in every way."""
    cells, queries = sizes(context)
    data = Latents(cells, queries).folder(context.folder)
    told = {"folder": str(context.folder), "cells": cells, "queries": queries}
    mine = [
        Way("ours", "benchmarks.searchours:batch", told, queries, "queries"),
        Way("ours, with rows", "benchmarks.searchours:batch_rows", told, queries, "queries"),
    ]
    theirs = {name: _peer(context, name, data, queries) for name in PEERS if _is_there(name, data)}
    batch = in_turns([*mine, *theirs.values()], context.log, context.many_samples)
    by_name = {measurement.way: measurement for measurement in batch}
    figures = [_against(by_name, name) for name in ("lancedb", "tiledb-vector-search")]
    one = in_turns(
        [Way("ours, one at a time", "benchmarks.searchours:single", told, 600, "queries")], context.log, context.samples
    )
    figures.append(Figure("search_single_ms", one[0].last("ms")))
    filters = [
        Way(heading, "benchmarks.searchours:filtered", told | {"figure": figure}, min(1000, queries), "queries")
        for figure, (heading, _) in FILTERS.items()
    ]
    filtered = in_turns(filters, context.log, context.samples)
    figures += [Figure(figure, found.last("recall")) for figure, found in zip(FILTERS, filtered, strict=True)]
    facts: dict[str, Any] = {
        found.way: dict(found.samples[-1].result) for found in (*batch, *one, *filtered) if not found.missing
    }
    return Report(TITLE, COUNTS, figures, {"Batches": batch, "Single": one, "Filters": filtered}, facts)


def _is_there(name: str, data: Path) -> bool:
    """Graphs are built by the benchmark of indexes."""
    needed = {"faiss-cpu": "hnsw.faiss", "usearch": "index.usearch"}
    return name not in needed or (data / needed[name]).exists()


def _peer(context: Context, name: str, data: Path, queries: int) -> Way:
    heading, call, _ = PEERS[name]
    amount = min(_LANCE_QUERIES, queries) if name == "lancedb" else queries
    return Way(heading, call, {"data": str(data)}, amount, "queries", python=context.pythons.get(name))


def _against(by_name: dict[str, Measurement], peer: str) -> Figure:
    """The ratio, if both reach the recall."""
    heading, _, figure = PEERS[peer]
    ours, other = by_name["ours"], by_name[heading]
    if other.missing:
        return Figure(figure, None, other.missing)
    for one in (ours, other):
        if one.last("recall") < RECALL - 5e-4:  # the index calibrates on a sample of its own
            return Figure(figure, None, f"{one.way} reaches a recall of {one.last('recall'):.4f}, not {RECALL}")
    return Figure.ratio(figure, Ratio.of(ours, other))
