"""What a package holds of a trained folder, and which folders are refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import anndata
import numpy as np
import pytest
import scvi
import torch

from scviaduct.errors import InputError, PackageError, UnsafeModelError, UnsupportedModelError
from scviaduct.families.vae import quiet
from scviaduct.references.building import build_package
from scviaduct.references.manifest import file_digest
from scviaduct.references.registry import Registry


@pytest.fixture(scope="module")
def scvi_package(scvi_folder, tmp_path_factory):
    return build_package(scvi_folder, tmp_path_factory.mktemp("packages") / "scvi", "small-scvi")


@pytest.fixture(scope="module")
def scanvi_package(scanvi_folder, tmp_path_factory):
    return build_package(scanvi_folder, tmp_path_factory.mktemp("packages") / "scanvi", "small-scanvi")


FILES = {
    "model.safetensors",
    "model.json",
    "encoder.safetensors",
    "template.h5ad",
    "latents.parquet",
    "statistics.safetensors",
}


def changed(folder, out, **told):
    """A copy of a saved folder whose registry says something else."""
    shutil.copytree(folder, out)
    value = torch.load(out / "model.pt", weights_only=False)
    for key, new in told.items():
        value["attr_dict"]["registry_"][key] = new
    torch.save(value, out / "model.pt")
    return out


def bare(folder, out):
    """A copy of a saved folder without its data."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("adata.h5ad"))
    return out


# --- what a package holds --------------------------------------------------------------------------------------------


def test_manifest_of_a_scvi(scvi_package, scvi_folder, cells):
    manifest = json.loads((scvi_package.path / "manifest.json").read_text())
    assert manifest["format"] == 2
    assert manifest["name"] == "small-scvi"
    assert manifest["family"] == "SCVI"
    assert manifest["digest"] == scvi_package.digest
    assert set(manifest["files"]) == FILES
    assert {path.name for path in scvi_package.path.iterdir()} == set(manifest["files"]) | {"manifest.json"}
    for name, told in manifest["files"].items():
        path = scvi_package.path / name
        assert told == {"digest": file_digest(path), "size": path.stat().st_size}
    assert manifest["repairs"] == []
    assert manifest["provenance"]["folder"] == str(scvi_folder)
    assert manifest["provenance"]["packaged"].endswith("+00:00")
    assert np.array(manifest["template_latent"]).shape == (16, 4)


def test_facts_of_a_scvi(scvi_package, cells):
    assert scvi_package.family == "SCVI"
    assert scvi_package.scvi_version == scvi.__version__
    assert scvi_package.genes.columns == {"index": tuple(cells.var_names), "symbol": tuple(cells.var["symbol"])}
    assert scvi_package.n_latent == 4
    assert scvi_package.encode_covariates is False
    assert scvi_package.batch_key == "batch"
    assert scvi_package.batch_categories == ("b1", "b2")
    assert scvi_package.labels == ()
    assert scvi_package.labels_key == scvi_package.unlabeled_category == scvi_package.layer == ""
    assert scvi_package.notes == ("The reference has no labels: cells are mapped with a null label.",)


def test_facts_of_a_scanvi(scanvi_package):
    assert scanvi_package.family == "SCANVI"
    assert scanvi_package.labels == ("B", "NK", "T")
    assert scanvi_package.labels_key == "cell_type"
    assert scanvi_package.unlabeled_category == "unknown"
    assert scanvi_package.notes == ()


def test_latents_are_those_of_scvi_tools(scvi_package, scanvi_package, scvi_model, scanvi_model, cells):
    for package, model in ((scvi_package, scvi_model), (scanvi_package, scanvi_model)):
        expected = model.get_latent_representation(give_mean=True)
        found = package.latents().latent
        assert np.abs(found - expected).max() / expected.std() <= 1e-5
    assert scvi_package.latents().labels == [None] * len(cells)
    told = cells.obs["cell_type"].astype(str)
    assert scanvi_package.latents().labels == [None if label == "unknown" else label for label in told]


def test_without_data(scvi_folder, scanvi_folder, tmp_path):
    for name, folder, notes in (("scvi", scvi_folder, 2), ("scanvi", scanvi_folder, 1)):
        package = build_package(bare(folder, tmp_path / f"{name}-saved"), tmp_path / name, name)
        assert not package.has_latents
        assert len(package.notes) == notes
        assert package.notes[0] == "The folder has no data (adata.h5ad), so the package has no latents of its own."
        assert package.verify().ok
        assert set(package.genes.columns) == {"index"}
        with pytest.raises(PackageError, match=f"Reference '{name}' has no latents of its own.*adata.h5ad"):
            package.latents()


