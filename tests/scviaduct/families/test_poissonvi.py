"""POISSONVI, the family that docs/extending.md adds: its module is the documented one, and does what is said there.

Tolerance: max |difference| / sd <= 1e-5. Both sum the same float32 products, in another order; that leaves 1e-6 of a
latent's standard deviation, and two seeds of a training differ by 1e-1.
"""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from scipy import sparse

from scviaduct.errors import InputError, UnsupportedModelError
from scviaduct.families import MODALITY, Recipe, families, family, poissonvi
from scviaduct.families.vae import quiet
from scviaduct.references.saved.archive import read_model_file
from scviaduct.references.template import encode_cells, make_template

TOLERANCE = 1e-5
FAMILY = family("poissonvi")
PAGE = Path(__file__).parents[3] / "docs" / "extending.md"
EVERYTHING = {"batch_key": "batch", "categorical_covariates": ("donor",), "continuous_covariates": ("age",)}
ENCODED = {"encode_covariates": True}

# Name: of the recipe, arguments of the model, whether the encoder reads covariates.
MODELS = {
    "default": ({"batch_key": "batch"}, {}, False),
    "no batches": ({}, ENCODED, False),
    "batches": ({"batch_key": "batch"}, ENCODED, True),
    "everything": (EVERYTHING, ENCODED | {"n_layers": 3}, True),
    "once": (EVERYTHING, ENCODED | {"deeply_inject_covariates": False}, True),
    "batch embedding": (EVERYTHING, ENCODED | {"batch_representation": "embedding"}, True),
    "raw counts": ({}, {"log_variational": False}, False),
    "size factors": ({"size_factor_key": "size"}, {}, False),
    "library size": ({"batch_key": "batch"}, {"use_observed_lib_size": False}, False),
}


def peaks(counts):
    """Flat cells of peaks."""
    rng = np.random.default_rng(0)
    n_cells, n_peaks = counts.shape
    made = {"batch": rng.choice(["a", "b"], n_cells), "donor": rng.choice(["x", "y", "z"], n_cells)}
    made |= {"age": rng.normal(size=n_cells), "size": rng.uniform(0.5, 2, n_cells)}
    var = pd.DataFrame({MODALITY: "atac"}, index=[f"chr1:{i}-{i + 1}" for i in range(n_peaks)])
    obs = pd.DataFrame(made, index=[f"c{i}" for i in range(n_cells)])
    return anndata.AnnData(sparse.csr_matrix(counts, dtype=np.float32), obs=obs, var=var)


def made(cells, folder, recipe, arguments, epochs=0):
    """A saved model, as scvi-tools has it, after so many epochs."""
    scvi.settings.seed = 0
    told = Recipe(family="poissonvi", **recipe)
    with quiet():
        model = FAMILY.create(FAMILY.setup(cells.copy(), told), arguments, told)
        if epochs:
            model.train(epochs, accelerator="cpu", enable_progress_bar=False)
        model.module.eval()
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
    assert (np.abs(found.location - location) / location.std(axis=0)).max() <= TOLERANCE
    assert np.abs(found.variance / variance - 1).max() <= 1e-4
    return location


@pytest.fixture(scope="module")
def some():
    return peaks(np.random.default_rng(1).poisson(0.7, (120, 40)))


@pytest.fixture(scope="module")
def a549(shared_data):
    """Accessibility of A549 cells by sci-CAR: every 40th peak."""
    cells = anndata.read_h5ad(shared_data / "multiome_a549_scicar_atac_binary.h5ad")
    counts = cells.X[:, ::40]
    return peaks(counts[np.asarray(counts.sum(1)).ravel() > 0])


