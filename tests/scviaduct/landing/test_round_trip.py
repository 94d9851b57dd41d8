"""A landing gives what was landed, to the bit: cells, counts, genes, shards, whatever the source is."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import zarr
from scipy import sparse

from scviaduct.errors import FilterError, SourceChangedError, SourceError
from scviaduct.landing import Landing
from scviaduct.sources import open_shard, open_source


@pytest.fixture(params=["h5ad", "h5mu", "soma", "census", "filtered"])
def uri(request, symphony, shared_data, soma_from_r, census_collection):
    """A source of every kind."""
    return {
        "h5ad": f"{symphony}",
        "h5mu": f"{shared_data / 'multiome_rna_atac_muon.h5mu'}",
        "soma": f"soma:{soma_from_r}",
        "census": f"census:2026-01-01?uri={census_collection}",
        "filtered": f"census:2026-01-01?uri={census_collection}&filter=sex != 'male' and raw_sum > 2000",
    }[request.param]


def test_gives_what_was_landed(uri, land, parity, scrambled, tmp_path):
    landing, written = land(uri, tmp_path / "landing")
    manifest = landing.manifest()
    assert written == len(manifest.pieces)
    for shard_cells in (300, 171):  # as the pieces are cut, and across them
        parity(uri, landing.path, shard_cells)
    gene_map, n_genes = scrambled(manifest.parts[0].n_genes)
    parity(uri, f"landing:{landing.path}", gene_map=gene_map, n_genes=n_genes, columns=())


def test_filters_select_what_they_select_in_the_source(land, parity, symphony, tmp_path):
    landing, _ = land(symphony, tmp_path / "landing")
    asked = "filter=batch in ['3pv1', '5p'] and not cell_type == 'B'"
    assert parity(f"{symphony}?{asked}", f"{landing.path}?{asked}").cells > 100
    with pytest.raises(FilterError, match="sexx"):
        open_source(f"{landing.path}?filter=sexx == 'male'")


def test_var_filter_leaves_genes_out_as_in_the_source(land, parity, census_collection, tmp_path):
    census = f"census:2026-01-01?uri={census_collection}"
    landing, _ = land(census, tmp_path / "landing", 2000)
    asked = "var_filter=feature_name in ['CD3D', 'MS4A1', 'NKG7'] or feature_id == 'ENSG00000111640'"
    parity(f"{census}&{asked}", f"{landing.path}?{asked}", 2000)
    with pytest.raises(FilterError, match="feature_length"):
        open_source(f"{landing.path}?var_filter=feature_length > 5")
    narrow, _ = land(f"{census}&{asked}", tmp_path / "narrow", 2000)
    parity(f"{census}&{asked}", narrow.path, 2000)
    with pytest.raises(SourceError, match="landed with one"):
        open_source(f"{narrow.path}?var_filter=feature_name == 'CD3D'")


def write(path, obs, counts=None, seed=0, cells=40, genes=9):
    counts = np.random.default_rng(seed).poisson(0.8, (cells, genes)).astype(np.float32) if counts is None else counts
    names = [f"cell{i}" for i in range(len(counts))]
    adata = anndata.AnnData(
        sparse.csr_matrix(counts),
        obs=pd.DataFrame(obs, index=names),
        var=pd.DataFrame(index=[f"G{seed}-{i}" for i in range(counts.shape[1])]),
    )
    adata.write_h5ad(path)
    return path


def test_obs_columns_of_every_type(land, parity, tmp_path):
    n = 40
    some = np.arange(n) % 3 == 0
    obs = {
        "text": pd.array([None if hit else f"t{i}" for i, hit in enumerate(some)], dtype="string"),
        "category": pd.Categorical([None if hit else "ab"[i % 2] for i, hit in enumerate(some)]),
        "numbers": pd.Categorical([i % 4 for i in range(n)]),
        "flag": some,
        "maybe": pd.array([None if hit else bool(i % 2) for i, hit in enumerate(some)], dtype="boolean"),
        "count": np.arange(n, dtype=np.int16),
        "perhaps": pd.array([None if hit else i for i, hit in enumerate(some)], dtype="Int64"),
        "share": np.where(some, np.nan, np.linspace(0, 1, n)).astype(np.float32),
        "orig.ident": [f"x{i % 2}" for i in range(n)],
        "key": np.arange(n) * 0.5,
        "row": np.arange(n),
    }
    path = write(tmp_path / "types.h5ad", obs)
    landing, _ = land(path, tmp_path / "landing", 16)
    types = landing.manifest().parts[0].columns
    assert types == {
        **dict.fromkeys(("text", "category", "numbers", "orig.ident"), "string"),
        **dict.fromkeys(("flag", "maybe"), "bool"),
        **dict.fromkeys(("count", "perhaps", "row"), "int64"),
        **dict.fromkeys(("share", "key"), "double"),
    }
    parity(path, landing.path, 11)
    asked = 'filter=attr("orig.ident") == "x1" and share > 0.2 and maybe == True'
    assert 0 < parity(f"{path}?{asked}", f"{landing.path}?{asked}", 5).cells < n
    assert parity(f"{path}?filter=_index == 'cell3'", f"{landing.path}?filter=_index == 'cell3'", 5).cells == 1


def test_a_column_that_cannot_be_kept_is_left_out_and_named(land, tmp_path):
    path = write(tmp_path / "key.h5ad", {"observation_id": ["a"] * 40, "fine": ["b"] * 40})
    part = land(path, tmp_path / "landing")[0].manifest().parts[0]
    assert list(part.columns) == ["fine"]
    assert "name of a block's cell key" in part.left_out["observation_id"]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, 255], "uint8"),
        ([1, 256], "uint16"),
        ([65_535, 3], "uint16"),
        ([65_536, 3], "uint32"),
        ([2**31, 7], "uint32"),
        ([2**33, 7], "float32"),
        ([0.5, 3], "float32"),
        ([np.nan, 3], "float32"),
        ([-1, 3], "float32"),
        ([np.inf, 3], "float32"),
    ],
)
def test_counts_take_the_smallest_integers_that_hold_them(values, kind, land, parity, tmp_path):
    counts = np.zeros((5, 3), np.float32)
    counts[[1, 4], [0, 2]] = values
    path = write(tmp_path / "counts.h5ad", {}, counts)
    landing, _ = land(f"{path}?layer=X", tmp_path / "landing")
    (piece,) = landing.manifest().pieces
    group = zarr.open_group(str(landing.counts_folder(piece.counts)), mode="r")
    assert (group["data"].dtype, group["steps"].dtype) == (np.dtype(kind), np.dtype("uint16"))
    assert piece.integer == (kind != "float32")
    parity(f"{path}?layer=X", landing.path)


def test_more_genes_than_16_bits_number_and_cells_without_counts(land, parity, tmp_path):
    random = np.random.default_rng(0)
    counts = sparse.random(30, 70_000, 0.001, random_state=random, format="csr", dtype=np.float32)
    counts.data = np.ceil(counts.data * 3)
    counts = sparse.csr_matrix(sparse.diags((~np.isin(np.arange(30), [0, 7, 29])).astype(np.float32)) @ counts)
    counts.eliminate_zeros()
    adata = anndata.AnnData(
        counts,
        obs=pd.DataFrame(index=[f"c{i}" for i in range(30)]),
        var=pd.DataFrame(index=[f"g{i}" for i in range(70_000)]),
    )
    adata.write_h5ad(tmp_path / "wide.h5ad")
    landing, _ = land(tmp_path / "wide.h5ad", tmp_path / "landing", 10)
    few = np.where(np.arange(70_000) % 3, -1, np.arange(70_000) // 3).astype(np.int32)
    parity(tmp_path / "wide.h5ad", landing.path, 7, (), few, 30_000)
    group = zarr.open_group(str(landing.counts_folder(landing.manifest().pieces[0].counts)), mode="r")
    assert group["steps"].dtype == np.uint32
    parity(tmp_path / "wide.h5ad", landing.path, 7)


@pytest.mark.parametrize("alone", ["no gene", "the first gene"])
def test_a_piece_whose_arrays_are_zeros(alone, land, parity, tmp_path):
    """The last piece is of one droplet, which is empty, or has counts of the first gene alone."""
    counts = np.ceil(np.random.default_rng(0).random((21, 5)) * 4).astype(np.float32)
    counts[20] = 0 if alone == "no gene" else [3, 0, 0, 0, 0]
    path = tmp_path / "droplets.h5ad"
    obs = pd.DataFrame({"lot": "a"}, index=[f"c{i}" for i in range(21)])
    anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=list("ABCDE"))).write_h5ad(path)
    landing, written = land(path, tmp_path / "landing", 20)
    assert written == 2
    parity(path, landing.path, 20)


def test_pieces_of_many_chunks(land, parity, symphony, tmp_path, monkeypatch):
    """Slabs and runs that begin and end amid inner chunks."""
    monkeypatch.setattr("scviaduct.landing.counts.CHUNK", 1000)
    monkeypatch.setattr("scviaduct.landing.counts.SLAB_BYTES", 12 * 2500)
    landing, _ = land(symphony, tmp_path / "landing", 700)
    asked = "filter=cell_type == 'DC'"
    genes = landing.manifest().parts[0].n_genes
    few = np.full(genes, -1, np.int32)
    few[np.random.default_rng(0).choice(genes, genes // 5, replace=False)] = np.arange(genes // 5) % 100
    for gene_map, n_genes in ((None, None), (few, 100), (np.full(genes, -1, np.int32), 3)):
        parity(symphony, landing.path, 450, ("batch",), gene_map, n_genes)
        parity(f"{symphony}?{asked}", f"{landing.path}?{asked}", 10, ("batch",), gene_map, n_genes)


def test_several_files_each_with_its_genes(land, parity, tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for seed, cells in enumerate((30, 17, 45)):
        write(folder / f"study{seed}.h5ad", {"tissue": ["x", "y"][seed % 2]}, seed=seed, cells=cells, genes=5 + seed)
    landing, written = land(folder, tmp_path / "landing", 20)
    assert written == 2 + 1 + 3
    assert parity(folder, landing.path, 8).cells == 92
    with open_source(str(landing.path)) as source:
        assert source.describe()["kind"] == "landing of 3 files"
        shards = source.scan(100).shards
        assert [len(source.genes(shard)) for shard in shards] == [5, 6, 7]
    # Any process opens a shard by its own address.
    assert open_shard(shards[1]).read(shards[1]).n_cells == 17
    assert parity(folder / "study2.h5ad", shards[2].uri, 8).cells == 45


def test_datasets_that_interleave(land, parity, tmp_path):
    path = write(tmp_path / "mixed.h5ad", {"study": [f"s{i * 7 % 3}" for i in range(60)]}, cells=60)
    landing, _ = land(f"{path}?dataset=study", tmp_path / "landing", 8)
    assert len({piece.dataset_id for piece in landing.manifest().pieces}) == 3
    parity(f"{path}?dataset=study", landing.path, 9)


def test_duplicates_are_left_out_or_kept_as_in_the_source(land, parity, tmp_path):
    path = write(tmp_path / "primary.h5ad", {"is_primary_data": np.arange(40) % 4 > 0})
    every, _ = land(f"{path}?duplicates=keep", tmp_path / "every", 16)
    primary, _ = land(path, tmp_path / "primary", 16)
    assert parity(f"{path}?duplicates=keep", f"{every.path}?duplicates=keep", 9).cells == 40
    assert parity(path, every.path, 9).cells == 30
    assert parity(path, primary.path, 9).cells == 30
    with open_source(str(every.path)) as source:
        assert source.scan(9).duplicates_skipped == 10
    with pytest.raises(SourceError, match="landed without cells whose is_primary_data is false"):
        open_source(f"{primary.path}?duplicates=keep")


def test_a_landing_can_be_landed_again(land, parity, census_collection, tmp_path):
    census = f"census:2026-01-01?uri={census_collection}"
    first, _ = land(census, tmp_path / "first", 900)
    asked = "filter=tissue_general == 'blood' and nnz > 400"
    second, _ = land(f"{first.path}?{asked}", tmp_path / "second", 250)
    parity(f"{census}&{asked}", second.path, 300)


def test_a_limit_reads_the_first_cells(land, symphony, tmp_path):
    landing, _ = land(symphony, tmp_path / "landing")
    with open_source(str(landing.path)) as source:
        shard = source.scan(1000).shards[0]
        whole, part = source.read(shard, columns=["batch"]), source.read(shard, columns=["batch"], limit=333)
    assert part.n_cells == 333
    assert part.obs["batch"].cast(pa.string()).equals(whole.obs["batch"].cast(pa.string()).slice(0, 333))
    np.testing.assert_array_equal(part.data, whole.data[: len(part.data)])


def test_what_a_landing_refuses(land, symphony, tmp_path):
    landing, _ = land(symphony, tmp_path / "landing")
    with pytest.raises(SourceError, match="unknown parameter 'layer'"):
        open_source(f"{landing.path}?layer=X")
    with pytest.raises(SourceChangedError, match="holds"):
        open_source(f"landing:{landing.path}?version=other")
    with pytest.raises(SourceError, match="no landing at"):
        open_source(f"landing:{tmp_path / 'nowhere'}")
    with pytest.raises(SourceError, match="on a file system"):
        open_source("landing:s3://bucket/landing")
    text = landing.path / "landing.json"
    text.write_text(text.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(SourceError, match=r"format 9.*Land the source again"):
        Landing(landing.path).manifest()
