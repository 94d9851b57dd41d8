"""Models of before scvi-tools 0.15: three files and a setup dictionary, read without running anything."""

from __future__ import annotations

import os
import pickle
import shutil
from collections import OrderedDict

import numpy as np
import pandas as pd
import pytest
import torch

from scviaduct.errors import PackageError, UnsafeModelError, UnsupportedModelError
from scviaduct.families.vae import quiet
from scviaduct.references.saved.archive import read_model_file
from scviaduct.references.saved.legacy import read_legacy, registry_from_setup
from scviaduct.references.saved.repair import read_saved
from tests.scviaduct.references.saved.seven import CLASSES, latent_of, model_of, save_small, set_up

OLD = ["SCVI", "SCANVI", "TOTALVI", "PEAKVI"]
KEYS = {
    "X": "X",
    "batch": "batch_indices",
    "labels": "labels",
    "extra_categorical_covs": "cat_covs",
    "extra_continuous_covs": "cont_covs",
    "proteins": "protein_expression",
}


def setup_of(registry):
    """The setup dictionary that scvi-tools 0.14 would have made: its layout is that of ``_setup_anndata`` there."""
    fields = {key: field for key, field in registry["field_registries"].items() if field["data_registry"]}
    setup = {"scvi_version": "0.14.6", "data_registry": {}, "categorical_mappings": {}, "summary_stats": {}}
    for key, field in fields.items():
        if key not in KEYS:
            continue
        place, state = dict(field["data_registry"]), field["state_registry"]
        if "categorical_mapping" in state:
            mapping = np.array(state["categorical_mapping"])
            setup["categorical_mappings"][place["attr_key"]] = {
                "original_key": state["original_key"],
                "mapping": mapping,
            }
            setup["summary_stats"][f"n_{key}"] = len(mapping)
        if key == "extra_categorical_covs":
            place["attr_key"] = "_scvi_extra_categoricals"
            setup["extra_categoricals"] = {
                "mappings": state["mappings"],
                "keys": list(state["field_keys"]),
                "n_cats_per_key": state["n_cats_per_key"],
            }
        if key == "extra_continuous_covs":
            place["attr_key"] = "_scvi_extra_continuous"
            setup["extra_continuous_keys"] = np.array(state["columns"], object)
        if key == "proteins":
            setup["protein_names"] = list(state["column_names"])
        setup["data_registry"][KEYS[key]] = place
    setup["data_registry"] |= {"local_l_mean": {"attr_name": "obs", "attr_key": "_scvi_local_l_mean"}}
    batch = setup["summary_stats"].pop("n_batch")
    sizes = {"n_cells": 24, "n_vars": len(fields["X"]["state_registry"]["column_names"]), "n_batch": batch}
    setup["summary_stats"] |= sizes | {"n_proteins": len(setup.get("protein_names", ()))}
    return setup


def attributes_of(saved):
    """What ``attr.pkl`` held: the setup dictionary in the place of the registry, and the history as tables."""
    kept = {key: value for key, value in saved.attr_dict.items() if key not in ("registry_", "history_")}
    history = {"elbo_train": pd.DataFrame({"elbo_train": [3.0, 2.0]}, index=pd.Index([0, 1], name="epoch"))}
    return kept | {"scvi_setup_dict_": setup_of(saved.attr_dict["registry_"]), "history_": history}


