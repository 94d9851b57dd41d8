"""Columns of obs on their way out: Arrow types of the store, and which rows are cells of what dataset.

Every source hands over batches of obs as Arrow tables. Here a batch becomes :class:`Cells`: rows that are selected,
each with its key and its dataset.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scviaduct.errors import SourceError

if TYPE_CHECKING:
    import numpy.typing as npt

    from scviaduct.values import LongArray

PRIMARY = "is_primary_data"


def store_type(kind: pa.DataType) -> str | None:
    """Type that a column has in the store: ``string``, ``bool``, ``int64`` or ``double``; None if it has none.

    Categories are strings whatever their values are; so are dates and times.
    """
    if pa.types.is_boolean(kind):
        return "bool"
    if pa.types.is_integer(kind):
        return "int64"
    if pa.types.is_floating(kind):
        return "double"
    textual = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_dictionary)
    timed = (pa.types.is_temporal, pa.types.is_decimal, pa.types.is_null)
    return "string" if any(test(kind) for test in (*textual, *timed)) else None


def as_text(array: pa.Array) -> pa.Array:
    """Plain strings; booleans as ``True`` and ``False``."""
    if pa.types.is_boolean(array.type):
        return pc.if_else(array, "True", "False")
    return array.cast(pa.string())


def normal(array: pa.Array | pa.ChunkedArray, name: str, where: str) -> pa.Array:
    """One plain array of the type that :func:`store_type` names; NaN is missing, categories are decoded.

    Raises
    ------
    SourceError
        If the column has no such type or an integer does not fit int64.
    """
    array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    kind = store_type(array.type)
    try:
        if kind is None:
            raise pa.ArrowInvalid(f"type {array.type}")
        if pa.types.is_dictionary(array.type):
            return as_text(array.dictionary).take(array.indices)
        if kind == "double":
            values = array.cast(pa.float64())
            return pc.if_else(pc.is_nan(values), pa.scalar(None, pa.float64()), values)
        return as_text(array) if kind == "string" else array.cast({"bool": pa.bool_(), "int64": pa.int64()}[kind])
    except (pa.ArrowInvalid, pa.ArrowIndexError) as error:
        raise SourceError(
            f"obs column '{name}' of {where} cannot be kept ({error}).",
            "Make it text, bool, integer or float: adata.obs['COLUMN'] = adata.obs['COLUMN'].astype(str).",
        ) from error


def comparable(array: pa.ChunkedArray, name: str, where: str) -> pa.Array:
    """What a filter compares in any source: :func:`normal`, but categories have the type of their values.

    Raises
    ------
    SourceError
        As :func:`normal` does.
    """
    if pa.types.is_dictionary(array.type):
        coded = array.combine_chunks()
        array = coded.dictionary.take(coded.indices)
    return normal(array, name, where)


@dataclass(frozen=True, slots=True)
class RowRule:
    """Which rows of obs are cells, and what they are called.

    Attributes
    ----------
    key
        Column that names a cell within its dataset.
    dataset
        Column that names the dataset; empty if every cell belongs to ``dataset_name``.
    dataset_name
        The dataset where no column names it.
    primary_only
        Select cells whose ``is_primary_data`` is true.
    where
        Place, for messages.
    """

    key: str
    dataset: str
    dataset_name: str
    primary_only: bool
    where: str

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that the rule reads."""
        wanted = (self.key, self.dataset, PRIMARY if self.primary_only else "")
        return tuple(dict.fromkeys(column for column in wanted if column))


