"""TOTALVI's latents equal scvi-tools' own, on real CITE-seq cells and over its configurations.

Tolerance: max |difference| / sd <= 1e-5. Both sum the same float32 products in another order, of counts that were
divided by their mean in the cell (here in float64 and rounded once, there in float32); that leaves 2e-6 of a latent's
standard deviation, and two seeds of a training differ by 1e-1.
"""

from __future__ import annotations

from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from mudata import MuData
from scipy import sparse

from scviaduct.errors import InputError, UnsupportedModelError
from scviaduct.families import MODALITY, Recipe, family
from scviaduct.families.vae import quiet
from scviaduct.references.saved.archive import read_model_file
from scviaduct.references.template import encode_cells, make_template

TOLERANCE = 1e-5
FAMILY = family("totalvi")
N_GENES, N_PROTEINS = 40, 12
EVERYTHING = {"batch_key": "batch", "categorical_covariates": ("donor", "same"), "continuous_covariates": ("age",)}

# Name: of the recipe, arguments of the model, whether the encoder reads covariates.
MODELS = {
    "default": ({"batch_key": "batch"}, {}, True),
    "no batches": ({}, {}, False),
    "not encoded": (EVERYTHING, {"encode_covariates": False}, False),
    "everything": (EVERYTHING, {}, True),
    "three layers": (EVERYTHING, {"n_layers_encoder": 3}, True),
    "raw counts": ({}, {"log_variational": False}, False),
    "layer norm": ({"batch_key": "batch"}, {"use_layer_norm": "both", "use_batch_norm": "none"}, True),
    "both norms": ({"batch_key": "batch"}, {"use_layer_norm": "encoder", "n_layers_encoder": 1}, True),
    "no norm": ({"batch_key": "batch"}, {"use_batch_norm": "none"}, True),
    "library size": ({"batch_key": "batch"}, {"use_observed_lib_size": False}, True),
    "size factors": ({"size_factor_key": "size"}, {}, False),
    "dispersions": (
        {"batch_key": "batch"},
        {"gene_dispersion": "gene-batch", "protein_dispersion": "protein-batch"},
        True,
    ),
    "prior": ({}, {"empirical_protein_background_prior": True}, False),
}


def flat(rna, proteins, genes=None, names=None):
    """Flat cells of genes and proteins."""
    rng = np.random.default_rng(0)
    n_cells = rna.shape[0]
    made = {"batch": rng.choice(["a", "b"], n_cells), "donor": rng.choice(["x", "y", "z"], n_cells), "same": "one"}
    made |= {
        "age": rng.normal(size=n_cells),
        "size": rng.uniform(0.5, 2, n_cells),
        "panel": rng.choice([1, 2], n_cells),
    }
    genes = [f"g{i}" for i in range(rna.shape[1])] if genes is None else list(genes)
    names = [f"CD{i}" for i in range(proteins.shape[1])] if names is None else list(names)
    var = pd.DataFrame({MODALITY: ["rna"] * len(genes) + ["protein"] * len(names)}, index=genes + names)
    counts = sparse.hstack([sparse.csr_matrix(rna), sparse.csr_matrix(proteins)], format="csr", dtype=np.float32)
    return anndata.AnnData(counts, obs=pd.DataFrame(made, index=[f"c{i}" for i in range(n_cells)]), var=var)


def stir(module):
    """Norms that are not at their initial values, and weights that tell cells apart as a trained model's do."""
    torch.manual_seed(0)
    for part in module.eval().modules():
        if isinstance(part, torch.nn.BatchNorm1d):
            part.running_mean.normal_(0, 0.2)
            part.running_var.uniform_(0.01, 0.1)
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.Linear) and name.startswith("encoder."):
            part.weight.data *= 0.05 if "var_encoder" in name else 1.5


def save(model, folder, epochs=0):
    with quiet():
        if epochs:
            model.train(epochs, accelerator="cpu", enable_progress_bar=False)
        else:
            stir(model.module)
            model.is_trained_ = True
        model.save(str(folder))
    return model


