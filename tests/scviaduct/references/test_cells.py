"""Training cells: modality after modality, features that every file has, peaks that are open often enough."""

from __future__ import annotations

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scviaduct.errors import InputError
from scviaduct.families import MODALITY, Recipe
from scviaduct.references import cells as module
from scviaduct.references.cells import read_cells
from scviaduct.references.features import Features
from scviaduct.sources.source import TableSource


def recipe(family="totalvi", **told):
    return Recipe(family=family, **{"genes": 0} | told)


@pytest.fixture(scope="module")
def cite(shared_data):
    return f"{shared_data / 'citeseq_pbmc5k_scvitests.h5ad'}?proteins=protein_expression"


def test_genes_then_proteins(cite, shared_data):
    read = read_cells(cite, recipe(genes=300))
    original = anndata.read_h5ad(shared_data / "citeseq_pbmc5k_scvitests.h5ad")
    modality = read.cells.var[MODALITY]
    assert list(modality) == ["rna"] * 300 + ["protein"] * 29
    proteins = original.obsm["protein_expression"]
    assert list(read.cells.var_names[300:]) == list(proteins.columns)
    np.testing.assert_array_equal(read.cells.X[:, 300:].toarray(), proteins.to_numpy())
    genes = read.cells.var_names[:300]
    np.testing.assert_array_equal(read.cells.X[:, :300].toarray(), original[:, genes].X.toarray())
    assert read.features.names == tuple(read.cells.var_names)


def test_a_family_of_genes_leaves_proteins_unread(cite):
    read = read_cells(cite, recipe("scvi", genes=50))
    assert set(read.cells.var[MODALITY]) == {"rna"}
    assert read.cells.n_vars == 50


def test_two_panels_keep_what_both_measured(shared_data, tmp_path):
    for name in ("5k", "10k"):
        cells = anndata.read_h5ad(shared_data / f"citeseq_pbmc{name}_scvitests.h5ad")
        cells.write_h5ad(tmp_path / f"{name}.h5ad")
    read = read_cells(f"{tmp_path}?proteins=protein_expression", recipe())
    both = [set(anndata.read_h5ad(path).var_names) for path in sorted(tmp_path.iterdir())]
    assert (read.cells.var[MODALITY] == "protein").sum() == 14
    assert set(read.cells.var_names[read.cells.var[MODALITY] == "rna"]) == both[0] & both[1]
    assert read.cells.n_obs == 400
    assert read.cells.obs_names.str.startswith(("5k:", "10k:")).all()


def test_a_protein_may_be_called_as_its_gene_is(shared_data, tmp_path):
    cells = anndata.read_h5ad(shared_data / "citeseq_pbmc5k_scvitests.h5ad")[:, :100].copy()
    proteins = cells.obsm["protein_expression"]
    cells.obsm["protein_expression"] = proteins.rename(columns={proteins.columns[0]: cells.var_names[3]})
    cells.write_h5ad(tmp_path / "same.h5ad")
    read = read_cells(f"{tmp_path / 'same.h5ad'}?proteins=protein_expression", recipe())
    assert list(read.cells.var_names).count(cells.var_names[3]) == 2
    np.testing.assert_array_equal(read.cells.X[:, 100].toarray().ravel(), proteins.iloc[:, 0])


@pytest.mark.parametrize("share", [0, 0.02, 0.05])
def test_peaks_of_few_cells_are_left_out(shared_data, share):
    path = shared_data / "multiome_a549_scicar_atac_binary.h5ad"
    read = read_cells(str(path), recipe("peakvi", min_cells_per_peak=share))
    opened = np.asarray((anndata.read_h5ad(path).X > 0).mean(axis=0)).ravel()
    assert read.cells.n_vars == (opened >= share).sum()
    assert set(read.cells.var[MODALITY]) == {"atac"}


def test_no_peak_is_left(shared_data):
    path = shared_data / "multiome_a549_scicar_atac_binary.h5ad"
    with pytest.raises(InputError, match=r"No peak is open in 99\.9% of 2,641 cells; .*--min-cells-per-peak 0\.001"):
        read_cells(str(path), recipe("peakvi", min_cells_per_peak=0.999))


