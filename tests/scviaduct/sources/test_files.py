"""Files give the cells that anndata gives, or an error that says what to do."""

from __future__ import annotations

import pickle

import anndata
import fsspec
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import zarr
from scipy import sparse

from scviaduct.errors import SourceError
from scviaduct.sources import open_shard, open_source

REAL = [
    "citeseq_pbmc10k_scvitests",
    "citeseq_pbmc5k_scvitests",
    "multiome_a549_scicar_atac_binary",
    "multiome_a549_scicar_rna",
    "pancreas_2study_cepo",
    "pbmc1k_10xv2_scwg",
    "pbmc1k_10xv3_scwg",
    "pbmc_10x_3tech_symphony",
    "perturb_thp1_eccite_sceptre",
    "tenx_1000x1000_scimilarity",
    "tenx_ensembl_100cells_cas",
]


@pytest.mark.parametrize("name", REAL)
def test_real_h5ad_equals_anndata(name, shared_data, read_all, equal):
    path = shared_data / f"{name}.h5ad"
    adata = anndata.read_h5ad(path)
    with open_source(str(path)) as source:
        matrix, keys = read_all(source, 777)
        genes = source.genes()
        scan = source.scan(10_000)
    assert equal(matrix, adata.X)
    assert keys == adata.obs_names.tolist()
    assert list(genes.columns["index"]) == adata.var_names.tolist()
    assert next(iter(genes.columns)) == "index"
    assert {shard.dataset_id for shard in scan.shards} == {name}
    assert scan.cells == adata.n_obs


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_zarr_equals_h5ad(zarr_format, symphony, tmp_path, read_all, equal):
    adata = anndata.read_h5ad(symphony)
    anndata.io.write_elem(zarr.open_group(tmp_path / "cells.zarr", mode="w", zarr_format=zarr_format), "/", adata)
    with open_source(str(tmp_path / "cells.zarr")) as source:
        matrix, keys = read_all(source, 400)
        assert source.describe()["kind"] == "zarr"
        block = source.read(source.scan(2000).shards[0], columns=["cell_type"])
    assert equal(matrix, adata.X)
    assert keys == adata.obs_names.tolist()
    assert block.obs["cell_type"].to_pylist() == adata.obs["cell_type"].tolist()


def test_every_obs_encoding_in_h5ad_and_zarr(make_adata, tmp_path):
    obs = {
        "category": pd.Categorical(["b", None, "a", "b"]),
        "numbers": pd.Categorical([3, 1, None, 3]),
        "text": np.array(["ä", "", "x", "y"], dtype=object),
        "flag": [True, False, True, True],
        "count": np.array([1, 2, 3, 4], np.int32),
        "real": np.array([0.5, np.nan, 2, 3], np.float32),
        "maybe_count": pd.array([1, None, 3, 4], dtype="Int64"),
        "maybe_flag": pd.array([True, None, False, True], dtype="boolean"),
    }
    expected = {
        "category": ["b", None, "a", "b"],
        "numbers": ["3", "1", None, "3"],
        "text": ["ä", "", "x", "y"],
        "flag": [True, False, True, True],
        "count": [1, 2, 3, 4],
        "real": [0.5, None, 2, 3],
        "maybe_count": [1, None, 3, 4],
        "maybe_flag": [True, None, False, True],
    }
    types = {"flag": pa.bool_(), "maybe_flag": pa.bool_(), "count": pa.int64(), "maybe_count": pa.int64()}
    adata = make_adata(4, obs=obs)
    adata.write_h5ad(tmp_path / "a.h5ad")
    adata.write_zarr(tmp_path / "b.zarr")
    for name in ("a.h5ad", "b.zarr"):
        with open_source(str(tmp_path / name)) as source:
            scan = source.scan(3, list(obs))
            blocks = [source.read(shard, columns=list(obs)) for shard in scan.shards]
        read = pa.concat_tables([block.obs for block in blocks], promote_options="permissive")
        for column, values in expected.items():
            assert read[column].to_pylist() == values, (name, column)
            kind = types.get(column, pa.float64() if column == "real" else pa.dictionary(pa.int32(), pa.string()))
            assert blocks[0].obs.schema.field(column).type == kind, (name, column)
        assert scan.columns["category"].counts == {"a": 1, "b": 2}
        assert (scan.columns["category"].nulls, scan.columns["real"].nulls) == (1, 1)
        assert scan.columns["flag"].counts == {"True": 3, "False": 1}
        assert [scan.columns[column].type for column in ("numbers", "count", "real")] == ["string", "int64", "double"]
        assert scan.columns["real"].counts == {}