def write_legacy(folder, saved, prefix="", protocol=4):
    """Write a model in the layout of ``BaseModelClass.save`` of 0.14."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value for key, value in saved.state_dict.items() if key != "log_per_batch_efficiency"}
    torch.save(OrderedDict(state), folder / f"{prefix}model_params.pt")
    (folder / f"{prefix}attr.pkl").write_bytes(pickle.dumps(attributes_of(saved), protocol))
    np.savetxt(folder / f"{prefix}var_names.csv", saved.var_names, fmt="%s")
    return folder


@pytest.fixture(scope="module")
def saved_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("new")
    return {name: read_model_file(save_small(name, folder / name) / "model.pt") for name in OLD}


@pytest.fixture
def old_scvi(tmp_path, saved_models):
    return write_legacy(tmp_path / "old", saved_models["SCVI"])


@pytest.mark.parametrize("name", OLD)
@pytest.mark.parametrize("protocol", [2, 4])
def test_an_old_model_gives_the_same_latents(tmp_path, saved_models, name, protocol):
    found, repairs = read_saved(write_legacy(tmp_path / name, saved_models[name], protocol=protocol))
    assert np.array_equal(latent_of(set_up(name, found)), latent_of(model_of(name)))
    assert repairs[0] == f"The setup dictionary of scvi-tools 0.14.6 became the registry of a {name}."
    assert found.attr_dict["registry_"]["model_name"] == name


@pytest.mark.parametrize("name", OLD)
def test_the_registry_is_that_of_scvi_tools_own_conversion(tmp_path, saved_models, name):
    folder = write_legacy(tmp_path / "old", saved_models[name])
    with quiet():
        CLASSES[name].convert_legacy_save(str(folder), str(tmp_path / "converted"))
    theirs = read_model_file(tmp_path / "converted" / "model.pt")
    ours, _ = read_saved(folder)
    fields = theirs.attr_dict["registry_"]["field_registries"]
    for key, field in ours.attr_dict["registry_"]["field_registries"].items():
        expected, found = fields[key]["state_registry"], field["state_registry"]
        assert str(sorted(found)) == str(sorted(expected)), key
        for part, value in found.items():
            assert str(value) == str(expected[part]) or list(value) == list(expected[part]), (key, part)
        assert field["data_registry"]["attr_name"] == fields[key]["data_registry"]["attr_name"]
    assert set(theirs.state_dict) == set(ours.state_dict)
    # What they leave wrong: a column that scvi-tools had made itself is asked for in the query.
    told = theirs.attr_dict["registry_"]["setup_args"]
    assert {key for key, value in told.items() if str(value).startswith("_scvi")} <= {"labels_key"}
    assert not [value for value in ours.attr_dict["registry_"]["setup_args"].values() if str(value).startswith("_")]


def test_a_converted_totalvi_is_read(tmp_path, saved_models):
    """Its efficiency per batch is a parameter among tensors, the one place where a file names _rebuild_parameter."""
    with quiet():
        folder = write_legacy(tmp_path / "old", saved_models["TOTALVI"])
        CLASSES["TOTALVI"].convert_legacy_save(str(folder), str(tmp_path / "converted"))
    assert b"_rebuild_parameter" in (tmp_path / "converted" / "model.pt").read_bytes()
    found, _ = read_saved(tmp_path / "converted")
    assert np.array_equal(latent_of(set_up("TOTALVI", found)), latent_of(model_of("TOTALVI")))


def test_arguments_of_the_earliest_models_are_read(tmp_path, saved_models):
    """Before 0.8 the arguments lay side by side, and said whether the model was trained on a GPU."""
    saved = saved_models["PEAKVI"]
    told = saved.attr_dict["init_params_"]
    flat = {**told["non_kwargs"], "model_kwargs": {"use_cuda": True}, "use_cuda": True}
    saved = type(saved)(saved.state_dict, saved.var_names, saved.attr_dict | {"init_params_": flat})
    found, repairs = read_saved(write_legacy(tmp_path / "old", saved))
    assert found.attr_dict["init_params_"]["non_kwargs"] == told["non_kwargs"]
    assert found.attr_dict["init_params_"]["kwargs"] == {"model_kwargs": {}}
    assert [text for text in repairs if "before 0.8" in text]
    assert np.array_equal(latent_of(set_up("PEAKVI", found)), latent_of(model_of("PEAKVI")))


def test_a_prefix_is_found(tmp_path, saved_models):
    found = read_legacy(write_legacy(tmp_path, saved_models["SCVI"], prefix="lung_"))
    assert list(found.var_names) == list(saved_models["SCVI"].var_names)


def test_names_are_lines(old_scvi):
    """numpy.genfromtxt, which reads them in scvi-tools, takes '#' for a comment and ',' for a second column."""
    names = ["HLA-A", "a#b", "x,y", ' "q"', "é", *"abcdefg"]
    np.savetxt(old_scvi / "var_names.csv", np.array(names, object), fmt="%s", encoding="utf-8")
    assert list(read_legacy(old_scvi).var_names) == names


def test_pickles_of_pandas_1_are_read(old_scvi):
    """A pickle of pandas 1 names classes that pandas 2 no longer has."""

    class Int64Index:
        def __reduce__(self):
            return pd.core.indexes.base._new_Index, (Named, {"data": np.array([0, 1]), "name": "epoch"})

    class Named:
        pass

    told = pickle.loads((old_scvi / "attr.pkl").read_bytes())
    Named.__module__, Named.__qualname__ = __name__, "Named"
    globals()["Named"] = Named
    try:
        data = pickle.dumps(told | {"steps_": Int64Index()}, 3)
    finally:
        del globals()["Named"]
    data = data.replace(f"c{__name__}\nNamed\n".encode(), b"cpandas.core.indexes.numeric\nInt64Index\n")
    (old_scvi / "attr.pkl").write_bytes(data)
    assert read_legacy(old_scvi).attr_dict["steps_"].tolist() == [0, 1]


# --- refusals --------------------------------------------------------------------------------------------------------


class Calls:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_hostile_pickle_runs_nothing(old_scvi, tmp_path):
    canary = tmp_path / "canary"
    told = pickle.loads((old_scvi / "attr.pkl").read_bytes())
    (old_scvi / "attr.pkl").write_bytes(pickle.dumps(told | {"x_": Calls(canary)}))
    with pytest.raises(UnsafeModelError, match=r"names posix\.system") as caught:
        read_saved(old_scvi)
    assert "convert_legacy_save" in str(caught.value)
    assert not canary.exists()
    pickle.loads((old_scvi / "attr.pkl").read_bytes())
    assert canary.exists()


def test_weights_of_old_torch_are_refused_with_a_remedy(old_scvi):
    state = torch.load(old_scvi / "model_params.pt", weights_only=True)
    torch.save(state, old_scvi / "model_params.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UnsafeModelError, match=r"not a zip archive.*torch >= 1\.6"):
        read_saved(old_scvi)


@pytest.mark.parametrize(
    ("file", "data", "why"),
    [
        ("attr.pkl", b"", "cannot be read"),
        ("attr.pkl", pickle.dumps([1]), "does not hold attributes"),
        ("attr.pkl", b"Pposix\n.", "refers to a storage"),
        ("var_names.csv", b"\xff\xfe", "utf-8"),
        ("model_params.pt", b"\x80\x02N.", "not a zip archive"),
    ],
)
def test_damaged_files_are_refused(old_scvi, file, data, why):
    (old_scvi / file).write_bytes(data)
    with pytest.raises(PackageError, match=why):
        read_saved(old_scvi)


def test_weights_that_are_none_are_refused(old_scvi):
    torch.save({"weight": [1.0]}, old_scvi / "model_params.pt")
    with pytest.raises(UnsafeModelError, match="does not hold weights alone"):
        read_saved(old_scvi)


@pytest.mark.parametrize("file", ["attr.pkl", "var_names.csv", "model_params.pt"])
def test_a_missing_file_is_told(old_scvi, file):
    (old_scvi / file).unlink()
    with pytest.raises(PackageError, match=file if file != "model_params.pt" else r"holds no model\.pt"):
        read_saved(old_scvi)


def test_two_models_in_a_folder_are_refused(old_scvi):
    for file in ("attr.pkl", "var_names.csv", "model_params.pt"):
        shutil.copyfile(old_scvi / file, old_scvi / f"b_{file}")
    with pytest.raises(PackageError, match=r"several models: model_params\.pt, b_model_params\.pt"):
        read_saved(old_scvi)


def test_a_setup_on_raw_is_refused(saved_models):
    setup = setup_of(saved_models["SCVI"].attr_dict["registry_"])
    setup["data_registry"]["X"]["attr_name"] = "raw"
    with pytest.raises(UnsupportedModelError, match="set up on 'raw'"):
        registry_from_setup(setup, "SCVI")


def test_labels_without_the_unlabelled_one_last(saved_models):
    setup = setup_of(saved_models["SCANVI"].attr_dict["registry_"])
    told = next(one for one in setup["categorical_mappings"].values() if one["original_key"] == "label")
    told["mapping"] = np.array(["B", "T"], object)
    labels = registry_from_setup(setup, "SCANVI", "unknown")["field_registries"]["labels"]
    assert labels["state_registry"]["categorical_mapping"].tolist() == ["B", "T", "unknown"]
    assert labels["summary_stats"] == {"n_labels": 3}
    told["mapping"] = np.array(["unknown", "T"], object)
    with pytest.raises(UnsupportedModelError, match="is not the last label"):
        registry_from_setup(setup, "SCANVI", "unknown")


@pytest.mark.parametrize("missing", ["data_registry", "categorical_mappings", "summary_stats"])
def test_half_a_setup_is_refused(old_scvi, missing):
    told = pickle.loads((old_scvi / "attr.pkl").read_bytes())
    del told["scvi_setup_dict_"][missing]
    (old_scvi / "attr.pkl").write_bytes(pickle.dumps(told))
    with pytest.raises(UnsupportedModelError, match=missing):
        read_saved(old_scvi)