def made(cells, folder, recipe, arguments, epochs=0):
    """A saved model, as scvi-tools has it, after so many epochs."""
    scvi.settings.seed = 0
    told = Recipe(family="totalvi", **recipe)
    with quiet():
        model = FAMILY.create(FAMILY.setup(cells.copy(), told), arguments, told)
    return save(model, folder, epochs)


def opened(folder, tmp_path):
    """Facts, and the encoder by way of the file that a package holds."""
    saved = read_model_file(folder / "model.pt")
    facts = FAMILY.facts(saved)
    with quiet():  # of a protein that is called like its gene
        template = make_template(facts)
    FAMILY.load(saved, template, "cpu").save(tmp_path / "encoder.safetensors")
    return facts, FAMILY.open(tmp_path / "encoder.safetensors", "cpu")


def assert_parity(found, model, data=None):
    with quiet():
        location, variance = model.get_latent_representation(data, return_dist=True)
    assert found.location.dtype == found.mean.dtype == np.float32
    assert (np.abs(found.location - location) / location.std(axis=0)).max() <= TOLERANCE
    assert np.abs(found.variance / variance - 1).max() <= 1e-4
    assert location.std(axis=0).min() > 1e-3
    return location


@pytest.fixture(scope="module")
def some():
    rng = np.random.default_rng(1)
    return flat(rng.poisson(0.7, (90, N_GENES)), rng.poisson(4, (90, N_PROTEINS)))


@pytest.mark.parametrize("name", MODELS)
def test_latents_over_configurations(some, tmp_path, name):
    recipe, arguments, reads = MODELS[name]
    arguments = {"n_hidden": 12, "n_latent": 4, "empirical_protein_background_prior": False} | arguments
    model = made(some, tmp_path / "saved", recipe, arguments)
    facts, encoder = opened(tmp_path / "saved", tmp_path)
    assert facts.encode_covariates is reads
    assert facts.names == tuple(some.var_names)
    assert facts.span("protein") == slice(N_GENES, N_GENES + N_PROTEINS)
    found = encode_cells(encoder, some.X, some.obs, facts)
    assert_parity(found, model)
    assert (found.mean == found.location).all()


def test_a_latent_on_the_simplex(some, tmp_path):
    """scvi-tools samples there even for the mean; ours is the softmax of the posterior's mean."""
    model = made(
        some,
        tmp_path / "saved",
        {},
        {"latent_distribution": "ln", "n_latent": 4, "empirical_protein_background_prior": False},
    )
    facts, encoder = opened(tmp_path / "saved", tmp_path)
    found = encode_cells(encoder, some.X, some.obs, facts)
    odds = np.exp(assert_parity(found, model))
    assert np.abs(found.mean - odds / odds.sum(1, keepdims=True)).max() <= TOLERANCE


@pytest.mark.parametrize("way", ["table", "array", "named array", "muon", "layers", "panel", "same names"])
def test_layouts_of_strangers(some, tmp_path, way):
    """Every way in which scvi-tools takes proteins: laid out for the template, and read back from the model's data."""
    rna, proteins = some.X[:, :N_GENES], some.X[:, N_GENES:].toarray()
    names = [f"CD{i}" for i in range(N_PROTEINS)]
    genes = [*names[:2], *some.var_names[2:N_GENES]] if way == "same names" else list(some.var_names[:N_GENES])
    data = anndata.AnnData(rna.copy(), obs=some.obs.copy(), var=pd.DataFrame({"symbol": "s"}, index=genes))
    method, told = scvi.model.TOTALVI.setup_anndata, {"batch_key": "batch", "protein_expression_obsm_key": "adt"}
    if way in ("array", "named array"):
        data.obsm["adt"] = proteins
        data.uns["adt_names"] = np.array(names)
        told |= {"protein_names_uns_key": "adt_names"} if way == "named array" else {}
    elif way in ("table", "panel"):
        data.obsm["adt"] = pd.DataFrame(proteins, index=data.obs_names, columns=names)
        told |= {"panel_key": "panel"} if way == "panel" else {}
    else:
        prot = anndata.AnnData(proteins, obs=some.obs[["donor"]].copy(), var=pd.DataFrame(index=names))
        if way == "layers":
            for part in (data, prot):
                part.layers["counts"] = part.X.copy()
                part.X = np.zeros(part.shape, np.float32)
        with quiet():
            data = MuData({"prot": prot, "gex": data})
        method = scvi.model.TOTALVI.setup_mudata
        told = {"batch_key": "batch", "modalities": {"rna_layer": "gex", "protein_layer": "prot", "batch_key": "gex"}}
        told |= dict.fromkeys(["rna_layer", "protein_layer"], "counts") if way == "layers" else {}
    with quiet():
        method(data, **told)
        model = scvi.model.TOTALVI(data, n_latent=4, n_hidden=12, empirical_protein_background_prior=False)
    save(model, tmp_path / "saved")
    facts, encoder = opened(tmp_path / "saved", tmp_path)
    assert facts.names == (*genes, *([str(i) for i in range(N_PROTEINS)] if way == "array" else names))
    assert facts.genes.modality == tuple(some.var[MODALITY])
    assert facts.layer == ("counts" if way == "layers" else "")
    back = FAMILY.flatten(read_model_file(tmp_path / "saved" / "model.pt"), data)
    assert tuple(back.var_names) == facts.names
    assert tuple(back.var[MODALITY]) == facts.genes.modality
    assert (back.X != some.X).nnz == 0
    assert {"batch", "donor", "age"} <= set(back.obs.columns)
    assert list(back.obs["batch"]) == list(some.obs["batch"])
    assert_parity(encode_cells(encoder, back.X, back.obs, facts), model)


