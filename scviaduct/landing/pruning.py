"""Removing what no manifest names: pieces of earlier versions, and what interrupted runs left."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from scviaduct.landing.folder import Landing


class Pruned(NamedTuple):
    """What was removed: pieces (or files of cells and gene tables), and bytes."""

    removed: int
    nbytes: int


def prune(landing: Landing, *, dry_run: bool = False) -> Pruned:
    """Remove what the published landing does not name.

    Whoever still reads an earlier version, or lands into the folder, loses what it needs: hold
    :meth:`~scviaduct.landing.folder.Landing.writing` around it.

    Parameters
    ----------
    landing
        Published.
    dry_run
        Say what would go, and remove nothing.
    """
    manifest = landing.manifest()
    named = {landing.genes_file(part.genes) for part in manifest.parts}
    for piece in manifest.pieces:
        named |= {landing.genes_file(piece.genes), landing.obs_file(piece.obs), landing.counts_folder(piece.counts)}
        if piece.counts:
            named.add(landing.obs_record(piece.obs))
    removed, nbytes = 0, 0
    for path in sorted(set(_kept(landing)) - named):
        removed += 1
        nbytes += sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())
        if not dry_run:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return Pruned(removed, nbytes)


def _kept(landing: Landing) -> Iterator[Path]:
    """Everything that a landing is made of, but its manifest."""
    yield from (landing.path / "genes").glob("*")
    yield from (landing.path / "obs").glob("*/*")
    yield from (landing.path / "pieces").glob("*/*")
