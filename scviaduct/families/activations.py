"""What follows an encoder's products, compiled: norms, activations, a posterior's variance, probabilities of labels.

All of it depends on a cell's own values alone, which are summed in one order: a cell's bits are the same in any
company, at any place and, but for GELU's error function, on any processor.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numba import types

from scviaduct.compiling import compiled
from scviaduct.elementary import exp_of, log1p_of
from scviaduct.lanes import fma

if TYPE_CHECKING:
    from scviaduct.values import FloatArray

_NONE, _RELU, _LEAKY, _ELU, _GELU, _SILU, _SOFTPLUS, _TANH = range(8)
CODES = {
    "": _NONE,
    "ReLU()": _RELU,
    "LeakyReLU(negative_slope=0.01)": _LEAKY,
    "ELU(alpha=1.0)": _ELU,
    "GELU(approximate='none')": _GELU,
    "SiLU()": _SILU,
    "Softplus(beta=1.0, threshold=20.0)": _SOFTPLUS,
    "Tanh()": _TANH,
}
"""PyTorch's activations to what the kernels call them."""
VARIANCES = {"exp": 0, "softplus": 1}
"""What makes a variance positive, likewise."""
_ZERO, _HALF, _ONE, _TWO = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2)
_SLOPE, _ROOT_HALF, _LINEAR = np.float32(0.01), np.float32(math.sqrt(0.5)), np.float32(20)
_table = types.Array(types.float32, 2, "C", readonly=True)
_row = types.Array(types.float32, 1, "C", readonly=True)
_written = types.Array(types.float32, 2, "C")


@compiled()
def _softplus(value: np.float32) -> np.float32:
    """``log(1 + exp(value))``; PyTorch takes the number itself above 20."""
    return value if value > _LINEAR else log1p_of(exp_of(value))


@compiled()
def _distances(values: FloatArray, at: int, n: int, mean: np.float32) -> tuple[np.float32, np.float32]:
    """Sum of some values' distances from a mean, and of their squares: eight sums of each, then those."""
    a = b = c = d = e = f = g = h = aa = bb = cc = dd = ee = ff = gg = hh = _ZERO
    for i in range(at, at + n // 8 * 8, 8):
        p, q, r, s = values[i] - mean, values[i + 1] - mean, values[i + 2] - mean, values[i + 3] - mean
        t, u, v, w = values[i + 4] - mean, values[i + 5] - mean, values[i + 6] - mean, values[i + 7] - mean
        a, b, c, d, e, f, g, h = a + p, b + q, c + r, d + s, e + t, f + u, g + v, h + w
        aa, bb, cc, dd = fma(p, p, aa), fma(q, q, bb), fma(r, r, cc), fma(s, s, dd)
        ee, ff, gg, hh = fma(t, t, ee), fma(u, u, ff), fma(v, v, gg), fma(w, w, hh)
    total, squares = ((a + b) + (c + d)) + ((e + f) + (g + h)), ((aa + bb) + (cc + dd)) + ((ee + ff) + (gg + hh))
    for i in range(at + n // 8 * 8, at + n):
        p = values[i] - mean
        total, squares = total + p, fma(p, p, squares)
    return total, squares


@compiled(types.void(_written, _row, _row, types.float32), error_model="numpy")
def normalise(sums: FloatArray, weight: FloatArray, bias: FloatArray, eps: np.float32) -> None:
    """Layer norm, in place.

    Parameters
    ----------
    sums
        float32, shape ``(n_rows, >= n_out)``; what lies behind a row's first ``n_out`` values stays as it is.
    weight, bias
        float32, shape ``(n_out,)``.
    eps
        Added to the variance.
    """
    n = len(weight)
    size, flat = np.float32(n), sums.reshape(-1)
    for row in range(len(sums)):
        at = row * sums.shape[1]
        mean = _distances(flat, at, n, _ZERO)[0] / size
        scale = _ONE / np.sqrt(_distances(flat, at, n, mean)[1] / size + eps)
        for i in range(n):
            flat[at + i] = (flat[at + i] - mean) * scale * weight[i] + bias[i]


@compiled(types.void(_written, types.int64), error_model="numpy")
def activate(sums: FloatArray, activation: int) -> None:
    """Apply an activation in place; NaN stays NaN.

    Parameters
    ----------
    sums
        float32, any shape of two dimensions.
    activation
        Of :data:`CODES`. ELU and Tanh err by 1.2e-7 of one, not of what they give near zero.
    """
    x = sums.reshape(-1)
    if activation == _RELU:
        for i in range(len(x)):
            x[i] = max(x[i], _ZERO)
    elif activation == _LEAKY:
        for i in range(len(x)):
            x[i] = x[i] * _SLOPE if x[i] < _ZERO else x[i]
    elif activation == _ELU:
        for i in range(len(x)):
            x[i] = exp_of(x[i]) - _ONE if x[i] < _ZERO else x[i]
    elif activation == _GELU:
        for i in range(len(x)):
            x[i] = _HALF * x[i] * (_ONE + np.float32(math.erf(x[i] * _ROOT_HALF)))
    elif activation == _SILU:
        for i in range(len(x)):
            x[i] = x[i] / (_ONE + exp_of(-x[i]))
    elif activation == _SOFTPLUS:
        for i in range(len(x)):
            x[i] = _softplus(x[i])
    elif activation == _TANH:
        for i in range(len(x)):
            x[i] = _ONE - _TWO / (_ONE + exp_of(x[i] + x[i]))


@compiled(types.void(_table, _written, _written, types.int64, types.float32))
def posterior(ends: FloatArray, mean: FloatArray, variance: FloatArray, positive: int, eps: np.float32) -> None:
    """Fill in means and variances.

    Parameters
    ----------
    ends
        float32, shape ``(>= n_cells, >= 2 * n_latent)``: means, and behind them what variances are made of.
    mean, variance
        float32, shape ``(n_cells, n_latent)``.
    positive
        Of :data:`VARIANCES`.
    eps
        Least variance.
    """
    n = mean.shape[1]
    found, means, variances = ends.reshape(-1), mean.reshape(-1), variance.reshape(-1)
    for cell in range(len(mean)):
        at, own = cell * ends.shape[1], cell * n
        for i in range(n):
            means[own + i] = found[at + i]
            variances[own + i] = found[at + n + i]
    if positive == 0:
        for i in range(len(variances)):
            variances[i] = exp_of(variances[i]) + eps
    else:
        for i in range(len(variances)):
            variances[i] = _softplus(variances[i]) + eps


@compiled(types.void(_table, _written), error_model="numpy")
def softmax(logits: FloatArray, out: FloatArray) -> None:
    """Fill in probabilities.

    Parameters
    ----------
    logits
        float32, shape ``(>= n_cells, >= n_labels)``.
    out
        float32, shape ``(n_cells, n_labels)``.
    """
    n = out.shape[1]
    found, told = logits.reshape(-1), out.reshape(-1)
    for cell in range(len(out)):
        at, own = cell * logits.shape[1], cell * n
        most = found[at]
        for i in range(1, n):
            most = max(most, found[at + i])
        for i in range(n):
            told[own + i] = found[at + i] - most
    for i in range(len(told)):  # of all cells at once: what fills no register of a row would take as long as the rest
        told[i] = exp_of(told[i])
    for own in range(0, len(told), n):
        total = _ZERO
        for i in range(own, own + n):
            total += told[i]
        for i in range(own, own + n):
            told[i] /= total
