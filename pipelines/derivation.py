"""The work of one derivation: where its cells come from, and its readers and actors on Ray or in this process."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Self

import faiss
import numpy as np
import ray
import torch

from actors.deriving import (
    Deriving,
    DerivingPool,
    DerivingWorker,
    pick_cells,
    pick_task,
    read_decodable,
    study,
    study_task,
)
from cluster.connect import connect
from cluster.dispatch import ATTEMPTS, Dispatcher, Quarantined
from cluster.tasks import run_tasks
from pipelines.running import place
from scviaduct.errors import DataError, StoreError
from scviaduct.mapping.batches import QueryBatch
from scviaduct.mapping.fleet import Fleet
from scviaduct.mapping.picking import join
from scviaduct.values import Settings, Shard, Unit

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    import numpy.typing as npt

    from pipelines.progress import Reporter
    from scviaduct.analysis import Finished, Output
    from scviaduct.families import Facts
    from scviaduct.mapping.picking import Picked
    from scviaduct.references.package import Reference
    from scviaduct.store import DerivedStager, Space, Store

_SEED = 0
_ALL = 1 << 40


@dataclass(frozen=True, slots=True)
class Where:
    """Where work is done: fields as ``map`` takes them."""

    engine: Literal["ray", "inline"] = "ray"
    address: str | None = None
    actors: int | None = None
    readers: int | None = None
    gpus_per_actor: float | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """Where the cells of a version come from, and how they were mapped.

    Attributes
    ----------
    units
        Every unit that the version has cells of, in the order of the store.
    settings
        With which they were mapped, as far as decoding depends on it.
    fleet
        Adapters of all their query batches; None where there are none.
    """

    units: tuple[Unit, ...]
    settings: Settings
    fleet: Fleet | None


def sources_of(store: Store, space: Space, reference: Reference) -> Source:
    """Find the units of the newest version in the plans that made them.

    Raises
    ------
    StoreError
        If the version has no cell, a plan is gone, an adapter was dropped, or cells were mapped with other columns as
        their batch or sample.
    """
    ordered = sorted(space.snapshot().pairs.values(), key=lambda pair: (pair.cells.source, pair.cells.first_row or 0))
    wanted = list(dict.fromkeys(pair.cells.unit for pair in ordered))
    if not wanted:
        raise StoreError(f"Space '{space.name}' has no cell yet.", "Map something into it first: scviaduct map.")
    plans = [plan for plan in store.plans() if plan["space"] == space.name]
    shards = {told["id"]: (Unit(told["id"], Shard(**told["shard"])), plan) for plan in plans for told in plan["units"]}
    lost = [unit for unit in wanted if unit not in shards]
    if lost:
        raise StoreError(
            f"No plan of '{store.path}' knows unit {lost[0]}, which version {space.head()} has.",
            "Map its source again: scviaduct map.",
        )
    used = {plan["run"]: plan for unit in wanted for plan in [shards[unit][1]]}
    settings = {_settings(plan["settings"]) for plan in used.values()}
    if len(settings) > 1:
        told = ", ".join(sorted(f"'{batch or reference.batch_key}'" for batch, _ in settings))
        raise StoreError(
            f"Cells of '{space.name}' were mapped with different columns as their batch ({told}).",
            "Map them into stores of their own, or under one column, and derive there.",
        )
    batch, sample = settings.pop()
    return Source(
        tuple(shards[unit][0] for unit in wanted), Settings(batch_key=batch, sample_key=sample), _fleet(space, used)
    )


def _settings(told: Mapping[str, Any]) -> tuple[str, str]:
    return told.get("batch_key", ""), told.get("sample_key", "")


def _fleet(space: Space, plans: Mapping[str, Mapping[str, Any]]) -> Fleet | None:
    """Adapters of all query batches of some plans."""
    addresses: dict[QueryBatch, str] = {}
    for plan in plans.values():
        for key, address in plan.get("adapters", ()):
            if address:
                addresses[QueryBatch.of_key(key)] = address
    for batch, address in addresses.items():
        if not space.adapters.has(address):
            raise StoreError(
                f"The adapter of {batch.name} ({address[:12]}) is no longer in space '{space.name}'.",
                "Map the source again: it is fitted anew.",
            )
    decoder = any(plan.get("decoder", False) for plan in plans.values())
    return Fleet(space.adapters, addresses, decoder=decoder) if addresses else None


class Derivation:
    """Readers and actors of one derivation; a context manager around them.

    Parameters
    ----------
    reference
        The package.
    source
        Where the cells come from.
    what, options
        The analysis, and what it was told.
    progress
        Told of every unit.
    where
        Where the work is done.
    """

    def __init__(
        self,
        reference: Reference,
        source: Source,
        what: str,
        options: Any,
        progress: Reporter,
        where: Where,
    ) -> None:
        told = str(reference.path), reference.family, source.settings, source.fleet, what, options
        self._deriving = Deriving(*told, told={}, seed=reference.digest)
        self._source, self._progress = source, progress
        self._where = where
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self._where.engine == "ray":
            self._resources = self._stack.enter_context(connect(self._where.address))
        else:
            threads = torch.get_num_threads(), faiss.omp_get_max_threads()  # the caller's process goes on
            self._stack.callback(torch.set_num_threads, threads[0])
            self._stack.callback(faiss.omp_set_num_threads, threads[1])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def prepare(self, one: Output, facts: Facts, options: Any) -> Mapping[str, npt.NDArray[Any]]:
        """What the analysis makes of its sample; empty if it looks at none."""
        strata = one.strata(facts, options)
        if strata is None:
            return {}
        obs = tuple(dict.fromkeys([*one.obs(facts, options), strata.column]))
        picked = self._picked(dict.fromkeys(unit.id for unit in self._source.units), obs, strata.column, strata.cells)
        return dict(self._studied(picked, obs, None))

    def compare(self, rows: Mapping[str, npt.NDArray[np.int64]], obs: tuple[str, ...]) -> Finished:
        """Compare chosen cells: unit to row and 1 for a cell of the first selection, as ``choose`` gives them."""
        of_unit = {unit: told[:, 0] for unit, told in rows.items()}
        picked = self._picked(of_unit, obs, "", _ALL)
        flags = {(unit, int(row)): flag == 1 for unit, told in rows.items() for row, flag in told}
        first = np.array([flags[key] for key in zip(picked.units, picked.unit_rows.tolist(), strict=True)], bool)
        finished: Finished = self._studied(picked, obs, first)
        return finished

    def _picked(
        self, rows: Mapping[str, npt.NDArray[np.int64] | None], obs: tuple[str, ...], column: str, cells: int
    ) -> Picked:
        """Cells of some units, joined; a unit that cannot be read ends the derivation."""
        by = (column, cells, _SEED)
        units = [unit for unit in self._source.units if unit.id in rows]
        self._progress.start("sampling", sum(unit.shard.cells for unit in units))
        parts: dict[str, Picked] = {}

        def done(unit: Unit, found: Picked | None) -> None:
            if found is not None:
                parts[unit.id] = found
            self._progress.advance(unit.shard.cells)

        if self._where.engine == "inline":
            for unit in units:
                done(unit, pick_cells(unit, self._deriving, obs, rows[unit.id], by))
        else:
            at_once = max(1, int(self._resources.cpus))

            def start(unit: Unit) -> ray.ObjectRef[Any]:
                return pick_task.remote(unit, self._deriving, obs, rows[unit.id], by)

            run_tasks(units, start, at_once, done, _raised)
        if not parts:
            raise DataError("None of the cells has a count in the reference's genes.", "Choose other cells.")
        return join([parts[unit.id] for unit in units if unit.id in parts], cells)

    def _studied(self, picked: Picked, obs: tuple[str, ...], first: npt.NDArray[np.bool_] | None) -> Any:
        if self._where.engine == "inline":
            return study(self._deriving, picked, obs, first, _own_device())
        share = (self._where.gpus_per_actor or 1.0) if self._resources.gpus else 0.0
        task, found = study_task.options(num_cpus=1, num_gpus=share), list[Any]()
        told = ray.put(picked)  # once, however often the task is tried

        def start(deriving: Deriving) -> ray.ObjectRef[Any]:
            return task.remote(deriving, told, obs, first)

        run_tasks([self._deriving], start, 1, lambda _, result: found.append(result), _raised)
        return found[0]

    def units(
        self,
        units: Sequence[Unit],
        stager: DerivedStager,
        slots: Mapping[str, int],
        told: Mapping[str, npt.NDArray[Any]],
        obs: tuple[str, ...],
    ) -> list[Quarantined]:
        """Derive units; those that could not be.

        Parameters
        ----------
        units
            What is left to do.
        stager, slots
            Where values go.
        told
            What :meth:`prepare` gave.
        obs
            Columns that the analysis asked for.
        """
        deriving = replace(self._deriving, told=told)
        if not units:
            return []
        total = sum(unit.shard.cells for unit in units)
        if self._where.engine == "inline":
            self._progress.start("deriving", total)
            return self._inline(units, deriving, stager, slots, obs)
        where = self._where
        limits, placement = place(self._resources, where.actors, where.readers, where.gpus_per_actor)
        pool = DerivingPool(deriving, stager, obs, slots, placement.actor_cpus, placement.actor_gpus)
        dispatcher = Dispatcher(pool, limits, lambda unit, _: self._progress.advance(unit.shard.cells), self._note)
        return dispatcher.run(units, lambda _: self._progress.start("deriving", total)).quarantined

    def _inline(
        self,
        units: Sequence[Unit],
        deriving: Deriving,
        stager: DerivedStager,
        slots: Mapping[str, int],
        obs: tuple[str, ...],
    ) -> list[Quarantined]:
        worker = DerivingWorker(deriving, stager, _own_device())
        quarantined = []
        for unit in units:
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    worker.run(unit, read_decodable(unit, deriving, obs)[1], slots[unit.id])
                except Exception as error:  # noqa: BLE001 - Ray hands every error of a worker to the dispatcher, too
                    if isinstance(error, DataError) or attempt == ATTEMPTS:
                        quarantined.append(Quarantined(unit, attempt, f"{type(error).__name__}: {error}"))
                        self._note(quarantined[-1])
                        break
                else:
                    self._progress.advance(unit.shard.cells)
                    break
        return quarantined

    def _note(self, item: Quarantined) -> None:
        shard = item.unit.shard
        self._progress.say(f"quarantined: {shard.dataset_id} rows {shard.start:,}-{shard.stop:,}")


def _own_device() -> str:
    """What this process computes on, without asking Ray."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _raised(_: object, error: Exception) -> None:
    raise error
