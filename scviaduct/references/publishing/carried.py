"""A package's own cells in a repository: latents, what they sum up to, and calibration; written there, checked here.

They are what a fetched repository cannot give again: most families publish synthetic cells alone, minified data hold
no further latents, and a model has no labels besides those that it registered.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from scviaduct.errors import PackageError
from scviaduct.references.latents import ReferenceLatents, Statistics
from scviaduct.references.package import CALIBRATION, LATENTS, STATISTICS
from scviaduct.references.publishing.privacy import suspicion
from scviaduct.references.template import SYNTHETIC

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from anndata import AnnData

    from scviaduct.families import Facts
    from scviaduct.references.package import Reference

NAMES_LEFT = "names of the cells: replaced by numbers (--with-ids keeps them)"
_COLUMNS = ("observation_id", "latent", "variance", "label")
_TEXTS = ("observation_id", "group", "label", "predicted")
_NEAR = 1e-3
_MINIFIED, _LATENT_ONLY = "_scvi_adata_minify_type", "latent_posterior_parameters"
_FOUND = (PackageError, pa.ArrowException, OSError, LookupError, ValueError, TypeError, AttributeError)
"""What pyarrow, safetensors and numpy raise for files that are not what they are called."""


def label_column(reference: Reference) -> str:
    """obs column that the labels of a package's cells came from; ``label`` where that was not recorded."""
    recipe = reference.provenance.get("recipe")
    told = recipe.get("labels_key") if isinstance(recipe, dict) else None
    return reference.labels_key or str(told or "label")


def group_column(reference: Reference) -> str:
    """obs column of the groups that calibration held out; empty where that was not recorded."""
    told = reference.provenance.get("calibration")
    return str(told.get("by") or "") if isinstance(told, dict) else ""


def write_cells(
    reference: Reference, folder: Path, needed: Collection[str], allowed: Collection[str], *, with_ids: bool
) -> tuple[str, ...]:
    """Write a package's latents, statistics and calibration, without what is private.

    Parameters
    ----------
    reference
        The package; one without latents writes nothing.
    folder
        Where to.
    needed
        obs columns that may be published: those that the model registers, and those that were allowed.
    allowed
        Those that were allowed by name.
    with_ids
        Whether cells keep their names; else numbers in the order of the cells take their place.

    Returns
    -------
    tuple of str
        What was left out, as sentences.

    Raises
    ------
    PackageError
        If a file was changed or cannot be read.
    """
    if not reference.has_latents:
        return ()
    reference.require(LATENTS, STATISTICS)
    statistics, column = Statistics.read(reference.path / STATISTICS), label_column(reference)
    private = column not in allowed and suspicion(column, statistics.labels, labels=True) is not None
    labels = bool(statistics.labels) and not private
    refused = [] if with_ids else [NAMES_LEFT]
    if statistics.labels and private:
        refused.append(f"labels of the cells (--allow-column {column} publishes them)")
    _write_latents(reference.path / LATENTS, folder / LATENTS, ids=with_ids, labels=labels)
    (statistics if labels else _without_labels(statistics)).write(folder / STATISTICS)
    if CALIBRATION in reference.files and labels:
        reference.require(CALIBRATION)
        refused += _write_calibration(reference, folder, needed, allowed, with_ids=with_ids)
    return tuple(refused)


def _write_latents(source: Path, target: Path, *, ids: bool, labels: bool) -> None:
    """Copy the columns that are known, a row group at a time."""
    start = 0
    with pq.ParquetFile(source) as file:
        kept = [name for name in file.schema_arrow.names if name in _COLUMNS or name.startswith("latent_")]
        schema = pa.schema([file.schema_arrow.field(name) for name in kept])
        with pq.ParquetWriter(target, schema, compression="zstd", use_dictionary=["label"]) as writer:
            for i in range(file.num_row_groups):
                rows = file.read_row_group(i, columns=kept).select(kept).replace_schema_metadata(None)
                if not ids:
                    numbers = [str(n) for n in range(start, start + len(rows))]
                    rows = _changed(rows, "observation_id", pa.array(numbers, pa.string()))
                if not labels:
                    rows = _changed(rows, "label", pa.nulls(len(rows), pa.string()))
                writer.write_table(rows)
                start += len(rows)


def _changed(table: pa.Table, name: str, values: Any) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, values)


def _without_labels(statistics: Statistics) -> Statistics:
    size = len(statistics.all_mean)
    none = np.zeros((0, size), np.float32), np.zeros((0, size, size), np.float32)
    return replace(statistics, labels=(), count=np.zeros(0, np.int64), mean=none[0], covariance=none[1])


def _write_calibration(
    reference: Reference, folder: Path, needed: Collection[str], allowed: Collection[str], *, with_ids: bool
) -> list[str]:
    """Calibration of the labels; groups that may be donors, or that the model does not hold, go by number."""
    table = pq.read_table(reference.path / CALIBRATION).select([*_TEXTS, "probability"]).replace_schema_metadata(None)
    column, refused = group_column(reference), []
    groups = pc.unique(table["group"]).to_pylist()
    public = column in needed and (column in allowed or suspicion(column, [str(one) for one in groups]) is None)
    if not public:
        numbers = pc.index_in(table["group"], value_set=pa.array(groups, pa.string()))
        table = _changed(table, "group", numbers.cast(pa.string()))
        how = f" (--allow-column {column} keeps them)" if column else ""
        refused.append(f"groups of the calibration: replaced by numbers{how}")
    if not with_ids:
        names = pq.read_table(reference.path / LATENTS, columns=["observation_id"])["observation_id"]
        numbers = pc.index_in(table["observation_id"], value_set=names.combine_chunks())
        table = _changed(table, "observation_id", numbers.cast(pa.string()))
    pq.write_table(table, folder / CALIBRATION, compression="zstd", use_dictionary=["group", "label", "predicted"])
    return refused


