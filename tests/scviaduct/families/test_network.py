"""A network written down and read back computes what it computed, in a process that never imports scvi-tools."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from scipy import sparse
from scvi.module import Classifier
from scvi.nn import Encoder

from scviaduct.errors import PackageError, UnsupportedModelError
from scviaduct.families.folding import fold_encoder, fold_layers, fold_linear
from scviaduct.families.network import Bundle
from scviaduct.families.sparse import SparseEncoder

GENES = 40


def network(**kwargs):
    torch.manual_seed(0)
    encoder = Encoder(GENES, 5, return_dist=True, n_hidden=16, **kwargs).eval()
    return fold_encoder(encoder, GENES, log_variational=True)


def cells(n=8):
    torch.manual_seed(1)
    return torch.poisson(torch.ones(n, GENES))


def encode(found, counts, codes=()):
    matrix = sparse.csr_matrix(counts.numpy())
    indptr, indices = (torch.from_numpy(part.astype("int64")) for part in (matrix.indptr, matrix.indices))
    return SparseEncoder(found)(indptr, indices, torch.from_numpy(matrix.data), codes)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"n_layers": 2, "n_cat_list": [3, 1], "inject_covariates": True},
        {"use_batch_norm": False, "use_layer_norm": True, "distribution": "ln"},
        {"activation_fn": torch.nn.GELU, "var_activation": torch.nn.functional.softplus},
    ],
    ids=["default", "covariates", "layer norm, logistic normal", "other functions"],
)
def test_what_is_read_back_computes_the_same_to_the_bit(kwargs, tmp_path):
    made = network(**kwargs)
    Bundle({"z": made}).save(tmp_path / "n.safetensors")
    found = Bundle.load(tmp_path / "n.safetensors").networks["z"]
    codes = [torch.arange(8) % 3, torch.zeros(8, dtype=torch.int64)] if "n_cat_list" in kwargs else []
    for before, after in zip(encode(made, cells(), codes), encode(found, cells(), codes), strict=True):
        assert torch.equal(before, after)
    assert found.logistic_normal == (kwargs.get("distribution") == "ln")


def test_the_same_network_gives_the_same_file(tmp_path):
    for name in ("a", "b"):
        Bundle({"z": network(n_layers=2, n_cat_list=[4])}).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("logits", [True, False])
def test_a_classifier_is_folded_up_to_its_logits(logits):
    torch.manual_seed(0)
    classifier = Classifier(5, n_hidden=8, n_labels=3, n_layers=2, logits=logits).eval()
    *hidden, last = [part for part in classifier.classifier if not isinstance(part, torch.nn.Softmax)]
    values = torch.randn(20, 5)
    out = values
    for layer in [*(layer for part in hidden for layer in fold_layers(part)), fold_linear(last)]:
        out = layer(out)
    told = classifier(values)
    expected = torch.softmax(told, -1) if logits else told
    torch.testing.assert_close(torch.softmax(out, -1), expected, rtol=1e-5, atol=1e-6)


def test_a_batch_embedding_becomes_its_product_with_the_weights():
    torch.manual_seed(0)
    encoder = Encoder(GENES + 3, 5, return_dist=True, n_hidden=16).eval()
    embedding = torch.randn(4, 3)
    batch = torch.arange(8) % 4
    found = fold_encoder(encoder, GENES, log_variational=False, embedding=embedding)
    mean, _ = encode(found, cells(), [batch])
    expected, _ = encoder(torch.cat([cells(), embedding[batch]], 1))
    torch.testing.assert_close(mean, expected.loc, rtol=1e-5, atol=1e-5)


def test_a_function_without_a_name_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"activates with Hardtanh.*Known: ReLU"):
        network(activation_fn=torch.nn.Hardtanh)
    with pytest.raises(UnsupportedModelError, match=r"activates with .*relu.*Known:.* exp, softplus"):
        network(var_activation=torch.nn.functional.relu)


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b'{"a": 1}'])
def test_what_is_no_network_is_refused(content, tmp_path):
    (tmp_path / "n.safetensors").write_bytes(content)
    with pytest.raises(PackageError, match=r"holds no encoder.*Add the reference again"):
        Bundle.load(tmp_path / "n.safetensors").networks["z"]


def test_reading_needs_no_scvi_tools(tmp_path):
    Bundle({"z": network()}).save(tmp_path / "n.safetensors")
    code = (
        "import sys; from pathlib import Path; import scviaduct.families as f;"
        f"f.family('SCVI').open(Path({str(tmp_path / 'n.safetensors')!r}), 'cpu');"
        "sys.exit('scvi' in sys.modules or 'anndata' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
