"""Sampled cells of a query batch as the data that a model of scvi-tools is set up with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from scviaduct.errors import DataError
from scviaduct.families import MODALITY
from scviaduct.families.registered import own_categories, state_of, texts
from scviaduct.families.slots import BATCH, SAMPLE, covariate
from scviaduct.mapping.mapper import query_batch_key, query_sample_key

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from scviaduct.families import Family
    from scviaduct.mapping.batches import QueryBatch
    from scviaduct.mapping.sampling import Sample
    from scviaduct.references.package import Reference
    from scviaduct.references.saved.archive import SavedModel
    from scviaduct.values import Settings


@dataclass(frozen=True, slots=True)
class Laid:
    """Cells as a fit takes them.

    Attributes
    ----------
    data
        AnnData or MuData in the model's layout. Of every covariate in ``trained`` or ``averaged``, all cells have the
        reference's first category.
    trained
        Covariates whose vectors are fitted.
    averaged
        Those for which the mean of the reference's categories stands.
    given
        Slot to vector, where it is counted from the cells: mean and variance of their log library sizes.
    flags
        Name to one value a cell, shape ``(n_cells,)``: what a family's loss needs besides.
    """

    data: Any
    trained: tuple[str, ...]
    averaged: tuple[str, ...] = ()
    given: Mapping[str, torch.Tensor] = field(default_factory=dict)
    flags: Mapping[str, torch.Tensor] = field(default_factory=dict)


def laid_out(
    found: Family,
    saved: SavedModel,
    reference: Reference,
    settings: Settings,
    batch: QueryBatch,
    sample: Sample,
    background: Sequence[str] = (),
) -> Laid:
    """Lay out the sampled cells of a query batch.

    Parameters
    ----------
    found
        Family of the reference.
    saved
        Its model.
    reference, settings
        What maps, and how.
    batch
        The query batch.
    sample
        Of its cells.
    background
        ``column=value`` pairs that make a cell one of the background, for families that tell them apart.

    Raises
    ------
    DataError
        If the cells lack a continuous covariate that the model decodes with.
    """
    from anndata import AnnData

    columns = _Columns(reference, settings, batch, sample)
    frame = pd.DataFrame(columns.made(), index=[f"cell-{i}" for i in range(sample.n_cells)])
    if panel := panel_of(saved):
        frame[panel[0]] = panel[1]
    counts = sparse.csr_matrix((sample.data, sample.indices, sample.indptr), shape=(sample.n_cells, sample.n_genes))
    var = pd.DataFrame({MODALITY: list(reference.genes.modality)}, index=list(reference.names))
    flat = AnnData(counts, obs=frame, var=var)
    new = tuple(name for name, _ in batch.values)
    trained = found.trained(new)
    averaged = tuple(name for name in (*new, *columns.averaged) if name not in trained)
    registered = own_categories(saved.attr_dict["registry_"], flat, reference)
    flags = {"background": torch.as_tensor(_background(sample, background))} if found.needs.background else {}
    data = found.layout(saved, registered)
    return Laid(data, trained, averaged, _library(saved, counts[:, reference.span("rna")]), flags)


class _Columns:
    """obs columns that the model was set up with, for cells of one query batch."""

    def __init__(self, reference: Reference, settings: Settings, batch: QueryBatch, sample: Sample) -> None:
        self._reference, self._settings, self._sample = reference, settings, sample
        self._new = {name for name, _ in batch.values}
        self.averaged: list[str] = []

    def made(self) -> dict[str, Any]:
        """Column to values."""
        facts, n, made = self._reference, self._sample.n_cells, {}
        if facts.batch_key:
            column = query_batch_key(self._reference, self._settings)
            made[facts.batch_key] = self._categories(BATCH, column, facts.batch_categories)
        if facts.sample_key:
            column = query_sample_key(self._reference, self._settings)
            made[facts.sample_key] = self._categories(SAMPLE, column, facts.sample_categories)
        for key, known in facts.categorical_covariates.items():
            made[key] = self._categories(covariate(key), key, known)
        for key in facts.continuous_covariates:
            made[key] = self._numbers(key)
        if facts.size_factor_key:
            made[facts.size_factor_key] = self._numbers(facts.size_factor_key)
        if facts.labels_key and facts.labels_key not in made:
            # The query's own labels are never read: no loss of surgery depends on them.
            made[facts.labels_key] = [facts.unlabeled_category or facts.known_labels[0]] * n
        return made

    def _categories(self, name: str, column: str, known: Sequence[str]) -> list[str]:
        """Values of a covariate: the reference's own, or its first where the fit replaces that by something else."""
        first = [known[0]] * self._sample.n_cells
        if name in self._new:
            return first
        obs = self._sample.obs
        values: list[str] = obs[column].to_pylist() if column in obs.column_names else []
        if values and set(values) <= set(known):
            return values
        self.averaged.append(name)
        return first

    def _numbers(self, column: str) -> Any:
        obs = self._sample.obs
        if column not in obs.column_names or obs[column].null_count:
            raise DataError(
                f"The query has no value in obs column '{column}' for some cells, and the model decodes with it.",
                "Add it to the source's obs; without --surgery decoder it is not needed.",
            )
        return obs[column].to_numpy()


def panel_of(saved: SavedModel) -> tuple[str, str] | None:
    """Column of protein panels and its first value; None for a model without panels."""
    registry = saved.attr_dict["registry_"]
    column = registry.get("setup_args", {}).get("panel_key")
    return (column, texts(state_of(registry, "panel")["categorical_mapping"])[0]) if column else None


def _library(saved: SavedModel, counts: Any) -> dict[str, torch.Tensor]:
    """Mean and variance of the log library sizes, where the model has those of each batch."""
    if "library_log_means" not in saved.state_dict or not counts.shape[0]:
        return {}
    logs = np.log(np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1.0))
    return {
        "library_log_means": torch.tensor([logs.mean()], dtype=torch.float32),
        "library_log_vars": torch.tensor([logs.var()], dtype=torch.float32),
    }


def _background(sample: Sample, pairs: Sequence[str]) -> Any:
    """Which cells any ``column=value`` pair fits; bool, shape ``(n_cells,)``."""
    chosen = np.zeros(sample.n_cells, bool)
    for pair in pairs:
        column, _, value = pair.partition("=")
        chosen |= np.array([text == value for text in sample.obs[column].to_pylist()], bool)
    return chosen
