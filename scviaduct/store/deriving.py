"""What a space does with derived sets: makes, commits, drops and reads them."""

from __future__ import annotations

import abc
import secrets
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa

from scviaduct import faults
from scviaduct.errors import InputError, StoreError
from scviaduct.store.derived import Derived, DerivedSet, DerivedState, DerivedUnit, require_name
from scviaduct.store.derivedfolder import DerivedFolder
from scviaduct.store.derivedreading import DerivedMatrix, load_set, load_state, read_table
from scviaduct.store.derivedstaging import settled_path
from scviaduct.store.files import write_parquet
from scviaduct.store.reading import read_units

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from scviaduct.analysis.base import Shape
    from scviaduct.store.reading import Snapshot
    from scviaduct.values import FloatArray

KEYS = ("source", "dataset_id", "observation_id")


class Derives(abc.ABC):
    """The part of a space that deals with derived sets."""

    path: Path
    digest: str

    @abc.abstractmethod
    def snapshot(self, as_of: int | None = None) -> Snapshot:
        """What a reader sees at a version."""

    @abc.abstractmethod
    def amend(
        self,
        change: Callable[[Snapshot], Mapping[str, Derived]],
        told: Mapping[str, str],
        before: Callable[[], None],
    ) -> int:
        """Commit the derived sets that ``change`` makes of a snapshot's; the cells stay as they are."""

    def create_derived(
        self,
        what: str,
        shape: Shape,
        *,
        family: str,
        options: Mapping[str, Any],
        rows: int,
        adapters: Sequence[str] = (),
        basis: Any = None,
    ) -> DerivedFolder:
        """Open the folder of a derived set, and make it first if it is not there. Nothing becomes visible.

        Parameters
        ----------
        what
            Name of the output.
        shape
            Columns and matrices that it writes, those included that are settled once all units are done.
        family
            Of the reference.
        options
            What the output was told; JSON-serialisable.
        rows
            Cells of the largest unit, which the shards are made for. A larger one that comes later takes several.
        adapters
            Digests of the adapters that decide all units' values.
        basis
            What else decides a unit's values; JSON-serialisable.

        Raises
        ------
        InputError
            If a column or a matrix has a name or a type that cannot be stored.
        """
        told = {"family": family, "options": options, "adapters": adapters, "basis": basis}
        made = DerivedSet.of(what, shape, reference=self.digest, rows=rows, **told)
        return DerivedFolder.create(self.path, made)

    def commit_derived(
        self,
        name: str,
        folder: DerivedFolder,
        units: Iterable[str],
        told: Mapping[str, str],
        *,
        tables: Mapping[str, pd.DataFrame] | None = None,
        facts: Mapping[str, Any] | None = None,
        settled: str = "",
        before: Callable[[], None] = lambda: None,
    ) -> int:
        """Make a derived set visible under a name, in one commit that changes no cell.

        Units that the newest version has of the same set stay in it. A name that another set has goes to this one;
        older versions keep that one.

        Parameters
        ----------
        name
            What the user calls it: letters, digits, ``-`` and ``_``.
        folder
            The set.
        units
            Ids of units that are staged.
        told
            What the commit says of itself; ``run`` is required.
        tables
            Name to table. A named index becomes a column.
        facts
            Figures that the output came to; JSON-serialisable.
        settled
            Key under which the columns of these units were settled; empty where none were.
        before
            Called once, just before anything becomes visible, or if everything is already.

        Returns
        -------
        int
            The version that names the set.

        Raises
        ------
        InputError
            If the name cannot be one, or a column is called as one that the space has.
        StoreError
            If a staged file is missing, or other writers commit faster than this one for very long.
        """
        require_name("derived set", name)
        own = _whole(folder, list(units), settled)
        files = {table: _write_table(folder.path, table, rows) for table, rows in (tables or {}).items()}
        folder.assign({})  # a driver that was killed while arrays grew may have left one short

        def change(snapshot: Snapshot) -> dict[str, Derived]:
            there = snapshot.derived.get(name)
            units = dict(own)
            if there is not None and there.id == folder.made.id:
                # What settled them did not know of these units: they have their own columns alone.
                kept = load_state(self.path, there).units.items()
                units = {unit: DerivedUnit(known.slot, known.rows) for unit, known in kept} | own
            state = DerivedState(dict(sorted(units.items())), files, dict(facts or {}))
            cells = sum(known.rows for known in units.values())
            counts = state.save(folder.path), len(units), cells
            names = tuple(folder.made.matrices), tuple(files)
            derived = Derived(name, folder.made.id, folder.made.what, *counts, folder.made.columns, *names)
            _refuse_clash(snapshot, derived)
            faults.point("derived-written")
            return {**snapshot.derived, name: derived}

        return self.amend(change, told, before)

    def drop_derived(self, name: str, run: str = "") -> int:
        """Stop naming a derived set, in one commit; older versions keep it. The version without it.

        Parameters
        ----------
        name
            Of the set.
        run
            What the version says made it; ``drop-NAME`` if empty.

        Raises
        ------
        InputError
            If there is no such set.
        """

        def change(snapshot: Snapshot) -> dict[str, Derived]:
            snapshot.named(name)
            return {other: derived for other, derived in snapshot.derived.items() if other != name}

        return self.amend(change, {"run": run or f"drop-{name}"}, lambda: None)

    def derived_set(self, name: str, as_of: int | None = None) -> DerivedSet:
        """What a derived set is: options, columns, and its matrices with their features.

        Raises
        ------
        InputError
            If the version has no such set.
        """
        return load_set(self.path, self.snapshot(as_of).named(name))

    def derived_state(self, name: str, as_of: int | None = None) -> DerivedState:
        """What of a derived set belongs to a version: units with their slots, tables, facts.

        Raises
        ------
        InputError
            If the version has no such set.
        """
        return load_state(self.path, self.snapshot(as_of).named(name))

    def matrix(
        self,
        name: str,
        matrix: str,
        where: str | None = None,
        as_of: int | None = None,
        features: Sequence[str] | None = None,
        columns: Sequence[str] = KEYS,
    ) -> Iterator[tuple[pa.Table, FloatArray]]:
        """Read a matrix of a derived set, a unit at a time, in the order of :meth:`Space.read`.

        Parameters
        ----------
        name, matrix
            The set, and its matrix.
        where, as_of
            Condition and version.
        features
            Those that are wanted, in their order; None for all, as :meth:`derived_set` names them.
        columns
            What the table has of each cell: names of :attr:`Snapshot.names`.

        Yields
        ------
        tuple
            A table with a row per cell, and float32 of shape ``(n_cells, n_features)``: NaN for a cell that was not
            mapped or whose unit was not derived.

        Raises
        ------
        InputError
            If there is no such set, matrix, feature or column.
        """
        snapshot = self.snapshot(as_of)
        reader = DerivedMatrix(self.path, snapshot.named(name), matrix, features)
        for pair, rows in read_units(self.path, snapshot, list(dict.fromkeys([*columns, "unit_row"])), where):
            yield rows.select(list(columns)), reader.read(pair.cells.unit, rows["unit_row"].to_numpy())

    def table(self, name: str, table: str, as_of: int | None = None) -> pa.Table:
        """Read a table of a derived set.

        Raises
        ------
        InputError
            If the version has no such set, or the set no such table.
        """
        return read_table(self.path, self.snapshot(as_of).named(name), table)


