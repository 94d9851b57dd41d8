"""Searching hyperparameters through Ray Tune: trials beside each other, the worse ones stopped early (ASHA).

Everything is in ``.NAME.tuning`` beside the package: the cells, Ray Tune's own state, latents of the trials, and what
came out. A search that was killed goes on with the trials that are not done.
"""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, override

import ray
from ray import tune

from pipelines.trials import best_of, row_of, scored, write_table
from scviaduct.errors import InputError, ScviaductError
from scviaduct.families import family as family_of
from scviaduct.references.integration import require_scib
from scviaduct.references.searchspace import Trial, Wanted, draw_trials, parse_space
from scviaduct.references.tuning import (
    Prepared,
    check_tuning,
    prepare,
    run_trial,
    scores_integration,
)
from scviaduct.values import digest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from scviaduct.families import Recipe

TABLE = "tuning.csv"
_DONE, _STATE, _RAY, _CELLS = "best.json", "search.json", "ray", "cells"
_GRACE, _REDUCTION = 0.2, 3
"""Share of the epochs that every trial gets, and of which part ASHA keeps one at each halving."""
_FAILURES = 3
"""Times that a trial is begun again whose process or machine was lost."""


@dataclass(frozen=True, slots=True)
class Tuned:
    """What came out.

    Attributes
    ----------
    recipe
        With the best trial's settings.
    table
        The trials: parameters, scores, seconds.
    provenance
        What a package says of the search.
    """

    recipe: Recipe
    table: Path
    provenance: dict[str, Any]


def check_search(recipe: Recipe, search: Wanted) -> list[Trial]:
    """The trials of a search, which is checked first; nothing is read.

    Raises
    ------
    InputError
        If the search cannot be.
    """
    if search.trials < 1:
        raise InputError(f"--tune {search.trials} is too few.", "At least 1, e.g. --tune 20.")
    if search.epochs is not None and search.epochs < 1:
        raise InputError(f"--tune-epochs {search.epochs} is too few.", "At least 1.")
    check_tuning(recipe, search.metric)
    if search.metric == "scib":
        require_scib()
    found = family_of(recipe.family)
    space = parse_space(search.space, found, (*recipe.settings, *recipe.plan))
    return draw_trials(space, search.trials, recipe.seed, found)


def search_best(
    source: str,
    recipe: Recipe,
    search: Wanted,
    out: Path,
    resources: Mapping[str, float],
    say: Callable[[str], None],
    *,
    restart: bool = False,
) -> Tuned:
    """Try hyperparameters on a Ray that this process is connected to.

    Parameters
    ----------
    source
        Canonical URI of the training cells.
    recipe
        How to train, but for what is searched.
    search
        What is asked for.
    out
        Folder of the package that is to be; the search's own lies beside it, where all machines reach it.
    resources
        Of a trial, as Ray Tune names them: ``cpu`` and ``gpu``.
    say
        Told what is worth a line.
    restart
        Whether to remove what an earlier search left.

    Raises
    ------
    InputError
        If the search cannot be, the cells are wrong, or another search's folder is in the way.
    EngineError
        If no trial came to its end.
    """
    trials = check_search(recipe, search)
    folder = folder_of(out)
    if restart and folder.is_dir():
        shutil.rmtree(folder)
    _claim(source, recipe, search, folder)
    if not (folder / _DONE).is_file():
        prepared = _prepared(source, recipe, search, folder)
        rows = scored(_tried(prepared, trials, resources, folder, say), prepared, search, folder)
        best = best_of(rows, search.metric)
        write_table(rows, folder / TABLE)
        done = {"best": best["trial"], "score": best[search.metric], "epochs": prepared.epochs}
        (folder / _DONE).write_text(json.dumps(done))
        for name in (_CELLS, _RAY):  # the training that follows wants the disk
            shutil.rmtree(folder / name, ignore_errors=True)
    done = json.loads((folder / _DONE).read_text())
    chosen = trials[int(done["best"]) - 1]
    values = ", ".join(f"{name}={value}" for name, value in chosen.values.items())
    say(f"trial {chosen.number} of {len(trials)} is the best by {search.metric} ({done['score']:,.4g}): {values}")
    tuned = replace(recipe, settings={**recipe.settings, **chosen.settings}, plan={**recipe.plan, **chosen.plan})
    told = {"metric": search.metric, "epochs": done["epochs"], "best": chosen.number, "space": _told(recipe, search)}
    with (folder / TABLE).open(newline="") as file:
        told["trials"] = list(csv.DictReader(file))
    return Tuned(tuned, folder / TABLE, told)