def test_columns_that_are_missing_are_told_by_the_scan_and_refused_by_read(symphony):
    with open_source(str(symphony)) as source:
        scan = source.scan(2000, ["cell_type", "tissue"])
        assert list(scan.columns) == ["cell_type"]
        assert scan.missing == {"tissue": source.source}
        with pytest.raises(SourceError, match=r"has no obs column 'tissue'. There are: .*cell_type"):
            source.read(scan.shards[0], columns=["tissue"])


def test_gene_map_sums_drops_and_reorders(make_adata, tmp_path, as_csr):
    adata = make_adata(9, 4)
    adata.write_h5ad(tmp_path / "a.h5ad")
    with open_source(str(tmp_path / "a.h5ad")) as source:
        block = source.read(source.scan(9).shards[0], np.array([2, -1, 0, 2], np.int32), 5)
    counts = adata.X.toarray()
    expected = np.zeros((9, 5))
    expected[:, 2], expected[:, 0] = counts[:, 0] + counts[:, 3], counts[:, 2]
    np.testing.assert_array_equal(as_csr(block).toarray(), expected)


@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_matrix])
@pytest.mark.parametrize("dtype", [np.int32, np.float64, np.uint8])
def test_dense_and_sparse_of_any_type_give_float32_csr(kind, dtype, make_adata, tmp_path, read_all, equal):
    adata = make_adata(20, 7)
    adata.X = kind(adata.X.toarray().astype(dtype))
    adata.write_h5ad(tmp_path / "a.h5ad")
    with open_source(str(tmp_path / "a.h5ad")) as source:
        matrix, _ = read_all(source)
    assert equal(matrix, adata.X)


def test_filter_duplicates_dataset_and_key(make_adata, tmp_path, as_csr, equal):
    obs = {
        "is_primary_data": [i % 5 != 0 for i in range(30)],
        "donor": pd.Categorical(["d1", "d2", "d3"] * 10),
        "n": range(30),
        "barcode": np.array([f"b{i}" for i in range(30)], dtype=object),
    }
    adata = make_adata(30, obs=obs)
    path = tmp_path / "a.h5ad"
    adata.write_h5ad(path)
    with open_source(f"{path}?filter=n < 21 and donor != 'd3'&dataset=donor&key=barcode") as source:
        scan = source.scan(4, ["donor"])
        kept = adata.obs[(adata.obs.n < 21) & (adata.obs.donor != "d3") & adata.obs.is_primary_data]
        assert scan.cells == len(kept)
        assert scan.duplicates_skipped == 3
        assert scan.empty == ("d3",)
        assert scan.columns["donor"].counts == kept.donor.value_counts().loc[["d1", "d2"]].to_dict()
        read = []
        for shard in scan.shards:
            block = source.read(shard, columns=["donor"])
            assert set(block.obs["donor"].to_pylist()) == {shard.dataset_id}
            assert equal(as_csr(block), adata.X[block.rows])
            read += block.obs["observation_id"].to_pylist()
        assert sorted(read) == sorted(kept.barcode)
    with open_source(f"{path}?duplicates=keep") as source:
        scan = source.scan(100)
        assert (scan.cells, scan.duplicates_skipped) == (30, 0)


def test_text_that_is_called_primary_is_not_taken_for_a_flag(make_adata, tmp_path):
    make_adata(3, obs={"is_primary_data": np.array(["no", "no", "yes"], dtype=object)}).write_h5ad(tmp_path / "a.h5ad")
    with open_source(str(tmp_path / "a.h5ad")) as source:
        assert source.scan(9).cells == 3


