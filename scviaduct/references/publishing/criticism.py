"""How well a model's samples look like real counts: posterior predictive checks of ``scvi.criticism``.

They need counts, which a package seldom has: cells of a source are read through the reference's genes, at most
``CELLS`` of them, spread over its shards. scvi-tools draws such samples from SCVI, SCANVI and TOTALVI; of PEAKVI,
MULTIVI, MRVI and ContrastiveVI it does not. Its test of differential expression is left out: it asks for Leiden
clusters, which need another package.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
from anndata import AnnData
from scipy import sparse
from scipy.stats import pearsonr, spearmanr

from scviaduct.errors import InputError
from scviaduct.families import MODALITY, family
from scviaduct.families.vae import quiet
from scviaduct.mapping.reading import read_block
from scviaduct.references.saved.portable import read_model
from scviaduct.sources import open_source

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from scviaduct.references.package import Reference
    from scviaduct.values import CellBlock

CELLS = 1000
"""Cells that are looked at, at most: 8 bytes times genes and samples each, 80 MB for 2,000 genes."""
_SAMPLES = 5
_SHARDS = 16
_SHARD_CELLS = 16_384
_LEAST = 3
SAMPLED = ("SCVI", "SCANVI", "TOTALVI")
"""Families of which scvi-tools draws posterior predictive samples."""
_FIGURES = {
    "mae": "Mean Absolute Error",
    "pearson": "Pearson Correlation",
    "spearman": "Spearman Correlation",
    "r2": "R²",
}
LEFT_OUT = "Not computed: it needs clusters by Leiden, which scviaduct does not depend on."


@dataclass(frozen=True, slots=True)
class Criticism:
    """Figures of a posterior predictive check.

    Attributes
    ----------
    reason
        Why there are none; empty if there are.
    cells, samples
        Cells looked at, and samples drawn of each.
    figures
        ``cell_wise_cv`` and ``gene_wise_cv`` to ``mae``, ``pearson``, ``spearman`` and ``r2`` of the model's
        coefficients of variation against those of the counts.
    """

    reason: str = ""
    cells: int = 0
    samples: int = 0
    figures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def metrics(self) -> dict[str, Any]:
        """As ``metrics.json``: the tables that scvi-hub shows, and the numbers under ``scviaduct``."""
        tables: dict[str, Any] = {name: _table(told) for name, told in self.figures.items()}
        own = {"cells": self.cells, "samples": self.samples, **{name: dict(v) for name, v in self.figures.items()}}
        return tables | {"diff_exp": LEFT_OUT, "scviaduct": own}


def _table(told: Mapping[str, float]) -> str:
    rows = [f"| {title} | {told[name]:.2f} |" for name, title in _FIGURES.items()]
    return "\n".join(["| Metric | Value |", "| --- | --- |", *rows])


def criticise(reference: Reference, source: str) -> Criticism:
    """Compare a model's samples with the counts of a source.

    Parameters
    ----------
    reference
        The package.
    source
        URI of cells with the obs columns that the model reads, of batches that it knows.

    Raises
    ------
    InputError
        If the source selects no cell, lacks a column, or has a value that the model does not know.
    """
    reason = _why_not(reference)
    return Criticism(reason) if reason else check(reference, _read(reference, source))


def criticise_cells(reference: Reference, data: Any) -> Criticism:
    """The same of the minified cells of a package that kept their counts.

    Parameters
    ----------
    reference
        The package.
    data
        Its minified cells, in the model's layout.
    """
    reason = _why_not(reference)
    if reason:
        return Criticism(reason)
    flat = family(reference.family).flatten(read_model(reference.path), data)
    if flat is None:
        return Criticism("the package's cells lack the layer that the model was trained on")
    rows = np.sort(np.random.default_rng(0).permutation(flat.n_obs)[:CELLS])
    own = AnnData(flat.X[rows], obs=flat.obs.iloc[rows], var=flat.var)
    return check(reference, own)


def _why_not(reference: Reference) -> str:
    if reference.family in SAMPLED:
        return ""
    return f"scvi-tools draws no posterior predictive samples of a {reference.family}"


def check(reference: Reference, cells: AnnData) -> Criticism:
    """Compare a model's samples with flat cells of its own genes."""
    from scvi.criticism import PosteriorPredictiveCheck

    saved, found = read_model(reference.path), family(reference.family)
    with quiet():
        model = found.instantiate(saved, cells)
        model.is_trained_ = True
        rna = saved.attr_dict["registry_"]["setup_args"].get("modalities") or {}
        try:
            checked = PosteriorPredictiveCheck(
                model.adata,
                {"model": model},
                count_layer_key=reference.layer or None,
                n_samples=_SAMPLES,
                modality=rna.get("rna_layer", "rna"),
            )
        except ValueError as error:  # TOTALVI samples from a negative binomial alone
            return Criticism(f"scvi-tools draws no samples of this {reference.family} ({error})")
        checked.coefficient_of_variation("features")
        checked.coefficient_of_variation("cells")
    names = {"cell_wise_cv": "cv_cell", "gene_wise_cv": "cv_gene"}
    figures = {name: _figures(checked.metrics[key]) for name, key in names.items()}
    if any(told is None for told in figures.values()):
        return Criticism(f"{cells.n_obs:,} cells have too few counts to compare")
    return Criticism("", cells.n_obs, _SAMPLES, {name: told for name, told in figures.items() if told})