def _whole(folder: DerivedFolder, units: Sequence[str], settled: str) -> dict[str, DerivedUnit]:
    """What a state says of these units, all of whose files are there."""
    done = folder.completions(units)
    for unit in units:
        if unit not in done or (settled and not settled_path(folder.path, settled, unit).exists()):
            problem = f"A staged file of unit {unit} of derived set {folder.made.id} is missing or has another size."
            raise StoreError(problem, "Nothing was committed. Run the same command again: the unit is derived anew.")
    return {unit: DerivedUnit(found.slot, found.rows, settled) for unit, found in done.items()}


def _write_table(folder: Path, name: str, rows: pd.DataFrame) -> str:
    """Write a table under its name and the digest of its bytes; its path in the set."""
    require_name("derived table", name)
    named = rows if isinstance(rows.index, pd.RangeIndex) and rows.index.name is None else rows.reset_index()
    told = pa.Table.from_pandas(named, preserve_index=False)
    temporary = folder / "tables" / f".{name}.{secrets.token_hex(4)}"
    try:
        write_parquet(told, temporary)
        path = f"tables/{name}.{blake2b(temporary.read_bytes(), digest_size=6).hexdigest()}.parquet"
        temporary.replace(folder / path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _refuse_clash(snapshot: Snapshot, derived: Derived) -> None:
    """Refuse columns that are called as others of the space, in whatever case."""
    others = {seen for name, one in snapshot.derived.items() if name != derived.name for seen in one.seen}
    taken = {name.lower(): name for name in (*snapshot.own, *others)}
    for seen in derived.seen:
        if other := taken.get(seen.lower()):
            problem = f"Derived set '{derived.name}' would have a column '{seen}', and the space has '{other}'."
            raise InputError(problem, "Give the set another name: --name NAME.")
        taken[seen.lower()] = seen
