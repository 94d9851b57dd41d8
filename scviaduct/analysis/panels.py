"""Proteins that a query did not measure, as TOTALVI imputes them (Gayoso et al., Nature Methods 2021).

Decoded by scvi-tools. What is here is which proteins were measured in which cells, and as of which batches one that was
not is to be decoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, override

import numpy as np
import pandas as pd

from scviaduct.analysis.base import Analysis, Finished, Output, Part, Shape, Strata
from scviaduct.analysis.modalities import counts_of, features_of, measured_in, positions
from scviaduct.analysis.proteins import PROTEINS, decoded
from scviaduct.analysis.using import own_batches, registered, require_at_least, require_batches, require_known, seeded
from scviaduct.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from scviaduct.analysis.base import Cells
    from scviaduct.families.base import Facts
    from scviaduct.values import FloatArray

    BoolArray = npt.NDArray[np.bool_]

_SEPARATOR = " || "
"""Between several names in one column, as CELLxGENE Census has it."""


@dataclass(frozen=True, slots=True)
class ImputedOptions:
    """What imputing proteins is told.

    Attributes
    ----------
    proteins
        Of the reference, in the order of the matrix's columns; empty for all.
    transform_batch
        Batch categories of the reference to decode as; of them, a protein is decoded as those that measured it. Empty
        for all of the reference.
    samples
        Posterior samples of a cell that the mean is taken over.
    group_by
        obs column of what was measured with one panel of proteins; empty for the reference's batch column.
    cells
        Of each such batch, at most: those in which a protein is looked for.
    """

    proteins: tuple[str, ...] = ()
    transform_batch: tuple[str, ...] = ()
    samples: int = 25
    group_by: str = ""
    cells: int = 1000


class ImputedProteins(Output):
    """Proteins of all cells, those that were not measured among them, as of the reference batches that measured them.

    A protein was not measured in a cell that has no count of any protein, nor in one of a batch in whose sampled cells
    it has no count: that is how scvi-tools tells the panels of the reference's batches. All values are decoded alike,
    as means over the same reference batches, so that imputed and measured cells can be compared.
    """

    name = "imputed-proteins"
    families = ("TOTALVI",)
    about = "Decoded proteins, those that the cells' batch did not measure among them."
    options: ClassVar[type] = ImputedOptions

    @override
    def check(self, facts: Facts, options: ImputedOptions) -> None:
        require_known("proteins", options.proteins, features_of(facts, "protein"), "protein")
        require_at_least("samples", options.samples, 1)
        require_at_least("cells", options.cells, 1)
        require_batches(facts, options.transform_batch)

    @override
    def obs(self, facts: Facts, options: ImputedOptions) -> tuple[str, ...]:
        column = options.group_by or facts.batch_key
        return (column,) if column else ()

    @override
    def strata(self, facts: Facts, options: ImputedOptions) -> Strata | None:
        """By batch; none if there is no batch, where a panel is then that of the reference or nothing."""
        column = options.group_by or facts.batch_key
        return Strata(column, options.cells) if column else None

    @override
    def shape(self, facts: Facts, options: ImputedOptions) -> Shape:
        columns = {"proteins_imputed": "int64", "imputed": "string"}
        return Shape(columns, {"protein": options.proteins or features_of(facts, "protein")})

    @override
    def prepare(self, cells: Cells, options: ImputedOptions) -> Mapping[str, npt.NDArray[Any]]:
        """``batches``, and ``panels``: bool, shape ``(n_batches, n_proteins)``, whether one has a count there."""
        (column,) = self.obs(cells.facts, options)
        batches, codes = np.unique(_texts(cells.obs[column]), return_inverse=True)
        with seeded(cells.seed), registered(cells.model, cells.data):
            counts = counts_of(cells, PROTEINS)
        panels = [np.asarray(counts[codes == code].sum(axis=0)).ravel() > 0 for code in range(len(batches))]
        return {"batches": batches, "panels": np.array(panels)}

    @override
    def unit(self, cells: Cells, told: Mapping[str, npt.NDArray[Any]], options: ImputedOptions) -> Part:
        """Matrix ``protein``, in foreground counts; NaN where no batch of the reference measured one.

        Columns ``proteins_imputed``, how many of them were imputed in the cell, and ``imputed``, which: their names
        with `` || `` between. ``sums`` are, per protein, cells in which it was imputed, and the batches it was decoded
        as.
        """
        names = features_of(cells.facts, "protein")
        chosen = positions(names, options.proteins)
        with seeded(cells.seed), registered(cells.model, cells.data):
            imputed = self._imputed(cells, told, options)[:, chosen]
            batches = _panels(cells, options)[:, chosen]
            protein = _decoded_as(cells, chosen, batches, options.samples)
        kinds, which = np.unique(imputed, axis=0, return_inverse=True)
        texts = [_SEPARATOR.join(names[chosen[i]] for i in np.flatnonzero(kind)) for kind in kinds]
        return Part(
            {"proteins_imputed": imputed.sum(axis=1), "imputed": np.array(texts, object)[which.ravel()]},
            {"protein": protein},
            {"imputed": imputed.sum(axis=0), "cells": np.array(len(imputed)), "batches": batches},
        )

    def _imputed(self, cells: Cells, told: Mapping[str, npt.NDArray[Any]], options: ImputedOptions) -> BoolArray:
        """Which proteins were not measured, shape ``(n_cells, n_proteins)``."""
        counts = counts_of(cells, PROTEINS)
        measured = np.repeat(measured_in(counts)[:, None], counts.shape[1], axis=1)
        if told:
            (column,) = self.obs(cells.facts, options)
            row = {name: i for i, name in enumerate(told["batches"].tolist())}
            measured &= told["panels"][[row[name] for name in _texts(cells.obs[column]).tolist()]]
        imputed: BoolArray = ~(measured | (counts.toarray() > 0))
        return imputed

    @override
    def finish(self, sums: Sequence[Mapping[str, npt.NDArray[Any]]], facts: Facts, options: ImputedOptions) -> Finished:
        """Table ``proteins``: in how many cells each was measured and imputed, and the batches it was decoded as."""
        if not sums:
            return Finished()
        imputed = np.sum([one["imputed"] for one in sums], axis=0)
        known = np.asarray(facts.batch_categories or ("",), object)
        table = {
            "protein": options.proteins or features_of(facts, "protein"),
            "cells_measured": int(sum(int(one["cells"]) for one in sums)) - imputed,
            "cells_imputed": imputed,
            "decoded_as": [_SEPARATOR.join(known[own]) for own in sums[0]["batches"].T],
        }
        return Finished({"proteins": pd.DataFrame(table)})


def _texts(values: pd.Series) -> npt.NDArray[Any]:
    """An obs column as text; a missing value is a category of its own."""
    return values.astype(object).where(values.notna(), "").astype(str).to_numpy(str)


def _panels(cells: Cells, options: ImputedOptions) -> BoolArray:
    """Which proteins a batch of the reference may be decoded as, shape ``(n_batches, n_proteins)``.

    Raises
    ------
    InputError
        If the model tells panels apart by another column than the batch.
    """
    known, names = cells.facts.batch_categories or ("",), features_of(cells.facts, "protein")
    wanted = np.array([not options.transform_batch or batch in options.transform_batch for batch in known])
    mask = cells.model.module.protein_batch_mask
    if mask is None:
        return np.repeat(wanted[:, None], len(names), axis=1)
    if cells.model.module.panel_key != "batch":
        raise InputError(
            "The reference keeps which panel measured a protein, and not which batch did.",
            "Train it without --panel-key: each batch is then a panel of its own.",
        )
    none = np.zeros(len(names), bool)
    measured = np.array([np.asarray(mask.get(str(code), none), bool) for code in range(len(known))])
    panels: BoolArray = measured & wanted[:, None]
    return panels


def _decoded_as(cells: Cells, chosen: npt.NDArray[np.int64], batches: BoolArray, samples: int) -> FloatArray:
    """Proteins, each as the mean over its batches; NaN for one that has none."""
    out = np.full((cells.data.n_obs, len(chosen)), np.nan, np.float32)
    panels, which = np.unique(batches, axis=1, return_inverse=True)
    for number, panel in enumerate(panels.T):
        own = np.flatnonzero(which.ravel() == number)
        if panel.any():
            names = [batch for batch, there in zip(cells.facts.batch_categories, panel, strict=False) if there]
            none = np.array([], np.int64)
            _, out[:, own] = decoded(cells, none, chosen[own], own_batches(cells.model, names), samples)
    return out


ANALYSES: tuple[Analysis, ...] = (ImputedProteins(),)
