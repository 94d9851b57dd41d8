"""MRVI on real perturbed cells: both latents equal scvi-tools' own, whatever the model is built of.

Tolerance: max |difference| / sd <= 1e-5, or three times what scvi-tools is itself away from its own arithmetic in
float64. Both sum the same float32 products, in another order, and layer norms enlarge what that leaves: up to 1.0e-5 of
a latent's standard deviation on either side for the models of the grid, and 1e-4 for one of two epochs, whose latents
lie 360 standard deviations from zero.

The models of the grid are not trained, but moved off their initial values.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from scvi.external import MRVI

from scviaduct.errors import InputError, PackageError, UnsupportedModelError
from scviaduct.families import Covariates, Recipe, family
from scviaduct.families.vae import quiet
from scviaduct.references.saved.archive import read_model_file
from scviaduct.references.template import encode_cells, encode_template, make_template

TOLERANCE = 1e-5
FAMILY = family("mrvi")
RECIPE = Recipe(family="MRVI", sample_key="perturbation", batch_key="batch")

# Name: arguments of setup_anndata, arguments of the model.
MODELS = {
    "default": ({}, {}),
    "no batches": ({"batch_key": None}, {}),
    "labels": ({"labels_key": "batch"}, {}),
    "a layer": ({"layer": "counts"}, {}),
    "samples are batches": ({"sample_key": "batch"}, {}),
    "one sample": ({"sample_key": None}, {}),
    "latents of one size": ({}, {"n_latent": 7, "n_latent_u": 7}),
    "residual blocks without a match": ({}, {"encoder_n_hidden": 128, "encoder_n_layers": 1}),
    "three residual blocks": ({}, {"encoder_n_layers": 3}),
    "z with a posterior": ({}, {"qz_kwargs": {"use_map": False}}),
    "z with a posterior, of the size of u": ({}, {"n_latent": 7, "n_latent_u": 7, "qz_kwargs": {"use_map": False}}),
    "another attention": (
        {},
        {"qz_kwargs": {"n_latent_sample": 8, "n_channels": 3, "n_heads": 5, "n_layers": 2, "n_hidden": 16}},
    ),
    "attention in blocks of 128": ({}, {"qz_kwargs": {"n_latent_sample": 16, "n_channels": 8, "n_hidden": 128}}),
    "activations near the norms' epsilon": ({}, {"encoder_n_layers": 1}),
    "weights by sample": ({}, {"scale_observations": True, "learn_z_u_prior_scale": True}),
}


@pytest.fixture(scope="module")
def thp1(shared_data):
    """1,500 of the THP-1 cells, flat: three batches, 27 perturbations."""
    cells = anndata.read_h5ad(shared_data / "perturb_thp1_eccite_sceptre.h5ad")
    rows = np.sort(np.random.default_rng(0).choice(cells.n_obs, 1500, replace=False))
    cells = cells[rows]
    flat = anndata.AnnData(sparse.csr_matrix(cells.X, dtype=np.float32), obs=cells.obs.copy(), var=cells.var[[]].copy())
    flat.var["modality"] = "rna"
    return flat


def stir(module, gain):
    """Weights that tell cells and samples apart, as a trained model's do."""
    torch.manual_seed(1)
    for name, parameter in module.named_parameters():
        if "norm" in name or "embed" in name:
            parameter.data += torch.randn_like(parameter) * 0.3
    linear = [part for half in (module.qu, module.qz) for part in half.modules() if isinstance(part, torch.nn.Linear)]
    for parameter in (parameter for part in linear for parameter in part.parameters()):
        parameter.data *= gain


def saved_model(model, folder):
    model.is_trained_ = True
    with quiet():
        model.save(str(folder), save_anndata=False)
    return read_model_file(folder / "model.pt")


def untrained(cells, folder, setup, arguments, gain=1.5):
    """A model that scvi-tools saved, and the model."""
    data = cells.copy()
    if setup.get("layer"):
        data.layers[setup["layer"]] = data.X.copy()
        data.X = data.X * 3
    torch.manual_seed(0)
    with quiet():
        MRVI.setup_anndata(data, **{"sample_key": "perturbation", "batch_key": "batch"} | setup)
        model = MRVI(data, **{"encoder_n_hidden": 32} | arguments)
    stir(model.module, gain)
    model.module.eval()  # as training leaves it
    return saved_model(model, folder), model


