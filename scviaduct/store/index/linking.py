"""Files of segments: whether they are whole, and links of them in another index."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np

from scviaduct.store.files import read_remade
from scviaduct.store.index.rows import open_table

if TYPE_CHECKING:
    from pathlib import Path

    import pyarrow as pa

_VECTORS = ("vectors.f32", "offsets.i64", "members.i32", "segment.json")


def told_of(folder: Path) -> dict[str, Any]:
    """What a segment says of itself: names and mapped cells of its files, summed squared distances.

    Raises
    ------
    FileNotFoundError
        If it was just removed, or is cut off.
    """
    found: dict[str, Any] = read_remade(folder / "segment.json")
    return found


def require_vectors(folder: Path, lists: int) -> dict[str, Any]:
    """What :func:`told_of` tells of a segment whose vectors are whole.

    Vectors of which a part is missing would be compared with what is left, in silence.

    Raises
    ------
    FileNotFoundError
        If a file is not there, or has another size than its cells and lists take.
    """
    told = told_of(folder)
    n = sum(told["mapped"])
    sizes = {"vectors.f32": 4 * n * told["dimensions"], "offsets.i64": 8 * (lists + 1), "members.i32": 8 * n}
    for name, size in sizes.items():
        if (found := (folder / name).stat().st_size) != size:
            raise FileNotFoundError(f"'{folder / name}' has {found:,} bytes, {size:,} were written")
    if (last := int(np.fromfile(folder / "offsets.i64", np.int64)[-1])) != n:
        raise FileNotFoundError(f"'{folder / 'offsets.i64'}' ends at {last:,}, {n:,} cells were written")
    return told


def require_rows(folder: Path, key: str, cells: int) -> tuple[pa.Table, pa.Table]:
    """Rows of a segment and the counts of their values, memory-mapped.

    Raises
    ------
    FileNotFoundError
        If a file is not there, is cut off, or has not as many rows as the segment has cells.
    """
    rows = open_table(folder / f"rows-{key}.arrow")
    if len(rows) != cells:
        raise FileNotFoundError(f"'{folder}' has {len(rows):,} rows, {cells:,} were written")
    return rows, open_table(folder / f"counts-{key}.arrow")


def link(old: Path, new: Path, key: str, lists: int) -> bool:
    """Link a whole segment's files into another index; whether its rows are among them.

    Raises
    ------
    FileNotFoundError
        If the segment was just removed, or is not whole.
    """
    told = require_vectors(old, lists)
    new.mkdir(exist_ok=True)
    for name in _VECTORS:
        _link(old / name, new / name)
    wanted = [f"rows-{key}.arrow", f"counts-{key}.arrow"]
    if not all((old / name).exists() for name in wanted):
        return False
    require_rows(old, key, sum(told["mapped"]))
    for name in wanted:
        _link(old / name, new / name)
    return True


def _link(old: Path, new: Path) -> None:
    try:
        os.link(old, new)
    except FileNotFoundError:
        raise
    except OSError:  # of another owner (fs.protected_hardlinks), on another disk, or linked as often as can be
        shutil.copyfile(old, new)
