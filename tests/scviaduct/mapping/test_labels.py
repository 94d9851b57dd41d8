"""Labels and their uncertainty against formulas worked out by hand or by another library."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import entropy
from sklearn.neighbors import NearestNeighbors

from scviaduct.mapping.labels import Certainty, NeighborVote


def test_certainty_is_what_the_probabilities_say():
    probabilities = np.array([[0.7, 0.2, 0.1], [1, 0, 0], [1 / 3, 1 / 3, 1 / 3]], np.float32)
    found = Certainty.of(probabilities)
    assert found.label.tolist() == [0, 0, 0]
    np.testing.assert_allclose(found.probability, [0.7, 1, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(found.margin, [0.5, 1, 0], atol=1e-6)
    np.testing.assert_allclose(found.entropy, [entropy(row) for row in probabilities], rtol=1e-5, atol=1e-7)


def test_one_label_is_certain():
    found = Certainty.of(np.ones((2, 1), np.float32))
    assert found.margin.tolist() == [1, 1]
    assert found.entropy.tolist() == [0, 0]


def test_vote_equals_the_formula_on_exact_neighbours():
    rng = np.random.default_rng(0)
    latent, query = rng.normal(size=(200, 5)).astype(np.float32), rng.normal(size=(30, 5)).astype(np.float32)
    labels = [None if i % 7 == 0 else f"type {i % 3}" for i in range(200)]
    vote = NeighborVote(latent, labels, 15)
    assert vote.labels == ("type 0", "type 1", "type 2")
    voting = [i for i in range(200) if i % 7]
    distance, found = NearestNeighbors(n_neighbors=15).fit(latent[voting]).kneighbors(query)
    weight = np.exp(-distance / (2 / distance.std(axis=1, keepdims=True)) ** 2)
    weight /= weight.sum(axis=1, keepdims=True)
    expected = np.array(
        [
            [w[[labels[voting[j]] == name for j in row]].sum() for name in vote.labels]
            for w, row in zip(weight, found, strict=True)
        ]
    )
    np.testing.assert_allclose(vote.probabilities(query), expected, atol=1e-5)


@pytest.mark.parametrize("n", [1, 3])
def test_fewer_reference_cells_than_neighbours(n):
    vote = NeighborVote(np.eye(3, dtype=np.float32)[:n], ["a"] * n, 15)
    np.testing.assert_allclose(vote.probabilities(np.zeros((2, 3), np.float32)), 1)
