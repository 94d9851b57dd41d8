"""What a store holds, and what became of its runs."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from scviaduct.errors import InputError
from scviaduct.store import Store
from scviaduct.store.index import manifest_of

if TYPE_CHECKING:
    from pathlib import Path

    from scviaduct.store import Space


@dataclass(frozen=True, slots=True)
class Status:
    """The state of a store.

    Attributes
    ----------
    store
        Its folder.
    spaces
        Each with its reference, newest version, cells, versions and index.
    runs
        Each with its state (``committed``, ``open``, ``failed``), version, units, cells and quarantined units; newest
        first.
    details
        Settings, software, times and accepted findings of the one run that was asked for; else empty.
    """

    store: str
    spaces: list[dict[str, Any]]
    runs: list[dict[str, Any]]
    details: dict[str, Any]


def status(store: str | Path, *, run: str | None = None) -> Status:
    """Ask a store what it holds.

    Parameters
    ----------
    store
        Folder of the store.
    run
        One run, by its id or the beginning of it; None for all.

    Raises
    ------
    InputError
        If there is no such store or run.
    """
    opened = Store.open(store)
    runs = [found | {"started": _time(found["started"]), "ended": _time(found["ended"])} for found in opened.runs()]
    if run is None:
        return Status(str(opened.path), [_space(space) for space in opened.spaces()], runs, {})
    fitting = [found for found in runs if found["run"].startswith(run)]
    if len(fitting) != 1:
        told = "no run" if not fitting else f"{len(fitting)} runs"
        remedy = f"Runs: {', '.join(found['run'] for found in runs) or 'none'}."
        raise InputError(f"'{opened.path}' has {told} '{run}'.", remedy)
    (found,) = fitting
    names = (
        "source",
        "source_version",
        "started",
        "ended",
        "cells_done",
        "settings",
        "accepted",
        "software",
        "seconds",
    )
    return Status(str(opened.path), [], fitting, {name: found[name] for name in names})


def _space(space: Space) -> dict[str, Any]:
    versions = space.versions()
    head = space.snapshot()
    index = manifest_of(space)
    if index is None:
        told = "none (the next search builds it)"
    else:
        stale = "" if index.version == head.version else f", stale: of version {index.version}"
        told = f"{'IVF-Flat' if index.lists else 'exact'}, recall {index.recall:.3f}{stale}"
    return {
        "space": space.name,
        "reference": space.reference,
        "digest": space.digest,
        "version": head.version,
        "cells": head.cells,
        "versions": [entry["version"] for entry in versions],
        "index": told,
    }


def _time(milliseconds: int | None) -> str | None:
    return (
        None if milliseconds is None else datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")
    )