@dataclass(frozen=True, slots=True)
class Brought:
    """What a folder gave of a package's cells.

    Attributes
    ----------
    taken
        Whether their latents and statistics were copied.
    labelled
        Whether some cell has a label.
    notes
        What was left aside, and why.
    """

    taken: bool = False
    labelled: bool = False
    notes: tuple[str, ...] = ()


def bring_cells(folder: Path, out: Path, data: AnnData, facts: Facts) -> Brought:
    """Copy the latents, statistics and calibration that a folder carries, if they are those of its model.

    Not where the folder's data have counts, which tell better what the model makes of them.

    Parameters
    ----------
    folder
        As it was fetched.
    out
        The package that is made.
    data
        The folder's own.
    facts
        Of the model.
    """
    synthetic = bool(data.uns.get(SYNTHETIC))
    if not (folder / LATENTS).is_file() or not (synthetic or str(data.uns.get(_MINIFIED, "")) == _LATENT_ONLY):
        return Brought()
    cells = None if synthetic else data.n_obs
    try:
        latents = ReferenceLatents.read(folder / LATENTS)
        reason = _misfit(latents, facts, cells) or _wrong_names(folder / LATENTS)
        reason = reason or _wrong_statistics(Statistics.read(folder / STATISTICS), latents, facts)
    except _FOUND as error:
        reason = f"it cannot be read with its statistics ({type(error).__name__})"
    if reason:
        return Brought(notes=(f"The folder's {LATENTS} was left aside: {reason}.",))
    for name in (LATENTS, STATISTICS):
        shutil.copyfile(folder / name, out / name)
    known = {label for label in latents.labels if label is not None}
    notes = []
    if (folder / CALIBRATION).is_file():
        reason = _wrong_calibration(folder / CALIBRATION, known)
        if reason:
            notes.append(f"The folder's {CALIBRATION} was left aside: {reason}.")
        else:
            shutil.copyfile(folder / CALIBRATION, out / CALIBRATION)
    return Brought(taken=True, labelled=bool(known), notes=tuple(notes))


def _misfit(latents: ReferenceLatents, facts: Facts, cells: int | None) -> str:
    """Why latents are not those of a model; empty if they are."""
    shape, size = latents.latent.shape, facts.n_latent
    if shape[1] != size:
        return f"it has {shape[1]} dimensions and the model {size}"
    if not shape[0] or cells not in (None, shape[0]):
        return f"it has {shape[0]:,} cells and the data {cells or 0:,}"
    variance = latents.variance
    if variance is not None and (variance.shape != shape or not (variance >= 0).all()):
        return "its variances do not fit its latents"
    every = [latents.latent, *latents.others.values(), *(() if variance is None else (variance,))]
    if any(part.dtype != np.float32 or not np.isfinite(part).all() for part in every):
        return "its latents are not all finite float32"
    if not all(label is None or isinstance(label, str) for label in latents.labels):
        return "its labels are not text"
    return ""


def _wrong_names(path: Path) -> str:
    """Whether a table lacks the cells' names, or has lists of unequal lengths that add up all the same."""
    with pq.ParquetFile(path) as file:
        if "observation_id" not in file.schema_arrow.names:
            return "it has no observation_id"
        lists = [name for name in file.schema_arrow.names if name in _COLUMNS[1:3] or name.startswith("latent_")]
        for i in range(file.num_row_groups):
            rows = file.read_row_group(i, columns=["observation_id", *lists])
            if not pa.types.is_string(rows.schema.field("observation_id").type):
                return "its observation_id is not text"
            if any(len(pc.unique(pc.list_value_length(rows[name]))) > 1 for name in lists):
                return "its latents differ in length"
    return ""


def _wrong_statistics(told: Statistics, latents: ReferenceLatents, facts: Facts) -> str:
    """Why statistics do not sum up the latents of a model; empty if they do."""
    if told.influence.shape != (len(facts.genes),):
        return f"{STATISTICS} is of {told.influence.size:,} features and the model of {len(facts.genes):,}"
    own = Statistics.of(latents, told.influence)
    parts = ("count", "mean", "covariance", "all_mean", "all_covariance")
    same = told.labels == own.labels and all(_near(getattr(told, name), getattr(own, name)) for name in parts)
    return "" if same and np.isfinite(told.influence).all() else f"{STATISTICS} does not sum it up"


def _near(told: Any, own: Any) -> bool:
    return bool(told.dtype == own.dtype and told.shape == own.shape and np.allclose(told, own, rtol=_NEAR, atol=_NEAR))


def _wrong_calibration(path: Path, labels: Collection[str]) -> str:
    """Why a calibration is none of cells with some labels; empty if it is."""
    try:
        table = pq.read_table(path)
        if not all(pa.types.is_string(table.schema.field(name).type) for name in _TEXTS):
            return "its columns are not text"
        if not {*table["label"].to_pylist(), *table["predicted"].to_pylist()} <= {*labels}:
            return "its labels are not those of the cells"
        probability = table["probability"].to_numpy()
        if probability.dtype != np.float32 or not ((probability >= 0) & (probability <= 1)).all():
            return "its probabilities are none"
    except _FOUND as error:
        return f"it cannot be read ({type(error).__name__})"
    return ""
