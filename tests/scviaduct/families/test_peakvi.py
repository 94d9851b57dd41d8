"""PEAKVI's latents equal scvi-tools' own, on real chromatin and over its configurations.

Tolerance: max |difference| / sd <= 1e-5. Both sum the same float32 products, in another order; of 40 peaks a cell that
leaves 1e-6 of a latent's standard deviation, and two seeds of a training differ by 1e-1.
"""

from __future__ import annotations

from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from scipy import sparse

from scviaduct.errors import UnsupportedModelError
from scviaduct.families import MODALITY, Recipe, family
from scviaduct.families.vae import quiet
from scviaduct.references.saved.archive import read_model_file
from scviaduct.references.template import encode_cells, make_template

TOLERANCE = 1e-5
FAMILY = family("peakvi")
EVERYTHING = {"batch_key": "batch", "categorical_covariates": ("donor", "same"), "continuous_covariates": ("age",)}
RAW = {"use_layer_norm": "none", "use_batch_norm": "none"}

# Name: of the recipe, arguments of the model, whether the encoder reads covariates.
MODELS = {
    "default": ({"batch_key": "batch"}, {}, False),
    "no batches": ({}, {"encode_covariates": True}, False),
    "batches": ({"batch_key": "batch"}, {"encode_covariates": True}, True),
    "covariates that are not encoded": (EVERYTHING, {}, False),
    "everything": (EVERYTHING, {"encode_covariates": True}, True),
    "everything, deeply": (EVERYTHING, {"encode_covariates": True, "deeply_inject_covariates": True}, True),
    "everything, once": (
        EVERYTHING,
        {"encode_covariates": True, "n_layers_encoder": 3, "extra_encoder_kwargs": {"inject_covariates": False}},
        True,
    ),
    "no norm": ({"batch_key": "batch"}, RAW, False),
    "batch norm": ({"batch_key": "batch"}, {"use_layer_norm": "none", "use_batch_norm": "both"}, False),
    "both norms": ({"batch_key": "batch"}, {"use_batch_norm": "both", "n_layers_encoder": 1}, False),
    "no depth": ({}, {"model_depth": False, "region_factors": False}, False),
}


def peaks(counts, obs=None):
    """Flat cells of peaks."""
    rng = np.random.default_rng(0)
    n_cells, n_peaks = counts.shape
    made = {"batch": rng.choice(["a", "b"], n_cells), "donor": rng.choice(["x", "y", "z"], n_cells), "same": "one"}
    frame = pd.DataFrame(made | {"age": rng.normal(size=n_cells)}, index=[f"c{i}" for i in range(n_cells)])
    var = pd.DataFrame({MODALITY: "atac"}, index=[f"chr1:{i}-{i + 1}" for i in range(n_peaks)])
    return anndata.AnnData(sparse.csr_matrix(counts, dtype=np.float32), obs=frame, var=var)


def stir(module):
    """Norms that are not at their initial values, and weights that tell cells apart as a trained model's do."""
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm1d):
            part.running_mean.normal_(0, 0.2)
            part.running_var.uniform_(0.01, 0.1)
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.Linear) and name.startswith("z_encoder"):
            part.weight.data *= 0.1 if "var_encoder" in name else 2


def made(cells, folder, recipe, arguments, epochs=0):
    """A saved model, as scvi-tools has it, after so many epochs."""
    scvi.settings.seed = 0
    with quiet():
        data = FAMILY.setup(cells.copy(), Recipe(family="peakvi", **recipe))
        model = FAMILY.create(data, arguments, Recipe(family="peakvi"))
        if epochs:
            model.train(epochs, accelerator="cpu", enable_progress_bar=False)
        else:
            stir(model.module.eval())
            model.is_trained_ = True
        model.save(str(folder))
    return model


def opened(folder, tmp_path):
    """Facts, and the encoder by way of the file that a package holds."""
    saved = read_model_file(folder / "model.pt")
    facts = FAMILY.facts(saved)
    FAMILY.load(saved, make_template(facts), "cpu").save(tmp_path / "encoder.safetensors")
    return facts, FAMILY.open(tmp_path / "encoder.safetensors", "cpu")


def assert_parity(found, model, data=None):
    with quiet():
        location, variance = model.get_latent_representation(data, return_dist=True)
    assert found.location.dtype == found.mean.dtype == np.float32
    assert (np.abs(found.location - location) / location.std(axis=0)).max() <= TOLERANCE
    assert np.abs(found.variance / variance - 1).max() <= 1e-4
    return location


@pytest.fixture(scope="module")
def some():
    return peaks(np.random.default_rng(1).poisson(0.7, (90, 40)))


