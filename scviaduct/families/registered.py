"""Reading what scvi-tools registered of a model's training data; the registry may be a stranger's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa

from scviaduct.errors import UnsupportedModelError

if TYPE_CHECKING:
    from anndata import AnnData

    from scviaduct.families.base import Facts
    from scviaduct.references.saved.archive import SavedModel


OTHERS_WEIGHTS = "The folder claims one class and holds another's weights; take the model from its publisher again."


def registry_of(saved: SavedModel, name: str, *methods: str) -> dict[str, Any]:
    """The registry of a model that says it is of class ``name`` and was set up by one of ``methods``.

    Raises
    ------
    UnsupportedModelError
        If it is of another class, or was set up otherwise.
    """
    registry = saved.attr_dict.get("registry_")
    if not isinstance(registry, dict) or registry.get("model_name") != name:
        told = registry.get("model_name") if isinstance(registry, dict) else None
        raise UnsupportedModelError(f"The model says it is a {told}, not a {name}.", "Is it the right folder?")
    method = registry.get("setup_method_name", "setup_anndata")
    if method not in (methods or ("setup_anndata",)):
        raise UnsupportedModelError(
            f"The {name} was not set up from an AnnData but by '{method}'.", "Train it from one: scviaduct train."
        )
    return registry


def state_of(registry: dict[str, Any], field: str) -> dict[str, Any]:
    """State of a registered field; empty if there is none."""
    found = registry.get("field_registries", {}).get(field, {}).get("state_registry", {})
    return dict(found)


def text_of(value: Any) -> str:
    """A category as text, spelled as sources spell it (:func:`scviaduct.sources.obs.as_text`): 1.0 is ``1``.

    Whole numbers become real ones in pandas where one is missing, and scvi-tools compares categories by value.
    """
    return str(pa.scalar(value).cast(pa.string())) if isinstance(value, float | np.floating) else str(value)


def texts(values: Any) -> tuple[str, ...]:
    """Categories as text."""
    return tuple(text_of(value) for value in values)


def column_texts(column: pd.Series[Any]) -> pd.Series[str]:
    """An obs column as text, its categories spelled as :func:`text_of` does."""
    codes, values = pd.factorize(column.astype(object), use_na_sentinel=False)
    return pd.Series(np.array(texts(values), object)[codes], index=column.index, name=column.name)


def common_facts(registry: dict[str, Any]) -> dict[str, Any]:
    """Fields of :class:`~scviaduct.families.Facts` that every family registers alike."""
    setup = registry.get("setup_args", {})
    batch, labels = state_of(registry, "batch"), state_of(registry, "labels")
    categorical, continuous = state_of(registry, "extra_categorical_covs"), state_of(registry, "extra_continuous_covs")
    keys = categorical.get("field_keys", ())
    return {
        "scvi_version": str(registry.get("scvi_version", "")),
        "batch_key": setup.get("batch_key") or "",
        "batch_categories": texts(batch.get("categorical_mapping", ())) if setup.get("batch_key") else (),
        "labels_key": setup.get("labels_key") or "",
        "known_labels": texts(labels.get("categorical_mapping", ())) if setup.get("labels_key") else (),
        "unlabeled_category": str(labels.get("unlabeled_category") or ""),
        "categorical_covariates": {key: texts(categorical["mappings"][key]) for key in keys},
        "continuous_covariates": texts(continuous.get("columns", ())),
        "size_factor_key": setup.get("size_factor_key") or "",
        "layer": setup.get("layer") or "",
    }


def require_weights(saved: SavedModel, name: str, parameter: str, n_features: int) -> int:
    """Width of a first layer, which has at least an input a feature.

    Raises
    ------
    UnsupportedModelError
        If the weights have no such layer, or a narrower one.
    """
    first = saved.state_dict.get(parameter)
    if first is None or first.ndim != 2 or first.shape[1] < n_features:
        raise UnsupportedModelError(
            f"The weights are not those of a {name} of {n_features:,} features: '{parameter}' is"
            f" {'missing' if first is None else tuple(first.shape)}.",
            OTHERS_WEIGHTS,
        )
    return int(first.shape[1])


def own_categories(registry: dict[str, Any], cells: AnnData, facts: Facts) -> AnnData:
    """Cells whose categories are of the type that was registered: a package keeps them as text, a model may have 1, 2.

    scvi-tools compares them by value, so that ``"1"`` is unknown to it where ``1`` was registered.
    """
    covariates = state_of(registry, "extra_categorical_covs").get("mappings", {})
    known = {key: covariates[key] for key in facts.categorical_covariates}
    for key, field in ((facts.batch_key, "batch"), (facts.sample_key, "sample"), (facts.labels_key, "labels")):
        if key:
            known[key] = state_of(registry, field)["categorical_mapping"]
    own = cells.copy()
    for key, values in known.items():
        if key in own.obs:
            of_text = {text_of(value): value for value in values}
            own.obs[key] = pd.Categorical([of_text.get(text, text) for text in column_texts(own.obs[key])])
    return own