def test_the_data_beside_a_model_are_left_out_if_asked(scvi_folder, tmp_path, monkeypatch):
    def opened(*_, **__):
        raise AssertionError

    monkeypatch.setattr(anndata, "read_h5ad", opened)
    package = Registry(tmp_path / "home").add(scvi_folder, "lean", data=False)
    assert not package.has_latents
    assert package.notes[0] == "Its data (adata.h5ad) was left out, so the package has no latents of its own."
    with pytest.raises(AssertionError):
        Registry(tmp_path / "home").add(scvi_folder, "whole")


def test_a_model_saved_with_a_prefix(scvi_model, scvi_package, tmp_path):
    with quiet():
        scvi_model.save(str(tmp_path / "saved"), prefix="lung_", save_anndata=True)
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {"lung_model.pt", "lung_adata.h5ad"}
    package = build_package(tmp_path / "saved", tmp_path / "package", "lung")
    assert package.has_latents
    assert package.digest == scvi_package.digest
    shutil.copyfile(tmp_path / "saved" / "lung_model.pt", tmp_path / "saved" / "heart_model.pt")
    with pytest.raises(PackageError, match=r"several: heart_model\.pt, lung_model\.pt\."):
        build_package(tmp_path / "saved", tmp_path / "two", "two")


def test_a_manifest_of_another_program_hides_no_model(scvi_folder, scvi_package, tmp_path):
    shutil.copytree(scvi_folder, tmp_path / "saved")
    (tmp_path / "saved" / "manifest.json").write_text('{"short_name": "a web app"}')
    assert build_package(tmp_path / "saved", tmp_path / "package", "app").digest == scvi_package.digest


def test_a_package_without_its_encoder_is_not_packaged_again(scvi_package, tmp_path):
    shutil.copytree(scvi_package.path, tmp_path / "torn")
    (tmp_path / "torn" / "encoder.safetensors").unlink()
    with pytest.raises(PackageError, match=r"encoder\.safetensors"):
        build_package(tmp_path / "torn", tmp_path / "package", "torn")
    assert not (tmp_path / "package").exists()


def test_data_at_hand_goes_before_the_file(scvi_folder, cells, tmp_path):
    package = build_package(scvi_folder, tmp_path / "p", "p", cells[:20].copy(), {"source": "x", "folder": "elsewhere"})
    assert len(package.latents().latent) == 20
    assert package.provenance["source"] == "x"
    assert package.provenance["folder"] == "elsewhere"


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:, ::-1].copy(),
        lambda data: data[:, :20].copy(),
    ],
    ids=["permuted", "fewer genes"],
)
def test_data_of_other_genes_gives_no_latents(scvi_folder, cells, tmp_path, change):
    package = build_package(scvi_folder, tmp_path / "p", "p", change(cells))
    assert not package.has_latents
    assert "The data could not be encoded" in package.notes[0]


def test_the_same_folder_gives_the_same_digest(scvi_folder, scvi_package, scanvi_package, tmp_path):
    again = build_package(scvi_folder, tmp_path / "again", "another-name")
    assert again.digest == scvi_package.digest
    assert again.name == "another-name"
    assert scanvi_package.digest != scvi_package.digest
    assert build_package(bare(scvi_folder, tmp_path / "bare"), tmp_path / "p", "p").digest != scvi_package.digest


def test_a_package_is_copied(scvi_package, tmp_path):
    copied = build_package(scvi_package.path, tmp_path / "copy", "copy")
    assert copied.digest == scvi_package.digest
    assert copied.name == "copy"
    assert copied.provenance == scvi_package.provenance
    assert {path.name for path in copied.path.iterdir()} == {path.name for path in scvi_package.path.iterdir()}


def test_a_package_that_does_not_verify_is_not_copied(scvi_package, tmp_path):
    shutil.copytree(scvi_package.path, tmp_path / "damaged")
    with (tmp_path / "damaged" / "latents.parquet").open("ab") as file:
        file.write(b"x")
    with pytest.raises(PackageError, match=r"does not verify: digest of latents.parquet: .*Take it again"):
        build_package(tmp_path / "damaged", tmp_path / "copy", "copy")
    assert not (tmp_path / "copy").exists()


