"""The adapters of a store: listing, showing and dropping them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from scviaduct.errors import InputError
from scviaduct.mapping.adapters import batch_of
from scviaduct.store import Store

if TYPE_CHECKING:
    from scviaduct.store import Space


def list_adapters(store: str, *, reference: str | None = None) -> list[dict[str, Any]]:
    """What a store has of adapters, the oldest first.

    Parameters
    ----------
    store
        Folder of the store.
    reference
        Space, by its reference; None for all spaces.

    Returns
    -------
    list of dict
        ``adapter`` (address), ``space``, ``batch``, ``cells`` (of the batch, when it was fitted), ``sampled``,
        ``epochs``, ``gain`` (loss per held-out cell that it saves), ``bytes``, ``fitted`` (time) and ``used``: cells of
        the newest version that were encoded with it.
    """
    opened = Store.open(store)
    spaces = [opened.space(reference)] if reference else opened.spaces()
    return [row for space in spaces for row in _rows(space)]


def show_adapter(store: str, adapter: str, *, reference: str | None = None) -> dict[str, Any]:
    """Everything that is known of an adapter.

    Parameters
    ----------
    adapter
        Its address, or the beginning of it.

    Raises
    ------
    InputError
        If none, or more than one, begins so.
    """
    space, told = _found(store, adapter, reference)
    row = next(row for row in _rows(space) if row["adapter"] == told["digest"])
    tensors = {
        part: {covariate: sorted(names) for covariate, names in held.items()} for part, held in told["tensors"].items()
    }
    return {**row, "reference": told["reference"], "tensors": tensors, "facts": told["facts"]}


def drop_adapter(store: str, adapter: str, *, reference: str | None = None, force: bool = False) -> str:
    """Remove an adapter; a later run that needs it fits it again. Its address.

    Parameters
    ----------
    adapter
        Its address, or the beginning of it.
    force
        Also one that cells of the newest version were encoded with: they stay as they are, and cannot be decoded
        until they are mapped again.

    Raises
    ------
    InputError
        If none, or more than one, begins so, or cells depend on it.
    """
    space, told = _found(store, adapter, reference)
    address: str = told["digest"]
    used = _used(space).get(address, 0)
    if used and not force:
        raise InputError(
            f"{used:,} cells of '{space.name}' were encoded with adapter {address[:12]} ({batch_of(told).name}).",
            "They keep their latents, but cannot be decoded without it; --force drops it nevertheless.",
        )
    space.adapters.drop(address)
    return address


def _found(store: str, adapter: str, reference: str | None) -> tuple[Space, dict[str, Any]]:
    opened = Store.open(store)
    spaces = [opened.space(reference)] if reference else opened.spaces()
    there = [(space, told) for space in spaces for told in space.adapters.manifests()]
    fitting = [(space, told) for space, told in there if adapter and told["digest"].startswith(adapter)]
    if len(fitting) == 1:
        return fitting[0]
    some = ", ".join(told["digest"][:12] for _, told in (fitting or there)[:5]) or "none"
    problem = f"{len(fitting) or 'No'} adapters begin with '{adapter}'." if adapter else "No adapter is named."
    raise InputError(problem, f"There are: {some}. scviaduct adapter list STORE shows them all.")


def _rows(space: Space) -> list[dict[str, Any]]:
    used = _used(space)
    return [
        {
            "adapter": told["digest"],
            "space": space.name,
            "batch": batch_of(told).name,
            "cells": told["facts"]["cells_seen"],
            "sampled": told["facts"]["cells_sampled"],
            "epochs": told["facts"]["epochs"],
            "gain": told["facts"]["loss_before"] - told["facts"]["loss_after"],
            "bytes": told["bytes"],
            "fitted": datetime.fromtimestamp(told["modified"], UTC),
            "used": used.get(told["digest"], 0),
        }
        for told in space.adapters.manifests()
    ]


def _used(space: Space) -> dict[str, int]:
    """Adapter to the cells of the newest version that were encoded with it."""
    counts: dict[str, int] = {}
    for table in space.read(["adapter"], "adapter IS NOT NULL"):
        for found in table["adapter"].value_counts().to_pylist():
            counts[found["values"]] = counts.get(found["values"], 0) + found["counts"]
    return counts