def test_data_without_what_the_model_was_trained_on(some, tmp_path):
    data = anndata.AnnData(some.X[:, :N_GENES].copy(), obs=some.obs.copy())
    data.obsm["adt"] = some.X[:, N_GENES:].toarray()
    with quiet():
        scvi.model.TOTALVI.setup_anndata(data, "adt")
        save(scvi.model.TOTALVI(data, empirical_protein_background_prior=False), tmp_path / "saved")
    del data.obsm["adt"]
    assert FAMILY.flatten(read_model_file(tmp_path / "saved" / "model.pt"), data) is None


def test_modalities_with_other_cells(some, tmp_path):
    """Cells that a modality of the data lacks have no counts in it."""
    saved_to = tmp_path / "saved"
    made(some, saved_to, {}, {"empirical_protein_background_prior": False})
    saved = read_model_file(saved_to / "model.pt")
    data = FAMILY.layout(saved, some.copy())
    assert list(data.mod) == ["rna", "protein"]
    with quiet():
        data = MuData({"rna": data["rna"][10:].copy(), "protein": data["protein"][:80][::-1].copy()})
    back = FAMILY.flatten(saved, data)
    assert set(back.obs_names) == set(some.obs_names)
    expected = some.X.toarray()
    expected[:10, :N_GENES] = 0  # c0 to c9
    expected[-10:, N_GENES:] = 0
    assert (back[some.obs_names].X.toarray() == expected).all()


def test_a_minified_file_keeps_its_posteriors(some, tmp_path):
    """scvi-tools empties the counts of one, and has the latents in obsm."""
    model = made(some, tmp_path / "saved", {}, {"n_latent": 4, "empirical_protein_background_prior": False})
    with quiet():
        model.adata.obsm["m"], model.adata.obsm["v"] = model.get_latent_representation(return_dist=True)
        model.minify_mudata(use_latent_qzm_key="m", use_latent_qzv_key="v")
    back = FAMILY.flatten(read_model_file(tmp_path / "saved" / "model.pt"), model.adata)
    assert back.X.nnz == 0
    assert back.uns["_scvi_adata_minify_type"] == "latent_posterior_parameters"
    assert back.obsm["totalvi_latent_qzm"].shape == back.obsm["totalvi_latent_qzv"].shape == (some.n_obs, 4)
    assert tuple(back.var_names) == tuple(some.var_names)


