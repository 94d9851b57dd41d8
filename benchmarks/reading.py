"""Reading SOMA into CSR on one core, against TileDB-SOMA's readers; files, against bare reads of their formats."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.data import ORGANISM, source_of
from benchmarks.files import write_files
from benchmarks.turns import Way, in_turns
from benchmarks.values import Figure, Ratio, Report

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benchmarks.context import Context

    Once = Callable[[], dict[str, Any]]

TITLE = "Reading"
COUNTS = (
    "CPU-seconds of one process on one core, from an open experiment to CSR in memory, all 20,000 genes, page cache"
    " warm. Ours is `open_source(...).read` of shards of 16,384 cells, which also reads and checks obs; `.tables()`"
    " only fetches the triplets and drops them; tiledbsoma_ml does not shuffle. Files: ours against h5py or zarr-python"
    " reading the same three arrays whole, which checks nothing and selects nothing."
)
_BATCH = 8192
"""Rows that the peers read at a time: 2k to 16k do equally well."""
_SLICE_BYTES = 16 << 20
"""TileDB's buffers for the peers, as for ours; their default of 1 GiB is no faster."""


def run(context: Context) -> Report:
    """Compare the readers."""
    collection, cells = context.collection(), context.pick(24_576, 8_192)
    names = ("ours", "blockwise().scipy()", "tiledbsoma_ml, sequential", ".tables() alone")
    calls = ("ours", "blockwise", "sequential", "tables")
    told = {"collection": str(collection), "cells": cells}
    ways = [Way(name, f"benchmarks.reading:{call}", told, cells) for name, call in zip(names, calls, strict=True)]
    soma = in_turns(ways, context.log, context.samples)
    ours_, *peers = soma
    figures = [
        Figure.ratio(name, Ratio.of(ours_, peer))
        for name, peer in zip(("read_vs_blockwise", "read_vs_tiledbsoma_ml", "read_vs_tables"), peers, strict=True)
    ]
    measured = {"SOMA, full rows to CSR": soma} | _files(context, collection)
    return Report(TITLE, COUNTS, figures, measured)


def _files(context: Context, collection: Path) -> dict[str, Any]:
    """Each format against a bare read of it."""
    cells = context.pick(16_384, 4_096)
    found = {}
    for kind, path in write_files(context.folder, collection, cells).items():
        bare = "zarr" if path.suffix == ".zarr" else "h5"
        ways = [
            Way("ours", "benchmarks.reading:ours_of_file", {"path": str(path)}, cells),
            Way("bare arrays", f"benchmarks.files:bare_{bare}", {"path": str(path)}, cells),
        ]
        found[kind] = in_turns(ways, context.log, context.samples)
    return found


def ours(collection: str, cells: int) -> Once:
    """Our reader, shard by shard."""
    return ours_of_file(source_of(collection, cells))


def ours_of_file(path: str) -> Once:
    """Our reader of any source, in the source's genes."""
    from scviaduct.sources import open_source

    source = open_source(path)
    shards = source.scan(16_384).shards

    def once() -> dict[str, Any]:
        nonzeros = done = 0
        for shard in shards:
            block = source.read(shard)
            nonzeros += len(block.data)
            done += block.n_cells
        return {"cells": done, "nonzeros": nonzeros}

    return once


def _opened(collection: str, part: str = "") -> Any:
    import tiledbsoma

    # One core is one thread: TileDB would take as many as the machine has cores.
    told = {"soma.init_buffer_bytes": _SLICE_BYTES, "sm.compute_concurrency_level": 1, "sm.io_concurrency_level": 1}
    context = tiledbsoma.SOMATileDBContext(tiledb_config=told)
    return tiledbsoma.open(f"{collection}/census_data/{ORGANISM}{part}", context=context)


def blockwise(collection: str, cells: int) -> Once:
    """TileDB-SOMA's own way to CSR."""
    matrix = _opened(collection, "/ms/RNA/X/raw")

    def once() -> dict[str, Any]:
        nonzeros = done = 0
        blocks = matrix.read((slice(0, cells - 1),)).blockwise(axis=0, size=_BATCH, reindex_disable_on_axis=[1])
        for block, _ in blocks.scipy():
            nonzeros += block.nnz
            done += block.shape[0]
        return {"cells": done, "nonzeros": nonzeros}

    return once


def sequential(collection: str, cells: int) -> Once:
    """TileDB-SOMA-ML without shuffling, sparse."""
    import tiledbsoma
    from tiledbsoma_ml import ExperimentDataset

    rows = tiledbsoma.AxisQuery(coords=(slice(0, cells - 1),))
    query = _opened(collection).axis_query("RNA", obs_query=rows)
    told = {"batch_size": _BATCH, "io_batch_size": _BATCH, "shuffle": False, "return_sparse_X": True}
    data = ExperimentDataset(query, layer_name="raw", use_eager_fetch=False, **told)

    def once() -> dict[str, Any]:
        nonzeros = done = 0
        for counts, _ in data:
            nonzeros += counts.nnz
            done += counts.shape[0]
        return {"cells": done, "nonzeros": nonzeros}

    return once


def tables(collection: str, cells: int) -> Once:
    """The floor of the format: triplets, unordered, thrown away."""
    matrix = _opened(collection, "/ms/RNA/X/raw")
    return partial(_fetched, matrix, cells)


def _fetched(matrix: Any, cells: int) -> dict[str, Any]:
    nonzeros = 0
    for first in range(0, cells, _BATCH):
        last = min(first + _BATCH, cells) - 1
        nonzeros += sum(len(table) for table in matrix.read((slice(first, last),)).tables())
    return {"cells": cells, "nonzeros": nonzeros}
