"""Training a reference."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.progress import reporter
from scviaduct.errors import InputError
from scviaduct.references.recipes import fill_up
from scviaduct.references.searchspace import Wanted
from scviaduct.references.training import Options
from scviaduct.references.training import train as train_reference

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pipelines.progress import Reporter

ENGINES = ("inline", "ray")
_SAY_EVERY = 10.0  # seconds


def train(
    source: str,
    *,
    family: str,
    out: str | Path,
    recipe: str = "default",
    start: str | None = None,
    labels_key: str | None = None,
    unlabeled_category: str | None = None,
    samples_per_label: int | None = None,
    batch_key: str | None = None,
    sample_key: str | None = None,
    panel_key: str | None = None,
    background: Sequence[str] = (),
    layer: str | None = None,
    categorical_covariates: Sequence[str] = (),
    continuous_covariates: Sequence[str] = (),
    size_factor_key: str | None = None,
    genes: int | None = None,
    min_cells_per_peak: float | None = None,
    epochs: int | None = None,
    scanvi_epochs: int | None = None,
    batch_size: int | None = None,
    train_size: float | None = None,
    validation_size: float | None = None,
    early_stopping: bool | None = None,
    patience: int | None = None,
    monitor: str | None = None,
    device: str | None = None,
    precision: str | None = None,
    loader_workers: int | None = None,
    seed: int | None = None,
    calibrate_by: str | None = None,
    with_counts: bool | None = None,
    settings: Mapping[str, str] | None = None,
    plan: Mapping[str, str] | None = None,
    checkpoint_minutes: float = 10.0,
    tensorboard: str | Path | None = None,
    restart: bool = False,
    out_of_core: str = "auto",
    engine: str | None = None,
    address: str | None = None,
    cpus: int | None = None,
    gpus: int | None = None,
    tune: int | None = None,
    tune_metric: str = "loss",
    tune_epochs: int | None = None,
    search: Sequence[str] = (),
    quiet: bool = False,
) -> Path:
    """Train a reference; what is written is a package that ``reference.add`` registers.

    What is None is what the recipe says, and else the default of :class:`~scviaduct.families.Recipe`.

    Parameters
    ----------
    source
        URI of the training cells.
    family
        ``scvi``, ``scanvi``, ``totalvi``, ``multivi``, ``peakvi``, ``poissonvi``, ``mrvi`` or
        ``contrastivevi``. A SCANVI starts from an SCVI trained on the same cells.
    out
        Folder of the package; new or empty. A run that was killed leaves ``.NAME.training`` beside it, and the same
        call goes on from there.
    recipe
        ``default``, ``scarches`` or ``census``; what is named besides wins over it.
    start
        Registered name or path of the reference to start from, instead of training one first (SCANVI).
    labels_key, unlabeled_category, samples_per_label
        obs column of labels; the label that means none; labelled cells per label and epoch (SCANVI).
    batch_key, layer, categorical_covariates, continuous_covariates, size_factor_key
        As scvi-tools' ``setup_anndata`` takes them.
    sample_key
        obs column of samples, such as donors (MRVI).
    panel_key
        obs column of the panels that proteins were measured with (TOTALVI).
    background
        Cells of the background as ``column=value``; all others are the target (ContrastiveVI).
    genes
        Highly variable genes to train on; 0 for all. Other modalities are kept whole.
    min_cells_per_peak
        Share of the cells in which a peak must be open to be kept.
    epochs, scanvi_epochs
        Of the model, and of the SCANVI that starts from an SCVI; None for what scvi-tools chooses.
    batch_size, device, precision, loader_workers, seed
        Of training.
    train_size, validation_size
        Shares of the cells; the split is seeded.
    early_stopping, patience, monitor
        Whether training ends when a metric of the validation cells no longer falls, after how many epochs, which one.
    calibrate_by
        obs column of the groups held out to measure how sure labels are; ``none`` for no calibration. Unless it is
        named, a classifier keeps its labels where the batch key's groups are so few that one holds over a quarter.
    with_counts
        Keep the counts in the package's minified data.
    settings, plan
        Model arguments, e.g. ``{"n_latent": "20"}``, and those of its training plan, e.g. ``{"lr": "0.0005"}``.
    checkpoint_minutes
        Between two checkpoints; 0 for one after every epoch.
    tensorboard
        Folder for TensorBoard; ``metrics.csv`` in the package holds the metrics in any case.
    restart
        Start over instead of going on.
    out_of_core
        Whether the counts of the features that are trained on are left on disk: ``yes``, ``no``, or ``auto`` for what
        an estimate of their size says.
    engine
        ``inline`` for this process, ``ray`` for an actor; None for ``ray`` where an address is given, by ``address`` or
        ``RAY_ADDRESS``, or something is asked for that needs Ray.
    address
        Ray cluster: ``local``, ``auto`` or ``HOST:PORT``.
    cpus
        CPUs of the process that trains, of each of several, and of a trial.
    gpus
        Processes that train together through Ray Train, on a GPU each (on CPUs with ``device="cpu"``).
    tune
        Trials of a search for hyperparameters, the best of which is trained (SCVI, SCANVI).
    tune_metric
        ``loss`` or ``scib``: what is the best.
    tune_epochs
        Of a trial at most.
    search
        What is searched instead of the default, e.g. ``n_latent=10,20`` or ``lr=1e-4..1e-2 log``.
    quiet
        Without notices.

    Returns
    -------
    Path
        The package's folder.

    Raises
    ------
    InputError
        If anything is wrong with the arguments or the cells, before any training.
    """
    told = fill_up(
        {
            "family": family,
            "start": start,
            "labels_key": labels_key,
            "unlabeled_category": unlabeled_category,
            "samples_per_label": samples_per_label,
            "batch_key": batch_key,
            "sample_key": sample_key,
            "panel_key": panel_key,
            "background": tuple(background),
            "layer": layer,
            "categorical_covariates": tuple(categorical_covariates),
            "continuous_covariates": tuple(continuous_covariates),
            "size_factor_key": size_factor_key,
            "genes": genes,
            "min_cells_per_peak": min_cells_per_peak,
            "epochs": epochs,
            "scanvi_epochs": scanvi_epochs,
            "batch_size": batch_size,
            "train_size": train_size,
            "validation_size": validation_size,
            "early_stopping": early_stopping,
            "patience": patience,
            "monitor": monitor,
            "device": device,
            "precision": precision,
            "loader_workers": loader_workers,
            "seed": seed,
            "calibrate_by": calibrate_by,
            "with_counts": with_counts,
            "settings": dict(settings or {}),
            "plan": dict(plan or {}),
        },
        recipe,
    )
    board = None if tensorboard is None else Path(tensorboard).absolute()
    engine = _engine(engine, address, cpus, gpus, tune, search)
    with reporter(quiet=quiet) as progress:
        options = Options(
            restart=restart,
            checkpoint_minutes=checkpoint_minutes,
            tensorboard=board,
            say=progress.say,
            out_of_core=out_of_core,
        )
        if engine == "inline":
            return train_reference(str(source), told, out, _epochs(progress), options).path
        from pipelines.remote import OnRay, run_on_ray  # ray takes seconds to import

        wanted = None if tune is None else Wanted(tune, tuple(search), tune_metric, tune_epochs)
        place = OnRay(address, cpus, gpus, wanted)
        return run_on_ray(str(source), told, Path(out), options, place, _epochs(progress), progress.say)


def _engine(
    engine: str | None,
    address: str | None,
    cpus: int | None,
    gpus: int | None,
    tune: int | None,
    search: Sequence[str],
) -> str:
    """Where a training runs.

    Raises
    ------
    InputError
        If what is asked for contradicts it.
    """
    named = {"--address": address, "--cpus": cpus, "--gpus": gpus, "--tune": tune}
    told = next((name for name, value in named.items() if value is not None), None)
    if search and tune is None:
        raise InputError(f"--search {search[0]} without --tune searches nothing.", "Say how many trials: --tune 20.")
    if engine is None:
        return "ray" if told or os.environ.get("RAY_ADDRESS") else "inline"
    if engine not in ENGINES:
        raise InputError(f"--engine {engine} is not known.", f"One of {', '.join(ENGINES)}.")
    if engine == "inline" and told:
        raise InputError(f"{told} {named[told]} is for --engine ray.", "Leave one of them out.")
    return engine


def _epochs(progress: Reporter) -> Callable[[str, int, int, Mapping[str, float]], None]:
    """Say how far training is, at most every ten seconds, and when each model begins and ends."""
    began = last = time.monotonic()
    first = 0

    def tell(name: str, done: int, epochs: int, metrics: Mapping[str, float]) -> None:
        nonlocal began, last, first
        now = time.monotonic()
        if not metrics:
            began, last, first = now, now, done
            after = f", going on after epoch {done:,}" if done else ""
            progress.say(f"training {name}: {epochs:,} epochs{after}")
        elif done == epochs or now - last >= _SAY_EVERY:
            last = now
            left = (now - began) / (done - first) * (epochs - done)
            told = {"loss": "train_loss", "validation loss": "validation_loss"}
            losses = "".join(f", {what} {metrics[key]:,.1f}" for what, key in told.items() if key in metrics)
            progress.say(f"training {name}: epoch {done:,} of {epochs:,}{losses}, {left:,.0f} s left")

    return tell
