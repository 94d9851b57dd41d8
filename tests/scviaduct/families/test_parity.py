"""Latents and labels equal scvi-tools' own on real query cells: 3' chemistries as the reference, 5' as the query.

Tolerance: max |difference| / sd <= 1e-5. Both sum the same float32 products in another order, and folding batch
normalisation into the weights rounds them once more; over 588 genes that leaves 1e-6 of a latent's standard
deviation. Two seeds of the same training differ by 1e-1.

The models are not trained, which takes a second each and moves their norms less than is done here.
"""

from __future__ import annotations

import copy

import anndata
import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from scipy import sparse

from scviaduct.families import Covariates
from scviaduct.families import family as family_of
from scviaduct.families.vae import quiet
from scviaduct.mapping.genes import match_genes
from scviaduct.references.saved.archive import read_model_file
from scviaduct.references.template import make_template
from scviaduct.values import GeneTable

TOLERANCE = 1e-5
UNLABELLED = "unknown"

# Name: arguments of setup_anndata, arguments of the model.
MODELS = {
    "default": ({}, {}),
    "no batches": ({"batch_key": None}, {}),
    "two layers": ({}, {"n_layers": 2}),
    "two layers, deep covariates without any": ({}, {"n_layers": 2, "deeply_inject_covariates": True}),
    "layer norm": ({}, {"use_layer_norm": "both", "use_batch_norm": "none"}),
    "both norms": ({}, {"use_layer_norm": "encoder", "use_batch_norm": "both", "n_layers": 2}),
    "no norm": ({}, {"use_layer_norm": "none", "use_batch_norm": "none"}),
    "raw counts": ({}, {"log_variational": False}),
    "dispersion by batch": ({}, {"dispersion": "gene-batch"}),
    "gene likelihood": ({}, {"gene_likelihood": "nb"}),
    "library size": ({}, {"use_observed_lib_size": False}),
    "size factors": ({"size_factor_key": "size"}, {}),
    "a layer": ({"layer": "counts"}, {}),
    "batches": ({}, {"encode_covariates": True}),
    "batches in two layers": (
        {},
        {"encode_covariates": True, "n_layers": 2, "deeply_inject_covariates": True, "use_layer_norm": "both"},
    ),
    "batches in the first of two layers": (
        {},
        {"encode_covariates": True, "n_layers": 2, "deeply_inject_covariates": False},
    ),
    "batch embedding": ({}, {"encode_covariates": True, "batch_representation": "embedding"}),
    "categories": ({"categorical_covariate_keys": ["donor", "sex"]}, {"encode_covariates": True, "n_layers": 2}),
    "categories without batches": (
        {"batch_key": None, "categorical_covariate_keys": ["donor"]},
        {"encode_covariates": True},
    ),
    "one category": ({"categorical_covariate_keys": ["same"]}, {"encode_covariates": True}),
    "numbers": ({"continuous_covariate_keys": ["age", "bmi"]}, {"encode_covariates": True}),
    "everything": (
        {"categorical_covariate_keys": ["donor", "sex"], "continuous_covariate_keys": ["age", "bmi"]},
        {"encode_covariates": True, "n_layers": 3, "deeply_inject_covariates": True, "dispersion": "gene-batch"},
    ),
    "everything, embedded": (
        {"categorical_covariate_keys": ["donor"], "continuous_covariate_keys": ["age"]},
        {"encode_covariates": True, "n_layers": 2, "batch_representation": "embedding"},
    ),
    "covariates that are not encoded": (
        {"categorical_covariate_keys": ["donor"], "continuous_covariate_keys": ["age"]},
        {"encode_covariates": False, "n_layers": 2},
    ),
}


@pytest.fixture(scope="module")
def pbmc(symphony):
    """The cells of three chemistries, with covariates made up."""
    cells = anndata.read_h5ad(symphony)[:, ::3].copy()
    rng = np.random.default_rng(0)
    cells.obs["donor"] = pd.Categorical(rng.choice(["d1", "d2", "d3"], cells.n_obs))
    cells.obs["sex"] = pd.Categorical(rng.choice(["f", "m"], cells.n_obs))
    cells.obs["same"] = pd.Categorical(["all"] * cells.n_obs)
    cells.obs["age"] = rng.normal(size=cells.n_obs)
    cells.obs["bmi"] = rng.normal(size=cells.n_obs)
    cells.obs["size"] = np.asarray(cells.X.sum(1)).ravel() / 1000
    cells.obs["cell_type"] = cells.obs["cell_type"].astype(str)
    cells.layers["counts"] = cells.X.copy()
    return cells


