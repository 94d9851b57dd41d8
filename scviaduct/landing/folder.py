"""The folder of a landing: where things lie, and how they come to lie there whole."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from scviaduct import faults
from scviaduct.errors import InputError, SourceError
from scviaduct.landing.manifest import Manifest
from scviaduct.sources.unreadable import NothingThereError

if TYPE_CHECKING:
    from collections.abc import Iterator

MANIFEST = "landing.json"
_FOLDERS = ("genes", "obs", "pieces")
_LOCK = ".lock"


@dataclass(frozen=True, slots=True)
class Landing:
    """A landing, by its folder; picklable, without an open handle.

    Attributes
    ----------
    path
        Absolute.
    """

    path: Path

    @classmethod
    def at(cls, place: str | os.PathLike[str]) -> Landing:
        """The landing in a folder, which need not be there yet.

        Raises
        ------
        InputError
            If the folder holds something else.
        """
        landing = cls(Path(os.path.normpath(Path(place).expanduser().absolute())))
        if landing.path.exists() and not landing.path.is_dir():
            raise InputError(f"{landing.path} is a file.", "Name a folder for the landing: --out lung-landing.")
        if landing.path.is_dir() and not landing.is_there:
            others = sorted({path.name for path in landing.path.iterdir()} - {*_FOLDERS, _LOCK})
            if others and not all(name.startswith(f".{MANIFEST}.") for name in others):
                raise InputError(
                    f"{landing.path} holds '{others[0]}' and no landing.", "Name a new or empty folder: --out."
                )
        return landing

    @property
    def is_there(self) -> bool:
        """Whether it has been published."""
        return (self.path / MANIFEST).is_file()

    def genes_file(self, address: str) -> Path:
        """Where a gene table lies."""
        return self.path / "genes" / f"{address}.parquet"

    def obs_file(self, address: str) -> Path:
        """Where the cells of a piece lie."""
        return self.path / "obs" / address[:2] / f"{address}.parquet"

    def obs_record(self, address: str) -> Path:
        """Where it is noted that a piece is complete; written last."""
        return self.obs_file(address).with_suffix(".json")

    def counts_folder(self, address: str) -> Path:
        """Where the counts of a piece lie."""
        return self.path / "pieces" / address[:2] / address

    def stamp(self) -> tuple[int, int]:
        """What changes with every publication; ``(0, 0)`` where there is none."""
        try:
            status = (self.path / MANIFEST).stat()
        except FileNotFoundError:
            return 0, 0
        return status.st_mtime_ns, status.st_ino

    def manifest(self) -> Manifest:
        """What was published.

        Raises
        ------
        SourceError
            If there is none, or it cannot be read.
        """
        file = self.path / MANIFEST
        try:
            told = json.loads(file.read_text())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NothingThereError(
                f"There is no landing at {self.path}.", "Write one: scviaduct land SOURCE --out LANDING."
            ) from error
        except (OSError, ValueError) as error:
            raise SourceError(f"{file} cannot be read ({error}).", "Land the source again.") from error
        return Manifest.of(told, str(file))

    def publish(self, manifest: Manifest) -> None:
        """Replace ``landing.json``: readers see what was there before, or this."""
        self.path.mkdir(parents=True, exist_ok=True)
        temporary = self.path / f".{MANIFEST}.{secrets.token_hex(4)}"
        try:
            with temporary.open("w") as file:
                json.dump(manifest.to_json(), file)
                file.flush()
                os.fsync(file.fileno())
            faults.point("landing-written")
            temporary.replace(self.path / MANIFEST)
        finally:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Be the only one that lands into, or prunes, this folder.

        Raises
        ------
        InputError
            If another process does.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.path / _LOCK, timeout=0):
                yield
        except Timeout as error:
            raise InputError(
                f"Another process is landing into {self.path}.", "Wait for it; it goes on where it was if you end it."
            ) from error


def remove(path: Path) -> None:
    """Remove a file or a folder; a folder under its name is whole or gone, also if this is killed.

    What is left then has a name with a leading dot, and goes when the landing is pruned.
    """
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    aside = path
    if not path.name.startswith("."):
        aside = path.rename(path.with_name(f".{path.name}.{secrets.token_hex(4)}"))
    shutil.rmtree(aside)
