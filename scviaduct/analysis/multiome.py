"""What MULTIVI is asked of genes and peaks (Ashuach et al., Nature Methods 2023), of cells with either or both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, override

import numpy as np
import pandas as pd

from scviaduct.analysis.accessibility import AccessibilityDifferenceOptions, AccessibilityOptions, PeakviDifference
from scviaduct.analysis.base import Analysis, Comparison, Finished, Output, Part, Shape
from scviaduct.analysis.expression import DifferenceOptions
from scviaduct.analysis.modalities import (
    counts_of,
    expression_differences,
    features_of,
    figures_of,
    measured_in,
    positions,
    ranked,
    raw_figures,
    require_modality,
)
from scviaduct.analysis.using import (
    BATCH,
    registered,
    require_at_least,
    require_batches,
    require_both,
    require_comparison,
    require_known,
    seeded,
)
from scviaduct.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from scviaduct.analysis.base import Cells
    from scviaduct.families.base import Facts
    from scviaduct.values import FloatArray

_FAMILIES = ("MULTIVI",)
_EXPRESSION = "X"
_ACCESSIBILITY = "atac"
"""Fields of scvi-tools' registry."""


@dataclass(frozen=True, slots=True)
class ImputedExpressionOptions:
    """What imputing expression is told.

    Attributes
    ----------
    genes
        Of the reference, in the order of the matrix's columns; empty for all.
    library_size
        Counts that a cell's expression adds up to over all genes. More than 0: a cell in which genes were not measured
        has no size of its own.
    transform_batch
        Batch categories of the reference to decode as, and to take the mean over; empty for each cell's own.
    """

    genes: tuple[str, ...] = ()
    library_size: float = 10_000.0
    transform_batch: tuple[str, ...] = ()


class ImputedExpression(Output):
    """Expression that is decoded from the joint latent of a cell, whether or not its genes were measured."""

    name = "imputed-expression"
    families = _FAMILIES
    about = "Decoded expression of all cells, of those with peaks alone among them."
    options: ClassVar[type] = ImputedExpressionOptions

    @override
    def check(self, facts: Facts, options: ImputedExpressionOptions) -> None:
        require_modality(facts, "rna", "genes")
        require_known("genes", options.genes, features_of(facts, "rna"), "gene")
        require_at_least("library_size", options.library_size, 0)
        if not options.library_size:
            raise InputError(
                "--library-size 0: a cell in which genes were not measured has no library size of its own.",
                "Name one for all cells, e.g. --library-size 10000.",
            )
        require_batches(facts, options.transform_batch)

    @override
    def shape(self, facts: Facts, options: ImputedExpressionOptions) -> Shape:
        return Shape({"measured": "bool"}, {"expression": options.genes or features_of(facts, "rna")})

    @override
    def unit(self, cells: Cells, told: Mapping[str, npt.NDArray[Any]], options: ImputedExpressionOptions) -> Part:
        """Matrix ``expression``, in counts per ``library_size``; column ``measured``: has the cell a count of RNA?"""
        chosen = positions(features_of(cells.facts, "rna"), options.genes)
        with seeded(cells.seed), registered(cells.model, cells.data):
            decoded = _decoded(cells, "px_scale", chosen, options.transform_batch)
            measured = measured_in(counts_of(cells, _EXPRESSION))
        return Part({"measured": measured}, {"expression": decoded * np.float32(options.library_size)})


class ImputedAccessibility(Output):
    """Accessibility that is decoded from the joint latent of a cell, whether or not its peaks were measured.

    Without the factors of cells and of regions, as ``get_normalized_accessibility`` gives it: the probability that a
    region is accessible, not that it is seen to be.
    """

    name = "imputed-accessibility"
    families = _FAMILIES
    about = "Decoded accessibility of all cells, of those with genes alone among them."
    options: ClassVar[type] = AccessibilityOptions

    @override
    def check(self, facts: Facts, options: AccessibilityOptions) -> None:
        require_modality(facts, "atac", "peaks")
        require_known("peaks", options.peaks, features_of(facts, "atac"), "peak")
        require_batches(facts, options.transform_batch)

    @override
    def shape(self, facts: Facts, options: AccessibilityOptions) -> Shape:
        return Shape({"measured": "bool"}, {"accessibility": options.peaks or features_of(facts, "atac")})

    @override
    def unit(self, cells: Cells, told: Mapping[str, npt.NDArray[Any]], options: AccessibilityOptions) -> Part:
        """Matrix ``accessibility``, between 0 and 1; column ``measured``: has the cell a count in a peak?"""
        chosen = positions(features_of(cells.facts, "atac"), options.peaks)
        with seeded(cells.seed), registered(cells.model, cells.data):
            decoded = _decoded(cells, "p", chosen, options.transform_batch)
            measured = measured_in(counts_of(cells, _ACCESSIBILITY))
        return Part({"measured": measured}, {"accessibility": decoded})