def split(pbmc, *, known):
    """Reference and query: 5' cells, or where batches must be known, cells that were held out."""
    held = np.arange(pbmc.n_obs) % 4 == 0 if known else (pbmc.obs["assay"] == "10x 5'").to_numpy()
    reference, query = ~held & (pbmc.obs["assay"] != "10x 5'").to_numpy(), held
    if known:
        query &= (pbmc.obs["assay"] != "10x 5'").to_numpy()
    reference, query = pbmc[reference].copy(), pbmc[query].copy()
    for part in (reference, query):
        part.obs["batch"] = part.obs["batch"].cat.remove_unused_categories()
    return reference, query


def stir(module):
    """Norms that are not at their initial values, and weights that tell cells apart as a trained model's do."""
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm1d):
            part.running_mean.normal_(0, 0.2)
            part.running_var.uniform_(0.01, 0.1)
        if isinstance(part, torch.nn.BatchNorm1d | torch.nn.LayerNorm) and part.weight is not None:
            torch.nn.init.normal_(part.weight, 1, 0.2)
            torch.nn.init.normal_(part.bias)
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.Linear) and name.startswith(("z_encoder", "classifier")):
            part.weight.data *= 0.05 if "var_encoder" in name else 2  # exp of it must be a number


def fit(reference, folder, setup, arguments, *, labels=False, linear=False, unlabelled=UNLABELLED):
    """Save an SCVI, or a SCANVI that starts from it."""
    scvi.settings.seed = 0
    with quiet():
        told = {"batch_key": "batch", "labels_key": "cell_type" if labels else None} | setup
        scvi.model.SCVI.setup_anndata(reference, **told)
        model = scvi.model.SCVI(reference, n_hidden=32, n_latent=8, **arguments)
        stir(model.module)
        model.is_trained_ = True
        if labels:
            model = scvi.model.SCANVI.from_scvi_model(model, unlabelled, linear_classifier=linear)
            stir(model.module)
            model.is_trained_ = True
        model.save(str(folder))
    return folder


def carried(query, folder, family):
    """The query in scvi-tools' way: surgery without training, which cannot move what is known."""
    with quiet():
        model = getattr(scvi.model, family).load_query_data(query, str(folder), accelerator="cpu")
    model.is_trained_ = True
    return model


def ours(folder, family, tmp_path):
    """Facts and encoder, by way of the file that a package holds."""
    saved = read_model_file(folder / "model.pt")
    found = family_of(family)
    facts = found.facts(saved)
    made = found.load(saved, make_template(facts), "cpu")
    made.save(tmp_path / "encoder.safetensors")
    return facts, found.open(tmp_path / "encoder.safetensors", "cpu")


def csr(matrix):
    matrix = sparse.csr_matrix(matrix)
    matrix.sort_indices()
    return matrix.indptr.astype(np.int64), matrix.indices.astype(np.int32), matrix.data.astype(np.float32)


def covariates(obs, facts):
    if not facts.encode_covariates:
        return Covariates()

    def codes(column, known):
        return pd.Index(known).get_indexer(obs[column].astype(str)).astype(np.int64)

    batch = codes(facts.batch_key, facts.batch_categories) if facts.batch_key else None
    categories = [codes(column, known) for column, known in facts.categorical_covariates.items()]
    numbers = [obs[column].to_numpy(np.float32) for column in facts.continuous_covariates]
    return Covariates(
        batch,
        np.stack(categories, axis=1) if categories else None,
        np.stack(numbers, axis=1) if numbers else None,
    )


def distance(found, expected):
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    return (np.abs(found - expected) / expected.std(axis=0)).max()


