"""ContrastiveVI on real perturbed cells: both latents equal scvi-tools' own, and background cells are chosen right.

Tolerance: max |difference| / sd <= 1e-5, or three times what scvi-tools is itself away from its own arithmetic in
float64. Both sum the same float32 products in another order, and folding batch normalisation into the weights rounds
them once more; over 299 genes and three layers that leaves up to 1e-5 of a latent's standard deviation.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from scvi.external import ContrastiveVI

from scviaduct.errors import InputError, UnsupportedModelError
from scviaduct.families import Recipe, family
from scviaduct.families.contrastivevi import background_cells, background_pairs
from scviaduct.families.vae import quiet
from scviaduct.references.saved.archive import read_model_file
from scviaduct.references.template import encode_cells, make_template

TOLERANCE = 1e-5
FAMILY = family("contrastivevi")
CONTROL = "perturbation=non-targeting"
RECIPE = Recipe(family="ContrastiveVI", background=(CONTROL,), batch_key="batch")

# Name: arguments of setup_anndata, arguments of the model.
MODELS = {
    "default": ({}, {}),
    "no batches": ({"batch_key": None}, {}),
    "one batch": ({"batch_key": "same"}, {}),
    "three layers": ({}, {"n_layers": 3}),
    "three layers without batches": ({"batch_key": None}, {"n_layers": 3}),
    "latents of two sizes": ({}, {"n_background_latent": 5, "n_salient_latent": 3}),
    "library size": ({}, {"use_observed_lib_size": False}),
    "a layer": ({"layer": "counts"}, {}),
    "labels": ({"labels_key": "perturbation"}, {}),
    "covariates that nothing reads": (
        {
            "categorical_covariate_keys": ["guide", "number"],
            "continuous_covariate_keys": ["grna_umi"],
            "size_factor_key": "grna_umi",
        },
        {},
    ),
}


@pytest.fixture(scope="module")
def thp1(shared_data):
    """1,500 of the THP-1 cells, flat: three batches, 27 perturbations."""
    cells = anndata.read_h5ad(shared_data / "perturb_thp1_eccite_sceptre.h5ad")
    rows = np.sort(np.random.default_rng(0).choice(cells.n_obs, 1500, replace=False))
    cells = cells[rows]
    flat = anndata.AnnData(sparse.csr_matrix(cells.X, dtype=np.float32), obs=cells.obs.copy(), var=cells.var[[]].copy())
    flat.var["modality"] = "rna"
    flat.obs["same"] = pd.Categorical(["all"] * flat.n_obs)
    flat.obs["number"] = pd.Categorical(np.arange(flat.n_obs) % 3)
    return flat


def stir(module):
    """Norms that are not at their initial values, and weights that tell cells apart as a trained model's do."""
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm1d):
            part.running_mean.normal_(0, 0.2)
            part.running_var.uniform_(0.1, 1)
            torch.nn.init.normal_(part.weight, 1, 0.2)
            torch.nn.init.normal_(part.bias)


def saved_model(model, folder):
    model.is_trained_ = True
    with quiet():
        model.save(str(folder), save_anndata=False)
    return read_model_file(folder / "model.pt")


def untrained(cells, folder, setup, arguments):
    """A model that scvi-tools saved, and the model."""
    data = cells.copy()
    if setup.get("layer"):
        data.layers[setup["layer"]] = data.X.copy()
        data.X = data.X * 3
    torch.manual_seed(0)
    with quiet():
        ContrastiveVI.setup_anndata(data, **{"batch_key": "batch"} | setup)
        model = ContrastiveVI(data, n_hidden=32, **arguments)
    stir(model.module)
    model.module.eval()  # as training leaves it
    return saved_model(model, folder), model


def carried(saved, path):
    """Facts and encoder, by way of the file that a package holds; the template is all that scvi-tools sees."""
    facts = FAMILY.facts(saved)
    made = FAMILY.load(saved, make_template(facts), "cpu")
    made.save(path)
    return facts, FAMILY.open(path, "cpu")


def own(model, kind):
    with quiet():
        return model.get_latent_representation(representation_kind=kind)


def in_float64(model):
    """Background, salient and the variance of the background by scvi-tools' own module, in float64."""
    module = copy.deepcopy(model.module).double()
    with quiet(), torch.inference_mode():
        loader = model._make_data_loader(model.adata)
        told = [module._generic_inference(part["X"].double(), part["batch"]) for part in loader]
    return (torch.cat([part[name] for part in told]).numpy() for name in ("qz_m", "qs_m", "qz_v"))


