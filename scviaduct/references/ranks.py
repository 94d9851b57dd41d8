"""Processes that train one model together, each on its part of every epoch's cells (data parallel)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from scviaduct.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from scviaduct.families import Family

TOGETHER = ("SCVI", "SCANVI")
"""Families that train so. The others' training plans step by hand (adversarial classifiers) or sample cells of groups
(samples, backgrounds), which scvi-tools' distributed sampler does not do."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """One of several processes that train together.

    Attributes
    ----------
    rank, count
        Which of them, and how many there are. The first reads the cells, keeps the checkpoint and makes the package.
    trainer
        What Lightning's trainer is told: the strategy, and the devices.
    plugins
        Of Lightning's trainer.
    wait
        Returns once every process called it.
    """

    rank: int
    count: int
    trainer: Mapping[str, Any] = field(default_factory=dict)
    plugins: tuple[Any, ...] = ()
    wait: Callable[[], None] = lambda: None

    @property
    def first(self) -> bool:
        """Whether this one does what is done once."""
        return self.rank == 0


ALONE = Ranks(0, 1)


def check_together(found: Family, count: int) -> None:
    """Refuse a family that several processes cannot train.

    Raises
    ------
    InputError
        If it is one.
    """
    if count > 1 and found.name not in TOGETHER:
        told = f"--gpus {count}: several processes train an {' or '.join(TOGETHER)}, not a {found.name}"
        raise InputError(f"{told}.", "Leave it out: one GPU is taken where there is one.")
