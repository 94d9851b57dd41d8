"""The benchmarks by name, in the order in which they run."""

from __future__ import annotations

BENCHMARKS = {
    "reading": "reading SOMA and files into CSR, against TileDB-SOMA, tiledbsoma_ml and bare reads",
    "encoding": "counts in memory to latents, against plain scvi-tools",
    "endtoend": "SOMA to a committed store, against a scvi-tools script and against reading alone",
    "workers": "the same on Ray: two workers against one, and what Ray and the commit add",
    "many": "four references on one read, against one",
    "landing": "a source landed once, and read from the landing",
    "scaling": "cost and memory from 50,000 to 800,000 cells, and a run over what is there",
    "surgery": "adapters against one full surgery of scvi-tools for each batch",
    "loading": "a fresh process until it has encoded a cell, against Model.load",
    "index": "building a search index, against HNSW",
    "search": "searching it: batches against Lance and TileDB, single cells, filters",
}
"""Name, which is that of the module that has it, to what it is."""
