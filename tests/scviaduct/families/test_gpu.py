"""On a GPU the same latents and labels come out as on a CPU.

Tolerance: max |difference| / sd <= 1e-5. Both sum the same float32 products, in another order; TensorFloat-32 is off,
as PyTorch leaves it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse

from scviaduct.families.base import Covariates
from scviaduct.families.network import Layer, Network
from scviaduct.families.vae import VaeEncoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and PyTorch sees none"),
]


def layer(n_in, n_out, activation="ReLU()", tables=()):
    linear = torch.nn.Linear(n_in, n_out)
    return Layer(linear.weight.detach(), linear.bias.detach(), tables, activation=activation)


@pytest.fixture(params=[(2000, 128), (8000, 512)], ids=["2,000 genes", "8,000 genes, in blocks"])
def network(request):
    """Two layers that read a batch, and a classifier of nine labels."""
    genes, hidden = request.param
    torch.manual_seed(0)
    tables = (torch.randn(3, hidden),)
    layers = (layer(genes, hidden, tables=tables), layer(hidden, hidden, tables=tables))
    made = Network(layers, layer(hidden, 30, ""), layer(hidden, 30, ""), genes)
    classifier = (layer(30, 128), layer(128, 9, ""))
    return replace(made, classifier=classifier, labels=tuple("abcdefghi"))


@pytest.mark.parametrize("cells", [0, 1, 40_000])
def test_a_gpu_gives_what_a_cpu_gives(network, cells):
    rng = np.random.default_rng(0)
    counts = sparse.random(
        cells, network.n_genes, 0.02, "csr", np.float32, rng, data_rvs=lambda n: rng.geometric(0.5, n)
    )
    counts.sort_indices()
    parts = counts.indptr.astype(np.int64), counts.indices.astype(np.int32), counts.data
    covariates = Covariates(batch=rng.integers(0, 3, cells))
    here, there = (VaeEncoder({"latent": network}, device) for device in ("cpu", "cuda"))
    expected, found = here.encode(*parts, covariates), there.encode(*parts, covariates)
    for name in ("mean", "location", "variance"):
        a, b = getattr(expected, name), getattr(found, name)
        assert a.shape == b.shape == (cells, 30)
        if cells:
            assert np.abs(a - b).max() / a.std() <= 1e-5
    a, b = here.classify(expected.location), there.classify(found.location)
    np.testing.assert_allclose(a, b, atol=1e-5)
    decided = np.abs(np.diff(np.sort(a, axis=1)[:, -2:], axis=1)).ravel() > 1e-5
    np.testing.assert_array_equal(a.argmax(1)[decided], b.argmax(1)[decided])
