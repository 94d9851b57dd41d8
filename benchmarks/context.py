"""What every benchmark is told, and the sizes of a full and of a quick run."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benchmarks.data import Design, census

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Context:
    """Where a benchmark works, and how large.

    Attributes
    ----------
    folder
        Scratch; collections, references and stores are kept there for another run.
    log
        File for what the processes print.
    quick
        Whether sizes are small: for checking that everything runs, not for figures.
    pythons
        Peer to the interpreter that has it, where it is not this one.
    """

    folder: Path
    log: Path
    quick: bool = False
    pythons: Mapping[str, str] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Of each way, where the benchmark does not say otherwise."""
        return 2 if self.quick else 3

    @property
    def many_samples(self) -> int:
        """Of ways that cost nearly the same, or whose figure lies near its bar: a ratio of three is off by a tenth."""
        return 2 if self.quick else 9

    @property
    def rounds(self) -> int:
        """Of new processes, where ways cost so nearly the same that it matters which process of each was measured."""
        return 1 if self.quick else 3

    @property
    def cores(self) -> tuple[int, ...]:
        """Cores that may be used, at most two."""
        return tuple(sorted(os.sched_getaffinity(0))[:2])

    @property
    def design(self) -> Design:
        """Cells of a Census's width, which reading, mapping and landing share."""
        return Design(16_384 if self.quick else 196_608)

    def collection(self) -> Path:
        """Those cells on disk."""
        return census(self.folder, self.design)

    def pick(self, full: int, quick: int) -> int:
        """A size."""
        return quick if self.quick else full
