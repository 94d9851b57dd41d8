"""Commits: every cell is there once, with what was said of it last; every older version reads as it was."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scviaduct.errors import StoreError
from scviaduct.store import Space, Store, committing
from scviaduct.store.staging import record_path
from tests.scviaduct.store.synthetic import Lab, process

ROOT = Path(__file__).parents[3]


def files_of(lab, table):
    folder = lab.space.path / table
    return {str(path.relative_to(folder)) for path in folder.glob("_units/**/*") if path.is_file()}


def stamped(rows, stamp, dataset="d"):
    return {(dataset, f"c{row}"): stamp for row in rows}


# Staging


def test_of_two_attempts_the_first_wins(lab):
    first = lab.stage(range(4), run="first")
    second = lab.stage(range(4), run="second")
    assert second == first
    assert files_of(lab, "latents") == files_of(lab, "cells") == {first.cells.path}
    lab.commit(second)
    (table,) = lab.space.read(["run"])
    assert set(table["run"].to_pylist()) == {"first"}


def test_of_many_attempts_at_once_one_wins(lab):
    start = threading.Barrier(8)

    def attempt(number):
        start.wait()
        return lab.stage(range(4), run=f"{number}")

    with ThreadPoolExecutor(8) as pool:
        (winner,) = set(pool.map(attempt, range(8)))
    assert files_of(lab, "latents") == files_of(lab, "cells") == {winner.cells.path}
    assert lab.space.completions([winner.unit]) == {winner.unit: winner}


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("table", ["latents", "cells"])
def test_a_damaged_file_is_not_committed_but_staged_anew(lab, table, damage):
    lab.put(range(2))
    good, bad = lab.stage(range(2, 4), stamp=1), lab.stage(range(1, 3), dataset="e", stamp=1)
    DAMAGES[damage](lab.space.path / table / bad.cells.path)
    calls = []
    with pytest.raises(StoreError, match=f"unit {bad.unit} is missing or has another size") as error:
        lab.commit(good, bad, before=lambda: calls.append(1))
    assert "Nothing was committed" in error.value.remedy
    assert (lab.space.head(), lab.stamps(), calls) == (1, stamped(range(2), 0), [])
    assert lab.space.completions([good.unit, bad.unit]) == {good.unit: good}
    mended = lab.stage(range(1, 3), dataset="e", stamp=1)
    assert mended.cells.path != bad.cells.path
    assert lab.commit(good, mended) == 2
    assert lab.stamps() == stamped(range(2), 0) | stamped(range(2, 4), 1) | stamped(range(1, 3), 1, "e")


def test_a_unit_without_a_record_is_not_done(lab):
    done = lab.stage(range(4))
    assert lab.space.completions([done.unit, "f" * 32]) == {done.unit: done}
    record_path(lab.space.path, done.unit).unlink()
    assert lab.space.completions([done.unit]) == {}


# Replacement


def test_the_same_commit_again_does_nothing(lab):
    calls = []
    completions = [lab.stage(range(3)), lab.stage(range(3, 5))]
    assert not lab.space.is_visible(completions)
    for _ in range(3):
        assert lab.commit(*completions, before=lambda: calls.append(1)) == 1
        assert lab.space.is_visible(completions)
    # each attempt leaves its record, whatever it found to do
    assert (calls, len(lab.space.versions())) == ([1] * 3, 1)


def test_a_commit_that_another_one_took_over_leaves_one_record(lab):
    """The same units become visible between this one's record and its own commit."""
    completion = lab.stage(range(3))
    rival = Lab(lab.store, Space(lab.space.path))
    calls = []

    def interfere():
        calls.append(1)
        rival.commit(completion)

    assert lab.commit(completion, before=interfere) == 1
    assert calls == [1]


def test_a_unit_of_the_same_cells_replaces_the_file(lab):
    lab.put(range(5))
    old = files_of(lab, "cells")
    new = lab.stage(range(5), stamp=1)
    lab.commit(new)
    assert [pair.cells.path for pair in lab.space.snapshot().pairs.values()] == [new.cells.path]
    assert files_of(lab, "cells") == old | {new.cells.path}  # nothing was rewritten, and the past keeps its file
    assert (lab.stamps(), lab.stamps(1)) == (stamped(range(5), 1), stamped(range(5), 0))