# --- the template ----------------------------------------------------------------------------------------------------


def test_the_template_holds_no_cell_of_a_donor(scanvi_package, cells):
    template = anndata.read_h5ad(scanvi_package.path / "template.h5ad")
    assert template.shape == (16, 40)
    assert list(template.obs_names) == [f"template-{i}" for i in range(16)]
    assert set(template.obs) == {"batch", "cell_type"}  # not donor, not age
    assert set(template.var["modality"]) == {"rna"}
    assert set(template.obs["cell_type"]) == {"unknown"}
    rows = {tuple(row) for row in cells.X.toarray()}
    assert not rows & {tuple(row) for row in template.X.toarray()}
    assert template.X.toarray().mean() == pytest.approx(1, abs=0.15)
    assert not template.uns
    assert not template.obsm
    assert not template.layers


@pytest.mark.slow
def test_the_template_instantiates_the_model_in_a_fresh_process(scanvi_package, scanvi_model, cells):
    code = f"""
import sys
import numpy as np
from scviaduct.families import Covariates
from scviaduct.references.package import Reference
reference = Reference.load({str(scanvi_package.path)!r})
encoder = reference.encoder()
n = len(encoder.gene_influence())
parts = np.arange(0, n + 1), np.arange(n, dtype=np.int32), np.ones(n, np.float32)
mean = encoder.encode(np.array([0, n]), parts[1], parts[2], Covariates()).mean
print("scvi" in sys.modules, reference.verify().ok, "scvi" in sys.modules)
print(",".join(encoder.labels), *mean[0])
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, verified, after, labels, *mean = done.stdout.split()
    assert (before, verified, after) == ("False", "True", "True")  # scvi-tools is loaded to verify, not to map
    assert labels == "B,NK,T"
    query = anndata.AnnData(np.ones((1, 40), np.float32), obs=cells.obs[:1].copy(), var=cells.var[[]])
    with quiet():
        expected = scanvi_model.get_latent_representation(query, give_mean=True)[0]
    assert np.allclose([float(value) for value in mean], expected, rtol=1e-4, atol=1e-5)


# --- what scvi-hub and scvi-tools leave in a folder ------------------------------------------------------------------


def hub(folder, out, **told):
    shutil.copytree(folder, out)
    metadata = {"scvi_version": "1.5.1", "anndata_version": "0.12.0", "training_data_url": None}
    metadata |= {"model_cls_name": "SCANVI", "model_parent_module": "antigravity"} | told
    (out / "_scvi_required_metadata.json").write_text(json.dumps(metadata))
    (out / "README.md").write_text("# A card")
    return out


def test_the_layout_of_scvi_hub(scanvi_folder, tmp_path):
    package = build_package(hub(scanvi_folder, tmp_path / "hub"), tmp_path / "p", "p")
    carried = {"README.md", "_scvi_required_metadata.json"}
    manifest = json.loads((package.path / "manifest.json").read_text())
    assert set(manifest["files"]) == carried | FILES
    assert (package.path / "README.md").read_text() == "# A card"
    assert package.verify().ok
    assert "antigravity" not in sys.modules  # model_parent_module is never imported


def test_a_hub_folder_of_another_class_is_refused(scanvi_folder, tmp_path):
    folder = hub(scanvi_folder, tmp_path / "hub", model_cls_name="TOTALVI")
    with pytest.raises(UnsupportedModelError, match=r"says TOTALVI, and the model says SCANVI"):
        build_package(folder, tmp_path / "p", "p")


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\udcff"], ids=["empty", "half", "list", "null", "no text"])
def test_hub_metadata_that_cannot_be_read(scanvi_folder, tmp_path, text):
    folder = hub(scanvi_folder, tmp_path / "hub")
    (folder / "_scvi_required_metadata.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(PackageError, match=r"_scvi_required_metadata.json (cannot be read|holds no facts of a model)"):
        build_package(folder, tmp_path / "p", "p")


@pytest.mark.parametrize("kind", ["latent_posterior_parameters", "latent_posterior_parameters_with_counts"])
def test_a_minified_model_gives_the_latents_it_was_minified_to(train_and_save, cells, tmp_path, kind):
    train, save = train_and_save
    model = train(cells.copy())
    expected = model.get_latent_representation(give_mean=True)
    model.adata.obsm["X_latent_qzm"], model.adata.obsm["X_latent_qzv"] = model.get_latent_representation(
        return_dist=True
    )
    with quiet():
        model.minify_adata(kind, use_latent_qzm_key="X_latent_qzm", use_latent_qzv_key="X_latent_qzv")
    save(model, tmp_path / "saved")
    package = build_package(tmp_path / "saved", tmp_path / "p", "p")
    assert package.verify().ok
    assert package.batch_categories == ("b1", "b2")
    assert np.abs(package.latents().latent - expected).max() / expected.std() <= 1e-5


# --- what is refused -------------------------------------------------------------------------------------------------


def test_unknown_families_are_refused(scvi_folder, tmp_path):
    folder = changed(scvi_folder, tmp_path / "saved", model_name="AutoZI")
    with pytest.raises(UnsupportedModelError, match=r"'AutoZI' are not mapped here\. Known: .*SCANVI.*SCVI"):
        build_package(folder, tmp_path / "p", "p")


def test_a_scvi_that_claims_to_be_a_scanvi_is_refused(scvi_folder, tmp_path):
    folder = changed(scvi_folder, tmp_path / "saved", model_name="SCANVI")
    with pytest.raises(UnsupportedModelError, match=r"says it is a SCANVI, and its weights lack 'classifier'"):
        build_package(folder, tmp_path / "p", "p")


def test_weights_of_another_class_are_refused(scvi_folder, tmp_path):
    shutil.copytree(scvi_folder, tmp_path / "saved")
    value = torch.load(tmp_path / "saved" / "model.pt", weights_only=False)
    state = value["model_state_dict"]
    value["model_state_dict"] = {key.replace("z_encoder", "qz"): tensor for key, tensor in state.items()}
    torch.save(value, tmp_path / "saved" / "model.pt")
    with pytest.raises(
        UnsupportedModelError, match=r"says it is a SCVI, and its weights lack 'z_encoder'.*claims one class"
    ):
        build_package(tmp_path / "saved", tmp_path / "p", "p")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (
            lambda value: value["model_state_dict"].pop("decoder.px_scale_decoder.0.weight"),
            "weights do not fit the network .* is missing",
        ),
        (lambda value: value["attr_dict"].pop("init_params_"), "does not hold the arguments that it was made with"),
        (
            lambda value: value["attr_dict"]["init_params_"]["non_kwargs"].update(n_hidden=17),
            "weights do not fit the network that the model describes",
        ),
        (lambda value: value["attr_dict"]["init_params_"]["non_kwargs"].update(dispersion="x"), "does not fit"),
        (lambda value: value["attr_dict"]["init_params_"].update(kwargs=[]), "not as any scvi-tools saves it"),
        (lambda value: value["attr_dict"].pop("registry_"), "has no registry of its data's setup"),
        (lambda value: value["attr_dict"]["registry_"].pop("setup_args"), "has no registry of its data's setup"),
        (lambda value: value["attr_dict"].update(module=1, adata=2), None),
    ],
    ids=["weight", "no init", "other init", "bad init", "broken init", "no registry", "no setup", "attributes"],
)
def test_what_does_not_fit_is_refused(scvi_folder, tmp_path, spoil, told):
    folder = bare(scvi_folder, tmp_path / "saved")
    value = torch.load(folder / "model.pt", weights_only=False)
    spoil(value)
    torch.save(value, folder / "model.pt")
    if told is None:  # attributes that a file names are not set on the model
        assert build_package(folder, tmp_path / "p", "p").verify().ok
        return
    with pytest.raises(UnsupportedModelError, match=told):
        build_package(folder, tmp_path / "p", "p")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda value: value["attr_dict"]["registry_"].update(field_registries=7),
        lambda value: value["attr_dict"]["registry_"].update(setup_args=None),
        lambda value: value["attr_dict"]["registry_"]["field_registries"]["batch"].clear(),
        lambda value: value["attr_dict"]["registry_"]["field_registries"].update(
            extra_categorical_covs={"state_registry": {"field_keys": ["a"], "mappings": {}}}
        ),
        lambda value: value.update(var_names=7),
    ],
    ids=["no fields", "no arguments", "no batches", "no categories", "no genes"],
)
def test_a_registry_that_is_none_is_refused(scvi_folder, tmp_path, spoil):
    folder = bare(scvi_folder, tmp_path / "saved")
    value = torch.load(folder / "model.pt", weights_only=False)
    spoil(value)
    torch.save(value, folder / "model.pt")
    with pytest.raises(
        UnsupportedModelError, match=r"The registry in .* is not one of a SCVI|has no registry of its data's setup"
    ):
        build_package(folder, tmp_path / "p", "p")
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_data_that_cannot_be_read(scvi_folder, tmp_path, damage):
    folder = tmp_path / "saved"
    shutil.copytree(scvi_folder, folder)
    data = folder / "adata.h5ad"
    whole = data.read_bytes()
    data.write_bytes({"truncated": whole[: len(whole) // 2], "text": b"cells", "empty": b""}[damage])
    with pytest.raises(PackageError, match=r"adata.h5ad' cannot be read \(\w+: .*or leave it out"):
        build_package(folder, tmp_path / "out", "small")


def test_data_with_a_batch_that_the_model_does_not_know(train_and_save, cells, tmp_path):
    train, save = train_and_save
    folder = save(train(cells.copy(), encode_covariates=True), tmp_path / "saved")
    data = anndata.read_h5ad(folder / "adata.h5ad")
    data.obs["batch"] = data.obs["batch"].astype(str)
    data.obs.iloc[3, data.obs.columns.get_loc("batch")] = "b9"
    with pytest.raises(PackageError, match=r"The data's 'batch' holds 'b9', which the model does not know"):
        build_package(folder, tmp_path / "out", "small", data)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(PackageError, match=r"holds no model.pt\. Name a folder that model.save"):
        build_package(tmp_path, tmp_path / "p", "p")
    (tmp_path / "model_params.pt").write_bytes(b"")
    with pytest.raises(PackageError, match=r"model_params.pt"):
        build_package(tmp_path, tmp_path / "p", "p")


def test_a_hostile_model_is_refused_before_a_package_is_made(tmp_path):
    (tmp_path / "saved").mkdir()
    torch.save({"model_state_dict": eval, "var_names": [], "attr_dict": {}}, tmp_path / "saved" / "model.pt")
    with pytest.raises(UnsafeModelError, match=r"it names __builtin__\.eval"):
        build_package(tmp_path / "saved", tmp_path / "p", "p")
    assert not (tmp_path / "p").exists()


# --- published models ------------------------------------------------------------------------------------------------


def test_the_pancreas_model(shared_data, tmp_path):
    package = build_package(shared_data / "models" / "pancreas_scvi_0.16.1_resaved", tmp_path / "p", "p")
    assert package.verify().ok
    assert (package.family, package.scvi_version, len(package.genes)) == ("SCVI", "0.16.1", 1000)
    assert package.batch_key == "study"
    assert package.batch_categories == ("Pancreas CelSeq", "Pancreas Fluidigm C1", "Pancreas inDrop")
    assert not package.has_latents


def test_the_model_of_before_logits(shared_data, tmp_path):
    """Its classifier gives probabilities; scvi-tools knows by the version."""
    folder = shared_data / "models" / "scanvi_1.0.3_synthetic"
    package = build_package(folder, tmp_path / "p", "p")
    assert package.verify().ok
    with quiet():
        model = scvi.model.SCANVI.load(str(folder), accelerator="cpu")
    probabilities, latent = model.predict(soft=True), model.get_latent_representation(give_mean=True)
    assert np.abs(package.latents().latent - latent).max() / latent.std() <= 1e-5
    assert list(package.labels) == list(probabilities.columns)
    found = package.encoder().classify(latent)
    assert np.abs(found - probabilities.to_numpy()).max() <= 1e-5
    assert (found.argmax(1) == probabilities.to_numpy().argmax(1)).all()


def test_a_model_exported_to_scvi_tools_comes_back_without_latents_of_its_own(scanvi_package, tmp_path):
    """The template that stands for its data is no reference's cells."""
    folder = scanvi_package.export(tmp_path / "exported")
    with quiet():
        assert scvi.model.SCANVI.load(str(folder), accelerator="cpu").is_trained
    again = build_package(folder, tmp_path / "again", "again")
    assert not again.has_latents
    assert "Its data are synthetic cells, so the package has no latents of its own." in again.notes
    template = [json.loads((p.path / "manifest.json").read_text())["template_latent"] for p in (scanvi_package, again)]
    assert template[0] == template[1]
    with pytest.raises(InputError, match=r"is there and not empty\. Name a new folder"):
        scanvi_package.export(folder)
