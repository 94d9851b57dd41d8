"""The rows that hits are answered with, in the order of a segment's vectors, and counts of their values per list."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from scviaduct.values import IntArray, LongArray

VALUES = 65_536
"""Distinct values up to which a text column is stored as a dictionary."""
COUNTED = 256
"""Distinct values up to which those of a column are counted per list."""
_CODED = pa.dictionary(pa.int32(), pa.string())
_COUNTS = pa.schema([("key", pa.int32()), ("list", pa.int32()), ("count", pa.int32())])


def write_rows(tables: Sequence[pa.Table], order: LongArray, offsets: LongArray, folder: Path, key: str) -> None:
    """Write the rows of a segment, and the counts of their values.

    Text that repeats is stored as a dictionary. All rows are one batch: taking some of them is one step then.

    Parameters
    ----------
    tables
        Rows of the segment's files, one after the other.
    order
        int64, shape ``(n,)``: which of them comes where.
    offsets
        int64, shape ``(lists + 1,)``: first row of each list.
    folder, key
        Where they are written, and what the files are called by.
    """
    whole = pa.concat_tables(tables).unify_dictionaries().combine_chunks()
    at = pa.array(order)
    columns = {name: _stored(name, whole[name]).take(at) for name in whole.column_names}
    rows = pa.table(columns).combine_chunks()
    _write(rows, folder / f"rows-{key}.arrow")
    _write(_counts(rows, offsets), folder / f"counts-{key}.arrow")


def _stored(name: str, column: pa.ChunkedArray) -> pa.Array:
    one = column.combine_chunks()
    if isinstance(one, pa.ChunkedArray):
        one = one.chunk(0) if one.num_chunks else pa.array([], one.type)
    if name == "observation_id" or not (pa.types.is_string(one.type) or pa.types.is_dictionary(one.type)):
        return one
    coded = one if pa.types.is_dictionary(one.type) else one.dictionary_encode()
    return coded.cast(_CODED) if len(coded.dictionary) <= VALUES else coded.cast(pa.string())


def _write(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
        file.write_table(table, max_chunksize=max(1, len(table)))


def values_of(column: pa.ChunkedArray) -> pa.Array | None:
    """Values of a column that few of them fill; None for a column of another kind, or of more values."""
    if pa.types.is_boolean(column.type):
        return pa.array([False, True])
    if not pa.types.is_dictionary(column.type) or not column.num_chunks:
        return None
    values = column.chunk(0).dictionary
    return values if len(values) <= COUNTED else None


def codes_of(column: pa.ChunkedArray, values: pa.Array) -> IntArray:
    """Place of each cell's value among the values of its column; null has the place behind the last."""
    codes = column.cast(pa.int32()) if pa.types.is_boolean(column.type) else column.chunk(0).indices
    found: IntArray = pc.fill_null(codes, len(values)).to_numpy().astype(np.int32, copy=False)
    return found


def _counts(rows: pa.Table, offsets: LongArray) -> pa.Table:
    """Cells of each column, value and list, where there are some; ``key`` is that of :func:`count_key`."""
    sizes = np.diff(offsets)
    lists, n = np.repeat(np.arange(len(sizes)), sizes), len(sizes)
    parts = []
    for column, name in enumerate(rows.column_names):
        values = values_of(rows[name])
        if values is not None:
            codes = codes_of(rows[name], values).astype(np.int64)
            together = np.bincount(codes * n + lists, minlength=(len(values) + 1) * n)
            filled = np.flatnonzero(together)
            parts.append((count_key(column, filled // n), filled % n, together[filled]))
    if not parts:
        return _COUNTS.empty_table()
    arrays = [pa.array(np.concatenate(one).astype(np.int32)) for one in zip(*parts, strict=True)]
    return pa.table(arrays, schema=_COUNTS)


def count_key(column: int, codes: LongArray) -> LongArray:
    """What counts of a column's values are sorted by."""
    return column * (COUNTED + 1) + codes


def open_table(path: Path) -> pa.Table:
    """Map what was written into memory.

    Raises
    ------
    FileNotFoundError
        If it is not there, or was cut off when a machine went down.
    """
    try:
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid as error:
        raise FileNotFoundError(f"'{path}' is cut off ({error})") from error
