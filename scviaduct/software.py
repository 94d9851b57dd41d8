"""Versions of installed packages, as records of runs, landings and adapters name them."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version

_version = cache(version)  # which parses all that a package says of itself: 9 ms for PyTorch


def software(*names: str) -> dict[str, str]:
    """Version of each package; they do not change while a process runs.

    Raises
    ------
    importlib.metadata.PackageNotFoundError
        If one is not installed.
    """
    return {name: _version(name) for name in names}
