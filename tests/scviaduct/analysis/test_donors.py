"""Designs of samples, and the permutation test, against least squares done by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from scviaduct.analysis.donors import Design, Permuted, columns_of, require_rank, require_terms, slopes, slug
from scviaduct.errors import InputError

GENOTYPE, STIMULATION = np.arange(12) % 2, np.arange(12) // 2 % 2
VALUES = np.column_stack([GENOTYPE, STIMULATION, GENOTYPE * STIMULATION]).astype(float)
MADE = Design(np.arange(12), VALUES, ("g", "s", "g:s"))


def pseudo_f(values, y, term):
    """Of a term, by two fits."""
    ones = np.ones((len(y), 1))
    designs = np.hstack([ones, np.delete(values, term, axis=1)]), np.hstack([ones, values])
    left = [((y - design @ np.linalg.lstsq(design, y, rcond=None)[0]) ** 2).sum() for design in designs]
    return (left[0] - left[1]) / left[1], (left[0] - left[1]) / left[0]


@pytest.mark.parametrize("term", [0, 1, 2])
def test_the_test_is_that_of_permuted_residuals(term):
    rng = np.random.default_rng(term)
    y = rng.normal(size=(12, 5)) + VALUES[:, [term]] * 0.7
    y -= y.mean(axis=0)
    test = Permuted.of(MADE, term, 99)
    share, p = test.test((y @ y.T)[None])
    others = np.column_stack([np.ones(12), np.delete(VALUES, term, axis=1)])
    residuals = y - others @ np.linalg.lstsq(others, y, rcond=None)[0]

    # The same orders of the residuals, fitted anew each time (Freedman & Lane).
    rng = np.random.default_rng([99, term])
    orders = [np.argsort(rng.permutation(12)) for _ in range(99)]
    observed, expected_share = pseudo_f(VALUES, y, term)
    permuted = [pseudo_f(VALUES, residuals[order], term)[0] for order in orders]
    assert share[0] == pytest.approx(expected_share)
    assert p[0] == (1 + np.sum(np.array(permuted) >= observed * (1 - 1e-9))) / 100


def test_slopes_are_least_squares_with_a_constant():
    y = np.random.default_rng(0).normal(size=(12, 3)) + 5
    expected = np.linalg.lstsq(np.hstack([np.ones((12, 1)), VALUES]), y, rcond=None)[0][1:]
    np.testing.assert_allclose(slopes(MADE) @ y, expected, atol=1e-12)


def test_a_level_of_five_percent():
    """400 sets of donors without an effect, of correlated dimensions of unequal size."""
    rng = np.random.default_rng(3)
    y = rng.normal(size=(400, 12, 6)) @ (rng.normal(size=(6, 6)) * [3, 1, 1, 0.3, 0.1, 0.1])
    for term in range(3):
        _, p = Permuted.of(MADE, term, 199).test(y @ y.transpose(0, 2, 1))
        assert (p <= 0.05).mean() == pytest.approx(0.05, abs=0.035)


def test_terms():
    assert columns_of(("genotype=KO", "stim", "genotype=KO:stim")) == ("genotype", "stim")
    assert slug("genotype=KO:stim time") == "genotype_KO_x_stim_time"
    with pytest.raises(InputError, match=r"'a b' and 'a_b' would have the same columns"):
        require_terms(("a b", "a_b"))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (VALUES[:, [0, 0]], r"over these 12 samples, 'b' says nothing that the terms before it"),
        (np.ones((12, 1)), r"'a' says nothing that the terms before it and a constant do not"),
        (VALUES[:2, :1], r"2 samples are too few for 1 terms"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(values, reason):
    with pytest.raises(InputError, match=reason):
        require_rank(Design(np.arange(len(values)), values, ()), ("a", "b")[: values.shape[1]])


def test_a_design_travels_as_arrays():
    again = Design.of(MADE.told())
    assert again.raised == MADE.raised
    pd.testing.assert_frame_equal(pd.DataFrame(again.values), pd.DataFrame(MADE.values))
