"""How a run's readers and actors are started, on what they are placed, and how its work comes apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from actors.mapping import MappingActor
from actors.reading import read_task

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import ray

    from actors.mapping import Assignment, Ended
    from scviaduct.landing.alongside import Alongside
    from scviaduct.mapping.planning import Bundle
    from scviaduct.values import Shard, Unit


@dataclass(frozen=True, slots=True)
class Placement:
    """What an actor and a reader reserve.

    Attributes
    ----------
    actor_cpus, actor_gpus
        Of a mapping actor. On CPUs an actor reserves a fraction, because on two cores an actor that reserves a whole
        one can starve the readers for ever; it computes on one thread whatever it reserves.
    reader_cpus
        Of a reader task.
    """

    actor_cpus: float
    actor_gpus: float
    reader_cpus: float


@dataclass(frozen=True, slots=True)
class MappingPool:
    """Starts the readers and actors of one command.

    Attributes
    ----------
    assignments
        What each reference takes; every actor holds all of them.
    placement
        What each reserves.
    alongside
        Shards that are landed while they are read.
    """

    assignments: tuple[Assignment, ...]
    placement: Placement
    alongside: Mapping[Shard, Alongside] = field(default_factory=dict)

    def read(self, bundle: Bundle) -> tuple[ray.ObjectRef[Any], ray.ObjectRef[Any]]:
        """Start reading a shard; references to its size in bytes and to its block."""
        task = read_task.options(num_cpus=self.placement.reader_cpus)
        wanted = asked(self.assignments, bundle)
        size, block = task.remote(bundle.shard, *wanted, self.alongside.get(bundle.shard))
        return size, block

    def start(self) -> Any:
        """Start a mapping actor; it loads the references at once."""
        resources = {"num_cpus": self.placement.actor_cpus, "num_gpus": self.placement.actor_gpus}
        return MappingActor.options(**resources).remote(self.assignments)

    def ready(self, actor: Any) -> ray.ObjectRef[Any]:
        """Reference that resolves once the actor has loaded its references."""
        return actor.describe.remote()

    def map(self, actor: Any, bundle: Bundle, block: ray.ObjectRef[Any]) -> ray.ObjectRef[Any]:
        """Start mapping a block; reference to what becomes of the bundle."""
        return actor.run.remote(bundle, block)


def asked(assignments: Sequence[Assignment], bundle: Bundle) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Packages that a shard is read for, in the order of the bundle's units, and the obs columns that they take."""
    mine = [assignments[position] for position in bundle.references]
    columns = dict.fromkeys(column for one in mine for column in one.columns)
    return tuple(one.reference for one in mine), tuple(columns)


class Bundles:
    """How bundles come apart, as the dispatcher asks."""

    def units(self, bundle: Bundle) -> Sequence[Unit]:
        """The units of a bundle."""
        return [unit for _, unit in bundle.units]

    def split(self, bundle: Bundle) -> Sequence[Bundle]:
        """One bundle for each unit."""
        return bundle.split()

    def failed(self, bundle: Bundle, ended: Ended) -> list[tuple[Bundle, str, bool]]:
        """The units that failed, each with the reason and whether that is final."""
        return [(bundle.only({one.unit}), one.reason, one.final) for one in ended.failed]