def folder_of(out: Path) -> Path:
    """Where a search keeps its own."""
    return out.parent / f".{out.name}.tuning"


def _told(recipe: Recipe, search: Wanted) -> dict[str, str]:
    space = parse_space(search.space, family_of(recipe.family), (*recipe.settings, *recipe.plan))
    return {name: str(part) for name, part in space.items()}


def _claim(source: str, recipe: Recipe, search: Wanted, folder: Path) -> None:
    """Take a search's folder; refuse one of another search."""
    key = digest(source, recipe.told(), search.trials, list(search.space), search.metric, search.epochs)
    state = folder / _STATE
    if state.is_file() and json.loads(state.read_text()).get("key") != key:
        told = f"{folder} holds a search of other options"
        raise InputError(f"{told}.", "Start over: --restart; or finish that one with its own command.")
    folder.mkdir(parents=True, exist_ok=True)
    state.write_text(json.dumps({"key": key}))


def _prepared(source: str, recipe: Recipe, search: Wanted, folder: Path) -> Prepared:
    """The cells on disk, read in a task."""
    task = ray.remote(num_cpus=1, max_retries=_FAILURES)(prepare)
    try:
        prepared: Prepared = ray.get(task.remote(source, recipe, folder / _CELLS, search.epochs))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ScviaductError):
            shutil.rmtree(folder)
            raise error.cause from None
        raise
    return prepared


def _tried(
    prepared: Prepared,
    trials: Sequence[Trial],
    resources: Mapping[str, float],
    folder: Path,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Run the trials, or those that are left; a row each."""
    from ray.tune.schedulers import AsyncHyperBandScheduler

    # Ray Tune's own loggers want packages that say nothing here, and its Ctrl-C would end a search as if it were done.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the new one prints even where nothing is to be printed
    latents = folder / "latents" if scores_integration(prepared.recipe) else None
    trainable = tune.with_resources(
        tune.with_parameters(_trial, prepared=prepared, trials=list(trials), latents=latents),
        dict(resources),
    )
    path = str(folder / _RAY / "trials")
    if tune.Tuner.can_restore(path):
        say(f"going on with the search in {folder}")
        tuner = tune.Tuner.restore(path, trainable, resume_unfinished=True, restart_errored=True)
    else:
        grace = max(1, round(prepared.epochs * _GRACE))
        asha = AsyncHyperBandScheduler(
            "training_iteration", max_t=max(prepared.epochs, 1), grace_period=grace, reduction_factor=_REDUCTION
        )
        tuner = tune.Tuner(
            trainable,
            param_space={"number": tune.grid_search([trial.number for trial in trials])},
            tune_config=tune.TuneConfig(metric="loss", mode="min", scheduler=asha),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=str(folder / _RAY),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=_FAILURES),
                callbacks=[_Say(say, len(trials))],
            ),
        )
    return [row_of(result, trials) for result in tuner.fit()]


def _trial(config: Mapping[str, Any], prepared: Prepared, trials: Sequence[Trial], latents: Path | None) -> None:
    """One trial, in a process of its own."""
    import torch

    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    trial = trials[config["number"] - 1]

    def report(done: int, loss: float) -> None:
        if done < prepared.epochs:
            tune.report({"loss": loss, "epochs": done, "whole": 0, "error": ""})

    path = None if latents is None else latents / f"{trial.number}.parquet"
    try:
        tune.report({**run_trial(prepared, trial, report, path), "whole": 1, "error": ""})
    except ScviaductError as error:  # values that diverge, or that scvi-tools refuses: another attempt would not help
        tune.report({"loss": math.inf, "epochs": 0, "whole": 0, "error": str(error)})


class _Say(tune.Callback):
    """Says how each trial ended."""

    def __init__(self, say: Callable[[str], None], trials: int) -> None:
        self._say, self._trials, self._done = say, trials, 0

    def __getstate__(self) -> dict[str, Any]:
        """Without the listener: Ray Tune keeps this with the search, and a live bar cannot be kept."""
        return {"_say": _unsaid, "_trials": self._trials, "_done": self._done}

    @override
    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._done += 1
        told = trial.last_result or {}
        after = f"loss {told['loss']:,.1f} after epoch {int(told['epochs']):,}" if "loss" in told else "no score"
        self._say(f"trial {trial.config['number']}: {after} ({self._done} of {self._trials} trials done)")

    @override
    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._say(f"trial {trial.config['number']} failed")


def _unsaid(line: str) -> None:
    """Says nothing."""
