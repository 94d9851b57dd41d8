"""The references of this machine, under their names."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from platformdirs import user_data_path

from scviaduct.errors import PackageError
from scviaduct.references.manifest import MANIFEST
from scviaduct.references.package import Reference

if TYPE_CHECKING:
    from collections.abc import Mapping

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")


def home() -> Path:
    """``SCVIADUCT_HOME``, or the platform's folder for user data.

    Raises
    ------
    PackageError
        If this user has none.
    """
    if told := os.environ.get("SCVIADUCT_HOME"):
        return Path(told)
    try:
        return user_data_path("scviaduct")
    except RuntimeError as error:  # a number without an account, such as a container may run as
        raise PackageError(
            f"References have no place to be kept in ({error}).",
            "Set SCVIADUCT_HOME to a folder, or HOME; or give references by their paths.",
        ) from error


class Registry:
    """Packages under a home folder.

    Parameters
    ----------
    folder
        The home; None for :func:`home`.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._home = folder

    @property
    def _folder(self) -> Path:
        return (self._home or home()) / "references"

    def add(
        self,
        source: str | Path,
        name: str,
        *,
        replace: bool = False,
        provenance: Mapping[str, Any] | None = None,
        data: bool = True,
    ) -> Reference:
        """Build or copy a package and register it; one of the same digest stays as it is, and is mended if damaged.

        Parameters
        ----------
        source
            Package, trained scvi-tools folder, or hub layout.
        name
            Lower-case letters, digits, ``.``, ``_`` and ``-``; at most 100.
        replace
            Take the name from another reference.
        provenance
            Where the folder was fetched from; a package keeps its own.
        data
            Read the data that lie beside a model; a package is copied with what it holds.

        Raises
        ------
        PackageError
            If the name is taken by another digest, or is no name.
        """
        from scviaduct.references.building import build_package  # AnnData takes seconds to import; a look-up need not

        self.require_name(name)
        target = self._folder / name
        temporary = self._folder / f".{name}.{secrets.token_hex(4)}"
        try:
            made = build_package(Path(source), temporary, name, provenance=provenance, data_file=data)
            with self._locked():
                if target.exists():
                    there = None if replace else self._taken(name)  # replacing mends what cannot be read
                    if there is not None and there.digest == made.digest and not there.damaged():
                        return there
                    if there is not None and there.digest != made.digest:
                        raise PackageError(
                            f"Name '{name}' is taken by {there.family} {there.digest[:12]}; this is"
                            f" {made.digest[:12]}.",
                            "Choose another name, or --replace.",
                        )
                    self._put_aside(target)
                temporary.rename(target)
                self._forget_aside(name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return Reference.load(target)

    @staticmethod
    def require_name(name: str) -> None:
        """Refuse what is no name for a reference.

        Raises
        ------
        PackageError
            If it is none.
        """
        if not _NAME.fullmatch(name):
            raise PackageError(
                f"'{name}' is not a name for a reference.",
                "Lower-case letters, digits, . _ -, at most 100, e.g. hlca-v2.",
            )

    def _taken(self, name: str) -> Reference:
        """The reference that has a name, to compare a new one with."""
        try:
            return Reference.load(self._folder / name)
        except PackageError as error:
            raise PackageError(error.problem, f"It has the name '{name}': --replace puts the new one there.") from error

    def get(self, name: str) -> Reference:
        """A registered reference, or a package by its path.

        Raises
        ------
        PackageError
            If there is neither.
        """
        if _NAME.fullmatch(name):  # what is a path only needs no home
            self._finish_replacing()
            if (self._folder / name / MANIFEST).exists():
                return Reference.load(self._folder / name)
        if (Path(name) / MANIFEST).exists():
            return Reference.load(Path(name).absolute())
        names = [path.parent.name for path in sorted(self._folder.glob(f"[!.]*/{MANIFEST}"))]
        close = get_close_matches(name, names, n=3) or names
        known = f"Registered: {', '.join(close)}." if close else "None is registered yet."
        raise PackageError(
            f"There is no reference '{name}'.", f"{known} Add one: scviaduct reference add DIR --name NAME."
        )

    def list(self) -> list[Reference]:
        """All registered references that can be read, by name; :meth:`broken` names the others."""
        return list(self._load()[0])

    def broken(self) -> dict[str, str]:
        """Registered packages that cannot be read: name to reason, which ends in the remedy."""
        return self._load()[1]

    def _put_aside(self, target: Path) -> None:
        target.rename(self._folder / f".{target.name}~{secrets.token_hex(4)}")  # no name has a tilde

    def _forget_aside(self, name: str) -> None:
        for old in self._folder.glob(f".{name}~*"):
            shutil.rmtree(old)

    def _finish_replacing(self) -> None:
        """Bring back what a killed ``add --replace`` had put aside, if nothing took its place."""
        if not any(self._folder.glob(".*~*")):  # a reader may not be allowed to write
            return
        with self._locked():  # not while another process is between the two steps
            for old in self._folder.glob(".*~*"):
                target = self._folder / old.name[1:].partition("~")[0]
                if not target.exists():
                    old.rename(target)

    def _locked(self) -> FileLock:
        return FileLock(self._folder.with_name("references.lock"))

    def _load(self) -> tuple[tuple[Reference, ...], dict[str, str]]:
        self._finish_replacing()
        found, broken = [], {}
        for path in sorted(path for path in self._folder.glob("[!.]*") if path.is_dir()):
            try:
                found.append(Reference.load(path))
            except PackageError as error:
                broken[path.name] = str(error)
        return tuple(found), broken

    def remove(self, name: str) -> None:
        """Unregister a reference and delete its package.

        Raises
        ------
        PackageError
            If there is none of that name.
        """
        path = self._folder / name
        if not _NAME.fullmatch(name) or not path.exists():
            raise PackageError(f"There is no registered reference '{name}'.", "scviaduct reference list shows them.")
        shutil.rmtree(path)
