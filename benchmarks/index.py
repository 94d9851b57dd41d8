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
    "CPU-seconds. Ours goes from the committed parquet files of a million latents of 30 dimensions to an index on"
    " disk that answers with rows: reading, k-means, lists, columns, and measuring its own recall; median of three, on"
    " one core. HNSW (faiss, 16 links, default construction) and usearch (defaults) go from vectors in memory to a"
    " file; one sample, on two cores because it takes minutes. The recall of HNSW at the least effort that reaches"
    " .99, or at an effort of 1,600, is in the report."
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
    [ours] = in_turns([Way("ours", "benchmarks.searchours:build", told, cells)], context.log, context.samples)
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
        "ours": dict(ours.samples[-1].result) if not ours.missing else ours.missing,
        "hnsw": dict(reached.samples[-1].result) if not reached.missing else reached.missing,
    }
    figure = Figure.ratio("index_build_vs_hnsw", Ratio.of(ours, built[0]))
    return Report(TITLE, COUNTS, [figure], {f"{cells:,} x 30": [ours, *built]}, facts)
