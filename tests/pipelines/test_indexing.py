"""Indexes built and searched on Ray equal those of one process, row for row."""

from __future__ import annotations

import json

import numpy as np
import pytest
import ray

import pipelines as sv
from actors import searching
from actors.searching import SearchWorker, spread
from scviaduct.store import Store
from scviaduct.store.index import building, ensure_index
from tests.scviaduct.store.synthetic import DIGEST, Lab

CELLS, WIDTH = 2_000, 6
KEPT = {"tissue": "string"}


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store of 2,000 cells in ten units, with lists from 500 cells on."""
    monkeypatch.setattr(building, "IVF_FROM", 500)
    store = Store.create(tmp_path / "store")
    lab = Lab(store, store.create_space("atlas", DIGEST, WIDTH, ("type 0",)))
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(CELLS, WIDTH)) + 5 * rng.integers(0, 5, (CELLS, 1))
    done = [
        lab.stage(
            range(at, at + 200),
            latent=latent[at : at + 200],
            kept=KEPT,
            obs={"tissue": np.array(["lung", "skin", "gut"], object)[np.arange(at, at + 200) % 3]},
        )
        for at in range(0, CELLS, 200)
    ]
    lab.commit(*done, kept=KEPT)
    return store


def ask(store, **how):
    return sv.search(store.path, stored="source_row < 90", k=12, quiet=True, **how)


def test_ray_builds_and_searches_as_one_process_does(store, local_ray):
    one = sv.index(store.path, quiet=True)
    assert (one.state, one.cells, one.segments) == ("built", CELLS, 1)
    assert sv.index(store.path, quiet=True).state == "there already"
    selected = ask(store, where="tissue = 'lung'")
    made = sv.index(store.path, rebuild=True, engine="ray", workers=3, quiet=True)
    assert (made.state, made.cells, made.segments, made.lists) == ("built", CELLS, 3, one.lists)
    assert ask(store, where="tissue = 'lung'") == selected  # what is exact does not depend on the segments
    assert ask(store, actors=2) == ask(store)


def test_a_worker_holds_its_segments(store):
    index = ensure_index(store.space(), builder=building.Builder(workers=4))
    folder = store.space().path / "index" / f"{index.manifest.version}"
    assert len(index.segments) == 4
    worker = SearchWorker(index.manifest, str(folder), [1, 3], "cpu")
    assert worker.describe()["segments"] == [1, 3]
    found = worker.call("exact", np.zeros((2, WIDTH), np.float32), 5, None)
    assert set((found.slot >> 40).ravel().tolist()) <= {1, 3}
    rebuilt = ensure_index(store.space(), rebuild=True)
    late = SearchWorker(index.manifest, str(folder), [0], "cpu")  # as Ray starts one again
    with pytest.raises(FileNotFoundError):
        late.describe()
    assert SearchWorker(rebuilt.manifest, str(folder), [0], "cpu").describe()["segments"] == [0]


def test_actors_search_the_index_that_the_driver_opened(store, local_ray, monkeypatch):
    """One that is rebuilt in between is opened again by all; actors of the first try are ended."""
    ensure_index(store.space(), builder=building.Builder(workers=4))
    expected = ask(store, where="tissue = 'lung'")
    fans = []

    class Late(searching.Fan):
        def __init__(self, manifest, *rest):
            fans.append(self)
            if len(fans) == 1:
                ensure_index(store.space(), rebuild=True)
            super().__init__(manifest, *rest)

    monkeypatch.setattr(searching, "Fan", Late)
    assert ask(store, actors=1, where="tissue = 'lung'") == expected
    assert len(fans) == 2
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(fans[0]._actors[0].describe.remote())


@pytest.mark.parametrize(
    ("cells", "shares", "expected"),
    [
        ([5, 4, 3, 2], 2, [[0, 3], [1, 2]]),
        ([1], 4, [[0]]),
        ([1, 1, 1], 9, [[0], [1], [2]]),
        ([9, 1, 1], 1, [[0, 1, 2]]),
    ],
)
def test_segments_are_spread_by_their_cells(cells, shares, expected):
    assert spread(cells, shares) == expected


def test_the_index_command(store, capsys):
    from pipelines.cli import main

    for flags, said in (([], "built: 2,000 cells in 1 segments"), (["--json"], "there already")):
        with pytest.raises(SystemExit) as left:
            main(["index", str(store.path), *flags, "--quiet"])
        assert left.value.code == 0
        out = capsys.readouterr().out
        assert said in out
    assert json.loads(out)["recall"] >= 0.99
