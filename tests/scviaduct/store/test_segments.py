"""What an index takes over from an older one, and that a search finds the same whatever it is made of."""

from __future__ import annotations

import os
import sys
from itertools import pairwise

import numpy as np
import pytest

from scviaduct.store.index import Index, building, ensure_index
from scviaduct.store.index.assigned import assigned
from scviaduct.store.index.quantizer import Quantizer, imbalance
from scviaduct.store.index.scanning import Found, scan_all
from scviaduct.store.index.segments import Task
from scviaduct.store.search import Queries, Searcher, Slice
from scviaduct.store.search.device import DeviceVectors
from scviaduct.store.search.selection import at_most, selected
from scviaduct.store.where import parse_where
from tests.scviaduct.store.synthetic import DIGEST, Lab, Store

WIDTH, CELLS, UNIT = 7, 3_000, 300
KEPT = {"tissue": "string", "primary": "bool", "depth": "double"}


def latents(cells, seed=0, shift=0.0):
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(1).normal(size=(12, WIDTH)) * 4
    return (centers[rng.integers(0, 12, cells)] + rng.normal(size=(cells, WIDTH)) + shift).astype(np.float32)


def obs_of(rows):
    rows = np.asarray(rows)
    tissue = np.array(["lung", "skin", None, "gut"], object)[rows % 7 % 4]
    return {"tissue": tissue, "primary": rows % 3 == 0, "depth": rows / CELLS}


@pytest.fixture
def space(tmp_path, monkeypatch):
    """A lab of an empty space, whose index has lists from 500 cells on; what stages its units."""
    monkeypatch.setattr(building, "IVF_FROM", 500)
    store = Store.create(tmp_path / "store")
    lab = Lab(store, store.create_space("atlas", DIGEST, WIDTH, ("type 0",)))
    lab.latent = latents(CELLS)

    def put(start, stop, *, stamp=0, latent=None, unmapped=(), builder=None):
        wide = lab.latent if latent is None else latent
        done = [
            lab.stage(
                range(at, min(at + UNIT, stop)),
                stamp=stamp,
                latent=wide[at : min(at + UNIT, stop)],
                unmapped=unmapped,
                kept=KEPT,
                obs=obs_of(range(at, min(at + UNIT, stop))),
            )
            for at in range(start, stop, UNIT)
        ]
        lab.commit(*done, run=f"{stamp:02x}{start:04x}", kept=KEPT)
        return ensure_index(lab.space, builder=builder)

    lab.cells = put
    return lab


def inodes(index, lab):
    """Files of each segment's vectors."""
    folder = lab.space.path / "index" / f"{index.manifest.version}"
    return {part.id: (folder / part.id / "vectors.f32").stat().st_ino for part in index.manifest.parts}


def asked(lab, **how):
    rng = np.random.default_rng(3)
    latent = lab.latent[rng.integers(0, CELLS, 80)] + rng.normal(size=(80, WIDTH)).astype(np.float32) * 0.1
    return Queries(["q"] * 80, [f"{i}" for i in range(80)], latent.astype(np.float32), **how)


FILTERS = ["tissue = 'lung'", "tissue in ('skin', 'gut') and not primary", "depth < 0.3", "tissue is null", "primary"]


def exact_hits(lab, where=None):
    return lab.space.searcher().search(asked(lab), 20, where, exact=True).table


# What is taken over


def test_an_append_writes_its_own_cells_alone(space, monkeypatch):
    first = space.cells(0, 2_100)
    before = inodes(first, space)
    written = []
    run = Task.run

    def noted(task):
        written.append(task.names)
        return run(task)

    monkeypatch.setattr(Task, "run", noted)
    second = space.cells(2_100, CELLS)
    after = inodes(second, space)
    assert before.items() <= after.items()
    assert [len(names) for names in written] == [3]
    assert second.manifest.quantizer == first.manifest.quantizer
    assert second.manifest.cells == CELLS
    appended = exact_hits(space), {where: exact_hits(space, where) for where in FILTERS}
    probed = space.space.searcher().search(asked(space), 20)
    rebuilt = ensure_index(space.space, rebuild=True)
    assert len(rebuilt.segments) == 1
    assert set(inodes(rebuilt, space)).isdisjoint(after)
    assert appended == (exact_hits(space), {where: exact_hits(space, where) for where in FILTERS})
    again = space.space.searcher().search(asked(space), 20)
    truth = set(zip(*(exact_hits(space)[name].to_pylist() for name in ("query", "observation_id")), strict=True))
    for hits in (probed, again):
        assert hits.method == "IVF-Flat"
        found = set(zip(*(hits.table[name].to_pylist() for name in ("query", "observation_id")), strict=True))
        assert len(found & truth) >= 0.99 * len(truth)


