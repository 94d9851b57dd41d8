"""Several modalities are one list of features, and a cell that one of them lacks has no counts there."""

from __future__ import annotations

import shutil
import tracemalloc
import warnings

import anndata
import h5py
import mudata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scviaduct.errors import DataError, FilterError, SourceError
from scviaduct.sources import close_shards, counts, open_shard, open_source
from scviaduct.sources.modalities import canonical

RNA, PROTEIN, ATAC = [f"c{i}" for i in range(30)], [f"c{i}" for i in range(10, 40)], ["c39", "c3", "c12", "c41", "c7"]


def modality(names, features, prefix, seed, **obs):
    """AnnData of counts that tell modality, cell and feature apart."""
    matrix = np.random.default_rng(seed).poisson(0.8, (len(names), features)).astype(np.float32)
    index = [f"{prefix}{i}" for i in range(features)]
    adata = anndata.AnnData(sparse.csr_matrix(matrix), pd.DataFrame(obs, index=names), pd.DataFrame(index=index))
    adata.var["symbol"] = [f"{prefix.upper()}{i}" for i in range(features)]
    return adata


@pytest.fixture
def parts():
    """Genes, proteins in another order of cells, and peaks of a few cells."""
    shuffled = [PROTEIN[i] for i in np.random.default_rng(5).permutation(len(PROTEIN))]
    peaks = modality(ATAC, 4, "chr1:1-", 3, depth=range(5))
    del peaks.var["symbol"]
    return {
        "rna": modality(RNA, 7, "g", 1, batch=["a", "b"] * 15, depth=range(30)),
        "adt": modality(shuffled, 3, "p", 2, panel=[f"x{name}" for name in shuffled]),
        "peaks": peaks,
    }


@pytest.fixture
def mdata(parts):
    """All of them, with a column of the whole."""
    mdata = mudata.MuData(parts)
    mdata.obs["donor"] = [f"d{i % 3}" for i in range(mdata.n_obs)]
    return mdata


@pytest.fixture
def path(mdata, tmp_path):
    """The same as a file."""
    mdata.write_h5mu(tmp_path / "cells.h5mu")
    return tmp_path / "cells.h5mu"


def expected(mdata, names):
    """Counts of some modalities beside each other, found by the names of the cells."""
    beside = []
    for name in names:
        adata = mdata.mod[name]
        frame = pd.DataFrame(adata.X.toarray(), index=adata.obs_names)
        beside.append(frame.reindex(mdata.obs_names).fillna(0).to_numpy())
    return np.concatenate(beside, axis=1)


def by_key(matrix, keys, mdata):
    return matrix.toarray()[[keys.index(name) for name in mdata.obs_names]]


@pytest.mark.parametrize("slab", [64 << 20, 200])
def test_h5mu_is_its_modalities_beside_each_other(slab, path, mdata, read_all, monkeypatch):
    """Slabs of one cell, and of all."""
    for module in ("counts", "ondisk"):
        monkeypatch.setattr(f"scviaduct.sources.{module}.SLAB_BYTES", slab)
    with open_source(str(path)) as source:
        genes = source.genes()
        assert len(genes) == 14
        assert genes.modality == ("rna",) * 7 + ("protein",) * 3 + ("atac",) * 4
        assert genes.modalities == ("rna", "protein", "atac")
        assert genes.columns["index"] == tuple(name for part in mdata.mod.values() for name in part.var_names)
        assert genes.columns["symbol"] == (*(f"G{i}" for i in range(7)), "P0", "P1", "P2", "", "", "", "")
        matrix, keys = read_all(source, 9)
        assert source.describe()["modalities"] == "7 rna, 3 protein, 4 atac"
        assert source.describe()["kind"] == "h5mu"
    assert keys == mdata.obs_names.tolist()
    np.testing.assert_array_equal(matrix.toarray(), expected(mdata, mdata.mod))


