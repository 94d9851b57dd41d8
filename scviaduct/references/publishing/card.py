"""The card of a published reference: the header that the hub and scvi-hub search by, and what a user must know.

scvi-tools' own helper writes cards of SCVI, SCANVI and TOTALVI only. Everything here is taken from the manifest, the
model's registry and what was measured; nothing names a path, a user or a machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from scviaduct.families import family
from scviaduct.references.exporting import SAVED
from scviaduct.references.fetching.searching import safe
from scviaduct.references.manifest import read_manifest
from scviaduct.references.publishing.measured import metrics, training
from scviaduct.references.publishing.origin import origin_of
from scviaduct.references.publishing.privacy import registered_columns, suspicion

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from scviaduct.references.package import Reference
    from scviaduct.references.publishing.criticism import Criticism
    from scviaduct.references.publishing.data import Data
    from scviaduct.references.publishing.repository import Options
    from scviaduct.references.saved.archive import SavedModel

_SHOWN = 20
_DATA = {
    "template": "16 synthetic cells, drawn from a Poisson distribution in the layout of the training data. They are no"
    " one's cells; scvi-tools needs some to load the model.",
    "minified": "the training cells without their counts: latent posteriors and the columns that the model reads, in"
    " scvi-tools' minified format.",
    "minified with counts": "the training cells with their counts, and with their latent posteriors in scvi-tools'"
    " minified format.",
}


@dataclass(frozen=True, slots=True)
class Describing:
    """What a card tells besides the package's own facts.

    Attributes
    ----------
    name
        ``OWNER/NAME`` of the repository.
    module
        Module of scvi-tools that has the class.
    data
        The data file.
    criticism, metrics
        Figures computed now, and what ``metrics.json`` holds.
    options
        What the publisher chose.
    saved
        The model.
    folder
        Of the repository, with model and data written.
    """

    name: str
    module: str
    data: Data
    criticism: Criticism
    metrics: Mapping[str, Any]
    options: Options
    saved: SavedModel
    folder: Path


def anndata_version(reference: Reference) -> str:
    """Version of anndata that the training data were held in, or today's where that was not recorded."""
    told = reference.provenance.get("software")
    return str(told.get("anndata", version("anndata"))) if isinstance(told, dict) else version("anndata")


def describe(reference: Reference, told: Describing) -> str:
    """Write the card.

    Parameters
    ----------
    reference
        The package.
    told
        What else is known of the repository.

    Returns
    -------
    str
        Markdown with a YAML header.
    """
    title = f"# {told.name.rpartition('/')[2]}"
    about = family(reference.family).about
    description = safe(told.options.description).strip()
    lead = f"A pretrained {reference.family} of scvi-tools. {about}"
    sections = {
        "Intended use and limits": _uses(reference),
        "Training data": _training_data(reference, told),
        "Training": training(reference, told.saved),
        "Metrics": metrics(reference, told.criticism, told.metrics),
        "How to use it": _how(reference, told),
        "Files": _files(reference, told),
    }
    body = [f"## {heading}\n\n{text}" for heading, text in sections.items()]
    return "\n\n".join([_header(reference, told), title, lead, *([description] if description else []), *body]) + "\n"


def _header(reference: Reference, told: Describing) -> str:
    from huggingface_hub import ModelCardData

    tags = ["biology", "genomics", "single-cell", f"model_cls_name:{reference.family}"]
    tags += [f"scvi_version:{reference.scvi_version}", f"anndata_version:{anndata_version(reference)}"]
    tags += [f"modality:{name}" for name in _modalities(reference)]
    tags += [f"tissue:{safe(name, lines=False)}" for name in told.options.tissues]
    tags += [f"annotated:{bool(reference.known_labels or reference.labels)}"]
    licence = licence_of(reference, told.options)
    header = ModelCardData(library_name="scvi-tools", tags=tags, license=licence or None)
    return f"---\n{header.to_yaml()}\n---"


def licence_of(reference: Reference, options: Options) -> str:
    """The licence that is named, or that of the repository which the package came from."""
    return options.licence or str(reference.provenance.get("licence") or "")


def _modalities(reference: Reference) -> tuple[str, ...]:
    return reference.genes.modalities or ("rna",)


def _uses(reference: Reference) -> str:
    found = family(reference.family)
    label = "label them with its classifier" if reference.labels else "place them among its cells"
    spans = {name: reference.genes.modality.count(name) for name in reference.genes.modalities}
    counts = ", ".join(f"{size:,} {name}" for name, size in spans.items()) or f"{len(reference.genes):,}"
    identifiers = ", ".join(f"`{name}`" for name in reference.genes.columns)
    first = ", ".join(f"`{name}`" for name in reference.names[:3])
    lines = [
        f"To map query cells into its latent of {reference.n_latent} dimensions and {label}.",
        "",
        "A query needs",
        "",
        f"- raw counts, neither normalised nor logarithms, of its features: {counts};",
        f"- features named as the model does ({identifiers}; e.g. {first}); those that a query lacks read as zero;",
        *_columns_needed(reference),
        "",
        "Limits:",
        "",
        "- Cells unlike the training cells get a latent, and a label, all the same: check how novel they are.",
        f"- Fitting it to a new batch by scArches surgery: {_surgery(reference, found.surgery)}.",
        *(f"- Repaired to load with today's scvi-tools: {safe(one, lines=False)}." for one in reference.repairs),
        "- It is for research; it was not made or tested for diagnosis.",
    ]
    return "\n".join(lines)


