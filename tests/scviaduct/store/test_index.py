"""The index beside a version: how many true neighbours it finds, and when it is built."""

from __future__ import annotations

import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from scviaduct.errors import InputError, StoreError
from scviaduct.store.index import IVF_FROM, Index, building, ensure_index, manifest, manifest_of
from scviaduct.store.index import rows as rows_module
from scviaduct.store.search import Queries, Searcher, search, stored_queries
from tests.scviaduct.store.synthetic import DIGEST, Lab, Store

CELLS, WIDTH, K = 22_000, 10, 30
KEPT = {"part": "string", "batch": "string"}


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    """22,000 cells in 20 clusters of unequal size and shape; the lab, their latents, and obs columns to filter on."""
    rng = np.random.default_rng(0)
    cluster = rng.choice(20, CELLS, p=rng.dirichlet(np.full(20, 2)))
    width = rng.uniform(0.2, 1, (20, WIDTH))
    latent = (rng.normal(size=(20, WIDTH)) * 3)[cluster] + rng.normal(size=(CELLS, WIDTH)) * width[cluster]
    latent = latent.astype(np.float32)
    near = np.argsort(((latent - latent[0]) ** 2).sum(axis=1))
    part = np.full(CELLS, "rest", object)
    part[near[: CELLS // 50]] = "one place"  # 2 %, all of them neighbours of each other
    batch = np.full(CELLS, "most", object)
    drawn = rng.permutation(CELLS)
    batch[drawn[: CELLS // 10]] = "tenth"
    batch[drawn[CELLS // 10 : CELLS // 10 + CELLS // 1000]] = "few"
    store = Store.create(tmp_path_factory.mktemp("atlas") / "store")
    lab = Lab(store, store.create_space("atlas", DIGEST, WIDTH, ("type 0",)))
    lab.commit(
        *(
            lab.stage(
                range(start, stop),
                latent=latent[start:stop],
                unmapped=[start],
                kept=KEPT,
                obs={"part": part[start:stop], "batch": batch[start:stop]},
            )
            for start, stop in ((0, 9_000), (9_000, CELLS))
        ),
        kept=KEPT,
    )
    latent[[0, 9_000]] = np.nan
    return lab, latent, {"part": part, "batch": batch}


def recall_of(hits, query, latent, chosen):
    """Share of the true neighbours among the selected cells that were found; and nothing but selected cells were."""
    chosen = np.flatnonzero(chosen & np.isfinite(latent).all(axis=1))
    k = min(K, len(chosen))
    squares = (query**2).sum(1)[:, None] + (latent[chosen] ** 2).sum(1) - 2 * query @ latent[chosen].T
    truth = chosen[np.argpartition(squares, k - 1, axis=1)[:, :k]]
    found = np.array([int(key[1:]) for key in hits.table["observation_id"].to_pylist()]).reshape(len(query), k)
    assert np.isin(found, chosen).all()
    assert all(len(set(row)) == k for row in found.tolist())
    distance = hits.table["distance"].to_numpy().reshape(found.shape)
    assert (np.diff(distance, axis=1) >= 0).all()
    expected = np.linalg.norm(query[:, None] - latent[found], axis=2)
    np.testing.assert_allclose(distance, expected, rtol=1e-3, atol=1e-3)
    return np.mean([np.isin(a, b).mean() for a, b in zip(truth, found, strict=True)])


FILTERS = {
    None: lambda obs: np.ones(CELLS, bool),
    "batch = 'few'": lambda obs: obs["batch"] == "few",
    "part = 'one place'": lambda obs: obs["part"] == "one place",
    "batch in ('tenth')": lambda obs: obs["batch"] == "tenth",
    "batch = 'most'": lambda obs: obs["batch"] == "most",
    "part = 'one place' and not batch = 'most'": lambda obs: (obs["part"] == "one place") & (obs["batch"] != "most"),
}


@pytest.mark.parametrize("planned", [True, False], ids=["as planned", "index through the filter"])
@pytest.mark.parametrize("where", FILTERS)
def test_neighbours_are_found(atlas, monkeypatch, where, planned):
    lab, latent, obs = atlas
    if not planned:
        monkeypatch.setattr(Searcher, "compares_all", lambda *_: False)
    rng = np.random.default_rng(1)
    picked = latent[rng.integers(1, 9_000, 100)]
    # half of the queries lie among the cells, half off; far off, a filter needs the more lists that its share asks for
    off = np.repeat([[0.01], [3.0 if where else 1.0]], 50, axis=0)
    query = (picked + off * rng.normal(size=picked.shape)).astype(np.float32)
    queries = Queries(["q"] * 100, [f"{i}" for i in range(100)], query)
    chosen = FILTERS[where](obs)
    hits = search(lab.space, queries, K, where=where)
    planned = planned and where is not None
    assert hits.method == ("exact on the selected cells" if planned else "IVF-Flat")
    assert hits.candidates == (chosen & np.isfinite(latent).all(axis=1)).sum()
    recall = recall_of(hits, query, latent, chosen)
    assert recall >= (1 if planned else 0.99)
    exact = search(lab.space, queries, K, where=where, exact=True)
    assert exact.method.startswith("exact")
    assert recall_of(exact, query, latent, chosen) == 1


@pytest.mark.parametrize("k", [1, K, 300])
@pytest.mark.parametrize("case", ["between clusters", "beyond them", "far away"])
def test_strange_cells_find_their_neighbours(atlas, case, k):
    """Cells that are like none that the index was calibrated with, whose neighbours are spread over many lists."""
    lab, latent, _ = atlas
    rng = np.random.default_rng(3)
    there = latent[np.isfinite(latent).all(axis=1)]
    one, other = there[rng.integers(0, len(there), (2, 200))]
    query = {"between clusters": (one + other) / 2, "beyond them": 1.5 * one, "far away": one + 30}[case]
    searcher = lab.space.searcher()
    found = searcher.neighbors(query, k)
    assert found.method == "IVF-Flat"
    truth = searcher.neighbors(query, k, exact=True).found.slot
    assert np.mean([np.isin(a, b).mean() for a, b in zip(truth, found.found.slot, strict=True)]) >= 0.99


def test_a_few_cells_apart_do_not_decide_how_far_all_look(tmp_path):
    """Their lists are so small that most of their neighbours are in others, which are far away."""
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(CELLS, WIDTH)) + 8 * rng.integers(0, 2, (CELLS, WIDTH))
    islands = np.repeat(30 * rng.normal(size=(60, WIDTH)), 8, axis=0)
    latent[: len(islands)] = islands + rng.normal(size=islands.shape)
    store = Store.create(tmp_path / "store")
    lab = Lab(store, store.create_space("atlas", DIGEST, WIDTH, ("type 0",)))
    lab.put(range(CELLS), latent=latent.astype(np.float32))
    searcher = lab.space.searcher()
    told = searcher.index.manifest
    assert told.recall >= 0.999
    assert told.probes < 0.25 * told.lists
    for cells, least in ((latent[: len(islands)], 0.9), (latent[-500:], 0.99)):
        query = cells.astype(np.float32)
        truth, found = (searcher.neighbors(query, K, exact=exact).found.slot for exact in (True, False))
        assert np.mean([np.isin(a, b).mean() for a, b in zip(truth, found, strict=True)]) >= least


@pytest.mark.parametrize("span", [0, 0.2, 0.6])
def test_what_is_found_does_not_depend_on_bounds(atlas, monkeypatch, span):
    lab, latent, _ = atlas
    index, query = ensure_index(lab.space), latent[1:300]
    assert 0 < index.manifest.span < 1
    told = []
    for value in (span, index.manifest.span, np.inf):
        searcher = Searcher(replace(index, manifest=replace(index.manifest, span=value)), "atlas")
        asked = asked_of(searcher, monkeypatch)
        told.append(searcher.neighbors(query, K).found)
        assert asked == ["probe"] * (1 if value == np.inf else 2)
        monkeypatch.undo()
    for one in told[:2]:
        for mine, without in zip(one, told[2], strict=True):
            np.testing.assert_array_equal(mine, without)


@pytest.mark.parametrize(
    ("query", "k", "message"),
    [
        (np.full((2, WIDTH), np.nan), 30, "query 0 is not a number"),
        (np.zeros((2, WIDTH + 1)), 30, "11 dimensions, atlas-.* has 10"),
        (np.zeros(WIDTH), 30, r"the shape \(10,\), atlas-.* has 10"),
        (np.zeros((2, WIDTH)), 0, "k = 0 asks for no neighbour"),
    ],
)
def test_what_cannot_be_compared_is_refused(atlas, query, k, message):
    lab, *_ = atlas
    with pytest.raises(InputError, match=message):
        lab.space.searcher().neighbors(query.astype(np.float32), k)


def test_an_index_of_an_older_format_is_built_anew(lab, monkeypatch):
    monkeypatch.setattr(building, "IVF_FROM", 1)
    lab.put(range(50))
    folder = ensure_index(lab.space) and lab.space.path / "index" / "1"
    told = json.loads((folder / "manifest.json").read_text())
    for name in ("reach", "span"):
        del told[name]
    (folder / "manifest.json").write_text(json.dumps(told | {"format": 2, "strange": 0}))
    for file in folder.glob("radii-*.npy"):
        file.unlink()
    assert manifest_of(lab.space) is None
    lab.put([50])  # a worker finds no lists to assign
    assert found_ids(lab) == {f"c{row}" for row in range(51)}
    assert found_ids(lab, as_of=1) == {f"c{row}" for row in range(50)}


@pytest.mark.parametrize("mapped", [1, 2])
def test_a_version_of_hardly_any_mapped_cell(lab, monkeypatch, mapped):
    monkeypatch.setattr(building, "IVF_FROM", 1)
    lab.commit(lab.stage(range(50), unmapped=range(mapped, 50)))
    assert found_ids(lab) == {f"c{row}" for row in range(mapped)}
    assert ensure_index(lab.space).manifest.recall == 1


def test_cells_that_are_all_alike(tmp_path):
    store = Store.create(tmp_path / "store")
    lab = Lab(store, store.create_space("atlas", DIGEST, WIDTH, ("type 0",)))
    latent = np.ones((IVF_FROM, WIDTH), np.float32)
    lab.commit(lab.stage(range(IVF_FROM), latent=latent))
    searcher = lab.space.searcher()
    assert searcher.index.manifest.recall == 1
    for query in (latent[:3], latent[:3] + 2):
        assert (searcher.neighbors(query, 5).found.position >= 0).all()


def test_the_index_knows_how_good_it_is(atlas):
    lab, *_ = atlas
    told = ensure_index(lab.space).manifest
    assert told == manifest_of(lab.space)
    assert (told.cells, told.dimensions, told.version) == (CELLS - 2, WIDTH, lab.space.head())
    assert told.cells >= IVF_FROM
    assert 0.99 <= told.recall <= 1
    assert 1 <= told.probes < told.lists


def asked_of(searcher, monkeypatch):
    """Names of what is asked of a searcher's slices, as it goes on."""
    asked, call = [], type(searcher._slices).call
    monkeypatch.setattr(type(searcher._slices), "call", lambda self, *told: asked.append(told[0]) or call(self, *told))
    return asked


def test_a_list_that_is_too_short_is_made_up(atlas, monkeypatch):
    """The lists of a query hold fewer cells than it asks for: all are compared then."""
    lab, latent, _ = atlas
    query = np.full((1, WIDTH), 100, np.float32)
    index = ensure_index(lab.space)
    searcher = Searcher(replace(index, manifest=replace(index.manifest, reach=0.0)), "atlas")
    monkeypatch.setattr("scviaduct.store.search.searcher.HELD", 0)
    asked = asked_of(searcher, monkeypatch)
    hits = searcher.search(Queries(["q"], ["0"], query), 5_000)
    assert asked == ["probe", "exact"]
    assert hits.table.num_rows == 5_000
    distance = np.sort(np.linalg.norm(latent[np.isfinite(latent).all(axis=1)] - query, axis=1))[:5_000]
    np.testing.assert_allclose(hits.table["distance"].to_numpy(), distance, rtol=1e-3)


def test_stored_cells_in_a_large_index(atlas):
    lab, *_ = atlas
    queries = stored_queries(lab.space, "batch = 'few'")
    found = search(lab.space, queries, 5).table
    assert len(found) == 5 * len(queries.ids) == 5 * (CELLS // 1000)
    assert all(row["query"] != row["observation_id"] for row in found.to_pylist())
    assert min(found["distance"].to_pylist()) > 0


# When it is built


def folders(lab):
    return sorted(path.name for path in (lab.space.path / "index").glob("*"))


def found_ids(lab, **how):
    queries = Queries(["q"], ["0"], np.zeros((1, 4), np.float32))
    return {row["observation_id"] for row in search(lab.space, queries, 100, **how).table.to_pylist()}


def test_a_newer_version_makes_it_stale(lab):
    lab.put(range(3))
    assert manifest_of(lab.space) is None
    assert found_ids(lab) == {"c0", "c1", "c2"}
    (vectors,) = (lab.space.path / "index" / "1").glob("*/vectors.f32")
    built = vectors.stat()
    assert found_ids(lab) == {"c0", "c1", "c2"}
    again = vectors.stat()
    assert (again.st_ino, again.st_mtime_ns) == (built.st_ino, built.st_mtime_ns)
    lab.put(range(2, 5), stamp=1, unmapped=[4])
    assert manifest_of(lab.space).version == 1
    assert found_ids(lab) == {"c0", "c1", "c2", "c3"}
    assert (manifest_of(lab.space).version, manifest_of(lab.space).cells) == (2, 4)
    assert found_ids(lab, as_of=1) == {"c0", "c1", "c2"}
    for number in range(2, 11):
        lab.put([number], stamp=number)
    found_ids(lab)
    assert manifest_of(lab.space).version == 11  # of all that are there, by number and not by letter


def test_old_indexes_are_removed(lab):
    for number in range(4):
        lab.put([number], stamp=number)
    for version in (1, 2):
        found_ids(lab, as_of=version)
    opened = ensure_index(lab.space, 1)
    assert folders(lab) == ["1", "2"]
    found_ids(lab)
    assert folders(lab) == ["2", "4"]
    assert opened.rows["observation_id"].to_pylist() == ["c0"]  # whoever has it open keeps it
    assert opened.vectors.shape == (1, 4)
    assert found_ids(lab, as_of=1) == {"c0"}  # and it is built again when it is asked for
    assert folders(lab) == ["1", "2", "4"]
    found_ids(lab, as_of=3)
    assert folders(lab) == ["3", "4"]


@pytest.mark.parametrize(
    "missing", ["manifest.json", "*/vectors.f32", "*/rows-*.arrow", "centroids-*.npy", "radii-*.npy"]
)
def test_an_index_that_is_removed_while_it_is_opened(lab, monkeypatch, missing):
    lab.put(range(50))
    monkeypatch.setattr(building, "IVF_FROM", 1)
    ensure_index(lab.space)
    opening, times = Index.open, []

    def remove_first(folder):
        times.append(folder)
        if len(times) == 1:
            (file,) = folder.glob(missing)
            file.unlink()
            if missing != "manifest.json":
                with pytest.raises(FileNotFoundError):
                    opening(folder)
            shutil.rmtree(folder)
        return opening(folder)

    monkeypatch.setattr(Index, "open", remove_first)
    assert found_ids(lab) == {f"c{row}" for row in range(50)}
    assert len(times) == 2
    assert folders(lab) == ["1"]


BROKEN = {
    "missing": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-8]),
}


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("linked", [False, True], ids=["opened", "linked from"])
def test_files_that_a_crash_cut_off_are_built_anew(lab, monkeypatch, how, linked):
    """None of them is searched, handed on to the next version's index, or keeps units from being staged."""
    monkeypatch.setattr(building, "IVF_FROM", 1)
    names = ["manifest.json", "centroids-*.npy", "centroids-*.json", "radii-*.npy"]
    names += [f"*/{name}" for name in ("vectors.f32", "offsets.i64", "members.i32", "segment.json")]
    names += ["*/rows-*.arrow", "*/counts-*.arrow"]
    lab.put(range(50))
    for number, name in enumerate(names):
        version = ensure_index(lab.space).manifest.version
        for file in (lab.space.path / "index" / f"{version}").glob(name):
            BROKEN[how](file)
        rows = 50
        if linked:
            lab.put([50], stamp=number)
            rows = 51
        manifest_of(lab.space)
        assert found_ids(lab) == {f"c{row}" for row in range(rows)}, name


def test_a_broken_index_that_cannot_be_removed_is_told(lab, monkeypatch):
    lab.put(range(3))
    found_ids(lab)
    (rows,) = (lab.space.path / "index" / "1").glob("*/rows-*.arrow")
    rows.unlink()

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(manifest, "_aside", refuse)
    with pytest.raises(StoreError, match=r"index of version 1 misses a file .*rows-.*\.arrow.* Remove '.*/index/1'"):
        found_ids(lab)
    with pytest.raises(StoreError, match=r"index '.*/index/1' cannot be replaced .*not permitted"):
        ensure_index(lab.space, rebuild=True)


def test_a_rebuild_replaces_what_another_builds_meanwhile(lab, monkeypatch):
    lab.put(range(3))
    folder = lab.space.path / "index" / "1"
    first = ensure_index(lab.space) and (folder / "manifest.json").stat().st_ino
    renaming, others = os.rename, []

    def rename(made, place):
        if place == folder and not others:
            others.append(place)
            ensure_index(lab.space)  # finds nothing there, and builds
            others.append((folder / "manifest.json").stat().st_ino)
        renaming(made, place)

    monkeypatch.setattr(os, "rename", rename)
    mine, flush = [], manifest.flush

    def noted(made):
        mine.append((made / "manifest.json").stat().st_ino)
        flush(made)

    monkeypatch.setattr(manifest, "flush", noted)
    ensure_index(lab.space, rebuild=True)
    assert (folder / "manifest.json").stat().st_ino == mine[0]
    assert len({first, others[1], mine[0]}) == 3
    assert folders(lab) == ["1"]


def test_text_that_repeats_is_stored_once(lab, monkeypatch):
    """Columns of any unit, with and without nulls; one whose values are too many stays plain."""
    monkeypatch.setattr(rows_module, "VALUES", 10)
    kept = {"few": "string", "many": "string", "none": "string"}
    obs = {"few": ["a", None, "b"] * 10, "many": [f"m{i}" for i in range(30)], "none": [None] * 30}
    other = {"few": ["c", "a", None], "many": ["m0", "m1", "x"], "none": [None] * 3}
    lab.commit(
        lab.stage(range(30), kept=kept, obs=obs, unmapped=[3]),
        lab.stage(range(30, 33), "e", 1, kept=kept, obs=other),
        kept=kept,
    )
    index = ensure_index(lab.space)
    kinds = {field.name: str(field.type) for field in index.rows.schema}
    coded = {name for name, kind in kinds.items() if kind.startswith("dictionary")}
    assert coded == {"source", "dataset_id", "label", "reference", "adapter", "unit", "run", "few", "none"}
    stored = [row for table in lab.space.read() for row in table.to_pylist() if row["latent"] is not None]
    assert index.rows.to_pylist() == [{k: v for k, v in row.items() if k != "latent"} for row in stored]
    unit = stored[-1]["unit"]
    for where, expected in {
        "few = 'a'": 10,
        "few is null": 11,
        "many = 'm1'": 2,
        "none is null": 32,
        "dataset_id in ('e', 'x')": 3,
        f"unit = '{unit}'": 3,
        "run = 'run' and reference < 'q' and source > 'a' and not label = 'type 1'": 29,
        "unit_row = 1 and source_row < 9": 1,
    }.items():
        assert len(found_ids(lab, where=where)) == expected == lab.space.count(f"({where}) and label is not null"), (
            where
        )
    queries = Queries(["q"], ["0"], np.zeros((1, 4), np.float32))
    assert not any(str(field.type).startswith("dict") for field in search(lab.space, queries, 5).table.schema)


def test_the_rows_of_an_index_are_small(atlas):
    lab, *_ = atlas
    ensure_index(lab.space)
    folder = lab.space.path / "index" / f"{lab.space.head()}"
    size = sum(file.stat().st_size for file in folder.glob("*/rows-*.arrow"))
    assert size / CELLS < 110


def test_builders_at_once_share_one(lab):
    lab.put(range(50))
    start = threading.Barrier(6)

    def look(_):
        start.wait()
        return found_ids(lab)

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(look, range(6)))
    assert results == [{f"c{row}" for row in range(50)}] * 6
    assert folders(lab) == ["1"]


def test_a_build_that_fails_leaves_nothing(lab, monkeypatch):
    lab.put(range(3))
    monkeypatch.setattr(building, "IVF_FROM", 1)

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(building.calibration, "calibrate", fail)
        with pytest.raises(OSError, match="No space left"):
            found_ids(lab)
    assert folders(lab) == []
    assert manifest_of(lab.space) is None


def test_more_cells_than_an_index_orders(lab, monkeypatch):
    lab.put(range(3))
    monkeypatch.setattr(building, "MOST", 2)
    with pytest.raises(StoreError, match=r"has 3 cells, more than the 2 that an index orders\. Map into several"):
        ensure_index(lab.space)
    assert folders(lab) == []


def test_what_a_killed_builder_left_does_not_matter(lab):
    lab.put(range(3))
    (lab.space.path / "index" / ".1.abcd").mkdir(parents=True)
    (lab.space.path / "index" / ".1.abcd" / "vectors.f32").write_bytes(b"half")
    assert found_ids(lab) == {"c0", "c1", "c2"}
    assert manifest_of(lab.space).version == 1
