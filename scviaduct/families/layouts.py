"""How several modalities lie in the AnnData or MuData that a model was set up with, and back to flat cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from scviaduct.errors import InputError, UnsupportedModelError
from scviaduct.families.base import MODALITY
from scviaduct.families.registered import state_of, texts
from scviaduct.families.vae import quiet

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData

    from scviaduct.families.recipe import Recipe
    from scviaduct.references.saved.archive import SavedModel

BACKGROUND = "background_pro_alpha background_pro_log_beta"
"""Parts of modules that model the background of proteins."""
METHODS = ("setup_mudata", "setup_anndata")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a modality's counts lie in the data that a model was set up with.

    Attributes
    ----------
    modality
        Canonical name.
    mod
        Modality of the MuData; empty in an AnnData.
    attribute, key
        ``X``, or ``layers`` or ``obsm`` and the entry there.
    names
        Of the features.
    named
        Whether an entry of ``obsm`` is a table that names its columns.
    """

    modality: str
    mod: str
    attribute: str
    key: str
    names: tuple[str, ...]
    named: bool = False


def places_of(saved: SavedModel, fields: Mapping[str, str]) -> tuple[Place, ...]:
    """Where each modality lies, in the order of the features.

    Parameters
    ----------
    saved
        As it was read.
    fields
        Canonical name of a modality to the field that scvi-tools registers it as; one that was not is left out.

    Raises
    ------
    UnsupportedModelError
        If the model does not say what its features are called.
    """
    registry = saved.attr_dict["registry_"]
    found = []
    for modality, field in fields.items():
        told = registry.get("field_registries", {}).get(field, {}).get("data_registry", {})
        if not told:
            continue
        attribute, mod = str(told.get("attr_name")), str(told.get("mod_key") or "")
        names = state_of(registry, field).get("column_names")
        named = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if attribute != "obsm":
            known = saved.var_names.get(mod) if isinstance(saved.var_names, dict) else None
            names = known if known is not None else (names if mod else saved.var_names)
        if attribute not in ("X", "layers", "obsm") or names is None:
            raise UnsupportedModelError(
                f"The registry has '{field}' in '{attribute}', and names none of its features.",
                "Load and save the model with the scvi-tools that made it.",
            )
        found.append(Place(modality, mod, attribute, str(told.get("attr_key") or ""), texts(names), named))
    return tuple(found)


def separate(cells: AnnData, modality: str) -> Any:
    """Counts of one modality of flat cells, as CSR."""
    return sparse.csr_matrix(cells.X[:, (cells.var[MODALITY] == modality).to_numpy()])


def lay_out(cells: AnnData, places: tuple[Place, ...]) -> Any:
    """Flat cells as the AnnData or MuData that a model was set up with; every part has all obs columns."""
    parts = {place.mod: _part(cells, place) for place in places if place.attribute != "obsm"}
    for place in (place for place in places if place.attribute == "obsm"):
        counts = separate(cells, place.modality).toarray()
        names = list(place.names)
        parts[place.mod].obsm[place.key] = pd.DataFrame(counts, cells.obs_names, names) if place.named else counts
    if "" in parts:
        return parts[""]
    from mudata import MuData

    with quiet():  # a protein may be called like its gene
        data = MuData(parts)
    data.obs = cells.obs.copy()
    return data


def _part(cells: AnnData, place: Place) -> AnnData:
    from anndata import AnnData

    counts = separate(cells, place.modality)
    # scvi-tools indexes proteins by batch in a way that only a dense matrix answers.
    counts = counts.toarray() if place.modality == "protein" else counts
    part = AnnData(counts, obs=cells.obs.copy(), var=pd.DataFrame(index=list(place.names)))
    if place.attribute == "layers":
        part.layers[place.key] = counts.copy()
    return part


