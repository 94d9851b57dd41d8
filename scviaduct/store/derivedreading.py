"""Reading derived sets as a version names them: columns beside the cells' own, matrices a unit at a time, tables."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scviaduct.errors import InputError, StoreError
from scviaduct.store.derived import FOLDER, Derived, DerivedSet, DerivedState, DerivedUnit
from scviaduct.store.derivedstaging import DerivedCompletion, record_path, settled_path
from scviaduct.store.files import size
from scviaduct.store.schema import TYPES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from scviaduct.values import FloatArray, LongArray

_REMEDY = "Bring the file back from a copy of the store, or drop the set and derive it again."


def read_or_refuse[T](path: Path, read: Callable[[], T]) -> T:
    """What a file of a set holds.

    Raises
    ------
    StoreError
        Naming the file, if it cannot be read.
    """
    try:
        return read()
    except (OSError, ValueError, KeyError, pa.ArrowInvalid) as error:
        raise StoreError(f"{path} cannot be read ({error}).", _REMEDY) from error


def folder_of(space: Path, derived: Derived) -> Path:
    """Folder of a set that a version names."""
    return space / FOLDER / derived.id


def load_state(space: Path, derived: Derived) -> DerivedState:
    """The state of a set that belongs to the version."""
    folder = folder_of(space, derived)
    return read_or_refuse(folder, lambda: DerivedState.load(folder, derived.state))


def load_set(space: Path, derived: Derived) -> DerivedSet:
    """What a set is that a version names."""
    folder = folder_of(space, derived)
    return read_or_refuse(folder, lambda: DerivedSet.load(folder))


class DerivedColumns:
    """Reads columns of derived sets for rows of a unit; a state is read once.

    Parameters
    ----------
    space
        Folder of the space.
    sets
        Sets of the version.
    """

    def __init__(self, space: Path, sets: Iterable[Derived]) -> None:
        self._space = space
        self._where = {seen: (derived, name) for derived in sets for seen, name in derived.seen.items()}
        self._units: dict[str, Mapping[str, DerivedUnit]] = {}

    def read(self, unit: str, rows: LongArray, names: Sequence[str]) -> dict[str, Any]:
        """Columns, as a reader names them, of these rows of a unit.

        Parameters
        ----------
        unit
            Unit id.
        rows
            ``unit_row`` of each row wanted.
        names
            Columns; all of them are of derived sets.
        """
        of_sets: dict[str, dict[str, str]] = {}
        for seen in names:
            derived, name = self._where[seen]
            of_sets.setdefault(derived.name, {})[seen] = name
        found: dict[str, Any] = {}
        for wanted in of_sets.values():
            derived, _ = self._where[next(iter(wanted))]
            there = self._read(derived, unit, tuple(wanted.values()))
            for seen, name in wanted.items():
                if name in there:
                    found[seen] = there[name].take(pa.array(rows))
                else:  # not derived of this unit
                    found[seen] = pa.nulls(len(rows), TYPES[derived.columns[name]])
        return found

    def _read(self, derived: Derived, unit: str, names: Sequence[str]) -> dict[str, pa.ChunkedArray]:
        """Columns of all rows of a unit, of those names that it has; settled ones come before its own."""
        if derived.name not in self._units:
            self._units[derived.name] = load_state(self._space, derived).units
        known = self._units[derived.name].get(unit)
        if known is None:
            return {}
        folder = folder_of(self._space, derived)
        paths = [folder / "columns" / f"{unit}.parquet"]
        if known.settled:
            paths.append(settled_path(folder, known.settled, unit))
        found: dict[str, pa.ChunkedArray] = {}
        for path in paths:
            found |= read_or_refuse(path, lambda path=path: _columns(path, names))  # type: ignore[misc]
        return found


def _columns(path: Path, names: Sequence[str]) -> dict[str, pa.ChunkedArray]:
    """Columns of a file, of those names that it has."""
    with pq.ParquetFile(path) as parquet:
        there = [name for name in names if name in parquet.schema_arrow.names]
        read = parquet.read(columns=there)
    return {name: read[name] for name in there}


class DerivedMatrix:
    """One matrix of a set as a version names it.

    Parameters
    ----------
    space
        Folder of the space.
    derived
        The set.
    matrix
        Name of the matrix.
    features
        Those that are wanted, in their order; None for all.

    Raises
    ------
    InputError
        If the set has no such matrix or feature.
    """

    def __init__(self, space: Path, derived: Derived, matrix: str, features: Sequence[str] | None) -> None:
        if matrix not in derived.matrices:
            remedy = f"Matrices: {', '.join(derived.matrices) or 'none'}."
            raise InputError(f"Derived set '{derived.name}' has no matrix '{matrix}'.", remedy)
        self._folder = folder_of(space, derived)
        self._made = load_set(space, derived)
        self._units = load_state(space, derived).units
        self._name = matrix
        self._array: Any = None
        known = self._made.matrices[matrix].features
        self.features = known if features is None else tuple(features)
        self._at: LongArray | None = (
            None if features is None else _positions(f"{derived.name}.{matrix}", known, features)
        )

    def read(self, unit: str, rows: LongArray) -> FloatArray:
        """Values of these rows of a unit: float32, shape ``(n_rows, n_features)``; NaN where nothing was derived."""
        known = self._units.get(unit)
        if known is None or not len(rows):
            return np.full((len(rows), len(self.features)), np.nan, np.float32)
        self._require_shards(unit)
        path = self._folder / f"{self._name}.zarr"
        first, last = int(rows.min()), int(rows.max())
        start = known.slot * self._made.shard_rows
        block = read_or_refuse(path, lambda: self._read(path, slice(start + first, start + last + 1)))
        return block[rows - first]

    def _read(self, path: Path, rows: slice) -> FloatArray:
        import zarr

        if self._array is None:
            self._array = zarr.open_array(path, mode="r")
        if self._array.shape[0] < rows.stop:  # zarr would give fewer rows without a word
            raise ValueError(f"it ends at row {self._array.shape[0]}, before {rows.stop}")
        block: FloatArray = self._array[rows] if self._at is None else self._array.oindex[rows, self._at]
        return block

    def _require_shards(self, unit: str) -> None:
        """Refuse a unit whose shards are gone: zarr reads what is missing as NaN."""
        record = record_path(self._folder, unit)
        completion = read_or_refuse(record, lambda: DerivedCompletion.load(record))
        for path, nbytes in completion.files.items():
            if path.startswith(f"{self._name}.zarr/") and size(self._folder / path) != nbytes:
                raise StoreError(f"{self._folder / path} is not what was written.", _REMEDY)


def _positions(matrix: str, known: Sequence[str], wanted: Sequence[str]) -> LongArray:
    """Positions of features."""
    at = {feature: position for position, feature in enumerate(known)}
    for feature in wanted:
        if feature not in at:
            close = get_close_matches(feature, known, n=3) or list(known[:3])
            raise InputError(f"Matrix '{matrix}' has no feature '{feature}'.", f"There are: {', '.join(close)} ….")
    return np.array([at[feature] for feature in wanted], np.int64)


def read_table(space: Path, derived: Derived, name: str) -> pa.Table:
    """A table of a set.

    Raises
    ------
    InputError
        If the set has no such table.
    StoreError
        If it cannot be read.
    """
    if name not in derived.tables:
        remedy = f"Tables: {', '.join(derived.tables) or 'none'}."
        raise InputError(f"Derived set '{derived.name}' has no table '{name}'.", remedy)
    path = folder_of(space, derived) / load_state(space, derived).tables[name]
    return read_or_refuse(path, lambda: pq.read_table(path, partitioning=None))
