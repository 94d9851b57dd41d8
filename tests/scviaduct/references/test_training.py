"""Every option of a recipe reaches scvi-tools, and what is wrong with one is said before anything is trained."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
import scvi
import torch

from scviaduct.errors import InputError, ScviaductError
from scviaduct.references.saved.portable import read_model
from scviaduct.references.training import Recipe, train


@pytest.fixture(scope="module")
def source(cells, tmp_path_factory):
    """A file whose counts are in a layer; X holds none."""
    folder = tmp_path_factory.mktemp("source")
    told = cells.copy()
    told.obs["size"] = np.linspace(0.5, 2, told.n_obs)
    told.obs["nothing"] = "unknown"
    told.obs["half"] = pd.Categorical(np.where(np.arange(told.n_obs) % 2, "b1", None))
    told.obs["hole"] = np.where(np.arange(told.n_obs) % 2, 1.0, np.nan)
    told.X = told.X.copy()
    told.X.data += 0.5
    told.write_h5ad(folder / "cells.h5ad")
    return str(folder / "cells.h5ad")


SMALL = {"layer": "counts", "genes": 0, "epochs": 1, "device": "cpu", "settings": {"n_latent": "3", "n_hidden": "8"}}


def recipe(family="scvi", **told):
    told = SMALL | told
    settings = SMALL["settings"] | dict(told["settings"]) if family not in ("mrvi", "contrastivevi") else {}
    return Recipe(family=family, **told | {"settings": settings})


@pytest.fixture
def calls(monkeypatch):
    """What scvi-tools was called with, by the name of the call."""
    seen = {}

    def spy(owner, name, key):
        original = getattr(owner, name)

        def record(*args, **kwargs):
            seen[key] = {**kwargs, "workers": scvi.settings.dl_num_workers, "args": args}
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, record)

    spy(scvi.model.SCVI, "setup_anndata", "setup")
    spy(scvi.model.SCVI, "train", "scvi")
    spy(scvi.model.SCANVI, "from_scvi_model", "from")
    spy(scvi.model.SCANVI, "train", "scanvi")
    return seen


def test_options_of_a_scvi(source, tmp_path, calls, cells):
    told = recipe(
        batch_key="batch",
        categorical_covariates=("donor",),
        continuous_covariates=("age",),
        size_factor_key="size",
        batch_size=16,
        epochs=2,
        settings={"n_layers": "2", "dispersion": "gene-batch", "dropout_rate": "0", "encode_covariates": "True"},
    )
    made = train(source, told, tmp_path / "out")
    setup = calls["setup"]
    assert (setup["batch_key"], setup["labels_key"], setup["size_factor_key"]) == ("batch", None, "size")
    assert setup["categorical_covariate_keys"] == ["donor"]
    assert setup["continuous_covariate_keys"] == ["age"]
    training = calls["scvi"]
    assert (training["max_epochs"], training["batch_size"], training["accelerator"]) == (2, 16, "cpu")
    assert "scanvi" not in calls
    assert (made.family, made.name, made.n_latent, made.encode_covariates) == ("SCVI", "out", 3, True)
    assert made.batch_categories == ("b1", "b2")
    assert dict(made.categorical_covariates) == {"donor": ("d1", "d2", "d3")}
    assert (made.continuous_covariates, made.size_factor_key) == (("age",), "size")
    assert made.genes.columns["index"] == tuple(cells.var_names)
    assert made.genes.columns["symbol"] == tuple(cells.var["symbol"])
    assert made.verify().ok
    saved = read_model(made.path)
    given = saved.attr_dict["init_params_"]["non_kwargs"]
    assert (given["n_layers"], given["n_latent"], given["n_hidden"]) == (2, 3, 8)
    assert (given["dispersion"], given["dropout_rate"]) == ("gene-batch", 0)
    assert made.provenance["recipe"]["batch_size"] == 16
    assert made.provenance["recipe"]["settings"]["n_layers"] == "2"
    assert made.provenance["cells"] == 90
    assert made.provenance["source"].startswith("file")
    assert made.provenance["software"]["scvi-tools"] == scvi.__version__
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_scanvi_starts_from_a_scvi(source, tmp_path, calls, cells):
    told = recipe(
        "ScAnVi",
        labels_key="cell_type",
        batch_key="batch",
        epochs=1,
        scanvi_epochs=2,
        samples_per_label=5,
        loader_workers=1,
    )
    before = scvi.settings.dl_num_workers
    made = train(source, told, tmp_path / "out")
    assert calls["setup"]["labels_key"] == "cell_type"
    assert calls["scvi"]["max_epochs"] == 1
    assert isinstance(calls["from"]["args"][0], scvi.model.SCVI)
    assert calls["from"]["unlabeled_category"] == "unknown"
    assert (calls["scanvi"]["max_epochs"], calls["scanvi"]["n_samples_per_label"]) == (2, 5)
    assert calls["scvi"]["workers"] == calls["scanvi"]["workers"] == 1
    assert scvi.settings.dl_num_workers == before
    assert (made.family, made.labels, made.unlabeled_category) == ("SCANVI", ("B", "NK", "T"), "unknown")
    expected = [None if label == "unknown" else label for label in cells.obs["cell_type"]]
    assert made.latents().labels == expected


def test_another_unlabelled_category(source, tmp_path):
    made = train(
        source, recipe("scanvi", labels_key="cell_type", unlabeled_category="NK", scanvi_epochs=1), tmp_path / "out"
    )
    assert made.labels == ("B", "unknown", "T")  # scvi-tools changes the places of the last and the unlabelled one
    assert "NK" not in made.latents().labels


def test_a_scvi_keeps_its_labels_for_its_neighbours(source, tmp_path, cells):
    made = train(source, recipe(labels_key="cell_type"), tmp_path / "out")
    assert made.latents().labels == [None if label == "unknown" else label for label in cells.obs["cell_type"]]
    assert made.labels == ()
    assert made.notes == ()
    assert made.verify().ok


def test_a_seed_is_repeated(source, tmp_path):
    states = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        made = train(source, recipe(seed=seed, batch_key="batch"), tmp_path / name)
        states.append((made.latents().latent, read_model(made.path).state_dict))
    (one, weights), (same, same_weights), (other, _) = states
    assert np.array_equal(one, same)
    assert all(torch.equal(weights[key], same_weights[key]) for key in weights)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize(
    ("genes", "expected"), [(0, 40), pytest.param(25, 25, marks=pytest.mark.slow), (40, 40), (4000, 40)]
)
def test_genes_keep_their_order_and_counts(source, tmp_path, cells, genes, expected, monkeypatch):
    seen = {}

    def stop(adata, **kwargs):
        seen["genes"] = list(adata.var_names)
        seen["counts"] = adata.X.toarray()
        raise KeyboardInterrupt

    monkeypatch.setattr(scvi.model.SCVI, "setup_anndata", stop)
    with pytest.raises(KeyboardInterrupt):
        train(source, recipe(genes=genes, batch_key="batch"), tmp_path / "out")
    assert len(seen["genes"]) == expected
    assert seen["genes"] == [gene for gene in cells.var_names if gene in seen["genes"]]
    assert np.array_equal(seen["counts"], cells[:, seen["genes"]].X.toarray())
    assert list(tmp_path.iterdir()) == []


# Arguments of the recipe, what the message names, how it ends.
WRONG = {
    "family": ({"family": "scvii"}, "'scvii'", "POISSONVI, SCANVI, SCVI, TOTALVI."),
    "no proteins": (
        {"family": "totalvi"},
        "A TOTALVI needs protein features, and the source has rna.",
        "proteins=KEY names the element of obsm that holds them, modality=rna,NAME:protein the modality of a .h5mu.",
    ),
    "no peaks": ({"family": "multivi"}, "A MULTIVI needs atac or protein features, and the source has rna.", None),
    "no labels": ({"family": "scanvi"}, "no labels column is named", "--labels-key cell_type."),
    "batch column": ({"batch_key": "batches"}, "'batches'", "There are: batch."),
    "labels column": ({"family": "scanvi", "labels_key": "celltype"}, "'celltype'", "There are: cell_type."),
    "covariate": ({"categorical_covariates": ("donors",)}, "'donors'", "There are: donor."),
    "number": ({"continuous_covariates": ("agee",)}, "'agee'", "There are: age."),
    "size factor": ({"size_factor_key": "sizes"}, "'sizes'", "There are: size."),
    "text as a number": ({"continuous_covariates": ("donor",)}, "'donor' holds string values", "a column of numbers."),
    "text as a size": ({"size_factor_key": "donor"}, "'donor' holds string values", "a column of numbers."),
    "nothing labelled": (
        {"family": "scanvi", "labels_key": "nothing"},
        "'nothing' has 0 labels besides 'unknown'",
        "Name another --labels-key or --unlabeled-category.",
    ),
    "no counts": ({"layer": "X"}, "which is not a count", "e.g. --layer counts."),
    "layer": ({"layer": "raw_counts"}, "raw_counts", None),
    "missing batches": ({"batch_key": "half"}, "45 of 90 cells have no value in 'half'", "filter=half != 'unknown'."),
    "missing numbers": ({"continuous_covariates": ("hole",)}, "45 of 90 cells have no value in 'hole'", None),
    "setting": ({"settings": {"n_latents": "3"}}, "--set n_latents=3: the model takes no 'n_latents'", None),
    "text for a whole number": ({"settings": {"n_layers": "two"}}, "'two' is not a whole number", "--set n_layers=1."),
    "half a layer": ({"settings": {"n_layers": "1.5"}}, "'1.5' is not a whole number", "--set n_layers=1."),
    "truth for a number": ({"settings": {"n_layers": "True"}}, "'True' is not a whole number", "--set n_layers=1."),
    "text for a number": ({"settings": {"dropout_rate": "low"}}, "'low' is not a number", "--set dropout_rate=0.1."),
    "text for truth": (
        {"settings": {"encode_covariates": "yes"}},
        "'yes' is not True or False",
        "--set encode_covariates=False.",
    ),
    "number for a name": ({"settings": {"dispersion": "5"}}, "'5' is not a name", "--set dispersion=gene."),
    "unknown dispersion": (
        {"settings": {"dispersion": "cell"}},
        "--set dispersion=cell",
        "arguments of scvi.model.SCVI.",
    ),
    "genes": ({"genes": -1}, "--genes -1", "At least 0."),
    "epochs": ({"epochs": 0}, "--epochs 0", "At least 1."),
    "batch size": ({"batch_size": 1}, "--batch-size 1", "At least 2."),
    "workers": ({"loader_workers": -1}, "--loader-workers -1", "At least 0."),
    "no latent": (
        {"settings": {"n_latent": "0"}},
        "--set n_latent=0 is too few",
        "At least 1, e.g. --set n_latent=10.",
    ),
    "less than no latent": ({"settings": {"n_latent": "-3"}}, "--set n_latent=-3", "e.g. --set n_latent=10."),
    "no layer": ({"settings": {"n_layers": "0"}}, "--set n_layers=0 is too few", "e.g. --set n_layers=1."),
    "dropout": ({"settings": {"dropout_rate": "2"}}, "--set dropout_rate=2", "arguments of scvi.model.SCVI."),
    "covariates": ({"settings": {"n_continuous_cov": "-900"}}, "--set n_continuous_cov=-900", None),
    "no GPU": ({"device": "cuda"}, "--device cuda: PyTorch sees no GPU", "auto for a GPU if there is one."),
    "no samples": (
        {"family": "scanvi", "labels_key": "cell_type", "samples_per_label": 0},
        "--samples-per-label 0 is too few",
        "At least 1.",
    ),
    "device": ({"device": "tpu9"}, "'tpu9'", "One of auto, cpu, cuda."),
    "samples of a scvi": (
        {"samples_per_label": 5},
        "--samples-per-label 5 is for a SCANVI, not for a SCVI",
        "Leave it out.",
    ),
    "share": ({"train_size": 1.5}, "--train-size 1.5 is no such share", "above 0 and at most 1, e.g. 0.1."),
    "no share": ({"validation_size": 1.0}, "--validation-size 1.0", "from 0 and below 1, e.g. 0.1."),
    "shares": (
        {"train_size": 0.8, "validation_size": 0.5},
        "--train-size 0.8 and --validation-size 0.5 are more than all cells",
        "e.g. 0.8 and 0.2.",
    ),
    "nothing to stop by": (
        {"early_stopping": True, "train_size": 1.0},
        "--train-size 1 leaves none",
        "E.g. --train-size 0.9.",
    ),
    "patience for nothing": (
        {"early_stopping": False, "patience": 3},
        "--patience without early stopping",
        "Add --early-stopping.",
    ),
    "no patience": ({"patience": 0}, "--patience 0 is too few", "At least 1."),
    "precision": ({"precision": "8"}, "'8' is not a precision", "One of 32-true, 16-mixed, bf16-mixed."),
    "plan": ({"plan": {"lrs": "1"}}, "--plan lrs=1: the training plan takes no 'lrs'", None),
    "text for a rate": ({"plan": {"lr": "fast"}}, "'fast' is not a number", "E.g. --plan lr=0.001."),
    "no rate": ({"plan": {"lr": "0"}}, "--plan lr=0 does not learn", "e.g. --plan lr=0.001."),
    "optimiser": ({"plan": {"optimizer": "SGD"}}, "--plan optimizer=SGD", "One of Adam, AdamW, Custom."),
    "a plan of another class": (
        {"plan": {"classification_ratio": "10"}},
        "takes no 'classification_ratio'",
        None,
    ),
    "sample of a scvi": (
        {"sample_key": "donor"},
        "--sample-key donor: a SCVI does not read it",
        "Leave the option out.",
    ),
    "background of a scvi": ({"background": ("donor=d1",)}, "--background donor=d1: a SCVI does not read it", None),
    "covariates of a mrvi": (
        {"family": "mrvi", "sample_key": "donor", "categorical_covariates": ("batch",), "settings": {}},
        "--categorical-covariates batch: a MRVI does not read it",
        None,
    ),
    "no sample": ({"family": "mrvi", "settings": {}}, "no column of them is named", "Name one: --sample-key donor."),
    "no background": (
        {"family": "contrastivevi"},
        "needs background cells (controls), and none are named",
        "--background perturbation=control.",
    ),
    "half a background": (
        {"family": "contrastivevi", "background": ("donor",)},
        "--background donor: it is not a column and a value",
        "E.g. --background perturbation=control.",
    ),
    "background of nobody": ({"family": "contrastivevi", "background": ("donor=d9",)}, "d9", None),
    "calibration of nothing": (
        {"calibrate_by": "donor"},
        "--calibrate-by donor measures how sure labels are, and there are none",
        "--labels-key cell_type.",
    ),
    "calibration by no column": (
        {"calibrate_by": "donors", "labels_key": "cell_type"},
        "'donors'",
        "There are: donor.",
    ),
    "a start for a scvi": ({"start": "pbmc"}, "--from pbmc: a SCVI is trained from nothing", "Leave it out."),
    "a start that is not there": (
        {"family": "scanvi", "labels_key": "cell_type", "start": "nowhere"},
        "nowhere",
        None,
    ),
    "epochs of a scanvi": ({"scanvi_epochs": 5}, "--scanvi-epochs 5 is for a SCANVI, not for a SCVI", "Leave it out."),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options(source, tmp_path, case, monkeypatch):
    told, names, remedy = WRONG[case]
    monkeypatch.setattr(scvi.model.SCVI, "train", lambda *_, **__: pytest.fail("was trained"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError) as caught:
        train(source, recipe(**told), tmp_path / "out")
    assert names in str(caught.value)
    assert caught.value.remedy
    assert str(caught.value).endswith(remedy or caught.value.remedy)
    assert list(tmp_path.iterdir()) == []


def test_counts_are_named_with_their_cell_and_gene(source, tmp_path):
    with pytest.raises(InputError, match=r"^Cell 'cell-0' has \d+\.5 of gene 'G\d+', which is not a count\."):
        train(source, recipe(layer="X"), tmp_path / "out")


def test_no_cell_is_selected(source, tmp_path):
    with pytest.raises(ScviaductError, match=r"selects no cell|no cell"):
        train(f"{source}?filter=donor == 'd9'", recipe(), tmp_path / "out")


@pytest.mark.parametrize("make", [lambda out: (out.mkdir(), (out / "x").touch()), lambda out: out.touch()])
def test_the_folder_must_be_new_or_empty(source, tmp_path, make):
    make(tmp_path / "out")
    with pytest.raises(InputError, match=re.escape(f"'{tmp_path / 'out'}' is there and not empty. Name a new folder")):
        train(source, recipe(), tmp_path / "out")


@pytest.mark.parametrize("out", [".hidden", ".", "a" * 201])
def test_a_folder_that_cannot_be_a_name(source, tmp_path, out, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"ends in no name for a package\. Name a folder"):
        train(source, recipe(), out)


def test_an_empty_folder_will_do(source, tmp_path):
    (tmp_path / "deep" / "out").mkdir(parents=True)
    assert train(source, recipe(), tmp_path / "deep" / "out").verify().ok
    assert train(source, recipe(), tmp_path / "deeper" / "still" / "out").name == "out"