def test_replaced_cells_are_masked_then_left_out(space):
    first = space.cells(0, CELLS)
    fresh = latents(CELLS, seed=9)
    second = space.cells(0, 600, stamp=1, latent=fresh)  # 20 % of the segment
    assert inodes(first, space).items() <= inodes(second, space).items()
    assert [part.whole for part in second.manifest.parts].count(False) == 1
    assert second.manifest.cells == CELLS
    masked = exact_hits(space), {where: exact_hits(space, where) for where in FILTERS}
    assert second.rows["observation_id"].to_pylist() == [f"c{row}" for row in range(CELLS)]
    np.testing.assert_array_equal(second.vectors, np.concatenate([fresh[:600], space.latent[600:]]))
    ensure_index(space.space, rebuild=True)
    assert masked == (exact_hits(space), {where: exact_hits(space, where) for where in FILTERS})
    space.cells(600, 1_500, stamp=1, latent=fresh)  # by the last index's one segment: 30 %
    index = Index.open(space.space.path / "index" / f"{space.space.head()}")
    assert all(part.whole for part in index.manifest.parts)
    np.testing.assert_array_equal(index.vectors, np.concatenate([fresh[:1_500], space.latent[1_500:]]))


def test_small_segments_are_put_together(space, monkeypatch):
    monkeypatch.setattr(building, "SEGMENTS", 4)
    counts = [len(space.cells(at, at + UNIT, stamp=at).segments) for at in range(0, CELLS, UNIT)]
    assert max(counts) <= 4
    index = ensure_index(space.space)
    np.testing.assert_array_equal(index.vectors, space.latent)
    assert index.rows["observation_id"].to_pylist() == [f"c{row}" for row in range(CELLS)]


def test_what_is_put_together_is_not_cut_for_the_workers_again(space, monkeypatch):
    monkeypatch.setattr(building, "SEGMENTS", 2)
    many = building.Builder(workers=4)
    space.cells(0, 1_800, builder=many)
    written, run = [], Task.run
    monkeypatch.setattr(Task, "run", lambda task: (written.append(len(task.names)), run(task))[1])
    units, segments = [], []
    for at in range(1_800, CELLS, UNIT):
        written.clear()
        segments.append(len(space.cells(at, at + UNIT, stamp=at, builder=many).segments))
        units.append(sum(written))
    assert segments == [4, 3, 4, 3]
    assert units == [1, 4, 1, 4]


def test_small_segments_are_put_together_beside_many_new_cells(space, monkeypatch):
    monkeypatch.setattr(building, "SEGMENTS", 2)
    bounds = (0, 900, 1_200, 1_500, CELLS)
    for start, stop in pairwise(bounds):
        index = space.cells(start, stop, stamp=start, builder=building.Builder(workers=3))
    assert sorted(len(part.bases) for part in index.manifest.parts) == [1, 2, 2, 2, 3]
    np.testing.assert_array_equal(index.vectors, space.latent)


def test_segments_are_copied_where_links_are_refused(space, monkeypatch):
    before = inodes(space.cells(0, 2_100), space)

    linking = os.link

    def refuse(old, new):
        if "index" in old.parts:
            raise PermissionError(1, "Operation not permitted")  # as fs.protected_hardlinks does
        linking(old, new)

    monkeypatch.setattr(os, "link", refuse)
    index = space.cells(2_100, CELLS)
    assert len(index.segments) == 2
    assert before.keys() <= inodes(index, space).keys()
    assert set(before.values()).isdisjoint(inodes(index, space).values())
    np.testing.assert_array_equal(index.vectors, space.latent)


def test_lists_that_were_not_written_whole_are_assigned_by_the_build(space, monkeypatch):
    """A unit is staged whatever becomes of them."""
    space.cells(0, 1_200)
    build = building.ensure_index
    for path, (start, stop) in {"emptied": (1_200, 1_500), "refused": (1_500, 1_800)}.items():
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[__name__], "ensure_index", lambda *_, **__: None)
            if path == "refused":
                patch.setattr("scviaduct.store.index.assigned.np.savez", lambda *_, **__: _no_space())
            space.cells(start, stop)
        for file in (space.space.path / "lists").rglob("*.npz"):
            file.write_bytes(b"" if path == "emptied" else file.read_bytes()[:100])
        assert not list((space.space.path / "lists").rglob(".*"))
        np.testing.assert_array_equal(build(space.space).vectors, space.latent[:stop])


def _no_space():
    raise OSError(28, "No space left on device")


