"""The references of this machine, under their names."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from difflib import get_close_matches
from pathlib import Path

from platformdirs import user_data_path

from scviaduct.errors import PackageError
from scviaduct.references.package import MANIFEST, Reference

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


def home() -> Path:
    """``SCVIADUCT_HOME``, or the platform's folder for user data."""
    told = os.environ.get("SCVIADUCT_HOME")
    return Path(told) if told else user_data_path("scviaduct")


class Registry:
    """Packages under a home folder.

    Parameters
    ----------
    folder
        The home; None for :func:`home`.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = (folder or home()) / "references"

    def add(self, source: str | Path, name: str, *, replace: bool = False) -> Reference:
        """Build or copy a package and register it.

        Parameters
        ----------
        source
            Package, trained scvi-tools folder, or hub layout.
        name
            Lower-case letters, digits, ``.``, ``_`` and ``-``.
        replace
            Take the name from another reference.

        Raises
        ------
        PackageError
            If the name is taken by another digest, or is no name.
        """
        from scviaduct.references.building import build_package  # AnnData takes seconds to import; a look-up need not

        if not _NAME.fullmatch(name):
            raise PackageError(
                f"'{name}' is not a name for a reference.", "Lower-case letters, digits, . _ -, e.g. hlca-v2."
            )
        target = self._folder / name
        temporary = self._folder / f".{name}.{secrets.token_hex(4)}"
        try:
            made = build_package(Path(source), temporary, name)
            if target.exists():
                there = None if replace else Reference.load(target)  # replacing mends what cannot be read
                if there is not None:
                    if there.digest == made.digest:
                        return there
                    raise PackageError(
                        f"Name '{name}' is taken by {there.family} {there.digest[:12]}; this is {made.digest[:12]}.",
                        "Choose another name, or --replace.",
                    )
                old = self._folder / f".{name}.old.{secrets.token_hex(4)}"
                target.rename(old)
                temporary.rename(target)
                shutil.rmtree(old)
            else:
                temporary.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return Reference.load(target)

    def get(self, name: str) -> Reference:
        """A registered reference, or a package by its path.

        Raises
        ------
        PackageError
            If there is neither.
        """
        if _NAME.fullmatch(name) and (self._folder / name / MANIFEST).exists():
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
        """All registered references, by name."""
        return [Reference.load(path.parent) for path in sorted(self._folder.glob(f"[!.]*/{MANIFEST}"))]

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
