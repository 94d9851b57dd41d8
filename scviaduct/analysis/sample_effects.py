"""Multivariate differential expression of MRVI (Boyeau et al., Nature Methods 2025): what covariates of samples do.

In each cell, what samples add to ``u`` is regressed on the samples' covariates. scvi-tools' ``differential_expression``
(1.5.1) is offered as ``mode="scvi-tools"``. It is not the default: it fits no constant, so that in a design with an
interaction an effect of one term shows in the others; its test refers a sum over latent dimensions to a chi-square
distribution with as many degrees of freedom as there are *samples*; it draws ``u`` anew for every sample, and again for
either side of a log fold change. Here a constant is fitted, samples share their draws, and p-values come from permuting
samples (:mod:`~scviaduct.analysis.donors`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, override

import numpy as np

from scviaduct.analysis.base import Finished, Output, Part, Shape, Strata
from scviaduct.analysis.counterfactual import Counterfactual, groups_of, own_samples, pieces, require_samples, summed
from scviaduct.analysis.donors import (
    Design,
    Permuted,
    adjusted,
    columns_of,
    design,
    require_rank,
    require_same,
    require_terms,
    slopes,
    slug,
)
from scviaduct.analysis.effects import decoded_batches, fold_changes, positions, scvi_effects
from scviaduct.analysis.samples import together
from scviaduct.analysis.using import require_at_least, require_batches, require_known
from scviaduct.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from scviaduct.analysis.base import Analysis, Cells
    from scviaduct.families.base import Facts

    Matrix = npt.NDArray[np.float64]
    Sums = Mapping[str, npt.NDArray[Any]]

_MODES = ("permutation", "scvi-tools")
_SAMPLE = 200
"""Cells of each sample that the design is read from; every cell's covariates are compared with it later."""


@dataclass(frozen=True, slots=True)
class EffectOptions:
    """What multivariate differential expression is told.

    Attributes
    ----------
    sample_covariates
        Terms: obs columns that are constant within a sample (numbers, or of two values), ``COLUMN=VALUE`` (one value
        against all others), and products of them such as ``genotype:stimulation``.
    group_by
        obs column of the groups of the table; empty for all cells as one.
    genes
        Whose log fold changes are written, cell by cell. Empty for none: a matrix of every gene a term is asked for by
        naming them.
    transform_batch
        Batch categories to decode log fold changes as, and to take the mean over; empty for all.
    samples
        Posterior draws of each cell's ``u``.
    permutations
        Of the samples; no p-value is smaller than ``1 / (1 + permutations)``.
    fdr
        Level of the shares of cells in the table.
    mode
        ``permutation`` or ``scvi-tools``.
    """

    sample_covariates: tuple[str, ...] = ()
    group_by: str = ""
    genes: tuple[str, ...] = ()
    transform_batch: tuple[str, ...] = ()
    samples: int = 10
    permutations: int = 999
    fdr: float = 0.05
    mode: Literal["permutation", "scvi-tools"] = "permutation"


