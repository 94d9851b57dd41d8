"""Building a package from what scvi-tools or scvi-hub leave in a folder."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pandas as pd

from scviaduct.errors import PackageError, ScviaductError, UnsupportedModelError
from scviaduct.families import MODALITY, family
from scviaduct.families.registered import column_texts
from scviaduct.families.vae import quiet
from scviaduct.references.fetching.cached import DATA, data_names, is_package, prefix_of
from scviaduct.references.latents import ReferenceLatents
from scviaduct.references.manifest import (
    FORMAT,
    MANIFEST,
    facts_to_json,
    file_digest,
    manifest_digest,
    read_manifest,
)
from scviaduct.references.package import ENCODER, LATENTS, STATISTICS, TEMPLATE, Reference
from scviaduct.references.publishing.carried import Brought, bring_cells
from scviaduct.references.saved.contained import check_contained
from scviaduct.references.saved.portable import WEIGHTS, write_model
from scviaduct.references.saved.repair import METADATA, read_metadata, read_saved
from scviaduct.references.saved.weights import RENAMED
from scviaduct.references.summing import LatentWriter
from scviaduct.references.template import SYNTHETIC, encode_cells, encode_template, make_template
from scviaduct.values import GeneTable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from anndata import AnnData

    from scviaduct.families import Encoder, Facts, Family
    from scviaduct.references.saved.archive import SavedModel

_CARRIED = (METADATA, "README.md", "metrics.json")
_BLOCK = 8192
_MINIFIED = "_scvi_adata_minify_type"


def build_package(
    folder: Path,
    out: Path,
    name: str,
    data: AnnData | None = None,
    provenance: Mapping[str, Any] | None = None,
    extras: Mapping[str, Path] | None = None,
    labels_key: str = "",
    *,
    data_file: bool = True,
) -> Reference:
    """Build a package, or check and copy one.

    Parameters
    ----------
    folder
        A package; or a folder with a model and maybe its data, as scvi-tools and scvi-hub lay it out.
    out
        Folder to make; it must not be there.
    name
        What the package is called.
    data
        The training cells, flat, where they are at hand; else the folder's own data if there is some.
    provenance
        Where the model comes from.
    extras
        Further files of the package: name to where it lies now.
    labels_key
        obs column of the data that labels its cells, for a model that registered none; missing where there is none.
    data_file
        Read the folder's own data; a package is copied with what it holds.

    Raises
    ------
    PackageError
        If the folder holds no model, or is a package that does not verify.
    UnsafeModelError, UnsupportedModelError
        If the model is refused.
    """
    if _is_package(folder):
        return _copy_package(folder, out, name)
    saved, repairs = read_saved(folder)
    found = family(str(saved.attr_dict["registry_"]["model_name"]))
    facts, template = _describe(folder, found, saved)
    _check_hub_metadata(folder, found.name)
    with quiet():  # a protein may be called like its gene
        encoder = found.load(saved, template.copy(), "cpu")
    out.mkdir(parents=True)
    write_model(saved, out)
    for file in _CARRIED:
        if (folder / file).is_file():
            shutil.copyfile(folder / file, out / file)
    for file, path in (extras or {}).items():
        shutil.copyfile(path, out / file)
    with quiet():
        template.write_h5ad(out / TEMPLATE)
    encoder.save(out / ENCODER)
    notes: list[str] = []
    given, labelled = data is not None, False
    beside = _data_file(folder)
    if data is None and beside is not None and data_file:
        data = _read_data(beside, found, saved)
    if data is None:
        notes.append(f"{_why_no_data(beside, read=data_file)}, so the package has no latents of its own.")
    else:
        table = GeneTable({**facts.genes.columns, **_identifiers(data, facts)}, facts.genes.modality)
        brought = Brought() if given else bring_cells(folder, out, data, facts)
        notes += brought.notes
        labelled = brought.labelled
        if not brought.taken and data.uns.get(SYNTHETIC):
            notes.append("Its data are synthetic cells, so the package has no latents of its own.")
        elif not brought.taken:
            labels = _labels(data, facts.labels_key or labels_key, facts.unlabeled_category)
            labelled = bool(facts.labels_key or labels_key)
            _write_latents(out, data, labels, facts, encoder, notes)
    if not facts.labels and not labelled:
        notes.append("The reference has no labels: cells are mapped with a null label.")
    told = facts_to_json(facts) | ({} if data is None else {"genes": dict(table.columns)})
    origin = {"folder": str(folder)} if provenance is None else dict(provenance)
    latent = encode_template(encoder, template, facts).tolist()
    _write_manifest(out, name, found.name, told, latent, list(repairs), notes, origin)
    return Reference.load(out)


def _is_package(folder: Path) -> bool:
    """Whether a folder is a package; other programs, too, put a ``manifest.json`` beside a model."""
    names = _names(folder)
    # One that lost its encoder is still a package, which does not verify: its weights are not packaged unchecked.
    return is_package(names) or {MANIFEST, WEIGHTS} <= names


def _names(folder: Path) -> set[str]:
    """Files directly in a folder."""
    return {path.name for path in folder.glob("*") if path.is_file()}


def _data_file(folder: Path) -> Path | None:
    """The data that lie beside a model."""
    names = _names(folder)
    wanted = data_names(prefix_of(names, f"'{folder}'"))
    return next((folder / name for name in wanted if name in names), None)


def _why_no_data(file: Path | None, *, read: bool) -> str:
    if file is None:
        return f"The folder has no data ({DATA[0]})"
    return f"Its data ({file.name}) " + ("lacks the layer that it was trained on" if read else "was left out")


def _describe(folder: Path, found: Family, saved: SavedModel) -> tuple[Facts, AnnData]:
    """Facts and template of a model, whose registry may hold anything."""
    try:
        facts = found.facts(saved)
        return facts, make_template(facts)
    except ScviaductError:
        raise
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
        if file.endswith((".h5ad", ".h5mu")):
            check_contained(folder / file)
        shutil.copyfile(folder / file, out / file)
    (out / MANIFEST).write_text(json.dumps(manifest | {"name": name}, indent=1))
    return Reference.load(out)


def _check_hub_metadata(folder: Path, name: str) -> None:
    """A hub folder's metadata must name the class that the model is; the module it names is never imported."""
    told = read_metadata(folder)
    named = told.get("model_cls_name")
    if told and RENAMED.get(str(named), named) != name:
        raise UnsupportedModelError(
            f"{folder / METADATA} says {named}, and the model says {name}.", "Take the model from its publisher again."
        )


