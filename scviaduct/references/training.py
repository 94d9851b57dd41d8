"""Training a reference with scvi-tools, and packaging it at once.

Training holds the selected cells in memory, as sparse counts of the chosen features; everything before it is checked
first. What a killed run left is gone on from (:mod:`scviaduct.references.checkpoints`).
"""

from __future__ import annotations

import csv
import shutil
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scviaduct.errors import InputError
from scviaduct.families import Recipe
from scviaduct.families import family as family_of
from scviaduct.families.vae import quiet
from scviaduct.references.building import build_package
from scviaduct.references.calibration import hold_out
from scviaduct.references.callbacks import Run
from scviaduct.references.cells import read_cells, source_uri
from scviaduct.references.checkpoints import Work, software
from scviaduct.references.evidence import gather
from scviaduct.references.manifest import is_name
from scviaduct.references.options import check_options, model_arguments, plan_arguments
from scviaduct.references.starting import Start
from scviaduct.references.trainer import Stage, fit_model, make_model
from scviaduct.sources import open_source

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import pandas as pd

    from scviaduct.families import Family
    from scviaduct.references.callbacks import OnEpoch, Row
    from scviaduct.references.cells import TrainingCells
    from scviaduct.references.package import Reference

__all__ = ["Options", "Recipe", "train"]

_MOST_HELD = 0.25
"""Share of the labelled cells whose labels a classifier may lose to calibration that nobody asked for."""


def _unheard(name: str, done: int, epochs: int, metrics: Mapping[str, float]) -> None:
    """Tells nobody."""


def _unsaid(line: str) -> None:
    """Says nothing."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a run of training goes; none of it decides what comes out.

    Attributes
    ----------
    restart
        Remove what an earlier run left instead of going on from it.
    checkpoint_minutes
        Between two checkpoints; 0 for one after every epoch.
    tensorboard
        Folder for TensorBoard; None for none.
    say
        Told what is worth a line.
    """

    restart: bool = False
    checkpoint_minutes: float = 10.0
    tensorboard: Path | None = None
    say: Callable[[str], None] = _unsaid


def train(
    source: str,
    recipe: Recipe,
    out: str | Path,
    on_epoch: OnEpoch = _unheard,
    options: Options | None = None,
) -> Reference:
    """Train a reference and make a package of it.

    Parameters
    ----------
    source
        URI of the training cells.
    recipe
        How to train.
    out
        Folder of the package; it must be new or empty.
    on_epoch
        Called with the class, the number of epochs done and that of all, and the metrics of the epoch: before the first
        epoch (without metrics) and after each.
    options
        How the run goes.

    Returns
    -------
    Reference
        The package, not yet registered.

    Raises
    ------
    InputError
        If anything is wrong with the recipe or the cells; before any training. Or if the loss is no longer a number.
    """
    options = options or Options()
    folder = _new_folder(Path(out))
    found = family_of(recipe.family)
    check_options(recipe, found)
    _check_run(options)
    start = Start(recipe.start, found) if recipe.start else None
    recipe = start.recipe(recipe) if start else recipe
    stages = _stages(recipe, found, start)
    with open_source(source_uri(source, recipe)) as opened:
        pinned, version = opened.uri, opened.version
    digest = start.reference.digest if start else ""
    classifies = found.needs.labels == "required"
    work = Work(folder, recipe, pinned, f"{version}{digest}", classifier=classifies)
    with work.alone():
        features = work.check(restart=options.restart)
        if features is not None:
            options.say(f"going on with the training in {work.folder}")
        read = read_cells(source, recipe, features or (start.features if start else None))
        held = _Held.of(read, recipe) if classifies else _Held.none(read)
        model, rows = _fit(stages, read, recipe, start, work, on_epoch, options)
        held.give_back(read, recipe)
        made = _package(folder, model, found, read, recipe, held, rows, start)
        work.remove()
    return made


