"""References of this machine: search, add, list, show, verify, remove."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.progress import reporter
from scviaduct.references.fetching.fetch import fetch
from scviaduct.references.fetching.searching import card as card_of
from scviaduct.references.fetching.searching import search as search_hub
from scviaduct.references.registry import Registry

if TYPE_CHECKING:
    import builtins
    from collections.abc import Callable

    from pipelines.progress import Reporter
    from scviaduct.references.fetching.download import Progress
    from scviaduct.references.fetching.searching import Found
    from scviaduct.references.package import Reference, Verification

_SAY_EVERY = 5.0  # seconds


def add(source: str | Path, *, name: str, replace: bool = False, data: bool = True, quiet: bool = False) -> Reference:
    """Fetch a model, check it, make a package of it and register it.

    Parameters
    ----------
    source
        ``hf://OWNER/NAME[@REVISION]``, ``s3://BUCKET/FOLDER/``, the address of a ``.zip``, or a folder of this
        machine: a package that ``train`` made, a trained scvi-tools folder, or scvi-hub's layout. What was fetched once
        is not fetched again.
    name
        Name to register it under.
    replace
        Take the name from another reference.
    data
        Fetch and read the data that the model was trained on, too; without it the package has no latents of its own.
        A package is taken with the latents that it holds.
    quiet
        Without progress.

    Raises
    ------
    UnsafeModelError
        If the model file holds anything that no scvi-tools model needs; nothing in it was executed.
    PackageError
        If there is no model, it cannot be fetched, or the name is taken.
    """
    registry = Registry()
    registry.require_name(name)  # before the minutes that a download takes
    with reporter(quiet=quiet) as progress:
        fetched = fetch(source, data=data, on_progress=_received(progress))
    return registry.add(fetched.folder, name, replace=replace, provenance=fetched.provenance, data=data)


def _received(progress: Reporter) -> Callable[[Progress], None]:
    """Say how far a download is, at most every five seconds."""
    last = time.monotonic()

    def tell(now: Progress) -> None:
        nonlocal last
        if time.monotonic() - last >= _SAY_EVERY:
            last = time.monotonic()
            whole = f" of {now.size / 1e6:,.1f}" if now.size else ""
            progress.say(f"fetching {now.file}: {now.received / 1e6:,.1f}{whole} MB")

    return tell


def search(
    text: str = "",
    *,
    family: str | None = None,
    tissue: str | None = None,
    collection: str | None = None,
    limit: int = 50,
) -> tuple[Found, ...]:
    """Find scvi-tools models on the hub; see :func:`scviaduct.references.fetching.searching.search`."""
    return search_hub(text, family=family, tissue=tissue, collection=collection, limit=limit)


def list() -> builtins.list[Reference]:  # noqa: A001 - the name of the command
    """All registered references, by name."""
    return Registry().list()


def broken() -> dict[str, str]:
    """Registered packages that cannot be read: name to what is wrong and what to do about it."""
    return Registry().broken()


def show(name: str) -> Reference:
    """A registered reference, or the package at a path."""
    return Registry().get(name)


def export(name: str, out: str | Path) -> Path:
    """Write a reference's model as scvi-tools saves it; see :meth:`scviaduct.references.package.Reference.export`."""
    return Registry().get(name).export(Path(out))


def card(name: str) -> str:
    """What its publisher's card says, as Markdown; empty if it has none."""
    return card_of(Registry().get(name).path)


def verify(name: str) -> Verification:
    """Check every digest, load the model, and compare what it encodes with what it encoded when it was packaged."""
    return Registry().get(name).verify()


def remove(name: str) -> None:
    """Unregister a reference and delete its package."""
    Registry().remove(name)
