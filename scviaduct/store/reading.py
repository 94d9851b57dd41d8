"""Reading a version: both tables side by side, a unit at a time, or row by row in the order of the source."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scviaduct.errors import InputError, StoreError
from scviaduct.store.derivedreading import DerivedColumns
from scviaduct.store.schema import LATENT_COLUMNS, LATENTS, RESERVED, TYPES
from scviaduct.store.where import parse_where

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from scviaduct.store.committing import Pair
    from scviaduct.store.derived import Derived

_BLOCK = 16_384


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a reader sees at one version: the newest ``cells`` commit and the ``latents`` version that it names.

    Attributes
    ----------
    version
        Of ``cells``; 0 for a space without a commit.
    run
        Run that made it.
    timestamp
        Milliseconds since 1970, UTC.
    pairs
        Name to the files of a unit, or of what is left of one.
    latents_version
        Version of ``latents`` that goes with it.
    columns
        Schema of ``cells``.
    derived
        Name of each derived set to what the version says of it.
    """

    version: int
    run: str
    timestamp: int
    pairs: Mapping[str, Pair]
    latents_version: int
    columns: pa.Schema
    derived: Mapping[str, Derived] = field(default_factory=dict)

    @property
    def cells(self) -> int:
        """Number of cells."""
        return sum(pair.cells.rows for pair in self.pairs.values())

    @property
    def names(self) -> tuple[str, ...]:
        """Columns that a reader sees: both tables joined, and those of derived sets behind the kept ones."""
        return (*self.own[:-3], *self.derived_types, *self.own[-3:])

    @property
    def own(self) -> tuple[str, ...]:
        """Columns of the two tables, joined."""
        first = ["source", "dataset_id", "observation_id", "source_row", "soma_joinid"]
        return (*first, *LATENT_COLUMNS, *self.kept, "unit", "unit_row", "run")

    @property
    def derived_types(self) -> dict[str, str]:
        """Columns of derived sets, as a reader sees them, to their types."""
        return {seen: one.columns[name] for one in self.derived.values() for seen, name in one.seen.items()}

    def named(self, name: str) -> Derived:
        """A derived set.

        Raises
        ------
        InputError
            If the version has none of that name.
        """
        if name not in self.derived:
            there = ", ".join(self.derived) or "none"
            raise InputError(f"Version {self.version} has no derived set '{name}'.", f"Derived sets: {there}.")
        return self.derived[name]

    @property
    def kept(self) -> tuple[str, ...]:
        """Kept obs columns."""
        return tuple(name for name in self.columns.names if name not in RESERVED)

    @property
    def schema(self) -> pa.Schema:
        """Schema of what a reader sees; kept text columns are dictionaries."""
        derived = {name: TYPES[kind] for name, kind in self.derived_types.items()}
        kinds = {field.name: field.type for field in (*LATENTS, *self.columns)} | derived
        repeating = (*self.kept, *derived, "label", "adapter", "source", "dataset_id")
        text = {name for name in repeating if pa.types.is_string(kinds[name])}
        coded = pa.dictionary(pa.int32(), pa.string())
        return pa.schema([(name, coded if name in text else kinds[name]) for name in self.names])


def read_units(
    space: Path, snapshot: Snapshot, columns: Sequence[str] | None, where: str | None
) -> Iterator[tuple[Pair, pa.Table]]:
    """Read units with cells for which a condition holds, in the order of source and first row.

    Parameters
    ----------
    space
        Folder of the space.
    snapshot
        Version.
    columns
        Names of :attr:`Snapshot.names`; None for all.
    where
        Keeps the cells for which it holds.
    """
    names = list(columns or snapshot.names)
    unknown = [name for name in names if name not in snapshot.names]
    if unknown:
        raise InputError(f"There is no column '{unknown[0]}'.", f"Columns: {', '.join(snapshot.names)}.")
    condition = None if where is None else parse_where(where, snapshot.schema)
    needed = list(dict.fromkeys([*names, *(condition.columns if condition else ())]))
    derived = DerivedColumns(space, snapshot.derived.values())
    for pair in sorted(snapshot.pairs.values(), key=order_of):
        table = _read_pair(space, snapshot, pair, needed, derived)
        if condition:
            table = table.filter(condition.expression)
        if len(table):
            yield pair, table.select(names)


def read_sorted(space: Path, snapshot: Snapshot, where: str | None) -> Iterator[pa.Table]:
    """Read all columns, row by row in the order of the source: those of units that interleave are merged.

    Memory is bounded by the units whose rows interleave at one place: one, unless datasets do.
    """
    held: list[pa.Table] = []
    ready: list[pa.Table] = []
    source = ""
    for pair, table in read_units(space, snapshot, None, where):
        at, first = order_of(pair)
        if at != source:
            ready += _merged(held)
            held, source = [], at
        # No later unit of the source has a row before this one's first.
        below = [int(np.searchsorted(part["source_row"].to_numpy(), first)) for part in held]
        ready += _merged([part.slice(0, n) for part, n in zip(held, below, strict=True) if n])
        held = [part.slice(n) for part, n in zip(held, below, strict=True) if n < len(part)]
        held.append(table)
        if sum(map(len, ready)) >= _BLOCK:
            yield pa.concat_tables(ready).unify_dictionaries()
            ready = []
    ready += _merged(held)
    if ready:
        yield pa.concat_tables(ready).unify_dictionaries()


def _merged(parts: Sequence[pa.Table]) -> list[pa.Table]:
    """Rows of one source in their order; each part has them in order."""
    if len(parts) < 2:
        return list(parts)
    rows = pa.concat_tables(parts).unify_dictionaries()
    order = np.argsort(rows["source_row"].to_numpy(), kind="stable")
    return [rows.take(pa.array(order))]


def order_of(pair: Pair) -> tuple[str, int]:
    """What units are ordered by: source and first row."""
    return pair.cells.source, pair.cells.first_row or 0


def _read_pair(space: Path, snapshot: Snapshot, pair: Pair, names: Sequence[str], derived: DerivedColumns) -> pa.Table:
    """Rows of a unit, with the columns of both tables side by side: both files hold the same rows in order.

    What is left of a unit keeps ``unit_row``, by which the rows of derived sets are found.
    """
    schema, of_sets = snapshot.schema, snapshot.derived_types
    of_derived = [name for name in names if name in of_sets]
    of_latents = [name for name in names if name in LATENT_COLUMNS]
    of_cells = [name for name in names if name not in LATENT_COLUMNS and name not in of_sets]
    if of_derived and "unit_row" not in of_cells:
        of_cells.append("unit_row")
    columns: dict[str, Any] = {}
    for table, file, wanted in (("latents", pair.latents, of_latents), ("cells", pair.cells, of_cells)):
        if wanted:
            columns |= _read_file(space / table / file.path, wanted)
    if of_derived:
        columns |= derived.read(pair.cells.unit, columns["unit_row"].to_numpy(), of_derived)
    empty = {name: pa.nulls(pair.cells.rows, schema.field(name).type) for name in names if name not in columns}
    kinds = pa.schema([schema.field(name) for name in names])
    return pa.table({name: (columns | empty)[name] for name in names}).cast(kinds)


def _read_file(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """Columns of a file, of those names that it has."""
    try:
        with pq.ParquetFile(path) as parquet:
            there = [name for name in names if name in parquet.schema_arrow.names]
            read = parquet.read(columns=there)
    except (OSError, pa.ArrowInvalid) as error:
        remedy = "Bring the file back from a copy of the store, or map the source into a new one."
        raise StoreError(f"{path} cannot be read ({error}).", remedy) from error
    return {name: read[name] for name in there}