def _new_folder(folder: Path) -> Path:
    if not is_name(folder.name):
        raise InputError(f"'{folder}' ends in no name for a package.", "Name a folder without a dot: --out lung-v1.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"'{folder}' is there and not empty.", "Name a new folder: --out DIR.")
    return folder


def _check_run(options: Options) -> None:
    if options.checkpoint_minutes < 0:
        told = f"--checkpoint-minutes {options.checkpoint_minutes:g} is too few"
        raise InputError(f"{told}.", "At least 0, which is after every epoch.")
    if options.tensorboard is not None and not any(find_spec(name) for name in ("tensorboard", "tensorboardX")):
        told = f"--tensorboard {options.tensorboard} needs the package tensorboard, which is not installed"
        raise InputError(f"{told}.", "pip install tensorboard; or leave it out: metrics.csv is written in any case.")


def _stages(recipe: Recipe, found: Family, start: Start | None) -> list[Stage]:
    """The models to train, one after the other."""
    first = family_of(found.starts_from) if found.starts_from else found
    arguments = model_arguments(recipe.settings, found)
    families = [found] if start or first is found else [first, found]
    plans = plan_arguments(recipe.plan, families)
    epochs = [recipe.epochs, recipe.scanvi_epochs] if len(families) > 1 else [recipe.epochs]
    epochs = [recipe.scanvi_epochs] if start else epochs
    return [Stage(one, arguments, plan, n) for one, plan, n in zip(families, plans, epochs, strict=True)]


def _fit(
    stages: Sequence[Stage],
    read: TrainingCells,
    recipe: Recipe,
    start: Start | None,
    work: Work,
    on_epoch: OnEpoch,
    options: Options,
) -> tuple[Any, list[tuple[str, Row]]]:
    """Train every model, each from the one before; what an earlier run finished is taken from its work folder."""
    model: Any = start.model(read.cells, recipe) if start else None
    data = None if model is None else model.adata
    rows: list[tuple[str, Row]] = []
    for i, stage in enumerate(stages):
        if data is None:
            with quiet():
                data = stage.family.setup(read.cells, recipe)
        model = make_model(stage, data, recipe, model)
        run = Run(
            on_epoch,
            work.checkpoint(i),
            lambda: work.note(read.features),
            options.checkpoint_minutes,
            options.tensorboard,
        )
        done = work.finished(i)
        if done is None:
            fit_model(stage, model, data, recipe, run)
            work.note(read.features)
            work.finish(i, {"weights": dict(model.module.state_dict()), "rows": run.rows})
        else:
            model.module.load_state_dict(done["weights"])
            model.module.eval()
            model.is_trained_ = True
            run.rows[:] = done["rows"]
        rows += [(stage.family.name, row) for row in run.rows]
    model.to_device("cpu")
    return model, rows


@dataclass(frozen=True, slots=True)
class _Held:
    """Labels that a classifier is not shown.

    Attributes
    ----------
    labels
        All of them, as they were read; None without labels.
    cells
        bool, shape ``(n_cells,)``.
    why_not
        Why there are none, where calibration needs some.
    """

    labels: pd.Series | None
    cells: np.ndarray
    why_not: str = ""

    @classmethod
    def none(cls, read: TrainingCells) -> _Held:
        return cls(None, np.zeros(read.cells.n_obs, np.bool_))

    @classmethod
    def of(cls, read: TrainingCells, recipe: Recipe) -> _Held:
        obs, key = read.cells.obs, str(recipe.labels_key)
        if not recipe.groups:
            return cls.none(read)
        labels = obs[key].astype(object)
        values, groups = labels.to_numpy(), obs[recipe.groups].astype(object).to_numpy()
        cells, why_not = hold_out(groups, values, recipe.unlabeled_category, recipe.seed)
        share = cells.sum() / max((values != recipe.unlabeled_category).sum(), 1)
        if recipe.calibrate_by is None and share > _MOST_HELD:
            told = f"a group of '{recipe.groups}' holds {share:.0%} of the labels"
            return cls(None, np.zeros_like(cells), f"{told}; --calibrate-by {recipe.groups} holds one out all the same")
        if not why_not:
            obs[key] = labels.where(~cells, recipe.unlabeled_category).astype("category")
        return cls(labels, cells, why_not)

    def give_back(self, read: TrainingCells, recipe: Recipe) -> None:
        """Put the true labels back."""
        if self.labels is not None:
            read.cells.obs[recipe.labels_key] = self.labels.astype("category")


def _package(
    folder: Path,
    model: Any,
    found: Family,
    read: TrainingCells,
    recipe: Recipe,
    held: _Held,
    rows: Sequence[tuple[str, Row]],
    start: Start | None,
) -> Reference:
    provenance: dict[str, Any] = {
        "source": read.uri,
        "source_version": read.version,
        "cells": read.cells.n_obs,
        "recipe": recipe.told(),
        "epochs": {name: int(row["epoch"]) for name, row in rows},
        "software": software(),
    }
    if start:
        provenance["started_from"] = {"name": start.name, "digest": start.reference.digest}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        saved, package = Path(temporary, "saved"), Path(temporary, "package")
        with quiet():
            model.save(str(saved), save_anndata=False)
        _write_metrics(rows, Path(temporary, "metrics.csv"))
        evidence = gather(saved, model, found, read, recipe, held.cells, held.why_not)
        if recipe.labels_key:  # a package knows a cell without a label by its missing value
            known = read.cells.obs[recipe.labels_key].astype(object)
            read.cells.obs[recipe.labels_key] = known.where(known != recipe.unlabeled_category).astype("category")
        extras = {"metrics.csv": Path(temporary, "metrics.csv"), **evidence.files}
        made = build_package(
            saved, package, folder.name, read.cells, provenance | evidence.provenance, extras, recipe.labels_key or ""
        )
        if folder.exists():
            folder.rmdir()
        shutil.move(made.path, folder)
    return type(made).load(folder)


def _write_metrics(rows: Sequence[tuple[str, Row]], path: Path) -> None:
    names = dict.fromkeys(name for _, row in rows for name in row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["model", *names])
        writer.writeheader()
        writer.writerows({"model": model, **row} for model, row in rows)