def assert_same(found, expected, exact):
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    rounding, distance = ((np.abs(expected - other) / exact.std(axis=0)).max() for other in (exact, found))
    assert distance <= max(TOLERANCE, 3 * rounding)


def assert_parity(facts, encoder, model, cells):
    found = encode_cells(encoder, cells.X, cells.obs, facts)
    background, salient = own(model, "background"), own(model, "salient")
    exact_background, exact_salient, variance = in_float64(model)
    assert encoder.latents == tuple(facts.latent_sizes) == ("background", "salient")
    assert facts.latent_sizes == {"background": background.shape[1], "salient": salient.shape[1]}
    assert encoder.n_latent == facts.n_latent == background.shape[1]
    assert_same(found.mean, background, exact_background)
    assert_same(found.others["salient"], salient, exact_salient)
    np.testing.assert_array_equal(found.location, found.mean)
    np.testing.assert_allclose(found.variance, variance, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_latents(thp1, tmp_path, name):
    cells = thp1[::4].copy()
    setup, arguments = MODELS[name]
    saved, model = untrained(cells, tmp_path / "saved", setup, arguments)
    facts, encoder = carried(saved, tmp_path / "encoder.safetensors")
    batch = setup.get("batch_key", "batch")
    assert facts.batch_key == (batch or "")
    assert facts.encode_covariates == (batch == "batch")
    assert not facts.categorical_covariates
    assert not facts.continuous_covariates
    assert_parity(facts, encoder, model, cells)


@pytest.fixture(scope="module")
def trained(thp1, tmp_path_factory):
    """A ContrastiveVI of three epochs, trained the way that ``scviaduct train`` does, and what it saved."""
    cells = thp1.copy()
    torch.manual_seed(0)
    with quiet():
        data = FAMILY.setup(cells, RECIPE)
        model = FAMILY.create(data, {"n_hidden": 32, "n_salient_latent": 4}, RECIPE)
        model.train(
            max_epochs=3,
            batch_size=64,
            accelerator="cpu",
            devices=1,
            early_stopping=True,
            enable_progress_bar=False,
            **FAMILY.training(data, RECIPE),
        )
    folder = tmp_path_factory.mktemp("contrastivevi")
    saved = saved_model(model, folder / "saved")
    return model, saved, *carried(saved, folder / "encoder.safetensors")


def test_a_trained_model(trained, thp1):
    model, _, facts, encoder = trained
    assert_parity(facts, encoder, model, thp1)
    assert facts.genes.modality == ("rna",) * 299
    assert facts.batch_categories == ("rep_1", "rep_2", "rep_3")
    assert len(model.history["elbo_validation"]) == 3
    assert encoder.gene_influence().shape == (299,)
    assert encoder.classify(np.zeros((1, 10), np.float32)) is None


def test_what_is_chosen_is_what_it_trains_on(thp1):
    """As many steps as the larger part needs: 9 tenths of the targets, 128 at a time."""
    cells = thp1.copy()
    with quiet():
        data = FAMILY.setup(cells, RECIPE)
        told = FAMILY.training(data, RECIPE)
        model = FAMILY.create(data, {"n_hidden": 8}, RECIPE)
        model.train(max_epochs=1, batch_size=128, accelerator="cpu", enable_progress_bar=False, logger=False, **told)
    controls = np.flatnonzero(cells.obs["perturbation"] == "non-targeting").tolist()
    assert told["background_indices"] == controls
    assert sorted(controls + told["target_indices"]) == list(range(1500))
    assert model.trainer.global_step == -(-len(told["target_indices"]) * 9 // 10 // 128)


@pytest.mark.parametrize(
    ("background", "expected"),
    [
        (("drug=none",), [0, 1]),
        (("drug=none", "drug=DMSO"), [0, 1, 2]),
        (("drug=none", "dose=0"), [0, 1, 3]),
        (("drug=a=b",), [4]),
        (("control=True",), [5]),
        (("dose=nan", "drug=none"), None),
    ],
)
def test_background_cells(background, expected):
    obs = pd.DataFrame(
        {
            "drug": pd.Categorical(["none", "none", "DMSO", "x", "a=b", None]),
            "dose": pd.array([1, 2, 3, 0, 4, None], "Int64"),
            "control": [False] * 5 + [True],
        },
        index=list("abcdef"),
    )
    cells = anndata.AnnData(obs=obs)
    recipe = replace(RECIPE, background=background)
    if expected is None:  # a missing value is none
        with pytest.raises(InputError, match=r"no cell has 'nan' in 'dose'.*There are: 0, 1, 2, 3, 4"):
            background_cells(cells, recipe)
    else:
        assert np.flatnonzero(background_cells(cells, recipe)).tolist() == expected


def test_background_pairs():
    assert background_pairs(replace(RECIPE, background=("a=b", "c=d=e"))) == (("a", "b"), ("c", "d=e"))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"background": ()}, r"needs background cells.*--background perturbation=control"),
        ({"background": ("control",)}, r"--background control: it is not a column and a value"),
        ({"background": ("=control",)}, r"=control: it is not a column and a value"),
        ({"background": ("perturbation=",)}, r"perturbation=: it is not a column and a value"),
        ({"background": ("perturbatoin=x",)}, r"no obs column 'perturbatoin'.*There are: perturbation"),
        (
            {"background": (CONTROL, "perturbation=non-targetting")},
            r"--background perturbation=non-targetting: no cell has .*There are: non-targeting",
        ),
        ({"background": ("same=all",)}, r"all 1,500 cells are of the background"),
        ({"background": ("batch=rep_1", "batch=rep_2", "batch=rep_3")}, r"none is left as the target"),
        ({"sample_key": "batch"}, r"--sample-key batch: a ContrastiveVI does not read it"),
        ({"size_factor_key": "grna_umi"}, r"--size-factor-key grna_umi: a ContrastiveVI does not"),
        ({"categorical_covariates": ("guide",)}, r"--categorical-covariates guide: a ContrastiveVI"),
        ({"continuous_covariates": ("grna_umi",)}, r"--continuous-covariates grna_umi: a ContrastiveVI"),
    ],
)
def test_what_is_asked_is_checked_before_training(thp1, changed, reason):
    with pytest.raises(InputError, match=reason):
        FAMILY.setup(thp1.copy(), replace(RECIPE, **changed))


