"""Building an index over latents: ours from the committed store, graphs from vectors in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.searchdata import Latents, store_of
from benchmarks.turns import Way, in_turns
from benchmarks.values import Figure, Ratio, Report

if TYPE_CHECKING:
    from benchmarks.context import Context

TITLE = "Index"
COUNTS = (
    "CPU-seconds. `vectors alone` goes from a million vectors of 30 dimensions in memory to a file: k-means and lists,"
    " which is what HNSW (faiss, 16 links, default construction) and usearch (defaults) do, and the figure. `whole"
    " index` goes from the committed parquet files to an index on disk that answers with rows: reading, columns, and"
    " measuring its own recall besides. Ours are medians of three, on one core; the graphs are one sample, on two cores"
    " because it takes minutes. The recall of the whole index, and that of HNSW at the least effort that reaches .99"
    " or at an effort of 1,600, are in the report."
)


def sizes(context: Context) -> tuple[int, int]:
    """Cells and queries."""
    return context.pick(1_000_000, 50_000), context.pick(2_000, 1_000)


def run(context: Context) -> Report:
    """Build all of them."""
    cells, queries = sizes(context)
    latents = Latents(cells, queries)
    data = str(latents.folder(context.folder))
    store_of(context.folder, latents)
    told = {"folder": str(context.folder), "cells": cells, "queries": queries}
    mine = [
        Way("vectors alone", "benchmarks.searchours:vectors", told, cells),
        Way("whole index", "benchmarks.searchours:build", told, cells),
    ]
    alone, whole = in_turns(mine, context.log, context.samples)
    graphs = {"data": data, "threads": len(context.cores)}
    ways = [
        Way("faiss HNSW", "benchmarks.peers:hnsw_build", graphs, cells, cpus=context.cores),
        Way("usearch", "benchmarks.peers:usearch_build", graphs, cells, cpus=context.cores),
    ]
    built = in_turns(ways, context.log, 1, warm=0)
    reached = in_turns(
        [Way("faiss HNSW", "benchmarks.peers:hnsw", {"data": data, "wanted": 0.99}, queries, "queries")],
        context.log,
        1,
        warm=0,
    )[0]
    facts = {
        "ours": dict(whole.samples[-1].result) if not whole.missing else whole.missing,
        "whole index against HNSW": Ratio.of(whole, built[0]).value,
        "hnsw": dict(reached.samples[-1].result) if not reached.missing else reached.missing,
    }
    figure = Figure.ratio("index_build_vs_hnsw", Ratio.of(alone, built[0]))
    return Report(TITLE, COUNTS, [figure], {f"{cells:,} x 30": [alone, whole, *built]}, facts)
