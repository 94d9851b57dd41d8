"""Building a package from what scvi-tools or scvi-hub leave in a folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from scviaduct.errors import PackageError, UnsupportedModelError
from scviaduct.families import family
from scviaduct.references.archive import read_model_file
from scviaduct.references.manifest import FORMAT, MANIFEST, file_digest, manifest_digest, read_manifest
from scviaduct.references.package import ENCODER, LATENTS, MODEL, TEMPLATE, Reference
from scviaduct.references.template import encode_rows, encode_template, make_template

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from anndata import AnnData

    from scviaduct.families import Encoder, Facts, Family
    from scviaduct.references.archive import SavedModel

_CARRIED = ("_scvi_required_metadata.json", "README.md")
_BLOCK = 8192
_MINIFIED = "_scvi_adata_minify_type"


def build_package(
    folder: Path, out: Path, name: str, data: AnnData | None = None, provenance: Mapping[str, Any] | None = None
) -> Reference:
    """Build a package, or check and copy one.

    Parameters
    ----------
    folder
        A package; or a folder with ``model.pt`` and maybe ``adata.h5ad``, as scvi-tools and scvi-hub lay it out.
    out
        Folder to make; it must not be there.
    name
        What the package is called.
    data
        The training cells, where they are at hand; else ``adata.h5ad`` if there is one.
    provenance
        Where the model comes from.

    Raises
    ------
    PackageError
        If the folder holds no model, or is a package that does not verify.
    UnsafeModelError, UnsupportedModelError
        If the model is refused.
    """
    if not (folder / MODEL).is_file():
        legacy = " It was saved before scvi-tools 0.15." if (folder / "model_params.pt").exists() else ""
        raise PackageError(f"'{folder}' holds no {MODEL}.{legacy}", "Name a folder that model.save() or scvi-hub made.")
    if (folder / MANIFEST).exists():
        return _copy_package(folder, out, name)
    saved = read_model_file(folder / MODEL)
    registry = saved.attr_dict.get("registry_")
    if not isinstance(registry, dict) or "model_name" not in registry:
        raise UnsupportedModelError(
            f"'{folder}' does not say which class its model is.", "Save it with scvi-tools >= 0.15."
        )
    found = family(str(registry["model_name"]))
    facts, template = _describe(folder, found, saved)
    _check_hub_metadata(folder, found.name)
    out.mkdir(parents=True)
    shutil.copyfile(folder / MODEL, out / MODEL)
    for file in _CARRIED:
        if (folder / file).is_file():
            shutil.copyfile(folder / file, out / file)
    template.write_h5ad(out / TEMPLATE)
    encoder = found.load(saved, template.copy(), "cpu")
    encoder.save(out / ENCODER)
    notes: list[str] = []
    columns: dict[str, tuple[str, ...]] = {"index": facts.genes}
    data = data if data is not None else _read_data(folder)
    if data is None:
        notes.append("The folder has no data (adata.h5ad), so the package has no latents of its own.")
    else:
        columns |= _identifiers(data, facts)
        _write_latents(out / LATENTS, data, facts, encoder, notes)
    if not facts.labels and (data is None or not facts.labels_key):
        notes.append("The reference has no labels: cells are mapped with a null label.")
    latent = encode_template(encoder, template, facts)
    told = asdict(facts) | {"genes": columns}
    origin = {"folder": str(folder)} if provenance is None else dict(provenance)
    _write_manifest(out, name, found.name, told, latent.tolist(), notes, origin)
    return Reference.load(out)


def _describe(folder: Path, found: Family, saved: SavedModel) -> tuple[Facts, AnnData]:
    """Facts and template of a model, whose registry may hold anything."""
    try:
        facts = found.facts(saved)
        return facts, make_template(saved, facts)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UnsupportedModelError(
            f"The registry in '{folder}' is not one of a {found.name} ({type(error).__name__}: {error}).",
            "Load and save it with the scvi-tools that made it.",
        ) from error


def _copy_package(folder: Path, out: Path, name: str) -> Reference:
    verification = Reference.load(folder).verify()
    if not verification.ok:
        wrong = next(check for check in verification.checks if not check.ok)
        raise PackageError(f"Package '{folder}' does not verify: {wrong.name}: {wrong.detail}.", "Take it again.")
    out.mkdir(parents=True)
    manifest = read_manifest(folder)
    for file in manifest["files"]:
        shutil.copyfile(folder / file, out / file)
    (out / MANIFEST).write_text(json.dumps(manifest | {"name": name}, indent=1))
    return Reference.load(out)


def _check_hub_metadata(folder: Path, name: str) -> None:
    """A hub folder's metadata must name the class that the model is; the module it names is never imported."""
    path = folder / "_scvi_required_metadata.json"
    if not path.is_file():
        return
    try:
        told = dict(json.loads(path.read_text())).get("model_cls_name")
    except (ValueError, TypeError) as error:
        raise PackageError(f"{path} cannot be read ({error}).", "Take the model from its publisher again.") from error
    if told != name:
        raise UnsupportedModelError(
            f"{path} says {told}, and {MODEL} says {name}.", "Take the model from its publisher again."
        )