def test_other_cuts_rewrite_what_is_left(lab):
    kept, obs = {"whole": "int64"}, {"whole": range(10)}
    lab.put(range(10), kept=kept, obs=obs, unmapped=())
    before = lab.space.head()
    lab.commit(lab.stage([3, 4], stamp=1), lab.stage([9, 20], stamp=1), lab.stage([0], dataset="e", stamp=1))
    assert lab.space.head() == before + 1
    expected = stamped(range(10), 0) | stamped([3, 4, 9, 20], 1) | stamped([0], 1, "e")
    assert lab.stamps() == expected
    left = next(table for table in lab.space.read(where="dataset_id = 'd'") if table["run"][0].as_py() == "0000")
    rows = [0, 1, 2, 5, 6, 7, 8]
    assert left.select(["unit_row", "source_row", "whole"]).to_pydict() == dict.fromkeys(
        ["unit_row", "source_row", "whole"], rows
    )
    assert len(set(left["unit"].to_pylist())) == 1
    assert lab.stamps(before) == stamped(range(10), 0)


def test_a_source_replaces_only_its_own(lab):
    lab.put(range(3))
    lab.put(range(3), dataset="e", stamp=1)
    lab.commit(lab.stage(range(3), stamp=1, source="file:///other.h5ad"), run="x")
    assert lab.space.count() == 9
    assert lab.space.count("source = 'file:///other.h5ad' and label = 'type 1'") == 3


def test_cells_without_a_latent_are_replaced_like_others(lab):
    lab.put(range(4), unmapped=range(4))
    assert lab.space.count("label is null") == 4
    lab.put(range(1, 3), stamp=1, unmapped=[2])
    assert lab.space.count("label is null") == 3
    lab.put(range(4), stamp=2)
    assert lab.stamps() == stamped(range(4), 2)


def test_a_unit_is_cut_however_often(lab):
    lab.put(range(25))
    for row in range(16):
        lab.put([row], stamp=row + 1)
    assert lab.stamps() == stamped(range(25), 0) | {("d", f"c{row}"): row + 1 for row in range(16)}
    assert lab.stamps(10) == stamped(range(25), 0) | {("d", f"c{row}"): row + 1 for row in range(9)}


def test_what_is_left_of_a_unit_in_two_ways_is_two_files(lab):
    """Rows 0 to 7 of a file stay both times: once after the first and the last cell went, once after the last two."""
    unit = lab.stage(range(10))
    lab.commit(unit)
    lab.put([0], stamp=1)
    lab.put([9], stamp=2)
    lab.commit(unit)
    lab.put([8, 9], stamp=3)
    assert lab.stamps() == stamped(range(8), 0) | stamped([8, 9], 3)
    assert lab.stamps(3) == stamped([0], 1) | stamped(range(1, 9), 0) | stamped([9], 2)


ROWS = st.lists(st.integers(0, 9), min_size=1, max_size=5)
RUNS = st.lists(st.tuples(st.sampled_from("de"), ROWS), min_size=1, max_size=4)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(RUNS, st.booleans()), min_size=2, max_size=5), st.data())
def test_any_runs_leave_each_cell_once_and_the_past_as_it_was(runs, data):
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab.make(folder)
        model, past, staged = {}, {0: {}}, []

        def commit(units):
            version = lab.commit(*(completion for completion, _ in units))
            for _, cells in units:
                model.update(cells)
            past.setdefault(version, dict(model))
            assert lab.stamps() == model
            assert lab.space.snapshot().cells == len(model)
            assert lab.space.head() == version

        for stamp, (cuts, partly) in enumerate(runs):
            units, taken = [], set()
            for dataset, rows in cuts:
                left = sorted({row for row in rows if (dataset, row) not in taken})
                taken |= {(dataset, row) for row in left}
                if left:
                    units.append((lab.stage(left, dataset, stamp), stamped(left, stamp, dataset)))
            staged.append(units)
            if partly:
                commit(units[:1])  # the others are in quarantine at first
            commit(units)
            commit(data.draw(st.sampled_from(staged), label="a run that is started again"))
        for version, expected in past.items():
            assert lab.stamps(version) == expected


