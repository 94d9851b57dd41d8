"""How a run's readers and actors are started, and on what they are placed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actors.mapping import MappingActor
from actors.reading import read_task

if TYPE_CHECKING:
    import ray

    from scviaduct.mapping.fleet import Fleet
    from scviaduct.store import Stager
    from scviaduct.values import Settings, Unit


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
    """Starts the readers and actors of one run.

    Attributes
    ----------
    reference
        Path of the package, readable on every node.
    settings
        What decides the rows.
    stager
        Where the rows go.
    columns
        obs columns that readers bring along.
    placement
        What each reserves.
    fleet
        Adapters of the query's new batches.
    """

    reference: str
    settings: Settings
    stager: Stager
    columns: tuple[str, ...]
    placement: Placement
    fleet: Fleet | None = None

    def read(self, unit: Unit) -> tuple[ray.ObjectRef[Any], ray.ObjectRef[Any]]:
        """Start reading a unit; references to its size in bytes and to its block."""
        task = read_task.options(num_cpus=self.placement.reader_cpus)
        size, block = task.remote(unit.shard, self.reference, self.columns)
        return size, block

    def start(self) -> Any:
        """Start a mapping actor; it loads the reference at once."""
        resources = {"num_cpus": self.placement.actor_cpus, "num_gpus": self.placement.actor_gpus}
        told = self.reference, self.settings, self.stager
        return MappingActor.options(**resources).remote(*told, fleet=self.fleet)

    def ready(self, actor: Any) -> ray.ObjectRef[Any]:
        """Reference that resolves once the actor has loaded its reference."""
        return actor.describe.remote()

    def map(self, actor: Any, unit: Unit, block: ray.ObjectRef[Any]) -> ray.ObjectRef[Any]:
        """Start mapping a block; reference to its completion."""
        return actor.run.remote(unit, block)
