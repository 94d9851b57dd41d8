"""What TOTALVI is asked of genes and surface proteins (Gayoso et al., Nature Methods 2021).

By scvi-tools' own methods, told a unit's cells. What was not measured is imputed in :mod:`scviaduct.analysis.panels`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, override

import numpy as np
import pandas as pd

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
)
from scviaduct.analysis.using import (
    BATCH,
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

    from scviaduct.analysis.base import Cells
    from scviaduct.families.base import Facts
    from scviaduct.values import FloatArray

_FAMILIES = ("TOTALVI",)
PROTEINS = "proteins"
"""Field of scvi-tools' registry."""
_PROTEIN = "_protein"
"""What scvi-tools appends to the name of a protein in a table that has genes, too."""


@dataclass(frozen=True, slots=True)
class DenoisedOptions:
    """What denoising is told.

    Attributes
    ----------
    genes, proteins
        Of the reference, in the order of the matrices' columns; empty for all.
    library_size
        Counts that a cell's expression adds up to over all genes; 0 for the cell's own. Proteins have no such size.
    transform_batch
        Batch categories of the reference to decode as, and to take the mean over; empty for each cell's own.
        Gayoso et al. name all batches that measured the proteins: cells of different batches can then be compared.
    samples
        Posterior samples of a cell that the mean is taken over; the authors take 25.
    """

    genes: tuple[str, ...] = ()
    proteins: tuple[str, ...] = ()
    library_size: float = 10_000.0
    transform_batch: tuple[str, ...] = ()
    samples: int = 25


class Denoised(Output):
    """Genes and proteins without noise and, of proteins, without background, by ``get_normalized_expression``.

    A protein that a cell's own batch did not measure is decoded by columns that learnt nothing of it: name the batches
    that did in ``transform_batch``, or ask for ``imputed-proteins``.
    """

    name = "denoised"
    families = _FAMILIES
    about = "Decoded expression of genes, and of proteins without their background."
    options: ClassVar[type] = DenoisedOptions

    @override
    def check(self, facts: Facts, options: DenoisedOptions) -> None:
        require_known("genes", options.genes, features_of(facts, "rna"), "gene")
        require_known("proteins", options.proteins, features_of(facts, "protein"), "protein")
        require_at_least("library_size", options.library_size, 0)
        require_at_least("samples", options.samples, 1)
        require_batches(facts, options.transform_batch)

    @override
    def shape(self, facts: Facts, options: DenoisedOptions) -> Shape:
        genes = options.genes or features_of(facts, "rna")
        return Shape(matrices={"expression": genes, "protein": options.proteins or features_of(facts, "protein")})

    @override
    def unit(self, cells: Cells, told: Mapping[str, npt.NDArray[Any]], options: DenoisedOptions) -> Part:
        """Matrices ``expression``, in counts per ``library_size``, and ``protein``, in foreground counts."""
        genes = positions(features_of(cells.facts, "rna"), options.genes)
        proteins = positions(features_of(cells.facts, "protein"), options.proteins)
        batches = own_batches(cells.model, options.transform_batch)
        size = options.library_size
        with seeded(cells.seed), registered(cells.model, cells.data):
            rna, protein = decoded(cells, genes, proteins, batches, options.samples, "latent" if not size else 1)
        # scvi-tools multiplies by the size once a batch, and so the first of three batches three times.
        return Part(matrices={"expression": rna * np.float32(size or 1), "protein": protein})


def decoded(
    cells: Cells,
    genes: npt.NDArray[np.int64],
    proteins: npt.NDArray[np.int64],
    batches: list[Any],
    samples: int,
    library_size: Any = 1,
) -> tuple[FloatArray, FloatArray]:
    """Genes and proteins of registered cells, as the model decodes them.

    Parameters
    ----------
    cells
        Registered.
    genes, proteins
        Positions among the reference's genes, and among its proteins.
    batches
        As the model has them; ``[None]`` for each cell's own. The mean is taken over them.
    samples
        Posterior samples of a cell that the mean is taken over.
    library_size
        1 for shares of the cell, ``latent`` for the cell's own size.

    Returns
    -------
    rna, protein
        float32 of shapes ``(n_cells, n_genes)`` and ``(n_cells, n_proteins)``; proteins in foreground counts.
    """
    # scvi-tools gives chosen features in its own order.
    kept_genes, gene_order = np.unique(genes, return_inverse=True)
    kept_proteins, protein_order = np.unique(proteins, return_inverse=True)
    names = np.asarray(features_of(cells.facts, "rna"), object)
    own = np.asarray(cells.model.protein_state_registry.column_names, object)
    rna = np.empty((cells.data.n_obs, len(genes)), np.float32)
    protein = np.empty((len(rna), len(proteins)), np.float32)
    with seeded(cells.seed):
        for rows in pieces(len(rna), samples * (len(names) + len(own))):
            found = cells.model.get_normalized_expression(
                cells.data,
                indices=rows,
                transform_batch=batches,
                gene_list=set(names[kept_genes]),
                protein_list=set(own[kept_proteins]),
                library_size=library_size,
                n_samples=samples,
                batch_size=BATCH,
                return_numpy=True,
            )
            rna[rows], protein[rows] = found[0][:, gene_order], found[1][:, protein_order]
    return rna, protein


