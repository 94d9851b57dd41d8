"""Exponentials and logarithms: how far from exact, and the same bits wherever a number stands."""

from __future__ import annotations

import numpy as np
import pytest
from numba import types

from scviaduct.compiling import compiled
from scviaduct.elementary import exp_of, log1p_of, log_of

_array = types.Array(types.float32, 1, "C")


@compiled(types.void(_array, _array))
def exponentials(values, out):
    for i in range(len(values)):
        out[i] = exp_of(values[i])


@compiled(types.void(_array, _array))
def logarithms(values, out):
    for i in range(len(values)):
        out[i] = log_of(values[i])


@compiled(types.void(_array, _array))
def logarithms_of_one_more(values, out):
    for i in range(len(values)):
        out[i] = log1p_of(values[i])


@pytest.mark.parametrize(
    ("function", "exact", "values", "most"),
    [
        (exponentials, np.exp, np.linspace(-87, 88.7, 200_001), 1.2e-7),
        (logarithms, np.log, np.geomspace(1.2e-38, 3.4e38, 200_001), 1.2e-7),
        (logarithms_of_one_more, np.log1p, np.geomspace(1e-9, 1e30, 200_001), 2.5e-7),
    ],
)
def test_they_are_exact_to_rounding_and_alike_at_every_place(function, exact, values, most):
    values = values.astype(np.float32)
    found = np.empty_like(values)
    function(values, found)
    expected = exact(values.astype(np.float64))
    assert (np.abs(found - expected) <= most * np.abs(expected)).all()
    for width in (1, 15, 17, 33):
        part = np.empty(width, np.float32)
        for start in range(0, 20_000, 997):
            function(values[start : start + width], part)
            assert (part == found[start : start + width]).all()


def test_what_is_not_finite():
    values = np.array([np.inf, -np.inf, np.nan, 89, -104, -90, 0, -0.0], np.float32)
    found = np.empty_like(values)
    exponentials(values, found)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(found, np.exp(values), rtol=1e-5)
    assert found[6] == found[7] == 1
