"""Samples (donors) as the units of a comparison: their covariates, a design, and permutations of it.

Cells of one donor are no replicates, so whatever is tested here is tested by exchanging whole samples. The statistic of
a term is the pseudo-F of McArdle & Anderson (Ecology 2001), which needs of the samples' values nothing but their inner
products; its distribution comes from permuting the residuals of the model without the term (Freedman & Lane, 1983), as
Anderson & Robinson (2001) recommend for partial tests.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from scviaduct.errors import DataError, InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt
    import pandas as pd

    from scviaduct.analysis.base import Cells
    from scviaduct.values import LongArray

    Matrix = npt.NDArray[np.float64]

_EXAMPLE = "Name obs columns that are constant within a sample, e.g. genotype, stimulation, genotype:stimulation."


def columns_of(terms: Sequence[str]) -> tuple[str, ...]:
    """obs columns that terms are made of, each once."""
    factors = [factor for term in terms for factor in term.split(":")]
    return tuple(dict.fromkeys(factor.partition("=")[0] for factor in factors))


def slug(term: str) -> str:
    """A term as part of a column's name: ``genotype:stimulation`` is ``genotype_x_stimulation``."""
    return re.sub(r"\W+", "_", term.replace(":", "_x_")).strip("_")


def require_terms(terms: Sequence[str], *, products: bool = True) -> None:
    """Refuse terms that cannot be read.

    Parameters
    ----------
    terms
        Each is an obs column (numbers, or one of two values), ``COLUMN=VALUE`` (one value against all others), or such
        factors joined by ``:`` (their interaction).
    products
        Whether interactions are allowed.

    Raises
    ------
    InputError
        Naming the term.
    """
    if not terms:
        raise InputError("--sample-covariates is empty.", _EXAMPLE)
    seen: dict[str, str] = {}
    for term in terms:
        factors = [factor.partition("=") for factor in term.split(":")]
        if not all(column and (value or not equals) for column, equals, value in factors):
            raise InputError(f"--sample-covariates: '{term}' is not a term.", _EXAMPLE)
        if len(factors) > 1 and not products:
            raise InputError(
                f"--sample-covariates: '{term}' is an interaction, and abundance is compared one covariate at a time.",
                f"Name its parts: {', '.join(term.split(':'))}.",
            )
        if slug(term) in seen:
            raise InputError(
                f"--sample-covariates: '{seen[slug(term)]}' and '{term}' would have the same columns.",
                "Name each term once; rename a column whose name differs in signs alone.",
            )
        seen[slug(term)] = term


@dataclass(frozen=True, slots=True)
class Design:
    """What is compared: samples and their terms.

    Attributes
    ----------
    samples
        int64, shape ``(n_samples,)``: positions of those that have cells, among the samples of the facts.
    values
        float64, shape ``(n_samples, n_terms)``: each term, 0/1 for a value against the other.
    raised
        What a term's 1 stands for, one text a term.
    """

    samples: LongArray
    values: Matrix
    raised: tuple[str, ...]

    def told(self) -> dict[str, npt.NDArray[Any]]:
        """As arrays, for units and for :meth:`~scviaduct.analysis.base.Output.finish`."""
        return {"samples": self.samples, "values": self.values, "raised": np.array(self.raised, np.str_)}

    @classmethod
    def of(cls, told: Mapping[str, npt.NDArray[Any]]) -> Design:
        """What :meth:`told` gave."""
        return cls(told["samples"], told["values"], tuple(map(str, told["raised"])))


