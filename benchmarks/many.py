"""One read, many references: four references of 2,000 genes in one run, against one."""

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

TITLE = "Many references"
COUNTS = (
    "CPU-seconds of one process on one core for the whole of `pipelines.map`, inline, into a new store: with one"
    " reference of 2,000 genes, and with a list of four whose genes were drawn apart. The figure is how many times the"
    " four cost what one costs. Four runs one after the other cost four."
)


def run(context: Context) -> Report:
    """Compare one with four."""
    cells = context.pick(196_608, 8_192)
    packages = [str(reference(context.folder, context.design, TYPICAL, seed)[1]) for seed in range(4)]
    told = {"collection": str(context.collection()), "cells": cells, "folder": str(context.folder)}
    call = "benchmarks.many:mapped"
    ways = [
        Way("one reference", call, told | {"packages": packages[:1]}, cells),
        Way("four references", call, told | {"packages": packages}, cells),
    ]
    found = in_turns(ways, context.log, context.samples, rounds=context.rounds)
    return Report(TITLE, COUNTS, [Figure.ratio("references_4_vs_1", Ratio.of(*found))], {"One core": found})


def mapped(collection: str, cells: int, packages: list[str], folder: str) -> Once:
    """The command with one reference or a list of them."""
    import pipelines as sv

    store = Path(folder) / f"store-many-{len(packages)}"
    asked: Any = packages if len(packages) > 1 else packages[0]

    def once() -> dict[str, Any]:
        shutil.rmtree(store, ignore_errors=True)
        told = {"keep_obs": KEPT, "shard_cells": SHARD, "engine": "inline", "quiet": True}
        result = sv.map(source_of(collection, cells), reference=asked, store=str(store), **told)
        runs = list(result.runs) if len(packages) > 1 else [result]
        if {(one.state, one.cells_done) for one in runs} != {("committed", cells)} or len(runs) != len(packages):
            raise RuntimeError(f"not all cells were mapped: {result}")
        return {"cells": cells, "references": len(runs)}

    return once