def test_genes_and_peaks_of_a_multiome(shared_data):
    path = shared_data / "multiome_rna_atac_muon.h5mu"
    read = read_cells(str(path), recipe("multivi", genes=20, min_cells_per_peak=0.05))
    with h5py.File(path) as file:
        group = file["mod/atac/X"]
        shape = tuple(group.attrs.get("shape", group.attrs.get("h5sparse_shape", (1000, 174))))
        atac = sparse.csr_matrix((group["data"][:], group["indices"][:], group["indptr"][:]), shape=shape)
    often = np.asarray((atac > 0).mean(axis=0)).ravel() >= 0.05
    assert list(read.cells.var[MODALITY]) == ["rna"] * 20 + ["atac"] * often.sum()
    np.testing.assert_array_equal(read.cells.X[:, 20:].toarray(), atac[:, often].toarray())


def test_only_chosen_genes_are_held(shared_data, monkeypatch):
    """Whatever is read of all genes goes with its block; the blocks that are kept have the chosen ones."""
    widths, held = [], []
    original = TableSource.read

    def read(self, shard, gene_map=None, n_genes=None, columns=(), limit=None):
        block = original(self, shard, gene_map, n_genes, columns, limit)
        widths.append(block.n_genes)
        return block

    kept = module.assemble
    monkeypatch.setattr(TableSource, "read", read)
    monkeypatch.setattr(module, "SHARD_CELLS", 300)
    monkeypatch.setattr(module, "assemble", lambda parts: kept([held.append(p) or p for p in parts]))
    read_cells(str(shared_data / "pbmc1k_10xv3_scwg.h5ad"), recipe("scvi", genes=100))
    assert widths == [14_688] * 8 + [100] * 4  # two passes over four blocks, then the counts
    assert all(part.indices.max() < 100 for part in held)
    assert len(held) == 4


def test_features_that_are_given_are_taken_in_their_order(shared_data):
    path = str(shared_data / "pbmc_10x_3tech_symphony.h5ad")
    every = anndata.read_h5ad(path).var_names
    names = tuple(every[[30, 2, 17]])
    read = read_cells(path, recipe("scvi"), Features(names, ("rna",) * 3, {}))
    assert tuple(read.cells.var_names) == names
    wrong = Features((*names, "NOGENE"), ("rna",) * 4, {})
    with pytest.raises(InputError, match=r"1 of the 4 features to train on are not in the source: NOGENE\."):
        read_cells(path, recipe("scvi"), wrong)
    assert Features.of_json(wrong.to_json()) == wrong


@pytest.mark.parametrize(
    ("family", "file", "message"),
    [
        ("totalvi", "pbmc_10x_3tech_symphony.h5ad", r"A TOTALVI needs protein features, .* proteins=KEY"),
        ("peakvi", "multiome_rna_atac_muon.h5mu?modality=rna", r"A PEAKVI needs atac .*has rna\. .*modality=NAME:atac"),
        ("scvi", "multiome_rna_atac_muon.h5mu?modality=atac", r"A SCVI needs rna .*has atac\. .*modality=NAME:rna"),
        ("multivi", "multiome_rna_atac_muon.h5mu?modality=rna", r"A MULTIVI needs atac or protein .*NAME:atac"),
    ],
)
def test_a_modality_that_is_missing(shared_data, family, file, message):
    with pytest.raises(InputError, match=message):
        read_cells(f"{shared_data}/{file}", recipe(family))


def test_columns_that_the_recipe_names_come_once(shared_data):
    told = recipe("mrvi", sample_key="batch", batch_key="batch", labels_key="perturbation", calibrate_by="guide")
    source = f"{shared_data / 'perturb_thp1_eccite_sceptre.h5ad'}?filter=perturbation == 'non-targeting'"
    read = read_cells(source, told)
    assert list(read.cells.obs) == ["perturbation", "batch", "guide"]
    assert isinstance(read.cells.obs["guide"].dtype, pd.CategoricalDtype)
    assert told.told()["calibrate_by"] == told.groups == "guide"
