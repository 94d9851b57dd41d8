"""The steps of a GPU's encoder, run one after the other on a CPU, against the encoder of a CPU.

What streams, events and the kernel add is tested where there is a GPU: test_gpu.py.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from scipy import sparse

from scviaduct.errors import DataError
from scviaduct.families import device as device_module
from scviaduct.families import gather
from scviaduct.families import lane as lane_module
from scviaduct.families.base import Covariates
from scviaduct.families.device import DeviceEncoder
from scviaduct.families.multivi import MultiviEncoder
from scviaduct.families.network import Layer, Network
from scviaduct.families.vae import VaeEncoder

GENES = 300


def layer(n_in, n_out, activation="ReLU()", tables=()):
    linear = torch.nn.Linear(n_in, n_out)
    return Layer(linear.weight.detach(), linear.bias.detach(), tables, activation=activation)


def network_of(*, width=24, continuous=0, tables=False, deep=False, norm=False, log=True, normal=True):
    torch.manual_seed(0)
    own = (torch.randn(3, width), None, torch.randn(4, width)) if tables else ()
    first = layer(GENES + continuous, width, tables=own)
    if norm:
        first = replace(first, norm=(torch.rand(width), torch.randn(width)), norm_eps=1e-5)
    layers = (first, layer(width, width, "Softplus(beta=1.0, threshold=20.0)", own if deep else ()))
    made = Network(layers, layer(width, 7, ""), layer(width, 7, ""), GENES, log_variational=log)
    return replace(made, logistic_normal=not normal)


def block_of(n, *, scale=1.0, top=None):
    rng = np.random.default_rng(n)
    counts = sparse.random(n, GENES, 0.1, "csr", np.float32, rng, data_rvs=lambda size: rng.geometric(0.5, size))
    counts.sort_indices()
    counts.data *= scale
    if top is not None:
        counts.data[len(counts.data) // 2] = top
    return counts.indptr.astype(np.int64), counts.indices.astype(np.int32), counts.data


def covariates_of(n):
    rng = np.random.default_rng(3)
    codes = np.stack([rng.integers(0, 2, n), rng.integers(0, 4, n)], axis=1)
    return Covariates(rng.integers(0, 3, n), codes, rng.normal(size=(n, 2)).astype(np.float32))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Steps and pieces so small that a few hundred cells are many."""
    lane_module.Lane.of.cache_clear()
    monkeypatch.setattr(device_module, "STEP", 128)
    monkeypatch.setattr(lane_module, "PIECE", 1000)
    monkeypatch.setattr(lane_module, "_PART", 300)


def agree(found, expected):
    for name in ("mean", "location", "variance"):
        a, b = getattr(expected, name), getattr(found, name)
        assert a.shape == b.shape
        assert b.dtype == np.float32
        assert np.abs(a - b).max() / a.std() <= 1e-5
    assert set(found.others) == set(expected.others)
    for name, a in expected.others.items():
        assert np.abs(a - found.others[name]).max() / a.std() <= 1e-5


CONFIGURATIONS = {
    "plain": {},
    "counts": {"log": False},
    "layer norm": {"norm": True},
    "logistic-normal": {"normal": False},
    "covariates": {"tables": True},
    "covariates in every layer, and continuous ones": {"tables": True, "deep": True, "continuous": 2, "norm": True},
}


@pytest.mark.parametrize("feeders", [1, 3])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_equals_the_encoder_of_a_cpu(name, feeders):
    network = network_of(**CONFIGURATIONS[name])
    found = DeviceEncoder({"latent": network}, "cpu", feeders=feeders).encode(*block_of(500), covariates_of(500))
    agree(found, VaeEncoder({"latent": network}).encode(*block_of(500), covariates_of(500)))


@pytest.mark.parametrize("top", [255.0, 256.0, 65_536.0, 0.25])
def test_counts_that_need_more_bytes_come_in_the_middle_of_a_block(top):
    network = network_of()
    encoder = DeviceEncoder({"latent": network}, "cpu", feeders=2)
    agree(
        encoder.encode(*block_of(500, top=top), Covariates()),
        VaeEncoder({"latent": network}).encode(*block_of(500, top=top), Covariates()),
    )
    # The buffers are used again, and narrow again.
    agree(
        encoder.encode(*block_of(300), Covariates()),
        VaeEncoder({"latent": network}).encode(*block_of(300), Covariates()),
    )


