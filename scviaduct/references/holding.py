"""Labels that a classifier is not shown in training, so that it can be asked for them afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scviaduct.references.calibration import hold_out

if TYPE_CHECKING:
    import pandas as pd

    from scviaduct.families import Recipe
    from scviaduct.references.cells import TrainingCells

_MOST_HELD = 0.25
"""Share of the labelled cells whose labels a classifier may lose to calibration that nobody asked for."""


@dataclass(frozen=True, slots=True)
class Held:
    """Labels that a classifier is not shown.

    Attributes
    ----------
    labels
        All of them, as they were read; None without labels.
    cells
        bool, shape ``(n_cells,)``.
    why_not
        Why there are none, where calibration needs some.
    """

    labels: pd.Series | None
    cells: np.ndarray
    why_not: str = ""

    @classmethod
    def none(cls, read: TrainingCells) -> Held:
        """No labels are held out."""
        return cls(None, np.zeros(read.cells.n_obs, np.bool_))

    @classmethod
    def of(cls, read: TrainingCells, recipe: Recipe) -> Held:
        """Take the labels of some groups out of the cells, as the recipe has it."""
        obs, key = read.cells.obs, str(recipe.labels_key)
        if not recipe.groups:
            return cls.none(read)
        labels = obs[key].astype(object)
        values, groups = labels.to_numpy(), obs[recipe.groups].astype(object).to_numpy()
        cells, why_not = hold_out(groups, values, recipe.unlabeled_category, recipe.seed)
        share = cells.sum() / max((values != recipe.unlabeled_category).sum(), 1)
        if recipe.calibrate_by is None and share > _MOST_HELD:
            told = f"a group of '{recipe.groups}' holds {share:.0%} of the labels"
            return cls(None, np.zeros_like(cells), f"{told}; --calibrate-by {recipe.groups} holds one out all the same")
        if not why_not:
            obs[key] = labels.where(~cells, recipe.unlabeled_category).astype("category")
        return cls(labels, cells, why_not)

    def give_back(self, read: TrainingCells, recipe: Recipe) -> None:
        """Put the true labels back."""
        if self.labels is not None:
            read.cells.obs[recipe.labels_key] = self.labels.astype("category")
