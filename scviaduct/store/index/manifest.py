"""What the index of a version is, and where indexes lie."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

from scviaduct.errors import StoreError
from scviaduct.store.files import flush, read_remade

if TYPE_CHECKING:
    from pathlib import Path

    from scviaduct.store.space import Space

FORMAT = 4
"""Version of the files of an index: one of another format is built anew."""
_KEPT = 2
_TRIES = 5


@dataclass(frozen=True, slots=True)
class Part:
    """A segment, as a version sees it.

    Attributes
    ----------
    id
        Folder of the segment.
    rows
        Which rows go with the vectors: a digest of columns and derived sets.
    cells
        Vectors in it that the version names.
    bases
        Position of each file's first cell among the version's cells; -1 for a file that the version does not name.
    """

    id: str
    rows: str
    cells: int
    bases: tuple[int, ...]

    @property
    def whole(self) -> bool:
        """Whether the version names all of its files."""
        return all(base >= 0 for base in self.bases)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an index is.

    Attributes
    ----------
    version
        Of the space.
    cells, dimensions
        Size; cells without a latent are not in it.
    lists, probes
        Of the IVF index: all lists, and those that a query looks into on average, rounded up; 0 for an exact index.
    reach, span
        What decides which, and squared distances beyond which a query need hardly look, as a multiple of D² + R²: see
        :mod:`scviaduct.store.index.coarse`.
    recall
        Measured share of the 30 true neighbours found, over a sample of the index's own cells; 1 for an exact index.
    sample
        Cells of that sample.
    quantizer
        Digest of the centroids; empty for an exact index.
    parts
        Its segments.
    """

    version: int
    cells: int
    dimensions: int
    lists: int
    probes: int
    reach: float
    span: float
    recall: float
    sample: int
    quantizer: str
    parts: tuple[Part, ...]

    def save(self, folder: Path) -> None:
        """Write it, as the last file of an index."""
        (folder / "manifest.json").write_text(json.dumps({"format": FORMAT, **asdict(self)}))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read it back.

        Raises
        ------
        FileNotFoundError
            If it is not there, or was cut off when a machine went down.
        """
        return cls.heard(read_remade(folder / "manifest.json"))

    @classmethod
    def heard(cls, told: dict[str, Any]) -> Self:
        """Of what :meth:`save` wrote."""
        parts = tuple(
            Part(part["id"], part["rows"], part["cells"], tuple(part["bases"])) for part in told.pop("parts", ())
        )
        known = {name: value for name, value in told.items() if name in cls.__dataclass_fields__}
        return cls(**{"sample": 0, "quantizer": "", "reach": 0.0, "span": 0.0, **known}, parts=parts)


def is_built(folder: Path) -> bool:
    """Whether an index of this format is there."""
    try:
        told = read_remade(folder / "manifest.json")
    except FileNotFoundError:
        return False
    return bool(told.get("format") == FORMAT)


def built(space: Path) -> list[Path]:
    """Folders of the indexes that there are, the newest version's first."""
    folders = (path for path in space.glob("index/*") if path.name.isdigit())
    return sorted(folders, key=lambda path: -int(path.name))


def manifest_of(space: Space) -> Manifest | None:
    """Manifest of the newest index of this format that there is; None if there is none."""
    for folder in filter(is_built, built(space.path)):
        with suppress(FileNotFoundError):  # it was just removed
            return Manifest.load(folder)
    return None


def remove_old(space: Path, mine: Path) -> None:
    """Remove all indexes but the newest two and the one that was just built."""
    for folder in built(space)[_KEPT:]:
        if folder != mine:
            remove(folder)


def remove(folder: Path) -> None:
    """Remove an index.

    It is renamed first: nobody finds a part of one, and whoever has opened it keeps what is mapped.
    """
    with suppress(OSError):  # someone else removed it, or may and this one may not
        shutil.rmtree(_aside(folder), ignore_errors=True)


def place(made: Path, folder: Path, *, anew: bool) -> None:
    """Rename what was built to where it is looked for.

    What lies there is renamed before and removed after, so that another builder has no time to find the place empty
    and put its own there; where one did, it stays, unless this one was to be built anew.

    Parameters
    ----------
    made
        What was built, all of it on the disk before it is renamed.
    folder
        Its place.
    anew
        Whether it takes the place of an index that is there.

    Raises
    ------
    StoreError
        If what lies there may not be renamed, or others are put there again and again.
    """
    flush(made)
    for _ in range(_TRIES):
        old = None
        if anew or not is_built(folder):  # one of an older format, or cut off
            old = _old(folder)
        try:
            os.rename(made, folder)  # noqa: PTH104 - pathlib's replaces a folder on some systems
        except OSError:
            if not folder.exists():
                raise
            if not anew and is_built(folder):
                return
        else:
            return
        finally:
            if old is not None:
                shutil.rmtree(old, ignore_errors=True)
    raise StoreError(f"Others put their indexes into '{folder}' all the time.", "Try again when they are done.")


def _old(folder: Path) -> Path | None:
    """Rename what is to be replaced; None if nothing is there."""
    try:
        return _aside(folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(
            f"The index '{folder}' cannot be replaced ({error}).", "Do so as its owner, or have its owner remove it."
        ) from error


def _aside(folder: Path) -> Path:
    """Rename an index to where nobody looks for one."""
    return folder.rename(folder.with_name(f".{folder.name}.{secrets.token_hex(4)}"))