@pytest.mark.parametrize("name", MODELS)
def test_latents_over_configurations(some, tmp_path, name):
    recipe, arguments, reads = MODELS[name]
    model = made(some, tmp_path / "saved", recipe, {"n_hidden": 12, "n_latent": 4} | arguments)
    facts, encoder = opened(tmp_path / "saved", tmp_path)
    assert facts.encode_covariates is reads
    found = encode_cells(encoder, some.X, some.obs, facts)
    location = assert_parity(found, model)
    assert (found.mean == found.location).all()
    assert location.std(axis=0).min() > 1e-3
    assert encoder.classify(found.location) is None


def test_a_latent_on_the_simplex(some, tmp_path):
    """scvi-tools samples there even for the mean; ours is the softmax of the posterior's mean."""
    model = made(some, tmp_path / "saved", {}, {"latent_distribution": "ln", "n_latent": 4})
    facts, encoder = opened(tmp_path / "saved", tmp_path)
    found = encode_cells(encoder, some.X, some.obs, facts)
    odds = np.exp(assert_parity(found, model))
    assert np.abs(found.mean - odds / odds.sum(1, keepdims=True)).max() <= TOLERANCE


def test_a_layer(some, tmp_path):
    """A stranger's model of a layer: flat cells have its counts in X."""
    cells = some.copy()
    cells.layers["fragments"] = cells.X.copy()
    cells.X = np.zeros(cells.shape, np.float32)
    with quiet():
        scvi.model.PEAKVI.setup_anndata(cells, layer="fragments", batch_key="batch")
        model = scvi.model.PEAKVI(cells, n_latent=4)
        stir(model.module.eval())
        model.is_trained_ = True
        model.save(str(tmp_path / "saved"))
    facts, encoder = opened(tmp_path / "saved", tmp_path)
    assert facts.layer == "fragments"
    flat = FAMILY.flatten(read_model_file(tmp_path / "saved" / "model.pt"), cells)
    assert (flat.X != some.X).nnz == 0
    assert_parity(encode_cells(encoder, flat.X, flat.obs, facts), model)


@pytest.fixture(scope="module")
def a549(shared_data):
    """Accessibility of A549 cells by sci-CAR: every 40th peak."""
    cells = anndata.read_h5ad(shared_data / "multiome_a549_scicar_atac_binary.h5ad")[:, ::40].copy()
    return cells[np.asarray(cells.X.sum(1)).ravel() > 0].copy()


def test_train_and_encode_real_cells(a549, tmp_path):
    known, query = peaks(a549.X[:1200]), peaks(a549.X[1200:])
    model = made(known, tmp_path / "saved", {"batch_key": "batch"}, {"n_latent": 8}, epochs=2)
    facts, encoder = opened(tmp_path / "saved", tmp_path)
    assert facts.genes.modality == ("atac",) * a549.n_vars
    assert (facts.latent_sizes, facts.batch_categories) == ({"latent": 8}, ("a", "b"))
    assert_parity(encode_cells(encoder, query.X, query.obs, facts), model, query)
    influence = encoder.gene_influence()
    first = model.module.z_encoder.encoder.fc_layers[0][0].weight.detach().numpy()
    assert np.allclose(influence, np.linalg.norm(first[:, : a549.n_vars], axis=0), rtol=1e-5)


def test_arguments_are_those_that_the_data_leave_open():
    told = FAMILY.arguments()
    assert {"n_hidden", "n_latent", "model_depth", "encode_covariates", "use_layer_norm"} <= told.keys()
    assert not {"n_input_regions", "n_cats_per_cov", "n_batch", "adata", "registry"} & told.keys()


@pytest.mark.parametrize("what", ["first layer", "mean", "width", "features", "class", "batches"])
def test_strangers_models_that_do_not_add_up(some, tmp_path, what):
    made(some, tmp_path / "saved", {"batch_key": "batch"}, {"encode_covariates": True, "n_latent": 4})
    saved = read_model_file(tmp_path / "saved" / "model.pt")
    assert FAMILY.facts(saved).n_latent == 4
    state, registry = dict(saved.state_dict), saved.attr_dict["registry_"]
    first = "z_encoder.encoder.fc_layers.Layer 0.0.weight"
    if what == "first layer":
        del state[first]
    elif what == "mean":
        del state["z_encoder.mean_encoder.weight"]
    elif what == "width":
        state[first] = torch.zeros(6, 41)
    elif what == "class":
        registry["model_name"] = "SCVI"
    elif what == "batches":
        registry["field_registries"]["batch"]["state_registry"]["categorical_mapping"] = np.array(["a", "b", "c"])
    names = [*saved.var_names, "chr2:1-2"] * 2 if what == "features" else saved.var_names
    with pytest.raises(UnsupportedModelError):
        FAMILY.facts(replace(saved, state_dict=state, var_names=names))
