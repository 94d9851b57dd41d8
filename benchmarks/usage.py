"""CPU-seconds of a process and of everything it started.

Linux adds the times of a process that has ended to those of the one that waits for it. That is exact where it is done,
and Ray's raylet does not wait for its workers: of two that had computed for 4 s each, nothing was left after
``ray.shutdown``. So a tree is looked at while it lives, and what a process had taken when it was last seen is kept.
Processes that lose their parent stay in the tree because its root declares itself a subreaper.

Only the standard library is used: the interpreter of a peer may have nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import threading
import time
from pathlib import Path
from typing import Self

_PR_SET_CHILD_SUBREAPER = 36
_TICK = os.sysconf("SC_CLK_TCK")
_EVERY = 0.2


def adopt_orphans() -> None:
    """Make this process the parent of what its descendants leave behind."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def reap(seconds: float = 20.0) -> None:
    """Wait until everything that this process started has ended, and end what is left after so many seconds."""
    until = time.monotonic() + seconds
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid:
            continue
        if time.monotonic() > until:
            for child in below(os.getpid()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.05)


def own_seconds() -> float:
    """CPU-seconds of this process, and of its children that it waited for."""
    own, ended = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime


def running_seconds() -> float:
    """CPU-seconds of what runs below this process, and of what each of it waited for."""
    return sum(sum(times) for pid, times in below(os.getpid()).items() if pid != os.getpid())


def below(root: int) -> dict[int, tuple[float, float]]:
    """A process and those below it: CPU-seconds of each, and of the ended ones that it waited for."""
    parents, seconds = {}, {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it ended since it was listed
            # The name may hold blanks and brackets; what follows the last bracket does not.
            told = (folder / "stat").read_text().rpartition(")")[2].split()
            pid, (own, system, ended, ended_system) = int(folder.name), map(int, told[11:15])
            parents[pid], seconds[pid] = int(told[1]), ((own + system) / _TICK, (ended + ended_system) / _TICK)
    layer, found = {root} & seconds.keys(), dict[int, tuple[float, float]]()
    while layer:
        found |= {pid: seconds[pid] for pid in layer}
        layer = {pid for pid, parent in parents.items() if parent in layer}
    return found


class Tree:
    """CPU-seconds of a tree of processes over its life; looks at it now and then in a ``with`` block.

    What is missed is what a process took after it was last seen: at most a fifth of a second of each that ends.

    Parameters
    ----------
    root
        Process at the top.
    """

    def __init__(self, root: int) -> None:
        self._root = root
        self._seen: dict[int, float] = {}
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def seconds(self) -> float:
        """Look now; all that the tree took so far."""
        with self._lock:
            for pid, (own, _) in below(self._root).items():
                self._seen[pid] = max(own, self._seen.get(pid, 0.0))
            return sum(self._seen.values())

    def _run(self) -> None:
        while not self._stop.wait(_EVERY):
            self.seconds()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
