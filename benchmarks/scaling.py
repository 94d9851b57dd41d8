"""Cost and memory as cells grow: runs on Ray over 50,000 to 800,000 cells, and one over a million that are there.

Every run is the command, in a process of its own with a Ray of its own: two actors, one reader, shards of 16,384 cells.
Counted is the whole process tree with the object store.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from benchmarks.data import Design, census, source_of
from benchmarks.endtoend import KEPT
from benchmarks.models import TYPICAL, reference
from benchmarks.tree import Peak
from benchmarks.turns import ROOT
from benchmarks.usage import Tree
from benchmarks.values import Measurement, Report, Sample

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.context import Context

TITLE = "Scaling"
COUNTS = (
    "One run of `python -m pipelines map` each, not pinned: CPU-seconds and peak memory (proportional set size, object"
    " store included) of its whole process tree, start-up included. The cells have 2,048 genes and 174 non-zeros, so"
    " that writing a million is quick. The bar of memory: the largest run peaks at most 1.1 times as high as the"
    " smallest. The last two runs grow the store of the one before to a million cells, and repeat that command."
)
SIZES = (50_000, 200_000, 800_000)
ALL = 1_048_576
BAR = 1.1
_QUICK = 32


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run took.

    Attributes
    ----------
    cells
        Of its source.
    state
        What the command said.
    wall, cpu
        Seconds of the clock, and CPU-seconds of the tree.
    peak_bytes, parts
        Largest memory of the tree, and of which processes.
    stages
        Seconds of each stage of the run.
    """

    cells: int
    state: str
    wall: float
    cpu: float
    peak_bytes: int
    parts: dict[str, int]
    stages: dict[str, float]


def run(context: Context) -> Report:
    """Map ever more cells, then the same again."""
    sizes = [size // context.pick(1, _QUICK) for size in SIZES]
    most = ALL // context.pick(1, _QUICK)
    design = Design(most, 2_048, 174)
    collection = census(context.folder, design)
    _, package = reference(context.folder, design, TYPICAL)
    store = context.folder / "store-scaling"
    outcomes = []
    for cells in sizes:
        shutil.rmtree(store, ignore_errors=True)
        outcomes.append(_mapped(source_of(collection, cells), cells, package, store, context.log))
    grown, again = (_mapped(source_of(collection), most, package, store, context.log) for _ in range(2))
    if (grown.state, again.state) != ("committed", "nothing to do"):
        raise RuntimeError(f"the run over {most:,} cells was {grown.state}, and again {again.state}")
    slopes = [1e6 * (b.cpu - a.cpu) / (b.cells - a.cells) for a, b in pairwise(outcomes)]
    ratio = outcomes[-1].peak_bytes / outcomes[0].peak_bytes
    facts = {
        "peak_mib": {f"{outcome.cells:,} cells": round(outcome.peak_bytes / 2**20) for outcome in outcomes},
        "memory_ratio": ratio,
        "memory_bar": BAR,
        "memory_met": ratio <= BAR,
        "cpu_seconds_per_million_more_cells": slopes,
        "no_op_seconds": again.wall,
        "no_op_stages": again.stages,
        "runs": [asdict(outcome) for outcome in (*outcomes, grown, again)],
    }
    found = [_measurement(f"{outcome.cells:,} cells", outcome) for outcome in outcomes]
    found += [_measurement(f"{most:,} cells, most of them there", grown), _measurement("the same again", again)]
    return Report(TITLE, COUNTS, [], {"Runs on Ray": found}, facts)


def _measurement(name: str, outcome: Outcome) -> Measurement:
    told = {"peak_bytes": outcome.peak_bytes, "state": outcome.state}
    return Measurement(name, outcome.cells, "cells", (Sample(0, outcome.wall, outcome.cpu, told),))


def _mapped(source: str, cells: int, package: Path, store: Path, log: Path) -> Outcome:
    """The command over so many cells."""
    command = [sys.executable, "-m", "pipelines", "map", source, "--reference", str(package), "--store", str(store)]
    command += ["--actors", "2", "--readers", "1", "--keep-obs", ",".join(KEPT), "--json", "--quiet"]
    environment = os.environ | {"RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    with log.open("a") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, cwd=ROOT)
        with Peak(process.pid) as peak, Tree(process.pid) as tree:
            output, _ = process.communicate()
    wall = time.monotonic() - began
    result: dict[str, Any] = json.loads(output)
    if result["cells_done"] != cells:
        raise RuntimeError(f"the run over {cells:,} cells did not map them all: {output}")
    parts = dict(peak.parts.most_common(6))
    return Outcome(cells, result["state"], wall, tree.seconds(), peak.total, parts, result["seconds"])
