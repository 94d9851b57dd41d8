"""Lists that workers assign to cells as they stage them, beside the tables: what a build then need not compute."""

from __future__ import annotations

import secrets
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING
from zipfile import BadZipFile

import numpy as np

from scviaduct.store.index.manifest import Manifest, built
from scviaduct.store.index.quantizer import cached

if TYPE_CHECKING:
    from pathlib import Path

    from scviaduct.values import FloatArray, IntArray

_FOLDER = "lists"


def assign(space: Path, name: str, latent: FloatArray) -> None:
    """Assign a unit's cells to the lists of the newest index, where it has some.

    Parameters
    ----------
    space
        Folder of the space.
    name
        Of the unit's files.
    latent
        float32, shape ``(n, dimensions)``: of its cells that have one, in their order.
    """
    for folder in built(space)[:1]:
        with suppress(FileNotFoundError):  # the index was just removed: the build assigns
            digest = Manifest.load(folder).quantizer
            if not digest:
                return
            found, squares = cached(str(folder), digest).assign(latent, 1)
            path = _path(space, digest, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
            try:
                with temporary.open("wb") as file:
                    np.savez(file, lists=found, squares=squares.sum(dtype=np.float64))
                temporary.rename(path)
            finally:
                temporary.unlink(missing_ok=True)


def assigned(space: Path, digest: str, name: str, cells: int) -> tuple[IntArray, float] | None:
    """Lists of a unit and their summed squared distances, as :func:`assign` wrote them; None if they are not whole."""
    try:
        with np.load(_path(space, digest, name)) as told:
            lists: IntArray = told["lists"]
            return (lists, float(told["squares"])) if len(lists) == cells else None
    except (OSError, EOFError, ValueError, KeyError, BadZipFile):  # not there, or cut off: the build assigns
        return None


def forget(space: Path) -> None:
    """Remove what was assigned to lists that no index has any more."""
    used = set()
    for folder in built(space):
        with suppress(FileNotFoundError):
            used.add(Manifest.load(folder).quantizer)
    for folder in (space / _FOLDER).glob("*"):
        if folder.name not in used:
            shutil.rmtree(folder, ignore_errors=True)


def _path(space: Path, digest: str, name: str) -> Path:
    return space / _FOLDER / digest / name[:2] / f"{name}.npz"