def _surgery(reference: Reference, how: str) -> str:
    if not reference.encode_covariates:
        return "its encoder reads no batch, so that no surgery can move a latent, and none is needed"
    return "possible" if how == "scvi-tools" else how


def _columns_needed(reference: Reference) -> list[str]:
    rows = []
    if reference.encoded_batch:
        rows.append(f"- an obs column for the batch (`{reference.batch_key}`);")
    if reference.encoded_sample:
        rows.append(f"- an obs column for the sample (`{reference.sample_key}`);")
    if reference.encode_covariates:
        named = [*reference.categorical_covariates, *reference.continuous_covariates]
        rows += [f"- the obs column `{name}`;" for name in named]
    return rows or ["- no obs column: the encoder reads none."]


def _training_data(reference: Reference, told: Describing) -> str:
    cells = reference.provenance.get("cells") or _registered_cells(told.saved)
    licence = licence_of(reference, told.options)
    rows = [f"- Source: {origin_of(reference.provenance)}"]
    rows += [f"- Training data: <{told.options.data_url}>"] if told.options.data_url else []
    rows += [f"- Cells: {int(cells):,}"] if cells else []
    tissues = ", ".join(safe(name, lines=False) for name in told.options.tissues)
    rows += [f"- Tissues: {tissues}"] if tissues else []
    for column, values in registered_columns(told.saved.attr_dict["registry_"], reference).items():
        rows += [_column(reference, column, values)] if values else []
    rows.append(f"- Licence: {licence or 'not named; ask the publisher before you use it'}")
    return "\n".join(rows)


def _column(reference: Reference, column: str, values: tuple[str, ...]) -> str:
    role = {reference.batch_key: "Batches", reference.sample_key: "Samples", reference.labels_key: "Labels"}
    name = role.get(column, "Covariate")
    if suspicion(column, values, labels=column == reference.labels_key) is not None:
        return f"- Donors or samples (`{column}`): {len(values):,}"
    shown = ", ".join(safe(value, lines=False) for value in values[:_SHOWN])
    more = f" and {len(values) - _SHOWN:,} more" if len(values) > _SHOWN else ""
    return f"- {name} (`{column}`): {len(values):,} ({shown}{more})"


def _registered_cells(saved: SavedModel) -> int:
    fields = saved.attr_dict["registry_"].get("field_registries", {})
    told = [one.get("summary_stats", {}).get("n_cells") for one in fields.values()]
    return next((int(n) for n in told if n), 0)


def _how(reference: Reference, told: Describing) -> str:
    loads = f"{told.module}.{reference.family}"
    add = f"scviaduct reference add hf://{told.name} --name {reference.name}"
    map_ = f"scviaduct map QUERY.h5ad --reference {reference.name} --store STORE"
    pull = f'hub = HubModel.pull_from_huggingface_hub("{told.name}", revision="COMMIT")'
    lines = [
        "With scviaduct, which reads the model without running its pickle:",
        f"```\n{add}\n{map_}\n```",
        f"With scvi-tools ({loads}); its `load` unpickles `{SAVED}`, so do that with publishers you trust:",
        f"```python\nfrom scvi.hub import HubModel\n\n{pull}\nmodel = hub.model\n```",
        f"`{told.data.file}` holds {_DATA[told.data.kind]}",
    ]
    return "\n\n".join(lines)


def _files(reference: Reference, told: Describing) -> str:
    rows = ["| File | Bytes | SHA-256 |", "| --- | --- | --- |"]
    for path in sorted(told.folder.iterdir()):
        digest = sha256()
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        rows.append(f"| `{path.name}` | {path.stat().st_size:,} | `{digest.hexdigest()}` |")
    manifest = read_manifest(reference.path)
    source = f"Digest of the package that this was made from: `{manifest['digest']}`."
    columns = ", ".join(f"`{name}`" for name in told.data.columns) or "none"
    left = "".join(f"\n- {one.partition(' (--')[0]}" for one in _kinds(told.data.refused))
    cells = f"`{told.data.file}` has {told.data.cells:,} cells; obs columns: {columns}."
    return "\n\n".join(["\n".join(rows), source, cells + (f" Left out:\n{left}" if left else "")])


def _kinds(refused: Iterable[str]) -> list[str]:
    """What was left out, columns by number: their names may tell what was known of the donors."""
    columns = [one for one in refused if one.startswith("obs column")]
    others = [one for one in refused if not one.startswith("obs column")]
    return others + ([f"{len(columns):,} obs columns"] if columns else [])