def _read_data(path: Path, found: Family, saved: SavedModel) -> AnnData | None:
    try:
        check_contained(path)
        if path.suffix == ".h5mu":
            import mudata

            data = mudata.read_h5mu(path)
        else:
            data = anndata.read_h5ad(path)
        flat = found.flatten(saved, data)
    except ScviaductError:
        raise
    # h5py and anndata have no end of exceptions for broken files: OSError, KeyError, AnnDataReadError, ...
    except (OSError, LookupError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise PackageError(
            f"'{path}' cannot be read ({type(error).__name__}: {error}).",
            "Take it from its publisher again, or remove it: the package then has no latents of its own.",
        ) from error
    if flat is not None and data.uns.get(SYNTHETIC):
        flat.uns[SYNTHETIC] = True
    return flat


def _identifiers(data: AnnData, facts: Facts) -> dict[str, tuple[str, ...]]:
    """Other identifiers of the genes that the data's ``var`` has, in the model's order."""
    names = pd.Index(data.var_names.astype(str))
    if names.has_duplicates or not names.isin(facts.names).any():
        return {}
    var = data.var.set_axis(names, axis=0).reindex(list(facts.names))
    text = [name for name in var.columns if pd.api.types.is_string_dtype(var[name].dropna().astype(object))]
    return {str(name): tuple("" if pd.isna(v) else str(v) for v in var[name]) for name in text if name != MODALITY}


def _write_latents(
    out: Path, data: AnnData, labels: list[str | None], facts: Facts, encoder: Encoder, notes: list[str]
) -> None:
    names = data.obs_names.astype(str)
    blocks = _minified(data, labels, encoder) if _MINIFIED in data.uns else _encoded(data, labels, facts, encoder)
    cells = 0
    with LatentWriter(out / LATENTS) as writer:
        for block in blocks:
            if block.latent.shape[1] != facts.n_latent:
                break
            writer.add(block, list(names[cells : cells + len(block.latent)]))
            cells += len(block.latent)
    if not cells:
        notes.append("The data could not be encoded (other genes, or a minified file without latents).")
        return
    writer.statistics(encoder.gene_influence()).write(out / STATISTICS)


def _minified(data: AnnData, labels: list[str | None], encoder: Encoder) -> Iterator[ReferenceLatents]:
    """Latents of a minified file: scvi-tools keeps the posteriors in obsm, and empties the counts."""
    found = {suffix: next((k for k in data.obsm if str(k).endswith(suffix)), None) for suffix in ("_qzm", "_qzv")}
    if found["_qzm"] is None:
        return
    variance = None if found["_qzv"] is None else np.ascontiguousarray(data.obsm[found["_qzv"]], np.float32)
    location = np.ascontiguousarray(data.obsm[found["_qzm"]], np.float32)
    yield ReferenceLatents(encoder.transformed(location), labels, variance)


def _encoded(data: AnnData, labels: list[str | None], facts: Facts, encoder: Encoder) -> Iterator[ReferenceLatents]:
    """Latents of the training cells, in bounded blocks; the counts may lie on disk."""
    if tuple(data.var_names.astype(str)) != facts.names:
        return
    for start in range(0, data.n_obs, _BLOCK):
        stop = min(start + _BLOCK, data.n_obs)
        block = encode_cells(encoder, data.X[start:stop], data.obs.iloc[start:stop], facts)
        yield ReferenceLatents(block.mean, labels[start:stop], block.variance, block.others)


def _labels(data: AnnData, key: str, none: str) -> list[str | None]:
    if not key or key not in data.obs:
        return [None] * data.n_obs
    missing, texts = data.obs[key].isna(), column_texts(data.obs[key])
    return [None if lacking or text == none else text for lacking, text in zip(missing, texts, strict=True)]


def _write_manifest(
    out: Path,
    name: str,
    family_name: str,
    facts: dict[str, Any],
    template_latent: list[list[float]],
    repairs: list[str],
    notes: list[str],
    provenance: dict[str, Any],
) -> None:
    files = {path.name: {"digest": file_digest(path), "size": path.stat().st_size} for path in sorted(out.iterdir())}
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "name": name,
        "family": family_name,
        "files": files,
        "facts": facts,
        "template_latent": template_latent,
        "repairs": repairs,
        "notes": notes,
        "provenance": provenance | {"packaged": datetime.now(UTC).isoformat(timespec="seconds")},
    }
    manifest["digest"] = manifest_digest(manifest)
    (out / MANIFEST).write_text(json.dumps(manifest, indent=1))
