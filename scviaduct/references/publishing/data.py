"""The data that is published beside a model: its minified cells without what is private, or a template.

scvi-tools loads most classes with cells only. A package that kept its minified cells gives those, stripped to what the
model registers; any other gives the template, 16 synthetic cells.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import anndata
import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from scviaduct.errors import InputError
from scviaduct.families import family
from scviaduct.families.registered import own_categories
from scviaduct.families.vae import instantiate, quiet
from scviaduct.references.exporting import SAVED
from scviaduct.references.package import MINIFIED, TEMPLATE
from scviaduct.references.publishing.carried import NAMES_LEFT
from scviaduct.references.saved.portable import read_model, to_scvi_file
from scviaduct.references.template import CELLS, SYNTHETIC

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from scviaduct.references.package import Reference
    from scviaduct.references.saved.archive import SavedModel

ADATA, MDATA = "adata.h5ad", "mdata.h5mu"
_KIND = "_scvi_adata_minify_type"
_LATENT_ONLY, _WITH_COUNTS = "latent_posterior_parameters", "latent_posterior_parameters_with_counts"
_FIELDS = ("latent_qzm", "latent_qzv", "observed_lib_size", "minify_type")
"""What scvi-tools registers of minified data; its ``load`` refuses such data with a model that did not."""
_TOTAL = "observed_lib_size"
_OWN = "_scvi_"
"""Columns that scvi-tools makes anew when it loads a model."""

Kind = Literal["template", "minified", "minified with counts"]


@dataclass(frozen=True, slots=True)
class Data:
    """The data file of a repository.

    Attributes
    ----------
    file
        ``adata.h5ad`` or ``mdata.h5mu``.
    kind
        What its cells are.
    cells
        How many.
    columns
        obs columns that it has.
    refused
        What was left out, as sentences.
    """

    file: str
    kind: Kind
    cells: int
    columns: tuple[str, ...]
    refused: tuple[str, ...] = ()


def minified_file(reference: Reference) -> str | None:
    """Name of the package's minified cells, if it kept them."""
    return next((name for name in MINIFIED if name in reference.files), None)


def read_minified(reference: Reference) -> Any:
    """The package's minified cells, an AnnData or a MuData; None if it kept none.

    Raises
    ------
    PackageError
        If the file was changed.
    """
    name = minified_file(reference)
    if name is None:
        return None
    reference.require(name)
    if name.endswith(".h5mu"):
        import mudata

        with quiet():
            return mudata.read_h5mu(reference.path / name)
    return anndata.read_h5ad(reference.path / name)


def parts_of(data: Any) -> list[AnnData]:
    """The AnnData that data consists of."""
    return list(data.mod.values()) if hasattr(data, "mod") else [data]


def has_counts(data: Any) -> bool:
    """Whether minified cells kept their counts."""
    return data is not None and str(data.uns.get(_KIND, "")) == _WITH_COUNTS


def write_data(
    reference: Reference, data: Any, folder: Path, needed: Iterable[str], *, with_counts: bool, with_ids: bool
) -> Data:
    """Write ``model.pt`` and the data that loads it.

    Parameters
    ----------
    reference
        The package.
    data
        What :func:`read_minified` gave.
    folder
        Where to.
    needed
        obs columns to keep: those that the model registers, and those that were allowed.
    with_counts
        Whether counts may be published.
    with_ids
        Whether cells keep their names.

    Raises
    ------
    InputError
        If counts are wanted and there are none.
    """
    if with_counts and not has_counts(data):
        told = f"--with-counts: package '{reference.name}' has no counts"
        raise InputError(f"{told}.", "Leave it out, or train with --with-counts, which keeps them in the package.")
    if data is None:
        return _write_template(reference, folder)
    saved, found = read_model(reference.path), family(reference.family)
    registry = saved.attr_dict["registry_"]
    kept = {*needed, _TOTAL}
    own = _published(data, registry, kept, with_counts=with_counts, with_ids=with_ids)
    _identify(own, reference)
    file = MDATA if hasattr(own, "mod") else ADATA
    own.write(folder / file)
    saved = _reading_minified(saved)
    model = instantiate(found.model_class(), saved, own.copy())
    to_scvi_file(_registered(saved, model), folder / SAVED)
    counts = has_counts(own)
    columns = tuple(dict.fromkeys(str(name) for part in (own, *parts_of(own)) for name in part.obs))
    refused = _refused(data, columns, with_counts=with_counts, with_ids=with_ids)
    return Data(file, "minified with counts" if counts else "minified", own.n_obs, columns, refused)


def _write_template(reference: Reference, folder: Path) -> Data:
    saved, template = read_model(reference.path), anndata.read_h5ad(reference.path / TEMPLATE)
    cells = own_categories(saved.attr_dict["registry_"], template, reference)
    own = family(reference.family).layout(saved, cells)
    own.uns[SYNTHETIC] = True
    _identify(own, reference)
    file = MDATA if hasattr(own, "mod") else ADATA
    own.write(folder / file)
    to_scvi_file(saved, folder / SAVED)
    columns = dict.fromkeys(str(name) for part in parts_of(own) for name in part.obs)
    return Data(file, "template", CELLS, tuple(columns))


