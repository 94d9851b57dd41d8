"""The loops that compare queries with lists: what they find, whatever lists and queries are like."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from scviaduct.store.index.comparing import LAST, among, scan
from scviaduct.store.index.kernels import invert, pack
from scviaduct.store.index.scanning import _EVERY, Block, Found, Nearest, frozen, scan_blocks, scan_lists

SIZES = (0, 1, 15, 16, 17, 63, 0, 64, 65, 127, 255, 256, 257, 320, 700)
"""Vectors of each list: none, less than a register, and around every size that a loop takes at a time."""


class Lab:
    """Vectors in lists, perhaps some dead, and what is near to queries by comparing one after the other."""

    def __init__(self, d, queries, seed=0, ties=False, dead=True):
        rng = np.random.default_rng(seed)
        n = sum(SIZES)
        vectors = rng.normal(size=(n, d)).astype(np.float32)
        if ties:
            vectors = vectors[rng.integers(0, 6, n)]  # there are more of each than a query has places
        self.latent = np.ascontiguousarray(vectors[rng.integers(0, n, queries)] + np.float32(0.25))
        self.offsets = np.concatenate([[0], np.cumsum(SIZES)])
        self.x = np.empty(n * d, np.float32)
        pack(vectors, np.arange(n), self.offsets, self.x)
        self.members = np.stack([rng.integers(0, 3, n), rng.permutation(n)], axis=1).astype(np.int32)
        self.bases = np.array([4_000_000_000, 0, -1 if dead else 1_000_000])
        self.mask = rng.random(n) < 0.5
        start = self.bases[self.members[:, 0]]
        self.live, self.position = start >= 0, start + self.members[:, 1]
        wide = np.broadcast_to(vectors, (queries, n, d)), np.broadcast_to(self.position, (queries, n))
        self.key = among(*map(np.ascontiguousarray, wide), self.latent)
        self.vectors = vectors

    def block(self, *, masked):
        arrays = (self.x, self.offsets, self.members, self.bases, self.mask if masked else _EVERY)
        return Block(*map(frozen, arrays), 5 << 40)

    def expected(self, k, seen):
        """Keys and slots of the k nearest that are seen, bool of shape ``(n_queries, n)``; -1 for none."""
        key = np.where(seen & self.live, self.key, np.uint64(2**64 - 1))
        order = np.argsort(key, axis=1, kind="stable")[:, :k]
        key = np.take_along_axis(key, order, axis=1)
        return key, np.where(key == 2**64 - 1, -1, (5 << 40) + order)


def keys(found):
    """What was found, as keys."""
    bits = found.distance.view(np.uint32).astype(np.uint64)
    key = (bits << np.uint64(32)) | found.position.astype(np.uint64)
    return np.where(found.slot < 0, np.uint64(2**64 - 1), key)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("d", "queries", "k"), [(30, 9, 30), (1, 1, 1), (7, 3, 5), (10, 6, 200), (3, 4, 4000)])
def test_all_vectors(d, queries, k, masked, dead, ties):
    lab = Lab(d, queries, ties=ties, dead=dead)
    found = scan_blocks([lab.block(masked=masked)], lab.latent, k)
    key, slot = lab.expected(k, lab.mask if masked else np.ones(len(lab.members), bool))
    missing = slot < 0
    np.testing.assert_array_equal(keys(found)[:, : key.shape[1]], key)
    np.testing.assert_array_equal(found.slot[:, : key.shape[1]], slot)
    assert (found.slot[:, key.shape[1] :] == -1).all()
    assert np.isinf(found.distance[found.slot < 0]).all()
    assert (found.position[found.slot < 0] == LAST).all()
    plain = np.square(lab.latent[:, None].astype(np.float64) - lab.vectors[np.where(missing, 0, slot & 0xFFFFFF)])
    close = np.isclose(found.distance[:, : key.shape[1]], plain.sum(axis=2), rtol=1e-6)
    assert close[~missing].all()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("queries", [1, 2, 3, 4, 5, 40])
def test_lists_of_each_query(queries, dead, ties):
    lab = Lab(30, queries, seed=queries, ties=ties, dead=dead)
    rng = np.random.default_rng(2)
    order = np.array([rng.permutation(len(SIZES)) for _ in range(queries)])
    upto = rng.integers(0, len(SIZES) + 1, queries)
    found = scan_lists([lab.block(masked=False)], lab.latent, 30, order, upto)
    of = np.repeat(np.arange(len(SIZES)), SIZES)
    seen = np.array([np.isin(of, lists[:n]) for lists, n in zip(order, upto, strict=True)])
    key, slot = lab.expected(30, seen)
    np.testing.assert_array_equal(keys(found), key)
    np.testing.assert_array_equal(found.slot, slot)


@pytest.mark.parametrize("dead", [False, True])
def test_blocks_are_one_as_another(dead):
    """In two halves, the same is found as at once."""
    lab = Lab(30, 9, ties=True, dead=dead)
    whole = scan_blocks([lab.block(masked=False)], lab.latent, 30)
    nearest, every = Nearest.none(9, 30), (np.zeros(0, np.int64), np.zeros(0, np.int32))
    for mask in (lab.mask, ~lab.mask):
        block = lab.block(masked=False)._replace(mask=frozen(mask))
        scan(*block[:5], *every, lab.latent, *nearest, block.first)
    for one, other in zip(nearest.found(), whole, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dead", [False, True])
def test_several_blocks(dead, ties):
    """One after the other, the same is found as in each of them, merged."""
    lab = Lab(30, 9, ties=ties, dead=dead)
    one = lab.block(masked=False)
    other = one._replace(bases=frozen(np.where(one.bases < 0, -1, one.bases // 2 + 7_000_000)), first=6 << 40)
    apart = Found.merged([scan_blocks([block], lab.latent, 30) for block in (other, one)], 30)
    for mine, expected in zip(scan_blocks([other, one], lab.latent, 30), apart, strict=True):
        np.testing.assert_array_equal(mine, expected)


def test_queries_of_each_list():
    starts, queries = invert(np.array([[2, 0], [2, 1], [0, 2]]), np.array([2, 1, 0]), 3)
    assert starts.tolist() == [0, 1, 1, 3]
    assert queries.tolist() == [0, 0, 1]


SCRIPT = """
import sys
import numpy as np
sys.path.insert(0, {root!r})
from tests.scviaduct.store.test_comparing import Lab, keys
from scviaduct.store.index.scanning import scan_blocks
lab = Lab(30, 9)
np.save({out!r}, keys(scan_blocks([lab.block(masked=False)], lab.latent, 30)))
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="names a processor of x86-64")
def test_a_processor_without_avx512_gives_the_same_bits(tmp_path, request):
    lab = Lab(30, 9)
    here = keys(scan_blocks([lab.block(masked=False)], lab.latent, 30))
    out = str(tmp_path / "found.npy")
    code = SCRIPT.format(root=str(request.config.rootpath), out=out)
    told = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | told)
    np.testing.assert_array_equal(np.load(out), here)
