"""Models that scvi-tools saved before 0.15: three files, and a setup dictionary where the registry is today."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from scviaduct.errors import PackageError, UnsafeModelError, UnsupportedModelError
from scviaduct.references.saved.archive import SavedModel, read_archive, read_pickle

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

PARAMETERS, PICKLED, NAMES = "model_params.pt", "attr.pkl", "var_names.csv"
_MAX_NAMES = 256 << 20
_CONVERT = (
    "Convert it in an environment of its own, with scvi-tools 0.15 or later and torch >= 1.6, by its class's"
    " convert_legacy_save; that runs what the file holds, so do it where nothing can be lost."
)
_FIELDS = {
    "X": "X",
    "batch_indices": "batch",
    "labels": "labels",
    "cat_covs": "extra_categorical_covs",
    "cont_covs": "extra_continuous_covs",
    "protein_expression": "proteins",
    "ind_x": "ind_x",
}
"""Keys of the old data registry. ``local_l_mean`` and ``local_l_var`` are left out: the prior of the library size is a
buffer of the model where it is used."""
_LABELLED = ("SCVI", "SCANVI", "PEAKVI")
_DEFAULT = {"batch": "_scvi_batch", "labels": "_scvi_labels"}
"""Columns that scvi-tools made where none was named."""


def legacy_prefix(folder: Path) -> str | None:
    """What precedes the names of the three files, mostly nothing; None if they are not there.

    Raises
    ------
    PackageError
        If the folder holds several models, or one that is not whole.
    """
    names = [path.name for path in folder.glob(f"*{PARAMETERS}") if path.name[0] != "."]  # a Mac leaves ._NAME
    found = sorted(name.removesuffix(PARAMETERS) for name in names)
    if len(found) > 1:
        raise PackageError(
            f"'{folder}' holds several models: {', '.join(f'{prefix}{PARAMETERS}' for prefix in found[:5])}.",
            "Give each a folder of its own.",
        )
    missing = [name for prefix in found for name in (PICKLED, NAMES) if not (folder / f"{prefix}{name}").is_file()]
    if missing:
        raise PackageError(f"'{folder}' holds {found[0]}{PARAMETERS} and no {found[0]}{missing[0]}.", "Add the file.")
    return found[0] if found else None


def read_legacy(folder: Path) -> SavedModel:
    """Read a model of before scvi-tools 0.15, without running anything in it; its registry is still a setup dictionary.

    Raises
    ------
    PackageError
        If a file is missing, or the names are no text.
    UnsafeModelError
        If the weights are a bare pickle or a tar (torch before 1.6), or a pickle names what is not on the table.
    """
    prefix = legacy_prefix(folder)
    if prefix is None:
        raise PackageError(f"'{folder}' holds no {PARAMETERS}.", "Name a folder that model.save() made.")
    path = folder / f"{prefix}{PARAMETERS}"
    try:
        state, attributes = read_archive(path), read_pickle(folder / f"{prefix}{PICKLED}")
    except UnsafeModelError as error:
        raise UnsafeModelError(error.problem, _CONVERT) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UnsafeModelError(f"'{path}' was refused: it does not hold weights alone.", _CONVERT)
    if not isinstance(attributes, dict):
        raise UnsafeModelError(f"'{folder / PICKLED}' was refused: it does not hold attributes.", _CONVERT)
    tensors = {str(name): value for name, value in state.items()}
    return SavedModel(tensors, _read_names(folder / f"{prefix}{NAMES}"), attributes)


def _read_names(path: Path) -> np.ndarray[Any, Any]:
    """Genes, one a line, as ``numpy.savetxt`` wrote them: no quotes, and nothing else means anything."""
    if path.stat().st_size > _MAX_NAMES:
        raise PackageError(f"{path} has {path.stat().st_size:,} bytes, more than {_MAX_NAMES:,}.", _CONVERT)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PackageError(f"{path} cannot be read ({error}).", _CONVERT) from error
    return np.array(text.removesuffix("\n").split("\n"), object)


def registry_from_setup(setup: Mapping[str, Any], name: str, unlabeled: Any = None) -> dict[str, Any]:
    """The registry that today's scvi-tools would have made of the same setup.

    Parameters
    ----------
    setup
        ``scvi_setup_dict_`` of scvi-tools 0.7 to 0.14.
    name
        Class of the model.
    unlabeled
        Label that means none; for SCANVI alone.

    Raises
    ------
    UnsupportedModelError
        If the setup has something that has no place in a registry.
    """
    told = setup["data_registry"]
    fields: dict[str, Any] = {}
    arguments: dict[str, Any] = {"layer": None, "batch_key": None}
    for old, place in told.items():
        key = _FIELDS.get(old)
        if key is None or (key == "labels" and name not in _LABELLED):
            continue
        attribute, column = place["attr_name"], place["attr_key"]
        state, summary, made = _FIELD[key](setup, attribute, column)
        arguments |= made
        data = {"attr_name": attribute, "attr_key": f"_scvi_{key}" if str(column).startswith("_scvi") else column}
        fields[key] = {"data_registry": data, "state_registry": state, "summary_stats": summary}
    if name == "SCANVI":
        _add_unlabeled(fields, unlabeled)
        arguments["unlabeled_category"] = unlabeled
    return {
        "scvi_version": setup["scvi_version"],
        "model_name": name,
        "setup_args": arguments,
        "field_registries": fields,
        "setup_method_name": "setup_anndata",
    }


_Field = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]


def _counts(setup: Mapping[str, Any], attribute: Any, column: Any) -> _Field:
    if attribute not in ("X", "layers"):
        raise UnsupportedModelError(
            f"The model was set up on '{attribute}' of its data, which scvi-tools no longer reads.", _CONVERT
        )
    size = {"n_vars": int(setup["summary_stats"]["n_vars"])}
    return dict(size), dict(size), {"layer": column if attribute == "layers" else None}


def _category(key: str, setup: Mapping[str, Any], column: Any) -> _Field:
    told = setup["categorical_mappings"][column]
    original = told["original_key"]
    state = {"categorical_mapping": np.asarray(told["mapping"]), "original_key": original}
    named = None if original == _DEFAULT[key] else original
    return state, {f"n_{key}": len(state["categorical_mapping"])}, {f"{key}_key": named}


def _categories(setup: Mapping[str, Any], _attribute: Any, _column: Any) -> _Field:
    told = setup["extra_categoricals"]
    keys = list(told["keys"])
    mappings = {key: np.asarray(told["mappings"][key]) for key in keys}
    counts = [len(mappings[key]) for key in keys]
    state = {"mappings": mappings, "field_keys": keys, "n_cats_per_key": counts}
    return state, {"n_extra_categorical_covs": len(keys)}, {"categorical_covariate_keys": keys}


def _numbers(setup: Mapping[str, Any], _attribute: Any, _column: Any) -> _Field:
    columns = np.asarray(setup["extra_continuous_keys"], object)
    made = {"continuous_covariate_keys": columns.tolist()}
    return {"columns": columns}, {"n_extra_continuous_covs": len(columns)}, made


def _proteins(setup: Mapping[str, Any], _attribute: Any, column: Any) -> _Field:
    names = [str(name) for name in setup["protein_names"]]  # a list: scvi-tools compares it with one
    state: dict[str, Any] = {"column_names": names}
    if setup.get("totalvi_batch_mask"):
        state["protein_batch_mask"] = dict(setup["totalvi_batch_mask"])
    made = {"protein_expression_obsm_key": column, "protein_names_uns_key": None}
    return state, {"n_proteins": len(names)}, made


_FIELD: Mapping[str, Any] = {
    "X": _counts,
    "batch": lambda setup, _, column: _category("batch", setup, column),
    "labels": lambda setup, _, column: _category("labels", setup, column),
    "extra_categorical_covs": _categories,
    "extra_continuous_covs": _numbers,
    "proteins": _proteins,
    "ind_x": lambda *_: ({}, {}, {}),
}


def _add_unlabeled(fields: dict[str, Any], unlabeled: Any) -> None:
    """Put the unlabelled category last among the labels, where scvi-tools reads it; the old one had moved it there."""
    state = fields["labels"]["state_registry"]
    known = list(state["categorical_mapping"])
    if unlabeled in known[:-1]:
        raise UnsupportedModelError(
            f"The unlabelled category '{unlabeled}' is not the last label, so that the classifier's are unknown.",
            _CONVERT,
        )
    if unlabeled not in known:
        state["categorical_mapping"] = np.array([*known, unlabeled], object)
    state["unlabeled_category"] = unlabeled
    fields["labels"]["summary_stats"] = {"n_labels": len(state["categorical_mapping"])}
