"""A search for hyperparameters: trials by a seed, the best of which is trained; what cannot be is said before."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

import pipelines as sv
from pipelines.trials import best_of
from pipelines.tuning import check_search
from scviaduct.errors import EngineError, InputError
from scviaduct.families import Recipe, family
from scviaduct.references.integration import scib_scores
from scviaduct.references.searchspace import Choice, Range, Wanted, draw_trials, parse_space

SCVI = family("scvi")


@pytest.fixture(scope="module")
def few(symphony, tmp_path_factory):
    """190 real cells in a file."""
    import anndata

    cells = anndata.read_h5ad(symphony)[::8, :200].copy()
    path = tmp_path_factory.mktemp("few") / "cells.h5ad"
    cells.write_h5ad(path)
    return path


def recipe(**told):
    return Recipe(family="scvi", **told)


@pytest.mark.slow
def test_the_best_of_three_trials_is_trained(local_ray, few, tmp_path, capfd):
    told = {"family": "scvi", "genes": 0, "batch_key": "batch", "epochs": 1, "device": "cpu", "quiet": True}
    search = {
        "tune": 3,
        "search": ("n_latent=2,3,4,5", "n_hidden=8", "n_layers=1"),
        "settings": {"use_layer_norm": "both"},
    }
    made = sv.train(few, out=tmp_path / "package", cpus=1, **told, **search)
    with (made / "tuning.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["trial"] for row in rows] == ["1", "2", "3"]
    assert {row["state"] for row in rows} == {"finished"}
    assert all(float(row["loss"]) > 0 and float(row["seconds"]) > 0 and float(row["epochs"]) == 1 for row in rows)
    assert len({(row["n_latent"], row["lr"]) for row in rows}) == 3
    best = min(rows, key=lambda row: float(row["loss"]))
    manifest = json.loads((made / "manifest.json").read_text())
    tuning = manifest["provenance"]["tuning"]
    assert (str(tuning["best"]), tuning["metric"], tuning["space"]["n_latent"]) == (best["trial"], "loss", "2,3,4,5")
    assert tuning["trials"] == rows
    assert manifest["facts"]["n_latent"] == int(best["n_latent"])
    assert manifest["provenance"]["recipe"]["plan"]["lr"] == best["lr"]
    assert manifest["provenance"]["recipe"]["settings"]["use_layer_norm"] == "both"
    assert not list(tmp_path.glob(".*"))
    assert not capfd.readouterr().out  # Ray Tune prints nothing
    assert not (Path.home() / "ray_results").exists()


def test_trials_are_repeated_and_begin_alike():
    space = parse_space([], SCVI)
    three, five = (draw_trials(space, number, 7, SCVI) for number in (3, 5))
    assert five[:3] == three
    assert draw_trials(space, 3, 8, SCVI) != three
    assert all(set(trial.settings) | set(trial.plan) == set(space) for trial in five)
    assert {name for trial in five for name in trial.plan} == {"lr"}
    assert all(1e-4 <= float(trial.plan["lr"]) <= 1e-2 for trial in draw_trials(space, 40, 0, SCVI))


def test_a_space():
    told = ["n_latent=5..9", "dropout_rate=0.1..0.3", "lr=1e-4..1e-3 log", "n_layers=2", "n_hidden=32..256 log"]
    space = parse_space(told, SCVI, fixed=("gene_likelihood",))
    assert space == {
        "n_latent": Range(5, 9, whole=True),
        "dropout_rate": Range(0.1, 0.3),
        "lr": Range(1e-4, 1e-3, log=True),
        "n_layers": Choice(("2",)),
        "n_hidden": Range(32, 256, log=True, whole=True),
    }
    assert str(space["lr"]) == "0.0001..0.001 log"
    rng = np.random.default_rng(0)
    drawn = [space["n_latent"].draw(rng) for _ in range(200)]
    assert set(drawn) == {"5", "6", "7", "8", "9"}  # both ends come
    logs = np.log10([float(space["lr"].draw(rng)) for _ in range(500)])
    assert abs(logs.mean() + 3.5) < 0.05  # even in the logarithm


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ("n_latent", "there is nothing to search"),
        ("n_latent=", "there is nothing to search"),
        ("n_latent=5,,7", "a value is missing"),
        ("lr=1e-2..1e-4", "it is no range"),
        ("lr=0..1 log", "it is no range"),
        ("lr=1..2 linear", "it is no range"),
        ("lr=low..high", "'low..high' are no two numbers"),
        ("n_latents=5,6", "takes no 'n_latents'"),
        ("n_latent=0,5", "too few"),
        ("n_latent=five,6", "not a whole number"),
    ],
)
def test_what_is_no_space(told, why):
    with pytest.raises(InputError, match=why):
        parse_space([told], SCVI)


@pytest.mark.parametrize(
    ("told", "search", "why"),
    [
        ({}, {"trials": 0}, "--tune 0 is too few"),
        ({}, {"trials": 9, "space": ("n_latent=5,6", "n_layers=1", "n_hidden=8", "lr=0.001")}, None),
        ({}, {"trials": 2, "epochs": 0}, "--tune-epochs 0 is too few"),
        ({}, {"trials": 2, "metric": "accuracy"}, "--tune-metric accuracy is not known"),
        ({}, {"trials": 2, "metric": "scib"}, "compares labels and batches"),
        ({"train_size": 1.0}, {"trials": 2}, "scores by validation cells"),
        ({"settings": {"n_latent": "5"}}, {"trials": 2, "space": ("n_latent=5,6",)}, "sets n_latent already"),
    ],
)
def test_what_is_no_search(told, search, why):
    if why is None:
        assert len(check_search(recipe(**told), Wanted(**search))) == 9
        return
    with pytest.raises(InputError, match=why):
        check_search(recipe(**told), Wanted(**search))


def test_a_space_of_fewer_points_than_trials():
    space = ("n_latent=5,6", "n_layers=1", "n_hidden=8", "lr=0.001", "dropout_rate=0.1", "gene_likelihood=nb")
    with pytest.raises(InputError, match=r"--tune 3: the search space has only 2 points\. --tune 2"):
        check_search(recipe(), Wanted(3, space))


def test_other_families_and_starts_are_not_searched():
    with pytest.raises(InputError, match="searches an SCVI or SCANVI, not a PEAKVI"):
        check_search(Recipe(family="peakvi"), Wanted(2))
    with pytest.raises(InputError, match="--from base has the model arguments"):
        check_search(Recipe(family="scanvi", labels_key="l", start="base"), Wanted(2))


def test_the_best_came_to_its_end():
    rows = [
        {"trial": 1, "state": "stopped early", "loss": 1.0, "error": ""},
        {"trial": 2, "state": "finished", "loss": 3.0, "scib": 0.9, "error": ""},
        {"trial": 3, "state": "finished", "loss": 2.0, "scib": 0.5, "error": ""},
        {"trial": 4, "state": "failed", "loss": float("inf"), "error": "diverged"},
    ]
    assert best_of(rows, "loss")["trial"] == 3
    assert best_of(rows, "scib")["trial"] == 2
    with pytest.raises(EngineError, match="None of 2 trials came to its end: diverged"):
        best_of([rows[0], rows[3]], "loss")


@pytest.mark.slow
def test_integration_is_scored():
    """Labels apart and batches mixed score higher than batches apart, or than labels mixed."""
    pytest.importorskip("scib_metrics")
    rng = np.random.default_rng(0)
    label, batch = rng.integers(0, 3, 300), rng.integers(0, 2, 300)
    noise = rng.normal(size=(300, 4)).astype(np.float32)
    apart = np.eye(4, dtype=np.float32)[label] * 12
    by_batch = np.eye(4, dtype=np.float32)[3 - 3 * batch] * 12 * (batch[:, None] == 0)
    names = [str(value) for value in label], [f"b{value}" for value in batch]
    good, split, mixed = (scib_scores(latent, *names) for latent in (noise + apart, noise + apart + by_batch, noise))
    assert good["bio"] > mixed["bio"] + 0.2
    assert good["batch"] > split["batch"] + 0.1
    assert good["scib"] > max(split["scib"], mixed["scib"])
    assert good["scib"] == pytest.approx(0.6 * good["bio"] + 0.4 * good["batch"])
    assert all(-1e-6 <= value <= 1 + 1e-6 for value in good.values())
