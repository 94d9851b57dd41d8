"""Genes chosen from a stream are those that scanpy chooses with all cells in memory."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import torch
from scipy import sparse

from scviaduct.errors import InputError
from scviaduct.families import Recipe
from scviaduct.families.vae import quiet
from scviaduct.references import cells as module
from scviaduct.references.cells import read_cells


@pytest.fixture(autouse=True)
def one_thread_again():
    """numba, which scanpy computes with, sets OpenMP's threads for torch too: ten times as slow on shared cores."""
    yield
    torch.set_num_threads(1)


def scanpy_genes(path, n, batch_key, span=0.3):
    cells = anndata.read_h5ad(path)
    if batch_key:
        cells.obs[batch_key] = cells.obs[batch_key].astype(str)
    with quiet():
        found = sc.pp.highly_variable_genes(
            cells, flavor="seurat_v3", n_top_genes=n, batch_key=batch_key, span=span, inplace=False
        )
    return list(cells.var_names[found["highly_variable"].to_numpy()])


@pytest.mark.parametrize(
    ("file", "n", "batch_key", "shard"),
    [
        ("pbmc_10x_3tech_symphony.h5ad", 500, None, 400),
        pytest.param("pbmc1k_10xv3_scwg.h5ad", 2000, None, 300, marks=pytest.mark.slow),
        ("citeseq_pbmc5k_scvitests.h5ad", 1000, None, 16_384),
        pytest.param("perturb_thp1_eccite_sceptre.h5ad", 100, "batch", 5_000, marks=pytest.mark.slow),
    ],
)
def test_the_same_genes_as_scanpy(shared_data, file, n, batch_key, shard, monkeypatch):
    monkeypatch.setattr(module, "SHARD_CELLS", shard)  # several blocks: what is summed does not depend on the cut
    path = shared_data / file
    found = read_cells(str(path), Recipe(family="scvi", genes=n, batch_key=batch_key)).cells
    assert list(found.var_names) == scanpy_genes(path, n, batch_key)
    counts = anndata.read_h5ad(path)[:, found.var_names].X
    assert (sparse.csr_matrix(counts) != found.X).nnz == 0


def test_many_small_batches_agree_but_for_ties(shared_data):
    """14 donors of 3 to 90 cells: scanpy sums squares in another order, which turns ties at the cut."""
    path = shared_data / "pancreas_2study_cepo.h5ad"
    found = read_cells(str(path), Recipe(family="scvi", genes=300, batch_key="donor")).cells
    assert len(set(found.var_names) & set(scanpy_genes(path, 300, "donor"))) >= 298


def test_a_wider_regression_where_the_usual_is_singular(shared_data):
    path = shared_data / "pbmc_10x_3tech_symphony.h5ad"
    with pytest.raises(ValueError, match="singular"):
        scanpy_genes(path, 500, "batch")
    found = read_cells(str(path), Recipe(family="scvi", genes=500, batch_key="batch")).cells
    assert len(set(found.var_names) & set(scanpy_genes(path, 500, "batch", span=0.6))) >= 498  # ties, as below


def test_cells_of_a_batch_of_one_are_no_batch(tmp_path):
    rng = np.random.default_rng(0)
    obs = pd.DataFrame(
        {"batch": pd.Categorical(["lone"] + ["a"] * 60 + ["b"] * 60)}, index=[f"c{i}" for i in range(121)]
    )
    counts = rng.poisson(rng.gamma(1.0, 3.0, 200), (121, 200)).astype(np.float32)
    counts[0] = 1000
    anndata.AnnData(sparse.csr_matrix(counts), obs=obs).write_h5ad(tmp_path / "lone.h5ad")
    anndata.AnnData(sparse.csr_matrix(counts[1:]), obs=obs.iloc[1:].copy()).write_h5ad(tmp_path / "two.h5ad")
    told = Recipe(family="scvi", genes=50, batch_key="batch")
    with_it, without = (read_cells(str(tmp_path / f"{name}.h5ad"), told).cells for name in ("lone", "two"))
    assert list(with_it.var_names) == list(without.var_names)
    alone = Recipe(family="scvi", genes=50, batch_key="each")
    each = anndata.read_h5ad(tmp_path / "two.h5ad")
    each.obs["each"] = pd.Categorical([str(i) for i in range(120)])
    each.write_h5ad(tmp_path / "each.h5ad")
    with pytest.raises(InputError, match=r"among 200 genes of 120 cells\. Train on all genes: --genes 0\."):
        read_cells(str(tmp_path / "each.h5ad"), alone)
