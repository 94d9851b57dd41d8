"""Whether a stranger's HDF5 file holds what it shows: HDF5 can point at any other file of the machine that reads it.

An external link, a virtual dataset and external storage each read as if their content lay in the file, and neither
h5py nor anndata says so: ``/etc/passwd`` can be a matrix. A dataset of which nothing is stored can be of any size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import h5py

from scviaduct.errors import PackageError, UnsafeModelError

if TYPE_CHECKING:
    from pathlib import Path

_MAX_OBJECTS = 1_000_000
_MAX_DEPTH = 100
RATIO, ALLOWANCE = 200, 1 << 30
"""Bytes that a file's datasets may have in memory: 200 times those of the file, and a GiB. Counts in gzip reach 50."""
_AGAIN = "Take the data from its publisher again, or leave it out: the package then has no latents of its own."


def check_contained(path: Path) -> None:
    """Refuse an HDF5 file that refers to anything outside of itself, or claims far more than it has.

    Parameters
    ----------
    path
        ``.h5ad`` or ``.h5mu``; no dataset of it is read.

    Raises
    ------
    PackageError
        If it is no HDF5 file.
    UnsafeModelError
        If it holds a link that is not a plain one, a virtual dataset or external storage, a group within itself, or
        datasets that are far larger than the file.
    """
    try:
        with h5py.File(path, "r", libver="latest") as file:
            claimed = _walk(path, file)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise PackageError(f"'{path}' cannot be read ({type(error).__name__}: {str(error)[:200]}).", _AGAIN) from error
    if claimed > RATIO * path.stat().st_size + ALLOWANCE:
        raise _refuse(path, f"its datasets claim {claimed:,} bytes, and it has {path.stat().st_size:,}")


def _walk(path: Path, file: h5py.File) -> int:
    """Look at every object through its link, and add up what the datasets claim."""
    claimed = objects = 0
    pending: list[tuple[Any, str, int]] = [(file, "", 0)]
    while pending:
        group, where, depth = pending.pop()
        for name in group:
            objects += 1
            here = f"{where}/{name}"[:200]
            if objects > _MAX_OBJECTS or depth > _MAX_DEPTH:
                raise _refuse(path, "it holds too many objects, or a group within itself")
            link = group.get(name, getlink=True)
            if not isinstance(link, h5py.HardLink):
                raise _refuse(path, f"'{here}' is a link ({type(link).__name__})")
            found = group[name]
            if isinstance(found, h5py.Group):
                pending.append((found, here, depth + 1))
            elif isinstance(found, h5py.Dataset):
                claimed += _claim(path, found, here)
    return claimed


def _claim(path: Path, dataset: h5py.Dataset, where: str) -> int:
    if dataset.is_virtual or dataset.external:
        raise _refuse(path, f"'{where}' lies in another file")
    return int(dataset.size or 0) * int(dataset.dtype.itemsize)


def _refuse(path: Path, reason: str) -> UnsafeModelError:
    return UnsafeModelError(f"'{path}' was refused, and no data of it was read: {reason}.", _AGAIN)
