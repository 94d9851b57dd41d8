"""What a reference makes of cells that were mapped: outputs into the store beside them, comparisons as tables."""

from __future__ import annotations

import time
from dataclasses import asdict, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cluster.connect import require_answer
from pipelines.derivation import Derivation, Where, sources_of
from pipelines.derived import DeriveResult
from pipelines.progress import reporter
from pipelines.selecting import choose
from scviaduct.analysis import Comparison, Output, analyses, analysis
from scviaduct.analysis.base import Shape
from scviaduct.errors import InputError, ScviaductError
from scviaduct.mapping.decoding import decoded_facts, source_column
from scviaduct.references.package import Reference
from scviaduct.references.registry import Registry
from scviaduct.sources import open_shard
from scviaduct.store import Store, settled_key
from scviaduct.values import digest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from cluster.dispatch import Quarantined
    from pipelines.derivation import Source
    from pipelines.progress import Reporter
    from scviaduct.analysis import Analysis, Finished
    from scviaduct.families import Facts
    from scviaduct.store import Space


def derive(
    store: str,
    what: str,
    *,
    name: str | None = None,
    reference: str | None = None,
    package: str | None = None,
    engine: Literal["ray", "inline"] = "ray",
    address: str | None = None,
    actors: int | None = None,
    readers: int | None = None,
    gpus_per_actor: float | None = None,
    quiet: bool = False,
    **options: Any,
) -> DeriveResult:
    """Derive something of all cells of a store's newest version.

    Counts are read again from where they were mapped from, which must hold them still. What was derived before is kept:
    after a further ``map`` only its units are derived. A run that was killed goes on where it was.

    Parameters
    ----------
    store
        Folder of the store.
    what
        Name of the analysis, e.g. ``normalised-expression``; see :func:`scviaduct.analysis.analyses`.
    name
        What the set is called in the store; None for the name of the analysis. Another set of that name is replaced in
        the next version.
    reference
        Space of the store, by its reference; needed if the store has several.
    package
        Path of the space's package, where it is not registered.
    engine, address, actors, readers, gpus_per_actor
        As :func:`pipelines.map` takes them.
    quiet
        Without progress.
    **options
        What the analysis takes; see its options.

    Raises
    ------
    InputError
        If there is no such analysis of the reference's family, or it refuses an option.
    EngineError
        If actors cannot be started.
    """
    began = time.monotonic()
    opened = Store.open(store)
    space = opened.space(reference)
    found = package_of(space, package)
    one = analysis(what, found.family)
    told = told_options(one, options)
    if engine == "ray":
        require_answer(address)
    source = sources_of(opened, space, found)
    facts = decoded_facts(found, source.fleet.addresses if source.fleet else {})
    one.check(facts, told)
    require_columns(source, found, one.obs(facts, told))
    run = _Run(space, found, source, one, told, facts, name or what, began)
    # Before Ray is started: a wrong condition is answered at once.
    rows = choose(space, told.select, told.against, told.cells) if isinstance(one, Comparison) else {}
    where = Where(engine, address, actors, readers, gpus_per_actor)
    with reporter(quiet=quiet) as progress, Derivation(found, source, what, told, progress, where) as derivation:
        if isinstance(one, Comparison):
            return run.compare(one, derivation, rows)
        if isinstance(one, Output):
            return run.output(one, derivation, progress)
    raise TypeError(f"{what} is neither an output nor a comparison")


def analyses_of(
    store: str, *, reference: str | None = None, package: str | None = None
) -> list[tuple[str, str, dict[str, Any]]]:
    """What can be derived of a store's cells: name, what it gives, and its options with their defaults."""
    family = package_of(Store.open(store).space(reference), package).family
    there = [one for found in analyses().values() for one in found if family in one.families]
    return [(one.name, one.about, {f.name: f.default for f in fields(one.options)}) for one in there]


def package_of(space: Space, package: str | None) -> Reference:
    """The package that a space was mapped with.

    Raises
    ------
    InputError
        If it is not registered, or the one that was named is another.
    """
    found = Reference.load(package) if package else Registry().get(space.reference)
    if found.digest != space.digest:
        raise InputError(
            f"Reference '{found.name}' has digest {found.digest[:12]}, and space '{space.name}' was mapped with"
            f" {space.digest[:12]}.",
            "Name the package that mapped it: --package DIR.",
        )
    return found


def told_options(one: Analysis, options: Mapping[str, Any]) -> Any:
    """The options of an analysis from what was told; None stands for what was not.

    Raises
    ------
    InputError
        If it takes no such option.
    """
    told = {key: value for key, value in options.items() if value is not None}
    known = [field.name for field in fields(one.options)]
    for key in told:
        if key not in known:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in known)
            raise InputError(f"'{one.name}' takes no --{key.replace('_', '-')}.", f"It takes: {flags or 'no options'}.")
    return one.options(**told)


def require_columns(source: Source, reference: Reference, names: Sequence[str]) -> None:
    """Refuse an obs column that a source lacks, before any of it is read.

    Parameters
    ----------
    source
        Where the cells come from.
    reference
        The package.
    names
        Columns that an analysis reads.

    Raises
    ------
    InputError
        Naming the column and the source.
    """
    wanted = {source_column(reference, source.settings, name) for name in names}
    for shard in {unit.shard.uri: unit.shard for unit in source.units}.values():
        try:
            there = open_shard(shard).obs_columns()
        except ScviaductError:  # a source that is gone: its units say so, and the others are derived
            continue
        for name in sorted(wanted.difference(there)):
            close = ", ".join(get_close_matches(name, there, n=3) or there[:8])
            raise InputError(f"{shard.source} has no obs column '{name}'.", f"There are: {close}.")


