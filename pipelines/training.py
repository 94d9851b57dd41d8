"""Training a reference."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from pipelines.progress import reporter
from scviaduct.references.training import Recipe
from scviaduct.references.training import train as train_reference

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from pipelines.progress import Reporter

_SAY_EVERY = 10.0  # seconds


def train(
    source: str,
    *,
    family: str,
    out: str | Path,
    labels_key: str | None = None,
    unlabeled_category: str = "unknown",
    samples_per_label: int | None = None,
    batch_key: str | None = None,
    layer: str | None = None,
    categorical_covariates: Sequence[str] = (),
    continuous_covariates: Sequence[str] = (),
    size_factor_key: str | None = None,
    genes: int = 2000,
    epochs: int | None = None,
    scanvi_epochs: int | None = None,
    batch_size: int = 128,
    device: str = "auto",
    loader_workers: int = 0,
    seed: int = 0,
    settings: Mapping[str, str] | None = None,
    quiet: bool = False,
) -> Path:
    """Train a reference; what is written is a package that ``reference.add`` registers.

    Parameters
    ----------
    source
        URI of the training cells; they are held in memory.
    family
        ``scvi`` or ``scanvi``. A SCANVI starts from an SCVI trained on the same cells.
    out
        Folder of the package; new or empty.
    labels_key, unlabeled_category, samples_per_label
        obs column of labels; the label that means none; labelled cells per label and epoch (SCANVI).
    batch_key, layer, categorical_covariates, continuous_covariates, size_factor_key
        As scvi-tools' ``setup_anndata`` takes them.
    genes
        Highly variable genes to train on; 0 for all.
    epochs, scanvi_epochs
        Of the SCVI, and of the SCANVI that starts from it; None for what scvi-tools chooses.
    batch_size, device, loader_workers, seed
        Of training.
    settings
        Model arguments, e.g. ``{"n_latent": "20"}``.
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
    recipe = Recipe(
        family=family,
        labels_key=labels_key,
        unlabeled_category=unlabeled_category,
        samples_per_label=samples_per_label,
        batch_key=batch_key,
        layer=layer,
        categorical_covariates=tuple(categorical_covariates),
        continuous_covariates=tuple(continuous_covariates),
        size_factor_key=size_factor_key,
        genes=genes,
        epochs=epochs,
        scanvi_epochs=scanvi_epochs,
        batch_size=batch_size,
        device=device,
        loader_workers=loader_workers,
        seed=seed,
        settings=dict(settings or {}),
    )
    with reporter(quiet=quiet) as progress:
        return train_reference(source, recipe, out, _epochs(progress)).path


def _epochs(progress: Reporter) -> Callable[[str, int, int], None]:
    """Say how far training is, at most every ten seconds, and when each model begins and ends."""
    began = last = time.monotonic()

    def tell(name: str, done: int, epochs: int) -> None:
        nonlocal began, last
        now = time.monotonic()
        if done == 0:
            began = last = now
            progress.say(f"training {name}: {epochs:,} epochs")
        elif done == epochs or now - last >= _SAY_EVERY:
            last = now
            left = (now - began) / done * (epochs - done)
            progress.say(f"training {name}: epoch {done:,} of {epochs:,}, {left:,.0f} s left")

    return tell
