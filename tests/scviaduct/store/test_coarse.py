"""Which lists queries look into: those within reach, whatever centroids and queries are like."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from scviaduct.store.index.coarse import Coarse
from scviaduct.store.index.quantizer import Quantizer, Trained

REACH = 1.3


class Lab:
    """Centroids with radii, and queries among them; every fifth centroid is there twice.

    They are in two halves, so far ``apart``.
    """

    def __init__(self, lists, d=30, queries=9, seed=0, apart=0):
        rng = np.random.default_rng(seed)
        centroids = rng.normal(size=(lists, d)).astype(np.float32)
        centroids[lists // 2 :] += np.float32(apart)
        centroids[5::5] = centroids[4:-1:5][: len(centroids[5::5])]
        radii = rng.uniform(0.5, 1.5, lists).astype(np.float32)
        latent = np.ascontiguousarray(centroids[rng.integers(0, lists, queries)] + np.float32(0.3))
        self.know(centroids, radii, rng.integers(0, 40, lists), latent)

    def know(self, centroids, radii, sizes, latent):
        self.radii, self.sizes, self.latent = radii, sizes, latent
        self.quantizer = Quantizer(centroids, radii, Trained(1, 1.0, 1.0))
        self.coarse = Coarse.of(self.quantizer)
        # Squared distances as they are compared: those of all centroids, in their order.
        found = self.coarse.compare(latent, len(centroids))
        self.square = np.empty((len(latent), len(centroids)), np.float32)
        np.put_along_axis(self.square, found.position, found.distance, axis=1)

    def nearest(self, row, least):
        """Squared distance and radius of the nearest list that holds enough cells, together with all nearer ones."""
        for square in np.unique(row):
            if self.sizes[row <= square].sum() >= least:
                break
        return square, self.radii[np.flatnonzero(row == square)[0]]

    def expected(self, reach, least):
        """Lists of each query, one after the other."""
        told = []
        for row in self.square:
            square, radius = self.nearest(row, least)
            more = np.float32(reach) * radius * max(np.sqrt(square), radius)
            told.append(np.flatnonzero(row <= square + more))
        return told


@pytest.mark.parametrize("least", [0, 100, 10**6])
@pytest.mark.parametrize("queries", [1, 3, 4, 9])
@pytest.mark.parametrize("lists", [1, 2, 17, 63, 64, 65, 128, 700])
def test_lists_within_reach(lists, queries, least):
    lab = Lab(lists, queries=queries, seed=lists)
    found = lab.coarse.within(lab.latent, REACH, lab.sizes, least)
    expected = lab.expected(REACH, least)
    assert found.upto.tolist() == [len(one) for one in expected]
    for order, upto, one in zip(found.order, found.upto, expected, strict=True):
        np.testing.assert_array_equal(order[:upto], one)
    assert found.held.tolist() == [lab.sizes[one].sum() for one in expected]
    square, radius = np.array([lab.nearest(row, least) for row in lab.square], np.float32).T
    np.testing.assert_array_equal(found.square, square)
    np.testing.assert_array_equal(found.radius, radius)
    np.testing.assert_array_equal(found.mean, square + radius**2)
    np.testing.assert_array_equal(found.spread, radius * np.maximum(np.sqrt(square), radius))


@pytest.mark.parametrize("apart", [1, 8, 30, 1e6])
def test_lists_far_from_each_other(apart):
    """At 8, products tell distances to .02, and 3 % of the queries have a list in doubt; beyond, they are not used."""
    lab = Lab(300, queries=999, apart=apart)
    found = lab.coarse.within(lab.latent, REACH, lab.sizes, 50)
    for order, upto, one in zip(found.order, found.upto, lab.expected(REACH, 50), strict=True):
        np.testing.assert_array_equal(order[:upto], one)


@pytest.mark.parametrize("seed", range(5))
def test_lists_at_the_bound(seed):
    """Sixty centroids are the nearest, and 200 lie at the bound, but for what rounding makes of that."""
    rng = np.random.default_rng(seed)
    latent = (3 + rng.normal(size=(1, 30))).astype(np.float32)
    away = rng.normal(size=(260, 30))
    away *= np.repeat([1, np.sqrt(1 + REACH)], [60, 200])[:, None] / np.linalg.norm(away, axis=1, keepdims=True)
    centroids = (latent + rng.permutation(away)).astype(np.float32)
    lab = Lab(1)
    lab.know(centroids, np.ones(260, np.float32), np.full(260, 50), latent)
    (expected,) = lab.expected(REACH, 50)
    found = lab.coarse.within(latent, REACH, lab.sizes, 50)
    assert 65 < len(expected) < 250
    assert found.square == lab.square.min()
    np.testing.assert_array_equal(found.order[0], expected)


def test_a_query_beyond_all_lists_looks_further():
    """All that it can find is about as far as the nearest."""
    lab = Lab(700)
    near = lab.coarse.within(lab.latent, REACH, lab.sizes, 0).upto
    far = lab.coarse.within(lab.latent + np.float32(20), REACH, lab.sizes, 0).upto
    assert far.mean() > 2 * near.mean()


def test_no_query():
    lab = Lab(70)
    found = lab.coarse.within(lab.latent[:0], REACH, lab.sizes, 10)
    assert found.order.shape == (0, 0)
    assert len(found.upto) == len(found.held) == len(found.radius) == 0


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_look_into_the_same_lists(threads):
    lab = Lab(300, queries=999)
    told = lab.coarse.within(lab.latent, REACH, lab.sizes, 50, threads=threads)
    expected = lab.expected(REACH, 50)
    assert told.upto.tolist() == [len(one) for one in expected]
    for order, upto, one in zip(told.order, told.upto, expected, strict=True):
        np.testing.assert_array_equal(order[:upto], one)
    assert len(told.held) == len(told.radius) == 999


def test_many_lists_of_many_queries():
    """More than there is room for to begin with."""
    lab = Lab(300, queries=50)
    found = lab.coarse.within(lab.latent, 1e6, lab.sizes, 0)
    assert (found.upto == 300).all()
    assert (found.order == np.arange(300)).all()


@pytest.mark.parametrize("lists", [3, 70])
def test_distances_beyond_what_a_float_holds(lists):
    lab = Lab(lists)
    found = lab.coarse.within(lab.latent + np.float32(1e25), REACH, lab.sizes, 0)
    assert (found.upto == lists).all()
    assert (found.order == np.arange(lists)).all()


def test_some_lists_of_an_index():
    lab = Lab(300)
    chosen = np.arange(7, 300, 3)
    some = lab.coarse.among(chosen)
    order = np.argsort(lab.square[:, chosen], axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(some.nearest(lab.latent, 5), chosen[order])
    every = some.within(lab.latent, 1e6, lab.sizes, 0)
    assert (every.order == chosen).all()
    assert (every.held == lab.sizes[chosen].sum()).all()


SCRIPT = """
import sys
import numpy as np
sys.path.insert(0, {root!r})
from tests.scviaduct.store.test_coarse import REACH, Lab
lab = Lab(700)
np.savez({out!r}, *lab.coarse.within(lab.latent, REACH, lab.sizes, 100))
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="names a processor of x86-64")
def test_a_processor_without_avx512_looks_into_the_same_lists(tmp_path, request):
    lab = Lab(700)
    here = lab.coarse.within(lab.latent, REACH, lab.sizes, 100)
    out = str(tmp_path / "lists.npz")
    code = SCRIPT.format(root=str(request.config.rootpath), out=out)
    told = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | told)
    there = np.load(out)
    for one, other in zip(here, (there[name] for name in there.files), strict=True):
        np.testing.assert_array_equal(one, other)
