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
from scviaduct.families.device import STEP, DeviceEncoder
from scviaduct.families.network import Layer, Network
from scviaduct.families.vae import VaeEncoder, fold

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


def blocks_of(n, genes=2000, seed=0):
    rng = np.random.default_rng(seed)
    counts = sparse.random(n, genes, 0.03, "csr", np.float32, rng, data_rvs=lambda size: rng.geometric(0.3, size))
    counts.sort_indices()
    return counts


def parts_of(counts):
    return counts.indptr.astype(np.int64), counts.indices.astype(np.int32), counts.data


@pytest.mark.parametrize("kernel", ["triton", "torch"])
@pytest.mark.parametrize("hidden", [128, 75])
def test_the_bits_of_a_cell_do_not_depend_on_its_neighbours_nor_on_what_counts_travel_as(kernel, hidden):
    torch.manual_seed(0)
    layers = (layer(2000, hidden, tables=(torch.randn(3, hidden),)), layer(hidden, hidden))
    network = Network(layers, layer(hidden, 9, ""), layer(hidden, 9, ""), 2000)
    encoder = DeviceEncoder({"latent": network.to("cuda")}, "cuda", kernel=kernel, feeders=3)
    some, others = blocks_of(300), blocks_of(STEP + 5000, seed=1)
    batch = np.arange(300) % 3
    alone = encoder.encode(*parts_of(some), Covariates(batch=batch))
    for neighbour in (1.0, 300.0, 0.5, 70_000.0):  # travels as uint8, uint16, float32, float32
        for start in (0, 7, 4001, STEP - 150, STEP + 4990):
            around = others.copy()
            around.data[::50] = neighbour
            block = sparse.csr_matrix(sparse.vstack([around[:start], some, around[start:]]))
            codes = np.concatenate([np.zeros(start, int), batch, np.ones(around.shape[0] - start, int)])
            found = encoder.encode(*parts_of(block), Covariates(batch=codes))
            for name in ("mean", "location", "variance"):
                np.testing.assert_array_equal(getattr(found, name)[start : start + 300], getattr(alone, name))


def covariates_of(n):
    rng = np.random.default_rng(3)
    codes = np.stack([rng.integers(0, 2, n), rng.integers(0, 4, n)], axis=1)
    return Covariates(rng.integers(0, 3, n), codes, rng.normal(size=(n, 2)).astype(np.float32))


@pytest.mark.parametrize("kernel", ["triton", "torch"])
def test_covariates_norms_and_further_latents(kernel):
    torch.manual_seed(0)
    networks = {}
    for name, log in (("latent", True), ("other", False)):
        tables = (torch.randn(3, 96), None, torch.randn(4, 96))
        first = replace(layer(2002, 96, tables=tables), norm=(torch.rand(96), torch.randn(96)), norm_eps=1e-5)
        layers = (first, layer(96, 96, "GELU(approximate='none')", tables))
        made = Network(layers, layer(96, 10, ""), layer(96, 10, ""), 2000, log_variational=log)
        networks[name] = replace(made, logistic_normal=log)
    counts = blocks_of(20_000)
    there = {name: network.to("cuda") for name, network in networks.items()}
    expected = VaeEncoder(networks).encode(*parts_of(counts), covariates_of(20_000))
    found = DeviceEncoder(there, "cuda", kernel=kernel).encode(*parts_of(counts), covariates_of(20_000))
    for name in ("mean", "location", "variance"):
        a, b = getattr(expected, name), getattr(found, name)
        assert np.abs(a - b).max() / a.std() <= 1e-5
    assert set(found.others) == {"other"}
    assert np.abs(found.others["other"] - expected.others["other"]).max() / expected.others["other"].std() <= 1e-5


@torch.inference_mode()
def test_latents_and_labels_are_those_of_scvi_tools_on_a_cpu():
    anndata, scvi = pytest.importorskip("anndata"), pytest.importorskip("scvi")
    cells = anndata.AnnData(blocks_of(3000))
    cells.obs["label"] = [f"type {i % 9}" for i in range(3000)]
    cells.obs["batch"] = [f"donor {i % 4}" for i in range(3000)]
    scvi.settings.seed = 0
    scvi.model.SCANVI.setup_anndata(cells, labels_key="label", unlabeled_category="none", batch_key="batch")
    model = scvi.model.SCANVI(cells, n_layers=2, encode_covariates=True)
    model.is_trained = True
    model.module.eval()
    expected, labels = model.get_latent_representation(), model.predict()
    told = tuple(f"type {i}" for i in range(9))
    encoder = VaeEncoder({"latent": fold(model.module, 2000, told)}, "cuda")
    held = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True  # as Lightning tells users to
    try:
        found = encoder.encode(*parts_of(cells.X), Covariates(batch=np.arange(3000) % 4))
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = held
    assert np.abs(found.mean - expected).max() / expected.std() <= 1e-5
    np.testing.assert_array_equal(np.asarray(told)[encoder.classify(found.location).argmax(1)], labels)


def test_less_precise_ways_are_options_alone(network):
    counts = blocks_of(5000, network.n_genes)
    expected = VaeEncoder({"latent": network}).encode(*parts_of(counts), Covariates(batch=np.zeros(5000, int)))
    errors = {}
    for precision in ("float32", "tf32", "bf16"):
        encoder = DeviceEncoder({"latent": network.to("cuda")}, "cuda", precision=precision)
        found = encoder.encode(*parts_of(counts), Covariates(batch=np.zeros(5000, int)))
        errors[precision] = np.abs(found.mean - expected.mean).max() / expected.mean.std()
    assert errors["float32"] <= 1e-5 < errors["tf32"] < errors["bf16"] < 0.2


def test_memory_does_not_grow_with_the_blocks(network):
    counts, covariates = blocks_of(40_000, network.n_genes), Covariates(batch=np.zeros(40_000, int))
    encoder = VaeEncoder({"latent": network}, "cuda")
    held = []
    for _ in range(4):  # how many steps are in flight differs, and with them what PyTorch sets aside
        for _ in range(6):
            encoder.encode(*parts_of(counts), covariates)
        torch.cuda.synchronize()
        held.append((torch.cuda.memory_reserved(), torch.cuda.host_memory_stats()["allocated_bytes.current"]))
    for before, after in zip(held[0], held[-1], strict=True):
        assert after <= 1.5 * before
