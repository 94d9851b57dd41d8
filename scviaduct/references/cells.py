"""The training cells of a reference: read from any source, checked, reduced to variable genes."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa
from anndata import AnnData
from scipy import sparse

from scviaduct.errors import InputError
from scviaduct.families.vae import quiet
from scviaduct.sources import open_source

_SPANS = (0.3, 0.6, 1.0)
"""Shares of the genes that the local regression of variance on mean looks at: scanpy's own, then wider ones."""

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scviaduct.references.training import Recipe
    from scviaduct.sources import Source
    from scviaduct.values import CellBlock, IntArray, Scan, Shard

_SHARD_CELLS = 16_384


def read_cells(source: str, recipe: Recipe) -> tuple[AnnData, str, str]:
    """Read all cells of a source, with the obs columns that a recipe names.

    Returns
    -------
    tuple
        The cells (CSR float32; genes are those that every file has, in the first one's order), the pinned URI and the
        version of the source.

    Raises
    ------
    InputError
        If an obs column is missing or incomplete, or counts are not counts.
    """
    joint = "&" if "?" in source else "?"
    uri = source if recipe.layer is None else f"{source}{joint}layer={recipe.layer}"
    columns = _columns(recipe)
    with open_source(uri) as opened:
        scan = opened.scan(_SHARD_CELLS, columns)
        _check_columns(scan, recipe, opened.obs_columns())
        genes, others = _genes(opened, scan.shards)
        blocks = [opened.read(shard, _target(opened, shard, genes), len(genes), columns) for shard in scan.shards]
        for block in blocks:
            _check_counts(block, genes)
        pinned, version = opened.uri, opened.version
    counts = sparse.vstack(
        [sparse.csr_matrix((b.data, b.indices, b.indptr), shape=(b.n_cells, len(genes))) for b in blocks], format="csr"
    )
    obs = pa.concat_tables([block.obs for block in blocks], promote_options="permissive").to_pandas()
    obs.index = pd.Index(
        _unique([f"{b.shard.dataset_id}:{i}" for b in blocks for i in b.obs["observation_id"].to_pylist()])
    )
    cells = AnnData(counts, obs=obs[columns].copy(), var=pd.DataFrame(others, index=genes))
    return _with_labels(cells, recipe), pinned, version


def _unique(names: list[str]) -> list[str]:
    """Cell names that occur in several files get a number, as AnnData would ask for."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        count = seen.get(name, 0)
        found.append(f"{name}-{count}" if count else name)
        seen[name] = count + 1
    return found


def _columns(recipe: Recipe) -> list[str]:
    named = (recipe.labels_key, recipe.batch_key, recipe.size_factor_key)
    wanted = (*named, *recipe.categorical_covariates, *recipe.continuous_covariates)
    return list(dict.fromkeys(column for column in wanted if column))


def _check_columns(scan: Scan, recipe: Recipe, available: Sequence[str]) -> None:
    for column, place in scan.missing.items():
        close = get_close_matches(column, available, n=3) or sorted(available)[:8]
        raise InputError(f"obs column '{column}' is not in {place}.", f"There are: {', '.join(close)}.")
    if not scan.cells:
        raise InputError("The source selects no cell to train on.", "Widen its filter.")
    for column in _columns(recipe):
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
        if recipe.family.upper() == "SCANVI" and len(labels) < 2:
            seen = f"'{recipe.labels_key}' has {len(labels)} labels besides '{recipe.unlabeled_category}'"
            raise InputError(f"{seen}; a SCANVI needs two.", "Name another --labels-key or --unlabeled-category.")


def _genes(source: Source, shards: Sequence[Shard]) -> tuple[list[str], dict[str, list[str]]]:
    """Genes that every file has, in the first one's order, and their other identifiers there."""
    tables = [source.genes(shard) for shard in {shard.uri: shard for shard in shards}.values()]
    first = tables[0].columns
    common = set(first["index"]).intersection(*(table.columns["index"] for table in tables[1:])) - {""}
    position: dict[str, int] = {}
    for i, name in enumerate(first["index"]):
        if name in common:
            position.setdefault(name, i)
    if not position:
        raise InputError(
            "The files of the source have no gene in common.", "Give them the same identifiers in var_names."
        )
    others = {key: [values[i] for i in position.values()] for key, values in first.items() if key != "index"}
    return list(position), others


def _target(source: Source, shard: Shard, genes: Sequence[str]) -> IntArray:
    names = pd.Index(source.genes(shard).columns["index"])
    return pd.Index(genes).get_indexer(names).astype(np.int32)


def _check_counts(block: CellBlock, genes: Sequence[str]) -> None:
    wrong = np.flatnonzero(~np.isfinite(block.data) | (block.data < 0) | (block.data != np.rint(block.data)))
    if len(wrong):
        at = int(wrong[0])
        cell = block.obs["observation_id"][int(np.searchsorted(block.indptr, at, side="right")) - 1].as_py()
        told = f"Cell '{cell}' has {block.data[at]:g} of gene '{genes[block.indices[at]]}', which is not a count."
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
            cells.obs[column] = pd.Categorical(values.astype(str))
    return cells


def select_genes(cells: AnnData, recipe: Recipe) -> AnnData:
    """Keep the most variable genes (Seurat v3, Stuart et al., Cell 2019), ranked within batches.

    The method fits variance against mean by local regression, which is singular where few genes share a mean, as in a
    panel or a small batch: it is then fitted over wider neighbourhoods.

    Raises
    ------
    InputError
        If the method fails on these cells all the same, as it does on very few or very even ones.
    """
    if not recipe.genes or recipe.genes >= cells.n_vars:
        return cells
    import scanpy as sc

    singular: ValueError | None = None
    for span in _SPANS:
        options = {"n_top_genes": recipe.genes, "batch_key": recipe.batch_key, "span": span}
        try:
            with quiet():
                found = sc.pp.highly_variable_genes(cells, flavor="seurat_v3", inplace=False, **options)
        except ValueError as error:
            singular = error
        else:
            return cells[:, found["highly_variable"].to_numpy()].copy()
    told = f"Variable genes cannot be chosen among {cells.n_vars:,} genes of {cells.n_obs:,} cells."
    raise InputError(told, "Train on all genes: --genes 0.") from singular
