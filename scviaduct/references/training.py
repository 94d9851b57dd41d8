"""Training a reference with scvi-tools, and packaging it at once.

Training holds the selected cells in memory, as sparse counts; everything before it is checked first.
"""

from __future__ import annotations

import ast
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from scviaduct.errors import InputError
from scviaduct.families import family as family_of
from scviaduct.families.vae import quiet
from scviaduct.references.building import build_package
from scviaduct.references.cells import read_cells, select_genes
from scviaduct.references.manifest import is_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData

    from scviaduct.references.package import Reference

_DEVICES = ("auto", "cpu", "cuda")
OnEpoch = Callable[[str, int, int], None]


def _unheard(name: str, done: int, epochs: int) -> None:
    """Tells nobody."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a reference is trained; the names are those of scvi-tools and of ``scviaduct train``.

    Attributes
    ----------
    family
        ``scvi`` or ``scanvi``.
    labels_key, unlabeled_category, samples_per_label
        obs column of labels, the label that means none, and the labelled cells per label and epoch (SCANVI).
    batch_key, layer, categorical_covariates, continuous_covariates, size_factor_key
        As ``setup_anndata`` takes them.
    genes
        Highly variable genes to train on; 0 for all.
    epochs, scanvi_epochs
        Of the SCVI, and of the SCANVI that starts from it; None for what scvi-tools chooses by the number of cells.
    batch_size, device, loader_workers, seed
        Of training.
    settings
        Model arguments, as text.
    """

    family: str
    labels_key: str | None = None
    unlabeled_category: str = "unknown"
    samples_per_label: int | None = None
    batch_key: str | None = None
    layer: str | None = None
    categorical_covariates: tuple[str, ...] = ()
    continuous_covariates: tuple[str, ...] = ()
    size_factor_key: str | None = None
    genes: int = 2000
    epochs: int | None = None
    scanvi_epochs: int | None = None
    batch_size: int = 128
    device: str = "auto"
    loader_workers: int = 0
    seed: int = 0
    settings: Mapping[str, str] = field(default_factory=dict)


def train(source: str, recipe: Recipe, out: str | Path, on_epoch: OnEpoch = _unheard) -> Reference:
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
        Called with the class, the number of epochs done and that of all, before the first epoch and after each.

    Returns
    -------
    Reference
        The package, not yet registered.

    Raises
    ------
    InputError
        If anything is wrong with the recipe or the cells; before any training.
    """
    folder = Path(out)
    if not is_name(folder.name):
        raise InputError(f"'{folder}' ends in no name for a package.", "Name a folder without a dot: --out lung-v1.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"'{folder}' is there and not empty.", "Name a new folder: --out DIR.")
    found = family_of(recipe.family)
    if found.name == "SCANVI" and not recipe.labels_key:
        raise InputError("A SCANVI needs labels, and no labels column is named.", "--labels-key cell_type.")
    _check_options(recipe, found.name)
    arguments = _arguments(recipe.settings, found.arguments())
    cells, pinned, source_version = read_cells(source, recipe)
    cells = select_genes(cells, recipe)
    model = _fit(cells, recipe, arguments, on_epoch, classifier=found.name == "SCANVI")
    provenance = {
        "source": pinned,
        "source_version": source_version,
        "cells": cells.n_obs,
        "recipe": {name: getattr(recipe, name) for name in recipe.__slots__} | {"settings": dict(recipe.settings)},
        "software": {name: version(name) for name in ("scvi-tools", "torch", "anndata", "numpy")},
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        saved, package = Path(temporary, "saved"), Path(temporary, "package")
        model.save(str(saved), save_anndata=False)
        if recipe.labels_key and found.name == "SCVI":  # it knows no unlabelled category, so those cells get no label
            known = cells.obs[recipe.labels_key]
            cells.obs[recipe.labels_key] = known.where(known != recipe.unlabeled_category)
        made = build_package(saved, package, folder.name, cells, provenance)
        if folder.exists():
            folder.rmdir()
        shutil.move(made.path, folder)
    return type(made).load(folder)


_KINDS: dict[type, tuple[str, tuple[type, ...]]] = {
    bool: ("True or False", (bool,)),
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
    str: ("a name", (str,)),
}
"""Type of an argument's default to what it asks for, and the types that will do."""


