"""Every latent under its right name, for every family, on real cells: as scvi-tools gives it.

Models are not trained: what is tested is which matrix is which, and that it is scvi-tools'. Tolerances are those of the
families' own tests, 1e-5 of a latent's standard deviation, with room for latents that untrained norms leave narrow.
"""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scvi
from scipy import sparse

from scviaduct.analysis.base import Cells
from scviaduct.analysis.latents import ANALYSES
from scviaduct.families import MODALITY, Recipe, families, family
from scviaduct.families.vae import quiet
from scviaduct.references.saved.archive import read_model_file
from scviaduct.references.template import encode_cells

(LATENTS,) = ANALYSES
CONTROL = ("perturbation=non-targeting",)
TOLERANCE = 1e-4

# Family: further latents, and how scvi-tools is asked for them.
FURTHER = {
    "SCVI": {},
    "SCANVI": {},
    "TOTALVI": {},
    "MULTIVI": {"expression": {"modality": "expression"}, "protein": {"modality": "protein"}},
    "PEAKVI": {},
    "POISSONVI": {},
    "MRVI": {"z": {"give_z": True}},
    "ContrastiveVI": {"salient": {"representation_kind": "salient"}},
}
RECIPES = {
    "SCANVI": {"labels_key": "perturbation"},
    "MRVI": {"sample_key": "batch", "batch_key": None},
    "ContrastiveVI": {"background": CONTROL},
}
SIZES = {
    "TOTALVI": {"empirical_protein_background_prior": False},
    "ContrastiveVI": {"n_background_latent": 6, "n_salient_latent": 4},
}


def some(cells):
    return cells[np.sort(np.random.default_rng(0).permutation(cells.n_obs)[:300])].copy()


@pytest.fixture(scope="module")
def real(shared_data):
    """Flat cells of genes, of genes and proteins, and of peaks."""
    screen = some(anndata.read_h5ad(shared_data / "perturb_thp1_eccite_sceptre.h5ad"))
    obs = screen.obs[["batch", "perturbation"]].astype(str)
    var = pd.DataFrame({MODALITY: "rna"}, index=screen.var_names)
    genes = anndata.AnnData(sparse.csr_matrix(screen.X, dtype=np.float32), obs=obs, var=var)

    citeseq = some(anndata.read_h5ad(shared_data / "citeseq_pbmc10k_scvitests.h5ad"))[:, ::20].copy()
    proteins = citeseq.obsm["protein_expression"]
    names = [*citeseq.var_names, *proteins.columns]
    var = pd.DataFrame({MODALITY: ["rna"] * citeseq.n_vars + ["protein"] * proteins.shape[1]}, index=names)
    counts = sparse.hstack([sparse.csr_matrix(citeseq.X), sparse.csr_matrix(proteins.to_numpy())], format="csr")
    obs = pd.DataFrame({"batch": np.resize(["a", "b"], citeseq.n_obs)}, index=citeseq.obs_names)
    both = anndata.AnnData(counts.astype(np.float32), obs=obs, var=var)

    open_ = some(anndata.read_h5ad(shared_data / "multiome_a549_scicar_atac_binary.h5ad")[:, ::40].copy())
    open_ = open_[np.asarray(open_.X.sum(1)).ravel() > 0]
    obs = pd.DataFrame({"batch": np.resize(["a", "b"], open_.n_obs)}, index=open_.obs_names)
    var = pd.DataFrame({MODALITY: "atac"}, index=[f"chr1:{i}-{i + 1}" for i in range(open_.n_vars)])
    peaks = anndata.AnnData(sparse.csr_matrix(open_.X, dtype=np.float32), obs=obs, var=var)
    return {"TOTALVI": both, "MULTIVI": both, "PEAKVI": peaks, "POISSONVI": peaks}, genes


def model_of(name, cells):
    """An untrained model, as training leaves it."""
    found = family(name)
    recipe = Recipe(**{"family": name, "batch_key": "batch"} | RECIPES.get(name, {}))
    first = family(found.starts_from) if found.starts_from else found
    scvi.settings.seed = 0
    with quiet():
        data = first.setup(cells, recipe)
        model = first.create(data, SIZES.get(name, {"n_latent": 6}), recipe)
        model.is_trained_ = True
        if found is not first:
            model = found.create(data, {}, recipe, model)
    model.module.eval()
    model.is_trained_ = True
    return model


def assert_close(found, expected):
    assert found.dtype == np.float32
    assert (np.abs(found - expected) / expected.std(axis=0)).max() <= TOLERANCE


@pytest.mark.parametrize("name", FURTHER)
def test_latents_of_every_family(real, tmp_path, name):
    cells = real[0].get(name, real[1]).copy()
    model = model_of(name, cells.copy())
    with quiet():
        model.save(str(tmp_path / "saved"))
    facts = family(name).facts(read_model_file(tmp_path / "saved" / "model.pt"))
    encoded = encode_cells(family(name).fold(model, facts, "cpu"), cells.X, cells.obs, facts)
    part = LATENTS.unit(Cells(model, cells, cells.obs[[]], encoded, facts, 0), {}, LATENTS.options())

    shape = LATENTS.shape(facts, LATENTS.options())
    assert set(part.matrices) == set(shape.matrices) == {*FURTHER[name], "variance"}
    for matrix, features in shape.matrices.items():
        assert part.matrices[matrix].shape == (cells.n_obs, len(features))
        assert features == tuple(f"z{i}" for i in range(len(features)))
    with quiet():
        for matrix, told in FURTHER[name].items():
            assert_close(part.matrices[matrix], model.get_latent_representation(**told))
        if name in {"MRVI", "ContrastiveVI"}:  # scvi-tools gives no variance there
            np.testing.assert_array_equal(part.matrices["variance"], encoded.variance)
        else:
            _, variance = model.get_latent_representation(return_dist=True)
            np.testing.assert_allclose(part.matrices["variance"], variance, rtol=1e-4)


def test_every_family_is_there():
    assert set(LATENTS.families) == set(families()) == set(FURTHER)