def _decoded(cells: Cells, output: str, chosen: npt.NDArray[np.int64], batches: Sequence[str]) -> FloatArray:
    """One output of the decoders for registered cells, at their latent's mean, as the mean over batches.

    By the decoder and not by scvi-tools' methods, which are wrong in three ways (1.5.1): ``get_normalized_expression``
    encodes a cell as of the batch that it is decoded as, ``get_normalized_accessibility`` takes the first of several
    batches alone, and both decode a logistic-normal latent before its softmax. Where none of these matters, this gives
    what they give. More posterior samples than the mean they do not take either.
    """
    import torch

    model, module = cells.model, cells.model.module
    codes: list[int | None] = [cells.facts.batch_categories.index(batch) for batch in batches] or [None]
    out, start = np.zeros((cells.data.n_obs, len(chosen)), np.float32), 0
    with torch.inference_mode():
        for tensors in model._make_data_loader(adata=cells.data, batch_size=BATCH):  # noqa: SLF001
            rows = slice(start, start + len(tensors["batch"]))
            latent = torch.tensor(cells.encoded.mean[rows])
            given = {"z": latent, "qz_m": latent, "libsize_expr": torch.zeros(len(latent), 1)}  # of no matter here
            for code in codes:
                inputs = module._get_generative_input(tensors, given, transform_batch=code)  # noqa: SLF001
                out[rows] += module.generative(**inputs)[output].cpu().numpy()[:, chosen]
            start = rows.stop
    out /= len(codes)
    return out


class DifferentialExpression(Comparison):
    """Bayesian differential expression (Lopez et al. 2018, Boyeau et al. 2019), by ``differential_expression``.

    A cell in which genes were not measured takes part with what is imputed for it. scvi-tools draws cells, and decodes
    each at the mean of its latent.
    """

    name = "differential-expression"
    families = _FAMILIES
    about = "Genes whose expression differs between two selections of cells, with how probable that is."
    options: ClassVar[type] = DifferenceOptions

    @override
    def check(self, facts: Facts, options: DifferenceOptions) -> None:
        require_modality(facts, "rna", "genes")
        require_comparison(facts, options)
        if options.batch_correction and facts.encoded_batch:
            raise InputError(
                f"--batch-correction: the reference's encoder reads '{facts.batch_key}', and scvi-tools would encode"
                " each cell as of every batch.",
                "Leave the option out, or compare within one batch: --select, --against.",
            )

    @override
    def compare(self, cells: Cells, first: npt.NDArray[np.bool_], options: DifferenceOptions) -> Finished:
        """Table ``genes``, the most probable first.

        ``bayes_factor`` is a natural logarithm; fold changes are log2 of the first selection over the second;
        ``raw_mean1`` and ``raw_mean2`` are mean counts of the first and of the second, of cells in which genes were
        measured, ``raw_normalized_mean`` those at 10,000 counts a cell, ``scale`` decoded shares of the cell. In
        ``vanilla`` mode there are no fold changes, and ``proba_higher`` stands for ``proba_de`` and ``is_de``.

        Raises
        ------
        InputError
            If a selection has no cell.
        """
        require_both(first)
        with seeded(cells.seed), registered(cells.model, cells.data):
            counts = counts_of(cells, _EXPRESSION)
            raw = pd.DataFrame(raw_figures(counts, first), index=features_of(cells.facts, "rna"))
            table = expression_differences(cells, first, options, raw)
        table.insert(0, "gene", table.index.astype(str))
        size = "lfc_median" if options.mode == "change" else "bayes_factor"
        table = ranked(table, table.columns[1], size, "gene")
        return Finished({"genes": table}, {"mode": options.mode} | figures_of(first, {"rna": measured_in(counts)}))


class DifferentialAccessibility(PeakviDifference):
    """Bayesian differential accessibility (Ashuach et al. 2022), by ``differential_accessibility``.

    A cell in which peaks were not measured takes part with what is imputed for it; shares of cells with a count
    (``detected``) are of cells in which peaks were measured.
    """

    families = _FAMILIES

    @override
    def check(self, facts: Facts, options: AccessibilityDifferenceOptions) -> None:
        require_modality(facts, "atac", "peaks")
        super().check(facts, options)

    @override
    def compare(self, cells: Cells, first: npt.NDArray[np.bool_], options: AccessibilityDifferenceOptions) -> Finished:
        with seeded(cells.seed), registered(cells.model, cells.data):
            found = super().compare(cells, first, options)
            measured = {"atac": measured_in(counts_of(cells, _ACCESSIBILITY))}
        return Finished(found.tables, {**found.facts, **figures_of(first, measured)})

    @override
    def _table(
        self, cells: Cells, first: npt.NDArray[np.bool_], options: AccessibilityDifferenceOptions
    ) -> pd.DataFrame:
        table = super()._table(cells, first, options)
        raw = raw_figures(counts_of(cells, _ACCESSIBILITY), first, scaled=False)
        shares = pd.DataFrame(raw, index=features_of(cells.facts, "atac")).loc[table.index]
        for side in (1, 2):
            table[f"detected{side}"] = shares[f"non_zeros_proportion{side}"]
        return table


ANALYSES: tuple[Analysis, ...] = (
    ImputedExpression(),
    ImputedAccessibility(),
    DifferentialExpression(),
    DifferentialAccessibility(),
)