def carried(saved, path):
    """Facts and encoder, by way of the file that a package holds; the template is all that scvi-tools sees."""
    facts = FAMILY.facts(saved)
    with quiet():
        made = FAMILY.load(saved, make_template(facts), "cpu")
    made.save(path)
    return facts, FAMILY.open(path, "cpu")


def own(model):
    """What scvi-tools makes of the model's own cells."""
    with quiet():
        return model.get_latent_representation(), model.get_latent_representation(give_z=True)


def in_float64(model):
    """``u``, ``z`` and the variance of ``u`` by scvi-tools' own module, in float64."""
    module = copy.deepcopy(model.module).double()
    found = []
    with quiet(), torch.inference_mode():
        for tensors in model._make_data_loader(model.adata):
            inputs = module._get_inference_input(tensors)
            told = module.inference(inputs["x"].double(), inputs["sample_index"], use_mean=True)
            found.append((told["u"], told["z"], told["qu"].variance))
    return (torch.cat(parts).numpy() for parts in zip(*found, strict=True))


def assert_same(found, expected, exact):
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    rounding, distance = ((np.abs(expected - other) / exact.std(axis=0)).max() for other in (exact, found))
    assert distance <= max(TOLERANCE, 3 * rounding)


@pytest.mark.parametrize("name", MODELS)
def test_latents(thp1, tmp_path, name):
    cells = thp1[::4].copy()
    setup, arguments = MODELS[name]
    gain = 0.01 if "epsilon" in name else 1.5
    saved, model = untrained(cells, tmp_path / "saved", setup, arguments, gain)
    facts, encoder = carried(saved, tmp_path / "encoder.safetensors")
    assert facts.encode_covariates
    assert facts.encoded_batch == ""
    assert facts.encoded_sample == (setup.get("sample_key", "perturbation") or "")

    u, z = own(model)
    found = encode_cells(encoder, cells.X, cells.obs, facts)
    assert encoder.latents == tuple(facts.latent_sizes) == ("u", "z")
    assert facts.latent_sizes == {"u": u.shape[1], "z": z.shape[1]}
    assert encoder.n_latent == facts.n_latent == u.shape[1]
    exact_u, exact_z, variance = in_float64(model)
    assert_same(found.mean, u, exact_u)
    assert_same(found.others["z"], z, exact_z)
    np.testing.assert_allclose(found.variance, variance, rtol=1e-5)
    np.testing.assert_array_equal(found.location, found.mean)


@pytest.fixture(scope="module")
def trained(thp1, tmp_path_factory):
    """An MRVI of two epochs, trained the way that ``scviaduct train`` does, and what it saved."""
    cells = thp1.copy()
    torch.manual_seed(0)
    with quiet():
        data = FAMILY.setup(cells, RECIPE)
        model = FAMILY.create(data, {"encoder_n_hidden": 32}, RECIPE)
        model.train(
            max_epochs=2,
            batch_size=256,
            accelerator="cpu",
            devices=1,
            early_stopping=True,
            enable_progress_bar=False,
            logger=False,
            **FAMILY.training(data, RECIPE),
        )
    folder = tmp_path_factory.mktemp("mrvi")
    saved = saved_model(model, folder / "saved")
    return model, saved, *carried(saved, folder / "encoder.safetensors")


def test_a_trained_model(trained, thp1):
    model, _, facts, encoder = trained
    found = encode_cells(encoder, thp1.X, thp1.obs, facts)
    *exact, _ = in_float64(model)
    for ours, theirs, told in zip((found.mean, found.others["z"]), own(model), exact, strict=True):
        assert_same(ours, theirs, told)
    assert facts.sample_key == "perturbation"
    assert len(facts.sample_categories) == 27  # more than the template has cells
    assert facts.batch_categories == ("rep_1", "rep_2", "rep_3")
    influence = encoder.gene_influence()
    np.testing.assert_allclose(influence, torch.linalg.norm(model.module.qu.fc1.weight, dim=0).detach(), rtol=1e-5)
    assert encoder.classify(found.location) is None


def test_the_template_decides_nothing(trained):
    """scvi-tools counts the cells of each sample anew in whatever it is given; none of it is kept."""
    _, saved, facts, encoder = trained
    template = make_template(facts)
    other = template[::-1].copy()[:5].copy()
    other.X = other.X * 0
    with quiet():
        again = FAMILY.load(saved, other, "cpu")
    expected, found = (encode_template(one, template, facts) for one in (encoder, again))
    np.testing.assert_array_equal(found, expected)
    assert found.shape == (16, 40)


