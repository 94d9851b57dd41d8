"""What PEAKVI is asked of peaks: accessibility, and differential accessibility, by scvi-tools' own methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, override

import numpy as np

from scviaduct.analysis.base import Analysis, Comparison, Finished, Output, Part, Shape
from scviaduct.analysis.expression import DifferenceOptions
from scviaduct.analysis.using import (
    BATCH,
    correcting,
    in_order,
    own_batches,
    pieces,
    registered,
    require_batches,
    require_both,
    require_comparison,
    require_known,
    seeded,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt
    import pandas as pd

    from scviaduct.analysis.base import Cells
    from scviaduct.families.base import Facts


@dataclass(frozen=True, slots=True)
class AccessibilityOptions:
    """What PEAKVI's accessibility is told.

    Attributes
    ----------
    peaks
        Of the reference, in the order of the matrix's columns; empty for all.
    transform_batch
        Batch categories of the reference to decode as, and to take the mean over; empty for each cell's own.
    """

    peaks: tuple[str, ...] = ()
    transform_batch: tuple[str, ...] = ()


class PeakviAccessibility(Output):
    """How probable it is that a peak is open (Ashuach et al. 2022), by ``get_normalized_accessibility``.

    At the posterior's mean, so that nothing is drawn, with depth of the cell and bias of the region taken out.
    """

    name = "accessibility"
    families = ("PEAKVI",)
    about = "How probable it is that a peak is open, depth and region factors taken out."
    options: ClassVar[type] = AccessibilityOptions

    @override
    def check(self, facts: Facts, options: AccessibilityOptions) -> None:
        require_known("peaks", options.peaks, facts.names, "peak")
        require_batches(facts, options.transform_batch)

    @override
    def shape(self, facts: Facts, options: AccessibilityOptions) -> Shape:
        return Shape(matrices={"accessibility": options.peaks or facts.names})

    @override
    def unit(self, cells: Cells, told: Mapping[str, npt.NDArray[Any]], options: AccessibilityOptions) -> Part:
        """Matrix ``accessibility``, float32 of shape ``(n_cells, n_peaks)``, of probabilities."""
        names = options.peaks or cells.facts.names
        batches = own_batches(cells.model, options.transform_batch)
        out = np.empty((cells.data.n_obs, len(names)), np.float32)
        order = in_order(names, cells.facts.names)
        # It draws latents besides, and leaves them unused: what is outside must not see that.
        with seeded(cells.seed), registered(cells.model, cells.data) as data:
            for rows in pieces(len(out), len(names)):
                found = np.zeros((len(rows), len(names)), np.float64)
                for batch in batches:  # of several, scvi-tools would take the first alone
                    found += cells.model.get_normalized_accessibility(
                        data,
                        indices=rows,
                        transform_batch=batch,
                        region_list=frozenset(options.peaks) or None,
                        batch_size=BATCH,
                        return_numpy=True,
                    )
                out[rows] = (found / len(batches))[:, order]
        return Part(matrices={"accessibility": out})


@dataclass(frozen=True, slots=True)
class AccessibilityDifferenceOptions(DifferenceOptions):
    """What differential accessibility is told: as differential expression, with scvi-tools' threshold for peaks.

    Eight times as many values as ``samples`` times peaks are held, of 4 bytes: 8 GB for 5,000 and 50,000. Fewer samples
    take less.
    """

    delta: float = 0.05


class PeakviDifference(Comparison):
    """Bayesian differential accessibility of PEAKVI (Ashuach et al. 2022), by ``differential_accessibility``."""

    name = "differential-accessibility"
    families = ("PEAKVI",)
    about = "Peaks whose accessibility differs between two selections of cells, with how probable that is."
    options: ClassVar[type] = AccessibilityDifferenceOptions

    @override
    def check(self, facts: Facts, options: AccessibilityDifferenceOptions) -> None:
        require_comparison(facts, options)

    @override
    def compare(self, cells: Cells, first: npt.NDArray[np.bool_], options: AccessibilityDifferenceOptions) -> Finished:
        """Table ``peaks``, the most probable first.

        ``estimated`` and ``detected`` are the mean decoded accessibility and the share of cells with a count, of the
        first selection (1) and of the second (2). ``difference`` is the first less the second, as the fold changes
        of expression are; scvi-tools' ``effect_size`` has the other sign. In ``vanilla`` mode ``proba_higher`` stands
        for ``proba_da`` and ``is_da``.

        Raises
        ------
        InputError
            If a selection has no cell.
        """
        require_both(first)
        with seeded(cells.seed):
            table = self._table(cells, first, options)
        table["difference"] = table["estimated1"] - table["estimated2"]
        lead = "proba_da" if options.mode == "change" else "proba_higher"
        order = np.lexsort((table.index, -table["difference"].abs(), -table[lead]))
        table = table.iloc[order].rename_axis("peak").reset_index()
        counted = {"first": int(first.sum()), "against": int((~first).sum())}
        return Finished({"peaks": table}, {"cells": counted, "mode": options.mode})

    def _table(
        self, cells: Cells, first: npt.NDArray[np.bool_], options: AccessibilityDifferenceOptions
    ) -> pd.DataFrame:
        """One row a peak."""
        batches = correcting(cells, options)
        with registered(cells.model, cells.data) as data:
            found = cells.model.differential_accessibility(
                data,
                idx1=first,
                idx2=~first,
                mode=options.mode,
                delta=options.delta,
                batch_size=BATCH,
                batch_correction=options.batch_correction,
                batchid1=batches,
                batchid2=batches,
                fdr_target=options.fdr,
                silent=True,
                n_samples_overall=options.samples,
            )
        lead = (
            {"prob_da": "proba_da", "is_da_fdr": "is_da"} if options.mode == "change" else {"prob_da": "proba_higher"}
        )
        rest = {
            "est_prob1": "estimated1",
            "est_prob2": "estimated2",
            "emp_prob1": "detected1",
            "emp_prob2": "detected2",
        }
        names = lead | {"bayes_factor": "bayes_factor"} | rest
        table: pd.DataFrame = found.rename(columns=names)[[*names.values()]]
        return table


ANALYSES: tuple[Analysis, ...] = (PeakviAccessibility(), PeakviDifference())
