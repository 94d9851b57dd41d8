"""References of this machine: add, list, show, verify, remove."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scviaduct.references.registry import Registry

if TYPE_CHECKING:
    import builtins
    from pathlib import Path

    from scviaduct.references.package import Reference, Verification


def add(folder: str | Path, *, name: str, replace: bool = False) -> Reference:
    """Check a model, make a package of it and register it.

    Parameters
    ----------
    folder
        A package that ``train`` made, a trained scvi-tools folder, or a folder in scvi-hub's layout.
    name
        Name to register it under.
    replace
        Take the name from another reference.

    Raises
    ------
    UnsafeModelError
        If the model file holds anything that no scvi-tools model needs; nothing in it was executed.
    PackageError
        If there is no model, or the name is taken.
    """
    return Registry().add(folder, name, replace=replace)


def list() -> builtins.list[Reference]:  # noqa: A001 - the name of the command
    """All registered references, by name."""
    return Registry().list()


def broken() -> dict[str, str]:
    """Registered packages that cannot be read: name to what is wrong and what to do about it."""
    return Registry().broken()


def show(name: str) -> Reference:
    """A registered reference, or the package at a path."""
    return Registry().get(name)


def verify(name: str) -> Verification:
    """Check every digest, load the model, and compare what it encodes with what it encoded when it was packaged."""
    return Registry().get(name).verify()


def remove(name: str) -> None:
    """Unregister a reference and delete its package."""
    Registry().remove(name)
