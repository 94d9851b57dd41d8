"""Derived sets: what was computed of a space's cells, beside its tables.

A set lies in a folder that is called by the digest of what decides its values (:attr:`DerivedSet.id`); the cells do not
enter it, so that cells which come later are added to the same set. Every unit owns whole shards of each matrix, and a
file of columns; what makes them visible is a commit of ``cells`` that names the set and one of its states.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Self

from scviaduct.errors import InputError
from scviaduct.store.files import read_json, write_once
from scviaduct.store.schema import TYPES
from scviaduct.values import digest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from scviaduct.analysis.base import Shape

FOLDER = "derived"
ROW = ("unit", "unit_row", "mapped")
"""What every file of columns has besides the set's own."""
CHUNK = (1024, 256)
"""Cells and features of a chunk: 1 MB. Two genes of 5,000 cells and 2,000 genes are read in 0.06 s so, and in 0.16 s
from chunks of 256 cells and 1,024 genes, which read one cell faster (0.01 s, not 0.06 s); both are written in 1 s."""
SHARD_BYTES = 256 << 20
"""Uncompressed bytes of a shard at most, where one chunk's columns allow it: zarr encodes a shard in memory."""
SHARD_ROWS = 65_536
"""Rows of a slot at most; a larger unit owns several slots in a row."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def require_name(kind: str, name: str) -> str:
    """A name that is a folder's and part of a column's, as it is.

    Raises
    ------
    InputError
        If it has other characters than letters, digits, hyphens and underscores.
    """
    if not _NAME.fullmatch(name):
        raise InputError(f"A {kind} cannot be called '{name}'.", "Letters, digits, '-' and '_' only, as in 'de-lung'.")
    return name


@dataclass(frozen=True, slots=True)
class MatrixLayout:
    """How a matrix is stored.

    Attributes
    ----------
    features
        Names of its columns, each once.
    chunks, shards
        Rows and columns of a chunk, and of a shard.
    """

    features: tuple[str, ...]
    chunks: tuple[int, int]
    shards: tuple[int, int]

    @classmethod
    def of(cls, features: Sequence[str], shard_rows: int, chunk_rows: int) -> Self:
        """Lay out a matrix of these features."""
        columns = min(CHUNK[1], len(features))
        most = max(1, SHARD_BYTES // (4 * shard_rows * columns))
        across = min(most, -(-len(features) // columns))
        return cls(tuple(features), (chunk_rows, columns), (shard_rows, across * columns))


@dataclass(frozen=True, slots=True)
class DerivedSet:
    """What a set is: everything in it but the cells.

    Attributes
    ----------
    id
        Digest of what decides the values of a unit: ``what``, ``options``, ``reference``, ``adapters``, ``basis`` and
        the names of columns, matrices and features.
    what
        Name of the output.
    family
        Of the reference.
    options
        What the output was told, as JSON.
    reference
        Digest of the reference.
    adapters
        Digests of the adapters that decide all units' values. Those that only the latents of their own cells depend on
        are part of the unit ids already.
    basis
        What else decides a unit's values, as JSON: a digest of what the output was told of a sample.
    columns
        Name to type: ``string``, ``bool``, ``int64`` or ``double``.
    matrices
        Name to layout.
    shard_rows
        Rows of a slot.
    """

    id: str
    what: str
    family: str
    options: Mapping[str, Any]
    reference: str
    adapters: tuple[str, ...]
    basis: Any
    columns: Mapping[str, str]
    matrices: Mapping[str, MatrixLayout]
    shard_rows: int

    @classmethod
    def of(
        cls,
        what: str,
        shape: Shape,
        *,
        family: str,
        options: Mapping[str, Any],
        reference: str,
        rows: int,
        adapters: Sequence[str] = (),
        basis: Any = None,
    ) -> Self:
        """Describe a set whose largest unit has ``rows`` cells.

        Raises
        ------
        InputError
            If a column or a matrix has a name or a type that cannot be stored, or a matrix no feature or one twice.
        """
        _check(shape)
        features = {name: list(names) for name, names in shape.matrices.items()}
        told = sorted(adapters)
        key = digest("derived", what, dict(options), reference, told, basis, dict(shape.columns), features)
        chunk_rows = min(CHUNK[0], max(1, rows))
        shard_rows = -(-min(max(1, rows), SHARD_ROWS) // chunk_rows) * chunk_rows
        layouts = {name: MatrixLayout.of(names, shard_rows, chunk_rows) for name, names in features.items()}
        columns = dict(shape.columns)
        return cls(key, what, family, dict(options), reference, tuple(told), basis, columns, layouts, shard_rows)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read back what :meth:`DerivedFolder.create` wrote."""
        told = read_json(folder / "set.json")
        layouts = {
            name: MatrixLayout(tuple(one["features"]), tuple(one["chunks"]), tuple(one["shards"]))
            for name, one in told["matrices"].items()
        }
        return cls(**(told | {"adapters": tuple(told["adapters"]), "matrices": layouts}))

    def span(self, rows: int) -> int:
        """Slots that a unit of so many cells owns."""
        return max(1, -(-rows // self.shard_rows))


def _check(shape: Shape) -> None:
    """Refuse names that cannot be stored."""
    for name, kind in shape.columns.items():
        if name in ROW or not name:
            raise InputError(f"A derived column cannot be called '{name}'.", f"Taken: {', '.join(ROW)}.")
        if kind not in TYPES:
            raise InputError(f"Derived column '{name}' cannot be '{kind}'.", f"Types: {', '.join(TYPES)}.")
    for name, features in shape.matrices.items():
        require_name("derived matrix", name)
        if not features:
            raise InputError(f"Derived matrix '{name}' has no features.", "Name at least one, as in --genes CD3E.")
        most, times = Counter(features).most_common(1)[0]
        if times > 1:
            raise InputError(f"Derived matrix '{name}' has feature '{most}' {times} times.", "Name each feature once.")


@dataclass(frozen=True, slots=True)
class Derived:
    """A derived set as a version of a space names it.

    Attributes
    ----------
    name
        What the user calls it.
    id
        Its folder.
    what
        Name of the output.
    state
        Digest of the :class:`DerivedState` that belongs to the version.
    units, cells
        Number of units that the state covers, and of their cells.
    columns
        Name to type.
    matrices, tables
        Names.
    """

    name: str
    id: str
    what: str
    state: str
    units: int
    cells: int
    columns: Mapping[str, str]
    matrices: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()

    @property
    def seen(self) -> dict[str, str]:
        """Name of each column as a reader of the space sees it, to its name in the set.

        The set's name comes first, so that one output may be there twice with other options; its hyphens become
        underscores, so that a condition can name the column without quotes.
        """
        return {f"{self.name.replace('-', '_')}.{column}": column for column in self.columns}

    def told(self) -> dict[str, Any]:
        """As a commit says it."""
        told = asdict(self)
        del told["name"]
        return told

    @classmethod
    def heard(cls, name: str, told: Mapping[str, Any]) -> Self:
        """As a commit said it."""
        return cls(name, **{**told, "matrices": tuple(told["matrices"]), "tables": tuple(told["tables"])})


@dataclass(frozen=True, slots=True)
class DerivedUnit:
    """What a state says of a unit: its first slot, its rows, and the key of its settled columns, empty without any."""

    slot: int
    rows: int
    settled: str = ""


@dataclass(frozen=True, slots=True)
class DerivedState:
    """What of a set belongs to a version. Immutable, and addressed by its content.

    Attributes
    ----------
    units
        Unit id to what is there of it.
    tables
        Name to file, relative to the set.
    facts
        Figures that the output came to.
    """

    units: Mapping[str, DerivedUnit] = field(default_factory=dict)
    tables: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> str:
        """Write the state, and say its digest."""
        told = asdict(self)
        key = digest(told)
        write_once(state_path(folder, key), told)
        return key

    @classmethod
    def load(cls, folder: Path, key: str) -> Self:
        """Read a state."""
        told = read_json(state_path(folder, key))
        units = {unit: DerivedUnit(**one) for unit, one in told["units"].items()}
        return cls(units, told["tables"], told["facts"])


def state_path(folder: Path, key: str) -> Path:
    """Where a state of a set lies."""
    return folder / "states" / f"{key}.json"
