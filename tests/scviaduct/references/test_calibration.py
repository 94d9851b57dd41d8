"""How sure labels are: bins, groups that are held out, neighbours of other groups."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest

from scviaduct.mapping.labels import NeighborVote
from scviaduct.references.calibration import Calibration, expected_error, hold_out, of_classifier, of_neighbors


def test_expected_calibration_error_by_hand():
    # Two bins of 15 are used: (0.9, 0.9) half right, (0.2, 0.2) never right.
    probability = np.array([0.9, 0.9, 0.2, 0.2], np.float32)
    right = np.array([True, False, False, False])
    assert expected_error(probability, right) == pytest.approx((2 * 0.4 + 2 * 0.2) / 4)
    assert expected_error(np.array([1.0, 1.0], np.float32), np.array([True, True])) == 0


def test_neighbours_of_other_groups_alone():
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(120, 3)).astype(np.float32)
    groups = np.array(["a", "b", "c"] * 40, object)
    labels = [None if i % 10 == 0 else ("x", "y")[int(latent[i, 0] > 0)] for i in range(120)]
    names = [f"cell-{i}" for i in range(120)]
    found, reason = of_neighbors(latent, names, groups, labels)
    assert reason == ""
    assert found.method == "neighbors"
    assert list(found.observation_id) == [name for name, label in zip(names, labels, strict=True) if label]
    for i in (1, 32, 77):
        others = [j for j in range(120) if groups[j] != groups[i] and labels[j]]
        vote = NeighborVote(latent[others], [labels[j] for j in others], 15)
        shares = vote.probabilities(latent[[i]])[0]
        at = names_at(found, names[i])
        assert found.predicted[at] == vote.labels[shares.argmax()]
        assert found.probability[at] == pytest.approx(shares.max())
        assert (found.group[at], found.label[at]) == (groups[i], labels[i])
    assert found.summary()["accuracy"] > 0.8


def names_at(found, name):
    return list(found.observation_id).index(name)


def test_neighbours_need_two_groups():
    latent = np.zeros((4, 2), np.float32)
    one = np.array(["a"] * 4, object)
    assert of_neighbors(latent, list("1234"), one, list("xxyy")) == (None, "only 1 group has labels")
    assert of_neighbors(latent, list("1234"), one, [None] * 4) == (None, "no cell has a label")


def test_a_tenth_of_the_groups_is_held_out():
    groups = np.repeat([f"d{i:02}" for i in range(30)], 10).astype(object)
    labels = np.array(["x", "y", "unknown", "x", "y"] * 60, object)
    held, why_not = hold_out(groups, labels, "unknown", seed=0)
    assert why_not == ""
    assert len(set(groups[held])) == 3
    assert not (labels[held] == "unknown").any()
    assert held.sum() == 3 * 8
    again, _ = hold_out(groups, labels, "unknown", seed=0)
    other, _ = hold_out(groups, labels, "unknown", seed=1)
    assert (held == again).all()
    assert (held != other).any()


def test_every_label_stays_covered():
    groups = np.array(["a"] * 4 + ["b"] * 4 + ["c"] * 4, object)
    labels = np.array([*"xy", "only a", *"xxy", "only b", *"xxyxx"], object)
    for seed in range(5):
        held, why_not = hold_out(groups, labels, "unknown", seed)
        assert set(groups[held]) == {"c"}
        assert why_not == ""
    labels[10] = "only c"
    held, why_not = hold_out(groups, labels, "unknown", 0)
    assert not held.any()
    assert why_not == "every group holds all cells of some label"
    held, why_not = hold_out(np.array(["a"] * 12, object), labels, "unknown", 0)
    assert (held.any(), why_not) == (False, "only 1 group has labels")


def test_a_classifier_is_written_and_read(tmp_path):
    shares = np.array([[0.7, 0.3], [0.4, 0.6], [0.9, 0.1]], np.float32)
    groups, labels = np.array(["g", "g", "h"], object), np.array(["x", "y", "y"], object)
    found = of_classifier(shares, ("x", "y"), ["1", "2", "3"], groups, labels)
    assert isinstance(found, Calibration)
    assert found.summary() | {"ece": 0} == {
        "method": "classifier",
        "cells": 3,
        "groups": ["g", "h"],
        "accuracy": 0.6667,
        "ece": 0,
        "bins": 15,
    }
    found.write(tmp_path / "calibration.parquet")
    table = pq.read_table(tmp_path / "calibration.parquet").to_pydict()
    assert table["predicted"] == ["x", "y", "x"]
    assert table["label"] == ["x", "y", "y"]
    assert table["probability"] == pytest.approx([0.7, 0.6, 0.9])
