"""Choosing a reference to map to, or a family to train."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.jobs import SHARD_CELLS
from scviaduct.references.choosing import choice as choosing
from scviaduct.references.registry import Registry

if TYPE_CHECKING:
    from scviaduct.references.choosing.choice import Choice
    from scviaduct.references.choosing.profile import Aim


def choose(source: str, *, aim: Aim = "") -> Choice:
    """Say which registered reference fits a source, or which family to train on it, and why.

    Reads the metadata of every cell, the gene lists of the sampled files, and the counts of a bounded sample.

    Parameters
    ----------
    source
        URI of the cells, e.g. ``"cells.h5ad"``.
    aim
        ``map``, ``integrate``, ``compare-samples`` or ``perturbation``; empty lets the data decide.

    Returns
    -------
    Choice
        Its ``steps`` say why, its ``commands`` what to run next, its ``alternatives`` what else would do.

    Raises
    ------
    InputError
        If the aim is none, or the source cannot be opened.
    """
    registry = Registry()
    return choosing.choose(source, registry.list(), aim=aim, broken=registry.broken(), shard_cells=SHARD_CELLS)
