"""Proteins and peaks in an AnnData file: in obsm, or among the features of X."""

from __future__ import annotations

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scviaduct.errors import SourceError
from scviaduct.sources import open_source

NAMES = ["CD3", "CD4", "IgG1"]


@pytest.fixture
def adata(make_adata):
    """Cells with a table of three proteins."""
    adata = make_adata(20, 7, obs={"n": range(20)})
    counts = np.random.default_rng(1).poisson(2, (20, 3))
    adata.obsm["adt"] = pd.DataFrame(counts, index=adata.obs_names, columns=NAMES)
    return adata


@pytest.fixture
def opened(tmp_path):
    """Write an AnnData and open it."""

    def write(adata, query="", suffix="h5ad"):
        getattr(adata, f"write_{suffix}")(tmp_path / f"a.{suffix}")
        return open_source(f"{tmp_path}/a.{suffix}{query}")

    return write


def beside(adata, proteins):
    return np.concatenate((adata.X.toarray(), proteins), axis=1)


@pytest.mark.parametrize(("name", "proteins"), [("citeseq_pbmc5k_scvitests", 29), ("citeseq_pbmc10k_scvitests", 14)])
def test_real_citeseq(name, proteins, shared_data, read_all, equal):
    adata = anndata.read_h5ad(shared_data / f"{name}.h5ad")
    held = adata.obsm["protein_expression"]
    with open_source(f"{shared_data}/{name}.h5ad?proteins=protein_expression") as source:
        matrix, keys = read_all(source, 77)
        genes = source.genes()
        assert source.describe()["modalities"] == f"{adata.n_vars:,} rna, {proteins} protein"
        assert source.describe()["layer"] == "rna:X, protein:obsm/protein_expression"
    assert keys == adata.obs_names.tolist()
    assert equal(matrix, sparse.hstack([adata.X, sparse.csr_matrix(held.to_numpy(np.float32))]))
    assert list(genes.columns["index"]) == [*adata.var_names, *held.columns]
    assert genes.modality == ("rna",) * adata.n_vars + ("protein",) * proteins
    assert set(genes.columns["gene_symbol"][-proteins:]) == {""}


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
@pytest.mark.parametrize("kind", ["frame", "array", "csr"])
@pytest.mark.parametrize("slab", [64 << 20, 300])
def test_every_kind_of_table(slab, kind, suffix, adata, opened, read_all, monkeypatch):
    for module in ("counts", "ondisk", "proteins"):
        monkeypatch.setattr(f"scviaduct.sources.{module}.SLAB_BYTES", slab)
    counts = adata.obsm["adt"].to_numpy()
    if kind != "frame":
        adata.obsm["adt"] = counts if kind == "array" else sparse.csr_matrix(counts)
        adata.uns["adt_names"] = np.array(NAMES, dtype=object) if kind == "array" else NAMES
    with opened(adata, "?proteins=adt", suffix) as source:
        assert source.selection == "key=_index&layer=X&proteins=adt"
        assert source.genes().columns["index"][-3:] == (*NAMES,)
        np.testing.assert_array_equal(read_all(source)[0].toarray(), beside(adata, counts))
        with open_source(source.uri) as again:
            assert again.scan(7).shards == source.scan(7).shards
    chosen = [3, 4, 8, 15]
    with open_source(f"{source.uri}&filter=n in {chosen}") as source:
        np.testing.assert_array_equal(read_all(source)[0].toarray(), beside(adata, counts)[chosen])


def test_names_as_scvi_tools_once_left_them(adata, opened):
    adata.obsm["adt"], adata.uns["protein_names"] = adata.obsm["adt"].to_numpy(), np.array(NAMES, dtype=object)
    with opened(adata, "?proteins=adt") as source:
        assert source.genes().columns["index"][-3:] == (*NAMES,)


def test_a_protein_that_was_not_measured_stays_missing_for_preflight_to_see(adata, opened, read_all):
    adata.obsm["adt"] = adata.obsm["adt"].astype("Int64").mask(adata.obsm["adt"] > 2)
    with opened(adata, "?proteins=adt") as source:
        read = read_all(source)[0].toarray()[:, -3:]
    np.testing.assert_array_equal(np.isnan(read), adata.obsm["adt"].isna().to_numpy())


def test_x_of_another_modality_beside_proteins(adata, opened):
    with opened(adata, "?proteins=adt&modality=atac") as source:
        assert source.genes().modality == ("atac",) * 7 + ("protein",) * 3
        assert source.selection == "key=_index&layer=X&modality=atac&proteins=adt"


def test_what_cannot_be_taken_for_proteins_is_refused(adata, opened):
    adata.obsm["umap"] = np.zeros((20, 2))
    adata.obsm["text"] = pd.DataFrame({"a": ["x"] * 20, "b": 1}, index=adata.obs_names)
    adata.obsm["wide"], adata.uns["wide_names"] = np.zeros((20, 2)), np.array(["one"], dtype=object)
    adata.obsm["coo"], adata.uns["coo_names"] = sparse.csc_matrix(np.ones((20, 1))), np.array(["one"], dtype=object)
    for key, message in {
        "nope": r"proteins=nope: obsm of .* has no such element. There are: adt, coo, text, umap, wide",
        "umap": r"obsm/umap of .* without names: uns has neither 'umap_names' nor .* adata.uns\['umap_names'\] =",
        "text": "Column 'a' of obsm/text of .* does not hold numbers",
        "wide": "obsm/wide of .* has 2 columns, and uns/wide_names names 1",
        "coo": r"obsm/coo of .* has encoding 'csc_matrix', not csr_matrix, array, dataframe. Write it as a data frame",
    }.items():
        with pytest.raises(SourceError, match=message):
            opened(adata, f"?proteins={key}")


