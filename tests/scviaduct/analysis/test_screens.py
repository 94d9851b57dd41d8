"""Permutation within strata and exact odds ratios, against enumeration and against scipy where it has the same."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import minimize_scalar
from scipy.stats import contingency

from scviaduct.analysis import screens
from scviaduct.analysis.screens import enrichment, permutation_test


def skewed(random, sizes, shifts, effect=0.0):
    """Strata of exponential values, each shifted; the first group's by ``effect`` more."""
    return [
        (random.exponential(size=first) + shift + effect, random.exponential(size=second) + shift)
        for (first, second), shift in zip(sizes, shifts, strict=True)
    ]


# One stratum: scipy has the same.


@pytest.mark.parametrize(
    "table",
    [
        [[8, 2], [1, 5]],
        [[3, 60], [25, 470]],
        [[0, 12], [9, 40]],
        [[7, 0], [20, 31]],
        [[41, 9], [85, 1619]],
        [[500, 71], [85, 1619]],
        [[1, 1], [1, 1]],
    ],
)
def test_one_stratum_is_fishers_test(table):
    found = enrichment(np.array([table]))
    expected = contingency.odds_ratio(np.array(table), kind="conditional")
    interval = expected.confidence_interval(0.95)
    assert found.p_value == pytest.approx(stats.fisher_exact(table).pvalue, rel=1e-6)
    assert found.odds_ratio == pytest.approx(expected.statistic, rel=1e-5)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-5)


# Several strata: enumerate every way to fill the tables.

STRATA = [
    [[[3, 4], [2, 9]], [[1, 2], [4, 4]], [[5, 1], [3, 6]]],
    [[[0, 3], [5, 7]], [[2, 0], [6, 6]]],
    [[[4, 4], [4, 4]], [[0, 5], [0, 9]], [[2, 2], [0, 0]], [[0, 0], [3, 4]]],
]


def weights_by_sum(tables):
    """Number of ways to each sum of the first group's hits."""
    ways = {}
    choices = []
    for (a, b), (c, d) in tables:
        own, others, hits = a + b, c + d, a + c
        choices.append([(x, math.comb(own, x) * math.comb(others, hits - x)) for x in range(own + 1) if hits >= x])
    for chosen in itertools.product(*choices):
        total = sum(x for x, _ in chosen)
        ways[total] = ways.get(total, 0) + math.prod(way for _, way in chosen)
    return {total: way for total, way in ways.items() if way}


@pytest.mark.parametrize("tables", STRATA)
def test_strata_against_enumeration(tables):
    ways = weights_by_sum(tables)
    seen = sum(table[0][0] for table in tables)
    found = enrichment(np.array(tables))
    extreme = sum(way for way in ways.values() if way <= ways[seen] * (1 + 1e-9))
    assert found.p_value == pytest.approx(extreme / sum(ways.values()), rel=1e-9)

    def chances(log_odds):
        told = {total: way * math.exp(total * log_odds) for total, way in ways.items()}
        return {total: way / sum(told.values()) for total, way in told.items()}

    best = minimize_scalar(lambda x: -math.log(chances(x)[seen]), bounds=(-10, 10), method="bounded").x
    assert math.log(found.odds_ratio) == pytest.approx(best, abs=1e-3)
    at_low, at_high = chances(math.log(found.low)), chances(math.log(found.high))
    assert sum(chance for total, chance in at_low.items() if total >= seen) == pytest.approx(0.025, rel=1e-6)
    assert sum(chance for total, chance in at_high.items() if total <= seen) == pytest.approx(0.025, rel=1e-6)


def test_strata_approach_cochran_mantel_haenszel():
    contingency_tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    tables = np.array([[[60, 240], [90, 910]], [[45, 155], [100, 800]], [[20, 80], [70, 630]]])
    expected = contingency_tables.StratifiedTable([table.astype(float) for table in tables])
    found = enrichment(tables)
    assert found.odds_ratio == pytest.approx(expected.oddsratio_pooled, rel=0.01)
    assert (found.low, found.high) == pytest.approx(expected.oddsratio_pooled_confint(), rel=0.02)
    assert math.log(found.p_value) == pytest.approx(math.log(expected.test_null_odds(correction=True).pvalue), rel=0.1)


def test_strata_keep_a_confounded_batch_apart():
    # In each batch the odds are the same; the guide is mostly in the batch where hits are many.
    tables = np.array([[[90, 90], [50, 50]], [[2, 18], [80, 720]]])
    assert enrichment(tables).odds_ratio == pytest.approx(1, rel=1e-9)
    assert enrichment(tables).p_value == 1
    assert enrichment(tables.sum(axis=0, keepdims=True)).p_value < 1e-15