@pytest.fixture(scope="module")
def citeseq(shared_data):
    """PBMC by CITE-seq: 5k cells with 29 proteins, 10k with 14 of them, every eighth gene of both."""
    known, query = (anndata.read_h5ad(shared_data / f"citeseq_pbmc{n}_scvitests.h5ad") for n in ("5k", "10k"))
    genes = known.var_names.intersection(query.var_names)[::8]
    proteins = known.obsm["protein_expression"].columns
    there = query.obsm["protein_expression"].reindex(columns=proteins).fillna(0)
    parts = [(known, known.obsm["protein_expression"]), (query, there)]
    return [flat(cells[:, genes].X, table.to_numpy(), genes, proteins) for cells, table in parts]


@pytest.fixture(scope="module")
def trained(citeseq, tmp_path_factory):
    folder = tmp_path_factory.mktemp("citeseq")
    arguments = {"n_latent": 8, "empirical_protein_background_prior": False}
    return made(citeseq[0], folder / "saved", {"batch_key": "batch"}, arguments, 3), *opened(folder / "saved", folder)


@pytest.mark.parametrize("proteins", ["29", "14", "none"])
def test_train_and_encode_real_cells(citeseq, trained, proteins):
    model, facts, encoder = trained
    query = citeseq[0 if proteins == "29" else 1].copy()
    if proteins == "none":
        query.X = sparse.csr_matrix(query.X.multiply((query.var[MODALITY] == "rna").to_numpy()))
    found = encode_cells(encoder, query.X, query.obs, facts)
    data = FAMILY.setup(query.copy(), Recipe(family="totalvi", batch_key="batch"))
    assert_parity(found, model, data)
    assert encoder.classify(found.location) is None
    assert encoder.gene_influence().shape == (query.n_vars,)


def test_a_cell_does_not_depend_on_its_neighbours(citeseq, trained):
    """Cells are scaled and encoded 1,024 at a time; where they are cut changes the last bits at most."""
    _, facts, encoder = trained
    counts, obs = sparse.vstack([citeseq[0].X] * 6, format="csr"), pd.concat([citeseq[0].obs] * 6)
    together = encode_cells(encoder, counts, obs, facts).mean
    apart = encode_cells(encoder, citeseq[0].X[20:30], citeseq[0].obs[20:30], facts).mean
    assert np.abs(together[1020:1030] - apart).max() <= TOLERANCE * together.std()
    none = encode_cells(encoder, counts[:0], obs[:0], facts)
    assert none.mean.shape == none.variance.shape == (0, 8)


def test_training_needs_both_modalities(some):
    recipe = Recipe(family="totalvi")
    for modality in ("rna", "protein"):
        with pytest.raises(InputError, match="features, and the cells have"):
            FAMILY.setup(some[:, some.var[MODALITY] == modality].copy(), recipe)


@pytest.mark.parametrize("what", ["first layer", "mean", "width", "proteins", "class", "batches", "names"])
def test_strangers_models_that_do_not_add_up(some, tmp_path, what):
    made(some, tmp_path / "saved", {"batch_key": "batch"}, {"n_latent": 4, "empirical_protein_background_prior": False})
    saved = read_model_file(tmp_path / "saved" / "model.pt")
    assert FAMILY.facts(saved).n_latent == 4
    state, registry, names = dict(saved.state_dict), saved.attr_dict["registry_"], saved.var_names
    first = "encoder.encoder.fc_layers.Layer 0.0.weight"
    if what == "first layer":
        del state[first]
    elif what == "mean":
        del state["encoder.z_mean_encoder.weight"]
    elif what == "width":
        state[first] = state[first][:, :-1]
    elif what == "proteins":
        del registry["field_registries"]["proteins"]
    elif what == "class":
        registry["model_name"] = "SCVI"
    elif what == "batches":
        registry["field_registries"]["batch"]["state_registry"]["categorical_mapping"] = np.array(["a", "b", "c"])
    elif what == "names":
        names = {**names, "protein": names["protein"][:-1]}
    with pytest.raises(UnsupportedModelError):
        FAMILY.facts(replace(saved, state_dict=state, var_names=names))


def test_arguments_are_those_that_the_data_leave_open():
    told = FAMILY.arguments()
    assert {"n_hidden", "n_latent", "gene_likelihood", "encode_covariates", "override_missing_proteins"} <= told.keys()
    assert not {"n_input_genes", "n_panel", "panel_key", "n_batch", "adata"} & told.keys()