def test_zarr_of_mudata_is_the_same(path, mdata, tmp_path, read_all):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mudata asks anndata for a setting that is deprecated
        mdata.write_zarr(tmp_path / "cells.zarr")
    with open_source(str(tmp_path / "cells.zarr")) as store, open_source(str(path)) as file:
        assert store.genes() == file.genes()
        assert store.selection == file.selection
        assert store.describe()["kind"] == "zarr of MuData"
        left, right = read_all(store), read_all(file)
        assert left[1] == right[1]
        assert (left[0] != right[0]).nnz == 0


def test_gene_map_reaches_over_modalities_and_leaves_unread_what_is_dropped(path, mdata, as_csr, monkeypatch):
    gene_map = np.full(14, -1, np.int32)
    gene_map[[1, 8]] = 4, 0
    read = []
    slice_of = h5py.Dataset.__getitem__
    monkeypatch.setattr(h5py.Dataset, "__getitem__", lambda self, *at: read.append(self.name) or slice_of(self, *at))
    with open_source(str(path)) as source:
        (shard,) = source.scan(100).shards
        read.clear()
        block = source.read(shard, gene_map, 5)
        nothing = source.read(shard, np.full(14, -1, np.int32), 5)
    whole = expected(mdata, mdata.mod)
    np.testing.assert_array_equal(as_csr(block).toarray()[:, [4, 0]], whole[:, [1, 8]])
    assert as_csr(block).toarray()[:, [1, 2, 3]].sum() == 0
    assert "/mod/adt/X/data" in read
    assert not any(name.startswith("/mod/peaks/X") for name in read)
    assert as_csr(nothing).shape == (mdata.n_obs, 5)


def test_columns_of_obs_are_those_of_the_whole_and_of_each_modality(path, mdata):
    with open_source(str(path)) as source:
        columns = ("donor", "rna:batch", "rna:depth", "peaks:depth", "adt:panel", "batch", "panel")
        assert set(source.obs_columns()) == {*columns}, "depth is in two modalities, so it needs its prefix"
        scan = source.scan(11, columns)
        tables = [source.read(shard, columns=columns).obs.to_pandas() for shard in scan.shards]
    read = pd.concat([table.astype(object) for table in tables]).set_index("observation_id")
    for column in columns:
        name, _, own = column.rpartition(":")
        name = name or {"batch": "rna", "panel": "adt"}.get(own, "")
        held = (mdata.mod[name] if name else mdata).obs[own].astype(object).reindex(mdata.obs_names)
        assert [None if pd.isna(value) else value for value in read[column]] == [
            None if pd.isna(value) else value for value in held
        ], column
    assert scan.columns["rna:batch"].nulls == mdata.n_obs - 30


def test_cells_are_filtered_and_keyed_by_a_column_of_a_modality(path, mdata, as_csr):
    with (
        open_source(f"{path}?filter=batch == 'a'&key=panel") as source,
        pytest.raises(SourceError, match=r"Row 0 of .* has no key \(obs column 'panel'\)"),
    ):
        source.scan(100)
    with open_source(f"{path}?filter=attr('adt:panel') in ['xc12', 'xc14']") as source:
        (shard,) = source.scan(100).shards
        block = source.read(shard)
        assert sorted(block.obs["observation_id"].to_pylist()) == ["c12", "c14"]
        rows = [mdata.obs_names.get_loc(name) for name in block.obs["observation_id"].to_pylist()]
        np.testing.assert_array_equal(as_csr(block).toarray(), expected(mdata, mdata.mod)[rows])