def test_blocks_of_no_cell_one_cell_and_cells_without_counts():
    network = network_of()
    encoder, expected = DeviceEncoder({"latent": network}, "cpu"), VaeEncoder({"latent": network})
    assert encoder.encode(*block_of(0), Covariates()).mean.shape == (0, 7)
    found = encoder.encode(*block_of(20), Covariates())
    found.mean[3] = np.nan  # as a cell without counts is told
    assert np.isfinite(found.location).all()
    agree(encoder.encode(*block_of(1), Covariates()), expected.encode(*block_of(1), Covariates()))
    none = np.zeros(300, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32)
    found = encoder.encode(*none, Covariates())
    assert found.mean.shape == (299, 7)
    np.testing.assert_allclose(found.mean, expected.encode(*none, Covariates()).mean, rtol=1e-5, atol=1e-6)


def test_a_part_of_larger_arrays_and_read_only_ones():
    network = network_of()
    indptr, indices, data = block_of(500)
    for values in (indptr, indices, data):
        values.setflags(write=False)
    encoder = DeviceEncoder({"latent": network}, "cpu")
    part = encoder.encode(indptr[100:401], indices, data, Covariates())
    whole = encoder.encode(indptr, indices, data, Covariates())
    np.testing.assert_allclose(part.mean, whole.mean[100:400], rtol=1e-5, atol=1e-6)


def test_a_cell_of_more_counts_than_a_buffer_holds(monkeypatch):
    monkeypatch.setattr(lane_module, "PIECE", 20)
    network = network_of()
    found = DeviceEncoder({"latent": network}, "cpu").encode(*block_of(50, scale=0.5), Covariates())
    agree(found, VaeEncoder({"latent": network}).encode(*block_of(50, scale=0.5), Covariates()))


def test_further_latents_and_further_categories():
    networks = {"latent": network_of(tables=True), "other": network_of(tables=True, deep=True, log=False, normal=False)}
    encoder, expected = DeviceEncoder(networks, "cpu"), VaeEncoder(networks)
    agree(encoder.encode(*block_of(500), covariates_of(500)), expected.encode(*block_of(500), covariates_of(500)))
    more = {"batch": [{name: row + 1 for name, row in expected.rows("batch", 0).items()}]}
    wider = expected.extended(more)
    covariates = replace(covariates_of(500), batch=np.arange(500) % 4)
    told = encoder.reading(wider._networks).encode(*block_of(500), covariates)
    agree(told, wider.encode(*block_of(500), covariates))
    with pytest.raises(DataError, match="has category 3 of a covariate with 3"):
        encoder.encode(*block_of(500), covariates)


def test_an_encoder_that_is_not_on_a_cpu_goes_this_way():
    networks = {"latent": network_of(tables=True)}
    here, there = VaeEncoder(networks), VaeEncoder(networks, "cpu:0")  # all but "cpu" counts as a device
    assert here._there is None
    agree(there.encode(*block_of(500), covariates_of(500)), here.encode(*block_of(500), covariates_of(500)))
    more = {"batch": [{name: row + 1 for name, row in here.rows("batch", 0).items()}]}
    covariates = replace(covariates_of(500), batch=np.arange(500) % 4)
    here, there = here.extended(more), there.extended(more)
    agree(there.encode(*block_of(500), covariates), here.encode(*block_of(500), covariates))


def test_a_gene_that_there_is_not_is_refused_and_the_next_block_is_encoded():
    network = network_of()
    encoder = DeviceEncoder({"latent": network}, "cpu", feeders=2)
    indptr, indices, data = block_of(500)
    wrong = indices.copy()
    wrong[-700] = GENES
    with pytest.raises(DataError, match="position 300, and the reference has 300 genes"):
        encoder.encode(indptr, wrong, data, Covariates())
    agree(
        encoder.encode(indptr, indices, data, Covariates()),
        VaeEncoder({"latent": network}).encode(indptr, indices, data, Covariates()),
    )


