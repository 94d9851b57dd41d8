"""Landing a source once, and reading it from there instead of from SOMA."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.data import source_of
from benchmarks.endtoend import KEPT, SHARD
from benchmarks.files import cells_of
from benchmarks.models import TYPICAL, reference
from benchmarks.turns import Way, in_turns
from benchmarks.values import Figure, Ratio, Report

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.context import Context

    Once = Callable[[], dict[str, Any]]

TITLE = "Landing"
COUNTS = (
    "CPU-seconds of one process on one core. Reading is what a run does: shards of 16,384 cells with two obs columns,"
    " in the 2,000 genes of a reference (the figure) or in all 20,000 genes, from SOMA and from the landing of the"
    " same cells; annbatch reads all genes from a sharded zarr of its own, by the zarrs pipeline. Landing is"
    " `pipelines.land`, inline, into a new folder."
)


def run(context: Context) -> Report:
    """Land, then read both in turns."""
    cells = context.pick(32_768, 8_192)
    _, package = reference(context.folder, context.design, TYPICAL)
    source = source_of(context.collection(), cells)
    out = context.folder / "landing"
    made = [Way("landing", "benchmarks.landing:landed", {"source": source, "out": str(out)}, cells)]
    measured = {"Writing": in_turns(made, context.log, 1, warm=0)}
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    for heading, genes in (("Reading, 2,000 genes", str(package)), ("Reading, all genes", "")):
        ways = [
            Way(name, "benchmarks.landing:read", {"source": where, "package": genes}, cells)
            for name, where in (("landing", f"landing:{out}"), ("SOMA", source))
        ]
        if not genes:
            ways.append(Way("annbatch", "benchmarks.landing:annbatch", _sharded(context, cells), cells))
        measured[heading] = in_turns(ways, context.log, context.many_samples)
    figure = Figure.ratio("landing_vs_soma", Ratio.of(*measured["Reading, 2,000 genes"]))
    return Report(TITLE, COUNTS, [figure], measured, {"bytes_per_cell": size / cells})


def _sharded(context: Context, cells: int) -> dict[str, str | int]:
    """What the peer is told: where the cells are, and where it keeps them in its own layout."""
    collection = context.collection()
    out = context.folder / f"{collection.name}-first-{cells}-annbatch.zarr"
    return {"collection": str(collection), "cells": cells, "out": str(out)}


def annbatch(collection: str, cells: int, out: str) -> Once:
    """annbatch over its own sharded zarr of the same cells, in order, without obs."""
    import anndata
    import zarr
    import zarrs  # noqa: F401 - zarr takes it by its name, and says no ImportError where it is absent
    from annbatch import Loader, write_sharded

    if not Path(out).exists():
        making = Path(f"{out}.writing")
        shutil.rmtree(making, ignore_errors=True)
        data = cells_of(Path(collection), cells)
        write_sharded(zarr.open_group(str(making), mode="w", zarr_format=3), data)
        making.rename(out)
    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "threading.max_workers": 1})
    counts = anndata.io.sparse_dataset(zarr.open_group(out, mode="r")["X"])

    def once() -> dict[str, Any]:
        loader = Loader(chunk_size=512, preload_nchunks=16, batch_size=8192, shuffle=False).add_dataset(counts)
        blocks = [batch["X"].shape[0] for batch in loader]
        return {"cells": sum(blocks)}

    return once


def landed(source: str, out: str) -> Once:
    """Land anew."""
    import pipelines as sv

    def once() -> dict[str, Any]:
        shutil.rmtree(Path(out), ignore_errors=True)
        result = sv.land(source, out=out, engine="inline", quiet=True)
        if result.state != "landed":
            raise RuntimeError(f"the source was not landed: {result}")
        return {"cells": result.cells, "bytes": result.nbytes}

    return once


def read(source: str, package: str) -> Once:
    """Shards of a source, in a reference's genes, or in its own where no package is named."""
    from scviaduct.mapping.reading import read_block
    from scviaduct.references.package import Reference
    from scviaduct.sources import open_shard, open_source

    with open_source(source) as opened:
        shards = opened.scan(SHARD).shards
    known = Reference.load(package) if package else None

    def once() -> dict[str, Any]:
        nonzeros = done = 0
        for shard in shards:
            block = read_block(shard, known, KEPT) if known else open_shard(shard).read(shard, columns=KEPT)
            nonzeros += len(block.data)
            done += block.n_cells
        return {"cells": done, "nonzeros": nonzeros}

    return once