@pytest.mark.parametrize(
    ("query", "modalities", "pinned"),
    [
        ("", ["rna", "adt", "peaks"], "layer=rna:X,adt:X,peaks:X&modality=rna,adt:protein,peaks:atac"),
        ("?modality=protein,rna", ["rna", "adt"], "layer=rna:X,adt:X&modality=rna,adt:protein"),
        ("?modality=adt", ["adt"], "layer=adt:X&modality=adt:protein"),
        ("?modality=adt:rna", ["adt"], "layer=adt:X&modality=adt:rna"),
        ("?modality=rna&layer=X", ["rna"], "layer=rna:X&modality=rna"),
        ("?layer=protein:X,rna:X&modality=rna,adt", ["rna", "adt"], "layer=rna:X,adt:X&modality=rna,adt:protein"),
    ],
)
def test_modalities_are_chosen_and_spelled_in_the_uri(query, modalities, pinned, path, mdata, read_all):
    with open_source(f"{path}{query}") as source:
        assert source.uri == f"file://{path}?key=_index&{pinned}&version={source.version}"
        assert source.selection == f"key=_index&{pinned}"
        np.testing.assert_array_equal(read_all(source)[0].toarray(), expected(mdata, modalities))
        with open_source(source.uri) as again:
            assert again.scan(9).shards == source.scan(9).shards
            assert again.genes() == source.genes()


def test_layers_are_chosen_for_each_modality(parts, tmp_path, read_all):
    parts = {name: parts[name] for name in ("rna", "adt")}
    for name, layer in (("rna", "counts"), ("adt", "umi")):
        parts[name].layers[layer], parts[name].X = parts[name].X, parts[name].X.log1p()
    mdata = mudata.MuData(parts)
    mdata.write_h5mu(tmp_path / "a.h5mu")
    with open_source(f"{tmp_path}/a.h5mu") as source:
        assert source.describe()["layer"] == "rna:layers/counts, adt:layers/umi"
        assert "layer=rna:layers/counts,adt:layers/umi&" in source.uri
        raw = read_all(source)[0].toarray()
    with open_source(f"{tmp_path}/a.h5mu?layer=protein:X,rna:counts") as source:
        mixed = read_all(source)[0].toarray()
        assert source.describe()["why"] == "rna: asked for; adt: asked for"
    np.testing.assert_array_equal(mixed[:, :7], raw[:, :7])
    np.testing.assert_allclose(mixed[:, 7:], np.log1p(raw[:, 7:]), rtol=1e-6)
    np.testing.assert_array_equal(mixed[:, 7:], expected(mdata, ["rna", "adt"])[:, 7:])


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("modality=rna,nope", r"modality=nope: .* has no such modality. There are: rna, adt, peaks"),
        ("modality=rna:genome", "'genome' is no modality that is known. Say what it is: modality=NAME:rna"),
        ("modality=rna,peaks:rna", "Modalities rna and peaks of .* are both rna. Choose one"),
        ("layer=rna:X,X", "names two layers of modality rna"),
        ("layer=adt:nope", "modality adt of .* has no layer 'nope'. There are: X"),
        ("proteins=adt", "MuData, whose proteins are a modality. Name it"),
        ("key=depth", r"key=depth: .* has no such obs column"),
    ],
)
def test_bad_choices_are_refused(query, message, path):
    with pytest.raises(SourceError, match=message):
        open_source(f"{path}?{query}")


def test_var_filter_is_for_the_modalities_that_have_its_columns(path):
    with open_source(f"{path}?var_filter=symbol in ['G1', 'P2']") as source:
        kept = [name for name in source.genes().columns["index"] if name]
    assert kept == ["g1", "p2", *(f"chr1:1-{i}" for i in range(4))]
    with pytest.raises(FilterError, match="names column 'nope', which var of"):
        open_source(f"{path}?var_filter=nope == 1")


