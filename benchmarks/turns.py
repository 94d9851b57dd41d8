"""Taking several ways in turns, each in processes of its own on pinned cores.

A way names a function that prepares and gives back what is timed. Its process does that once to warm up; then all ways
take turns, A B B A, so that a machine that slows down slows all of them. Preparing (imports, opening, loading a model)
is outside of the samples. A way that is ``fresh`` is timed as a whole instead: a new process for each sample, from
being started until it and all that it started have ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from benchmarks.usage import Tree
from benchmarks.values import Measurement, Sample

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

ROOT = Path(__file__).parents[1]
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class Way:
    """One of the things that are compared.

    Attributes
    ----------
    name
        What the report calls it.
    call
        ``module:function``; the function takes ``told``, prepares, and returns what is timed: a function without
        arguments that returns a dictionary for JSON, or None.
    told
        Its keyword arguments, JSON.
    amount, unit
        How much one sample does.
    cpus
        Cores that its processes are pinned to, and given as many threads; the first that may be used unless said.
    fresh
        Whether each sample is a new process, counted as a whole.
    python
        Interpreter; None for this one.
    """

    name: str
    call: str
    told: Mapping[str, Any]
    amount: float
    unit: str = "cells"
    cpus: tuple[int, ...] = ()
    fresh: bool = field(default=False, kw_only=True)
    python: str | None = field(default=None, kw_only=True)


class FailedError(RuntimeError):
    """A way raised an error, or its process died."""


class Child:
    """The process of a way.

    Parameters
    ----------
    way
        What it does.
    log
        File that its output is appended to.
    """

    def __init__(self, way: Way, log: Path) -> None:
        self._way, self._log = way, log
        self._began = time.perf_counter()
        self.missing = ""
        cpus = way.cpus or tuple(sorted(os.sched_getaffinity(0))[:1])
        threads = {name: str(len(cpus)) for name in _THREADS}
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
        with log.open("a") as output:
            output.write(f"== {way.name}: {way.call}\n")
            output.flush()
            self._process = subprocess.Popen(
                [way.python or sys.executable, "-m", "benchmarks.child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                cwd=ROOT,
                env=os.environ | threads | {"PYTHONPATH": path, "RAY_ADDRESS": "local", "PYTHONWARNINGS": "ignore"},
            )
        assert self._process.stdin is not None  # both are pipes, as asked
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._tell(json.dumps({"call": way.call, "told": dict(way.told), "cpus": list(cpus)}))
        try:
            self.missing = self._hear().get("missing", "")
        except FailedError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process, and wait until it has ended."""
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        self._process.wait()
        self._stdout.close()

    def take(self, turn: int) -> Sample:
        """Do it once."""
        self._tell("once")
        answer = self._hear()
        return Sample(turn, answer["wall"], answer["cpu"], answer["result"])

    def take_and_end(self, turn: int) -> Sample:
        """Do it once and end: what the whole life of the process took."""
        with Tree(self._process.pid) as tree:
            self._tell("once")
            answer = self._hear()
            self._stdin.close()
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)  # it can still be looked at
            cpu = tree.seconds()
        self._process.wait()
        return Sample(turn, time.perf_counter() - self._began, cpu, answer["result"])

    def _tell(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has died, which its answer tells
            self._stdin.write(line + "\n")
            self._stdin.flush()

    def _hear(self) -> dict[str, Any]:
        line = self._stdout.readline()
        answer = json.loads(line) if line else {"failed": f"its process ended with status {self._process.wait()}"}
        if "failed" in answer:
            raise FailedError(f"{self._way.name} ({self._way.call}): {answer['failed']}See {self._log}.")
        return answer


def in_turns(ways: Sequence[Way], log: Path, samples: int = 3, warm: int = 1, *, rounds: int = 1) -> list[Measurement]:
    """Take every way several times, in turns.

    Parameters
    ----------
    ways
        What is compared; those that cannot be taken here come back with the reason.
    log
        File for what their processes print.
    samples
        Of each way in a round.
    warm
        Times before that are not counted; those of fresh ways are whole processes, too, and fill the page cache.
    rounds
        How often that is done, each with new processes: code and memory lie elsewhere in every process, which alone
        makes one a few hundredths slower or faster than another for as long as it lives.

    Returns
    -------
    list of Measurement
        In the order of ``ways``.

    Raises
    ------
    FailedError
        If a way raised an error.
    """
    found: dict[str, list[Sample]] = {way.name: [] for way in ways}
    missing = dict.fromkeys(found, "")
    for done in range(0, rounds * samples, samples):
        for way, taken in _round(ways, log, range(-warm, samples)):
            if isinstance(taken, str):
                missing[way.name] = taken
            elif taken.turn >= 0:
                found[way.name].append(replace(taken, turn=done + taken.turn))
    return [Measurement(way.name, way.amount, way.unit, tuple(found[way.name]), missing[way.name]) for way in ways]


def _round(ways: Sequence[Way], log: Path, turns: range) -> Iterator[tuple[Way, Sample | str]]:
    """Samples of all ways, turn by turn; of one that cannot be taken, why."""
    with ExitStack() as stack:
        children = {way.name: stack.enter_context(Child(way, log)) for way in ways if not way.fresh}
        for turn in turns:
            # Forth and back, so that a machine that grows slower within a turn does not always do so for the same way.
            for way in ways if turn % 2 == 0 else reversed(ways):
                child = children.get(way.name) or stack.enter_context(Child(way, log))
                yield way, child.missing or (child.take_and_end(turn) if way.fresh else child.take(turn))
