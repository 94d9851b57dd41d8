"""What matrices are multiplied in is set for as long as a run multiplies, whichever setting the process took."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from scviaduct.families import vae
from scviaduct.families.network import Layer, Network
from scviaduct.families.precision import exactly, multiplying
from scviaduct.families.vae import VaeEncoder

MATMUL = torch.backends.cuda.matmul
newer = pytest.mark.skipif(not hasattr(MATMUL, "fp32_precision"), reason="a PyTorch before 2.9")


@pytest.fixture
def settings():
    """PyTorch's, as they were before."""
    held = MATMUL.fp32_precision
    yield
    torch.set_float32_matmul_precision("highest")
    MATMUL.fp32_precision = held


@newer
@pytest.mark.parametrize("told", ["tf32", "ieee", "none"])
def test_what_the_process_set_is_there_again(settings, told):
    MATMUL.fp32_precision = told
    for precision, expected in (("float32", "ieee"), ("bf16", "ieee"), ("tf32", "tf32")):
        with multiplying(precision):
            assert MATMUL.fp32_precision == expected
        assert MATMUL.fp32_precision == told
        with pytest.raises(KeyError), multiplying(precision):
            raise KeyError
        assert MATMUL.fp32_precision == told


@newer
@pytest.mark.parametrize("told", ["highest", "high"])
def test_the_older_setting_can_be_read_afterwards(settings, told):
    torch.set_float32_matmul_precision(told)
    with multiplying("float32"):
        assert MATMUL.fp32_precision == "ieee"
    assert MATMUL.allow_tf32 == (told == "high")
    assert torch.get_float32_matmul_precision() == told


def test_an_older_pytorch_has_one_setting(monkeypatch):
    older = SimpleNamespace(allow_tf32=True)
    monkeypatch.setattr(torch.backends.cuda, "matmul", older)
    with multiplying("float32"):
        assert not older.allow_tf32
    with multiplying("tf32"):
        assert older.allow_tf32
    assert older.allow_tf32


@newer
def test_on_a_cpu_nothing_is_set(settings):
    MATMUL.fp32_precision = "tf32"
    with exactly("cpu"):
        assert MATMUL.fp32_precision == "tf32"
    with exactly("cuda:0"):
        assert MATMUL.fp32_precision == "ieee"


@newer
def test_labels_are_told_in_float32(settings, monkeypatch):
    def layer(n_in, n_out):
        return Layer(torch.randn(n_out, n_in), torch.zeros(n_out))

    network = Network((layer(20, 8),), layer(8, 4), layer(8, 4), 20, classifier=(layer(4, 2),), labels=("a", "b"))
    encoder, seen = VaeEncoder({"latent": network}, "cpu:0"), []  # all but "cpu" counts as a device
    monkeypatch.setattr(
        encoder._encoders["latent"], "classify", lambda z: seen.append(MATMUL.fp32_precision) or torch.zeros(len(z), 2)
    )
    monkeypatch.setattr(vae, "rows_of", lambda cells, *_: cells)
    MATMUL.fp32_precision = "tf32"
    encoder.classify(torch.zeros(3, 4).numpy())
    assert seen == ["ieee"]
    assert MATMUL.fp32_precision == "tf32"