def test_modality_of_no_usual_name_is_left_out_unless_it_is_named(parts, tmp_path):
    mudata.MuData({"rna": parts["rna"], "hto": parts["adt"]}).write_h5mu(tmp_path / "a.h5mu")
    with open_source(f"{tmp_path}/a.h5mu") as source:
        assert source.genes().modalities == ("rna",)
        assert source.describe()["not read"] == "hto"
        assert "adt:panel" not in source.obs_columns()
    with open_source(f"{tmp_path}/a.h5mu?modality=rna,hto:protein") as source:
        assert source.genes().modalities == ("rna", "protein")
    with pytest.raises(SourceError, match=r"modality=hto: .* does not tell what it is. Say what it is: modality=NAME"):
        open_source(f"{tmp_path}/a.h5mu?modality=hto")
    mudata.MuData({"hto": parts["adt"]}).write_h5mu(tmp_path / "b.h5mu")
    with pytest.raises(SourceError, match=r"no modality of a usual name; it has: hto. Say what it is"):
        open_source(f"{tmp_path}/b.h5mu")
    mudata.MuData({"rna": parts["rna"], "a:b": parts["adt"]}).write_h5mu(tmp_path / "c.h5mu")
    with pytest.raises(SourceError, match=r"'a:b' in .* holds a comma or a colon, .* Rename it"):
        open_source(f"{tmp_path}/c.h5mu?modality=rna,a:b:protein")


def test_map_of_cells_that_is_out_of_date_is_refused(path, tmp_path):
    for change, message in {
        "swap": "obsmap of modality 'rna' of .* says that cell 'c.*' is row .*, which is 'c",
        "lose": "obsmap of modality 'rna' of .* places 29 of 41 cells in its 30 rows",
    }.items():
        copy = tmp_path / f"{change}.h5mu"
        shutil.copy(path, copy)
        with h5py.File(copy, "a") as file:
            held = file["obsmap/rna"]
            at = held[:]
            there = np.flatnonzero(at)
            at[there] = np.roll(at[there], 1) if change == "swap" else np.where(at[there] == 1, 0, at[there])
            held[:] = at
        with pytest.raises(SourceError, match=rf"{message}.*mdata.update\(\)"):
            open_source(str(copy))


def test_cells_are_found_by_name_where_there_is_no_map(path, mdata, read_all):
    with h5py.File(path, "a") as file:
        del file["obsmap"]
    with open_source(str(path)) as source:
        np.testing.assert_array_equal(read_all(source)[0].toarray(), expected(mdata, mdata.mod))
    with h5py.File(path, "a") as file:
        file["mod/rna/obs/_index"][0] = "stranger"
    with pytest.raises(SourceError, match=r"Cell 'stranger' of modality 'rna' of .* is not in obs"):
        open_source(str(path))
    with h5py.File(path, "a") as file:
        file["mod/rna/obs/_index"][0] = "c1"
    with pytest.raises(SourceError, match=r"Modality 'rna' of .* has cell 'c1' more than once"):
        open_source(str(path))


def test_modalities_that_share_genes_are_refused(parts, tmp_path):
    other = parts["rna"][:10].copy()
    other.obs_names = [f"other{i}" for i in range(10)]
    mudata.MuData({"rna": parts["rna"], "gex2": other}, axis=1).write_h5mu(tmp_path / "a.h5mu")
    with pytest.raises(SourceError, match=r"MuData of modalities that share genes \(axis=1\), not cells"):
        open_source(f"{tmp_path}/a.h5mu")


def test_flag_of_a_modality_does_not_make_duplicates_of_the_cells_it_lacks(parts, tmp_path):
    parts["rna"].obs["is_primary_data"] = [i > 0 for i in range(30)]
    mudata.MuData({"rna": parts["rna"], "adt": parts["adt"]}).write_h5mu(tmp_path / "a.h5mu")
    with open_source(f"{tmp_path}/a.h5mu") as source:
        assert source.scan(100).cells == 40
        assert "rna:is_primary_data" in source.obs_columns()
    mudata.MuData({"rna": parts["rna"]}).write_h5mu(tmp_path / "b.h5mu")
    with open_source(f"{tmp_path}/b.h5mu") as source:
        assert source.scan(100).duplicates_skipped == 1


