"""Memory of a process and of everything it started.

Proportional set size: a page that several processes share is counted once, split among them, so the sum over the tree
is what the tree takes, Ray's object store (shared memory) included.
"""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Self

import psutil


def tree_pss(pid: int) -> Counter[str]:
    """Bytes by kind of process: name of the program, or of the Ray actor or task that it runs."""
    found: Counter[str] = Counter()
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return found
    for process in processes:
        try:
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            name = process.name()
        except (OSError, psutil.Error):
            continue  # it ended between being listed and being read
        found[name] += 1024 * sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return found


class Peak:
    """Samples a process tree until it is told to stop; the largest sum and what it was made of.

    Parameters
    ----------
    pid
        Root of the tree.
    every
        Seconds between two samples.
    """

    def __init__(self, pid: int, every: float = 0.2) -> None:
        self._pid, self._every = pid, every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.total = self.samples = 0
        self.parts: Counter[str] = Counter()

    def _run(self) -> None:
        while not self._stop.wait(self._every):
            parts = tree_pss(self._pid)
            self.samples += 1
            if sum(parts.values()) > self.total:
                self.total, self.parts = sum(parts.values()), parts

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
