"""What analyses of several modalities share: which cells were measured in one, and comparing groups of such cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from scviaduct.analysis.using import BATCH, correcting
from scviaduct.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from scviaduct.analysis.base import Cells
    from scviaduct.families.base import Facts

    Float64Array = npt.NDArray[np.float64]
    BoolArray = npt.NDArray[np.bool_]

"""obs column in which MULTIVI numbers the cells that it is set up with; those that come later need have none."""
_CHANGE = ("proba_de", "is_de", "bayes_factor", "lfc_mean", "lfc_median", "lfc_std")
_HIGHER = ("proba_higher", "bayes_factor")
_RAW = ("raw_mean", "raw_normalized_mean", "non_zeros_proportion", "scale")


def features_of(facts: Facts, modality: str) -> tuple[str, ...]:
    """Names of a reference's features of one modality, in its order; none of a modality that it lacks."""
    told = facts.genes.modality
    return tuple(name for name, own in zip(facts.names, told, strict=True) if own == modality)


def require_modality(facts: Facts, modality: str, what: str) -> None:
    """Refuse a reference without a modality.

    Parameters
    ----------
    facts
        Of the reference.
    modality
        Canonical name.
    what
        Its features in words, as ``peaks``.

    Raises
    ------
    InputError
        If it has no feature of it.
    """
    if modality not in facts.genes.modality:
        raise InputError(
            f"The reference has no {what}: it was trained on {', '.join(facts.genes.modalities)} alone.",
            f"Name a reference that was trained on {what}, too.",
        )


def counts_of(cells: Cells, field: str) -> sparse.csr_matrix:
    """Counts of one modality, shape ``(n_cells, n_features)``, of registered cells.

    Parameters
    ----------
    cells
        Registered.
    field
        Of scvi-tools' registry: ``X``, ``atac`` or ``proteins``.
    """
    found = cells.model.get_from_registry(cells.data, field)
    return sparse.csr_matrix(found.to_numpy() if isinstance(found, pd.DataFrame) else found)


def measured_in(counts: sparse.csr_matrix) -> BoolArray:
    """Which cells have a count, shape ``(n_cells,)``: a modality without any was not measured in the cell."""
    there: BoolArray = np.asarray(counts.sum(axis=1)).ravel() > 0
    return there


def arguments(cells: Cells, first: BoolArray, options: Any) -> dict[str, Any]:
    """What scvi-tools' comparisons of two groups of cells are told alike."""
    batches = correcting(cells, options)
    return {
        "idx1": first,
        "idx2": ~first,
        "mode": options.mode,
        "delta": options.delta,
        "batch_size": BATCH,
        "batch_correction": options.batch_correction,
        "batchid1": batches,
        "batchid2": batches,
        "fdr_target": options.fdr,
        "silent": True,
        "n_samples_overall": options.samples,
    }


def expression_differences(cells: Cells, first: BoolArray, options: Any, raw: pd.DataFrame) -> pd.DataFrame:
    """scvi-tools' ``differential_expression`` of two groups of cells, with raw figures of measured cells alone.

    Its own figures count a cell in which a modality was not measured as one without expression, and divide by the
    counts of the cell, which are then zero.

    Parameters
    ----------
    cells
        Registered, of both groups.
    first
        bool, shape ``(n_cells,)``: cells of the first group.
    options
        As :class:`~scviaduct.analysis.expression.DifferenceOptions` has them.
    raw
        By feature, as scvi-tools has them in its table: what :func:`raw_figures` gave for them.

    Returns
    -------
    DataFrame
        By feature, without what is the same in every row.
    """
    told = arguments(cells, first, options)
    found = cells.model.differential_expression(cells.data, **told, all_stats=False)
    found = found.rename(columns={f"is_de_fdr_{options.fdr}": "is_de", "proba_m1": "proba_higher"})
    table: pd.DataFrame = found.join(raw)
    kept = _CHANGE if options.mode == "change" else _HIGHER
    return table[[*kept, *(f"{name}{side}" for name in _RAW for side in (1, 2))]]


def raw_figures(counts: sparse.csr_matrix, first: BoolArray, *, scaled: bool = True) -> dict[str, Float64Array]:
    """What two groups of cells have of each feature, of those cells that were measured; NaN for a group of none.

    Parameters
    ----------
    counts
        Of one modality, shape ``(n_cells, n_features)``.
    first
        bool, shape ``(n_cells,)``.
    scaled
        Whether counts at 10,000 a cell mean anything; NaN if not, as for proteins.

    Returns
    -------
    dict
        As scvi-tools names them, 1 for the first group and 2 for the others: mean counts, those at 10,000 a cell, and
        the share of cells with a count; each of shape ``(n_features,)``.
    """
    figures: dict[str, Float64Array] = {}
    n_features, there = counts.shape[1], measured_in(counts)
    for side, group in ((1, first & there), (2, ~first & there)):
        rows, nothing = counts[group].astype(np.float64), np.full(n_features, np.nan)
        n_cells = rows.shape[0]
        scale = 1e4 / np.asarray(rows.sum(axis=1)).ravel()
        figures |= {
            f"raw_mean{side}": np.asarray(rows.mean(axis=0)).ravel() if n_cells else nothing,
            f"raw_normalized_mean{side}": rows.T @ scale / n_cells if n_cells and scaled else nothing,
            f"non_zeros_proportion{side}": np.asarray((rows > 0).mean(axis=0)).ravel() if n_cells else nothing,
        }
    return figures


def ranked(table: pd.DataFrame, score: str, size: str, name: str) -> pd.DataFrame:
    """Rows from the surest difference to the least sure, of those the largest first, in an order that ties keep."""
    order = np.lexsort((table[name], -table[size].abs(), -table[score]))
    return table.iloc[order].reset_index(drop=True)


def figures_of(first: BoolArray, measured: Mapping[str, BoolArray]) -> dict[str, dict[str, int]]:
    """How many cells of each group were compared, and in how many each modality was measured."""
    groups = {"first": first, "against": ~first}
    facts = {"cells": {group: int(own.sum()) for group, own in groups.items()}}
    for modality, there in measured.items():
        facts[f"cells_with_{modality}"] = {group: int((own & there).sum()) for group, own in groups.items()}
    return facts


def positions(names: Sequence[str], wanted: Sequence[str]) -> npt.NDArray[np.int64]:
    """Where the wanted names lie, in their order; all of them if none is."""
    if not wanted:
        return np.arange(len(names))
    position = {name: i for i, name in enumerate(names)}
    return np.array([position[name] for name in wanted], np.int64)
