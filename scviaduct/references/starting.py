"""Training that starts from a reference that is there already, instead of training its first model again."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from scviaduct.errors import InputError
from scviaduct.families import Recipe
from scviaduct.families import family as family_of
from scviaduct.families.registered import column_texts
from scviaduct.families.vae import quiet
from scviaduct.references.building import build_package
from scviaduct.references.features import Features
from scviaduct.references.manifest import MANIFEST
from scviaduct.references.options import flag
from scviaduct.references.registry import Registry
from scviaduct.references.saved.portable import read_model

if TYPE_CHECKING:
    from anndata import AnnData

    from scviaduct.families import Family
    from scviaduct.references.package import Reference
    from scviaduct.references.saved.archive import SavedModel


class Start:
    """A trained reference that another model starts from.

    Parameters
    ----------
    name
        Registered name, or path of a package or of a folder that scvi-tools saved.
    found
        Family of the model that is to be trained.

    Raises
    ------
    InputError
        If it is of another family than training starts from.
    PackageError
        If there is no such reference.
    """

    def __init__(self, name: str, found: Family) -> None:
        folder = Path(name)
        if folder.is_dir() and not (folder / MANIFEST).exists():
            with tempfile.TemporaryDirectory() as temporary:
                self._take(build_package(folder, Path(temporary, "start"), "start"))
        else:
            self._take(Registry().get(name))
        if self.reference.family != found.starts_from:
            told = f"--from {name} is a {self.reference.family}, and a {found.name} starts from a {found.starts_from}"
            raise InputError(f"{told}.", f"Name a {found.starts_from}, or leave --from out: one is trained first.")
        self.name = name

    def _take(self, reference: Reference) -> None:
        self.reference = reference
        self._saved: SavedModel = read_model(reference.path)

    @property
    def features(self) -> Features:
        """What it was trained on, and what is to be trained on."""
        genes = self.reference.genes
        others = {column: values for column, values in genes.columns.items() if column != "index"}
        return Features(genes.columns["index"], genes.modality, others)

    def recipe(self, recipe: Recipe) -> Recipe:
        """The recipe with the columns that the reference was set up with.

        Raises
        ------
        InputError
            If it says otherwise, or names model arguments, which are the reference's.
        """
        if recipe.settings or recipe.epochs is not None:
            what = f"--set {next(iter(recipe.settings))}" if recipe.settings else f"--epochs {recipe.epochs}"
            told = f"{what} is for the {self.reference.family}, which --from {self.name} gives"
            raise InputError(f"{told}.", "Leave it out; --scanvi-epochs is for the model that starts from it.")
        facts = self.reference
        own: dict[str, Any] = {
            "batch_key": facts.batch_key or None,
            "size_factor_key": facts.size_factor_key or None,
            "categorical_covariates": tuple(facts.categorical_covariates),
            "continuous_covariates": tuple(facts.continuous_covariates),
        }
        for name, value in own.items():
            said = getattr(recipe, name)
            if said and said != value:
                told = f"{flag(name)} {said}: --from {self.name} was set up with {value or 'none'}"
                raise InputError(f"{told}.", "Leave the option out: the reference's own is taken.")
        return replace(recipe, **own)

    def model(self, cells: AnnData, recipe: Recipe) -> Any:
        """The trained model, with the cells that training goes on with as its data.

        Raises
        ------
        InputError
            If the cells have other batches or covariate values than the reference.
        """
        facts, base = self.reference, family_of(self.reference.family)
        known = {facts.batch_key: facts.batch_categories} if facts.batch_key else {}
        for key, values in {**known, **facts.categorical_covariates}.items():
            there = set(column_texts(cells.obs[key]))
            if there != set(values):
                odd = sorted(there.symmetric_difference(values))
                told = f"'{key}' of the cells and of --from {self.name} differ in {', '.join(odd[:5])}"
                raise InputError(f"{told}.", "Train on the cells of that reference, or without --from.")
            cells.obs[key] = pd.Categorical(column_texts(cells.obs[key]), categories=list(values))
        told_of = self._saved.attr_dict["init_params_"]
        arguments = dict(told_of["non_kwargs"]) | {k: v for part in told_of["kwargs"].values() for k, v in part.items()}
        for name in ("adata", "registry", "datamodule"):
            arguments.pop(name, None)
        with quiet():
            data = base.setup(cells, recipe)
            model = base.create(data, arguments, recipe)
            try:
                model.module.load_state_dict(self._saved.state_dict)
            except RuntimeError as error:
                told = f"--from {self.name} does not fit these cells: {next(iter(str(error).splitlines()))}"
                raise InputError(f"{told}", "Train without --from.") from error
        model.module.eval()
        model.is_trained_ = True
        return model
