"""The main job: stream query cells, map them with a reference, commit what comes out as one version of a store."""

from __future__ import annotations

import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from cluster.connect import connect, require_answer
from pipelines.jobs import SHARD_CELLS
from pipelines.progress import reporter
from pipelines.query import Query, batches_of_query, scan_query, told_surgery
from pipelines.running import Run
from pipelines.surgery import Fitting, planned, shelf_in
from scviaduct.errors import InputError
from scviaduct.mapping import preflight
from scviaduct.mapping.fleet import Fleet
from scviaduct.mapping.surgery import recalled
from scviaduct.references.registry import Registry
from scviaduct.sources import open_source
from scviaduct.store import Store
from scviaduct.store.schema import new_columns
from scviaduct.values import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cluster.dispatch import Quarantined
    from pipelines.running import Outcome
    from pipelines.surgery import BatchAdapter
    from scviaduct.mapping.preflight import Report
    from scviaduct.mapping.surgery import Surgery
    from scviaduct.references.package import Reference
    from scviaduct.sources import Source
    from scviaduct.values import Plan

QUARANTINE_STATUS = 4
"""Exit status of a run that committed, but left units in quarantine."""


@dataclass(frozen=True, slots=True)
class MapResult:
    """What a ``map`` run came to.

    Attributes
    ----------
    run
        Run id; the same command has the same.
    state
        ``planned`` (a dry run), ``nothing to do``, ``committed``, or ``failed`` if every unit is in quarantine.
    version
        Version of the space that holds the run's cells; None if there is none.
    cells, units
        Of the plan.
    cells_done
        Cells of the plan that the version holds.
    mapped_units
        Units mapped by this call; the others were completed before.
    quarantined
        Units that could not be mapped, with their reasons.
    report
        Of the preflight.
    seconds
        Of each stage: scan, preflight, surgery, map, commit.
    adapters
        What became of each new batch that needs an adapter.
    """

    run: str
    state: Literal["planned", "nothing to do", "committed", "failed"]
    version: int | None
    cells: int
    cells_done: int
    units: int
    mapped_units: int
    quarantined: tuple[Quarantined, ...]
    report: Report
    seconds: dict[str, float]
    adapters: tuple[BatchAdapter, ...] = ()

    @property
    def exit_status(self) -> int:
        """0, or 4 if units are in quarantine."""
        return QUARANTINE_STATUS if self.quarantined else 0


