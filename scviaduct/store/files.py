"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from pathlib import Path

_CELL_ID = "observation_id"


def write_parquet(table: pa.Table, path: Path) -> int:
    """Write and flush a parquet file; its size in bytes. Categories are written as the plain column of their values.

    zstd, BYTE_STREAM_SPLIT for floats, differences for integers, and dictionaries for text, but for cell ids: they do
    not repeat within a dataset. What nobody looks up by its range, lists and cell ids, goes without statistics. Of a
    unit that is a quarter less of time, and a tenth less of bytes, than dictionaries and statistics for all.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    floats = [_leaf(field) for field in table.schema if _is_float(field.type)]
    differences = {field.name: "DELTA_BINARY_PACKED" for field in table.schema if pa.types.is_integer(field.type)}
    text = [field.name for field in table.schema if _is_text(field.type) and field.name != _CELL_ID]
    looked_up = [field.name for field in table.schema if not pa.types.is_list(field.type) and field.name != _CELL_ID]
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("wb") as file:
            pq.write_table(
                table,
                file,
                compression="zstd",
                use_dictionary=text,
                use_byte_stream_split=floats,
                column_encoding=differences or None,
                write_statistics=looked_up,
                store_schema=False,
            )
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path.stat().st_size


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind.value_type if pa.types.is_dictionary(kind) else kind))


def _is_float(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind.value_type if pa.types.is_list(kind) else kind))


def _leaf(field: pa.Field) -> str:
    return f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name


def write_once(path: Path, value: Any) -> bool:
    """Write JSON unless the file is there; whether this call made it.

    A hard link appears whole, and only one of several writers gets it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("w") as file:
            json.dump(value, file)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def size(path: Path) -> int | None:
    """Size of a file in bytes, None if it is not there."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def read_json(path: Path) -> Any:
    """Read back what :func:`write_once` wrote."""
    return json.loads(path.read_text())


def read_remade(path: Path) -> Any:
    """Read JSON of something that is made anew where it is not there.

    Raises
    ------
    FileNotFoundError
        If it is not there, or was cut off when a machine went down.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise FileNotFoundError(f"'{path}' is cut off ({error})") from error


def flush(folder: Path) -> None:
    """Have all files of a folder on the disk, and then the folder: what is renamed after that is whole, always."""
    for path in (*folder.rglob("*"), folder):
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
