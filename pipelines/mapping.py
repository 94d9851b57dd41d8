"""The main job: stream query cells, map them with references, commit what comes out as one version of each space."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, overload

from cluster.connect import connect, require_answer
from pipelines.jobs import SHARD_CELLS
from pipelines.landing_alongside import landing_beside, require_place
from pipelines.progress import reporter
from pipelines.query import Asked, Query, batches_of_query, scan_query, told_surgery
from pipelines.results import Clock, MapResult, MapResults, Told
from pipelines.running import Run
from pipelines.surgery import Fitting, planned, shelf_in
from pipelines.together import Together
from scviaduct.errors import DataError, InputError
from scviaduct.mapping import preflight
from scviaduct.mapping.fleet import Fleet
from scviaduct.mapping.surgery import recalled
from scviaduct.references.registry import Registry
from scviaduct.sources import open_source
from scviaduct.store import Store
from scviaduct.store.schema import new_columns
from scviaduct.values import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pipelines.progress import Reporter
    from scviaduct.landing.alongside import Alongside
    from scviaduct.mapping.preflight import Report
    from scviaduct.references.package import Reference
    from scviaduct.sources import Source
    from scviaduct.store import Space
    from scviaduct.values import Scan, Shard


# The name of the command; the overloads leave the options, which decide nothing of the type, to the implementation.
@overload
def map(source: str, *, reference: str, store: str, **options: Any) -> MapResult: ...  # noqa: A001


@overload
def map(source: str, *, reference: Sequence[str], store: str, **options: Any) -> MapResults: ...  # noqa: A001


def map(  # type: ignore[misc]  # noqa: A001
    source: str,
    *,
    reference: str | Sequence[str],
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
    land: str | None = None,
    dry_run: bool = False,
    quiet: bool = False,
) -> MapResult | MapResults:
    """Map query cells to a reference, or to several at once, into a store.

    All cells of a run become visible in one commit. A run that was killed or interrupted goes on where it was when it
    is called again with the same arguments; a run that is complete does nothing and says so.

    Several references are several runs on one reading of the source: the same runs, units and rows as one after the
    other makes. Each is committed to its own space, one space after the other.

    Parameters
    ----------
    source
        URI of the query cells.
    reference
        Registered name, or path of a package; on a cluster every node must be able to read it. Or a list of them: the
        other arguments then hold for each, and nothing is mapped unless all of them fit.
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
    land
        Folder of a landing that the source is landed into while it is read; None for none.
    dry_run
        Check and plan, and stop before any work.
    quiet
        Without progress.

    Returns
    -------
    MapResult or MapResults
        What the run came to; for a list of references, what each run came to.

    Raises
    ------
    InputError
        If an argument, the source or a reference is wrong.
    NotFitError
        If preflight closes the gate, or cannot tell; of several references, for any.
    EngineError
        If actors cannot be started. Completed units are kept.
    """
    if shard_cells < 1:
        remedy = f"Give at least 1; the default is {SHARD_CELLS}."
        raise InputError(f"--shard-cells {shard_cells} holds no cell.", remedy)
    packages = _packages([reference] if isinstance(reference, str) else reference)
    asked = [
        Asked(package, told_surgery(surgery, surgery_cells, surgery_epochs, background, package))
        for package in packages
    ]
    settings = Settings(
        batch_key=batch_key, sample_key=sample_key, ambiguous_entropy=ambiguous_entropy, neighbors=neighbors
    )
    if engine == "ray" and not dry_run:
        require_answer(address)  # before the minutes that scanning an atlas takes
    clock = Clock()
    with reporter(quiet=quiet) as progress, open_source(source) as opened:
        queries = _queries(opened, asked, settings, keep_obs, shard_cells, accept, clock)
        if dry_run:
            require_place(land, opened, shard_cells)
            results, landed = [_planned(query, store, clock) for query in queries], None
        else:
            on = (address, actors, readers, gpus_per_actor)
            kept = Store.create(store)
            with landing_beside(land, opened, queries[0].scan, shard_cells, progress) as beside:
                alongside = beside.shards if beside else None
                results = _mapped(queries, kept, progress, clock, engine, on, alongside)
                landed = beside.finish(engine, address, readers) if beside else None
    return replace(results[0], landing=landed) if isinstance(reference, str) else MapResults(tuple(results), landed)


def _packages(names: Sequence[str]) -> list[Reference]:
    """The packages of some references, each once."""
    if not names:
        raise InputError(
            "No reference is named.", 'Name one or several: reference="pbmc" or reference=["pbmc", "lung"].'
        )
    packages: dict[str, Reference] = {}
    for name in names:
        package = Registry().get(name)
        if other := packages.get(package.digest):
            raise InputError(
                f"--reference {name} is the same package as '{other.name}' ({package.digest[:12]}).",
                "Name each reference once.",
            )
        packages[package.digest] = package
    return list(packages.values())


def _queries(
    opened: Source,
    asked: Sequence[Asked],
    settings: Settings,
    keep_obs: Sequence[str],
    shard_cells: int,
    accept: Sequence[str],
    clock: Clock,
) -> list[Query]:
    """Scan the source, and open or close the gate."""
    with clock.stage("scan"):
        scans, settings = scan_query(opened, asked, settings, keep_obs, shard_cells)
    with clock.stage("preflight"):
        reports = _reports(opened, asked, settings, scans, accept)
        preflight.require_fit(reports)
    return [
        Query(
            opened,
            one.reference,
            settings,
            scan,
            report,
            one.surgery,
            batches_of_query(one.reference, settings, scan, one.surgery),
        )
        for one, scan, report in zip(asked, scans, reports, strict=True)
    ]


def _reports(
    opened: Source, asked: Sequence[Asked], settings: Settings, scans: Sequence[Scan], accept: Sequence[str]
) -> list[Report]:
    """The preflight of each reference, on one sample."""
    looked = preflight.read_sample(scans[0], [one.reference for one in asked])
    reports = []
    for at, (one, scan) in enumerate(zip(asked, scans, strict=True)):
        blocks = [piece if isinstance(piece, DataError) else piece.of(at) for piece in looked]
        influence, mode = one.reference.encoder().gene_influence(), one.surgery.mode
        report = preflight.check(opened, scan, one.reference, settings, influence, surgery=mode, looked=blocks)
        reports.append(report.accept(accept))
    return reports


def _planned(query: Query, store: str, clock: Clock) -> MapResult:
    """What a run would do; its id is not known before the samples of batches that are to be fitted are read."""
    if query.batches is None:
        return Told(query.plan(None), query.report, clock).result("planned", 0)
    shelf = shelf_in(store, query.reference)
    batches = planned(query, shelf)
    fleet = Fleet(
        shelf, recalled(query.batches, shelf, query.reference, query.surgery)[0], decoder=query.surgery.decoder
    )
    plan = query.plan(fleet)
    known = all(item.state == "reused" for item in batches)
    return Told(plan if known else replace(plan, run=""), query.report, clock, batches).result("planned", 0)


def _mapped(
    queries: Sequence[Query],
    store: Store,
    progress: Reporter,
    clock: Clock,
    engine: Literal["ray", "inline"],
    on: tuple[str | None, int | None, int | None, float | None],
    alongside: Mapping[Shard, Alongside] | None,
) -> list[MapResult]:
    """Fit what is missing, map what is left, and commit each reference's run."""
    address, actors, _, gpus = on
    spaces = [_space(store, query) for query in queries]  # each refuses what it cannot take, before any work
    fittings = [
        Fitting(query, space.adapters, progress) if query.batches else None
        for query, space in zip(queries, spaces, strict=True)
    ]
    with ExitStack() as stack:
        if left := [one for one in fittings if one and one.left]:
            if engine == "ray":
                stack.enter_context(connect(address))  # one Ray for surgery and mapping
            with clock.stage("surgery"):
                for one in left:
                    one.run(engine, address, actors, gpus)
        fleets = [one.fleet if one else None for one in fittings]
        runs = [
            Run(query.plan(fleet), query.reference, store, space, fleet, fractional=query.fractional)
            for query, space, fleet in zip(queries, spaces, fleets, strict=True)
        ]
        if not all(run.is_complete for run in runs):
            together = Together(runs, progress, alongside)
            with clock.stage("map"):
                together.inline() if engine == "inline" else together.on_ray(*on)
    told = [
        Told(run.plan, query.report, clock, one.batches if one else ())
        for run, query, one in zip(runs, queries, fittings, strict=True)
    ]
    return [_committed(run, one) for run, one in zip(runs, told, strict=True)]


def _space(store: Store, query: Query) -> Space:
    """The space of a reference, which takes the query's kept columns."""
    package = query.reference
    space = store.create_space(package.name, package.digest, package.n_latent, package.labels)
    there = space.snapshot()
    new_columns(there.columns, query.settings.keep_obs, there.derived_types)  # refuses another type
    return space


def _committed(run: Run, told: Told) -> MapResult:
    """Make what is done visible, unless it is."""
    if run.is_complete:
        return told.result("nothing to do", run.plan.cells, run.space.head())
    told = replace(told, clock=told.clock.copy())
    with told.clock.stage("commit"):
        version = run.commit(told.clock.seconds)
    return told.result("failed" if version is None else "committed", run.cells_done(), version, run)


__all__ = ["MapResult", "MapResults", "map"]