def _read_data(folder: Path) -> AnnData | None:
    path = folder / "adata.h5ad"
    if not path.is_file():
        return None
    try:
        return anndata.read_h5ad(path)
    # h5py and anndata have no end of exceptions for broken files: OSError, KeyError, AnnDataReadError, ...
    except (OSError, LookupError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise PackageError(
            f"'{path}' cannot be read ({type(error).__name__}: {error}).",
            "Take it from its publisher again, or remove it: the package then has no latents of its own.",
        ) from error


def _identifiers(data: AnnData, facts: Facts) -> dict[str, tuple[str, ...]]:
    """Other identifiers of the genes that the data's ``var`` has, in the model's order."""
    names = pd.Index(data.var_names.astype(str))
    if names.has_duplicates or not names.isin(facts.genes).any():
        return {}
    var = data.var.set_axis(names, axis=0).reindex(list(facts.genes))
    text = [name for name in var.columns if pd.api.types.is_string_dtype(var[name].dropna().astype(object))]
    return {str(name): tuple("" if pd.isna(v) else str(v) for v in var[name]) for name in text}


def _write_latents(path: Path, data: AnnData, facts: Facts, encoder: Encoder, notes: list[str]) -> None:
    latent = _minified_latent(data) if _MINIFIED in data.uns else _encode(data, facts, encoder)
    if latent is None or latent.shape[1] != facts.n_latent:
        notes.append("The data could not be encoded (other genes, or a minified file without latents).")
        return
    labels = _labels(data, facts)
    offsets = pa.array(np.arange(0, latent.size + 1, facts.n_latent, dtype=np.int32))
    columns = {
        "observation_id": pa.array(data.obs_names.astype(str)),
        "latent": pa.ListArray.from_arrays(offsets, pa.array(latent.reshape(-1))),
        "label": pa.array(labels, pa.string()),
    }
    pq.write_table(pa.table(columns), path, compression="zstd", use_dictionary=["label"])


def _minified_latent(data: AnnData) -> Any:
    """Posterior means of a minified file, which scvi-tools keeps in obsm and whose counts it empties."""
    keys = [key for key in data.obsm if str(key).endswith("latent_qzm")]
    return np.ascontiguousarray(data.obsm[keys[0]], np.float32) if keys else None


def _encode(data: AnnData, facts: Facts, encoder: Encoder) -> Any:
    """Latents of the training cells, in bounded blocks."""
    if tuple(data.var_names.astype(str)) != facts.genes or (facts.layer and facts.layer not in data.layers):
        return None
    counts = data.layers[facts.layer] if facts.layer else data.X
    latent = np.empty((data.n_obs, facts.n_latent), np.float32)
    for start in range(0, data.n_obs, _BLOCK):
        stop = min(start + _BLOCK, data.n_obs)
        latent[start:stop] = encode_rows(encoder, counts[start:stop], data.obs.iloc[start:stop], facts)
    return latent


def _labels(data: AnnData, facts: Facts) -> list[str | None]:
    if not facts.labels_key or facts.labels_key not in data.obs:
        return [None] * data.n_obs
    values = data.obs[facts.labels_key]
    return [None if pd.isna(v) or str(v) == facts.unlabeled_category else str(v) for v in values]


def _write_manifest(
    out: Path,
    name: str,
    family_name: str,
    facts: dict[str, Any],
    template_latent: list[list[float]],
    notes: list[str],
    provenance: dict[str, Any],
) -> None:
    files = {path.name: {"digest": file_digest(path), "size": path.stat().st_size} for path in sorted(out.iterdir())}
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "name": name,
        "family": family_name,
        "files": files,
        "facts": json.loads(json.dumps(facts)),
        "template_latent": template_latent,
        "notes": notes,
        "provenance": provenance | {"packaged": datetime.now(UTC).isoformat(timespec="seconds")},
    }
    manifest["digest"] = manifest_digest(manifest)
    (out / MANIFEST).write_text(json.dumps(manifest, indent=1))
