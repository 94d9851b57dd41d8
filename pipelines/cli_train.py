"""``scviaduct train``: a reference from labelled or unlabelled cells."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer import Argument, Option

from pipelines.options import SOURCE_HELP, Quiet, listed
from scviaduct.errors import InputError

_DATA, _MODEL, _TRAINING, _RUN, _RAY = "Data", "Model", "Training", "Run", "Ray, and searching hyperparameters"


def train(
    source: Annotated[str | None, Argument(metavar="SOURCE", help=SOURCE_HELP)] = None,
    family: Annotated[
        str | None,
        Option(help="scvi, scanvi, totalvi, multivi, peakvi, poissonvi, mrvi, contrastivevi.", rich_help_panel=_MODEL),
    ] = None,
    out: Annotated[str | None, Option(help="Folder of the package that is made.", rich_help_panel=_RUN)] = None,
    recipe: Annotated[
        str | None,
        Option(
            help="default; scarches: a reference that surgery can move; census: as the Census' own models are trained."
            " Flags win. [default: default]",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    start: Annotated[
        str | None,
        Option(
            "--from", help="Reference to start from, instead of training one first (scanvi).", rich_help_panel=_MODEL
        ),
    ] = None,
    labels_key: Annotated[
        str | None, Option(help="obs column of labels; scanvi needs it.", rich_help_panel=_DATA)
    ] = None,
    unlabeled_category: Annotated[
        str | None, Option(help="Label that means none. [default: unknown]", rich_help_panel=_DATA)
    ] = None,
    samples_per_label: Annotated[
        int | None, Option(help="Labelled cells per label and epoch (scanvi).", rich_help_panel=_TRAINING)
    ] = None,
    batch_key: Annotated[str | None, Option(help="obs column of batches.", rich_help_panel=_DATA)] = None,
    sample_key: Annotated[
        str | None, Option(help="obs column of samples, such as donors (mrvi).", rich_help_panel=_DATA)
    ] = None,
    panel_key: Annotated[
        str | None,
        Option(help="obs column of protein panels (totalvi).", rich_help_panel=_DATA),
    ] = None,
    background: Annotated[
        list[str] | None,
        Option(help="Cells of the background, as COLUMN=VALUE (contrastivevi); repeatable.", rich_help_panel=_DATA),
    ] = None,
    layer: Annotated[
        str | None, Option(help="Where raw counts are: X, raw or a layer's name.", rich_help_panel=_DATA)
    ] = None,
    categorical_covariates: Annotated[
        str | None, Option(help="obs columns, comma-separated.", rich_help_panel=_DATA)
    ] = None,
    continuous_covariates: Annotated[
        str | None, Option(help="obs columns, comma-separated.", rich_help_panel=_DATA)
    ] = None,
    size_factor_key: Annotated[str | None, Option(help="obs column of size factors.", rich_help_panel=_DATA)] = None,
    genes: Annotated[
        int | None, Option(help="Highly variable genes to train on; 0 for all. [default: 2000]", rich_help_panel=_DATA)
    ] = None,
    min_cells_per_peak: Annotated[
        float | None,
        Option(
            help="Share of the cells in which a peak must be open; scvi-tools advises 0.05. [default: 0.01]",
            rich_help_panel=_DATA,
        ),
    ] = None,
    epochs: Annotated[
        int | None, Option(help="Epochs; scvi-tools chooses by the number of cells.", rich_help_panel=_TRAINING)
    ] = None,
    scanvi_epochs: Annotated[
        int | None, Option(help="Epochs of the scANVI that starts from the scVI.", rich_help_panel=_TRAINING)
    ] = None,
    batch_size: Annotated[
        int | None, Option(help="Cells of a mini-batch. [default: 128]", rich_help_panel=_TRAINING)
    ] = None,
    train_size: Annotated[
        float | None, Option(help="Share of the cells to train on. [default: 0.9]", rich_help_panel=_TRAINING)
    ] = None,
    validation_size: Annotated[
        float | None, Option(help="Share to validate on. [default: the rest]", rich_help_panel=_TRAINING)
    ] = None,
    early_stopping: Annotated[
        bool | None,
        Option(
            "--early-stopping/--no-early-stopping",
            help="End when validation no longer improves. [default: as the family does]",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    patience: Annotated[
        int | None, Option(help="Epochs without improvement before the end.", rich_help_panel=_TRAINING)
    ] = None,
    monitor: Annotated[
        str | None, Option(help="Metric that must fall, e.g. elbo_validation.", rich_help_panel=_TRAINING)
    ] = None,
    device: Annotated[str | None, Option(help="auto, cpu or cuda. [default: auto]", rich_help_panel=_RUN)] = None,
    precision: Annotated[
        str | None, Option(help="32-true, 16-mixed or bf16-mixed. [default: 32-true]", rich_help_panel=_TRAINING)
    ] = None,
    loader_workers: Annotated[
        int | None, Option(help="Processes that load mini-batches. [default: 0]", rich_help_panel=_RUN)
    ] = None,
    seed: Annotated[
        int | None, Option(help="Seed of everything random. [default: 0]", rich_help_panel=_TRAINING)
    ] = None,
    calibrate_by: Annotated[
        str | None,
        Option(
            help="obs column of groups held out to measure how sure labels are, or none. [default: the batch key]",
            rich_help_panel=_RUN,
        ),
    ] = None,
    with_counts: Annotated[
        bool | None, Option("--with-counts", help="Keep counts in the minified data.", rich_help_panel=_RUN)
    ] = None,
    settings: Annotated[
        list[str] | None, Option("--set", help="Model argument, e.g. n_latent=20; repeatable.", rich_help_panel=_MODEL)
    ] = None,
    plan: Annotated[
        list[str] | None,
        Option(help="Argument of the training plan, e.g. lr=0.0005; repeatable.", rich_help_panel=_TRAINING),
    ] = None,
    checkpoint_minutes: Annotated[
        float | None,
        Option(help="Minutes between checkpoints; 0 for one an epoch. [default: 10]", rich_help_panel=_RUN),
    ] = None,
    tensorboard: Annotated[str | None, Option(help="Folder for TensorBoard.", rich_help_panel=_RUN)] = None,
    out_of_core: Annotated[
        str | None,
        Option(
            help="yes leaves the counts on disk, no holds them in memory, auto estimates them. [default: auto]",
            rich_help_panel=_RUN,
        ),
    ] = None,
    engine: Annotated[
        str | None,
        Option(help="inline: in this process; ray. [default: ray with an address, else inline]", rich_help_panel=_RAY),
    ] = None,
    address: Annotated[str | None, Option(help="Ray cluster: local, auto or HOST:PORT.", rich_help_panel=_RAY)] = None,
    cpus: Annotated[int | None, Option(help="CPUs of each process that trains.", rich_help_panel=_RAY)] = None,
    gpus: Annotated[
        int | None,
        Option(help="Processes that train together through Ray Train, a GPU each.", rich_help_panel=_RAY),
    ] = None,
    tune: Annotated[
        int | None, Option(help="Trials of a search for hyperparameters (scvi, scanvi).", rich_help_panel=_RAY)
    ] = None,
    tune_metric: Annotated[
        str | None,
        Option(help="loss, or scib where labels and batches are named. [default: loss]", rich_help_panel=_RAY),
    ] = None,
    tune_epochs: Annotated[int | None, Option(help="Epochs of a trial at most.", rich_help_panel=_RAY)] = None,
    search: Annotated[
        list[str] | None,
        Option(help="What is searched, e.g. n_latent=10,20 or 'lr=1e-4..1e-2 log'; repeatable.", rich_help_panel=_RAY),
    ] = None,
    restart: Annotated[
        bool, Option("--restart", help="Start over what a killed run left.", rich_help_panel=_RUN)
    ] = False,
    job: Annotated[
        str | None, Option(help="TOML file with any of these but switches; flags win.", rich_help_panel=_RUN)
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Train a reference on labelled or unlabelled cells. What it writes is a package: `reference add` registers it.

    The same command goes on with a run that was killed.
    """
    from pipelines.jobs import TrainJob

    flags: dict[str, Any] = {
        "source": source,
        "family": family,
        "out": out,
        "recipe": recipe,
        "from": start,
        "labels_key": labels_key,
        "unlabeled_category": unlabeled_category,
        "samples_per_label": samples_per_label,
        "batch_key": batch_key,
        "sample_key": sample_key,
        "panel_key": panel_key,
        "background": background or None,
        "layer": layer,
        "categorical_covariates": listed(categorical_covariates) or None,
        "continuous_covariates": listed(continuous_covariates) or None,
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
        "settings": _pairs("--set", settings, "n_latent=20"),
        "plan": _pairs("--plan", plan, "lr=0.0005"),
        "checkpoint_minutes": checkpoint_minutes,
        "tensorboard": tensorboard,
        "out_of_core": out_of_core,
        "engine": engine,
        "address": address,
        "cpus": cpus,
        "gpus": gpus,
        "tune": tune,
        "tune_metric": tune_metric,
        "tune_epochs": tune_epochs,
        "search": search or None,
    }
    told = TrainJob.of(job, flags)  # a wrong flag is answered before the seconds that loading torch takes
    from pipelines.training import train as run

    made = run(**told.model_dump(), restart=restart, quiet=quiet)
    typer.echo(f"Trained {made}. Register it: scviaduct reference add {made} --name NAME")


def _pairs(option: str, texts: list[str] | None, example: str) -> dict[str, str] | None:
    """``NAME=VALUE`` as a dictionary; None if there is none, so that a job file's holds."""
    pairs = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InputError(f"{option} {text}: there is no '='.", f"Write NAME=VALUE, e.g. {option} {example}.")
        pairs[key] = value
    return pairs or None