def test_a_latent_depends_on_the_sample_and_not_on_other_cells(trained, thp1):
    _, _, facts, encoder = trained
    cells = thp1[:1200]  # more than are encoded at a time
    whole = encode_cells(encoder, cells.X, cells.obs, facts)
    np.testing.assert_array_equal(encode_cells(encoder, cells.X, cells.obs, facts).mean, whole.mean)
    alone = encode_cells(encoder, cells.X[1100:1103], cells.obs.iloc[1100:1103], facts)
    np.testing.assert_allclose(alone.others["z"], whole.others["z"][1100:1103], atol=1e-5)

    moved = cells.obs.copy()
    moved["perturbation"] = "non-targeting"
    changed = (cells.obs["perturbation"] != "non-targeting").to_numpy()
    other = encode_cells(encoder, cells.X, moved, facts)
    for before, after in ((whole.mean, other.mean), (whole.others["z"], other.others["z"])):
        differs = np.abs(before - after).max(axis=1) > 1e-4
        assert differs[changed].all()
        assert not differs[~changed].any()


def test_no_cells(trained):
    _, _, _, encoder = trained
    none = np.zeros(0, np.int64)
    found = encoder.encode(
        np.zeros(1, np.int64), none.astype(np.int32), none.astype(np.float32), Covariates(sample=none)
    )
    assert found.mean.shape == found.variance.shape == (0, 10)
    assert found.others["z"].shape == (0, 30)


def test_samples_that_are_not_given(trained):
    _, _, _, encoder = trained
    with pytest.raises(InputError, match=r"MRVI of 27 samples reads the sample of every cell, and none was given"):
        encoder.encode(np.zeros(2, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32), Covariates())


def test_categories_that_are_numbers(thp1, tmp_path):
    """Samples and batches that were registered as numbers are text everywhere else."""
    cells = thp1[:300].copy()
    cells.obs["donor"] = pd.Categorical(np.arange(300) % 3)
    cells.obs["run"] = pd.Categorical(np.arange(300) % 2)
    saved, model = untrained(cells, tmp_path / "saved", {"sample_key": "donor", "batch_key": "run"}, {})
    facts, encoder = carried(saved, tmp_path / "encoder.safetensors")
    assert facts.sample_categories == ("0", "1", "2")
    z = encode_cells(encoder, cells.X, cells.obs, facts).others["z"]
    np.testing.assert_allclose(z, own(model)[1], atol=1e-5)


def test_reading_needs_no_scvi_tools(trained, tmp_path):
    *_, encoder = trained
    encoder.save(tmp_path / "e.safetensors")
    encoder.save(tmp_path / "again.safetensors")
    assert (tmp_path / "e.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    code = (
        "import sys; from pathlib import Path; import scviaduct.families as f;"
        f"f.family('MRVI').open(Path({str(tmp_path / 'e.safetensors')!r}), 'cpu');"
        "sys.exit(bool({'scvi', 'scviaduct.references.saved.archive'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def registry(saved, **changed):
    return replace(saved, attr_dict=saved.attr_dict | {"registry_": saved.attr_dict["registry_"] | changed})


def weights(saved, **changed):
    state = {key: tensor for key, tensor in saved.state_dict.items() if changed.get(key, 0) is not None}
    return replace(saved, state_dict=state | {key: told for key, told in changed.items() if told is not None})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: registry(s, model_name="SCVI"), r"says it is a SCVI, not a MRVI"),
        (lambda s: registry(s, model_name="JaxMRVI"), r"JaxMRVI was saved .* as a model of JAX.*Train it again"),
        (lambda s: registry(s, scvi_version="1.2.0"), r"MRVI was saved by scvi-tools 1\.2\.0 as a model of JAX"),
        (
            lambda s: registry(
                weights(s, **{"qz.attention_block.attention.in_proj_weight": torch.zeros(24, 8)}),
                model_name="TorchMRVI", scvi_version="1.4.2",
            ),
            r"TorchMRVI was saved by scvi-tools 1\.4\.2, whose attention .* is built otherwise",
        ),
        (lambda s: registry(s, setup_method_name="setup_mudata"), r"set up .*by 'setup_mudata'"),
        (lambda s: replace(s, attr_dict={}), r"says it is a None"),
        (lambda s: replace(s, var_names={"rna": s.var_names}), r"several modalities"),
        (lambda s: replace(s, var_names=s.var_names[:-1]), r"'qu\.fc1\.weight' is 32 x 299, and should be any x 298"),
        (lambda s: weights(s, **{"qu.fc1.weight": None}), r"'qu\.fc1\.weight' is missing"),
        (lambda s: weights(s, **{"qz.embedding.weight": torch.zeros(26, 16)}), r"is 26 x 16, and should be 27 x any"),
        (lambda s: weights(s, **{"qu.sample_embed.weight": torch.zeros(27, 31)}), r"is 27 x 31, .* be 27 x 32"),
        (
            lambda s: weights(s, **{"qu.conditional_norm2.beta_embedding.weight": torch.zeros(32)}),
            r"beta_embedding\.weight' is 32, and should be 27 x 32",
        ),
        (lambda s: weights(s, **{"qz.fc.weight": torch.zeros(29, 10)}), r"mlp_residual\.fc\.weight' is 30 x 32"),
        (lambda s: weights(s, **{"qz.fc.weight": None}), r"mlp_residual\.fc\.weight' is 30 x 32, .* be 10 x any"),
    ],
)  # fmt: skip
def test_what_does_not_add_up_is_refused(trained, change, reason):
    _, saved, *_ = trained
    with pytest.raises(UnsupportedModelError, match=reason):
        FAMILY.facts(change(saved))