class Cells(NamedTuple):
    """Selected cells of one batch of obs.

    Attributes
    ----------
    rows
        int64, source rows, ascending.
    keys
        Plain strings, one a cell.
    datasets
        Names of the datasets in the batch.
    dataset_of
        int32, one a cell: position in ``datasets``.
    obs
        Requested columns in their store types.
    skipped
        Rows left out as duplicates.
    unselected
        Datasets of which the batch has rows, but no selected one.
    """

    rows: LongArray
    keys: pa.StringArray
    datasets: tuple[str, ...]
    dataset_of: npt.NDArray[np.int32]
    obs: pa.Table
    skipped: int
    unselected: frozenset[str]

    def only(self, dataset: str) -> Cells:
        """The cells of one dataset."""
        if self.datasets == (dataset,):
            return self
        chosen = np.flatnonzero(np.array([name == dataset for name in self.datasets], np.bool_)[self.dataset_of])
        taken = pa.array(chosen)
        of = np.zeros(len(chosen), np.int32)
        obs, keys = self.obs.take(taken), self.keys.take(taken)
        return Cells(self.rows[chosen], keys, (dataset,), of, obs, self.skipped, self.unselected)


def select(
    rows: LongArray,
    table: pa.Table,
    rule: RowRule,
    columns: tuple[str, ...],
    passed: npt.NDArray[np.bool_] | None = None,
) -> Cells:
    """Apply a rule to one batch of obs.

    Parameters
    ----------
    rows
        int64, shape ``(n,)``; source rows of the batch, ascending.
    table
        The batch, with the rule's columns and ``columns``.
    rule
        What is a cell.
    columns
        Requested columns.
    passed
        Rows that pass the filter; None if all do.

    Raises
    ------
    SourceError
        If a selected cell has no key or no dataset.
    """
    chosen = np.ones(len(rows), np.bool_) if passed is None else passed
    candidates = int(chosen.sum())
    if rule.primary_only:
        chosen = chosen & _primary(table, rule)
    skipped = candidates - int(chosen.sum())
    names = normal(table[rule.dataset], rule.dataset, rule.where) if rule.dataset else None
    unselected = frozenset[str]()
    if names is not None and not chosen.all():
        unselected = frozenset(_unique(names)) - frozenset(_unique(names.filter(pa.array(chosen))))
    if not chosen.all():
        table, rows = table.filter(pa.array(chosen)), rows[chosen]
        names = None if names is None else names.filter(pa.array(chosen))
    keys = _named(as_text(normal(table[rule.key], rule.key, rule.where)), rule.key, rows, rule)
    datasets, dataset_of = (rule.dataset_name,), np.zeros(len(rows), np.int32)
    if names is not None:
        coded = _named(as_text(names), rule.dataset, rows, rule).dictionary_encode()
        datasets, dataset_of = tuple(coded.dictionary.to_pylist()), coded.indices.to_numpy()
    obs = pa.table({column: normal(table[column], column, rule.where) for column in columns})
    return Cells(rows, keys, datasets, dataset_of, obs, skipped, unselected)


def _primary(table: pa.Table, rule: RowRule) -> npt.NDArray[np.bool_]:
    """Rows that are the one primary copy of their cell; a missing flag is none."""
    flags = pc.fill_null(normal(table[PRIMARY], PRIMARY, rule.where), False)  # noqa: FBT003
    return np.asarray(flags.to_numpy(zero_copy_only=False), np.bool_)


def _unique(names: pa.Array) -> list[str]:
    return [str(name) for name in as_text(names).unique().drop_null().to_pylist()]


def _named(names: pa.StringArray, column: str, rows: LongArray, rule: RowRule) -> pa.StringArray:
    """The names themselves, none of them missing or empty."""
    missing = pc.fill_null(pc.equal(pc.utf8_length(names), 0), True)  # noqa: FBT003
    if missing.true_count:
        row = int(rows[missing.index(True).as_py()])
        what, remedy = (
            ("dataset", "Fill the column, or name another one: dataset=COLUMN.")
            if column == rule.dataset
            else ("key", "Every cell needs a name within its dataset: name another column, key=COLUMN.")
        )
        raise SourceError(f"Row {row} of {rule.where} has no {what} (obs column '{column}').", remedy)
    return names
