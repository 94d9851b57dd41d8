"""Surgery in the suite: adapters of new batches against one full surgery of scvi-tools for each.

A smaller case of :mod:`benchmarks.surgery`, which measures more, and takes longer.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.turns import Way, in_turns
from benchmarks.values import Figure, Report

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.context import Context

    Once = Callable[[], dict[str, Any]]

TITLE = "Surgery"
COUNTS = (
    "CPU-seconds a cell of one process on one core, imports outside. Ours is `pipelines.map`, inline, from the file to"
    " the committed store, over all simulated new batches, adapters fitted with the defaults. scvi-tools is"
    " `load_query_data`, `train` for 200 epochs, `get_latent_representation` and `predict` of the first batch. Accuracy"
    " is that of the labels of the first batch. One sample each."
)


def run(context: Context) -> Report:
    """Both ways over the same case."""
    batches, cells = context.pick(3, 2), context.pick(5_001, 400)
    told = {"folder": str(context.folder), "batches": batches, "cells": cells, "quick": context.quick}
    ways = [
        Way("adapters", "benchmarks.adapters:fitted", told, cells),
        Way("scvi-tools, one surgery a batch", "benchmarks.adapters:plain_surgery", told, cells // batches),
    ]
    found = in_turns(ways, context.log, 1, warm=0)
    accuracy = {one.way: one.last("accuracy") for one in found}
    epochs = [one.last("cell_epochs") / one.amount for one in found]
    facts = {"accuracy": accuracy, "cell_epochs_ratio": epochs[1] / epochs[0]}
    figure = Figure("surgery_vs_per_batch", found[0].rate / found[1].rate)
    return Report(TITLE, COUNTS, [figure], {"One core": found}, facts)


def _case(folder: str, batches: int, cells: int, *, quick: bool) -> Any:
    from benchmarks.surgery_data import Design, simulated

    where = Path(folder) / "surgery"
    where.mkdir(exist_ok=True)
    design = Design(new_batches=batches, cells=cells)
    small = replace(design, genes=300, known_cells=200, epochs=4, scanvi_epochs=2)
    return simulated(where, small if quick else design)


def fitted(folder: str, batches: int, cells: int, *, quick: bool) -> Once:
    """The command over all batches."""
    from benchmarks.surgery_fits import ours, scores

    case = _case(folder, batches, cells, quick=quick)

    def once() -> dict[str, Any]:
        outcome = ours(case, list(case.batches))
        first = outcome.of(case.read(list(case.batches)[:1]).obs_names.to_numpy(str))
        return {"cell_epochs": outcome.cell_epochs, **scores(case, first), "stages": outcome.cpu}

    return once


def plain_surgery(folder: str, batches: int, cells: int, *, quick: bool) -> Once:
    """scvi-tools' own, of the first batch."""
    from benchmarks.surgery_fits import PLAIN_EPOCHS, plain, scores

    case = _case(folder, batches, cells, quick=quick)

    def once() -> dict[str, Any]:
        outcome = plain(case, list(case.batches)[:1], epochs=5 if quick else PLAIN_EPOCHS)
        return {"cell_epochs": outcome.cell_epochs, **scores(case, outcome)}

    return once
