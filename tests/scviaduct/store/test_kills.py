"""SIGKILL at every named point while a reader polls: nothing is lost, nothing is there twice, no part is ever seen."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from scviaduct.store import Store
from scviaduct.store.staging import record_path
from tests.scviaduct.store.synthetic import Lab, process

OLD = {("d", f"c{row}"): 0 for row in range(12)}
CUTS = [range(4), range(6, 10), range(10, 20)]
NEW = OLD | {("d", f"c{row}"): 1 for cut in CUTS for row in cut}
KEPT = {"whole": "int64"}


def run(folder):
    """The run over ``CUTS``, as a driver does it: what is missing is staged, then all is committed with its record."""
    store = Store.open(folder)
    lab = Lab(store, store.space())
    plan = lab.plan([lab.unit(cut, stamp=1) for cut in CUTS], run="b2")
    store.begin_run(plan, lab.space.name)
    done = lab.space.completions(unit.id for unit in plan.units)
    staged = 0
    for unit, cut in zip(plan.units, CUTS, strict=True):
        if unit.id not in done:
            done[unit.id] = lab.stage(cut, stamp=1, run="b2")
            staged += 1
    records = []

    def before():
        records.append(1)
        store.record(lab.record(plan))

    version = lab.commit(*done.values(), run="b2", kept=KEPT, before=before)
    return staged, len(records), version


def run_and_die(folder, fault):
    os.environ["SCVIADUCT_FAULT"] = fault
    run(folder)


def kill(folder, point, marker):
    """Run until the point in another process, which ends there."""
    killed = process(run_and_die, folder, f"{point}@{marker}")
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert marker.exists()


class Reader(threading.Thread):
    """Polls the store as ``status`` and ``search`` do, and keeps what it saw of every version."""

    def __init__(self, folder):
        super().__init__(daemon=True)
        self._store, self._end = Store.open(folder), threading.Event()
        self.seen, self.states, self.polls, self.problem = {}, [], 0, None
        self.start()

    def run(self):
        space = self._store.space()
        lab = Lab(self._store, space)
        try:
            while True:
                last = self._end.is_set()
                head = space.head()
                self.seen.setdefault(head, lab.stamps(head))
                assert lab.stamps(head) == self.seen[head]
                assert space.snapshot(head).cells == len(self.seen[head])
                assert all(entry["cells"] in (len(OLD), len(NEW)) for entry in space.versions())
                state = {found["run"]: found["state"] for found in self._store.runs()}.get("b2")
                if [state] != self.states[-1:]:
                    self.states.append(state)
                self.polls += 1
                if last:
                    return
        except BaseException as error:  # noqa: BLE001 - told to the test, which fails with it
            self.problem = error

    def close(self):
        self._end.set()
        self.join()
        if self.problem is not None:
            raise self.problem


# Point to: units with a record after the death, units that the second attempt stages, what a reader sees meanwhile,
# records of runs after the death and after the second attempt.
POINTS = {
    "staged": (0, 3, OLD, 0, 1),
    "recorded": (1, 2, OLD, 0, 1),
    "latents-committed": (3, 0, OLD, 0, 1),
    "committed": (3, 0, NEW, 1, 2),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_driver_goes_on(tmp_path, point):
    recorded, staged, visible, records, records_after = POINTS[point]
    folder = tmp_path / "store"
    lab = Lab.make(folder)
    lab.put(range(12), run="a1", kept=KEPT, obs={"whole": range(12)})
    reader = Reader(folder)
    try:
        kill(folder, point, tmp_path / "marker")
        assert lab.stamps() == visible
        units = [lab.unit(cut, stamp=1).id for cut in CUTS]
        assert sum(record_path(lab.space.path, unit).exists() for unit in units) == recorded
        assert len(lab.store.records()) == records
        (found,) = (found for found in lab.store.runs() if found["run"] == "b2")
        assert (found["state"], found["units_done"]) == ("committed" if records else "open", recorded)

        polls = reader.polls
        again, wrote, version = run(folder)
        assert (again, wrote) == (staged, records_after - records)
        assert lab.stamps() == NEW
        assert lab.space.head() == version
        assert run(folder) == (0, 1, version)  # each attempt leaves its record, and no version if it finds nothing new
        assert len(lab.store.records()) == records_after + 1
    finally:
        reader.close()
    assert reader.polls > polls > 0
    assert all(seen in (OLD, NEW) for seen in reader.seen.values())
    assert reader.seen[version] == NEW
    assert [state for state in reader.states if state] == ["open", "committed"]
    if not records:  # a death before the commit point leaves no version: the second attempt makes the next one
        assert OLD in reader.seen.values()
    assert [entry["run"] for entry in lab.space.versions()] == ["b2", "a1"]


@pytest.mark.parametrize("point", ["latents-committed", "committed"])
def test_another_run_after_a_killed_one(tmp_path, point):
    """What the dead driver left does not mix with what comes next, and its own run can still be finished."""
    folder = tmp_path / "store"
    lab = Lab.make(folder)
    lab.put(range(12), run="a1")
    kill(folder, point, tmp_path / "marker")
    lab.put(range(8, 12), stamp=2, run="c3")
    third = {("d", f"c{row}"): 2 for row in range(8, 12)}
    assert lab.stamps() == (NEW if point == "committed" else OLD) | third
    run(folder)
    assert lab.stamps() == NEW
    assert [entry["run"] for entry in lab.space.versions()][:2] == ["b2", "c3"]
