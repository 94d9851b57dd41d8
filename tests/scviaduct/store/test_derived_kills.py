"""SIGKILL at every named point of a derivation: no part of it is ever seen, and the same again completes it."""

from __future__ import annotations

import os
import signal

import pytest

from scviaduct.store import Store
from scviaduct.store.derivedstaging import record_path
from tests.scviaduct.store.deriving import Deriver, check
from tests.scviaduct.store.synthetic import Lab, process

CELLS = {(0, row) for row in range(14)}


def run(folder, units):
    """What a driver does, over all units; how many were staged, and the version."""
    store = Store.open(folder)
    return Deriver(Lab(store, store.space()), units=units).derive(settle=True)


def run_and_die(folder, units, fault):
    os.environ["SCVIADUCT_FAULT"] = fault
    run(folder, units)


def kill(folder, units, fault, marker):
    """Derive until the fault in another process, which ends there."""
    killed = process(run_and_die, folder, units, f"{fault}@{marker}")
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert marker.exists()


# Point to: units with a record after the death, units that the second attempt stages, whether the set is seen.
POINTS = {
    "staged": (0, 3, False),
    "recorded": (1, 2, False),
    "placed": (1, 2, False),
    "derived-written": (3, 0, False),
    "committed": (3, 0, True),
}


@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("point", POINTS)
def test_a_killed_derivation_goes_on(tmp_path, point, first):
    recorded, staged, visible = POINTS[point]
    folder = tmp_path / "store"
    deriver = Deriver(Lab.make(folder))
    space = deriver.lab.space
    old = set()
    if not first:  # a set is there already, and three units join it
        deriver.put([20, 21, 22], stamp=1)
        deriver.derive(settle=True)
        old = {(1, row) for row in (20, 21, 22)}
    units = [deriver.put(rows) for rows in (range(3), range(3, 13), [13])]
    head = space.head()
    kill(folder, deriver.units, point, tmp_path / "marker")

    assert (space.head() > head) == visible
    told = space.snapshot().derived
    assert set(told) == ({"values"} if visible or not first else set())
    total = sum(row * 10 for _, row in CELLS) + sum(1_000 + row * 10 for _, row in old)
    if visible:
        check(space, covered=CELLS | old, totals=dict.fromkeys(CELLS | old, total))
    elif old:
        check(space, covered=old, totals=dict.fromkeys(old, 3_630))
    assert sum(record_path(deriver.folder().path, unit).exists() for unit in units) == recorded

    again, version = run(folder, deriver.units)
    assert again == staged
    assert version == space.head() == head + 1
    check(space, covered=CELLS | old, totals=dict.fromkeys(CELLS | old, total))
    assert space.table("values", "totals")["total"][0].as_py() == total
    assert run(folder, deriver.units) == (0, version)
    if old:
        check(space, as_of=head, covered=old, totals=dict.fromkeys(old, 3_630))


@pytest.mark.parametrize("point", ["placed", "derived-written"])
def test_another_writer_after_a_killed_one(tmp_path, point):
    """What the dead driver left does not mix with what comes next, and can still be finished."""
    folder = tmp_path / "store"
    deriver = Deriver(Lab.make(folder))
    for rows in (range(3), range(3, 13), [13]):
        deriver.put(rows)
    kill(folder, deriver.units, point, tmp_path / "marker")
    deriver.lab.put([1, 5], stamp=2)
    left = CELLS - {(0, 1), (0, 5)}
    assert deriver.lab.space.snapshot().derived == {}
    staged, version = deriver.derive(units=list(deriver.units)[1:])
    assert staged == (2 if point == "placed" else 0)
    check(deriver.lab.space, covered={cell for cell in left if cell[1] > 2})
    assert deriver.derive() == (0, version + 1)
    check(deriver.lab.space, covered=left)


def test_a_driver_that_dies_while_arrays_grow(tmp_path):
    """The slots are given and an array is too short: whoever comes next lets it grow, before anything is read."""
    import zarr

    folder = tmp_path / "store"
    deriver = Deriver(Lab.make(folder))
    unit = deriver.put(range(10))
    made = deriver.folder()
    slots = made.assign({unit: 10})
    zarr.open_array(made.path / "expr.zarr", mode="r+").resize((4, 5))
    deriver.stage(made, unit, slots[unit])
    deriver.lab.space.commit_derived("values", made, [unit], {"run": "x"})
    check(deriver.lab.space, covered={(0, row) for row in range(10)})