def map(  # noqa: A001 - the name of the command
    source: str,
    *,
    reference: str,
    store: str,
    keep_obs: Sequence[str] = (),
    shard_cells: int = SHARD_CELLS,
    accept: Sequence[str] = (),
    batch_key: str = "",
    sample_key: str = "",
    ambiguous_entropy: float = 1.0,
    neighbors: int = 15,
    surgery: str = "auto",
    surgery_cells: int | None = None,
    surgery_epochs: int | None = None,
    background: Sequence[str] = (),
    engine: Literal["ray", "inline"] = "ray",
    address: str | None = None,
    actors: int | None = None,
    readers: int | None = None,
    gpus_per_actor: float | None = None,
    dry_run: bool = False,
    quiet: bool = False,
) -> MapResult:
    """Map query cells to a reference, into a store.

    All cells of the run become visible in one commit. A run that was killed or interrupted goes on where it was when it
    is called again with the same arguments; a run that is complete does nothing and says so.

    Parameters
    ----------
    source
        URI of the query cells.
    reference
        Registered name, or path of a package; on a cluster every node must be able to read it.
    store
        Folder of the store, made if absent; on a cluster every node must be able to write it.
    keep_obs
        obs columns to keep beside the labels.
    shard_cells
        Cells of a shard, the unit of retry and resumption.
    accept
        Preflight findings to override, by name; recorded with the run.
    batch_key, sample_key
        obs columns of the query that play the reference's batch and sample, where they have other names there.
    ambiguous_entropy
        Entropy in nats above which a label is flagged ``ambiguous``.
    neighbors
        k of the label transfer, for references without a classifier.
    surgery
        What is done about batches, samples and covariates that the reference does not know: ``auto`` fits an adapter
        for each where the encoder reads it, ``decoder`` also where the decoder alone does, ``off`` none.
    surgery_cells, surgery_epochs
        Cells of each batch that its adapter is fitted on, and epochs, at most; None for 512 and 100.
    background
        ContrastiveVI: ``column=value`` pairs that make a query cell a control, for surgery.
    engine
        ``ray``, or ``inline`` to read and map one shard after the other in this process. Both give the same rows.
    address
        Ray cluster: ``local``, ``auto`` or ``HOST:PORT``; None takes ``RAY_ADDRESS``, and ``local`` without it.
    actors, readers
        Mapping actors and reader tasks; None takes one actor per GPU share, or half the CPUs.
    gpus_per_actor
        Share of a GPU that an actor holds; None for a whole one where there are GPUs.
    dry_run
        Check and plan, and stop before any work.
    quiet
        Without progress.

    Raises
    ------
    InputError
        If an argument, the source or the reference is wrong.
    NotFitError
        If preflight closes the gate, or cannot tell.
    EngineError
        If actors cannot be started. Completed units are kept.
    """
    if shard_cells < 1:
        remedy = f"Give at least 1; the default is {SHARD_CELLS}."
        raise InputError(f"--shard-cells {shard_cells} holds no cell.", remedy)
    package = Registry().get(reference)
    wanted = told_surgery(surgery, surgery_cells, surgery_epochs, background, package)
    settings = Settings(
        batch_key=batch_key, sample_key=sample_key, ambiguous_entropy=ambiguous_entropy, neighbors=neighbors
    )
    if engine == "ray" and not dry_run:
        require_answer(address)  # before the minutes that scanning an atlas takes
    clock = _Clock()
    with reporter(quiet=quiet) as progress, open_source(source) as opened:
        query = _query(opened, package, settings, wanted, keep_obs, shard_cells, accept, clock)
        if dry_run:
            return _planned(query, store, clock)
        kept = Store.create(store)
        space = kept.create_space(package.name, package.digest, package.n_latent, package.labels)
        there = space.snapshot()
        new_columns(
            there.columns, query.settings.keep_obs, there.derived_types
        )  # refuses another type, before any work
        fitting = Fitting(query, space.adapters, progress) if query.batches else None
        with ExitStack() as stack:
            if fitting and fitting.left:
                if engine == "ray":
                    stack.enter_context(connect(address))  # one Ray for surgery and mapping
                with clock.stage("surgery"):
                    fitting.run(engine, address, actors, gpus_per_actor)
            fleet = fitting.fleet if fitting else None
            run = Run(query.plan(fleet), package, kept, space, progress, fleet)
            told = _Told(run.plan, query.report, clock, fitting.batches if fitting else ())
            todo = run.todo()
            if not todo and run.is_visible():
                return told.result("nothing to do", run.plan.cells, space.head())
            with clock.stage("map"):
                on = (address, actors, readers, gpus_per_actor)
                outcome = run.inline(todo) if engine == "inline" else run.on_ray(todo, *on)
        with clock.stage("commit"):
            version = run.commit(outcome, clock.seconds)
    return told.result("failed" if version is None else "committed", run.cells_done(), version, outcome)


def _query(
    opened: Source,
    package: Reference,
    settings: Settings,
    surgery: Surgery,
    keep_obs: Sequence[str],
    shard_cells: int,
    accept: Sequence[str],
    clock: _Clock,
) -> Query:
    """Scan the source, and open or close the gate."""
    with clock.stage("scan"):
        scan, settings = scan_query(opened, package, settings, surgery, keep_obs, shard_cells)
    with clock.stage("preflight"):
        influence = package.encoder().gene_influence()
        report = preflight.check(opened, scan, package, settings, influence, surgery=surgery.mode).accept(accept)
        report.require_fit()
    return Query(opened, package, settings, scan, report, surgery, batches_of_query(package, settings, scan, surgery))


def _planned(query: Query, store: str, clock: _Clock) -> MapResult:
    """What a run would do; its id is not known before the samples of batches that are to be fitted are read."""
    if query.batches is None:
        return _Told(query.plan(None), query.report, clock).result("planned", 0)
    shelf = shelf_in(store, query.reference)
    batches = planned(query, shelf)
    fleet = Fleet(
        shelf, recalled(query.batches, shelf, query.reference, query.surgery)[0], decoder=query.surgery.decoder
    )
    plan = query.plan(fleet)
    known = all(item.state == "reused" for item in batches)
    return _Told(plan if known else replace(plan, run=""), query.report, clock, batches).result("planned", 0)


@dataclass(frozen=True, slots=True)
class _Told:
    """What every result says."""

    plan: Plan
    report: Report
    clock: _Clock
    adapters: tuple[BatchAdapter, ...] = ()

    def result(
        self,
        state: Literal["planned", "nothing to do", "committed", "failed"],
        cells_done: int,
        version: int | None = None,
        outcome: Outcome | None = None,
    ) -> MapResult:
        quarantined = tuple(outcome.quarantined) if outcome else ()
        mapped = len(outcome.completions) if outcome else 0
        sizes = self.plan.cells, cells_done, len(self.plan.units)
        told = self.report, dict(self.clock.seconds), self.adapters
        return MapResult(self.plan.run, state, version, *sizes, mapped, quarantined, *told)


@dataclass(slots=True)
class _Clock:
    """Seconds that each stage took."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(time.monotonic() - began, 3)