def test_a_derived_column_writes_rows_and_no_vectors(space, monkeypatch):
    before = inodes(space.cells(0, CELLS), space)
    stage = space.stage([CELLS], latent=space.latent[:1], kept={"more": "int64"}, obs={"more": [5]})
    space.commit(stage, kept={"more": "int64"})
    index = ensure_index(space.space)
    assert before.items() <= inodes(index, space).items()
    assert index.rows["more"].to_pylist() == [None] * CELLS + [5]
    assert index.rows["depth"].to_pylist()[:2] == [0, 1 / CELLS]


def test_cells_that_drift_get_new_centroids(space):
    first = space.cells(0, 900)
    second = space.cells(900, 1_500, latent=latents(CELLS, seed=2, shift=30.0))
    assert second.manifest.quantizer != first.manifest.quantizer
    assert len(second.segments) == 1
    assert second.quantizer.trained.cells == 1_500


def test_drift_says_why():
    centroids = latents(16)
    quantizer = Quantizer.train(latents(2_000), 2_000, 1)
    trained, lists = quantizer.trained, len(quantizer.centroids)
    even = np.full(lists, 2_000 // lists)
    assert quantizer.drift(even, trained.distance * even.sum()) == ""
    assert "cells, trained on 2,000" in quantizer.drift(5 * even, 0.0)
    assert "mean squared distance" in quantizer.drift(even, 2 * trained.distance * even.sum())
    lopsided = np.zeros(lists, np.int64)
    lopsided[0] = 2_000
    assert "imbalance" in quantizer.drift(lopsided, 0.0)
    assert imbalance(even) == pytest.approx(1)
    assert Quantizer(centroids, np.ones(16, np.float32), trained).digest != quantizer.digest


def test_workers_assign_lists_once_there_are_some(space):
    first = space.cells(0, 1_200)
    folder = space.space.path / "lists"
    assert not folder.exists()
    second = space.cells(1_200, CELLS, unmapped=[1_300])
    (centroids,) = folder.iterdir()
    assert centroids.name == first.manifest.quantizer
    assert len(list(centroids.glob("*/*.npz"))) == 6
    for name in space.space.snapshot().pairs:
        told = assigned(space.space.path, centroids.name, name, UNIT)
        if told is not None:
            lists, squares = told
            assert len(lists) == UNIT
            assert squares > 0
    written = min(second.segments.values(), key=lambda segment: segment.bases.max() < 1_200)
    assert len(written.members) == CELLS - 1_200 - 1
    found, _ = second.quantizer.assign(written.vectors(np.arange(len(written.members))), 1)
    np.testing.assert_array_equal(found, np.repeat(np.arange(len(written.sizes)), written.sizes))
    (space.space.path / "lists" / "strange").mkdir()
    ensure_index(space.space, rebuild=True)
    assert list(folder.iterdir()) == [centroids]  # which the index of the version before still has


# What is found does not depend on what holds it


@pytest.mark.parametrize("where", [None, *FILTERS])
@pytest.mark.parametrize("exact", [True, False])
def test_slices_together_find_what_one_finds(space, monkeypatch, where, exact):
    monkeypatch.setattr(Searcher, "compares_all", lambda *_: False)
    for at in range(0, CELLS, 1_000):
        space.cells(at, at + 1_000, stamp=at)
    folder = space.space.path / "index" / f"{space.space.head()}"
    index = Index.open(folder)
    assert len(index.segments) == 3

    parts = ([0, 2], [1])
    slices = [Slice(Index.open(folder, part)) for part in parts]

    class Apart:
        def call(self, method, *arguments):
            return [getattr(one, method)(*arguments) for one in slices]

        def at(self, slots, method):
            shares = [np.flatnonzero(np.isin(slots >> 40, part)) for part in parts]
            return [(at, getattr(one, method)(slots[at])) for one, at in zip(slices, shares, strict=True)]

    one, two = Searcher(index, "atlas"), Searcher(index, "atlas", Apart())
    queries = asked(space)
    assert two.search(queries, 20, where, exact=exact) == one.search(queries, 20, where, exact=exact)
    if where:
        mine, theirs = one.stored(where, 50), two.stored(where, 50)
        assert (mine.ids, mine.own.tolist()) == (theirs.ids, theirs.own.tolist())
        np.testing.assert_array_equal(mine.latent, theirs.latent)


@pytest.mark.parametrize("threads", [1, 3])
def test_ties_follow_positions(space, threads):
    space.latent = np.repeat(latents(CELLS // 10, seed=4), 10, axis=0)
    space.cells(0, 1_500)
    space.cells(1_500, CELLS)
    searcher = space.space.searcher(threads=threads)
    found = searcher.neighbors(np.repeat(space.latent[[0, 1_600]], 100, axis=0), 7).found
    assert (found.position[:100] == np.arange(7)).all()
    assert (found.position[100:] == np.arange(1_600, 1_607)).all()
    assert (found.distance == 0).all()


def test_a_device_finds_what_the_exact_search_finds(space, monkeypatch):
    monkeypatch.setattr("scviaduct.store.search.device._CELLS", 700)
    monkeypatch.setattr("scviaduct.store.search.device._QUERIES", 33)
    shift = np.float32(2_000)  # products lose six digits there
    for far in (0, shift):
        space.cells(0, CELLS, stamp=int(far), latent=space.latent + far)
        space.cells(0, 300, stamp=int(far) + 1, latent=latents(300, seed=8) + far)
        index = ensure_index(space.space)
        assert not all(part.whole for part in index.manifest.parts)
        held = DeviceVectors(index.segments, "cpu")
        for k in (1, 30, CELLS):
            query = asked(space).latent + far
            for mine, theirs in zip(held.nearest(query, k), scan_all(index.segments, query, k), strict=True):
                np.testing.assert_array_equal(mine, theirs)
        assert held.nearest(query[:0], 5).distance.shape == (0, 5)
        answer = Slice(index, device=held).exact(query, 5, None)
        np.testing.assert_array_equal(answer.slot, scan_all(index.segments, query, 5).slot)


def test_found_is_merged_by_distance_then_position():
    a = Found(np.float32([[1, 2, 3]]), np.array([[5, 1, 9]]), np.array([[10, 11, 12]]))
    b = Found(np.float32([[1, 2, 2]]), np.array([[4, 0, 2]]), np.array([[20, 21, 22]]))
    merged = Found.merged([a, b], 4)
    assert merged.position.tolist() == [[4, 5, 0, 1]]
    assert merged.slot.tolist() == [[20, 10, 21, 11]]


# Plans


@pytest.mark.parametrize("where", [*FILTERS, "tissue = 'lung' or primary", "tissue != 'lung' and primary"])
def test_counts_bound_what_is_selected(space, where):
    space.cells(0, CELLS)
    (segment,) = ensure_index(space.space).segments.values()
    terms = parse_where(where, segment.table.schema).terms
    most, elements = at_most(segment, terms), selected(segment, where)
    counts = np.diff(np.searchsorted(elements, segment.offsets))
    assert (counts <= most).all()
    if len(terms) == 1 and where not in ("depth < 0.3", "tissue = 'lung' or primary"):
        np.testing.assert_array_equal(counts, most)  # known without looking at a cell
    ids = {segment.table["observation_id"][int(element)].as_py() for element in elements}
    assert ids == {
        row for table in space.space.read(["observation_id"], where) for row in table["observation_id"].to_pylist()
    }


@pytest.mark.parametrize("where", [None, "primary"])
def test_queries_are_probed_in_parts(space, monkeypatch, where):
    space.cells(0, CELLS)
    monkeypatch.setattr(Searcher, "compares_all", lambda *_: False)
    whole = space.space.searcher().search(asked(space), 20, where)
    monkeypatch.setattr("scviaduct.store.search.searcher._QUERIES", 7)
    monkeypatch.setattr("scviaduct.store.search.searcher._PLANS", 2)
    searcher = space.space.searcher()
    assert searcher.search(asked(space), 20, where) == whole
    for value in range(4):
        searcher.search(asked(space), 3, f"depth < 0.{value}1")
    assert list(searcher._plans) == ["depth < 0.21", "depth < 0.31"]


@pytest.mark.parametrize("queries", [1, 80])
def test_a_filtered_search_says_what_it_measured(space, monkeypatch, queries):
    space.cells(0, CELLS)
    searcher = space.space.searcher()
    planned = searcher.search(asked(space), 20, "primary")
    assert (planned.method, planned.recall, planned.measured) == ("exact on the selected cells", 1, "")
    monkeypatch.setattr(Searcher, "compares_all", lambda *_: False)
    hits = searcher.search(asked(space), 20, "primary")
    assert hits.measured == "64 of these queries, with this condition"
    assert hits.recall >= 0.99
    found = set(zip(*(hits.table[name].to_pylist() for name in ("query", "observation_id")), strict=True))
    truth = set(zip(*(planned.table[name].to_pylist() for name in ("query", "observation_id")), strict=True))
    assert len(found & truth) >= 0.99 * len(truth)
    assert searcher.search(asked(space), 20).measured == "1024 of the index's cells, for 30 neighbours"