def flat_of(saved: SavedModel, data: Any, places: tuple[Place, ...]) -> AnnData | None:
    """The reverse of :func:`lay_out`, with all obs columns in one; None if a modality or its layer is not there."""
    from anndata import AnnData

    counts, var = [], []
    for place in places:
        part = data.mod.get(place.mod) if place.mod else data
        holder = getattr(part, place.attribute, None)
        values = holder if place.attribute == "X" else (holder or {}).get(place.key)
        if values is None:
            return None
        own = part.var if place.attribute != "obsm" else pd.DataFrame(index=getattr(values, "columns", place.names))
        var.append(own.assign(**{MODALITY: place.modality}))
        matrix = sparse.csr_matrix(np.asarray(values) if isinstance(values, pd.DataFrame) else values, dtype=np.float32)
        counts.append(_rows(data, place.mod) @ matrix if place.mod else matrix)
    taken = {place.key for place in places if place.attribute == "obsm"}
    with quiet():  # a protein may be called like its gene
        flat = AnnData(
            sparse.hstack(counts, format="csr"),
            obs=_obs_of(saved, data, places),
            var=pd.concat(var),
            obsm={key: values for key, values in data.obsm.items() if key not in taken and np.ndim(values) > 1},
            uns={key: value for key, value in data.uns.items() if key not in ("_scvi_uuid", "_scvi_manager_uuid")},
        )
    flat.var_names = flat.var_names.astype(str)
    return flat


def _rows(data: Any, mod: str) -> Any:
    """A matrix that puts the cells of a modality where the MuData has them; those it lacks get no counts."""
    position = np.asarray(data.obsmap[mod], np.int64).ravel()
    there = np.flatnonzero(position > 0)
    ones = np.ones(len(there), np.float32)
    return sparse.csr_matrix((ones, (there, position[there] - 1)), shape=(data.n_obs, data.mod[mod].n_obs))


def _obs_of(saved: SavedModel, data: Any, places: tuple[Place, ...]) -> pd.DataFrame:
    """Columns of every part; those that the model was set up with come from where it took them."""
    obs: pd.DataFrame = data.obs.copy()
    setup = saved.attr_dict["registry_"].get("setup_args", {})
    taken = {
        key: mod
        for argument, mod in (setup.get("modalities") or {}).items()
        for key in np.atleast_1d(setup.get(argument) or [])
        if argument.endswith(("_key", "_keys"))
    }
    for mod in dict.fromkeys(place.mod for place in places if place.mod):
        part = data.mod[mod].obs
        for column in part.columns:
            if taken.get(column, mod) == mod and (column in taken or column not in obs):
                obs[column] = part[column].reindex(obs.index)
    return obs


def set_up(model_class: Any, cells: AnnData, recipe: Recipe, modalities: tuple[str, ...], **options: Any) -> Any:
    """Register flat training cells as a MuData, each modality by its canonical name."""
    there = set(cells.var[MODALITY])
    places = tuple(
        Place(modality, modality, "X", "", tuple(cells.var_names[cells.var[MODALITY] == modality]))
        for modality in modalities
        if modality in there
    )
    data = lay_out(cells, places)
    model_class.setup_mudata(
        data,
        batch_key=recipe.batch_key,
        categorical_covariate_keys=list(recipe.categorical_covariates) or None,
        continuous_covariate_keys=list(recipe.continuous_covariates) or None,
        modalities={f"{place.modality}_layer": place.mod for place in places},
        **options,
    )
    return data


def require_modality(cells: AnnData, name: str, *modalities: str) -> None:
    """Refuse flat training cells that have features of none of the modalities.

    Raises
    ------
    InputError
        If they have none.
    """
    there = dict.fromkeys(cells.var[MODALITY])
    if not set(modalities).intersection(there):
        raise InputError(
            f"A {name} needs {' or '.join(modalities)} features, and the cells have {', '.join(there)} alone.",
            "Name a source that has them, or another family, e.g. --family scvi.",
        )
