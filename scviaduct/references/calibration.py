"""How sure a reference's labels are, measured on groups of its own cells (batches, donors) that were held out.

A reference without a classifier labels by its neighbours: every group's cells are labelled by those of the others
(leave one group out). A classifier is trained without the labels of some groups, and asked for them afterwards; the
cells themselves stay in training, as an unlabelled query's cells would under surgery.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scviaduct.mapping.labels import Certainty, NeighborVote

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt

    from scviaduct.values import FloatArray

NEIGHBORS = 15
_BINS = 15
_SHARE = 0.1
"""Share of the groups whose labels a classifier is not shown; at least one."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Labels of held-out cells, a row a cell.

    Attributes
    ----------
    observation_id
        Name of the cell, as in ``latents.parquet``.
    group, label, predicted
        Its batch or donor, the label it has, and the one it was given.
    probability
        float32, shape ``(n_cells,)``; of the label it was given.
    method
        ``neighbors`` or ``classifier``.
    """

    observation_id: Sequence[str]
    group: Sequence[str]
    label: Sequence[str]
    predicted: Sequence[str]
    probability: FloatArray
    method: str

    def write(self, path: Path) -> None:
        """Write as parquet."""
        columns = {
            name: pa.array(getattr(self, name), pa.string())
            for name in ("observation_id", "group", "label", "predicted")
        }
        columns["probability"] = pa.array(self.probability, pa.float32())
        dictionary = ["group", "label", "predicted"]
        pq.write_table(pa.table(columns), path, compression="zstd", use_dictionary=dictionary)

    def summary(self) -> dict[str, Any]:
        """Cells, groups, accuracy and expected calibration error, for a manifest."""
        right = np.array(self.label, object) == np.array(self.predicted, object)
        return {
            "method": self.method,
            "cells": len(right),
            "groups": sorted(set(self.group)),
            "accuracy": round(float(right.mean()), 4),
            "ece": round(expected_error(self.probability, right), 4),
            "bins": _BINS,
        }


def expected_error(probability: FloatArray, right: npt.NDArray[np.bool_], bins: int = _BINS) -> float:
    """Expected calibration error (Guo et al., ICML 2017): mean gap between probability and accuracy over equal bins.

    Parameters
    ----------
    probability
        Shape ``(n_cells,)``, of the label that was given.
    right
        bool, same shape.
    bins
        Number of equal intervals of probability.
    """
    at = np.minimum((np.asarray(probability, np.float64) * bins).astype(np.int64), bins - 1)
    cells = np.bincount(at, minlength=bins)
    gap = np.bincount(at, probability, bins) - np.bincount(at, right, bins)
    return float(np.abs(gap).sum() / max(cells.sum(), 1))


def hold_out(
    groups: npt.NDArray[np.object_], labels: npt.NDArray[np.object_], unlabeled: str, seed: int
) -> tuple[npt.NDArray[np.bool_], str]:
    """Choose the groups whose labels a classifier is not shown: a tenth of them, so that every label stays covered.

    Parameters
    ----------
    groups, labels
        One per cell.
    unlabeled
        Label that means none.
    seed
        Of the order in which groups are tried.

    Returns
    -------
    tuple
        bool of shape ``(n_cells,)``, and why there is nothing to hold out, if so.
    """
    labelled = labels != unlabeled
    none = np.zeros(len(groups), np.bool_)
    names = np.unique(groups[labelled].astype(str))
    if len(names) < 2:
        return none, f"only {len(names)} group has labels"
    wanted, held = max(1, round(_SHARE * len(names))), none
    every = set(labels[labelled])
    chosen: list[str] = []
    for name in np.random.default_rng(seed).permutation(names):
        tried = held | ((groups == name) & labelled)
        if set(labels[labelled & ~tried]) == every:
            held = tried
            chosen.append(str(name))
        if len(chosen) == wanted:
            break
    if not chosen:
        return none, "every group holds all cells of some label"
    return held, ""


def of_neighbors(
    latent: FloatArray, names: Sequence[str], groups: npt.NDArray[np.object_], labels: Sequence[str | None]
) -> tuple[Calibration | None, str]:
    """Label each group's cells by the nearest labelled cells of all others.

    Parameters
    ----------
    latent
        float32, shape ``(n_cells, n_latent)``.
    names, groups, labels
        One per cell; None for a cell without a label.

    Returns
    -------
    tuple
        The calibration, or None and why there is none.
    """
    labelled = np.array([label is not None for label in labels], np.bool_)
    told = np.array(labels, object)
    parts: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.object_], FloatArray]] = []
    for group in np.unique(groups[labelled].astype(str)):
        mine = np.flatnonzero((groups == group) & labelled)
        others = (groups != group) & labelled
        if not others.any():
            return None, "only 1 group has labels"
        vote = NeighborVote(latent[others], list(told[others]), NEIGHBORS)
        certainty = Certainty.of(vote.probabilities(latent[mine]))
        parts.append((mine, np.array(vote.labels, object)[certainty.label], certainty.probability))
    if not parts:
        return None, "no cell has a label"
    cells = np.concatenate([mine for mine, _, _ in parts])
    order = np.argsort(cells)
    predicted = np.concatenate([given for _, given, _ in parts])[order]
    probability = np.concatenate([sure for _, _, sure in parts])[order]
    rows = cells[order]
    held = [names[i] for i in rows], [*groups[rows]], [*told[rows]]
    found = Calibration(*held, [*predicted], probability, "neighbors")
    return found, ""


def of_classifier(
    probabilities: FloatArray,
    known: Sequence[str],
    names: Sequence[str],
    groups: npt.NDArray[np.object_],
    labels: npt.NDArray[np.object_],
) -> Calibration:
    """What a classifier says of the cells whose labels it was not shown.

    Parameters
    ----------
    probabilities
        Shape ``(n_cells, n_labels)``, of the held-out cells alone.
    known
        Labels of its columns.
    names, groups, labels
        One per held-out cell.
    """
    certainty = Certainty.of(probabilities)
    predicted = np.array(known, object)[certainty.label]
    return Calibration(list(names), [*groups], [*labels], [*predicted], certainty.probability, "classifier")
