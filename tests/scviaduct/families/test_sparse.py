"""The sparse encoder equals scvi-tools' own on the same cells.

Tolerance: max |difference| / sd <= 1e-5. Both sum the same float32 products in another order; over 2,000 genes that
leaves about 1e-6 of a latent's standard deviation.
"""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scvi.nn import Encoder

from scviaduct.families.folding import fold_encoder
from scviaduct.families.sparse import SparseEncoder

GENES, LATENT = 500, 10


def counts(n, density=0.1, genes=GENES, seed=0):
    rng = np.random.default_rng(seed)
    dense = rng.poisson(2, (n, genes)) * (rng.random((n, genes)) < density)
    return sp.csr_matrix(dense.astype(np.float32))


def trained_like(genes=GENES, cont=0, **kwargs):
    """An encoder whose norms are not at their initial values, in evaluation mode."""
    torch.manual_seed(0)
    encoder = Encoder(genes + cont, LATENT, return_dist=True, **kwargs)
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            torch.nn.init.normal_(module.weight, 1, 0.2)
            torch.nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 3)
    return encoder.eval()


def tensors(matrix):
    return (
        torch.from_numpy(matrix.indptr.astype(np.int64)),
        torch.from_numpy(matrix.indices.astype(np.int32)),
        torch.from_numpy(matrix.data),
    )


CONFIGURATIONS = {
    "default": {"n_hidden": 128},
    "two layers": {"n_hidden": 64, "n_layers": 2},
    "three layers, layer norm": {"n_hidden": 32, "n_layers": 3, "use_batch_norm": False, "use_layer_norm": True},
    "both norms": {"n_hidden": 32, "n_layers": 2, "use_layer_norm": True},
    "no norm, no dropout": {"n_hidden": 32, "use_batch_norm": False, "dropout_rate": 0.0},
    "batches": {"n_hidden": 32, "n_cat_list": [3]},
    "batches injected deeply": {"n_hidden": 32, "n_layers": 2, "n_cat_list": [3, 1, 4], "inject_covariates": True},
    "batches in the first layer": {"n_hidden": 32, "n_layers": 2, "n_cat_list": [3, 1, 4], "inject_covariates": False},
    "continuous": {"n_hidden": 32, "n_layers": 2, "n_cat_list": [3], "cont": 2},
    "logistic normal": {"n_hidden": 32, "distribution": "ln"},
    "softplus variance": {"n_hidden": 32, "var_activation": torch.nn.functional.softplus},
    "other activation": {"n_hidden": 32, "activation_fn": torch.nn.GELU},
    "in blocks": {"n_hidden": 192, "genes": 4000},
}


@pytest.mark.parametrize("log", [True, False], ids=["log1p", "counts"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
@torch.inference_mode()
def test_equals_scvi(name, log):
    kwargs = dict(CONFIGURATIONS[name])
    encoder = trained_like(**kwargs)
    genes, cont = kwargs.get("genes", GENES), kwargs.get("cont", 0)
    matrix = counts(200, genes=genes)
    rng = np.random.default_rng(1)
    codes = [torch.from_numpy(rng.integers(0, n, 200)) for n in kwargs.get("n_cat_list", [])]
    continuous = torch.randn(200, cont) if cont else None

    dense = torch.from_numpy(matrix.toarray())
    inputs = torch.log1p(dense) if log else dense
    inputs = inputs if continuous is None else torch.cat([inputs, continuous], 1)
    expected, _ = encoder(inputs, *(code[:, None] for code in codes))

    mean, variance = SparseEncoder(fold_encoder(encoder, genes, log_variational=log))(
        *tensors(matrix), codes, continuous
    )
    assert ((mean - expected.loc).abs().max() / expected.loc.std()).item() <= 1e-5
    torch.testing.assert_close(variance, expected.scale**2, rtol=1e-4, atol=1e-6)


@torch.inference_mode()
def test_cells_without_counts_and_no_cells():
    encoder = trained_like(n_hidden=16)
    sparse = SparseEncoder(fold_encoder(encoder, GENES, log_variational=True))
    full = counts(5).toarray()
    full[2] = 0
    matrix = sp.csr_matrix(full)
    expected, _ = encoder(torch.log1p(torch.from_numpy(matrix.toarray())))
    mean, _ = sparse(*tensors(matrix))
    torch.testing.assert_close(mean, expected.loc, rtol=1e-5, atol=1e-5)
    mean, variance = sparse(*tensors(counts(0)))
    assert mean.shape == variance.shape == (0, LATENT)


@torch.inference_mode()
def test_int64_indices_are_taken():
    encoder = trained_like(n_hidden=16)
    sparse = SparseEncoder(fold_encoder(encoder, GENES, log_variational=True))
    indptr, indices, data = tensors(counts(20))
    torch.testing.assert_close(sparse(indptr, indices.long(), data)[0], sparse(indptr, indices, data)[0])
