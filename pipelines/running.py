"""One run: which units of its plan are left, what a worker is told of it, and its commit; and a cluster's shares."""

from __future__ import annotations

import math
import secrets
import time
from typing import TYPE_CHECKING

from actors.mapping import Assignment
from actors.pool import Placement
from cluster.work import Limits
from scviaduct import __version__
from scviaduct.errors import InputError
from scviaduct.mapping.batches import group_columns
from scviaduct.mapping.mapper import model_columns
from scviaduct.software import software
from scviaduct.store import RunRecord, Stager

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cluster.connect import Resources
    from cluster.work import Quarantined
    from scviaduct.mapping.fleet import Fleet
    from scviaduct.references.package import Reference
    from scviaduct.store import Completion, Space, Store
    from scviaduct.values import Plan, Unit

_SOFTWARE = ("scvi-tools", "torch", "ray", "deltalake", "tiledbsoma", "anndata")


class Run:
    """One reference's run over its plan.

    Parameters
    ----------
    plan
        What is to be done.
    reference
        The package.
    store, space
        Where the rows go.
    fleet
        Adapters of the query's new batches.
    fractional
        Whether counts that are not whole are mapped, too.

    Raises
    ------
    InputError
        If what is done of it are cells that another place had once, and does not have any more.

    Attributes
    ----------
    left
        Units without a completion record when the run was made: the plan minus what is done.
    is_complete
        Whether there was nothing to do: every unit done, and all of them in the newest version.
    mapped
        Units mapped since.
    quarantined
        Units that could not be.
    """

    def __init__(
        self,
        plan: Plan,
        reference: Reference,
        store: Store,
        space: Space,
        fleet: Fleet | None = None,
        *,
        fractional: bool = False,
    ) -> None:
        self.plan, self.space = plan, space
        self._store = store
        self._began = time.time_ns() // 1_000_000
        kept = tuple(plan.settings.keep_obs)
        grouped = group_columns(reference, plan.settings, decoder=fleet.decoder) if fleet else ()
        columns = tuple(dict.fromkeys([*model_columns(reference, plan.settings), *grouped, *kept]))
        stager = Stager(str(space.path), f"{reference.name}@{reference.digest[:12]}", plan.run)
        self.assignment = Assignment(str(reference.path), plan.settings, stager, columns, fleet, fractional)
        self._done: dict[str, Completion] = space.completions(unit.id for unit in plan.units)
        _require_no_return(plan, self._done, space)
        self.left: list[Unit] = [unit for unit in plan.units if unit.id not in self._done]
        self.is_complete = not self.left and space.is_visible(self._done.values())
        self.mapped = 0
        self.quarantined: list[Quarantined] = []

    def cells_done(self) -> int:
        """Cells of the units that are done."""
        return sum(completion.cells.rows for completion in self._done.values())

    def begin(self) -> None:
        """Note in the store that the run has begun."""
        self._store.begin_run(self.plan, self.space.name)

    def note(self, completion: Completion) -> None:
        """Take a unit that was mapped."""
        self._done[completion.unit] = completion
        self.mapped += 1

    def commit(self, seconds: Mapping[str, float]) -> int | None:
        """Make everything that is done visible; the version, or None if nothing is done."""
        record = RunRecord(
            plan=self.plan,
            attempt=secrets.token_hex(8),
            space=self.space.name,
            started=self._began,
            ended=time.time_ns() // 1_000_000,
            units_done=len(self._done),
            cells_done=self.cells_done(),
            quarantined=[_told(item) for item in self.quarantined],
            # On a cluster the code travels with the job and is not installed, so it has no metadata to ask.
            software={"scviaduct": __version__} | software(*_SOFTWARE),
            seconds=dict(seconds),
        )
        if not self._done:
            self._store.record(record)
            return None
        told = {"run": self.plan.run, "attempt": record.attempt}
        kept = self.plan.settings.keep_obs
        return self.space.commit(list(self._done.values()), kept, told, lambda: self._store.record(record))


def _require_no_return(plan: Plan, done: Mapping[str, Completion], space: Space) -> None:
    """Refuse a copy of what another file held before it changed: committed anew, it would replace what that holds now.

    Cells of a file that only moved are found as they were committed, under its old URL, and stay.
    """
    found = [(unit.shard.source, done[unit.id].cells) for unit in plan.units if unit.id in done]
    strange = [(own, cells) for own, cells in found if cells.source != own]
    if not strange:
        return
    visible, names = space.snapshot().pairs, {cells.name for _, cells in strange}
    now = {(pair.cells.source, pair.cells.dataset_id) for name, pair in visible.items() if name not in names}
    for own, cells in strange:
        if cells.name not in visible and (cells.source, cells.dataset_id) in now:
            raise InputError(
                f"'{own}' holds cells that '{cells.source}' held before it changed; they would replace what the store"
                " has of it now.",
                f"Map '{cells.source}', or these cells into a store of their own.",
            )


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