def test_var_filter_empties_names_and_counts(make_adata, tmp_path, as_csr):
    adata = make_adata(5, 4)
    adata.var["kind"] = pd.Categorical(["gene", "peak", "gene", "peak"])
    adata.write_h5ad(tmp_path / "a.h5ad")
    with open_source(f"{tmp_path}/a.h5ad?var_filter=kind == 'gene'") as source:
        assert source.genes().columns["kind"] == ("gene", "", "gene", "")
        assert source.genes().columns["index"][1] == ""
        counts = as_csr(source.read(source.scan(9).shards[0])).toarray()
    np.testing.assert_array_equal(counts[:, [0, 2]], adata.X.toarray()[:, [0, 2]])
    assert not counts[:, [1, 3]].any()


def test_limit_takes_the_first_selected_cells(symphony):
    with open_source(f"{symphony}?filter=cell_type != 'B'") as source:
        (shard,) = source.scan(5000).shards
        whole, some = source.read(shard), source.read(shard, limit=5)
    assert some.n_cells == 5
    assert some.rows.tolist() == whole.rows[:5].tolist()
    assert some.obs["observation_id"].to_pylist() == whole.obs["observation_id"].to_pylist()[:5]


def test_file_without_cells_is_told_as_empty(make_adata, tmp_path):
    make_adata(0).write_h5ad(tmp_path / "a.h5ad")
    with open_source(str(tmp_path / "a.h5ad")) as source:
        scan = source.scan(10, [])
    assert (scan.shards, scan.cells, scan.empty) == ((), 0, (source.source,))


def test_filter_that_selects_nothing_is_told_as_empty(symphony):
    with open_source(f"{symphony}?filter=cell_type == 'neuron'") as source:
        assert source.scan(10).empty == (source.source,)


def test_a_path_may_hold_anything_that_is_percent_encoded(make_adata, tmp_path):
    path = tmp_path / "what? 100%.h5ad"
    make_adata(3).write_h5ad(path)
    with open_source(str(path).replace("%", "%25").replace("?", "%3F")) as source:
        (shard,) = source.scan(5).shards
        assert shard.dataset_id == "what? 100%"
        assert source.source.endswith("what%3F%20100%25.h5ad")
    assert open_shard(shard).read(shard).n_cells == 3


def test_canonical_uri_spells_the_choices_and_opens_the_same(symphony):
    with open_source(str(symphony)) as source:
        assert source.uri == f"file://{symphony}?key=_index&layer=X&version={source.version}"
        with open_source(source.uri) as again:
            assert again.uri == source.uri
            assert again.scan(500).shards == source.scan(500).shards


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_fsspec_urls(suffix, make_adata, tmp_path, read_all, equal):
    adata = make_adata(12)
    local = tmp_path / f"a.{suffix}"
    getattr(adata, f"write_{suffix}")(local)
    memory = fsspec.filesystem("memory")
    memory.put(str(local), f"/bucket/a.{suffix}", recursive=True)
    with open_source(str(local)) as here, open_source(f"memory://bucket/a.{suffix}") as there:
        assert here.version == there.version, "content decides the version, not where it lies"
        matrix, keys = read_all(there)
        assert here.scan(5).shards[0].address == there.scan(5).shards[0].address
    assert equal(matrix, adata.X)
    assert keys == adata.obs_names.tolist()


def test_only_the_columns_and_rows_needed_are_read(make_adata, tmp_path, monkeypatch):
    adata = make_adata(1000, 20, obs={"a": range(1000), "b": range(1000)})
    adata.write_h5ad(tmp_path / "a.h5ad")
    read = []
    slice_of = h5py.Dataset.__getitem__

    def noted(self, at, *rest):
        values = slice_of(self, at, *rest)
        read.append((self.name, np.size(values)))
        return values

    with open_source(str(tmp_path / "a.h5ad")) as source:
        shard = source.scan(100).shards[3]
        monkeypatch.setattr(h5py.Dataset, "__getitem__", noted)
        source.read(shard, columns=["b"])
    sizes = dict(read)
    assert "/obs/a" not in sizes
    assert sizes["/obs/b"] == 100
    assert sizes["/X/indptr"] == 101
    assert sizes["/X/data"] == adata.X[300:400].nnz


def test_a_source_is_not_pickled_and_its_shards_are(symphony):
    with open_source(str(symphony)) as source:
        with pytest.raises(TypeError, match="holds open handles and is not pickled: send a Shard"):
            pickle.dumps(source)
        shard = source.scan(500).shards[1]
    assert pickle.loads(pickle.dumps(shard)) == shard
