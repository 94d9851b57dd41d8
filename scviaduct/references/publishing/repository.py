"""A package as the folder of a scvi-hub repository: model, metadata, card, metrics and data, checked before it goes."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from scviaduct.errors import InputError, PackageError
from scviaduct.families import family
from scviaduct.families.vae import quiet
from scviaduct.references.package import MODEL, REGISTRY, TEMPLATE
from scviaduct.references.publishing import privacy
from scviaduct.references.publishing.card import Describing, anndata_version, describe
from scviaduct.references.publishing.carried import group_column, label_column, write_cells
from scviaduct.references.publishing.criticism import Criticism, criticise, criticise_cells
from scviaduct.references.publishing.data import Data, has_counts, parts_of, read_minified, write_data
from scviaduct.references.saved.portable import read_model
from scviaduct.sources.uri import refuse_secrets

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from scviaduct.references.package import Reference

METADATA, CARD, METRICS = "_scvi_required_metadata.json", "README.md", "metrics.json"
_NOT_COMPUTED = "no counts were at hand (scviaduct publish --criticise SOURCE computes it)"


@dataclass(frozen=True, slots=True)
class Options:
    """What a publisher chooses.

    Attributes
    ----------
    licence
        Identifier of the hub, e.g. ``cc-by-4.0``; empty for that of the repository that the package came from.
    description
        What the reference is, in Markdown.
    data_url
        Where the training data can be had.
    tissues
        Names for the hub's search.
    with_counts, with_ids
        Whether counts and names of cells may be published.
    allow_columns
        obs columns that may be published though they may name donors, or that the model does not need.
    criticise
        URI of cells to compare the model's samples with.
    """

    licence: str = ""
    description: str = ""
    data_url: str = ""
    tissues: tuple[str, ...] = ()
    with_counts: bool = False
    with_ids: bool = False
    allow_columns: tuple[str, ...] = ()
    criticise: str = ""


@dataclass(frozen=True, slots=True)
class Contents:
    """A repository's folder.

    Attributes
    ----------
    folder
        Holds the files, and nothing else.
    files
        Name to size in bytes.
    family
        Name of the model's class.
    data
        ``template``, ``minified`` or ``minified with counts``.
    cells
        Of the data.
    columns
        obs columns of the data.
    refused
        What was left out of the data and of the latents, as sentences.
    """

    folder: Path
    files: Mapping[str, int]
    family: str
    data: Literal["template", "minified", "minified with counts"]
    cells: int
    columns: tuple[str, ...]
    refused: tuple[str, ...]


def write_repository(reference: Reference, name: str, folder: Path, options: Options) -> Contents:
    """Write a repository's files, and load them as a user of scvi-tools would.

    Parameters
    ----------
    reference
        The package; its own files are checked.
    name
        ``OWNER/NAME`` of the repository, which the card shows how to fetch.
    folder
        To make; it must be absent or empty.
    options
        What the publisher chose.

    Raises
    ------
    InputError
        If something would be published by accident, or an option does not fit.
    PackageError
        If the package was changed, or scvi-tools cannot load what would be published.
    """
    _require_empty(folder)
    _require_public_url(options.data_url)
    reference.require(MODEL, REGISTRY, TEMPLATE)
    data = read_minified(reference)
    needed = _require_public(reference, data, options)
    criticism = _criticism(reference, data, options)
    folder.mkdir(parents=True, exist_ok=True)
    written = write_data(reference, data, folder, needed, with_counts=options.with_counts, with_ids=options.with_ids)
    left = write_cells(reference, folder, needed, options.allow_columns, with_ids=options.with_ids)
    written = replace(written, refused=tuple(dict.fromkeys((*written.refused, *left))))
    module = family(reference.family).module
    metrics = _write_metrics(reference, folder, criticism)
    told = Describing(name, module, written, criticism, metrics, options, read_model(reference.path), folder)
    _write_metadata(reference, folder, module, options.data_url)
    (folder / CARD).write_text(describe(reference, told), encoding="utf-8")
    _require_clean(reference, folder)
    _require_loads(reference, folder, module)
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return Contents(folder, files, reference.family, written.kind, written.cells, written.columns, written.refused)


def _require_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"'{folder}' is there and not empty.", "Name a new folder: --out DIR.")


def _require_public_url(url: str) -> None:
    if not url:
        return
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or "." not in (parts.hostname or "") or " " in url:
        told = f"--data-url {url.partition('?')[0]}: it is no address on the web"
        raise InputError(f"{told}.", "E.g. --data-url https://cellxgene.cziscience.com/collections/ID")
    refuse_secrets(url)


def _require_public(reference: Reference, data: Any, options: Options) -> set[str]:
    """The obs columns to publish, after those that may name donors were refused."""
    registry = read_model(reference.path).attr_dict["registry_"]
    columns = privacy.registered_columns(registry, reference)
    there = {str(column) for part in ((data, *parts_of(data)) if data is not None else ()) for column in part.obs}
    if reference.has_latents:
        there |= {label_column(reference), group_column(reference)} - {""}
    # Without cells, the model holds categories and no numbers.
    held = {column: values for column, values in columns.items() if values or data is not None}
    privacy.require_public(held, reference, options.allow_columns, {*there, *columns})
    return {*columns, *options.allow_columns}


def _criticism(reference: Reference, data: Any, options: Options) -> Criticism:
    if options.criticise:
        return criticise(reference, options.criticise)
    return criticise_cells(reference, data) if has_counts(data) else Criticism(_NOT_COMPUTED)


def _write_metrics(reference: Reference, folder: Path, criticism: Criticism) -> dict[str, Any]:
    """Metrics in scvi-hub's format: those computed now, else those that the package came with."""
    if criticism.figures:
        metrics = criticism.metrics()
    elif METRICS in reference.files:
        reference.require(METRICS)
        try:
            metrics = dict(json.loads((reference.path / METRICS).read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError) as error:
            told = f"{reference.path / METRICS} cannot be read ({error})"
            raise PackageError(f"{told}.", "Add the reference again from where it came.") from error
    else:
        return {}
    (folder / METRICS).write_text(json.dumps(metrics, indent=4), encoding="utf-8")
    return metrics


def _write_metadata(reference: Reference, folder: Path, module: str, url: str) -> None:
    """The fields of ``scvi.hub.HubMetadata``; the class itself asks the network for the URL."""
    metadata = {
        "scvi_version": reference.scvi_version,
        "anndata_version": anndata_version(reference),
        "model_cls_name": reference.family,
        "training_data_url": url or None,
        "model_parent_module": module,
    }
    (folder / METADATA).write_text(json.dumps(metadata, indent=4), encoding="utf-8")


def _require_clean(reference: Reference, folder: Path) -> None:
    """Refuse paths and tokens in whatever is text, the model's own attributes included."""
    documents = {name: (folder / name).read_text(encoding="utf-8") for name in (CARD, METADATA)}
    if (folder / METRICS).is_file():
        documents[METRICS] = (folder / METRICS).read_text(encoding="utf-8")
    documents["The model"] = (reference.path / REGISTRY).read_text(encoding="utf-8")
    privacy.require_clean(documents, (reference.path,))


def _require_loads(reference: Reference, folder: Path, module: str) -> None:
    from importlib import import_module

    model_class = getattr(import_module(module), reference.family)
    try:
        with quiet():
            model_class.load(str(folder), accelerator="cpu")
    # scvi-tools can fail in any way; whatever it is, its users would meet it, too.
    except Exception as error:
        told = next(iter(str(error).splitlines()), type(error).__name__).removesuffix(".")
        raise PackageError(
            f"scvi-tools cannot load what would be published of '{reference.name}' ({told}); nothing was published.",
            "Load and save the model with today's scvi-tools, add it again, and publish that.",
        ) from error


__all__ = ["CARD", "METADATA", "METRICS", "Contents", "Data", "Options", "write_repository"]
