"""Every family is trained on real cells, packaged, verified, and maps a block."""

from __future__ import annotations

import csv
from dataclasses import replace

import anndata
import mudata
import numpy as np
import pyarrow.parquet as pq
import pytest
import scvi
import torch

from scviaduct.errors import InputError
from scviaduct.families.vae import quiet
from scviaduct.references.building import build_package
from scviaduct.references.cells import read_cells
from scviaduct.references.publishing.data import parts_of, read_minified, write_data
from scviaduct.references.recipes import PRESETS, fill_up
from scviaduct.references.saved.portable import read_model
from scviaduct.references.template import encode_cells
from scviaduct.references.training import Options, Recipe, train

PERTURBED = "perturb_thp1_eccite_sceptre.h5ad?filter=perturbation in ['non-targeting', 'IFNGR1']"
CASES = {
    "SCVI": (
        "pbmc_10x_3tech_symphony.h5ad",
        {"genes": 300, "epochs": 3, "batch_key": "batch", "labels_key": "cell_type"},
    ),
    "SCANVI": (
        "pbmc_10x_3tech_symphony.h5ad",
        {
            "genes": 300,
            "epochs": 3,
            "scanvi_epochs": 3,
            "batch_key": "batch",
            "labels_key": "cell_type",
            "calibrate_by": "batch",
        },
    ),
    "TOTALVI": ("citeseq_pbmc5k_scvitests.h5ad?proteins=protein_expression", {"genes": 200, "epochs": 2}),
    "MULTIVI": ("multiome_rna_atac_muon.h5mu", {"genes": 0, "epochs": 1}),
    "PEAKVI": (
        "multiome_a549_scicar_atac_binary.h5ad",
        {"min_cells_per_peak": 0.05, "epochs": 1, "batch_key": "dex_hours"},
    ),
    "MRVI": (PERTURBED, {"genes": 0, "epochs": 1, "sample_key": "batch", "labels_key": "perturbation"}),
    "ContrastiveVI": (PERTURBED, {"genes": 0, "epochs": 1, "background": ("perturbation=non-targeting",)}),
}