def of_kinds(adata, column="feature_types"):
    adata.var[column] = pd.Categorical(
        ["Gene Expression", "Antibody Capture", "Gene Expression", "Peaks", "CRISPR Guide Capture", "Peaks", None]
    )
    return adata


@pytest.mark.parametrize("column", ["feature_types", "modality"])
def test_features_of_x_are_of_the_modality_that_var_says(column, make_adata, opened, read_all, equal):
    adata = of_kinds(make_adata(20, 7), column)
    with opened(adata) as source:
        assert source.genes().modality == ("rna", "protein", "rna", "atac", "other", "atac", "")
        assert source.selection == "key=_index&layer=X", "as it was before modalities were read"
        assert equal(read_all(source)[0], adata.X)


@pytest.mark.parametrize(
    ("wanted", "kept", "modality", "pinned"),
    [
        ("rna", [0, 2], "rna", "Gene%20Expression:rna"),
        ("Peaks,rna", [0, 2, 3, 5], "rna", "Gene%20Expression:rna,Peaks:atac"),
        ("CRISPR Guide Capture:protein", [4], "other", "CRISPR%20Guide%20Capture:protein"),
    ],
)
def test_some_modalities_of_x(wanted, kept, modality, pinned, make_adata, opened, read_all):
    adata = of_kinds(make_adata(20, 7))
    with opened(adata, f"?modality={wanted}") as source:
        names = source.genes().columns["index"]
        assert [i for i, name in enumerate(names) if name] == kept
        assert source.selection == f"key=_index&layer=X&modality={pinned}"
        counts = read_all(source)[0].toarray()
        np.testing.assert_array_equal(counts[:, kept], adata.X.toarray()[:, kept])
        assert not np.delete(counts, kept, axis=1).any()
        with open_source(source.uri) as again:
            assert again.genes() == source.genes()
    first = adata.var_names[kept[0]]
    with open_source(f"{source.uri}&var_filter=_index != '{first}'") as source:
        assert [i for i, name in enumerate(source.genes().columns["index"]) if name] == kept[1:]


def test_modality_that_var_does_not_have_is_refused(make_adata, opened):
    adata = make_adata(20, 7)
    adata.var["feature_types"] = "Gene Expression"
    with pytest.raises(SourceError, match=r"modality=atac: var of .* has no such modality. There are: Gene Expression"):
        opened(adata, "?modality=atac")
    with opened(adata, "?modality=Gene Expression:atac") as source:
        assert source.genes().modality == ("atac",) * 7
    with pytest.raises(SourceError, match=r"modality=rna,protein: var of .* does not say of what modality"):
        opened(make_adata(20, 7), "?modality=rna,protein")


def test_proteins_in_two_places_are_refused(adata, opened):
    with pytest.raises(SourceError, match=r"proteins=adt: var of .* names proteins already. Leave proteins= out"):
        opened(of_kinds(adata), "?proteins=adt")
    with opened(of_kinds(adata), "?proteins=adt&modality=rna") as source:
        kept = [name for name in source.genes().columns["index"] if name]
        assert kept == [adata.var_names[0], adata.var_names[2], *NAMES]


@pytest.mark.parametrize(
    ("query", "modality"), [("", ()), ("?modality=accessibility", ("atac",) * 52761)], ids=["unsaid", "said"]
)
def test_real_peaks_are_what_the_user_says(query, modality, shared_data):
    with open_source(f"{shared_data}/multiome_a549_scicar_atac_binary.h5ad{query}") as source:
        assert source.genes().modality == modality
        assert ("modality=atac" in source.selection) == bool(modality)


def test_data_frames_and_dense_counts_of_anndata_0_7(adata, tmp_path, read_all):
    """Categories lie apart, columns and dense matrices have no encoding."""
    adata.X = adata.X.toarray()
    del adata.obsm["adt"], adata.obs["n"]
    adata.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "a") as file:
        obs = file["obs"]
        obs.attrs["encoding-version"] = file["var"].attrs["encoding-version"] = "0.1.0"
        obs["donor"], obs["n"] = np.array([1, 0, -1, 0] * 5, np.int8), np.arange(20)
        obs["__categories/donor"] = np.array(["x", "y"], dtype=object)
        obs["donor"].attrs["categories"] = obs["__categories/donor"].ref
        obs["flag"] = np.array([True, False] * 10)
        obs.attrs["column-order"] = ["donor", "n", "flag"]
        for element in (obs["_index"], file["var/_index"], file["X"]):
            for name in list(element.attrs):
                del element.attrs[name]
    with open_source(f"{tmp_path}/a.h5ad?filter=donor == 'x' and flag == False and n > 3") as source:
        (shard,) = source.scan(100, ["donor"]).shards
        block = source.read(shard, columns=["donor", "n", "flag"])
        assert block.obs["n"].to_pylist() == [5, 7, 9, 11, 13, 15, 17, 19]
        assert source.genes().columns["index"] == (*adata.var_names,)
    with open_source(f"{tmp_path}/a.h5ad") as source:
        assert source.scan(100, ["donor"]).columns["donor"].counts == {"x": 10, "y": 5}
        np.testing.assert_array_equal(read_all(source)[0].toarray(), adata.X)
