"""Kill -9 at every point of a run while a reader polls: in the end every cell is there once, and never was in part.

The run is the real one: a driver in a process of its own with a Ray of its own. A fault ends the first process that
reaches its point; what reads, encodes, stages and records is a worker, what commits is the driver.
"""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import pytest

from scviaduct.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
CELLS = 1500
SHARD = 10  # small, so that a driver is killed amid its units however fast they go
UNITS = CELLS // SHARD


class Reader(threading.Thread):
    """Polls a store and notes every state it saw: version to number of cells, read cell by cell."""

    def __init__(self, store: Path) -> None:
        super().__init__(daemon=True)
        self.store, self.seen, self.errors, self.polls = store, {}, [], 0
        self._stop_asked = threading.Event()

    def run(self):
        while not self._stop_asked.is_set():
            try:
                self.poll()
            except Exception as error:  # noqa: BLE001 - whatever a reader meets is what this test is about
                self.errors.append(repr(error))
            time.sleep(0.05)

    def poll(self):
        if not list(self.store.glob("spaces/*/space.json")):
            return
        space = Store.open(self.store).space()
        version = space.snapshot().version
        ids = [key for table in space.read(["observation_id"], as_of=version) for key in table[0].to_pylist()]
        assert len(ids) == len(set(ids)), f"version {version} holds a cell twice"
        self.seen.setdefault(version, set()).add(len(ids))
        self.polls += 1

    def stop(self):
        self._stop_asked.set()
        self.join()
        return self


@pytest.fixture
def polled(tmp_path):
    reader = Reader(tmp_path / "store")
    reader.start()
    yield tmp_path / "store", reader
    reader.stop()


@pytest.fixture
def command(symphony, pbmc, tmp_path):
    """The whole file in small shards, with two actors."""
    job = tmp_path / "job.toml"
    store = tmp_path / "store"
    job.write_text(
        f'source = "{symphony}"\nreference = "{pbmc.path}"\nstore = "{store}"\n'
        f'keep_obs = ["assay"]\nshard_cells = {SHARD}\nactors = 2\nreaders = 1\naddress = "local"\n'
    )
    return ["map", "--job", job]


def settled(store):
    """Number of completed units once the workers, which outlive their driver for a moment, have ended as well."""
    since, done = time.monotonic(), -1
    while time.monotonic() - since < 5:
        found = len(list(store.glob("spaces/*/units/*/*.json")))
        if found != done:
            since, done = time.monotonic(), found
        time.sleep(0.1)
    return done


def complete(store):
    ids = [key for table in Store.open(store).space().read(["observation_id"]) for key in table[0].to_pylist()]
    return len(ids) == len(set(ids)) == CELLS


def test_killed_while_reading_after_staging_inside_the_commit_and_after_it(cli, command, polled, tmp_path):
    store, reader = polled
    marks = {name: tmp_path / name for name in ("read", "staged", "latents-committed", "committed")}
    first = cli(*command, SCVIADUCT_FAULT=",".join(f"{name}@{marks[name]}" for name in marks if name != "committed"))
    assert first.returncode == -signal.SIGKILL, first.stderr
    assert all(marks[name].exists() for name in ("read", "staged", "latents-committed"))
    assert reader.poll() is None
    assert set().union(*reader.seen.values()) == {0}  # everything is staged, and nothing of it is visible

    second = cli(*command, SCVIADUCT_FAULT=f"committed@{marks['committed']}")
    assert second.returncode == -signal.SIGKILL, second.stderr
    assert complete(store)

    third = cli(*command)
    assert third.returncode == 0, third.stderr
    assert "nothing to do" in third.stdout
    assert complete(store)
    found = reader.stop()
    assert found.errors == []
    assert set().union(*found.seen.values()) == {0, CELLS}
    assert all(len(sizes) == 1 for sizes in found.seen.values())


def test_killed_while_encoding_after_recording_and_the_driver_amid_the_run(cli, command, polled, tmp_path):
    store, reader = polled
    marks = {name: tmp_path / name for name in ("encode", "recorded")}
    driver = cli(*command, background=True, SCVIADUCT_FAULT=",".join(f"{name}@{path}" for name, path in marks.items()))
    deadline = time.monotonic() + 240
    while len(list(store.glob("spaces/*/units/*/*.json"))) < 4 and driver.poll() is None:
        assert time.monotonic() < deadline, "no unit was completed"
        time.sleep(0.01)
    driver.kill()
    driver.communicate()
    done = settled(store)
    assert 4 <= done < UNITS, "the driver ended before it could be killed"
    assert all(path.exists() for path in marks.values())
    assert Store.open(store).space().head() == 0

    again = cli(*command, "--json")
    assert again.returncode == 0, again.stderr
    assert complete(store)
    import json

    assert json.loads(again.stdout)["mapped_units"] == UNITS - done  # only what was missing
    found = reader.stop()
    assert found.errors == []
    assert set().union(*found.seen.values()) <= {0, CELLS}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupt_stops_cleanly_and_says_how_to_go_on(number, cli, command, tmp_path):
    store = tmp_path / "store"
    driver = cli(*command, background=True)
    deadline = time.monotonic() + 240
    while not list(store.glob("spaces/*/units/*/*.json")) and driver.poll() is None:
        assert time.monotonic() < deadline, "no unit was completed"
        time.sleep(0.01)
    driver.send_signal(number)
    _, told = driver.communicate(timeout=60)
    assert driver.returncode == 130, told
    assert "run the same command to go on" in told
    assert "Traceback" not in told
    # Whole files only: what is there has a record, or is a temporary file that nothing names.
    status = cli("status", store, "--json")
    assert '"state": "open"' in status.stdout
    finished = cli(*command)
    assert finished.returncode == 0, finished.stderr
    assert complete(store)