def design(cells: Cells, own: LongArray, terms: Sequence[str]) -> Design:
    """The design of the samples that some cells are of.

    Parameters
    ----------
    cells
        Some of every sample, with the columns of the terms in ``obs``.
    own
        int64, shape ``(n_cells,)``: each cell's sample among those of the facts.
    terms
        That :func:`require_terms` passed.

    Raises
    ------
    InputError
        If a covariate is missing in or varies within a sample, or is text of other than two values.
    """
    samples = np.unique(own)
    names = [cells.facts.sample_categories[code] for code in samples]
    covariates = {column: _by_sample(cells.obs[column], own, samples, names) for column in columns_of(terms)}
    parts = [[_coded(factor, covariates) for factor in term.split(":")] for term in terms]
    values = np.column_stack([np.prod([coded for coded, _ in part], axis=0) for part in parts])
    return Design(samples, values, tuple(":".join(raised for _, raised in part) for part in parts))


def _by_sample(column: pd.Series[Any], own: LongArray, samples: LongArray, names: Sequence[str]) -> list[Any]:
    """The one value of a covariate in each sample."""
    import pandas as pd

    found = []
    for code, name in zip(samples, names, strict=True):
        values = column[own == code].unique()
        if len(values) != 1:
            told = ", ".join(repr(str(value)) for value in values[:3])
            raise InputError(
                f"{column.name}: the cells of sample '{name}' have {len(values)} values ({told}).",
                "A covariate of samples is constant within each; name another column.",
            )
        if pd.isna(values[0]):
            raise InputError(f"{column.name}: the sample '{name}' has no value.", "Fill it, or select other samples.")
        found.append(values[0])
    return found


def _coded(factor: str, covariates: Mapping[str, list[Any]]) -> tuple[Matrix, str]:
    """A factor's numbers, and what it is where it is 1."""
    column, equals, value = factor.partition("=")
    found = covariates[column]
    texts = [str(one) for one in found]
    known = sorted(set(texts))
    if not equals:
        if all(isinstance(one, int | float | np.number) and not isinstance(one, bool) for one in found):
            return np.array(found, np.float64), column
        if len(known) != 2:
            raise InputError(
                f"{column} has {len(known)} values over the samples ({', '.join(known[:5])}), and a term needs two.",
                f"Compare one with all others: {column}={known[-1]}.",
            )
        value = known[1]
    if value not in known:
        raise InputError(f"{column}: no sample is '{value}'.", f"There are: {', '.join(known[:8])}.")
    return np.array([float(text == value) for text in texts]), f"{column}={value}"


def require_same(cells: Cells, own: LongArray, told: Design, terms: Sequence[str]) -> None:
    """Refuse cells whose covariates are not those of their sample in the design: the sample missed them.

    Raises
    ------
    DataError
        Naming the sample.
    """
    there = np.isin(own, told.samples)
    missed = own[~there]
    if len(missed):
        name = cells.facts.sample_categories[missed[0]]
        raise DataError(f"The sample '{name}' is not in the design.", "Derive again, with more cells of each sample.")
    for position, code in enumerate(told.samples):
        rows = cells.obs[own == code]
        for term, raised, value in zip(terms, told.raised, told.values[position], strict=True):
            coded = np.ones(len(rows))
            for factor in raised.split(":"):
                column, equals, level = factor.partition("=")
                of_cells = rows[column]
                coded *= (of_cells.astype(str) == level).to_numpy() if equals else of_cells.to_numpy(np.float64)
            if len(rows) and not np.array_equal(coded, np.full(len(rows), value)):
                name = cells.facts.sample_categories[code]
                raise DataError(
                    f"{term}: cells of sample '{name}' have other values than its first ones.",
                    "A covariate of samples is constant within each; name another column.",
                )


def require_rank(told: Design, terms: Sequence[str]) -> None:
    """Refuse a design whose effects cannot be told apart, or that leaves no donor to tell chance by.

    Raises
    ------
    InputError
        Naming the term that the others and a constant say already.
    """
    known = np.ones((len(told.samples), 1))
    for term, values in zip(terms, told.values.T, strict=True):
        wider = np.column_stack([known, values])
        if np.linalg.matrix_rank(wider) <= known.shape[1]:
            raise InputError(
                f"--sample-covariates: over these {len(known)} samples, '{term}' says nothing that the terms before it"
                " and a constant do not.",
                "Leave it out, or add samples of the conditions that are missing.",
            )
        known = wider
    if len(known) <= known.shape[1]:
        raise InputError(
            f"{len(known)} samples are too few for {len(terms)} terms: nothing is left to tell chance by.",
            "Add samples, or leave terms out.",
        )


