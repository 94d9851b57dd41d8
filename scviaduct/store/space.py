"""A space: one reference's latents in a store, and its versions."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Self

from deltalake.exceptions import CommitFailedError

from scviaduct import faults
from scviaduct.errors import InputError, StoreError
from scviaduct.mapping.adapters import Shelf
from scviaduct.store.committing import Pair, milliseconds, replace_cells, require_whole
from scviaduct.store.derived import Derived
from scviaduct.store.deriving import Derives
from scviaduct.store.files import write_once
from scviaduct.store.reading import Snapshot, read_sorted, read_units
from scviaduct.store.schema import LATENTS, cells_schema, new_columns
from scviaduct.store.staging import Completion, is_whole, record_path
from scviaduct.store.tables import Table, Version

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    import pyarrow as pa

    from scviaduct.store.search import Searcher

_TRIES = 20
_TOLD = "scviaduct."


class Space(Derives):
    """One reference's latents: two Delta tables with one commit point.

    Parameters
    ----------
    path
        Folder of the space.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        told = json.loads((path / "space.json").read_text())
        self.name: str = path.name
        self.reference: str = told["reference"]
        self.digest: str = told["digest"]
        self.n_latent: int = told["n_latent"]
        self.labels: tuple[str, ...] = tuple(told["labels"])
        self._latents = Table(path / "latents", f"scviaduct:{self.name}")
        self._cells = Table(path / "cells", f"scviaduct:{self.name}")

    @property
    def adapters(self) -> Shelf:
        """What surgery learnt of query batches."""
        return Shelf(str(self.path / "adapters"))

    @classmethod
    def create(cls, path: Path, told: Mapping[str, Any]) -> Self:
        """Open a space, and make it first if it is not there; the marker comes last, so that whoever sees it may read.

        Parameters
        ----------
        path
            Folder of the space.
        told
            Reference, digest, n_latent and labels.

        Raises
        ------
        InputError
            If the folder is the space of another reference.
        """
        for name, schema in (("latents", LATENTS), ("cells", cells_schema({}))):
            Table(path / name, "").create(schema)
        write_once(path / "space.json", told)
        space = cls(path)
        if space.digest != told["digest"]:
            raise InputError(
                f"Space '{space.name}' is of the reference with digest {space.digest}, not {told['digest']}.",
                "Register the reference under another name.",
            )
        return space

    def snapshot(self, as_of: int | None = None) -> Snapshot:
        """What a reader sees at a version, the newest if none is named.

        Raises
        ------
        StoreError
            If there is no such version.
        """
        return self._resolve(self._cells.load(as_of))

    def _resolve(self, cells: Version) -> Snapshot:
        told = self._cells.told(cells.number)
        named, run = int(told.get(f"{_TOLD}latents", 0)), told.get(f"{_TOLD}run", "")
        by_name = {file.name: file for file in self._latents.load(named).files.values()}
        for file in cells.files.values():
            if file.name not in by_name:
                problem = f"Version {cells.number} of {self.name} names {file.path}, which no latents go with."
                raise StoreError(problem, "Something else rewrote the table; --as-of reads the versions before.")
        pairs = {file.name: Pair(by_name[file.name], file) for file in cells.files.values()}
        sets = json.loads(told.get(f"{_TOLD}derived", "{}"))
        derived = {name: Derived.heard(name, one) for name, one in sets.items()}
        return Snapshot(cells.number, run, cells.timestamp, pairs, named, cells.columns, derived)

    def head(self) -> int:
        """Newest version; 0 for a space without a commit."""
        return self._cells.load().number

    def versions(self) -> list[dict[str, Any]]:
        """Every version with its run, time and number of cells, newest first."""
        return [
            {
                "version": entry["version"],
                "run": entry[f"{_TOLD}run"],
                "cells": int(entry[f"{_TOLD}cells"]),
                "timestamp": entry["timestamp"],
            }
            for entry in self._cells.history()
            if f"{_TOLD}run" in entry
        ]

    def runs(self) -> dict[str, int]:
        """Run to the newest version that it made."""
        return {entry["run"]: entry["version"] for entry in reversed(self.versions())}

    def completions(self, units: Iterable[str]) -> dict[str, Completion]:
        """Units that are done: their record is there, and so are their files."""
        found = {}
        for unit in units:
            record = record_path(self.path, unit)
            if record.exists() and is_whole(self.path, completion := Completion.load(record)):
                found[unit] = completion
        return found

    def is_visible(self, completions: Iterable[Completion]) -> bool:
        """Whether the newest version holds all of these units, whole."""
        pairs = self.snapshot().pairs
        return all(completion.cells.name in pairs for completion in completions)

    def commit(
        self,
        completions: Sequence[Completion],
        kept: Mapping[str, str],
        told: Mapping[str, str],
        before: Callable[[], None],
    ) -> int:
        """Make units visible, and every cell visible once, in one commit.

        Parameters
        ----------
        completions
            The units, all of them whole.
        kept
            Kept obs column to its type; columns new to the space are added.
        told
            What the commit says of itself; ``run`` is required.
        before
            Called once, just before anything becomes visible, or if everything is already: the run's record is written
            there.

        Returns
        -------
        int
            The version that holds the units; the newest one if it holds them already.

        Raises
        ------
        StoreError
            If a staged file is missing, or other writers commit faster than this one for very long.
        """
        recorded = False
        for _ in range(_TRIES):
            head = self._cells.load()
            snapshot = self._resolve(head)
            if completions and all(completion.cells.name in snapshot.pairs for completion in completions):
                if not recorded:  # an attempt that brought nothing new may have put units into quarantine
                    before()
                return snapshot.version
            change = replace_cells(self.path, snapshot.pairs, completions)
            require_whole(self.path, completions, change.add)
            try:
                if self._widen(head, kept, snapshot.derived_types):
                    continue
                named = self._commit_latents(snapshot, change.add, change.remove)
                faults.point("latents-committed")
                if not recorded:
                    before()
                    recorded = True
                dropped = sum(pair.cells.rows for pair in change.remove)
                cells = snapshot.cells + sum(pair.cells.rows for pair in change.add) - dropped
                said = _said(told, named, cells, snapshot.derived)
                add, remove = [pair.cells for pair in change.add], [pair.cells for pair in change.remove]
                self._cells.commit(head, add, remove, said, now=milliseconds())
            except CommitFailedError:
                continue
            faults.point("committed")
            return head.number + 1
        raise self._overtaken()

    def amend(
        self,
        change: Callable[[Snapshot], Mapping[str, Derived]],
        told: Mapping[str, str],
        before: Callable[[], None],
    ) -> int:
        """Commit other derived sets with the same cells.

        Parameters
        ----------
        change
            Makes the sets of the next version of a snapshot; called again if another writer was quicker.
        told
            What the commit says of itself; ``run`` is required.
        before
            Called once, just before anything becomes visible, or if there is nothing to change.

        Returns
        -------
        int
            The version that has the sets; the newest one if it has them already.
        """
        recorded = False
        for _ in range(_TRIES):
            head = self._cells.load()
            snapshot = self._resolve(head)
            derived = change(snapshot)
            if not recorded:
                before()
                recorded = True
            if derived == snapshot.derived:
                return snapshot.version
            said = _said(told, snapshot.latents_version, snapshot.cells, derived)
            try:
                self._cells.commit(head, [], [], said, now=milliseconds())
            except CommitFailedError:
                continue
            faults.point("committed")
            return head.number + 1
        raise self._overtaken()

    def _overtaken(self) -> StoreError:
        remedy = "What is staged is kept: run the command again."
        return StoreError(f"Other writers kept committing to {self.name}.", remedy)

    def _widen(self, head: Version, kept: Mapping[str, str], derived: Iterable[str]) -> bool:
        """Add columns that the space lacks; whether there were any."""
        missing = new_columns(head.columns, kept, derived)
        if missing:
            self._cells.widen(head, missing)
        return bool(missing)

    def _commit_latents(self, snapshot: Snapshot, add: Sequence[Pair], remove: Sequence[Pair]) -> int:
        """Bring ``latents`` from its newest version, whoever made it, to what the commit needs; the version."""
        wanted = {pair.latents.path: pair.latents for pair in snapshot.pairs.values()}
        for pair in remove:
            wanted.pop(pair.latents.path)
        wanted |= {pair.latents.path: pair.latents for pair in add}
        head = self._latents.load()
        missing = [field for field in LATENTS if field.name not in head.columns.names]
        if missing:  # the space was made before there was such a column
            self._latents.widen(head, missing)
            head = self._latents.load()
        more = [file for path, file in wanted.items() if path not in head.files]
        less = [file for path, file in head.files.items() if path not in wanted]
        self._latents.commit(head, more, less, {}, now=milliseconds())
        return head.number + 1

    def read(
        self, columns: Sequence[str] | None = None, where: str | None = None, as_of: int | None = None
    ) -> Iterator[pa.Table]:
        """Read cells with their latents and labels, one table per unit, in the order of source and first row.

        Memory is bounded by a unit. Units of datasets that interleave in the source do so here: :meth:`read_sorted`.

        Parameters
        ----------
        columns
            Names of :attr:`Snapshot.names`; None for all.
        where
            Keeps the cells for which it holds.
        as_of
            Version; None for the newest.

        Raises
        ------
        FilterError
            If ``where`` does not parse or names an unknown column.
        """
        for _, table in read_units(self.path, self.snapshot(as_of), columns, where):
            yield table

    def read_sorted(self, where: str | None = None, as_of: int | None = None) -> Iterator[pa.Table]:
        """Read all columns in tables whose rows, one after the other, are in the order of source and row.

        Memory is bounded by the units whose rows interleave at one place. Parameters and errors are those of
        :meth:`read`.
        """
        return read_sorted(self.path, self.snapshot(as_of), where)

    def schema(self, snapshot: Snapshot) -> pa.Schema:
        """Schema of what a reader sees; kept text columns are dictionaries."""
        return snapshot.schema

    def count(self, where: str | None = None, as_of: int | None = None) -> int:
        """Number of cells, or of those for which ``where`` holds."""
        if where is None:
            return self.snapshot(as_of).cells
        return sum(len(table) for table in self.read(["unit"], where, as_of))

    def searcher(self, as_of: int | None = None, threads: int | None = None) -> Searcher:
        """Open a version's index for searches, and build it first if it is not there.

        Parameters
        ----------
        as_of
            Version; None for the newest.
        threads
            That queries are spread over; None for one a core of this process.
        """
        from scviaduct.store.search import Searcher  # which needs numba, and reads spaces

        return Searcher.open(self, as_of, threads)


def _said(told: Mapping[str, str], latents: int, cells: int, derived: Mapping[str, Derived]) -> dict[str, str]:
    """What a commit of ``cells`` says: its own facts, and what belongs to the version."""
    facts: dict[str, Any] = {**told, "latents": latents, "cells": cells}
    if derived:
        facts["derived"] = json.dumps({name: one.told() for name, one in derived.items()})
    return {f"{_TOLD}{key}": str(value) for key, value in facts.items()}
