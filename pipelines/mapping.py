"""The main job: stream query cells, map them with a reference, commit what comes out as one version of a store."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from cluster.connect import require_answer
from pipelines.jobs import SHARD_CELLS
from pipelines.progress import reporter
from pipelines.running import Run
from scviaduct.errors import InputError
from scviaduct.mapping import preflight
from scviaduct.mapping.planning import kept_types, make_plan
from scviaduct.references.registry import Registry
from scviaduct.sources import open_source
from scviaduct.store import Store
from scviaduct.store.schema import cells_schema, new_columns
from scviaduct.values import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cluster.dispatch import Quarantined
    from pipelines.running import Outcome
    from scviaduct.mapping.preflight import Report
    from scviaduct.references.package import Reference
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
        Of each stage: scan, preflight, map, commit.
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
    settings = Settings(
        batch_key=batch_key, sample_key=sample_key, ambiguous_entropy=ambiguous_entropy, neighbors=neighbors
    )
    if engine == "ray" and not dry_run:
        require_answer(address)  # before the minutes that scanning an atlas takes
    clock = _Clock()
    with reporter(quiet=quiet) as progress:
        plan, report = _plan(source, package, settings, keep_obs, shard_cells, accept, clock)
        if dry_run:
            return _result(plan, report, clock, "planned", cells_done=0)
        opened = Store.create(store)
        space = opened.create_space(package.name, package.digest, package.n_latent, package.labels)
        new_columns(
            space.snapshot().columns, plan.settings.keep_obs
        )  # refuses another type of a column, before any work
        run = Run(plan, package, opened, space, progress)
        todo = run.todo()
        if not todo and run.is_visible():
            return _result(plan, report, clock, "nothing to do", cells_done=plan.cells, version=space.head())
        with clock.stage("map"):
            if engine == "inline":
                outcome = run.inline(todo)
            else:
                outcome = run.on_ray(todo, address, actors, readers, gpus_per_actor)
        with clock.stage("commit"):
            version = run.commit(outcome, clock.seconds)
    state: Literal["committed", "failed"] = "failed" if version is None else "committed"
    return _result(plan, report, clock, state, cells_done=run.cells_done(), version=version, outcome=outcome)


def _plan(
    source: str,
    package: Reference,
    settings: Settings,
    keep_obs: Sequence[str],
    shard_cells: int,
    accept: Sequence[str],
    clock: _Clock,
) -> tuple[Plan, Report]:
    """Scan the source, open or close the gate, address the units."""
    with open_source(source) as opened:
        with clock.stage("scan"):
            columns = dict.fromkeys([*preflight.scan_columns(package, settings), *keep_obs])
            scan = opened.scan(shard_cells, list(columns))
            settings = replace(settings, keep_obs=kept_types(scan, keep_obs, opened.obs_columns()))
            cells_schema(settings.keep_obs)  # refuses a name that the store needs itself, before any work
        with clock.stage("preflight"):
            influence = package.encoder().gene_influence()
            report = preflight.check(opened, scan, package, settings, influence).accept(accept)
            report.require_fit()
        return make_plan(opened, scan, package, settings, report.accepted), report


def _result(
    plan: Plan,
    report: Report,
    clock: _Clock,
    state: Literal["planned", "nothing to do", "committed", "failed"],
    *,
    cells_done: int,
    version: int | None = None,
    outcome: Outcome | None = None,
) -> MapResult:
    quarantined = tuple(outcome.quarantined) if outcome else ()
    mapped = len(outcome.completions) if outcome else 0
    sizes = plan.cells, cells_done, len(plan.units)
    return MapResult(plan.run, state, version, *sizes, mapped, quarantined, report, dict(clock.seconds))


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