def test_spoilt_modality_is_an_error_of_its_shard(path):
    with h5py.File(path, "a") as file:
        indices = file["mod/peaks/X/indices"]
        indices[-1] = 99
    close_shards()
    with open_source(str(path)) as source:
        shard = source.scan(100).shards[0]
    with pytest.raises(DataError, match=r"X of modality peaks of .*, rows 0 to 5, cannot be read .*genes 0 to 99 of 4"):
        open_shard(shard).read(shard)
    block = open_shard(shard).read(shard, np.array([*range(7), *[-1] * 7], np.int32))
    assert block.n_genes == 7, "genes alone are whole"
    close_shards()


def test_memory_is_a_slab_of_each_modality(tmp_path, monkeypatch):
    slab, cells = 256 << 10, 30_000
    for module in ("counts", "ondisk"):
        monkeypatch.setattr(f"scviaduct.sources.{module}.SLAB_BYTES", slab)
    names = [f"c{i}" for i in range(cells)]
    parts = {"rna": modality(names, 100, "g", 0), "adt": modality(names[cells // 2 :], 100, "p", 1)}
    mudata.MuData(parts).write_h5mu(tmp_path / "a.h5mu")
    with open_source(f"{tmp_path}/a.h5mu") as source:
        rows, target = np.arange(cells, dtype=np.int64), counts.GeneTarget.of(200, None, None, None)
        tracemalloc.start()
        total = sum(len(part.data) for part in source.counts(rows, target))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert total == sum(part.X.nnz for part in parts.values())
    # Two slabs and their sum; 32 bytes a cell and modality for its number, its place and its pointer.
    assert peak < 4 * slab + 2 * 32 * cells + (64 << 10)
    assert total * 8 > 3 * peak, "the counts themselves are much more"


def test_real_multiome_without_encodings_or_map(shared_data, read_all, equal):
    """Written by a MuData of 2021: no encoding of groups, data frames of version 0.1.0, no obsmap."""
    path = shared_data / "multiome_rna_atac_muon.h5mu"
    with h5py.File(path) as file:
        held = {
            name: sparse.csr_matrix(
                tuple(file[f"mod/{name}/X/{array}"][:] for array in ("data", "indices", "indptr")),
                shape=file[f"mod/{name}/X"].attrs["shape"],
            )
            for name in ("atac", "rna")
        }
        keys, peaks = file["obs/_index"].asstr()[:].tolist(), file["mod/atac/var/_index"].asstr()[:].tolist()
    with open_source(str(path)) as source:
        matrix, read = read_all(source, 300)
        assert equal(matrix, sparse.hstack([held["atac"], held["rna"]]).tocsr())
        assert read == keys
        genes = source.genes()
        assert genes.modality == ("atac",) * 174 + ("rna",) * 45
        assert list(genes.columns["index"][:174]) == peaks
        assert set(genes.columns["feature_types"]) == {"Peaks", "Gene Expression"}
    with open_source(f"{path}?modality=rna&var_filter=genome == 'GRCh38'") as source:
        assert equal(read_all(source, 300)[0], held["rna"])


def test_folder_takes_mudata_only_where_there_is_nothing_else(path, parts, tmp_path):
    with open_source(str(tmp_path)) as source:
        assert [shard.dataset_id for shard in source.scan(100).shards] == ["cells"]
    parts["rna"].write_h5ad(tmp_path / "rna.h5ad")
    with open_source(str(tmp_path)) as source:
        assert [shard.dataset_id for shard in source.scan(100).shards] == ["rna"]
    with open_source(f"{tmp_path}/*.h5mu?modality=rna") as source:
        assert [shard.dataset_id for shard in source.scan(100).shards] == ["cells"]


@pytest.mark.parametrize(
    ("names", "modality"),
    [
        (("rna", "RNA", "gex", "GEX", "Gene Expression", "gene_expression"), "rna"),
        (("prot", "ADT", "Antibody Capture", "protein_expression", "ab"), "protein"),
        (("atac", "Peaks", "chromatin-accessibility"), "atac"),
        (("hto", "CRISPR Guide Capture", "", "rna2"), ""),
    ],
)
def test_usual_names(names, modality):
    assert {canonical(name) for name in names} == {modality}