@pytest.mark.parametrize("name", MODELS)
def test_latents_of_scvi(pbmc, tmp_path, name):
    setup, arguments = MODELS[name]
    reference, query = split(pbmc, known=arguments.get("encode_covariates", False))
    fit(reference, tmp_path / "saved", setup, arguments)
    facts, encoder = ours(tmp_path / "saved", "SCVI", tmp_path)
    # A covariate of one category is no input of the encoder, whatever was asked for.
    assert facts.encode_covariates == arguments.get("encode_covariates", False)

    found = encoder.encode(*csr(query.X), covariates(query.obs, facts))
    model = carried(query, tmp_path / "saved", "SCVI")
    with quiet():
        location, variance = model.get_latent_representation(return_dist=True)
        mean = model.get_latent_representation(give_mean=True)
    assert distance(found.mean, mean) <= TOLERANCE
    assert distance(found.location, location) <= TOLERANCE
    assert np.abs(found.variance / variance - 1).max() <= 1e-4


def test_a_latent_on_the_simplex(pbmc, tmp_path):
    """scvi-tools samples there even for the mean; ours is the softmax of the posterior's mean."""
    reference, query = split(pbmc, known=False)
    fit(reference, tmp_path / "saved", {}, {"latent_distribution": "ln"})
    facts, encoder = ours(tmp_path / "saved", "SCVI", tmp_path)
    found = encoder.encode(*csr(query.X), covariates(query.obs, facts))
    with quiet():
        location, _ = carried(query, tmp_path / "saved", "SCVI").get_latent_representation(return_dist=True)
    odds = np.exp(location - location.max(1, keepdims=True))
    assert distance(found.location, location) <= TOLERANCE
    # The rarer shares have the smaller deviations: scvi-tools is 0.8e-5 of them from its own arithmetic in float64, and
    # ours 1.0e-5.
    assert distance(found.mean, odds / odds.sum(1, keepdims=True)) <= 2 * TOLERANCE
    assert found.mean.sum(1) == pytest.approx(1, abs=1e-5)


CLASSIFIERS = {
    "default": ({}, {}, False),
    "linear": ({}, {}, True),
    "two layers, layer norm": ({}, {"n_layers": 2, "use_layer_norm": "both", "use_batch_norm": "none"}, False),
    "batches": ({}, {"encode_covariates": True}, False),
    "categories and numbers": (
        {"categorical_covariate_keys": ["donor"], "continuous_covariate_keys": ["age"]},
        {"encode_covariates": True, "n_layers": 2},
        False,
    ),
}


def in_float64(model):
    """Probabilities of the labels by scvi-tools' own module, in float64."""
    module = copy.deepcopy(model.module).double()
    told = []
    with quiet(), torch.inference_mode():
        for part in model._make_data_loader(model.adata):
            numbers = part.get("extra_continuous_covs")
            logits = module.classify(
                part["X"].double(),
                batch_index=part["batch"],
                cat_covs=part.get("extra_categorical_covs"),
                cont_covs=None if numbers is None else numbers.double(),
            )
            told.append(torch.softmax(logits, dim=-1))
    return torch.cat(told).numpy()


def assert_same_probabilities(found, expected, exact):
    """To the tolerance, or three times scvi-tools' own distance from its arithmetic in float64.

    Rounding of the logits, whose odds go up to e**80 in a classifier that is not trained, is what remains: up to 6.4e-6
    in scvi-tools, and more or less of it on another processor, where its matrix products sum in another order.
    """
    rounding, distance = (np.abs(exact - other).max() for other in (expected, found))
    assert distance <= max(TOLERANCE, 3 * rounding)