def _identify(data: Any, reference: Reference) -> None:
    """Give features their other identifiers: a query may have those."""
    others = {name: values for name, values in reference.genes.columns.items() if name != "index"}
    for part in parts_of(data):
        names = tuple(part.var_names.astype(str))
        span = next((s for m in reference.genes.modalities if reference.names[s := reference.span(m)] == names), None)
        if span is not None:
            for name, values in others.items():
                part.var[name] = list(values[span])


def _refused(data: Any, columns: Sequence[str], *, with_counts: bool, with_ids: bool) -> tuple[str, ...]:
    there = dict.fromkeys(str(name) for part in (data, *parts_of(data)) for name in part.obs)
    told = [] if with_ids else [NAMES_LEFT]
    if has_counts(data) and not with_counts:
        told.append("counts of the cells (--with-counts publishes them)")
    left = [name for name in there if name not in columns and not name.startswith(_OWN) and name != "_indices"]
    return (*told, *(f"obs column '{name}' (--allow-column {name} publishes it)" for name in left))


def _reading_minified(saved: SavedModel) -> SavedModel:
    """A model whose setup reads minified data: a SCANVI that started from an SCVI was told not to."""
    registry = saved.attr_dict["registry_"]
    setup = registry["setup_args"]
    if setup.get("use_minified", True):
        return saved
    changed = {**registry, "setup_args": {**setup, "use_minified": True}}
    return replace(saved, attr_dict={**saved.attr_dict, "registry_": changed})


def _registered(saved: SavedModel, model: Any) -> SavedModel:
    """A model as if it had been saved after its data was minified."""
    registry = saved.attr_dict["registry_"]
    own = model.adata_manager.registry["field_registries"]
    added = {name: {part: dict(values) for part, values in own[name].items()} for name in _FIELDS if name in own}
    fields = {**registry["field_registries"], **added}
    return replace(saved, attr_dict={**saved.attr_dict, "registry_": {**registry, "field_registries": fields}})


def _published(data: Any, registry: Any, kept: set[str], *, with_counts: bool, with_ids: bool) -> Any:
    """Minified cells with what is named alone: whatever else a file holds is left behind."""
    names = pd.Index(data.obs_names.astype(str))
    labels = names if with_ids else pd.Index([str(i) for i in range(len(names))])
    several = hasattr(data, "mod")
    if several:
        from mudata import MuData

        parts = {
            name: _part(part, registry, kept, labels[names.get_indexer(part.obs_names.astype(str))], name, with_counts)
            for name, part in data.mod.items()
        }
        with quiet():  # a protein may be called like its gene
            own = MuData(parts)
        order = labels.get_indexer(own.obs_names)
        own.obs = _columns(data.obs, kept).iloc[order].set_axis(own.obs_names, axis=0)
    else:
        own, order = _part(data, registry, kept, labels, None, with_counts), np.arange(len(names))
    for key in (key for key in data.obsm if _is_posterior(str(key))):
        own.obsm[key] = np.asarray(data.obsm[key])[order]
    own.uns[_KIND] = _WITH_COUNTS if with_counts else _LATENT_ONLY
    return own


def _is_posterior(key: str) -> bool:
    """Whether an element of obsm is what a class keeps of its latent; ``X_`` names what users put there."""
    return key.endswith(("_latent_qzm", "_latent_qzv")) and not key.startswith("X_")


def _part(data: AnnData, registry: Any, kept: set[str], names: pd.Index, mod: str | None, with_counts: bool) -> AnnData:  # noqa: FBT001
    empty = sparse.csr_matrix(data.shape, dtype=np.float32)
    obs = _columns(data.obs, kept).set_axis(names, axis=0)
    own = AnnData(data.X if with_counts else empty, obs=obs, var=data.var.copy())
    for key in _layers(registry, mod):
        if key in data.layers:
            own.layers[key] = data.layers[key] if with_counts else empty.copy()
    return own


def _layers(registry: Any, mod: str | None) -> list[str]:
    """Layers of a part that the model registered."""
    told = [one.get("data_registry", {}) for one in registry.get("field_registries", {}).values()]
    return [str(one["attr_key"]) for one in told if one.get("attr_name") == "layers" and one.get("mod_key") == mod]


def _columns(obs: pd.DataFrame, kept: set[str]) -> pd.DataFrame:
    """Some columns; categories that no cell has go, too."""
    own = obs[[name for name in obs if name in kept]].copy()
    for name in own:
        if isinstance(own[name].dtype, pd.CategoricalDtype):
            own[name] = own[name].cat.remove_unused_categories()
    return own
