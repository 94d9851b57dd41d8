"""Cells of a piece: one parquet file, with a digest over its bytes."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scviaduct.landing.genetables import damaged
from scviaduct.sources.unreadable import UnreadableError, reading
from scviaduct.store.files import write_parquet

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from scviaduct.values import LongArray

_KEY, _ROW, _OBS = "key", "row", "obs/"
"""Columns of the file; those of obs have a prefix, so that none is taken for the others."""


class PieceCells(NamedTuple):
    """Cells of a piece.

    Attributes
    ----------
    rows
        int64; rows of the source, ascending.
    keys
        Plain strings.
    obs
        Requested columns in their store types.
    """

    rows: LongArray
    keys: pa.StringArray
    obs: pa.Table


def write_cells(file: Path, rows: LongArray, keys: pa.Array, obs: pa.Table) -> tuple[str, int]:
    """Write the cells of a piece; digest and size of the file."""
    columns = {_KEY: keys, _ROW: pa.array(rows)}
    plain = {name: _plain(obs[name]) for name in obs.column_names}
    write_parquet(pa.table(columns | {f"{_OBS}{name}": values for name, values in plain.items()}), file)
    held = file.read_bytes()
    return _digest(held), len(held)


def _plain(column: pa.ChunkedArray) -> pa.Array:
    values = column.combine_chunks()
    return values.cast(pa.string()) if pa.types.is_dictionary(values.type) else values


def read_cells(file: Path, digest: str, columns: Sequence[str]) -> PieceCells:
    """Read some columns back.

    Raises
    ------
    UnreadableError
        If the file is missing, or is not what was landed.
    """
    remedy = damaged(file, file.parents[2])
    try:
        held = file.read_bytes()
    except FileNotFoundError as error:
        raise UnreadableError(f"{file} is gone.", remedy) from error
    if _digest(held) != digest:
        raise UnreadableError(f"{file} does not hold what was landed: its digest is not {digest}.", remedy)
    with reading(str(file)):
        names = [_KEY, _ROW, *(f"{_OBS}{name}" for name in columns)]
        table = pq.ParquetFile(pa.BufferReader(held)).read(columns=names)
    rows = np.asarray(table[_ROW].to_numpy(), np.int64)
    obs = pa.table({name: table[f"{_OBS}{name}"].combine_chunks() for name in columns})
    return PieceCells(rows, table[_KEY].combine_chunks(), obs)


def _digest(held: bytes) -> str:
    return hashlib.blake2b(held, digest_size=16).hexdigest()