class MultivariateDE(Output):
    """Effects of covariates of samples on each cell's state, with samples as the units.

    Columns, for each term: ``effect_TERM``, ``p_TERM`` and ``fdr_TERM``. The effect is the length of the slope in
    ``z``; with ``mode="scvi-tools"``, its chi-square statistic. False discovery rates are by Benjamini & Hochberg over
    all cells and terms together, as in scvi-tools. Matrix ``lfc_TERM``: log2 fold changes of ``genes``.

    Table ``multivariate_de``: ``group``, ``term``, ``of`` (what its 1 stands for), ``cells``, mean ``effect``,
    ``share`` (of the samples' variation that other terms leave; partial R squared), ``p`` and ``fdr`` of the whole
    group, from the mean of its cells' inner products (NaN with ``mode="scvi-tools"``), and ``significant``, the share
    of its cells whose own rate is at most ``fdr``. Table ``multivariate_de_genes``: mean ``lfc`` of each group, term
    and gene.
    """

    name = "multivariate-de"
    families = ("MRVI",)
    about = "effects of covariates of samples on each cell's state and genes"
    options: ClassVar[type] = EffectOptions

    @override
    def check(self, facts: Facts, options: EffectOptions) -> None:
        require_samples(facts)
        require_terms(options.sample_covariates)
        require_known("genes", options.genes, facts.names, "gene")
        require_batches(facts, options.transform_batch)
        require_at_least("samples", options.samples, 1)
        require_at_least("permutations", options.permutations, 19)
        if not 0 < options.fdr < 1:
            raise InputError(f"--fdr {options.fdr:g} is not between 0 and 1.", "Give 0.05, say.")
        if options.mode not in _MODES:
            raise InputError(f"--mode '{options.mode}' is no way to test.", f"There are: {', '.join(_MODES)}.")
        if options.mode == "scvi-tools" and options.transform_batch:
            raise InputError("--transform-batch: scvi-tools decodes as every batch.", "Leave it out, or the mode.")

    @override
    def obs(self, facts: Facts, options: EffectOptions) -> tuple[str, ...]:
        group = (options.group_by,) if options.group_by else ()
        return tuple(dict.fromkeys((*columns_of(options.sample_covariates), *group)))

    @override
    def shape(self, facts: Facts, options: EffectOptions) -> Shape:
        names = [f"{what}_{slug(term)}" for term in options.sample_covariates for what in ("effect", "p", "fdr")]
        matrices = {f"lfc_{slug(term)}": options.genes for term in options.sample_covariates if options.genes}
        return Shape(dict.fromkeys(names, "double"), matrices)

    @override
    def strata(self, facts: Facts, options: EffectOptions) -> Strata:
        return Strata(facts.sample_key, _SAMPLE)

    @override
    def prepare(self, cells: Cells, options: EffectOptions) -> Sums:
        made = design(cells, own_samples(cells), options.sample_covariates)
        require_rank(made, options.sample_covariates)
        return made.told()

    @override
    def unit(self, cells: Cells, told: Sums, options: EffectOptions) -> Part:
        made = Design.of(told)
        require_same(cells, own_samples(cells), made, options.sample_covariates)
        names, codes = groups_of(cells, options.group_by)
        if options.mode == "scvi-tools":
            effect, p, changes = scvi_effects(cells, made, options)
            inner = np.zeros((len(names), 0))
        else:
            effect, p, changes, inner = _effects(cells, made, options, len(names), codes)
        levels = _levels(options)
        bins = np.minimum(np.searchsorted(levels, p * (1 - 1e-12)), len(levels) - 1)
        terms = len(options.sample_covariates)
        found = bins + np.arange(terms) * len(levels)
        spread = np.zeros((len(names), terms * len(levels)), np.int64)
        inside = codes >= 0
        np.add.at(spread, (codes[inside, None], found[inside]), 1)
        sums = {
            "groups": names,
            "cells": np.bincount(codes[inside], minlength=len(names)),
            "effect": summed(effect, codes, len(names)),
            "inner": inner,
            "histogram": spread,
            # Cells of no group are tested as well, and count in the false discovery rate.
            "all": np.bincount(found.ravel(), minlength=terms * len(levels)),
            "changes": summed(changes, codes, len(names)),
        }
        columns: dict[str, npt.NDArray[Any]] = {}
        matrices: dict[str, npt.NDArray[np.float32]] = {}
        for position, term in enumerate(options.sample_covariates):
            columns |= {f"effect_{slug(term)}": effect[:, position], f"p_{slug(term)}": p[:, position]}
            if options.genes:
                matrices[f"lfc_{slug(term)}"] = changes[:, position]
        return Part(columns, matrices, sums | made.told())

    @override
    def finish(self, sums: Sequence[Sums], facts: Facts, options: EffectOptions) -> Finished:
        levels = _levels(options)
        counts = np.sum([part["all"] for part in sums], axis=0, dtype=np.int64) if sums else np.zeros(0, np.int64)
        rates = _rates(levels, counts.reshape(-1, len(levels)).sum(axis=0))
        total = together(sums, ("cells", "effect", "inner", "histogram", "changes"))
        tables = {"multivariate_de": _table(total, Design.of(sums[0]), rates, options)} if sums else {}
        if options.genes and sums:
            tables["multivariate_de_genes"] = _genes(total, options)
        return Finished(tables, {"fdr_of_level": rates.tolist()})

    @override
    def settle(
        self, columns: Mapping[str, npt.NDArray[Any]], finished: Finished, options: EffectOptions
    ) -> Mapping[str, npt.NDArray[Any]]:
        levels, rates = _levels(options), np.array(finished.facts["fdr_of_level"])
        found = {}
        for term in options.sample_covariates:
            p = columns[f"p_{slug(term)}"]
            found[f"fdr_{slug(term)}"] = rates[np.minimum(np.searchsorted(levels, p * (1 - 1e-12)), len(levels) - 1)]
        return found