def test_an_unlabelled_category_among_the_labels(pbmc, tmp_path):
    """scvi-tools lets it change places with the last label."""
    reference, query = split(pbmc, known=False)
    query.obs["cell_type"] = "MK"
    fit(reference, tmp_path / "saved", {}, {}, labels=True, unlabelled="MK")
    facts, encoder = ours(tmp_path / "saved", "SCANVI", tmp_path)
    model = carried(query, tmp_path / "saved", "SCANVI")
    with quiet():
        soft = model.predict(soft=True)
    found = encoder.classify(encoder.encode(*csr(query.X), Covariates()).location)
    assert list(encoder.labels) == list(facts.labels) == list(soft.columns) != sorted(soft.columns)
    assert_same_probabilities(found, soft.to_numpy(), in_float64(model))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_labels_of_scanvi(pbmc, tmp_path, name):
    setup, arguments, linear = CLASSIFIERS[name]
    reference, query = split(pbmc, known=arguments.get("encode_covariates", False))
    reference.obs.loc[reference.obs_names[::10], "cell_type"] = UNLABELLED
    query.obs["cell_type"] = UNLABELLED
    fit(reference, tmp_path / "saved", setup, arguments, labels=True, linear=linear)
    facts, encoder = ours(tmp_path / "saved", "SCANVI", tmp_path)
    found = encoder.encode(*csr(query.X), covariates(query.obs, facts))
    probabilities = encoder.classify(found.location)

    model = carried(query, tmp_path / "saved", "SCANVI")
    with quiet():
        mean, soft = model.get_latent_representation(give_mean=True), model.predict(soft=True)
    assert distance(found.mean, mean) <= TOLERANCE
    assert list(encoder.labels) == list(facts.labels) == list(soft.columns)
    assert UNLABELLED not in encoder.labels
    assert len(encoder.labels) == reference.obs["cell_type"].nunique() - 1
    assert_same_probabilities(probabilities, soft.to_numpy(), in_float64(model))
    assert [encoder.labels[i] for i in probabilities.argmax(1)] == list(soft.idxmax(axis=1))
    assert soft.idxmax(axis=1).nunique() > 1


@pytest.fixture(scope="module")
def plain(pbmc, tmp_path_factory):
    """A default model: its folder, facts and encoder."""
    folder = tmp_path_factory.mktemp("plain")
    reference, _ = split(pbmc, known=False)
    fit(reference, folder / "saved", {}, {})
    return folder / "saved", *ours(folder / "saved", "SCVI", folder)


@pytest.mark.parametrize("genes", ["permuted", "missing", "more", "all of it"])
def test_genes_of_the_query(pbmc, plain, genes):
    folder, facts, encoder = plain
    _, query = split(pbmc, known=False)
    rng = np.random.default_rng(0)
    if genes in ("missing", "all of it"):
        query = query[:, rng.random(query.n_vars) < 0.7].copy()
    if genes in ("more", "all of it"):
        other = anndata.AnnData(
            sparse.csr_matrix(rng.poisson(1.0, (query.n_obs, 50)).astype(np.float32)),
            obs=query.obs[[]],
            var=pd.DataFrame(index=[f"OTHER{i}" for i in range(50)]),
        )
        query = anndata.concat([query, other], axis=1, merge="first")
    if genes in ("permuted", "all of it"):
        query = query[:, rng.permutation(query.n_vars)].copy()

    target = match_genes(GeneTable({"index": tuple(query.var_names)}), facts.genes).target
    kept = np.flatnonzero(target >= 0)
    into = sparse.csr_matrix((np.ones(len(kept), np.float32), (kept, target[kept])), (query.n_vars, len(facts.genes)))
    found = encoder.encode(*csr(query.X @ into), Covariates())

    with quiet():
        scvi.model.SCVI.prepare_query_anndata(query, str(folder))
        expected = carried(query, folder, "SCVI").get_latent_representation(give_mean=True)
    assert distance(found.mean, expected) <= TOLERANCE


def test_a_cell_does_not_depend_on_its_neighbours(pbmc, plain):
    """Cells are encoded 1,024 at a time; where they are cut changes the last bits at most."""
    _, _, encoder = plain
    together = encoder.encode(*csr(pbmc.X), Covariates()).mean
    assert len(together) > 1024
    apart = np.vstack([encoder.encode(*csr(pbmc.X[i : i + 7]), Covariates()).mean for i in range(1015, 1036, 7)])
    assert distance(together[1015:1036], apart) <= TOLERANCE


def test_read_only_counts_and_no_cells(pbmc, plain):
    _, _, encoder = plain
    parts = csr(pbmc.X[:5])
    for part in parts:
        part.setflags(write=False)
    assert encoder.encode(*parts, Covariates()).mean.shape == (5, 8)
    none = encoder.encode(*csr(pbmc.X[:0]), Covariates())
    assert none.mean.shape == none.location.shape == none.variance.shape == (0, 8)
    assert encoder.classify(none.location) is None
    assert encoder.gene_influence().shape == (pbmc.n_vars,)
    assert (encoder.gene_influence() > 0).all()
