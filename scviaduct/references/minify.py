"""The training cells without their counts, as scvi-tools keeps them: latent posteriors and what a model registers."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np

from scviaduct.families.vae import quiet
from scviaduct.references.outofcore import MappedCounts

if TYPE_CHECKING:
    from pathlib import Path

    from scviaduct.families import Facts

_KIND = "latent_posterior_parameters"
_CHECKED = 256
_NEAR = 1e-3
_TEMPORARY = ("X_latent_qzm", "X_latent_qzv")
_OWN = ("observed_lib_size", "_indices")


def write_minified(model: Any, facts: Facts, folder: Path, *, with_counts: bool) -> tuple[Path | None, str]:
    """Minify a trained model's data in scvi-tools' own way, and write it.

    Parameters
    ----------
    model
        Trained; it holds the minified data afterwards, so save it before.
    facts
        What it is: obs columns that it does not register are left out.
    folder
        Where ``minified.h5ad`` (of an AnnData) or ``minified.h5mu`` (of a MuData) goes.
    with_counts
        Whether the counts stay.

    Returns
    -------
    tuple
        The file, or None and why scvi-tools cannot minify this model's data.
    """
    several = hasattr(model.adata, "mod")
    name = type(model).__name__
    method = getattr(model, "minify_mudata" if several else "minify_adata", None)
    if method is None or "return_dist" not in inspect.signature(model.get_latent_representation).parameters:
        return None, f"scvi-tools has no minified data for a {name}"
    if not getattr(model.module, "use_observed_lib_size", True):
        return None, "scvi-tools has no minified data for a model that does not use the observed library size"
    with quiet():
        mean, variance = model.get_latent_representation(return_dist=True)
        model.adata.obsm[_TEMPORARY[0]], model.adata.obsm[_TEMPORARY[1]] = mean, variance
        method(minified_data_type=_KIND + ("_with_counts" if with_counts else ""))
        some = np.arange(min(_CHECKED, len(mean)))
        again = model.get_latent_representation(indices=some)
        # Some classes inherit the method and then encode the emptied counts.
        if not _transformed(model) and np.abs(again - mean[some]).max() > _NEAR:
            return None, f"scvi-tools does not read the latents of a {name} from minified data"
        path = folder / ("minified.h5mu" if several else "minified.h5ad")
        _strip(model.adata, facts)
        if not several and isinstance(model.adata.X, MappedCounts):
            model.adata.X = model.adata.X.plain()
        model.adata.write(path)
    return path, ""


def _transformed(model: Any) -> bool:
    """Whether what the model calls its latent is not the posterior's mean (a logistic normal is sampled)."""
    return getattr(model.module, "latent_distribution", "normal") == "ln"


def _strip(data: Any, facts: Facts) -> None:
    """Drop what the model does not register."""
    keys = {
        facts.batch_key,
        facts.sample_key,
        facts.labels_key,
        facts.size_factor_key,
        *facts.categorical_covariates,
        *facts.continuous_covariates,
        *_OWN,
    }
    parts = [data, *(data.mod.values() if hasattr(data, "mod") else ())]
    for part in parts:
        for column in [name for name in part.obs if name not in keys and not str(name).startswith("_scvi_")]:
            del part.obs[column]
        for key in [key for key in part.uns if key in ("_scvi_uuid", "_scvi_manager_uuid")]:
            del part.uns[key]
    for key in _TEMPORARY:
        del data.obsm[key]
