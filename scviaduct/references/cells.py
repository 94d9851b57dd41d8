"""The training cells of a reference: read from any source, checked, reduced to the features that it is trained on.

Cells are streamed up to three times: twice to choose features, once to read those. Memory is bounded by the counts of
the chosen features (8 bytes a count that is not zero, and half as much again while the blocks are joined), the obs
columns that the recipe names, one block of ``SHARD_CELLS`` cells, and what choosing genes takes. The counts can be left
on disk (:mod:`scviaduct.references.outofcore`).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa
from anndata import AnnData
from scipy import sparse

from scviaduct.errors import InputError
from scviaduct.families import MODALITY
from scviaduct.families import family as family_of
from scviaduct.families.registered import column_texts
from scviaduct.references.features import Features, choose_features, common_features
from scviaduct.references.outofcore import Place, Spool
from scviaduct.sources import open_source
from scviaduct.sources.counts import Rows, assemble

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from scviaduct.families import Family, Recipe
    from scviaduct.sources import Source
    from scviaduct.values import CellBlock, Scan, Shard

SHARD_CELLS = 16_384


@dataclass(frozen=True, slots=True)
class TrainingCells:
    """Cells to train on, and where they come from.

    Attributes
    ----------
    cells
        Flat: CSR float32 counts, ``var["modality"]``, and the obs columns that the recipe names.
    uri, version
        The source's pinned URI, and the version of its content.
    features
        What the columns are.
    """

    cells: AnnData
    uri: str
    version: str
    features: Features


def source_uri(source: str, recipe: Recipe) -> str:
    """The source with the layer that the recipe names."""
    joint = "&" if "?" in source else "?"
    return source if recipe.layer is None else f"{source}{joint}layer={recipe.layer}"


def read_cells(
    source: str, recipe: Recipe, features: Features | None = None, place: Place | None = None
) -> TrainingCells:
    """Read all cells of a source, with the features to train on and the obs columns that a recipe names.

    Parameters
    ----------
    source
        URI of the cells.
    recipe
        How to train.
    features
        Features to read, where they are known already; else they are chosen as the recipe says.
    place
        Where the counts go, if not into memory; what an earlier run wrote there is taken.

    Raises
    ------
    InputError
        If an obs column is missing or incomplete, a modality or a feature is absent, or counts are not counts.
    """
    place = place or Place()
    found = family_of(recipe.family)
    columns = list(recipe.columns)
    with open_source(source_uri(source, recipe)) as opened:
        scan = opened.scan(SHARD_CELLS, columns)
        check_columns(scan, recipe, opened.obs_columns())
        every = common_features(opened, scan.shards, found)
        if features is None:
            features = choose_features(every, recipe, lambda part: _blocks(opened, scan.shards, part, found, columns))
        else:
            _require(features, every)
        pinned, version = opened.uri, opened.version
        stream = _blocks(opened, scan.shards, features, found, columns)
        spool = Spool.of(place.folder, version, features, columns) if place.folder and place.mode != "no" else None
        if spool is not None and (spool.whole or place.on_disk(opened, scan, features, found)):
            if not spool.whole:
                spool.write(stream)
            return _spooled(spool, recipe, pinned, version, features)
        blocks = list(stream)
    obs = _obs([(block.shard.dataset_id, block.obs) for block in blocks], columns)
    rows = assemble(Rows(block.indptr, block.indices, block.data) for block in blocks)
    blocks.clear()
    counts = sparse.csr_matrix((rows.data, rows.indices, rows.indptr), shape=(len(obs), len(features)))
    return _cells(counts, obs, recipe, pinned, version, features)


def spooled_cells(folder: Path, recipe: Recipe, uri: str, version: str, features: Features) -> TrainingCells:
    """Cells whose counts :func:`read_cells` left on disk.

    Parameters
    ----------
    folder
        Of the counts.
    recipe
        How to train.
    uri, version, features
        As the cells had them that were read.
    """
    return _spooled(Spool.of(folder, version, features, list(recipe.columns)), recipe, uri, version, features)


def _spooled(spool: Spool, recipe: Recipe, uri: str, version: str, features: Features) -> TrainingCells:
    return _cells(spool.counts(), _obs(spool.obs(), list(recipe.columns)), recipe, uri, version, features)


def _cells(
    counts: sparse.csr_matrix, obs: pd.DataFrame, recipe: Recipe, uri: str, version: str, features: Features
) -> TrainingCells:
    var = pd.DataFrame(dict(features.others) | {MODALITY: features.modality}, index=list(features.names))
    with warnings.catch_warnings():
        # A protein may be called as its gene is; they are told apart by modality.
        warnings.filterwarnings("ignore", message="Variable names are not unique")
        cells = AnnData(counts, obs=obs, var=var)
    return TrainingCells(_with_labels(cells, recipe), uri, version, features)


def _blocks(
    opened: Source, shards: Sequence[Shard], features: Features, found: Family, columns: Sequence[str]
) -> Iterator[CellBlock]:
    """Stream the cells, their counts checked; files share a target as long as their features are the same."""
    uri, target = "", None
    for shard in shards:
        if target is None or shard.uri != uri:
            uri, target = shard.uri, features.target(opened.genes(shard), found)
        block = opened.read(shard, target, len(features), columns)
        _check_counts(block, features)
        yield block


def _obs(parts: Sequence[tuple[str, pa.Table]], columns: Sequence[str]) -> pd.DataFrame:
    obs: pd.DataFrame = pa.concat_tables([part for _, part in parts], promote_options="permissive").to_pandas()
    names = [f"{dataset}:{i}" for dataset, part in parts for i in part["observation_id"].to_pylist()]
    obs.index = pd.Index(_unique(names))
    kept: pd.DataFrame = obs[list(columns)].copy()
    return kept


def _require(features: Features, every: Features) -> None:
    """Refuse a source that lacks features which were chosen elsewhere."""
    there = set(zip(every.modality, every.names, strict=True))
    lost = [name for key, name in zip(features.modality, features.names, strict=True) if (key, name) not in there]
    if lost:
        told = (
            f"{len(lost):,} of the {len(features):,} features to train on are not in the source: {', '.join(lost[:5])}"
        )
        raise InputError(f"{told}.", "Name a source that has them, or train without --from.")


def _unique(names: list[str]) -> list[str]:
    """Cell names that occur in several files get a number, as AnnData would ask for."""
    taken, seen = set(names), dict[str, int]()
    found = []
    for name in names:
        count = seen.get(name, 0)
        own = name
        while count and own in taken:  # a name that some other cell has from the start is passed over
            own, count = f"{name}-{count}", count + 1
        taken.add(own)
        seen[name] = max(count, 1)
        found.append(own)
    return found


def check_columns(scan: Scan, recipe: Recipe, available: Sequence[str]) -> None:
    """Refuse obs columns that training would fail on.

    Parameters
    ----------
    scan
        Of the whole source, with a summary of every column that the recipe names.
    recipe
        How to train.
    available
        Names of the obs columns.

    Raises
    ------
    InputError
        If one is missing, incomplete, of the wrong type, or lacks the values that the recipe names.
    """
    for column, place in scan.missing.items():
        close = get_close_matches(column, available, n=3) or sorted(available)[:8]
        raise InputError(f"obs column '{column}' is not in {place}.", f"There are: {', '.join(close)}.")
    if not scan.cells:
        raise InputError("The source selects no cell to train on.", "Widen its filter.")
    for column in recipe.columns:
        summary = scan.columns[column]
        if summary.nulls and column != recipe.labels_key:
            remedy = f"Fill '{column}', or filter those cells out: filter={column} != 'unknown'."
            raise InputError(f"{summary.nulls:,} of {scan.cells:,} cells have no value in '{column}'.", remedy)
        numeric = column in (*recipe.continuous_covariates, recipe.size_factor_key)
        if numeric and summary.type not in ("int64", "double"):
            remedy = "Name it with --categorical-covariates, or a column of numbers."
            raise InputError(f"'{column}' holds {summary.type} values, and numbers are needed.", remedy)
    if recipe.labels_key:
        labels = [value for value in scan.columns[recipe.labels_key].counts if value != recipe.unlabeled_category]
        if family_of(recipe.family).needs.labels == "required" and len(labels) < 2:
            seen = f"'{recipe.labels_key}' has {len(labels)} labels besides '{recipe.unlabeled_category}'"
            raise InputError(f"{seen}; a SCANVI needs two.", "Name another --labels-key or --unlabeled-category.")


def _check_counts(block: CellBlock, features: Features) -> None:
    wrong = np.flatnonzero(~np.isfinite(block.data) | (block.data < 0) | (block.data != np.rint(block.data)))
    if len(wrong):
        at = int(wrong[0])
        cell = block.obs["observation_id"][int(np.searchsorted(block.indptr, at, side="right")) - 1].as_py()
        gene = features.names[block.indices[at]]
        told = f"Cell '{cell}' has {block.data[at]:g} of gene '{gene}', which is not a count."
        raise InputError(told, "Train on raw counts: name where they are with --layer, e.g. --layer counts.")


def _with_labels(cells: AnnData, recipe: Recipe) -> AnnData:
    """Text columns as categories; a missing label is the unlabelled category."""
    for column in cells.obs:
        if not pd.api.types.is_numeric_dtype(cells.obs[column]) or column not in recipe.continuous_covariates:
            if column == recipe.size_factor_key:
                continue
            values = cells.obs[column].astype(object)
            if column == recipe.labels_key:
                values = values.where(values.notna(), recipe.unlabeled_category)
            cells.obs[column] = pd.Categorical(column_texts(values))
    return cells