def slopes(told: Design) -> Matrix:
    """Weights of the samples in the least-squares slope of each term, shape ``(n_terms, n_samples)``.

    A constant is fitted besides. scvi-tools (1.5.1) centres the samples' values but not the design and fits none, so
    that an effect of genotype alone comes out as half of it, and as one of stimulation and of the interaction too.
    """
    full = np.column_stack([np.ones(len(told.samples)), told.values])
    found: Matrix = np.linalg.pinv(full)[1:]
    return found


@dataclass(frozen=True, slots=True)
class Permuted:
    """What the test of one term multiplies the samples' values by; index 0 of the first axis permutes nothing.

    Attributes
    ----------
    term
        float64, shape ``(1 + permutations, n_samples)``.
    rest
        float64, shape ``(1 + permutations, n_others, n_samples)``: what the other terms explain of permuted residuals.
    residual
        float64, shape ``(n_samples, n_samples)``: takes what the other terms explain out.
    """

    term: Matrix
    rest: Matrix
    residual: Matrix

    @classmethod
    def of(cls, told: Design, term: int, permutations: int) -> Permuted:
        """Permutations by a seed of their own, so that every unit has the same.

        Parameters
        ----------
        told
            That :func:`require_rank` passed.
        term
            Position of the term.
        permutations
            How many.
        """
        count = len(told.samples)
        others = np.column_stack([np.ones(count), np.delete(told.values, term, axis=1)])
        basis, _ = np.linalg.qr(others)
        residual = np.eye(count) - basis @ basis.T
        direction = residual @ told.values[:, term]
        direction /= np.linalg.norm(direction)
        rng = np.random.default_rng([permutations, term])
        orders = np.stack([np.arange(count), *(rng.permutation(count) for _ in range(permutations))])
        rest = np.swapaxes(basis[orders], 1, 2) @ residual
        return cls(direction[orders] @ residual, rest, residual)

    def test(self, inner: Matrix) -> tuple[Matrix, Matrix]:
        """Test a term.

        Parameters
        ----------
        inner
            Inner products of the samples' values, float64 of shape ``(n, n_samples, n_samples)``.

        Returns
        -------
        share : ndarray
            float64, shape ``(n,)``: the term's share of the variation that the other terms leave (partial R squared).
        p : ndarray
            float64, shape ``(n,)``: share of permutations, the given order among them, whose pseudo-F is as large.
        """
        explained = _quadratic(self.term, inner)
        total = np.einsum("ab,nba->n", self.residual, inner)[:, None]
        shape = self.rest.shape
        again = _quadratic(self.rest.reshape(-1, shape[2]), inner).reshape(-1, shape[0], shape[1]).sum(axis=2)
        left = np.maximum(total - again - explained, np.finfo(np.float64).tiny)
        ratio = explained / left
        # Orders that come to the same design differ in the last bits.
        p = (ratio >= ratio[:, :1] * (1 - 1e-9)).mean(axis=1)
        return explained[:, 0] / np.maximum(total[:, 0], np.finfo(np.float64).tiny), p


def _quadratic(weights: Matrix, inner: Matrix) -> Matrix:
    """``w' G w`` of every row of weights and every matrix, shape ``(n, n_weights)``."""
    found: Matrix = np.einsum("nwb,wb->nw", weights @ inner, weights)
    return found


def adjusted(p: Matrix) -> Matrix:
    """False discovery rates by Benjamini & Hochberg (1995); NaN, of what was not tested, stays and does not count."""
    from scipy.stats import false_discovery_control

    out = np.full(len(p), np.nan)
    tested = ~np.isnan(p)
    out[tested] = false_discovery_control(p[tested], method="bh")
    return out
