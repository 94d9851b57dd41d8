"""What landing came to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from scviaduct.landing.pruning import Pruned

UNREADABLE_STATUS = 4
"""Exit status of a landing that lacks counts of some pieces, or could not be published."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Cells of the source that could not be landed, or only without their counts."""

    dataset_id: str
    start: int
    stop: int
    cells: int
    reason: str


@dataclass(frozen=True, slots=True)
class LandResult:
    """What landing came to.

    Attributes
    ----------
    landing
        Path of the folder.
    state
        ``planned`` (a dry run), ``nothing to do``, ``landed``, ``failed`` if cells could not be read (nothing was
        published), or ``pruned``.
    source, version
        What was landed.
    cells, pieces
        Of the landing.
    written, reused
        Pieces whose counts were written now, and those that were there.
    nbytes
        Bytes of the landing; of a dry run, about what would be written.
    fractional
        Pieces with counts that are not whole numbers from 0 on; they are kept as float32.
    unreadable
        Pieces that could not be read, with their reasons.
    left_out
        obs columns that cannot be kept, with the reason.
    pruned
        What was removed; None if that was not asked.
    seconds
        Of each stage.
    """

    landing: str
    state: Literal["planned", "nothing to do", "landed", "failed", "pruned"]
    source: str = ""
    version: str = ""
    cells: int = 0
    pieces: int = 0
    written: int = 0
    reused: int = 0
    nbytes: int = 0
    fractional: int = 0
    unreadable: tuple[Unreadable, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    pruned: Pruned | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def exit_status(self) -> int:
        """0, or 4 if something could not be read."""
        return UNREADABLE_STATUS if self.unreadable else 0
