"""A row's bits are its own: whatever the number of rows, its place, and the number of threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from scviaduct.families.network import Layer, Network
from scviaduct.families.rowwise import ROWS, elementwise, linear, padded, rows_of
from scviaduct.families.sparse import SparseEncoder

N = 1024
# Where PyTorch's own product gives a row other bits, as a rule: few rows, an odd number of outputs, two threads.
SHAPES = [(128, 128), (10, 9), (10, 7), (128, 10), (50, 33), (16, 1), (1, 16), (512, 300)]


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(("n_in", "n_out"), SHAPES)
def test_a_linear_layer(threads, n_in, n_out):
    torch.manual_seed(0)
    values, weight, bias = torch.randn(N, n_in), torch.randn(n_out, n_in), torch.randn(n_out)
    whole = linear(values, weight, bias)
    exact = values.double() @ weight.double().T + bias
    assert (whole - exact).abs().max() <= 2e-6 * exact.abs().max()
    for rows in (torch.arange(1), torch.arange(2), torch.arange(3), torch.arange(7), torch.randperm(N)):
        assert torch.equal(linear(values[rows], weight, bias), whole[rows])
    assert torch.equal(linear(values, weight), linear(values, weight, torch.zeros(n_out)))


def test_shapes():
    values, weight = torch.randn(6, 4, 3), torch.randn(5, 3)
    assert torch.equal(linear(values, weight), linear(values.reshape(24, 3), weight).reshape(6, 4, 5))
    assert linear(values[:0], weight).shape == (0, 4, 5)
    assert linear(values.requires_grad_(), weight).requires_grad


@pytest.mark.parametrize(
    "function", [nn.functional.softplus, nn.functional.gelu, nn.functional.silu, nn.functional.elu]
)
@pytest.mark.parametrize("width", [7, 20, 128])
def test_functions_of_elements(threads, function, width):
    torch.manual_seed(0)
    values = torch.randn(N, width)
    whole = elementwise(function, values)
    assert torch.allclose(whole, function(values), atol=1e-6)
    for rows in (torch.arange(ROWS), torch.arange(5 * ROWS), torch.randperm(N), torch.arange(ROWS) + 900):
        assert torch.equal(elementwise(function, values[rows]), whole[rows])


@pytest.mark.parametrize("function", [torch.log1p, torch.exp, lambda x: torch.softmax(x, -1)])
def test_functions_that_are_trusted(threads, function):
    torch.manual_seed(0)
    values = torch.rand(N, 9) * 5
    whole = function(values)
    for rows in (torch.arange(1), torch.arange(3), torch.arange(37), torch.randperm(N)):
        assert torch.equal(function(values[rows]), whole[rows])


def test_attention_and_norms_that_are_trusted(threads):
    torch.manual_seed(0)
    queries, keys, values = torch.randn(N, 2, 7, 3), torch.randn(N, 2, 8, 3), torch.randn(N, 2, 8, 3)

    def told(rows):
        found = nn.functional.scaled_dot_product_attention(queries[rows], keys[rows], values[rows])
        return nn.functional.layer_norm(found, (3,), eps=1e-6)

    whole = told(torch.arange(N))
    for rows in (torch.arange(1), torch.arange(3), torch.arange(33), torch.randperm(N)):
        assert torch.equal(told(rows), whole[rows])


def test_padding():
    assert [rows_of(n, N, "cpu") for n in (0, 1, 32, 33, N)] == [0, 32, 32, 64, N]
    assert [rows_of(n, N, "cuda:0") for n in (0, 1, N)] == [0, N, N]
    assert padded(np.array([0, 3, 5]), 5).tolist() == [0, 3, 5, 5, 5]
    assert padded(np.array([[1.0, 2.0]]), 2).tolist() == [[1, 2], [1, 2]]


def test_layers_and_encoders_sum_so():
    """A classifier of nine labels, and continuous covariates of the first layer."""
    torch.manual_seed(0)
    values = torch.randn(N, 10)
    layer = Layer(torch.randn(9, 10), torch.randn(9))
    some = torch.arange(1, 8)
    assert torch.equal(layer(values[some]), layer(values)[some])

    first = Layer(torch.randn(9, 30), torch.randn(9), activation="ReLU()")
    encoder = SparseEncoder(Network((first,), Layer(torch.randn(7, 9), torch.randn(7)), layer_of(7, 9), 20))
    counts, none = torch.arange(0, 2 * N + 1, 2), torch.zeros(2 * N, dtype=torch.int32)
    whole, _ = encoder(counts, none, torch.ones(2 * N), (), values)
    part, _ = encoder(counts[:8], none[:14], torch.ones(14), (), values[some])
    assert torch.equal(part, whole[some])


def layer_of(n_out, n_in):
    return Layer(torch.randn(n_out, n_in), torch.randn(n_out))
