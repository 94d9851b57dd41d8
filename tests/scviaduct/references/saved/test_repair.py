"""Saved models of other days: each repair undoes what a current file says, or keeps what the old version gave."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from scipy import sparse

from scviaduct.errors import PackageError, UnsupportedModelError
from scviaduct.families import families
from scviaduct.families.vae import instantiate, quiet
from scviaduct.references.saved.archive import read_model_file
from scviaduct.references.saved.portable import to_scvi_file, write_model
from scviaduct.references.saved.repair import read_saved, repair
from scviaduct.references.saved.weights import check_shapes, check_weights
from tests.scviaduct.references.saved.seven import CLASSES, latent_of, model_of, save_small, set_up
from tests.scviaduct.references.saved.test_portable import same


@pytest.fixture(scope="module")
def current(tmp_path_factory):
    folder = tmp_path_factory.mktemp("current")
    return {name: read_model_file(save_small(name, folder / name) / "model.pt") for name in CLASSES}


def changed(saved, change):
    """A copy of a model with its attributes changed in place."""
    attributes = copy.deepcopy(saved.attr_dict)
    change(attributes)
    return replace(saved, attr_dict=attributes)


def registry_without(*keys):
    def change(attributes):
        for key in keys:
            del attributes["registry_"][key]

    return change


# --- nothing to mend -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_a_model_of_today_is_left_as_it_is(current, name):
    found, repairs = repair(current[name])
    assert repairs == ()
    assert same(dict(found.state_dict), current[name].state_dict)
    kept = {key: value for key, value in current[name].attr_dict.items() if key != "history_"}
    assert same({key: found.attr_dict[key] for key in kept}, kept)


def test_what_is_given_is_not_changed(current):
    old = changed(current["SCVI"], registry_without("setup_method_name", "model_name"))
    before = copy.deepcopy(old.attr_dict["registry_"])
    assert len(repair(old)[1]) == 2
    assert same(old.attr_dict["registry_"], before)


# --- what a registry lacked ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("keys", [("setup_method_name",), ("model_name",), ("setup_method_name", "model_name")])
def test_a_registry_is_completed(current, name, keys):
    found, repairs = repair(changed(current[name], registry_without(*keys)))
    registry, expected = found.attr_dict["registry_"], current[name].attr_dict["registry_"]
    assert len(repairs) == len(keys)
    assert same({key: registry[key] for key in expected}, dict(expected))


def test_the_hub_says_what_the_model_does_not(current):
    old = changed(current["SCVI"], registry_without("model_name", "scvi_version"))
    found, repairs = repair(old, {"model_cls_name": "SCVI", "scvi_version": "0.20.3"})
    assert found.attr_dict["registry_"]["scvi_version"] == "0.20.3"
    assert repairs[-1] == "The registry did not name the version that saved the model: scvi-hub says 0.20.3."
    with pytest.raises(UnsupportedModelError, match="which scvi-tools saved it"):
        repair(old)
    with pytest.raises(UnsupportedModelError, match="says it is a SCANVI, and its weights lack 'classifier'"):
        repair(old, {"model_cls_name": "SCANVI"})


def to_setup(attributes, *, also=""):
    """The unlabelled category lay in the registry of the labels, on the model, or among its arguments."""
    setup, labels = attributes["registry_"]["setup_args"], attributes["registry_"]["field_registries"]["labels"]
    del setup["unlabeled_category"], setup["labels_key"]
    if also:
        del labels["state_registry"]["unlabeled_category"]
        del attributes["unlabeled_category_"]
        attributes["init_params_"]["non_kwargs"]["unlabeled_category"] = "unknown"


@pytest.mark.parametrize("also", ["", "arguments"])
def test_the_unlabelled_category_is_found(current, also):
    found, repairs = repair(changed(current["SCANVI"], lambda attributes: to_setup(attributes, also=also)))
    expected = current["SCANVI"].attr_dict["registry_"]
    assert found.attr_dict["registry_"]["setup_args"] == expected["setup_args"]
    assert same(dict(found.attr_dict["registry_"]["field_registries"]), dict(expected["field_registries"]))
    assert found.attr_dict["init_params_"] == current["SCANVI"].attr_dict["init_params_"]
    assert "The setup did not name its unlabeled_category: it is 'unknown'." in repairs
    assert np.array_equal(latent_of(set_up("SCANVI", found)), latent_of(model_of("SCANVI")))


# --- arguments that are gone -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "group", "argument", "value"),
    [
        ("SCVI", "kwargs", "use_cuda", True),
        ("SCANVI", "model_kwargs", "use_labels_groups", False),
        ("MULTIVI", "non_kwargs", "n_proteins", 0),
        ("MULTIVI", "non_kwargs", "empirical_protein_background_prior", True),
    ],
)
def test_arguments_that_are_gone_are_dropped(current, name, group, argument, value):
    def change(attributes):
        told = attributes["init_params_"]
        (told[group] if group == "non_kwargs" else told["kwargs"].setdefault(group, {}))[argument] = value

    found, repairs = repair(changed(current[name], change))
    assert len(repairs) == 1
    assert repairs[0].startswith(f"The argument '{argument}' is gone: ")
    assert np.array_equal(latent_of(set_up(name, found)), latent_of(model_of(name)))


def test_an_argument_that_made_another_model_is_refused(current):
    def change(attributes):
        attributes["init_params_"]["kwargs"]["model_kwargs"]["use_labels_groups"] = True

    with pytest.raises(UnsupportedModelError, match="use_labels_groups=True: groups of labels are no longer built"):
        repair(changed(current["SCANVI"], change))


def test_a_multivi_that_was_set_up_with_labels(current):
    """0.15 had the argument; nothing of the model read them."""

    def change(attributes):
        attributes["registry_"]["setup_args"]["labels_key"] = "label"
        attributes["registry_"]["field_registries"]["labels"]["state_registry"] |= {
            "categorical_mapping": np.array(["B", "T"], object),
            "original_key": "label",
        }

    found, repairs = repair(changed(current["MULTIVI"], change))
    assert "A MULTIVI is no longer set up with labels, which it did not read." in repairs
    assert np.array_equal(latent_of(set_up("MULTIVI", found)), latent_of(model_of("MULTIVI")))


# --- networks of other days ------------------------------------------------------------------------------------------


def protein_error(model):
    """How badly proteins are decoded: the one part that reads the efficiency."""
    with quiet():
        scvi.settings.seed = 0
        return float(model.get_reconstruction_error()["reconst_loss_protein"])


def test_totalvi_without_an_efficiency_per_batch(current):
    saved = current["TOTALVI"]
    old = {key: value for key, value in saved.state_dict.items() if key != "log_per_batch_efficiency"}
    found, repairs = repair(replace(saved, state_dict=old))
    assert torch.equal(found.state_dict["log_per_batch_efficiency"], torch.zeros(4, 2))
    assert len(repairs) == 1
    model = set_up("TOTALVI", found)
    assert np.array_equal(latent_of(model), latent_of(model_of("TOTALVI")))
    # The untrained model's is zero too: proteins are decoded as by it, and not as with another.
    expected = protein_error(model)
    assert protein_error(set_up("TOTALVI", saved)) == expected
    other = replace(saved, state_dict=old | {"log_per_batch_efficiency": torch.full((4, 2), 0.5)})
    assert abs(protein_error(set_up("TOTALVI", other)) - expected) > 1e-3 * expected


def test_totalvi_before_1_2_is_told_of(current):
    old = changed(current["TOTALVI"], lambda attributes: attributes["registry_"].update(scvi_version="1.1.5"))
    assert repair(old)[1] == ("Its protein background is activated by exp, as TOTALVI did before scvi-tools 1.2.",)


@pytest.mark.parametrize("name", ["TorchMRVI", "JaxMRVI"])
def test_the_names_that_mrvi_had(current, name):
    old = changed(current["MRVI"], lambda attributes: attributes["registry_"].update(model_name=name))
    if name == "JaxMRVI":
        with pytest.raises(UnsupportedModelError, match="trained with JAX"):
            repair(old)
        return
    found, repairs = repair(old)
    assert repairs == ("The class TorchMRVI is called MRVI today.",)
    assert np.array_equal(latent_of(set_up("MRVI", found)), latent_of(model_of("MRVI")))


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("MRVI", lambda s: s | {"qz.attention_block.embed_dim_proj_query.weight": torch.zeros(8, 1)}, "before 1.4.3"),
        (
            "MULTIVI",
            lambda s: {key: value for key, value in s.items() if "z_encoder_protein" not in key},
            "lacks the protein parts",
        ),
    ],
)
def test_networks_that_are_gone_are_refused(current, name, change, why):
    with pytest.raises(UnsupportedModelError, match=why):
        repair(replace(current[name], state_dict=change(current[name].state_dict)))


# --- published models ------------------------------------------------------------------------------------------------


def hidden(state, x, name):
    """A fully connected layer of the SCANVI with its batch normalisation, as PyTorch computes it in evaluation."""
    out = torch.nn.functional.linear(x, state[f"{name}.0.weight"], state[f"{name}.0.bias"])
    moments = state[f"{name}.1.running_mean"], state[f"{name}.1.running_var"]
    scale = state[f"{name}.1.weight"], state[f"{name}.1.bias"]
    return torch.relu(torch.nn.functional.batch_norm(out, *moments, *scale, eps=0.001))


def test_scanvi_1_0_3_gives_the_labels_that_it_gave(shared_data, tmp_path):
    """By hand from its weights: softmax over the classifier, once; and by the package."""
    folder = shared_data / "models" / "scanvi_1.0.3_synthetic"
    saved, repairs = read_saved(folder)
    assert repairs == ("Its classifier ends in a softmax (scvi-tools before 1.1): what precedes it is read as logits.",)
    cells = anndata.read_h5ad(folder / "adata.h5ad")
    counts = torch.tensor(np.asarray(sparse.csr_matrix(cells.X).todense()), dtype=torch.float32)
    state = saved.state_dict
    z = torch.nn.functional.linear(
        hidden(state, torch.log1p(counts), "z_encoder.encoder.fc_layers.Layer 0"),
        state["z_encoder.mean_encoder.weight"],
        state["z_encoder.mean_encoder.bias"],
    )
    logits = torch.nn.functional.linear(
        hidden(state, z, "classifier.classifier.0.fc_layers.Layer 0"),
        state["classifier.classifier.1.weight"],
        state["classifier.classifier.1.bias"],
    )
    expected = torch.softmax(logits, -1).numpy()
    to_scvi_file(saved, tmp_path / "model.pt")
    with quiet():
        model = scvi.model.SCANVI.load(str(tmp_path), cells.copy(), accelerator="cpu")
        latent, theirs = model.get_latent_representation(), model.predict(soft=True)
    assert np.abs(latent - z.numpy()).max() < 1e-4 * latent.std()
    assert np.abs(theirs.to_numpy() - expected).max() < 1e-5
    assert list(theirs.columns) == ["label_2", "label_1"]


def test_scvi_0_16_1_gives_the_latents_that_it_gave(shared_data):
    """By hand from its weights, batch columns included: by scvi-tools from the repaired parts."""
    folder = shared_data / "models" / "pancreas_scvi_0.16.1_resaved"
    saved, repairs = read_saved(folder)
    assert repairs == ("The registry did not name the method that set the data up: it is setup_anndata.",)
    query = anndata.read_h5ad(shared_data / "pancreas_2study_cepo.h5ad")
    known = [gene for gene in saved.var_names if gene in query.var_names]
    frame = pd.DataFrame.sparse.from_spmatrix(sparse.csr_matrix(query[:, known].X), columns=known)
    dense = frame.sparse.to_dense().reindex(columns=list(saved.var_names), fill_value=0.0).to_numpy(np.float32)
    state, batches = saved.state_dict, ["Pancreas CelSeq", "Pancreas Fluidigm C1", "Pancreas inDrop"]
    one_hot = torch.zeros(len(dense), 3)
    one_hot[:, 2] = 1
    out = torch.cat([torch.log1p(torch.tensor(dense)), one_hot], dim=1)
    for i in range(2):
        out = torch.nn.functional.linear(out, *(state[_layer(i, part)] for part in ("weight", "bias")))
        out = torch.relu(torch.nn.functional.layer_norm(out, (128,)))
    weights = state["z_encoder.mean_encoder.weight"], state["z_encoder.mean_encoder.bias"]
    expected = torch.nn.functional.linear(out, *weights).numpy()
    study = pd.DataFrame({"study": pd.Categorical([batches[2]] * len(dense), batches)}, index=query.obs_names)
    cells = anndata.AnnData(dense, obs=study, var=pd.DataFrame(index=list(saved.var_names)))
    model = instantiate(scvi.model.SCVI, saved, cells)
    model.is_trained_ = True
    found = latent_of(model)
    assert np.abs(found - expected).max() < 1e-4 * expected.std()
    assert len(known) > 100


def _layer(i, part):
    return f"z_encoder.encoder.fc_layers.Layer {i}.0.{part}"


# --- one class with another's weights --------------------------------------------------------------------------------


@pytest.mark.parametrize("claimed", CLASSES)
@pytest.mark.parametrize("name", CLASSES)
def test_weights_are_those_of_the_class(current, name, claimed):
    old = changed(current[name], lambda attributes: attributes["registry_"].update(model_name=claimed))
    if name == claimed:
        check_weights(old, claimed)
        return
    with pytest.raises(UnsupportedModelError, match=f"says it is a {claimed}, and its weights"):
        repair(old)


def test_every_family_is_known_by_its_parts():
    assert {name for name, found in families().items() if found.parts[0]} == CLASSES.keys()


@pytest.mark.parametrize("name", CLASSES)
def test_shapes_are_compared_before_anything_is_allocated(current, name):
    saved = current[name]
    made = {key: value.to("meta") for key, value in saved.state_dict.items()}
    check_shapes(made, saved)
    key = next(iter(made))
    for strange in (
        made | {key: torch.empty((1 << 40, 7), device="meta")},
        made | {"extra": made[key]},
        {other: value for other, value in made.items() if other != key},
    ):
        with pytest.raises(UnsupportedModelError, match="The weights do not fit the network"):
            check_shapes(strange, saved)


def test_a_network_that_is_larger_than_its_weights_is_refused(current):
    def change(attributes):
        attributes["init_params_"]["non_kwargs"]["n_hidden"] = 1_000_000_000

    with pytest.raises(UnsupportedModelError, match="made with 1,000,000,000 of something"):
        repair(changed(current["SCVI"], change))


# --- registries that are none ----------------------------------------------------------------------------------------

STRANGE = {
    "none": lambda a: a.pop("registry_"),
    "a list": lambda a: a.update(registry_=[]),
    "no setup": lambda a: a["registry_"].pop("setup_args"),
    "no fields": lambda a: a["registry_"].update(field_registries=None),
    "a class that is a list": lambda a: a["registry_"].update(model_name=["SCVI"], scvi_version=[]),
    "no version": lambda a: a["registry_"].update(scvi_version="latest"),
    "no arguments": lambda a: a.pop("init_params_"),
    "arguments that are a list": lambda a: a.update(init_params_=[1]),
    "arguments without groups": lambda a: a["init_params_"].pop("kwargs"),
    "groups that are numbers": lambda a: a["init_params_"].update(kwargs=7),
    "a method that makes folders": lambda a: a["registry_"].update(setup_method_name="convert_legacy_save"),
    "a method that is a list": lambda a: a["registry_"].update(setup_method_name=[]),
}


@pytest.mark.parametrize("case", STRANGE)
def test_strange_registries_are_refused(tmp_path, current, case):
    saved = changed(current["SCVI"], STRANGE[case])
    write_model(saved, tmp_path)
    with pytest.raises(UnsupportedModelError):
        read_saved(tmp_path)


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_as_what_it_holds(tmp_path, current):
    with pytest.raises(PackageError, match=r"holds no model\.pt"):
        read_saved(tmp_path)
    to_scvi_file(current["SCVI"], tmp_path / "lung_model.pt")
    assert same(read_saved(tmp_path)[0].var_names, current["SCVI"].var_names)
    shutil.copyfile(tmp_path / "lung_model.pt", tmp_path / "liver_model.pt")
    with pytest.raises(PackageError, match=r"several: liver_model\.pt, lung_model\.pt"):
        read_saved(tmp_path)
    write_model(current["SCVI"], tmp_path)
    (tmp_path / "model.pt").write_bytes(b"")  # the portable files come first, so that it is not opened
    assert same(dict(read_saved(tmp_path)[0].state_dict), current["SCVI"].state_dict)


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "{" + " " * (1 << 20) + "}"])
def test_strange_metadata_is_refused(tmp_path, current, text):
    to_scvi_file(current["SCVI"], tmp_path / "model.pt")
    path = tmp_path / "_scvi_required_metadata.json"
    path.write_text(json.dumps({"model_cls_name": "SCVI", "model_parent_module": "antigravity"}))
    assert read_saved(tmp_path)[1] == ()
    path.write_text(text)
    with pytest.raises(PackageError, match="_scvi_required_metadata"):
        read_saved(tmp_path)
