"""Labels and their uncertainty against formulas worked out by hand or by another library."""

from __future__ import annotations

import faiss
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


@pytest.mark.parametrize("away", [1e2, 1e4, 1e6])
def test_a_cell_far_from_all_voters_gets_the_label_of_the_nearest(away):
    rng = np.random.default_rng(1)
    latent = rng.normal(size=(200, 10)).astype(np.float32)
    latent[100:] += 5
    vote = NeighborVote(latent, ["a"] * 100 + ["b"] * 100, 15)
    (near,) = vote.probabilities(np.full((1, 10), away, np.float32))
    assert near.tolist() == [0, 1]  # e**-745 is the least that float64 holds, and each weight would be less


@pytest.mark.parametrize("n", [1, 3])
def test_fewer_reference_cells_than_neighbours(n):
    vote = NeighborVote(np.eye(3, dtype=np.float32)[:n], ["a"] * n, 15)
    np.testing.assert_allclose(vote.probabilities(np.zeros((2, 3), np.float32)), 1)


@pytest.fixture(params=[20, 128_000])
def faiss_multiplies(request):
    """The number of cells from which faiss takes distances from a matrix product: as it was once, and as it is."""
    before = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = request.param
    yield
    faiss.cvar.distance_compute_blas_threshold = before


@pytest.mark.parametrize("kind", ["spread", "far from zero", "heaps"])
@pytest.mark.usefixtures("faiss_multiplies")
def test_a_vote_does_not_depend_on_the_other_cells(kind):
    """The last bits of a matrix product depend on place and number of the cells."""
    rng = np.random.default_rng(0)
    latent, query = (rng.normal(size=(n, 10)).astype(np.float32) for n in (4000, 1500))
    if kind == "far from zero":
        latent, query = latent + 360, query + 360
    if kind == "heaps":  # more voters at one distance than candidates
        latent[::20], query[:50] = latent[0], latent[0] + 0.5
    vote = NeighborVote(latent, [f"type {i % 5}" for i in range(len(latent))], 15)
    whole = vote.probabilities(query)
    for rows in (*(np.arange(n) for n in (1, 2, 5, 19, 20, 21, 777)), rng.permutation(1500), np.arange(1030, 1100)):
        part = vote.probabilities(query[rows])
        assert (part == whole[rows]).all()
        told, expected = Certainty.of(part), Certainty.of(whole)
        for figure in ("label", "probability", "margin", "entropy"):
            assert (getattr(told, figure) == getattr(expected, figure)[rows]).all()


def test_equally_near_voters_are_taken_in_their_order():
    latent = np.repeat(np.eye(3, dtype=np.float32), 40, axis=0)
    labels = ["first" if i % 40 < 15 else "last" for i in range(120)]
    vote = NeighborVote(latent, labels, 15)
    found = vote.probabilities(np.eye(3, dtype=np.float32))
    np.testing.assert_allclose(found[:, vote.labels.index("first")], 1)


@pytest.mark.usefixtures("faiss_multiplies")
def test_neighbours_among_which_faiss_cannot_tell():
    """Two heaps 2,000 apart and 0.1 wide: the products of their norms leave squared distances wrong by 0.1."""
    rng = np.random.default_rng(0)
    latent, query = ((rng.normal(size=(n, 5)) * 0.1 + 1000 * (-1) ** np.arange(n)[:, None]) for n in (600, 60))
    latent, query = latent.astype(np.float32), query.astype(np.float32)
    vote = NeighborVote(latent, [str(i) for i in range(600)], 5)
    _, found = NearestNeighbors(n_neighbors=5, algorithm="brute").fit(latent.astype(np.float64)).kneighbors(query)
    named = [{int(vote.labels[j]) for j in np.flatnonzero(row)} for row in vote.probabilities(query)]
    assert named == [set(row.tolist()) for row in found]
