"""Landing a source once, and reading it from there instead of from SOMA."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.data import source_of
from benchmarks.endtoend import KEPT, SHARD
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
    " in the 2,000 genes of a reference (the figure) or in all 20,000 genes, from SOMA and from the landing of the same"
    " cells. Landing is `pipelines.land`, inline, into a new folder."
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
        measured[heading] = in_turns(ways, context.log, context.samples)
    figure = Figure.ratio("landing_vs_soma", Ratio.of(*measured["Reading, 2,000 genes"]))
    return Report(TITLE, COUNTS, [figure], measured, {"bytes_per_cell": size / cells})


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