def _effects(
    cells: Cells, made: Design, options: EffectOptions, groups: int, codes: npt.NDArray[np.int64]
) -> tuple[Matrix, Matrix, npt.NDArray[np.float32], Matrix]:
    """Effects, p-values and log fold changes of cells, and each group's sum of inner products."""
    of, weights = Counterfactual(cells), slopes(made)
    count, terms = len(codes), len(weights)
    tests = [Permuted.of(made, term, options.permutations) for term in range(terms)]
    genes, batches = positions(cells, options.genes), decoded_batches(cells, options.transform_batch)
    effect, p = np.empty((count, terms)), np.empty((count, terms))
    changes = np.zeros((count, terms, len(genes)), np.float32)
    sums = np.zeros((groups, len(made.samples), len(made.samples)))
    width = 2 * tests[0].term.size * (1 + tests[0].rest.shape[1])
    decoded = 4 * len(cells.facts.names) if len(genes) else 0
    for rows in pieces(count, max(len(of.samples) * cells.facts.latent_sizes["z"], decoded)):
        inner = np.zeros((rows.stop - rows.start, len(made.samples), len(made.samples)))
        for _ in range(options.samples):
            base, residual = of.shifts(of.draw(rows, 1)[:, 0], drawn=True)
            values = residual[:, made.samples].double()
            values = values - values.mean(dim=1, keepdim=True)
            inner += (values @ values.transpose(1, 2)).cpu().numpy() / options.samples
            if len(genes):
                middle = residual[:, made.samples].mean(dim=1) + base
                changes[rows] += fold_changes(cells, middle, values, weights, batches, genes) / options.samples
        effect[rows] = np.sqrt(np.maximum(np.einsum("ta,nab,tb->nt", weights, inner, weights, optimize=True), 0))
        for term, test in enumerate(tests):
            found = [test.test(inner[some])[1] for some in pieces(len(inner), width)]
            p[rows, term] = np.concatenate(found)
        sums += summed(inner, codes[rows], groups)
    return effect, p, changes, sums


def _levels(options: EffectOptions) -> Matrix:
    """p-values that are told apart, rising: those that permutations give; else 100 a decade, rounded up."""
    if options.mode == "permutation":
        return np.arange(1, options.permutations + 2) / (options.permutations + 1)
    return np.logspace(-16, 0, 1601)


def _rates(levels: Matrix, counts: npt.NDArray[np.int64]) -> Matrix:
    """False discovery rate of each level by Benjamini & Hochberg, from how many p-values are at each."""
    below = np.cumsum(counts)
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = np.where(below > 0, levels * counts.sum() / below, 1.0)
    found: Matrix = np.minimum(np.minimum.accumulate(rate[::-1])[::-1], 1.0)
    return found


def _table(total: Mapping[str, Sums], made: Design, rates: Matrix, options: EffectOptions) -> Any:
    import pandas as pd

    rows: list[dict[str, Any]] = []
    terms = len(options.sample_covariates)
    for name, one in total.items():
        spread = one["histogram"].reshape(terms, -1)
        for position, term in enumerate(options.sample_covariates):
            share, p = np.nan, np.nan
            if options.mode == "permutation":
                tested = Permuted.of(made, position, options.permutations).test(one["inner"][None] / one["cells"])
                share, p = (float(values[0]) for values in tested)
            rows.append(
                {
                    "group": name,
                    "term": term,
                    "of": made.raised[position],
                    "cells": int(one["cells"]),
                    "effect": one["effect"][position] / one["cells"],
                    "share": share,
                    "p": p,
                    "significant": spread[position, rates <= options.fdr].sum() / one["cells"],
                }
            )
    table = pd.DataFrame(rows, columns=["group", "term", "of", "cells", "effect", "share", "p", "significant"])
    table.insert(7, "fdr", adjusted(table["p"].to_numpy(np.float64)))
    return table


def _genes(total: Mapping[str, Sums], options: EffectOptions) -> Any:
    import pandas as pd

    rows = [
        (name, term, gene, float(one["changes"][i, j] / one["cells"]))
        for name, one in total.items()
        for i, term in enumerate(options.sample_covariates)
        for j, gene in enumerate(options.genes)
    ]
    return pd.DataFrame(rows, columns=["group", "term", "gene", "lfc"])


ANALYSES: tuple[Analysis, ...] = (MultivariateDE(),)
