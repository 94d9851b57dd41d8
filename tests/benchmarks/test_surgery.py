"""The benchmark of surgery, tiny: both ways run on the same cells, and its figures are what they say they are."""

from __future__ import annotations

from types import SimpleNamespace

import anndata
import numpy as np
import pytest

from benchmarks.surgery import _flat, _table
from benchmarks.surgery_data import Design, simulated
from benchmarks.surgery_fits import Cpu, Outcome, agreement, ours, plain, scores

TINY = Design(known_batches=2, known_cells=150, new_batches=2, cells=200, genes=120, epochs=1, scanvi_epochs=1)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return simulated(tmp_path_factory.mktemp("simulation"), TINY)


def outcome(case, latent=None, labels=None, batch=None):
    cells = case.read(batch)
    n = cells.n_obs
    latent = np.zeros((n, 2), np.float32) if latent is None else latent
    labels = np.full(n, "B cell") if labels is None else labels
    return Outcome(cells.obs_names.to_numpy(str), latent, labels, {}, 0)


def test_batches_differ_in_capture_and_composition_and_both_sides_get_new_ones(case):
    known, query = anndata.read_h5ad(case.query.with_name("known.h5ad")), case.read()
    assert case.batches == {"new 00": 100, "new 01": 100}
    assert query.obs["batch"].value_counts().to_dict() == case.batches
    assert not set(known.obs["batch"]) & set(query.obs["batch"])
    assert np.array_equal(query.X.data, np.round(query.X.data))
    first, second = (np.asarray(case.read([name]).X.mean(axis=0)).ravel() for name in case.batches)
    seen = (first + second) > 1
    assert np.std(np.log((first + 0.1) / (second + 0.1))[seen]) > 0.5
    shares = [case.read([name]).obs["cell_type"].value_counts(normalize=True) for name in case.batches]
    assert (shares[0] - shares[1]).abs().max() > 0.05


def test_both_ways_go_over_the_same_cells_and_say_what_they_took(case):
    one = ours(case, list(case.batches), 50, epochs=2)
    other = plain(case, ["new 01"], epochs=2)
    assert sorted(one.cells) == sorted(case.read().obs_names)
    assert list(other.cells) == list(case.read(["new 01"]).obs_names)
    assert one.latent.shape == (200, 10)
    assert one.epochs == {"new 00": 2, "new 01": 2}
    assert one.cell_epochs == 2 * 2 * 50  # five of fifty cells are too few to be held out
    assert other.cell_epochs == 2 * 90
    assert all(seconds > 0 for seconds in (*one.cpu.values(), other.seconds))
    assert set(scores(case, one)) == {"accuracy", "macro_f1"}
    found = agreement(case, one.of(other.cells), other)
    assert 0 < found["reference_overlap"] < 1
    assert agreement(case, other, one)["labels"] == found["labels"]


def test_no_epoch_leaves_what_any_sample_starts_from(case):
    first, second = (ours(case, ["new 00"], cells, epochs=0) for cells in (20, 80))
    assert first.cell_epochs == 0
    assert agreement(case, first, second) == {"reference_overlap": 1.0, "overlap": 1.0, "rms": 0.0, "labels": 1.0}


def test_agreement_is_of_the_same_cells_in_whatever_order(case):
    rng = np.random.default_rng(0)
    one = outcome(case, rng.normal(size=(200, 10)).astype(np.float32))
    turned = one.of(one.cells[::-1])
    assert agreement(case, one, turned) == {"reference_overlap": 1.0, "overlap": 1.0, "rms": 0.0, "labels": 1.0}
    # A shift of a whole batch leaves neighbours within it alone, and is seen by the others.
    moved = outcome(case, one.latent + np.float32(0.5) * one.latent.std(axis=0))
    found = agreement(case, moved, one)
    assert found["overlap"] == 1.0
    assert found["rms"] == pytest.approx(0.5, abs=1e-3)
    assert found["reference_overlap"] < 1


def test_scores_against_the_simulated_types(case):
    truth = case.read().obs["cell_type"].to_numpy(str)
    assert scores(case, outcome(case, labels=truth)) == {"accuracy": 1.0, "macro_f1": 1.0}
    assert scores(case, outcome(case))["accuracy"] == pytest.approx((truth == "B cell").mean(), abs=1e-4)


def test_cpu_is_not_the_clock():
    import time

    with Cpu() as idle:
        time.sleep(0.3)
    with Cpu() as busy:
        began = time.process_time()
        while time.process_time() - began < 0.3:
            sum(range(1000))
    assert idle.seconds < 0.2 < busy.seconds


@pytest.mark.parametrize(
    ("ratio", "accuracy", "met"), [(6.0, 0.95, True), (4.9, 0.95, False), (6.0, 0.93, False), (6.0, 0.941, True)]
)
def test_the_bar_is_five_times_less_at_equal_accuracy(ratio, accuracy, met):
    ways = {"adapters": {"accuracy": accuracy}, "scvi-tools": {"accuracy": 0.95}}
    part = {"cpu_ratio": ratio, "cell_epochs_ratio": 9.0, "plain_seed_noise": 0.002, "ways": ways}
    flat = _flat({"simulation": part})
    assert (flat["surgery_vs_per_batch"], flat["met"]) == (ratio, met)
    told = SimpleNamespace(**part, family="SCANVI", agreement={"a, b": {"rms": 0.1}}).__dict__
    assert _table("simulation", told).splitlines()[1] == f"## simulation (SCANVI): CPU {ratio}x, cell-epochs 9.0x"
