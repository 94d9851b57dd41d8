"""The units of one run: which are left, how they are mapped, and their commit."""

from __future__ import annotations

import math
import secrets
import time
from importlib.metadata import version
from typing import TYPE_CHECKING

import faiss
import torch

from actors.mapping import MappingWorker
from actors.pool import MappingPool, Placement
from cluster.connect import connect
from cluster.dispatch import ATTEMPTS, Dispatcher, Limits, Outcome, Quarantined
from scviaduct import __version__
from scviaduct.errors import DataError, InputError
from scviaduct.mapping.batches import group_columns
from scviaduct.mapping.mapper import model_columns
from scviaduct.mapping.reading import read_block
from scviaduct.store import RunRecord, Stager

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cluster.connect import Resources
    from pipelines.progress import Reporter
    from scviaduct.mapping.fleet import Fleet
    from scviaduct.references.package import Reference
    from scviaduct.store import Completion, Space, Store
    from scviaduct.values import Plan, Unit

_SOFTWARE = ("scvi-tools", "torch", "ray", "deltalake", "tiledbsoma", "anndata")


class Run:
    """One run over a plan.

    Parameters
    ----------
    plan
        What is to be done.
    reference
        The package.
    store, space
        Where the rows go.
    progress
        Told of every unit.
    fleet
        Adapters of the query's new batches.
    """

    def __init__(
        self,
        plan: Plan,
        reference: Reference,
        store: Store,
        space: Space,
        progress: Reporter,
        fleet: Fleet | None = None,
    ) -> None:
        self._fleet = fleet
        self.plan = plan
        self._reference = reference
        self._store = store
        self._space = space
        self._progress = progress
        self._began = time.time_ns() // 1_000_000
        named = f"{reference.name}@{reference.digest[:12]}"
        self._stager = Stager(str(space.path), named, plan.run)
        kept = tuple(plan.settings.keep_obs)
        grouped = group_columns(reference, plan.settings, decoder=fleet.decoder) if fleet else ()
        self._columns = tuple(dict.fromkeys([*model_columns(reference, plan.settings), *grouped, *kept]))
        self._done: dict[str, Completion] = {}

    def todo(self) -> list[Unit]:
        """Units without a completion record: the plan minus what is done."""
        self._done = self._space.completions(unit.id for unit in self.plan.units)
        return [unit for unit in self.plan.units if unit.id not in self._done]

    def cells_done(self) -> int:
        """Cells of the units that are done."""
        return sum(completion.cells.rows for completion in self._done.values())

    def is_visible(self) -> bool:
        """Whether the newest version holds everything that is done."""
        return self._space.is_visible(self._done.values())

    def inline(self, units: Sequence[Unit]) -> Outcome:
        """Read and map one unit after the other in this process."""
        self._store.begin_run(self.plan, self._space.name)
        outcome = Outcome()
        if not units:
            return outcome
        device = "cuda" if torch.cuda.is_available() else "cpu"
        threads = torch.get_num_threads(), faiss.omp_get_max_threads()
        try:
            worker = MappingWorker(str(self._reference.path), self.plan.settings, self._stager, device, self._fleet)
            self._start_progress(units)
            for unit in units:
                self._attempt(unit, worker, outcome)
        finally:  # the caller's process goes on
            torch.set_num_threads(threads[0])
            faiss.omp_set_num_threads(threads[1])
        return outcome

    def _attempt(self, unit: Unit, worker: MappingWorker, outcome: Outcome) -> None:
        """Read and map a unit as often as the dispatcher would, then quarantine it."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                completion = worker.run(unit, read_block(unit.shard, self._reference, self._columns))
            except Exception as error:  # noqa: BLE001 - Ray hands every error of a worker to the dispatcher, too
                if isinstance(error, DataError) or attempt == ATTEMPTS:
                    item = Quarantined(unit, attempt, f"{type(error).__name__}: {error}")
                    outcome.quarantined.append(item)
                    self._note_quarantine(item)
                    return
            else:
                outcome.completions.append(completion)
                self._note_done(unit, completion)
                return

    def _start_progress(self, units: Sequence[Unit]) -> None:
        """Begin to count once something can map, so that rate and time left are those of mapping."""
        left = sum(unit.shard.cells for unit in units)
        self._progress.start("mapping", self.plan.cells, self.plan.cells - left)

    def on_ray(
        self,
        units: Sequence[Unit],
        address: str | None,
        actors: int | None,
        readers: int | None,
        gpus_per_actor: float | None,
    ) -> Outcome:
        """Read in tasks and map in actors.

        Raises
        ------
        InputError
            If GPUs are asked for where there are none.
        EngineError
            If actors cannot be started.
        """
        self._store.begin_run(self.plan, self._space.name)
        if not units:
            return Outcome()
        with connect(address) as resources:
            limits, placement = place(resources, actors, readers, gpus_per_actor)
            told = str(self._reference.path), self.plan.settings, self._stager, self._columns
            pool = MappingPool(*told, placement, self._fleet)
            device = f"{placement.actor_gpus:g} GPU" if placement.actor_gpus else "CPU"
            line = f"{_counted(limits.actors, 'mapping actor')} ({device} each), {_counted(limits.readers, 'reader')}"
            self._progress.say(line)
            dispatcher = Dispatcher(pool, limits, self._note_done, self._note_quarantine)

            def ready(described: Mapping[str, object]) -> None:
                if placement.actor_gpus and described["device"] == "cpu":
                    self._progress.say("Ray gave the actors GPUs, and PyTorch sees none there: they map on CPUs")
                self._start_progress(units)

            return dispatcher.run(units, ready)

    def _note_done(self, unit: Unit, completion: Completion) -> None:
        self._done[unit.id] = completion
        self._progress.advance(unit.shard.cells)

    def _note_quarantine(self, item: Quarantined) -> None:
        shard = item.unit.shard
        self._progress.say(f"quarantined: {shard.dataset_id} rows {shard.start:,}-{shard.stop:,}")

    def commit(self, outcome: Outcome, seconds: Mapping[str, float]) -> int | None:
        """Make everything that is done visible; the version, or None if nothing is done."""
        record = RunRecord(
            plan=self.plan,
            attempt=secrets.token_hex(8),
            space=self._space.name,
            started=self._began,
            ended=time.time_ns() // 1_000_000,
            units_done=len(self._done),
            cells_done=self.cells_done(),
            quarantined=[_told(item) for item in outcome.quarantined],
            # On a cluster the code travels with the job and is not installed, so it has no metadata to ask.
            software={"scviaduct": __version__} | {name: version(name) for name in _SOFTWARE},
            seconds=dict(seconds),
        )
        if not self._done:
            self._store.record(record)
            return None
        told = {"run": self.plan.run, "attempt": record.attempt}
        kept = self.plan.settings.keep_obs
        return self._space.commit(list(self._done.values()), kept, told, lambda: self._store.record(record))


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def _told(item: Quarantined) -> dict[str, str | int]:
    shard = item.unit.shard
    return {
        "unit": item.unit.id,
        "dataset_id": shard.dataset_id,
        "start": shard.start,
        "stop": shard.stop,
        "cells": shard.cells,
        "attempts": item.attempts,
        "reason": item.reason,
    }


def place(
    resources: Resources, actors: int | None, readers: int | None, gpus_per_actor: float | None
) -> tuple[Limits, Placement]:
    """How many actors and readers a cluster gets, and what each reserves.

    Where they outnumber the CPUs, each reserves one part of a CPU: halves, thirds and so on fill a CPU without a rest,
    so that no reader waits for ever beside a fraction that is free on every node.

    Parameters
    ----------
    resources
        What the cluster offers.
    actors, readers
        As asked; None for one actor per GPU share (or half the CPUs), and the CPUs that are left.
    gpus_per_actor
        As asked; None for a whole one where there are GPUs.

    Raises
    ------
    InputError
        If GPUs are asked for where there are none.
    """
    if gpus_per_actor is not None and resources.gpus == 0:
        remedy = "Leave it out to map on CPUs, or join a cluster that has GPUs: --address."
        raise InputError(f"--gpus-per-actor {gpus_per_actor:g}: the cluster has no GPU.", remedy)
    share = (gpus_per_actor or 1.0) if resources.gpus else 0.0
    cpus = max(1, int(resources.cpus))
    actors = actors or (max(1, int(resources.gpus / share)) if share else max(1, cpus // 2))
    readers = readers or max(1, cpus - actors)
    part = 1 / math.ceil((actors + readers) / cpus)
    budget = max(64 << 20, resources.object_store // 2)
    return Limits(actors, readers, budget), Placement(part, share, part)


__all__ = ["Outcome", "Run", "place"]
