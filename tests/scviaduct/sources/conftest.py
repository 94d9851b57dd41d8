"""Small AnnData files of every shape, and what a block holds as scipy and pandas see it."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse


@pytest.fixture
def make_adata():
    """AnnData of Poisson counts; ``names`` and ``obs`` override what it would have."""

    def make(cells=20, genes=7, seed=0, names=None, obs=None, matrix=sparse.csr_matrix):
        counts = np.random.default_rng(seed).poisson(0.6, (cells, genes)).astype(np.float32)
        index = [f"cell{i}" for i in range(cells)] if names is None else names
        return anndata.AnnData(
            matrix(counts),
            obs=pd.DataFrame(obs or {}, index=pd.Index(index, dtype=object)),
            var=pd.DataFrame(index=pd.Index([f"ENSG{i:011d}" for i in range(genes)], dtype=object)),
        )

    return make


@pytest.fixture
def as_csr():
    """A block's counts as scipy's CSR, after checking what CellBlock promises."""

    def convert(block):
        assert block.indptr.dtype == np.int64
        assert block.indices.dtype == np.int32
        assert block.data.dtype == np.float32
        matrix = sparse.csr_matrix((block.data, block.indices, block.indptr), shape=(block.n_cells, block.n_genes))
        assert matrix.has_canonical_format
        assert (np.diff(block.rows) > 0).all()
        assert len(block.rows) == block.n_cells == len(block.obs)
        assert block.obs.column_names[0] == "observation_id"
        return matrix

    return convert


@pytest.fixture
def read_all(as_csr):
    """Every cell of an open source: counts under each other, in the order of the shards."""

    def read(source, shard_cells=7, columns=(), gene_map=None, n_genes=None):
        blocks = [source.read(shard, gene_map, n_genes, columns) for shard in source.scan(shard_cells).shards]
        keys = [key for block in blocks for key in block.obs["observation_id"].to_pylist()]
        return sparse.vstack([as_csr(block) for block in blocks]).tocsr(), keys

    return read


@pytest.fixture
def equal():
    """Whether two sparse matrices hold the same values."""
    return lambda left, right: (
        left.shape == right.shape and (sparse.csr_matrix(left) != sparse.csr_matrix(right)).nnz == 0
    )
