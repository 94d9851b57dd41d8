"""Counts are found wherever they live; normalised values are not mistaken for them."""

from __future__ import annotations

import anndata
import numpy as np
import pytest
from scipy import sparse

from scviaduct.errors import SourceError
from scviaduct.sources import open_source


def log_of(matrix):
    return matrix.log1p()


@pytest.fixture
def opened(tmp_path):
    """Write an AnnData and open it."""

    def write(adata, query=""):
        adata.write_h5ad(tmp_path / "a.h5ad")
        return open_source(f"{tmp_path}/a.h5ad{query}")

    return write


@pytest.mark.parametrize("layer", ["counts", "raw_counts", "raw", "umi"])
def test_counts_in_a_layer_are_found_when_x_is_normalised(layer, make_adata, opened, read_all, equal):
    adata = make_adata()
    counts = adata.X.copy()
    adata.X, adata.layers["a_scaled"], adata.layers[layer] = log_of(counts), log_of(counts), counts
    with opened(adata) as source:
        assert source.describe()["layer"] == f"layers/{layer}"
        assert "non-negative integers" in source.describe()["why"]
        assert f"layer=layers/{layer}" in source.uri
        assert equal(read_all(source)[0], counts)


def test_raw_has_genes_of_its_own(make_adata, opened, read_all, equal):
    adata = make_adata(20, 7)
    counts = adata.X.copy()
    adata.X = log_of(counts)
    whole = anndata.AnnData(counts, adata.obs, adata.var)
    adata = adata[:, :3].copy()
    adata.raw = whole
    with opened(adata) as source:
        assert source.describe()["layer"] == "raw"
        assert len(source.genes()) == 7
        assert equal(read_all(source)[0], counts)
    with opened(adata, "?layer=X") as source:
        assert (len(source.genes()), source.describe()["why"]) == (3, "asked for")
        assert equal(read_all(source)[0], adata.X)


def test_integer_x_is_taken_before_anything_else(make_adata, opened):
    adata = make_adata()
    adata.layers["counts"] = adata.X.copy()
    adata.raw = adata
    with opened(adata) as source:
        assert source.describe()["layer"] == "X"


def test_without_any_counts_x_is_taken_for_preflight_to_complain(make_adata, opened):
    adata = make_adata()
    adata.X = log_of(adata.X)
    with opened(adata) as source:
        assert source.describe()["layer"] == "X"
        assert source.describe()["why"] == "no matrix holds counts"


def test_negative_and_missing_values_are_no_counts(make_adata, opened):
    for bad in (-1.0, np.nan):
        adata = make_adata()
        adata.layers["counts"] = adata.X.copy()
        adata.X[0, 0] = bad
        with opened(adata) as source:
            assert source.describe()["layer"] == "layers/counts"


def test_layer_called_raw_beside_raw(make_adata, opened):
    adata = make_adata()
    adata.raw = adata
    adata.layers["raw"] = adata.X.copy()
    with opened(adata, "?layer=raw") as source:
        assert source.describe()["layer"] == "raw"
    with opened(adata, "?layer=layers/raw") as source:
        assert source.describe()["layer"] == "layers/raw"


def test_file_without_x(make_adata, opened, read_all, equal):
    adata = make_adata()
    counts = adata.X
    adata.layers["counts"], adata.X = counts, None
    with opened(adata) as source:
        assert equal(read_all(source)[0], counts)
    del adata.layers["counts"]
    with pytest.raises(
        SourceError, match=r"holds no matrix: X is empty and there is no layer. Write the counts into X"
    ):
        opened(adata)


def test_matrix_stored_by_columns_is_refused_unless_another_will_do(make_adata, opened):
    adata = make_adata(matrix=sparse.csc_matrix)
    with pytest.raises(SourceError, match=r"X of .* is stored by columns .*adata.X = adata.X.tocsr\(\)"):
        opened(adata)
    adata.layers["counts"] = adata.X.tocsr()
    with opened(adata) as source:
        assert source.describe()["layer"] == "layers/counts"
    with pytest.raises(SourceError, match="stored by columns"):
        opened(adata, "?layer=X")
