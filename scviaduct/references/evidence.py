"""What a reference carries besides its model: how sure its labels are, and its cells without their counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from scviaduct.references.calibration import Calibration, of_classifier, of_neighbors
from scviaduct.references.minify import write_minified
from scviaduct.references.saved.repair import read_saved
from scviaduct.references.template import encode_cells

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    from scviaduct.families import Encoded, Encoder, Facts, Family, Recipe
    from scviaduct.references.cells import TrainingCells

_BLOCK = 8192
_MOST = 200_000
"""Cells that calibration looks at; a seeded sample of more. Its error is then below 0.002."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Files for the package, and what its manifest says of them."""

    files: dict[str, Path] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)


def gather(
    folder: Path,
    model: Any,
    found: Family,
    read: TrainingCells,
    recipe: Recipe,
    held: npt.NDArray[np.bool_],
    why_not: str,
) -> Evidence:
    """Calibrate a trained model and minify its data.

    Parameters
    ----------
    folder
        Where the model is saved; files go here.
    model, found, read, recipe
        The model, its family, its cells with their true labels, and how it was trained.
    held
        bool, shape ``(n_cells,)``: cells whose labels it was not shown.
    why_not
        Why no labels were held out, where they should have been.
    """
    saved, _ = read_saved(folder)
    facts = found.facts(saved)
    evidence = Evidence()
    calibration, reason = None, why_not or ("" if recipe.labels_key else "there are no labels")
    if not reason:
        reason = "" if recipe.groups else "no column of groups is named: --batch-key or --calibrate-by"
        reason = "it was not asked for" if recipe.calibrate_by == "none" else reason
    if not reason:
        encoder = found.fold(model, facts, "cpu")
        calibration, reason = _calibrate(encoder, facts, read, recipe, held)
    if calibration is None:
        evidence.provenance["calibration"] = {"left_out": reason}
    else:
        calibration.write(folder / "calibration.parquet")
        evidence.files["calibration.parquet"] = folder / "calibration.parquet"
        evidence.provenance["calibration"] = {"by": recipe.groups, **calibration.summary()}
    path, reason = write_minified(model, facts, folder, with_counts=recipe.with_counts)
    if path is None:
        evidence.provenance["minified"] = {"left_out": reason}
    else:
        evidence.files[path.name] = path
        evidence.provenance["minified"] = {"file": path.name, "counts": recipe.with_counts}
    return evidence


def _calibrate(
    encoder: Encoder, facts: Facts, read: TrainingCells, recipe: Recipe, held: npt.NDArray[np.bool_]
) -> tuple[Calibration | None, str]:
    obs = read.cells.obs
    labels = obs[recipe.labels_key].astype(object)
    chosen = held if encoder.labels else (labels != recipe.unlabeled_category).to_numpy()
    rows = np.flatnonzero(chosen)
    if not len(rows):
        return None, "no cell has a label"
    if len(rows) > _MOST:
        rows = np.sort(np.random.default_rng(recipe.seed).choice(rows, _MOST, replace=False))
    names = [str(name) for name in obs.index[rows]]
    groups = obs[recipe.groups].astype(object).to_numpy()[rows]
    parts = [_encode(encoder, facts, read, rows[i : i + _BLOCK]) for i in range(0, len(rows), _BLOCK)]
    told = labels.to_numpy()[rows]
    if not encoder.labels:
        return of_neighbors(np.concatenate([part.mean for part in parts]), names, groups, list(told))
    probabilities = encoder.classify(np.concatenate([part.location for part in parts]))
    if probabilities is None:
        return None, "the model gives no labels"
    return of_classifier(probabilities, encoder.labels, names, groups, told), ""


def _encode(encoder: Encoder, facts: Facts, read: TrainingCells, rows: npt.NDArray[np.int64]) -> Encoded:
    return encode_cells(encoder, read.cells.X[rows], read.cells.obs.iloc[rows], facts)