def test_a_buffer_that_cannot_grow_stays_as_it_was(monkeypatch):
    """On a GPU that has no memory left: what is smaller still goes through."""
    slot, layout = lane_module._Slot(torch.device("cpu")), lane_module.Layout(10, 100, *map(np.dtype, ("u2", "u1")))
    error = torch.OutOfMemoryError("CUDA out of memory")
    for fails in ([error], [torch.empty(500, dtype=torch.uint8), error]):
        with monkeypatch.context() as patched:
            patched.setattr(lane_module.torch, "empty", Mock(side_effect=fails))
            with pytest.raises(torch.OutOfMemoryError):
                slot.hold(layout)
        assert len(slot.here) == len(slot.there) == 0
    slot.hold(layout)
    assert len(slot.here) == len(slot.there) >= layout.n_bytes


def test_first_layers_are_made_when_counts_come_and_shared_from_then_on():
    network, wider = network_of(tables=True), network_of(tables=True)
    encoder = DeviceEncoder({"latent": network}, "cpu")
    assert not encoder.reading({"latent": wider})._firsts
    encoder.encode(*block_of(30), covariates_of(30))
    assert encoder.reading({"latent": wider})._firsts["latent"]._weight is encoder._firsts["latent"]._weight
    there = VaeEncoder({"latent": network}, "cpu:0")
    there.encode(*block_of(30), covariates_of(30))
    assert "_genes" not in vars(there._encoders["latent"])  # it classifies


def test_multivi_runs_its_own_encoders_and_says_so():
    network = network_of()
    encoder = MultiviEncoder({"expression": network}, torch.zeros(3), "cpu:0")
    assert encoder.arithmetic == "PyTorch on cpu"
    here = MultiviEncoder({"expression": network}, torch.zeros(3))
    agree(encoder.encode(*block_of(500), Covariates()), here.encode(*block_of(500), Covariates()))
    assert encoder.extended({}).arithmetic == "PyTorch on cpu"


def test_the_way_is_told():
    network = {"latent": network_of()}
    assert DeviceEncoder(network, "cpu").path == "cpu, first layer by torch (not a CUDA device), float32"
    assert "triton (as told), bf16" in DeviceEncoder(network, "cpu", kernel="triton", precision="bf16").path


def test_where_triton_cannot_run_the_reason_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(gather.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(gather.shutil, "which", lambda name: "/usr/bin/gcc")
    monkeypatch.delenv("CC", raising=False)
    device = torch.device("cuda", 0)
    assert gather.kernel_of(device) == ("triton", "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert gather.kernel_of(device) == ("torch", "Triton needs compute capability 7.0, and the GPU has 6.1")
    monkeypatch.setattr(gather.shutil, "which", lambda name: None)
    assert gather.kernel_of(device)[1].startswith("Triton needs a C compiler")
    monkeypatch.setattr(gather.importlib.util, "find_spec", lambda name: None)
    assert gather.kernel_of(device) == ("torch", "Triton is not installed")


_INTERPRETED = """
import numpy as np, torch
from test_device import block_of, covariates_of, network_of
from scviaduct.families.device import DeviceEncoder
network = network_of(width=20, tables=True, continuous=2, norm=True)
for top in (None, 300.0, 0.5):
    block, covariates = block_of(30, top=top), covariates_of(30)
    found, expected = (
        DeviceEncoder({"latent": network}, "cpu", kernel=kernel).encode(*block, covariates)
        for kernel in ("triton", "torch")
    )
    assert np.abs(found.mean - expected.mean).max() / expected.mean.std() <= 1e-5, top
    assert np.abs(found.variance - expected.variance).max() / expected.variance.std() <= 1e-5, top
print("same")
"""


def test_the_kernel_computes_what_pytorch_does():
    """By Triton's interpreter, which a process must be told of before it imports Triton."""
    pytest.importorskip("triton")
    import os
    from pathlib import Path

    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, "-c", _INTERPRETED], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip().endswith("same"), done.stderr
