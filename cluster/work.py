"""What the dispatcher is told and tells: items and how they come apart, bounds, and what became of the units."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import ray

    from scviaduct.values import Shard, Unit

ATTEMPTS = 3
"""Tries of a unit before it is quarantined."""


class Sharded(Protocol):
    """An item: something that is read at once."""

    @property
    def shard(self) -> Shard:
        """What is read."""


class Pool[Item](Protocol):
    """How items are read and mapped; what the actors package offers, as the dispatcher sees it."""

    def read(self, item: Item, /) -> tuple[ray.ObjectRef[Any], ray.ObjectRef[Any]]:
        """Start reading; references to the block's size in bytes and to the block."""

    def start(self) -> Any:
        """Start an actor; the handle."""

    def ready(self, actor: Any) -> ray.ObjectRef[Any]:
        """Reference that resolves once the actor has loaded its reference."""

    def map(self, actor: Any, item: Item, block: ray.ObjectRef[Any], /) -> ray.ObjectRef[Any]:
        """Start mapping a block; reference to what comes out."""


class Parts[Item](Protocol):
    """How items come apart."""

    def units(self, item: Item, /) -> Sequence[Unit]:
        """What is quarantined if the item is."""

    def split(self, item: Item, /) -> Sequence[Item]:
        """Items of one unit each."""

    def failed(self, item: Item, result: Any, /) -> Sequence[tuple[Item, str, bool]]:
        """What of an item failed although it came back: each part, why, and whether it would fail again for sure."""


class Whole:
    """Items that are units."""

    def units(self, item: Unit, /) -> Sequence[Unit]:
        """The item."""
        return (item,)

    def split(self, item: Unit, /) -> Sequence[Unit]:
        """The item."""
        return (item,)

    def failed(self, item: Unit, result: Any, /) -> Sequence[tuple[Unit, str, bool]]:
        """Nothing: a unit that comes back is done."""
        del item, result
        return ()


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a run.

    Attributes
    ----------
    actors
        Mapping actors.
    readers
        Reader tasks at a time.
    bytes_in_flight
        Bytes of blocks that are read and not yet mapped. One block is always let through, however large.
    blocks_per_actor
        Blocks that an actor has at a time: one that it maps, the others wait beside it.
    attempts
        Tries of a unit before it is quarantined.
    start_attempts
        Actors that may fail to start in a row before the run gives up.
    """

    actors: int
    readers: int
    bytes_in_flight: int = 512 << 20
    blocks_per_actor: int = 2
    attempts: int = ATTEMPTS
    start_attempts: int = 3


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A unit that could not be mapped, and why."""

    unit: Unit
    attempts: int
    reason: str


@dataclass(slots=True)
class Outcome:
    """What became of the items: what came out of each that was mapped, and the units that were not."""

    completions: list[Any] = field(default_factory=list)
    quarantined: list[Quarantined] = field(default_factory=list)
