"""Trials of hyperparameters: the same cells and the same split, other settings; scored by cells that were held out.

Validation cells (``--validation-size``, a tenth by default) score a trial; cells that belong to neither share are never
looked at, nor are the labels that calibration holds out.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scviaduct.errors import InputError
from scviaduct.families import family as family_of
from scviaduct.references.callbacks import Run
from scviaduct.references.cells import read_cells, spooled_cells
from scviaduct.references.holding import Held
from scviaduct.references.integration import MOST_CELLS, scib_scores
from scviaduct.references.options import check_options
from scviaduct.references.outofcore import Place
from scviaduct.references.trainer import fit_model, make_model
from scviaduct.references.training import stages_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from scviaduct.families import Recipe
    from scviaduct.references.callbacks import OnEpoch
    from scviaduct.references.features import Features
    from scviaduct.references.searchspace import Trial

    Report = Callable[[int, float], None]

TUNED = ("SCVI", "SCANVI")
METRICS = ("loss", "scib")
LOSS = "elbo_validation"
"""Negative evidence lower bound of the validation cells, in nats a cell: comparable between likelihoods and sizes."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """The cells of all trials, on disk, where every process maps the same pages.

    Attributes
    ----------
    folder
        Of the counts.
    recipe
        How to train, but for what a trial sets.
    uri, version
        Of the source.
    features
        What the columns are.
    epochs
        Of the model that is scored, as ASHA counts them.
    """

    folder: Path
    recipe: Recipe
    uri: str
    version: str
    features: Features
    epochs: int


def check_tuning(recipe: Recipe, metric: str) -> None:
    """Refuse a search that cannot be, before anything is read.

    Raises
    ------
    InputError
        If the family, the metric or the recipe does not allow it.
    """
    found = family_of(recipe.family)
    if found.name not in TUNED:
        raise InputError(f"--tune searches an {' or '.join(TUNED)}, not a {found.name}.", "Leave it out.")
    if recipe.start:
        told = f"--from {recipe.start} has the model arguments that --tune would search"
        raise InputError(f"{told}.", "Leave one of them out.")
    if metric not in METRICS:
        raise InputError(f"--tune-metric {metric} is not known.", f"One of {', '.join(METRICS)}.")
    if metric == "scib" and not scores_integration(recipe):
        told = "--tune-metric scib compares labels and batches"
        raise InputError(f"{told}.", "Name both: --labels-key cell_type --batch-key donor.")
    if recipe.train_size == 1:
        raise InputError("--tune scores by validation cells, and --train-size 1 leaves none.", "--train-size 0.9.")
    check_options(recipe, found)


def scores_integration(recipe: Recipe) -> bool:
    """Whether the recipe names what scIB's metrics compare."""
    return bool(recipe.labels_key and recipe.batch_key)


def prepare(source: str, recipe: Recipe, folder: Path, epochs: int | None) -> Prepared:
    """Read the cells and choose their features once, for all trials.

    Parameters
    ----------
    source, recipe
        As in training.
    folder
        Of the counts; what is whole in it stays.
    epochs
        Of a trial; None for the recipe's, or what scvi-tools chooses.
    """
    read = read_cells(source, recipe, place=Place(folder, "yes"))
    total = epochs or recipe.epochs or _usual_epochs(read.cells.n_obs)
    recipe = replace(recipe, epochs=total)
    if family_of(recipe.family).starts_from:
        # As scvi-tools chooses for a SCANVI that starts from a trained SCVI.
        total = recipe.scanvi_epochs or int(min(10, max(2, round(total / 3.0))))
        recipe = replace(recipe, scanvi_epochs=total)
    return Prepared(folder, recipe, read.uri, read.version, read.features, total)


def _usual_epochs(cells: int) -> int:
    """What scvi-tools chooses; asked only where nobody says, because its import takes many seconds."""
    from scvi.model._utils import get_max_epochs_heuristic

    return int(get_max_epochs_heuristic(cells))


def run_trial(prepared: Prepared, trial: Trial, report: Report, latents: Path | None = None) -> dict[str, float]:
    """Train a trial's model and score it.

    Parameters
    ----------
    prepared
        The cells.
    trial
        What it sets.
    report
        Told of the epochs done and the loss, after every epoch of the model that is scored; may end the trial.
    latents
        Where latents of validation cells go, with their labels and batches, to be scored together with other trials'.

    Returns
    -------
    dict of str to float
        ``loss``, ``epochs`` and ``seconds``.
    """
    began = time.monotonic()
    base = prepared.recipe
    recipe = replace(base, settings={**base.settings, **trial.settings}, plan={**base.plan, **trial.plan})
    found = family_of(recipe.family)
    read = spooled_cells(prepared.folder, recipe, prepared.uri, prepared.version, prepared.features)
    if found.needs.labels == "required":
        Held.of(read, recipe)  # hides the labels that calibration will ask for
    stages = stages_of(recipe, found, None)
    data = stages[0].family.setup(read.cells, recipe)
    model: Any = None
    rows: list[dict[str, float]] = []
    for stage in stages:
        model = make_model(stage, data, recipe, model)
        run = Run(_reported(report) if stage is stages[-1] else _unheard)
        fit_model(stage, model, data, recipe, run)
        rows = run.rows
    if latents is not None:
        _write_latents(model, read.cells.obs, recipe, latents)
    return {"loss": rows[-1][LOSS], "epochs": rows[-1]["epoch"], "seconds": time.monotonic() - began}


def _reported(report: Report) -> OnEpoch:
    def told(_name: str, done: int, _epochs: int, row: Mapping[str, float]) -> None:
        if row:
            report(done, float(row[LOSS]))

    return told


def _unheard(_name: str, _done: int, _epochs: int, _row: Mapping[str, float]) -> None:
    """Tells nobody."""


def _write_latents(model: Any, obs: Any, recipe: Recipe, path: Path) -> None:
    """Latents of labelled validation cells, the same ones in every trial."""
    rows = np.sort(np.asarray(model.validation_indices))
    labels = obs[recipe.labels_key].astype(str).to_numpy()
    rows = rows[labels[rows] != recipe.unlabeled_category]
    if len(rows) > MOST_CELLS:
        rows = np.sort(np.random.default_rng(recipe.seed).choice(rows, MOST_CELLS, replace=False))
    model.to_device("cpu")
    latent = np.ascontiguousarray(model.get_latent_representation(indices=rows), np.float32)
    batches = obs[recipe.batch_key].astype(str).to_numpy()[rows]
    table = pa.table({"latent": list(latent), "label": labels[rows], "batch": batches})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def score_latents(path: Path) -> dict[str, float]:
    """scIB's metrics of latents that :func:`run_trial` wrote.

    Raises
    ------
    InputError
        If the held-out cells are of one label or one batch.
    """
    table = pq.read_table(path)
    labels, batches = table["label"].to_pylist(), table["batch"].to_pylist()
    for name, values in (("label", labels), ("batch", batches)):
        if len(set(values)) < 2:
            told = f"The held-out cells with a label are of {len(set(values))} {name}, and scIB's metrics compare two"
            raise InputError(f"{told}.", "Hold out more: --train-size 0.8; or --tune-metric loss.")
    latent = np.stack(table["latent"].to_numpy(zero_copy_only=False)).astype(np.float32)
    return scib_scores(latent, labels, batches)
