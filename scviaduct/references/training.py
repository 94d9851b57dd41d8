"""Training a reference with scvi-tools, and packaging it at once.

Training holds the selected cells in memory, as sparse counts of the chosen features, or maps them from a disk; what can
be checked is checked first. What a killed run left is gone on from (:mod:`scviaduct.references.checkpoints`).
"""

from __future__ import annotations

import csv
import shutil
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scviaduct.errors import InputError
from scviaduct.families import Recipe
from scviaduct.families import family as family_of
from scviaduct.families.vae import quiet
from scviaduct.references.building import build_package
from scviaduct.references.callbacks import Run
from scviaduct.references.cells import read_cells, source_uri
from scviaduct.references.checkpoints import SOFTWARE, Work
from scviaduct.references.evidence import gather
from scviaduct.references.holding import Held
from scviaduct.references.manifest import is_name
from scviaduct.references.options import check_options, model_arguments, plan_arguments
from scviaduct.references.outofcore import Place, trains_from_disk
from scviaduct.references.package import Reference
from scviaduct.references.ranks import ALONE, Ranks, check_together
from scviaduct.references.starting import Start
from scviaduct.references.trainer import Stage, fit_model, make_model
from scviaduct.software import software
from scviaduct.sources import open_source

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from scviaduct.families import Family
    from scviaduct.references.callbacks import OnEpoch, Row
    from scviaduct.references.cells import TrainingCells

__all__ = ["Options", "Recipe", "train"]


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
    out_of_core
        Whether the counts are left on disk: ``yes``, ``no``, or ``auto`` for what an estimate of their size suggests.
    ranks
        Which of several processes this is that train together.
    provenance, extras
        What else the package says of itself, and further files of it: name to where it lies.
    """

    restart: bool = False
    checkpoint_minutes: float = 10.0
    tensorboard: Path | None = None
    say: Callable[[str], None] = _unsaid
    out_of_core: str = "auto"
    ranks: Ranks = ALONE
    provenance: Mapping[str, Any] = field(default_factory=dict)
    extras: Mapping[str, Path] = field(default_factory=dict)


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
    folder = new_folder(Path(out))
    found = family_of(recipe.family)
    check_options(recipe, found)
    check_run(options, found)
    start = Start(recipe.start, found) if recipe.start else None
    recipe = start.recipe(recipe) if start else recipe
    stages = stages_of(recipe, found, start)
    with open_source(source_uri(source, recipe)) as opened:
        pinned, version = opened.uri, opened.version
    digest = start.reference.digest if start else ""
    classifies = found.needs.labels == "required"
    work = Work(folder, recipe, pinned, f"{version}{digest}", classifier=classifies)
    ranks = options.ranks
    with work.alone() if ranks.first else nullcontext():
        try:
            read = _read(source, recipe, found, start, work, options)
            held = Held.of(read, recipe) if classifies else Held.none(read)
            model, rows = _fit(stages, read, recipe, start, work, on_epoch, options)
        except InputError:
            if ranks.first and not work.exists:
                work.remove()
            raise
        if ranks.first:
            held.give_back(read, recipe)
            _package(folder, model, found, read, recipe, held, rows, start, options)
            work.remove()
        ranks.wait()
    return Reference.load(folder)


def _read(
    source: str, recipe: Recipe, found: Family, start: Start | None, work: Work, options: Options
) -> TrainingCells:
    """The cells; of several processes the first reads them, and the others map what it left on disk."""
    ranks = options.ranks
    mode = options.out_of_core
    if ranks.count > 1 and mode == "auto" and trains_from_disk(found):
        mode = "yes"
    if not ranks.first:
        ranks.wait()
    features = work.check(restart=options.restart and ranks.first)
    if features is not None and ranks.first:
        options.say(f"going on with the training in {work.folder}")
    place = Place(work.folder / "cells", mode, options.say)
    read = read_cells(source, recipe, features or (start.features if start else None), place)
    if ranks.first and ranks.count > 1:
        work.note(read.features)
        ranks.wait()
    return read


def new_folder(folder: Path) -> Path:
    """The folder of a package that is to be.

    Raises
    ------
    InputError
        If its name is none, or something is in it.
    """
    if not is_name(folder.name):
        raise InputError(f"'{folder}' ends in no name for a package.", "Name a folder without a dot: --out lung-v1.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"'{folder}' is there and not empty.", "Name a new folder: --out DIR.")
    return folder


def check_run(options: Options, found: Family) -> None:
    """Refuse what a run cannot be, before anything is read.

    Raises
    ------
    InputError
        If the options contradict the family or what is installed.
    """
    Place(mode=options.out_of_core).check(found)
    check_together(found, options.ranks.count)
    if options.checkpoint_minutes < 0:
        told = f"--checkpoint-minutes {options.checkpoint_minutes:g} is too few"
        raise InputError(f"{told}.", "At least 0, which is after every epoch.")
    if options.tensorboard is not None and not any(find_spec(name) for name in ("tensorboard", "tensorboardX")):
        told = f"--tensorboard {options.tensorboard} needs the package tensorboard, which is not installed"
        raise InputError(f"{told}.", "pip install tensorboard; or leave it out: metrics.csv is written in any case.")


def stages_of(recipe: Recipe, found: Family, start: Start | None) -> list[Stage]:
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
            options.tensorboard if options.ranks.first else None,
            ranks=options.ranks,
        )
        done = work.finished(i)
        if done is None:
            fit_model(stage, model, data, recipe, run)
            if not options.ranks.first:
                continue
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


def _package(
    folder: Path,
    model: Any,
    found: Family,
    read: TrainingCells,
    recipe: Recipe,
    held: Held,
    rows: Sequence[tuple[str, Row]],
    start: Start | None,
    options: Options,
) -> None:
    provenance: dict[str, Any] = {
        "source": read.uri,
        "source_version": read.version,
        "cells": read.cells.n_obs,
        "recipe": recipe.told(),
        "epochs": {name: int(row["epoch"]) for name, row in rows},
        "software": software(*SOFTWARE),
        **options.provenance,
    }
    if options.ranks.count > 1:
        provenance["processes"] = options.ranks.count
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
        extras = {"metrics.csv": Path(temporary, "metrics.csv"), **evidence.files, **options.extras}
        made = build_package(
            saved, package, folder.name, read.cells, provenance | evidence.provenance, extras, recipe.labels_key or ""
        )
        if folder.exists():
            folder.rmdir()
        shutil.move(made.path, folder)


def _write_metrics(rows: Sequence[tuple[str, Row]], path: Path) -> None:
    names = dict.fromkeys(name for _, row in rows for name in row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["model", *names])
        writer.writeheader()
        writer.writerows({"model": model, **row} for model, row in rows)