def _figures(told: pd.DataFrame) -> dict[str, float] | None:
    """Agreement of two columns; what has no count in any sample has no coefficient of variation and is left out."""
    model, raw = (told[name].to_numpy(np.float64) for name in ("model", "Raw"))
    known = np.isfinite(model) & np.isfinite(raw)
    model, raw = model[known], raw[known]
    if len(raw) < _LEAST or np.ptp(model) == 0 or np.ptp(raw) == 0:
        return None
    values = {
        "mae": np.abs(model - raw).mean(),
        "pearson": pearsonr(model, raw)[0],
        "spearman": spearmanr(model, raw)[0],
        # As scvi-tools reports it: the model's coefficients stand for the truth.
        "r2": 1 - np.square(model - raw).sum() / np.square(model - model.mean()).sum(),
    }
    return {name: round(float(value), 4) for name, value in values.items()}


def _read(reference: Reference, source: str) -> AnnData:
    """A bounded sample of a source's cells, in the reference's genes."""
    needed = {reference.batch_key: reference.batch_categories, **reference.categorical_covariates}
    columns = [name for name in (*needed, *reference.continuous_covariates, reference.size_factor_key) if name]
    with open_source(source) as opened:
        there = opened.obs_columns()
        absent = next((name for name in columns if name not in there), None)
        if absent is not None:
            told = f"--criticise {source}: there is no obs column '{absent}', which the model reads"
            raise InputError(f"{told}.", "Name a source of cells like those that it was trained on.")
        shards = opened.scan(_SHARD_CELLS, ()).shards
        if not shards:
            raise InputError(f"--criticise {source}: it selects no cell.", "Widen its filter.")
        chosen = [shards[i * len(shards) // min(_SHARDS, len(shards))] for i in range(min(_SHARDS, len(shards)))]
        blocks = [read_block(shard, reference, columns, max(CELLS // len(chosen), 1)) for shard in chosen]
    cells = _joined(blocks, reference, columns)
    for column, known in needed.items():
        strange = sorted({*cells.obs[column]} - {*known}) if column else []
        if strange:
            told = f"--criticise {source}: '{strange[0]}' in '{column}' is not one that the model was trained on"
            raise InputError(f"{told}.", f"Filter such cells out, e.g. filter={column} == '{known[0]}'.")
    if reference.labels_key and reference.labels_key not in cells.obs:
        known = (reference.unlabeled_category, *reference.known_labels)
        cells.obs[reference.labels_key] = next(label for label in known if label)  # sampling does not read it
    return cells


def _joined(blocks: Sequence[CellBlock], reference: Reference, columns: Sequence[str]) -> AnnData:
    parts = [sparse.csr_matrix((b.data, b.indices, b.indptr), shape=(b.n_cells, len(reference.genes))) for b in blocks]
    obs = pa.concat_tables([block.obs for block in blocks], promote_options="permissive").to_pandas()[list(columns)]
    obs.index = pd.Index([str(i) for i in range(len(obs))])
    for name in columns:
        if name not in (*reference.continuous_covariates, reference.size_factor_key):
            obs[name] = obs[name].astype(str)
    counts: npt.NDArray[Any] | sparse.csr_matrix = sparse.vstack(parts, format="csr", dtype=np.float32)
    var = pd.DataFrame({MODALITY: list(reference.genes.modality)}, index=list(reference.names))
    with quiet():  # a protein may be called like its gene
        return AnnData(counts, obs=obs, var=var)