def test_an_activation_without_a_name_is_refused(thp1, tmp_path):
    data = thp1[:100].copy()
    with quiet():
        MRVI.setup_anndata(data, sample_key="perturbation")
        model = MRVI(data, qu_kwargs={"activation": torch.nn.functional.relu})
    with pytest.raises(UnsupportedModelError, match=r"activates with .*relu"):
        FAMILY.fold(model, None, "cpu")


def test_the_class_name_between_the_two_is_read(trained):
    _, saved, facts, _ = trained
    assert FAMILY.facts(registry(saved, model_name="TorchMRVI")) == facts


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"sample_key": None}, r"MRVI compares samples.*--sample-key donor"),
        ({"sample_key": "perturbations"}, r"no obs column 'perturbations'.*There are: perturbation"),
        ({"sample_key": "partly"}, r"--sample-key partly: 1 of 1,500 cells have no value"),
        ({"sample_key": "same"}, r"all cells are of the sample 'x'.*train an SCVI"),
        ({"size_factor_key": "grna_umi"}, r"--size-factor-key grna_umi: a MRVI does not read it"),
        ({"categorical_covariates": ("guide", "batch")}, r"--categorical-covariates guide, batch: a MRVI"),
        ({"continuous_covariates": ("grna_umi",)}, r"--continuous-covariates grna_umi: a MRVI"),
        ({"background": ("perturbation=x",)}, r"--background perturbation=x: a MRVI does not read it"),
    ],
)
def test_what_is_asked_is_checked_before_training(thp1, changed, reason):
    cells = thp1.copy()
    cells.obs["same"] = "x"
    cells.obs["partly"] = ["x", None] + ["y"] * 1498
    with pytest.raises(InputError, match=reason):
        FAMILY.setup(cells, replace(RECIPE, **changed))


def test_arguments_are_those_that_scvi_tools_can_train():
    arguments = FAMILY.arguments()
    assert arguments["n_latent_u"] == 10
    assert arguments["encoder_n_layers"] == 2
    assert arguments["qz_kwargs"] is None
    assert not {"n_input", "n_sample", "n_batch", "n_obs_per_sample", "u_prior_mixture"} & arguments.keys()


def test_scvi_tools_cannot_train_without_the_mixture(thp1):
    """Why ``u_prior_mixture`` is not offered; offer it once this fails."""
    data = thp1[:200].copy()
    with quiet():
        MRVI.setup_anndata(data, sample_key="perturbation")
        model = MRVI(data, u_prior_mixture=False)
        with pytest.raises(TypeError, match="must be Tensor"):
            model.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False, logger=False)


def test_why_there_is_no_surgery(trained, thp1, tmp_path):
    """scvi-tools' own has nothing to train; use it once this fails."""
    model, *_ = trained
    query = thp1[:60].copy()
    query.obs["perturbation"] = "new"
    with quiet():
        model.save(str(tmp_path / "saved"), save_anndata=False)
        found = MRVI.load_query_data(query, str(tmp_path / "saved"), accelerator="cpu")
    assert not [name for name, parameter in found.module.named_parameters() if parameter.requires_grad]


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "e.safetensors").write_bytes(b"")
    with pytest.raises(PackageError, match=r"holds no encoder"):
        FAMILY.open(tmp_path / "e.safetensors", "cpu")