def documented():
    """Code of the page's section on families."""
    section = PAGE.read_text().split("\n## A family\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def test_the_documented_module_is_this_one():
    source = Path(poissonvi.__file__).read_text()
    blocks = documented()
    assert len(blocks) >= 6
    # Methods are printed without the class's indentation.
    missing = [block for block in blocks if block not in source and textwrap.indent(block, "    ") not in source]
    assert missing == []
    methods = {name for name, value in vars(type(FAMILY)).items() if callable(value) and name != "__init__"}
    assert methods == {name for block in blocks for name in re.findall(r"def (\w+)", block)}


def test_the_documented_module_is_found_trained_and_folded(a549, tmp_path):
    assert families()["POISSONVI"] is poissonvi.FAMILY
    known, query = a549[:1200].copy(), a549[1200:].copy()
    model = made(known, tmp_path / "saved", {"batch_key": "batch"}, {"n_latent": 8}, epochs=2)
    facts, encoder = opened(tmp_path / "saved", tmp_path)
    assert facts.genes.modality == ("atac",) * a549.n_vars
    assert (facts.latent_sizes, facts.batch_categories) == ({"latent": 8}, ("a", "b"))
    found = encode_cells(encoder, query.X, query.obs, facts)
    assert_parity(found, model, query)
    assert found.mean.std(axis=0).min() > 1e-2
    assert encoder.gene_influence().shape == (a549.n_vars,)


@pytest.mark.parametrize("name", MODELS)
def test_latents_over_configurations(some, tmp_path, name):
    recipe, arguments, reads = MODELS[name]
    model = made(some, tmp_path / "saved", recipe, {"n_hidden": 12, "n_latent": 4} | arguments)
    facts, encoder = opened(tmp_path / "saved", tmp_path)
    assert facts.encode_covariates is reads
    found = encode_cells(encoder, some.X, some.obs, facts)
    assert_parity(found, model)
    assert (found.mean == found.location).all()


def test_a_latent_on_the_simplex(some, tmp_path):
    """scvi-tools samples there even for the mean; ours is the softmax of the posterior's mean."""
    model = made(some, tmp_path / "saved", {}, {"latent_distribution": "ln", "n_latent": 4})
    facts, encoder = opened(tmp_path / "saved", tmp_path)
    found = encode_cells(encoder, some.X, some.obs, facts)
    odds = np.exp(assert_parity(found, model))
    assert np.abs(found.mean - odds / odds.sum(1, keepdims=True)).max() <= TOLERANCE


def test_a_worker_opens_it_without_scvi_tools(some, tmp_path):
    """Nor do the modules of the other families import it, or what reads training data."""
    made(some, tmp_path / "saved", {}, {"n_latent": 4})
    opened(tmp_path / "saved", tmp_path)
    code = f"""
        import sys
        from pathlib import Path
        from scviaduct.families import family
        print(family("poissonvi").open(Path({str(tmp_path / "encoder.safetensors")!r}), "cpu").n_latent)
        print(sorted({{"scvi", "lightning", "mudata", "anndata"}} & set(sys.modules)))
        """
    told = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert told.stdout.split("\n")[:2] == ["4", "[]"], told.stderr


def test_training_needs_a_hundred_cells(some):
    with pytest.raises(InputError, match="needs 100 cells, and there are 99"):
        FAMILY.setup(some[:99].copy(), Recipe(family="poissonvi"))


def test_arguments_are_those_that_the_class_leaves_open():
    told = FAMILY.arguments()
    assert {"n_hidden", "n_latent", "n_layers", "encode_covariates", "batch_representation"} <= told.keys()
    assert not {"gene_likelihood", "use_batch_norm", "dispersion", "n_cats_per_cov", "adata"} & told.keys()


@pytest.mark.parametrize("what", ["first layer", "features", "class"])
def test_strangers_models_that_do_not_add_up(some, tmp_path, what):
    made(some, tmp_path / "saved", {"batch_key": "batch"}, {"n_latent": 4})
    saved = read_model_file(tmp_path / "saved" / "model.pt")
    assert FAMILY.facts(saved).n_latent == 4
    state, names = dict(saved.state_dict), list(saved.var_names)
    if what == "first layer":
        state["z_encoder.encoder.fc_layers.Layer 0.0.weight"] = torch.zeros(6, 39)
    elif what == "features":
        names += names
    elif what == "class":
        saved.attr_dict["registry_"]["model_name"] = "PEAKVI"
    with pytest.raises(UnsupportedModelError):
        FAMILY.facts(replace(saved, state_dict=state, var_names=names))