class _Run:
    """One derivation into one set."""

    def __init__(
        self,
        space: Space,
        reference: Reference,
        source: Source,
        one: Analysis,
        options: Any,
        facts: Facts,
        name: str,
        began: float,
    ) -> None:
        self._space, self._reference, self._source, self._one = space, reference, source, one
        self._options, self._facts, self._name, self._began = options, facts, name, began

    def compare(
        self, one: Comparison, derivation: Derivation, rows: Mapping[str, npt.NDArray[np.int64]]
    ) -> DeriveResult:
        """Compare the chosen cells of both selections, and commit the table."""
        basis = {"cells": digest({unit: told.tolist() for unit, told in rows.items()})}
        folder = self._space.create_derived(
            one.name, Shape(), family=self._reference.family, options=self._told, rows=1, basis=basis
        )
        there = self._space.snapshot().derived.get(self._name)
        if there and there.id == folder.made.id:
            return self._result("nothing to do", self._space.head(), 0, None)
        finished = derivation.compare(rows, one.obs(self._facts, self._options))
        run = digest(folder.made.id)[:16]
        version = self._space.commit_derived(
            self._name, folder, [], {"run": run}, tables=finished.tables, facts=finished.facts
        )
        return self._result("committed", version, 0, finished)

    def output(self, one: Output, derivation: Derivation, progress: Reporter) -> DeriveResult:
        """Derive the units that are missing, put their sums together, and commit."""
        units = {unit.id: unit.shard.cells for unit in self._source.units}
        # What all units' values depend on; an adapter that its own cells alone depend on is part of their unit's id.
        shared = sorted(self._source.fleet.addresses.values()) if self._source.fleet and self._facts.sample_key else []
        if self._is_there(one, units, shared):
            return self._result("nothing to do", self._space.head(), 0, None)
        told = derivation.prepare(one, self._facts, self._options)
        folder = self._space.create_derived(
            one.name,
            one.shape(self._facts, self._options),
            family=self._reference.family,
            options=self._told,
            rows=max(units.values()),
            adapters=shared,
            basis=_digest_of(told),
        )
        before = folder.completions(units)
        slots = folder.assign(units)
        todo = [unit for unit in self._source.units if unit.id not in before]
        quarantined = derivation.units(todo, folder.stager(), slots, told, one.obs(self._facts, self._options))
        completed = folder.completions(units)
        done = [unit for unit in units if unit in completed]
        if not done:
            return self._result("failed", None, 0, None, tuple(quarantined))
        progress.say(f"putting {len(done):,} unit{'s' * (len(done) != 1)} together")
        stager = folder.stager()
        finished = one.finish([stager.sums(unit) for unit in done], self._facts, self._options)
        key = self._settle(one, stager, done, finished)
        run = digest(folder.made.id, done)[:16]
        version = self._space.commit_derived(
            self._name, folder, done, {"run": run}, tables=finished.tables, facts=finished.facts, settled=key
        )
        return self._result("committed", version, len(todo) - len(quarantined), finished, tuple(quarantined))

    def _settle(self, one: Output, stager: Any, done: Sequence[str], finished: Finished) -> str:
        """Write columns that depend on what all units came to; their key, empty for none."""
        key = ""
        for unit in done:
            if columns := one.settle(stager.columns(unit), finished, self._options):
                key = key or settled_key(done)
                stager.settle(unit, key, columns)
        return key

    def _is_there(self, one: Output, units: Mapping[str, int], adapters: Sequence[str]) -> bool:
        """Whether the version has the very set, put together from these units: their cells decide everything else."""
        if self._name not in self._space.snapshot().derived:
            return False
        made, state = self._space.derived_set(self._name), self._space.derived_state(self._name)
        same = (made.what, made.options, list(made.adapters)) == (one.name, self._told, list(adapters))
        return same and made.reference == self._space.digest and set(state.units) == set(units)

    @property
    def _told(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self._options).items()}

    def _result(
        self,
        state: Literal["committed", "nothing to do", "failed"],
        version: int | None,
        derived: int,
        finished: Finished | None,
        quarantined: tuple[Quarantined, ...] = (),
    ) -> DeriveResult:
        named = self._space.snapshot().derived.get(self._name) if version is not None else None
        tables = dict(finished.tables) if finished else {}
        if finished is None and named:
            tables = {table: self._space.table(self._name, table).to_pandas() for table in named.tables}
        return DeriveResult(
            self._name,
            self._one.name,
            state,
            version,
            named.units if named else 0,
            named.cells if named else 0,
            derived,
            tuple(named.seen) if named else (),
            named.matrices if named else (),
            tables,
            quarantined,
            round(time.monotonic() - self._began, 1),
        )


def _digest_of(told: Mapping[str, Any]) -> str | None:
    """Of what units are told of a sample; None for nothing."""
    if not told:
        return None
    return digest({name: [str(values.dtype), list(values.shape), _hex(values)] for name, values in told.items()})


def _hex(values: Any) -> str:
    import hashlib

    if values.dtype.hasobject:
        return digest([str(value) for value in values.ravel()])
    return hashlib.blake2b(np.ascontiguousarray(values).tobytes(), digest_size=16).hexdigest()


__all__ = ["DeriveResult", "derive"]
