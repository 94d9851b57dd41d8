"""The surgery of a run: adapters for the query's new batches, fitted before anything is mapped."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from actors.surgery import fit_task
from cluster.connect import connect
from cluster.tasks import run_tasks
from scviaduct.errors import InputError
from scviaduct.mapping.adapters import Shelf
from scviaduct.mapping.fleet import Fleet
from scviaduct.mapping.surgery import Surgeon, recalled
from scviaduct.store import Store

if TYPE_CHECKING:
    from pipelines.progress import Reporter
    from pipelines.query import Query
    from scviaduct.mapping.batches import QueryBatch
    from scviaduct.mapping.surgery import Job, Operated
    from scviaduct.references.package import Reference


@dataclass(frozen=True, slots=True)
class BatchAdapter:
    """What became of one query batch.

    Attributes
    ----------
    batch
        For people: ``batch=B1``.
    cells
        Of the query.
    adapter
        Address; empty if there is none.
    state
        ``fitted`` now, ``reused``, ``failed``, or ``to fit`` (a dry run).
    reason
        Why it failed.
    """

    batch: str
    cells: int
    adapter: str
    state: Literal["fitted", "reused", "failed", "to fit"]
    reason: str = ""


def shelf_in(store: str, reference: Reference) -> Shelf:
    """The adapters of a reference in a store that may not be there yet."""
    try:
        return Store.open(store).space(reference.digest).adapters
    except InputError:
        return Shelf(os.devnull)  # has nothing


def planned(query: Query, shelf: Shelf) -> tuple[BatchAdapter, ...]:
    """What fitting would have to do, without doing it."""
    if query.batches is None:
        return ()
    there, _ = recalled(query.batches, shelf, query.reference, query.surgery)
    return tuple(
        BatchAdapter(batch.name, cells, there.get(batch, ""), "reused" if batch in there else "to fit")
        for batch, cells in query.batches.cells.items()
    )


class Fitting:
    """Fits what is missing, and says what became of each batch.

    Parameters
    ----------
    query
        With batches that need adapters.
    shelf
        The space's adapters.
    progress
        Told of every job.
    """

    def __init__(self, query: Query, shelf: Shelf, progress: Reporter) -> None:
        if query.batches is None:
            raise ValueError("no batch needs an adapter")
        self._reference, self._settings, self._surgery = query.reference, query.settings, query.surgery
        self._found, self._cells = query.batches, query.batches.cells
        self._shelf, self._progress = shelf, progress
        self._reused, jobs = recalled(self._found, shelf, self._reference, self._surgery)
        self._fitted: dict[QueryBatch, str] = {}
        self._failures: dict[QueryBatch, str] = {}
        self.left = bool(jobs)
        """Whether anything has to be fitted, or sampled anew to find out."""

    def run(
        self, engine: Literal["ray", "inline"], address: str | None, actors: int | None, gpus: float | None
    ) -> None:
        """Fit the batches whose adapters are not on the shelf, on Ray or in this process.

        Parameters
        ----------
        engine, address
            As ``map`` takes them.
        actors
            Jobs at a time; None for one a CPU, or a GPU share.
        gpus
            Share of a GPU that a job holds; None for a whole one where there are GPUs.
        """
        sampled = sum(self._sampled(batch) for batch in self._cells)
        self._progress.start("fitting adapters", sampled, sum(self._sampled(batch) for batch in self._reused))
        if engine == "inline":
            self._inline()
        else:
            with connect(address) as resources:
                share = (gpus or 1.0) if resources.gpus else 0.0
                at_once = actors or (max(1, int(resources.gpus / share)) if share else max(1, int(resources.cpus)))
                self._on_ray(at_once, share)

    def _inline(self) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            surgeon = Surgeon(self._reference, self._settings, self._surgery, self._shelf, device)
            for job in self._jobs(1):
                self._done(job, surgeon.run(job))
        finally:  # the caller's process goes on
            torch.set_num_threads(threads)

    def _on_ray(self, at_once: int, share: float) -> None:
        told = str(self._reference.path), self._settings, self._surgery, self._shelf
        task = fit_task.options(num_cpus=1, num_gpus=share)
        run_tasks(self._jobs(at_once), lambda job: task.remote(job, *told), at_once, self._done, self._failed)

    def _jobs(self, at_once: int) -> list[Job]:
        _, jobs = recalled(self._found, self._shelf, self._reference, self._surgery, at_once)
        return jobs

    def _sampled(self, batch: QueryBatch) -> int:
        return min(self._cells[batch], self._surgery.cells)

    def _done(self, job: Job, operated: Operated) -> None:
        for batch, where in operated.addresses.items():
            (self._reused if batch in operated.found else self._fitted)[batch] = where
        for batch, reason in operated.failures.items():
            self._fail(batch, reason)
        self._progress.advance(sum(self._sampled(batch) for batch, _ in job.batches))

    def _failed(self, job: Job, error: Exception) -> None:
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"
        for batch, _ in job.batches:
            self._fail(batch, reason)

    def _fail(self, batch: QueryBatch, reason: str) -> None:
        self._failures[batch] = reason
        self._progress.say(f"no adapter for {batch.name}: {reason}")

    @property
    def fleet(self) -> Fleet:
        """What workers are told."""
        return Fleet(self._shelf, self._reused | self._fitted, self._failures, self._surgery.decoder)

    @property
    def batches(self) -> tuple[BatchAdapter, ...]:
        """What became of each batch."""
        return tuple(self._told(batch, cells) for batch, cells in self._cells.items())

    def _told(self, batch: QueryBatch, cells: int) -> BatchAdapter:
        if batch in self._fitted:
            return BatchAdapter(batch.name, cells, self._fitted[batch], "fitted")
        if batch in self._reused:
            return BatchAdapter(batch.name, cells, self._reused[batch], "reused")
        return BatchAdapter(batch.name, cells, "", "failed", self._failures.get(batch, ""))