@pytest.fixture(scope="module")
def trained(shared_data, tmp_path_factory):
    """Each family's package, with its source and recipe; trained when first asked for."""
    folder, made = tmp_path_factory.mktemp("trained"), {}

    def get(name):
        if name not in made:
            file, told = CASES[name]
            recipe = Recipe(family=name, device="cpu", **told)
            source = f"{shared_data}/{file}"
            made[name] = train(source, recipe, folder / name), source, recipe
        return made[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_trained_packaged_verified_and_mapped(trained, name):
    made, source, recipe = trained(name)
    assert (made.family, made.name) == (name, name)
    report = made.verify()
    assert report.ok, report
    cells = read_cells(source, recipe).cells
    latents = made.latents()
    assert latents.latent.shape == latents.variance.shape == (cells.n_obs, made.n_latent)
    assert np.isfinite(latents.latent).all()
    assert (latents.variance > 0).all()
    assert made.provenance["cells"] == cells.n_obs
    block = encode_cells(made.encoder(), cells.X[:100], cells.obs.iloc[:100], made)
    np.testing.assert_allclose(block.mean, latents.latent[:100], atol=1e-4)
    with (made.path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    told = {
        model: recipe.scanvi_epochs if model == "SCANVI" else recipe.epochs for model in {row["model"] for row in rows}
    }
    assert made.provenance["epochs"] == told
    assert [int(row["epoch"]) for row in rows if row["model"] == name] == list(range(1, told[name] + 1))
    assert all(np.isfinite(float(row[metric])) for row in rows for metric in ("elbo_train", "elbo_validation"))


def test_neighbours_of_other_batches_calibrate(trained):
    made, _, _ = trained("SCVI")
    told = made.provenance["calibration"]
    table = pq.read_table(made.path / "calibration.parquet").to_pandas()
    latents = made.latents()
    assert (told["method"], told["by"], told["groups"]) == ("neighbors", "batch", ["3pv1", "3pv2", "5p"])
    assert len(table) == told["cells"] == sum(label is not None for label in latents.labels)
    assert told["accuracy"] == pytest.approx((table.label == table.predicted).mean(), abs=1e-4)
    assert told["accuracy"] > 0.5


def test_a_classifier_is_asked_for_labels_that_it_was_not_shown(trained, shared_data):
    made, _, recipe = trained("SCANVI")
    told = made.provenance["calibration"]
    table = pq.read_table(made.path / "calibration.parquet").to_pandas()
    assert (told["method"], len(told["groups"])) == ("classifier", 1)
    assert set(table.group) == set(told["groups"])
    original = anndata.read_h5ad(shared_data / "pbmc_10x_3tech_symphony.h5ad").obs
    # Labels that were held out are labels of the reference all the same.
    assert made.latents().labels == list(original["cell_type"].astype(str))
    weights = [name for name in read_model(made.path).state_dict if name.startswith("classifier")]
    assert weights
    saved = read_model(made.path).attr_dict["registry_"]["field_registries"]["labels"]
    assert "unknown" in list(saved["state_registry"]["categorical_mapping"])
    assert recipe.unlabeled_category == "unknown"


def test_labels_are_not_held_out_unasked_where_groups_are_few(shared_data, tmp_path):
    """Of two batches each is half: a classifier keeps its labels unless the user names the column."""
    source = f"{shared_data}/pbmc_10x_3tech_symphony.h5ad?filter=batch in ['3pv1', '3pv2']"
    told = {"genes": 100, "epochs": 1, "scanvi_epochs": 1, "batch_key": "batch", "labels_key": "cell_type"}
    made = train(source, Recipe(family="scanvi", device="cpu", **told), tmp_path / "out")
    assert "--calibrate-by batch holds one out all the same" in made.provenance["calibration"]["left_out"]
    assert "calibration.parquet" not in made.files


@pytest.mark.parametrize("name", ["SCVI", "SCANVI", "TOTALVI"])
def test_minified_data_loads_in_scvi_tools(trained, name, tmp_path):
    """The package's model and its minified data give the latents, without counts or further columns."""
    made, _, _ = trained(name)
    data = read_minified(made)
    assert sum(part.X.sum() for part in parts_of(data)) == 0
    own = {column for part in (data, *parts_of(data)) for column in part.obs if not column.startswith("_scvi")}
    assert own <= {made.batch_key, made.labels_key, "observed_lib_size", "_indices"}
    written = write_data(made, data, tmp_path, own, with_counts=False, with_ids=True)
    with quiet():
        loaded = getattr(scvi.model, name).load(str(tmp_path), adata=read_data(tmp_path / written.file))
        latent = loaded.get_latent_representation()
    assert loaded.minified_data_type == "latent_posterior_parameters"
    np.testing.assert_allclose(latent, made.latents().latent, atol=1e-4)


def read_data(path):
    return mudata.read_h5mu(path) if path.suffix == ".h5mu" else anndata.read_h5ad(path)


@pytest.mark.parametrize("name", ["MULTIVI", "PEAKVI", "MRVI", "ContrastiveVI"])
def test_families_without_minified_data_say_so(trained, name):
    made, _, _ = trained(name)
    assert made.provenance["minified"]["left_out"].startswith("scvi-tools ")
    assert not any(file.startswith("minified") for file in made.files)


def test_counts_are_kept_on_request(cells, tmp_path):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    told = {"epochs": 1, "genes": 0, "batch_key": "batch", "with_counts": True, "device": "cpu"}
    made = train(str(tmp_path / "cells.h5ad"), Recipe(family="scvi", **told), tmp_path / "out")
    data = anndata.read_h5ad(made.path / "minified.h5ad")
    assert (data.X != cells.X).nnz == 0
    assert data.uns["_scvi_adata_minify_type"] == "latent_posterior_parameters_with_counts"


def test_a_scanvi_starts_from_a_package(trained, shared_data, tmp_path):
    start, source, _ = trained("SCVI")
    told = Recipe(
        family="scanvi",
        start=str(start.path),
        labels_key="cell_type",
        scanvi_epochs=1,
        device="cpu",
        calibrate_by="none",
    )
    seen = []
    made = train(source, told, tmp_path / "out", lambda *event: seen.append(event[0]))
    assert set(seen) == {"SCANVI"}
    assert made.genes.columns["index"] == start.genes.columns["index"]
    assert (made.batch_key, made.batch_categories) == ("batch", start.batch_categories)
    assert made.provenance["started_from"] == {"name": str(start.path), "digest": start.digest}
    assert made.provenance["calibration"] == {"left_out": "it was not asked for"}
    near = np.abs(made.latents().latent - start.latents().latent).mean() / start.latents().latent.std()
    assert near < 0.5  # one epoch away from where it started; a model of its own lies elsewhere
    fewer = f"{source}?filter=batch == '5p'"
    with pytest.raises(InputError, match=r"'batch' of the cells and of --from .* differ in 3pv1, 3pv2"):
        train(fewer, told, tmp_path / "fewer")
    with pytest.raises(InputError, match=r"--batch-key assay: --from .* was set up with batch"):
        train(source, replace(told, batch_key="assay"), tmp_path / "other")
    with pytest.raises(InputError, match=r"--set n_latent is for the SCVI"):
        train(source, replace(told, settings={"n_latent": "3"}), tmp_path / "other")
    totalvi, _, _ = trained("TOTALVI")
    with pytest.raises(InputError, match=r"is a TOTALVI, and a SCANVI starts from a SCVI"):
        train(source, replace(told, start=str(totalvi.path)), tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_scanvi_starts_from_a_folder_of_scvi_tools(scvi_folder, cells, tmp_path):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    told = Recipe(
        family="scanvi", start=str(scvi_folder), labels_key="cell_type", scanvi_epochs=1, device="cpu", batch_size=32
    )
    made = train(str(tmp_path / "cells.h5ad"), told, tmp_path / "out")
    packaged = build_package(scvi_folder, tmp_path / "start", "start")
    assert made.provenance["started_from"]["digest"] == packaged.digest
    assert made.n_latent == packaged.n_latent


def test_early_stopping_ends_training(cells, tmp_path):
    """A metric that cannot fall any more ends it after as many epochs as the patience says."""
    cells.write_h5ad(tmp_path / "cells.h5ad")
    told = {"genes": 0, "device": "cpu", "epochs": 30, "early_stopping": True, "patience": 2}
    plan = {"lr": "1e-12"}
    made = train(
        str(tmp_path / "cells.h5ad"),
        Recipe(family="scvi", **told, plan=plan, monitor="kl_weight"),
        tmp_path / "out",
    )
    assert made.provenance["epochs"] == {"SCVI": 3}


def test_a_metric_that_is_not_there_is_named(cells, tmp_path):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    told = Recipe(family="scvi", genes=0, device="cpu", epochs=2, monitor="elbo")
    with pytest.raises(InputError, match=r"--monitor elbo: training a SCVI gives no such metric\. One of elbo_valid"):
        train(str(tmp_path / "cells.h5ad"), told, tmp_path / "out")


def test_an_interruption_stays_one_and_prints_nothing(cells, tmp_path, capsys):
    """Lightning turns it into an exit, and scvi-tools prints."""
    cells.write_h5ad(tmp_path / "cells.h5ad")

    def interrupt(name, done, epochs, metrics):
        print("mine")
        if metrics:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(str(tmp_path / "cells.h5ad"), Recipe(family="scvi", genes=0, device="cpu"), tmp_path / "out", interrupt)
    assert capsys.readouterr().out == "mine\nmine\n"
    assert [path.name for path in tmp_path.iterdir()] == ["cells.h5ad"]


@pytest.mark.parametrize(("size", "epochs"), [(17, 2), (80, 1)])
def test_a_mini_batch_of_one_cell_is_named(cells, tmp_path, size, epochs):
    """81 cells to train on: batches of 80 leave one, which batch normalisation cannot do."""
    cells.write_h5ad(tmp_path / "cells.h5ad")
    told = Recipe(family="scvi", genes=0, device="cpu", epochs=epochs, batch_size=size, train_size=0.9)
    if size == 80:
        with pytest.raises(InputError, match=r"mini-batch of 80 leaves one of a single cell\. Another --batch-size"):
            train(str(tmp_path / "cells.h5ad"), told, tmp_path / "out")
    else:
        assert train(str(tmp_path / "cells.h5ad"), told, tmp_path / "out").provenance["epochs"] == {"SCVI": 2}


def test_half_precision_trains_and_packages_single(cells, tmp_path):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    told = Recipe(family="scvi", genes=0, device="cpu", epochs=1, precision="bf16-mixed", train_size=0.8)
    made = train(str(tmp_path / "cells.h5ad"), told, tmp_path / "out")
    assert made.verify().ok
    assert {value.dtype.is_floating_point and value.dtype for value in read_model(made.path).state_dict.values()} <= {
        torch.float32,
        False,
    }


def test_tensorboard_gets_the_metrics(cells, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cells.write_h5ad(tmp_path / "cells.h5ad")
    options = Options(tensorboard=tmp_path / "board")
    told = Recipe(family="scvi", genes=0, device="cpu", epochs=2)
    train(str(tmp_path / "cells.h5ad"), told, tmp_path / "out", options=options)
    events = EventAccumulator(str(tmp_path / "board" / "SCVI"))
    events.Reload()
    assert len(events.Scalars("elbo_validation")) == 2


def test_tensorboard_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("scviaduct.references.training.find_spec", lambda name: None)
    options = Options(tensorboard=tmp_path / "board")
    with pytest.raises(InputError, match=r"needs the package tensorboard, .* pip install tensorboard"):
        train("nowhere.h5ad", Recipe(family="scvi"), tmp_path / "out", options=options)


def test_named_recipes_fill_up_what_is_not_said():
    told = fill_up({"family": "scvi", "batch_key": None, "genes": None}, "census")
    assert (told.genes, told.batch_key, told.preset) == (8000, "dataset_id", "census")
    assert told.settings == {"n_hidden": "512", "n_layers": "2", "n_latent": "50"}
    mine = fill_up({"family": "scvi", "batch_key": "donor", "genes": 100, "settings": {"n_latent": "7"}}, "census")
    assert (mine.genes, mine.batch_key, mine.settings["n_latent"], mine.settings["n_hidden"]) == (
        100,
        "donor",
        "7",
        "512",
    )
    arches = fill_up({"family": "SCANVI", "labels_key": "x"}, "scarches")
    assert arches.settings == dict(PRESETS["scarches"].settings)
    peaks = fill_up({"family": "peakvi"}, "scarches")
    assert "n_layers" not in peaks.settings  # PEAKVI names its layers otherwise
    assert peaks.settings["encode_covariates"] == "True"
    with pytest.raises(InputError, match=r"There is no recipe 'scarch'\. One of default, scarches, census\."):
        fill_up({"family": "scvi"}, "scarch")


def test_scarches_makes_a_reference_that_surgery_moves(cells, tmp_path):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    told = fill_up({"family": "scvi", "genes": 0, "epochs": 1, "batch_key": "batch", "device": "cpu"}, "scarches")
    made = train(str(tmp_path / "cells.h5ad"), told, tmp_path / "out")
    assert made.encode_covariates
    names = read_model(made.path).state_dict
    assert "z_encoder.encoder.fc_layers.Layer 1.0.weight" in names
    assert not any("running_mean" in name for name in names)


def test_a_totalvi_of_several_panels(shared_data, tmp_path):
    cells = anndata.read_h5ad(shared_data / "citeseq_pbmc5k_scvitests.h5ad")
    cells.obs["panel"] = [f"panel {i % 2}" for i in range(cells.n_obs)]
    cells.obs["lane"] = [f"lane {i % 2}" for i in range(cells.n_obs)]
    cells.write_h5ad(tmp_path / "cells.h5ad")
    source = f"{tmp_path / 'cells.h5ad'}?proteins=protein_expression"
    told = Recipe(family="TOTALVI", genes=100, epochs=1, device="cpu", panel_key="panel", batch_key="lane")
    made = train(source, told, tmp_path / "m")
    assert made.verify().ok
    assert read_model(made.path).attr_dict["registry_"]["setup_args"]["panel_key"] == "panel"
    with pytest.raises(InputError, match=r"'panel' has 2 panels and there are 1 batches"):
        train(source, replace(told, batch_key=None), tmp_path / "n")
    with pytest.raises(InputError, match=r"--panel-key panel: a SCVI does not read it"):
        train(source, Recipe(family="SCVI", genes=100, epochs=1, device="cpu", panel_key="panel"), tmp_path / "n")
