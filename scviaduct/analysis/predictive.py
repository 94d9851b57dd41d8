"""Posterior predictive checks of SCVI and SCANVI over all cells of a store, by sums that merge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, override

import numpy as np
from scipy import sparse

from scviaduct.analysis.base import Analysis, Finished, Output, Part, Shape
from scviaduct.analysis.using import BATCH, pieces, registered, require_at_least, seeded

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt
    import pandas as pd

    from scviaduct.analysis.base import Cells
    from scviaduct.families.base import Facts

    Float64Array = npt.NDArray[np.float64]

_SIDES = ("observed", "replicated")


@dataclass(frozen=True, slots=True)
class PredictiveOptions:
    """What predictive checks are told.

    Attributes
    ----------
    samples
        Replicates of each cell.
    """

    samples: int = 5


class PosteriorPredictive(Output):
    """Posterior predictive checks: counts that the model draws for a cell, beside those that it has.

    As ``scvi.criticism`` compares them, which holds all replicates of all cells at once. Here each unit leaves sums of
    counts and of their squares, whole numbers that merge exactly up to 2**53, in float64.
    """

    name = "posterior-predictive"
    families = ("SCVI", "SCANVI")
    about = "Counts that the model draws for the cells, compared with theirs."
    options: ClassVar[type] = PredictiveOptions

    @override
    def check(self, facts: Facts, options: PredictiveOptions) -> None:
        require_at_least("samples", options.samples, 1)

    @override
    def shape(self, facts: Facts, options: PredictiveOptions) -> Shape:
        counts = {"observed_counts": "double", "replicated_counts": "double"}
        return Shape(columns=counts | {"observed_genes": "int64", "replicated_genes": "double"})

    @override
    def unit(self, cells: Cells, told: Mapping[str, npt.NDArray[Any]], options: PredictiveOptions) -> Part:
        """Library size and detected genes of each cell and, in the mean, of its replicates; and sums over the cells.

        ``observed`` and ``replicated``: by sample and gene, the sum of counts, that of their squares, and the cells
        without a count; float64 of shape ``(3, samples, n_genes)``, the observed counts being one sample. ``cells``:
        how many there are, and sums over those that have them of the coefficients of variation over genes, observed
        and replicated, and of the size of their difference; shape ``(5,)``.
        """
        data, n_genes = cells.data, len(cells.facts.names)
        counts = data.layers[cells.facts.layer] if cells.facts.layer else data.X
        sums = {"observed": np.zeros((3, 1, n_genes)), "replicated": np.zeros((3, options.samples, n_genes))}
        spread = np.zeros(5)
        columns = {name: np.empty(data.n_obs) for name in self.shape(cells.facts, options).columns}
        with seeded(cells.seed), registered(cells.model, data):
            for rows in pieces(data.n_obs, n_genes * options.samples):
                drawn = cells.model.posterior_predictive_sample(
                    data, indices=rows, n_samples=options.samples, batch_size=BATCH
                ).todense()
                replicated = drawn.reshape(len(rows), n_genes, options.samples).transpose(2, 0, 1)
                observed = sparse.csr_matrix(counts[rows]).toarray()[None]
                variation = []
                for side, values in zip(_SIDES, (observed, replicated), strict=True):
                    exact = values.astype(np.float64)
                    squares, found = np.square(exact), exact != 0
                    sums[side] += np.stack([exact.sum(axis=1), squares.sum(axis=1), (~found).sum(axis=1)])
                    columns[f"{side}_counts"][rows] = exact.sum(axis=2).mean(axis=0)
                    columns[f"{side}_genes"][rows] = found.sum(axis=2).mean(axis=0)
                    variation.append(_variation(exact.sum(axis=2), squares.sum(axis=2), n_genes))
                spread += _agreement(*variation)
        return Part(
            columns | {"observed_genes": columns["observed_genes"].astype(np.int64)}, {}, sums | {"cells": spread}
        )

    @override
    def finish(
        self, sums: Sequence[Mapping[str, npt.NDArray[Any]]], facts: Facts, options: PredictiveOptions
    ) -> Finished:
        """Tables ``genes``, and ``coefficients_of_variation`` of genes over cells and of cells over genes.

        Of the first: mean, variance, share of cells without a count (``zeros``) and coefficient of variation of the
        observed counts and of the replicated ones, in the mean over samples. Of the second: the mean of the observed
        coefficients, of the replicated ones, and the mean absolute error. What has no count has no coefficient.
        """
        if not sums:
            return Finished()
        total = {name: np.sum([one[name] for one in sums], axis=0) for name in (*_SIDES, "cells")}
        genes = _genes(facts, total)
        n_cells, known = int(total["cells"][0]), total["cells"][1]
        pairs = (genes["observed_variation"].to_numpy(), genes["replicated_variation"].to_numpy())
        of_genes = _agreement(*pairs)[1:]
        rows = [_row("genes over cells", of_genes), _row("cells over genes", np.array([known, *total["cells"][2:]]))]
        import pandas as pd

        tables = {"genes": genes, "coefficients_of_variation": pd.DataFrame(rows)}
        return Finished(tables, {"cells": n_cells, "samples": options.samples})


def _variation(total: Float64Array, squares: Float64Array, count: float) -> Float64Array:
    """Coefficient of variation of each column in the mean over samples, of sums over ``count`` values.

    Samples in which there is nothing have none; NaN where no sample has one.
    """
    mean = total / count
    variance = np.maximum(squares / count - mean**2, 0)  # whole numbers: only rounding can take it below
    known = mean > 0
    ratio = np.divide(np.sqrt(variance), mean, out=np.zeros_like(mean), where=known)
    samples = known.sum(axis=0)
    out: Float64Array = np.full(mean.shape[1], np.nan)
    np.divide(ratio.sum(axis=0), samples, out=out, where=samples > 0)
    return out


def _agreement(observed: Float64Array, replicated: Float64Array) -> Float64Array:
    """How many there are; of how many both are known, and of those: sums of both, and of their absolute difference."""
    known = np.isfinite(observed) & np.isfinite(replicated)
    one, other = observed[known], replicated[known]
    return np.array([len(observed), known.sum(), one.sum(), other.sum(), np.abs(other - one).sum()])


def _row(what: str, sums: Float64Array) -> dict[str, Any]:
    count = int(sums[0])
    observed, replicated, error = (sums[1:] / count).tolist() if count else [np.nan] * 3
    return {"of": what, "count": count, "observed": observed, "replicated": replicated, "mean_absolute_error": error}


def _genes(facts: Facts, total: Mapping[str, Float64Array]) -> pd.DataFrame:
    """One row a gene."""
    import pandas as pd

    n_cells = total["cells"][0]
    table: dict[str, Any] = {"gene": list(facts.names)}
    for side in _SIDES:
        counts, squares, zeros = total[side]
        mean = counts / n_cells
        table[f"{side}_mean"] = mean.mean(axis=0)
        table[f"{side}_variance"] = np.maximum(squares / n_cells - mean**2, 0).mean(axis=0)
        table[f"{side}_zeros"] = (zeros / n_cells).mean(axis=0)
        table[f"{side}_variation"] = _variation(counts, squares, n_cells)
    return pd.DataFrame(table)


ANALYSES: tuple[Analysis, ...] = (PosteriorPredictive(),)