# Two tables, one commit point


def test_what_a_dead_writer_left_is_dropped(lab):
    lab.put(range(4))

    def die():
        raise KeyboardInterrupt

    dead = lab.stage(range(2, 8), stamp=1)
    with pytest.raises(KeyboardInterrupt):
        lab.commit(dead, before=die)
    orphan = lab.space._latents.load()
    assert (orphan.number, dead.latents.path in orphan.files) == (2, True)
    assert (lab.space.head(), lab.stamps()) == (1, stamped(range(4), 0))
    lab.put(range(3, 5), stamp=2)
    assert lab.stamps() == stamped(range(3), 0) | stamped(range(3, 5), 2)
    named = {pair.latents.path for pair in lab.space.snapshot().pairs.values()}
    assert set(lab.space._latents.load().files) == named
    lab.commit(dead)
    assert lab.stamps() == stamped(range(2), 0) | stamped(range(2, 8), 1)
    assert lab.stamps(1) == stamped(range(4), 0)


def test_the_record_is_written_before_anything_is_visible(lab):
    seen = []
    lab.put(range(3))
    lab.commit(lab.stage(range(2, 6), stamp=1), before=lambda: seen.append((lab.space.head(), lab.stamps())))
    assert seen == [(1, stamped(range(3), 0))]


def test_a_version_between_reading_and_writing_is_not_lost(lab):
    """The other writer commits at the worst moment: after this one's latents, before its cells."""
    lab.put(range(4))
    rival = Lab(lab.store, Space(lab.space.path))
    calls = []

    def interfere():
        calls.append(1)
        rival.put(range(2, 6), stamp=2)

    version = lab.commit(lab.stage(range(3, 8), stamp=1), before=interfere)
    assert (version, calls) == (3, [1])
    assert lab.stamps() == stamped(range(2), 0) | stamped([2], 2) | stamped(range(3, 8), 1)
    assert lab.stamps(2) == stamped(range(2), 0) | stamped(range(2, 6), 2)


@pytest.mark.parametrize("own", [True, False], ids=["column of its own", "same column"])
def test_a_column_that_is_added_meanwhile(lab, own):
    rival = Lab(lab.store, Space(lab.space.path))
    other = "theirs" if own else "ours"

    def interfere():
        rival.put(range(2), dataset="e", stamp=1, kept={other: "int64"}, obs={other: [1, 2]})

    kept = {"ours": "int64"}
    lab.commit(lab.stage(range(3), kept=kept, obs={"ours": [7, 8, 9]}), kept=kept, before=interfere)
    assert lab.stamps() == stamped(range(3), 0) | stamped(range(2), 1, "e")
    assert lab.space.count("ours >= 7") == 3
    assert lab.space.count(f"{other} <= 2") == 2


def test_writers_at_once_all_land(lab):
    """Eight writers, each over cells of its own and over some that all of them cover."""
    start = threading.Barrier(8)

    def write(number):
        mine = Lab(lab.store, Space(lab.space.path))
        completion = mine.stage([*range(3), 10 + number], stamp=number)
        start.wait()
        return mine.commit(completion, run=f"{number}")

    with ThreadPoolExecutor(8) as pool:
        versions = list(pool.map(write, range(8)))
    assert sorted(versions) == list(range(1, 9))
    last = versions.index(8)
    assert lab.stamps() == stamped(range(3), last) | {("d", f"c{10 + number}"): number for number in range(8)}
    for version in range(1, 9):
        assert len(lab.stamps(version)) == 3 + version


