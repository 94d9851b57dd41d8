"""The run on Ray: two workers against one, and what Ray and the commit add to one process.

A run reports every unit that is done. The benchmark listens, and notes cells, time and the CPU-seconds of the whole
process tree each time; the slope over the units in the middle is what a cell costs once everything has started,
whatever starting took.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, override
from unittest import mock

import numpy as np

from benchmarks.data import source_of
from benchmarks.endtoend import KEPT, SHARD
from benchmarks.models import TYPICAL, reference
from benchmarks.turns import Way, in_turns
from benchmarks.usage import Tree
from benchmarks.values import Figure, Ratio, Report
from pipelines.progress import Silent

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from benchmarks.context import Context
    from benchmarks.values import Measurement

    Once = Callable[[], dict[str, Any]]

TITLE = "Workers"
COUNTS = (
    "2,000 genes. A sample is a fresh process that maps into a new store. Its steady cost is the slope of the whole"
    " tree's CPU-seconds (driver, Ray's servers, readers, actors) over the cells done, first units and last unit left"
    " out. `ray_overhead` is what one worker on Ray (one actor and one reader, all on one core) costs more than one"
    " process, at shards of 16,384 cells: steady cost of all cells and the commit, against the steady cost of one"
    " process. With start-up, everything from the first instruction to the last process's end is counted instead."
    " `two_workers` is the steady speed by the clock of two workers on two cores against one on one, at shards of 4,096"
    " cells."
)
_SMALL = 4_096


def run(context: Context) -> Report:
    """Run all of them in turns."""
    _, package = reference(context.folder, context.design, TYPICAL)
    cells = context.design.cells
    told = {"collection": str(context.collection()), "cells": cells, "package": str(package)}
    told |= {"folder": str(context.folder)}
    large = told | {"shard": context.pick(SHARD, 1_024)}
    small = told | {"shard": context.pick(_SMALL, 512)}
    call, cores = "benchmarks.workers:mapped", context.cores
    overhead = [
        Way("one process", call, large | {"workers": 0}, cells, fresh=True),
        Way("Ray, one worker", call, large | {"workers": 1}, cells, fresh=True),
    ]
    pair = [Way("one worker, one core", call, small | {"workers": 1}, cells, fresh=True)]
    if len(cores) > 1:
        pair.append(Way("two workers, two cores", call, small | {"workers": 2}, cells, cpus=cores, fresh=True))
    measured = {
        "Ray against one process": in_turns(overhead, context.log, context.many_samples, warm=0),
        "Two workers against one": in_turns(pair, context.log, context.many_samples, warm=0),
    }
    one, ray = measured["Ray against one process"]
    costs = {"one process": _steady(one, "cpu"), "Ray, one worker": _steady(ray, "cpu")}
    commit = float(np.median([sample.result["commit"] for sample in ray.samples])) / cells
    facts = {
        "steady_cpu_ms_per_cell": {name: 1e3 * cost for name, cost in costs.items()},
        "commit_ms_per_cell": 1e3 * commit,
        "ray_overhead_without_commit": costs["Ray, one worker"] / costs["one process"] - 1,
        "ray_overhead_with_start_up": ray.cpu / one.cpu - 1,
        "start_up_cpu_seconds": {m.way: m.cpu - cells * costs[m.way] for m in (one, ray)},
    }
    figures = [two_workers(measured["Two workers against one"]), ray_overhead(one, ray)]
    return Report(TITLE, COUNTS, figures, measured, facts)


def two_workers(pair: Sequence[Measurement]) -> Figure:
    """How many times as fast two workers are as one, by the clock."""
    if len(pair) < 2:
        return Figure("two_workers", None, "this process may use one core only")
    turns = [one["wall"] / two["wall"] for one, two in _in_pairs(*pair)]
    return Figure.ratio("two_workers", Ratio.of_turns(turns))


def ray_overhead(one: Measurement, ray: Measurement) -> Figure:
    """What a cell costs more on Ray, its share of the commit included."""
    turns = [(more["cpu"] + more["commit"] / ray.amount) / less["cpu"] - 1 for less, more in _in_pairs(one, ray)]
    return Figure.ratio("ray_overhead", Ratio.of_turns(turns))


def _in_pairs(one: Measurement, other: Measurement) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """What the two ways said in each turn."""
    return [(a.result, b.result) for a, b in zip(one.samples, other.samples, strict=True)]


def _steady(measurement: Measurement, what: str) -> float:
    """Median over the samples of the seconds that a cell takes."""
    return float(np.median([sample.result[what] for sample in measurement.samples]))


class Listener(Silent):
    """Notes what each unit took."""

    marks: list[tuple[int, float, float]]

    def __init__(self) -> None:
        super().__init__()
        self._tree = Tree(os.getpid())
        self._looked = 0.0
        Listener.marks = []

    @override
    def advance(self, cells: int) -> None:
        super().advance(cells)
        began = time.thread_time()
        # Looking takes 5 ms, which is none of the run's.
        Listener.marks.append((self._done, time.perf_counter(), self._tree.seconds() - self._looked))
        self._looked += time.thread_time() - began


def slope(marks: list[tuple[int, float, float]], column: int, workers: int) -> float:
    """Seconds a cell, by least squares over the units between the first two of each worker and the last of each."""
    most = max(1, workers)
    middle = np.array(marks[2 * most : len(marks) - most] if len(marks) > 3 * most + 2 else marks)
    return float(np.polyfit(middle[:, 0], middle[:, column], 1)[0])


def mapped(collection: str, cells: int, package: str, folder: str, shard: int, workers: int) -> Once:
    """The command with so many workers on Ray, each an actor and a reader; 0 for one process."""
    import pipelines as sv

    store = Path(folder) / f"store-workers-{workers}"

    def once() -> dict[str, Any]:
        shutil.rmtree(store, ignore_errors=True)
        engine = {"engine": "ray", "address": "local", "actors": workers, "readers": workers}
        told: dict[str, Any] = engine if workers else {"engine": "inline"}
        with mock.patch("pipelines.progress.Silent", Listener):
            result = sv.map(
                source_of(collection, cells),
                reference=package,
                store=str(store),
                keep_obs=KEPT,
                shard_cells=shard,
                quiet=True,
                **told,
            )
        if result.state != "committed" or result.cells_done != cells:
            raise RuntimeError(f"not all cells were mapped: {result}")
        marks = Listener.marks
        steady = {"wall": slope(marks, 1, workers), "cpu": slope(marks, 2, workers)}
        return steady | {"commit": result.seconds["commit"], "stages": result.seconds, "marks": marks}

    return once
