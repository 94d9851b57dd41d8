"""Removing what no manifest names: pieces of earlier versions, and what interrupted runs left."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from scviaduct.landing.folder import remove

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from scviaduct.landing.folder import Landing
    from scviaduct.landing.manifest import Manifest


class Pruned(NamedTuple):
    """What was removed: pieces (or files of cells and gene tables), and bytes."""

    removed: int
    nbytes: int


def prune(landing: Landing, manifest: Manifest | None = None, *, dry_run: bool = False) -> Pruned:
    """Remove what a landing does not name.

    Whoever still reads an earlier version, or lands into the folder, loses what it needs: hold
    :meth:`~scviaduct.landing.folder.Landing.writing` around it.

    Parameters
    ----------
    landing
        Its folder.
    manifest
        What names; None for what is published.
    dry_run
        Say what would go, and remove nothing.
    """
    manifest = manifest or landing.manifest()
    named = {landing.genes_file(part.genes) for part in manifest.parts}
    for piece in manifest.pieces:
        named |= {landing.genes_file(piece.genes), landing.obs_file(piece.obs), landing.counts_folder(piece.counts)}
        if piece.counts:
            named.add(landing.obs_record(piece.obs))
    removed, nbytes = 0, 0
    for path in _kept(landing):
        if path in named:
            continue
        removed += 1
        nbytes += sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())
        if not dry_run:
            remove(path)
    return Pruned(removed, nbytes)


def _kept(landing: Landing) -> Iterator[Path]:
    """Everything that a landing is made of, but its manifest; counts before the gene tables that they need."""
    for pattern in ("pieces/*/*", "obs/*/*", "genes/*"):
        yield from sorted(landing.path.glob(pattern))