def test_the_same_run_at_once_is_one_version(lab):
    lab.put(range(3))
    completions = [lab.stage(range(2, 5), stamp=1), lab.stage(range(5, 7), stamp=1)]
    start = threading.Barrier(6)

    def write(_):
        start.wait()
        return Lab(lab.store, Space(lab.space.path)).commit(*completions, run="b2")

    with ThreadPoolExecutor(6) as pool:
        assert set(pool.map(write, range(6))) == {2}
    assert [entry["run"] for entry in lab.space.versions()] == ["b2", "0000"]
    assert lab.stamps() == stamped(range(2), 0) | stamped(range(2, 7), 1)


def write_four(folder, first):
    store = Store.open(folder)
    lab = Lab(store, store.space())
    for stamp in range(first, first + 4):
        lab.put([*range(stamp, stamp + 4), 100 + stamp], stamp=stamp)


def test_processes_at_once_lose_nothing(lab):
    writers = [process(write_four, lab.store.path, first) for first in (0, 4)]
    counts = {}
    while any(writer.is_alive() for writer in writers):
        snapshot = lab.space.snapshot()
        assert len(lab.stamps(snapshot.version)) == snapshot.cells
        counts[snapshot.version] = snapshot.cells
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert lab.space.head() == 8
    assert len(counts) > 1
    found = lab.stamps()
    assert {key: stamp for key, stamp in found.items() if int(key[1][1:]) >= 100} == {
        ("d", f"c{100 + stamp}"): stamp for stamp in range(8)
    }
    assert len(found) == 11 + 8
    assert all(0 <= int(key[1:]) - stamp < 4 for (_, key), stamp in found.items() if int(key[1:]) < 100)


def test_ids_of_all_fresh_units_of_a_dataset_may_be_joined(lab):
    """Together they may come to 2 GiB, which plain strings do not hold."""
    lab.put(range(5))
    (pair,) = lab.space.snapshot().pairs.values()
    assert committing._observation_ids(lab.space.path / "cells" / pair.cells.path).type == pa.large_string()


# A full disk

FULL = """
import os, sys
from pathlib import Path
from scviaduct.store import Store
from tests.scviaduct.store.synthetic import DIMENSIONS, Lab, np

folder = Path(sys.argv[1])
lab = Lab.make(folder / "store")
lab.put(range(50))
staged, fresh = lab.stage(range(40, 90), stamp=1), lab.stage(range(90, 95), stamp=1)

def files():
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

def fill():
    with (folder / "filler").open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12):
            try:
                while file.write(b"x" * size) == size:
                    pass
            except OSError:
                pass

def fails(what):
    fill()
    before = files()
    try:
        what()
    except OSError as error:  # which the command line tells, with its exit status
        print(type(error).__name__, error)
    else:
        raise SystemExit("it should have failed")
    assert files() == before, files() ^ before
    assert lab.space.head() == 1 and len(lab.stamps()) == 50
    (folder / "filler").unlink()

noise = np.random.default_rng(0).normal(size=(3_000, DIMENSIONS))
fails(lambda: lab.stage(range(200, 3_200), stamp=2, latent=noise))
fails(lambda: lab.commit(staged))  # while it rewrites what is left of an older unit
fails(lambda: lab.commit(fresh))  # while it writes the log
fails(lambda: lab.store.record(lab.record(lab.plan([lab.unit([1])]))))
fails(lambda: lab.store.begin_run(lab.plan([lab.unit([1])]), lab.space.name))
assert lab.store.records() == [] and lab.store.runs() == []
assert lab.commit(staged) == 2
assert len(lab.stamps()) == 90 and len(lab.stamps(1)) == 50
print("mended")
"""


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    mount = f'mount -t tmpfs -o size=8m none {tmp_path} && exec {sys.executable} -c "$0" {tmp_path}'
    probe = subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "none", tmp_path], check=False, capture_output=True
    )
    if probe.returncode:
        pytest.skip(f"needs a file system of its own, which only root can mount: {probe.stderr.decode().strip()}")
    command = ["unshare", "-m", "sh", "-c", mount, FULL]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("mended\n")
    assert done.stdout.lower().count("no space left on device") == 5, done.stdout