def test_margins_that_leave_nothing_to_chance():
    for tables in ([[[0, 4], [0, 9]]], [[[3, 4], [0, 0]]], [[[0, 0], [0, 0]]]):
        found = enrichment(np.array(tables))
        assert math.isnan(found.odds_ratio)
        assert (found.low, found.high, found.p_value) == (0.0, math.inf, 1.0)


# Permutation.


def test_effect_is_the_regression_on_the_label_within_strata():
    random = np.random.default_rng(1)
    strata = skewed(random, [(7, 30), (20, 12), (3, 40), (0, 9)], [0.0, 3.0, -2.0, 5.0], effect=0.4)
    effect, _ = permutation_test(strata, 10, random)
    rows = [
        (value, float(label == 0), stratum)
        for stratum, groups in enumerate(strata)
        for label, values in enumerate(groups)
        for value in values
    ]
    values, labels, stratum = map(np.array, zip(*rows, strict=True))
    design = np.column_stack([labels, *(stratum == i for i in range(4))]).astype(float)
    expected = np.linalg.lstsq(design, values, rcond=None)[0][0]
    assert effect == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("few", [64, 0], ids=["side by side", "one at a time"])
def test_p_value_is_that_of_all_permutations(monkeypatch, few):
    monkeypatch.setattr(screens, "_FEW", few)
    strata = skewed(np.random.default_rng(3), [(2, 4), (5, 2)], [0.0, 4.0], effect=0.7)
    centred = [np.concatenate(groups) - np.concatenate(groups).mean() for groups in strata]
    sums = [
        abs(sum(pool[list(chosen)].sum() for pool, chosen in zip(centred, picks, strict=True)))
        for picks in itertools.product(itertools.combinations(range(6), 2), itertools.combinations(range(7), 5))
    ]
    observed = abs(sum(pool[: len(first)].sum() for pool, (first, _) in zip(centred, strata, strict=True)))
    exact = np.mean(np.array(sums) >= observed - 1e-12)
    _, p_value = permutation_test(strata, 20_000, np.random.default_rng(0))
    assert 0.02 < exact < 0.8
    assert abs(p_value - exact) < 4 * math.sqrt(exact * (1 - exact) / 20_000)


@pytest.mark.parametrize("few", [64, 0], ids=["side by side", "one at a time"])
def test_every_set_is_drawn_equally_often(monkeypatch, few):
    monkeypatch.setattr(screens, "_FEW", few)
    monkeypatch.setattr(screens, "_MASK", 700)  # several passes
    # With powers of two, the sum tells the set.
    sums = screens._draws(2.0 ** np.arange(5), 2, 10_000, np.random.default_rng(0))
    sets, times = np.unique(sums, return_counts=True)
    assert set(sets) == {2.0**i + 2.0**j for i, j in itertools.combinations(range(5), 2)}
    assert stats.chisquare(times).pvalue > 1e-3


def test_p_values_are_uniform_without_an_effect():
    """Skewed values, batches that differ by many sd, and groups that are spread over them unevenly."""
    random = np.random.default_rng(5)
    sizes, shifts = [(40, 9), (4, 60), (12, 30)], [0.0, 6.0, -3.0]
    found = [permutation_test(skewed(random, sizes, shifts), 199, random)[1] for _ in range(400)]
    assert stats.kstest(found, "uniform").pvalue > 1e-3
    assert abs(np.mean(np.array(found) <= 0.05) - 0.05) < 4 * math.sqrt(0.05 * 0.95 / 400)


def test_a_planted_shift_is_found_and_is_never_zero():
    strata = skewed(np.random.default_rng(6), [(40, 90), (40, 60)], [0.0, 6.0], effect=1.0)
    effect, p_value = permutation_test(strata, 999, np.random.default_rng(0))
    assert effect == pytest.approx(1.0, abs=0.4)
    assert p_value == 1 / 1000


def test_a_shift_down_is_found_too():
    strata = skewed(np.random.default_rng(6), [(40, 90), (70, 60)], [0.0, 6.0], effect=-1.0)
    effect, p_value = permutation_test(strata, 999, np.random.default_rng(0))
    assert effect == pytest.approx(-1.0, abs=0.4)
    assert p_value == 1 / 1000


def test_no_stratum_of_both_groups_tells_nothing():
    none = np.empty(0)
    effect, p_value = permutation_test([(np.ones(3), none), (none, np.ones(4))], 99, np.random.default_rng(0))
    assert math.isnan(effect)
    assert math.isnan(p_value)


def test_values_that_are_all_one_number_give_one():
    assert permutation_test([(np.ones(3), np.ones(4))], 99, np.random.default_rng(0)) == (0.0, 1.0)
