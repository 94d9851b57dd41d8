"""The benchmarks by name, in the order in which they run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entry:
    """A benchmark.

    Attributes
    ----------
    module
        In this package; has ``run(context)``.
    about
        What it measures, in a line.
    figures
        What it says for ``latest.json``.
    """

    module: str
    about: str
    figures: tuple[str, ...] = ()


BENCHMARKS = {
    "reading": Entry(
        "reading",
        "SOMA and files into CSR, against TileDB-SOMA, tiledbsoma_ml and bare reads",
        ("read_vs_blockwise", "read_vs_tiledbsoma_ml", "read_vs_tables"),
    ),
    "encoding": Entry(
        "encode",
        "counts in memory to latents, against plain scvi-tools",
        ("encode_2000x128", "encode_8000x128", "encode_census"),
    ),
    "endtoend": Entry(
        "endtoend",
        "SOMA to a committed store, against a scvi-tools script and against reading alone",
        ("e2e_2000", "e2e_census", "e2e_vs_read_only"),
    ),
    "workers": Entry(
        "workers", "the same on Ray: two workers against one, and what Ray adds", ("two_workers", "ray_overhead")
    ),
    "many": Entry("many", "four references on one read, against one", ("references_4_vs_1",)),
    "landing": Entry("landing", "a source landed once, and read from the landing", ("landing_vs_soma",)),
    "scaling": Entry("scaling", "cost and memory from 50,000 to 800,000 cells, and a run over what is there"),
    "surgery": Entry("adapters", "adapters against one full surgery of scvi-tools a batch", ("surgery_vs_per_batch",)),
    "loading": Entry("load", "a fresh process until it has encoded a cell, against Model.load"),
    "index": Entry("index", "building a search index, against graphs", ("index_build_vs_hnsw",)),
    "search": Entry(
        "search",
        "batches against Lance and TileDB, single queries, filters",
        (
            "search_vs_lance",
            "search_vs_tiledb",
            "search_single_ms",
            "filter_recall_0p1",
            "filter_recall_2_correlated",
            "filter_recall_10",
        ),
    ),
}
"""What ``--only`` names."""
