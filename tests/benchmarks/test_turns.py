"""Ways take turns in processes of their own, and what they take is counted whole."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from benchmarks.turns import FailedError, Way, in_turns
from benchmarks.usage import Tree, below, own_seconds
from benchmarks.values import Bar, Figure, Measurement, Ratio, Sample

MODULE = '''
import os, subprocess, sys, time
BURN = "import time\\nbegan = time.process_time()\\nwhile time.process_time() - began < {}: pass"

def noted(path, name):
    def note(what):
        with open(path, "a") as file:
            file.write(f"{name} {what}\\n")
    note("prepared")
    print("a library says something on standard output")
    def once():
        note("once")
        return {"pid": os.getpid(), "cpus": sorted(os.sched_getaffinity(0)), "threads": os.environ["OMP_NUM_THREADS"]}
    return once

def parent(seconds):
    def once():
        subprocess.run([sys.executable, "-c", BURN.format(seconds)], check=True)
    return once

def left_behind(seconds):
    """A grandchild whose parent ends first, and for which nobody waits."""
    def once():
        inner = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {BURN.format(seconds)!r}])"
        subprocess.run([sys.executable, "-c", inner], check=True)
        time.sleep(0.3)
    return once

def absent():
    import no_such_package
    return lambda: None

def broken():
    raise ValueError("no such cells")

def broken_later():
    def once():
        raise ValueError("no such cells")
    return once

def killed():
    return lambda: os._exit(9)
'''


@pytest.fixture
def ways(tmp_path, monkeypatch):
    """Make a way of a function of the module above."""
    (tmp_path / "some_ways.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def way(call, name=None, *, fresh=False, **told):
        return Way(name or call, f"some_ways:{call}", told, 100, fresh=fresh)

    return way


def test_ways_prepare_once_and_take_turns_after_a_warm_up(ways, tmp_path):
    notes = tmp_path / "notes"
    pair = [Way(name, "some_ways:noted", {"path": str(notes), "name": name}, 100) for name in ("a", "b")]
    one, other = in_turns(pair, tmp_path / "log", samples=2)
    turns = ["b once", "a once", "a once", "b once", "b once", "a once"]  # back, forth and back
    assert notes.read_text().split("\n")[:-1] == ["a prepared", "b prepared", *turns]
    assert [sample.turn for sample in one.samples] == [0, 1]
    assert len({sample.result["pid"] for sample in (*one.samples, *other.samples)}) == 2
    assert one.samples[0].result["cpus"] == sorted(os.sched_getaffinity(0))[:1]
    assert one.samples[0].result["threads"] == "1"
    assert "a library says something" in (tmp_path / "log").read_text()


def test_rounds_are_turns_of_new_processes(ways, tmp_path):
    notes = tmp_path / "notes"
    pair = [Way(name, "some_ways:noted", {"path": str(notes), "name": name}, 100) for name in ("a", "b")]
    one, other = in_turns(pair, tmp_path / "log", samples=2, warm=0, rounds=2)
    assert [sample.turn for sample in one.samples] == [sample.turn for sample in other.samples] == [0, 1, 2, 3]
    pids = [sample.result["pid"] for sample in one.samples]
    assert pids[0] == pids[1] != pids[2] == pids[3]


def test_a_fresh_way_is_a_process_a_sample(ways, tmp_path):
    notes = tmp_path / "notes"
    way = Way("a", "some_ways:noted", {"path": str(notes), "name": "a"}, 100, fresh=True)
    [found] = in_turns([way], tmp_path / "log", samples=2, warm=0)
    assert len({sample.result["pid"] for sample in found.samples}) == 2
    assert all(sample.cpu > 0 and sample.wall > 0 for sample in found.samples)


@pytest.mark.parametrize("fresh", [False, True])
def test_what_children_compute_is_counted(ways, tmp_path, fresh):
    [found] = in_turns([ways("parent", fresh=fresh, seconds=0.6)], tmp_path / "log", samples=1, warm=0)
    assert found.cpu > 0.35  # a fresh tree is looked at every fifth of a second


def test_an_orphan_is_counted(ways, tmp_path):
    [found] = in_turns([ways("left_behind", fresh=True, seconds=0.6)], tmp_path / "log", samples=1, warm=0)
    assert found.cpu > 0.35


@pytest.mark.parametrize("fresh", [False, True])
def test_a_way_that_cannot_be_taken_says_why_and_the_others_are(ways, tmp_path, fresh):
    notes = str(tmp_path / "notes")
    there = Way("a", "some_ways:noted", {"path": notes, "name": "a"}, 100)
    gone, found = in_turns([ways("absent", fresh=fresh), there], tmp_path / "log", samples=1)
    assert "no_such_package" in gone.missing
    assert not gone.samples
    assert len(found.samples) == 1
    assert Ratio.of(found, gone) == Ratio(None, reason=gone.missing)


@pytest.mark.parametrize("call", ["broken", "broken_later", "killed"])
def test_an_error_of_a_way_is_one(ways, tmp_path, call):
    with pytest.raises(FailedError, match="ended with status 9" if call == "killed" else "no such cells"):
        in_turns([ways(call)], tmp_path / "log")


def test_another_interpreter_needs_nothing_of_ours(tmp_path):
    """What a peer's process imports is the standard library; the peer's module, numpy."""
    code = "import benchmarks.child, sys; print([n for n in sys.modules if n.split('.')[0] in ('numpy', 'psutil')])"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_tree_keeps_what_an_ended_process_took():
    tree = Tree(os.getpid())
    before = tree.seconds()
    code = "import time\nwhile time.process_time() < .6: pass\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        while below(process.pid)[process.pid][0] < 0.4:
            time.sleep(0.05)
        seen = tree.seconds()
        process.kill()
    assert seen - before >= 0.4
    assert tree.seconds() >= seen
    assert process.pid not in below(os.getpid())
    assert own_seconds() > 0


def test_medians_and_bests():
    samples = tuple(Sample(turn, wall, cpu) for turn, (wall, cpu) in enumerate([(3, 1.0), (1, 2.0), (2, 4.0)]))
    found = Measurement("a", 8, "cells", samples)
    assert (found.cpu, found.wall, found.best_cpu, found.rate, found.best_rate) == (2, 2, 1, 4, 8)
    slow = Measurement("b", 8, "cells", (Sample(0, 9, 8.0),))
    assert Ratio.of(found, slow) == Ratio(4.0, 8.0)
    turns = Measurement("c", 16, "cells", tuple(Sample(turn, 0, cpu) for turn, cpu in enumerate([8.0, 4.0, 8.0])))
    assert Ratio.of(found, turns) == Ratio(1.0, 2.0)  # 4, 1 and 1, each turn by itself; by the medians it would be 2
    many = [
        Measurement(name, 1, "cells", tuple(Sample(turn, 0, cpu) for turn, cpu in enumerate(times)))
        for name, times in (("a", [1.0] * 9), ("b", [9.0, 2, 3, 4, 5, 6, 7, 8, 1]))
    ]
    assert Ratio.of(*many) == Ratio(5.0, 1.0, low=2.0, high=8.0)
    assert Figure.ratio("x", Ratio.of(found, slow)) == Figure("x", 4.0, "", 8.0)


@pytest.mark.parametrize(("sense", "value", "met"), [("at least", 2.0, True), ("at most", 2.0, True)])
def test_a_bar_is_met_at_its_value(sense, value, met):
    assert Bar(sense, 2.0).met_by(value) is met
    assert Bar(sense, 2.0).met_by(value + (0.1 if sense == "at least" else -0.1))
    assert not Bar(sense, 2.0).met_by(value - (0.1 if sense == "at least" else -0.1))