@dataclass(frozen=True, slots=True)
class ForegroundOptions:
    """What foreground probabilities are told.

    Attributes
    ----------
    proteins
        Of the reference, in the order of the matrix's columns; empty for all.
    transform_batch
        Batch categories of the reference to decode as, and to take the mean over; empty for each cell's own.
    samples
        Posterior samples of a cell that the mean is taken over.
    """

    proteins: tuple[str, ...] = ()
    transform_batch: tuple[str, ...] = ()
    samples: int = 25


class ProteinForeground(Output):
    """The probability that a protein's counts are more than background, by ``get_protein_foreground_probability``."""

    name = "protein-foreground"
    families = _FAMILIES
    about = "The probability that a protein is on the cell, and not background alone."
    options: ClassVar[type] = ForegroundOptions

    @override
    def check(self, facts: Facts, options: ForegroundOptions) -> None:
        require_known("proteins", options.proteins, features_of(facts, "protein"), "protein")
        require_at_least("samples", options.samples, 1)
        require_batches(facts, options.transform_batch)

    @override
    def shape(self, facts: Facts, options: ForegroundOptions) -> Shape:
        return Shape(matrices={"foreground": options.proteins or features_of(facts, "protein")})

    @override
    def unit(self, cells: Cells, told: Mapping[str, npt.NDArray[Any]], options: ForegroundOptions) -> Part:
        """Matrix ``foreground``, between 0 and 1."""
        own = np.asarray(cells.model.protein_state_registry.column_names, object)
        asked = positions(features_of(cells.facts, "protein"), options.proteins)
        kept, order = np.unique(asked, return_inverse=True)
        out = np.empty((cells.data.n_obs, len(asked)), np.float32)
        with seeded(cells.seed), registered(cells.model, cells.data) as data:
            for rows in pieces(len(out), options.samples * len(cells.facts.names)):
                found = cells.model.get_protein_foreground_probability(
                    data,
                    indices=rows,
                    transform_batch=own_batches(cells.model, options.transform_batch),
                    protein_list=set(own[kept]),
                    n_samples=options.samples,
                    batch_size=BATCH,
                    return_numpy=True,
                )
                out[rows] = found[:, order]
        return Part(matrices={"foreground": out})


class DifferentialExpression(Comparison):
    """Bayesian differential expression of genes and proteins (Lopez et al. 2018, Boyeau et al. 2019)."""

    name = "differential-expression"
    families = _FAMILIES
    about = "Genes and proteins that differ between two selections of cells, with how probable that is."
    options: ClassVar[type] = DifferenceOptions

    @override
    def check(self, facts: Facts, options: DifferenceOptions) -> None:
        require_comparison(facts, options)

    @override
    def compare(self, cells: Cells, first: npt.NDArray[np.bool_], options: DifferenceOptions) -> Finished:
        """Table ``features``, the most probable first; ``modality`` is ``rna`` or ``protein``.

        ``bayes_factor`` is a natural logarithm; fold changes are log2 of the first selection over the second;
        ``raw_mean1`` and ``raw_mean2`` are mean counts of the first and of the second, of cells in which the modality
        was measured, ``raw_normalized_mean`` those at 10,000 counts a cell, ``scale`` decoded shares of the cell, or
        decoded foreground counts of proteins. In ``vanilla`` mode there are no fold changes, and ``proba_higher``
        stands for ``proba_de`` and ``is_de``.

        Raises
        ------
        InputError
            If a selection has no cell.
        """
        require_both(first)
        genes, proteins = features_of(cells.facts, "rna"), features_of(cells.facts, "protein")
        own = [f"{name}{_PROTEIN}" for name in cells.model.protein_state_registry.column_names]
        with seeded(cells.seed), registered(cells.model, cells.data):
            counts = counts_of(cells, "X"), counts_of(cells, PROTEINS)
            rna, protein = raw_figures(counts[0], first), raw_figures(counts[1], first, scaled=False)
            raw = pd.DataFrame(
                {name: np.concatenate([values, protein[name]]) for name, values in rna.items()}, index=[*genes, *own]
            )
            table = expression_differences(cells, first, options, raw)
        measured = {"rna": measured_in(counts[0]), "protein": measured_in(counts[1])}
        known = dict(zip(own, proteins, strict=True))
        table.insert(0, "feature", [known.get(name, name) for name in table.index])
        table.insert(1, "modality", ["protein" if name in known else "rna" for name in table.index])
        size = "lfc_median" if options.mode == "change" else "bayes_factor"
        return Finished(
            {"features": ranked(table, table.columns[2], size, "feature")},
            {"mode": options.mode} | figures_of(first, measured),
        )


ANALYSES: tuple[Analysis, ...] = (Denoised(), ProteinForeground(), DifferentialExpression())