def registry(saved, **changed):
    return replace(saved, attr_dict=saved.attr_dict | {"registry_": saved.attr_dict["registry_"] | changed})


def weights(saved, **changed):
    state = {key: tensor for key, tensor in saved.state_dict.items() if changed.get(key, 0) is not None}
    return replace(saved, state_dict=state | {key: told for key, told in changed.items() if told is not None})


FIRST = "encoder.encoder.fc_layers.Layer 0.0.weight"
MEAN = "encoder.mean_encoder.weight"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: registry(s, model_name="SCVI"), r"says it is a SCVI, not a ContrastiveVI"),
        (lambda s: registry(s, setup_method_name="setup_mudata"), r"set up .*by 'setup_mudata'"),
        (lambda s: registry(s, field_registries={}), r"is 32 x 302, and should be any x 299"),
        (lambda s: replace(s, var_names=s.var_names[:-1]), r"is 32 x 302, and should be any x 301"),
        (lambda s: weights(s, **{f"s_{FIRST}": None}), r"'s_encoder.*' is missing, and should be any x 302"),
        (lambda s: weights(s, **{f"z_{FIRST}": torch.zeros(32)}), r"z_encoder"),
        (lambda s: weights(s, **{f"s_{MEAN}": None}), r"'s_encoder\.mean_encoder\.weight' is missing"),
        (lambda s: weights(s, **{f"z_{MEAN}": None}), r"'z_encoder\.mean_encoder\.weight' is missing"),
    ],
)  # fmt: skip
def test_what_does_not_add_up_is_refused(trained, change, reason):
    _, saved, *_ = trained
    with pytest.raises(UnsupportedModelError, match=reason):
        FAMILY.facts(change(saved))


def test_weights_that_scvi_tools_cannot_load_are_refused(trained):
    _, saved, facts, _ = trained
    broken = weights(saved, **{"s_encoder.var_encoder.weight": torch.zeros(5, 32)})
    with pytest.raises(UnsupportedModelError, match=r"weights do not fit the network .*: 's_encoder"):
        FAMILY.load(broken, make_template(facts), "cpu")


def test_arguments():
    arguments = FAMILY.arguments()
    assert arguments["n_background_latent"] == arguments["n_salient_latent"] == 10
    assert "wasserstein_penalty" in arguments
    assert not {"adata", "n_input", "n_batch", "background_indices"} & arguments.keys()