_LEAST = {"genes": 0, "epochs": 1, "scanvi_epochs": 1, "samples_per_label": 1, "batch_size": 2, "loader_workers": 0}


def _check_options(recipe: Recipe, family: str) -> None:
    """Refuse options that training would fail on, or pass over, after the cells were read."""
    for name, least in _LEAST.items():
        value = getattr(recipe, name)
        if value is not None and value < least:
            raise InputError(f"{_flag(name)} {value} is too few.", f"At least {least}.")
    if recipe.device not in _DEVICES:
        raise InputError(f"'{recipe.device}' is not a device to train on.", f"One of {', '.join(_DEVICES)}.")
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no GPU here.", "--device cpu, or auto for a GPU if there is one.")
    for name in ("samples_per_label", "scanvi_epochs"):
        value = getattr(recipe, name)
        if family != "SCANVI" and value is not None:
            raise InputError(f"{_flag(name)} {value} is for a SCANVI, not for a {family}.", "Leave it out.")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _arguments(told: Mapping[str, str], known: Mapping[str, Any]) -> dict[str, Any]:
    """Model arguments from text, checked against those that the model takes."""
    values: dict[str, Any] = {}
    for name, text in told.items():
        if name not in known:
            close = get_close_matches(name, known, n=3) or sorted(known)
            raise InputError(f"--set {name}={text}: the model takes no '{name}'.", f"It takes: {', '.join(close)}.")
        try:
            values[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[name] = text
        default = known[name]
        wanted = next((kind for kind in _KINDS if type(default) is kind), None)
        if wanted is not None and type(values[name]) not in _KINDS[wanted][1]:
            raise InputError(
                f"--set {name}={text}: '{text}' is not {_KINDS[wanted][0]}.", f"E.g. --set {name}={default}."
            )
        if type(default) is int and default > 0 and values[name] < 1:  # a number of layers or of their nodes
            raise InputError(f"--set {name}={text} is too few.", f"At least 1, e.g. --set {name}={default}.")
    return values


def _fit(cells: AnnData, recipe: Recipe, arguments: Mapping[str, Any], on_epoch: OnEpoch, *, classifier: bool) -> Any:
    """Train an SCVI, and a SCANVI from it."""
    import scvi

    setup = {
        "batch_key": recipe.batch_key,
        "categorical_covariate_keys": list(recipe.categorical_covariates) or None,
        "continuous_covariate_keys": list(recipe.continuous_covariates) or None,
        "size_factor_key": recipe.size_factor_key,
    }
    training: dict[str, Any] = {
        "batch_size": recipe.batch_size,
        "accelerator": {"cuda": "gpu"}.get(recipe.device, recipe.device),
        "devices": 1,
        "enable_progress_bar": False,
        "logger": False,
    }
    before = scvi.settings.dl_num_workers
    with quiet():
        scvi.settings.seed = recipe.seed
        scvi.settings.dl_num_workers = recipe.loader_workers
        try:
            scvi.model.SCVI.setup_anndata(cells, labels_key=recipe.labels_key, **setup)
            try:
                model = scvi.model.SCVI(cells, **arguments)
            except (ValueError, TypeError, AssertionError, RuntimeError, ArithmeticError, LookupError) as error:
                told = ", ".join(f"--set {name}={value}" for name, value in arguments.items())
                raise InputError(
                    f"scvi-tools refuses {told}: {error}.", "See the arguments of scvi.model.SCVI."
                ) from error
            model.train(max_epochs=recipe.epochs, callbacks=[_listener("SCVI", on_epoch)], **training)
            if classifier:
                model = scvi.model.SCANVI.from_scvi_model(model, unlabeled_category=recipe.unlabeled_category)
                training["n_samples_per_label"] = recipe.samples_per_label
                model.train(max_epochs=recipe.scanvi_epochs, callbacks=[_listener("SCANVI", on_epoch)], **training)
        finally:
            scvi.settings.dl_num_workers = before
    return model


def _listener(name: str, on_epoch: OnEpoch) -> Any:
    """A Lightning callback that tells of every epoch."""
    from lightning.pytorch.callbacks import LambdaCallback

    return LambdaCallback(
        on_train_start=lambda trainer, _: on_epoch(name, 0, trainer.max_epochs),
        on_train_epoch_end=lambda trainer, _: on_epoch(name, trainer.current_epoch + 1, trainer.max_epochs),
    )
