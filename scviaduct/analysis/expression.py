"""What SCVI and SCANVI are asked of genes: normalised expression, and differential expression.

Both by scvi-tools' own methods. What is here is what spreading them over shards needs: seeds and bounded memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, override

import numpy as np

from scviaduct.analysis.base import Analysis, Comparison, Finished, Output, Part, Shape
from scviaduct.analysis.using import (
    BATCH,
    correcting,
    in_order,
    own_batches,
    pieces,
    registered,
    require_at_least,
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

_FAMILIES = ("SCVI", "SCANVI")


@dataclass(frozen=True, slots=True)
class ExpressionOptions:
    """What normalised expression is told.

    Attributes
    ----------
    genes
        Of the reference, in the order of the matrix's columns; empty for all.
    library_size
        Counts that a cell's expression adds up to over all genes; 0 for the cell's own.
    transform_batch
        Batch categories of the reference to decode as, and to take the mean over; empty for each cell's own.
    samples
        Posterior samples of a cell that the mean is taken over. Two seeds differ by 0.30 (log2, root mean square over
        1,024 PBMC and their expressed genes) with one, by 0.09 with ten, which take six times as long as one.
    """

    genes: tuple[str, ...] = ()
    library_size: float = 10_000.0
    transform_batch: tuple[str, ...] = ()
    samples: int = 10


class NormalisedExpression(Output):
    """The expression that SCVI decodes, rho of Lopez et al. (Nature Methods 2018), by ``get_normalized_expression``."""

    name = "normalised-expression"
    families = _FAMILIES
    about = "Decoded expression of chosen genes, at one library size."
    options: ClassVar[type] = ExpressionOptions

    @override
    def check(self, facts: Facts, options: ExpressionOptions) -> None:
        require_known("genes", options.genes, facts.names, "gene")
        require_at_least("library_size", options.library_size, 0)
        require_at_least("samples", options.samples, 1)
        require_batches(facts, options.transform_batch)

    @override
    def shape(self, facts: Facts, options: ExpressionOptions) -> Shape:
        return Shape(matrices={"expression": options.genes or facts.names})

    @override
    def unit(self, cells: Cells, told: Mapping[str, npt.NDArray[Any]], options: ExpressionOptions) -> Part:
        """Matrix ``expression``, float32 of shape ``(n_cells, n_genes)``, in counts per ``library_size``."""
        names = options.genes or cells.facts.names
        batches = own_batches(cells.model, options.transform_batch)
        out = np.empty((cells.data.n_obs, len(names)), np.float32)
        order = in_order(names, cells.facts.names)
        with seeded(cells.seed), registered(cells.model, cells.data) as data:
            for rows in pieces(len(out), len(names) * options.samples):
                found = cells.model.get_normalized_expression(
                    data,
                    indices=rows,
                    transform_batch=batches,
                    gene_list=list(options.genes) or None,
                    library_size=options.library_size or "latent",
                    n_samples=options.samples,
                    batch_size=BATCH,
                    return_numpy=True,
                )
                out[rows] = found[:, order]
        return Part(matrices={"expression": out})


@dataclass(frozen=True, slots=True)
class DifferenceOptions:
    """What differential expression is told.

    Attributes
    ----------
    select, against
        Conditions on the store's columns.
    cells
        Of each selection, at most. scvi-tools decodes at least ``samples`` times, so that fewer save little.
    samples
        Posterior samples of each selection, of all its cells together.
    mode
        ``change`` (Boyeau et al. 2019): how probable it is that the fold change exceeds ``delta``; or ``vanilla``
        (Lopez et al. 2018): that the expression is higher.
    delta
        Log2 fold change below which a gene is not called different.
    fdr
        Posterior expected false discovery rate of the genes that are called different.
    batch_correction
        Decode both selections as the same batches, instead of each cell as its own.
    transform_batch
        Those batches; empty for all of the reference.
    """

    select: str = ""
    against: str = ""
    cells: int = 2000
    samples: int = 5000
    mode: str = "change"
    delta: float = 0.25
    fdr: float = 0.05
    batch_correction: bool = False
    transform_batch: tuple[str, ...] = ()


class DifferentialExpression(Comparison):
    """Bayesian differential expression (Lopez et al. 2018, Boyeau et al. 2019), by ``differential_expression``."""

    name = "differential-expression"
    families = _FAMILIES
    about = "Genes whose expression differs between two selections of cells, with how probable that is."
    options: ClassVar[type] = DifferenceOptions

    @override
    def check(self, facts: Facts, options: DifferenceOptions) -> None:
        require_comparison(facts, options)

    @override
    def compare(self, cells: Cells, first: npt.NDArray[np.bool_], options: DifferenceOptions) -> Finished:
        """Table ``genes``, the most probable first.

        ``bayes_factor`` is a natural logarithm; fold changes are log2 of the first selection over the second;
        ``raw_mean1`` and ``raw_mean2`` are mean counts of the first and of the second, ``raw_normalized_mean`` those
        at 10,000 counts a cell, ``scale`` decoded shares of the cell. In ``vanilla`` mode there are no fold changes,
        and ``proba_higher`` stands for ``proba_de`` and ``is_de``.

        Raises
        ------
        InputError
            If a selection has no cell.
        """
        require_both(first)
        batches = correcting(cells, options)
        with seeded(cells.seed), registered(cells.model, cells.data) as data:
            found = cells.model.differential_expression(
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
        counted = {"first": int(first.sum()), "against": int((~first).sum())}
        return Finished({"genes": _told(found, options)}, {"cells": counted, "mode": options.mode})


_CHANGE = ("proba_de", "is_de", "bayes_factor", "lfc_mean", "lfc_median", "lfc_std")
_RAW = ("raw_mean", "raw_normalized_mean", "non_zeros_proportion", "scale")


def _told(found: pd.DataFrame, options: DifferenceOptions) -> pd.DataFrame:
    """scvi-tools' table without what is the same in every row, in an order that ties do not change."""
    table = found.rename(columns={f"is_de_fdr_{options.fdr}": "is_de", "proba_m1": "proba_higher"})
    table.insert(0, "gene", table.index.astype(str))
    kept = _CHANGE if options.mode == "change" else ("proba_higher", "bayes_factor")
    table = table[["gene", *kept, *(f"{name}{side}" for name in _RAW for side in (1, 2))]]
    size = table["lfc_median"].abs() if options.mode == "change" else table["bayes_factor"].abs()
    order = np.lexsort((table["gene"], -size, -table[kept[0]]))
    return table.iloc[order].reset_index(drop=True)


ANALYSES: tuple[Analysis, ...] = (NormalisedExpression(), DifferentialExpression())
