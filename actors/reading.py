"""The reader task: a shard in, a block in the object store out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ray

from scviaduct import faults
from scviaduct.mapping.reading import read_shared
from scviaduct.references.package import Reference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scviaduct.landing.alongside import Alongside
    from scviaduct.mapping.reading import SharedBlock
    from scviaduct.values import Shard

_REFERENCES: dict[str, Reference] = {}


def read_shard(
    shard: Shard, references: Sequence[str], columns: Sequence[str], alongside: Alongside | None = None
) -> tuple[int, SharedBlock]:
    """Read a shard once, for one or several references.

    Parameters
    ----------
    shard
        What to read.
    references
        Paths of the packages; their manifests give the genes, their weights are not loaded.
    columns
        obs columns to bring along.
    alongside
        Lands the shard while it is read.

    Returns
    -------
    tuple of int and SharedBlock
        The block's size in bytes, and the block. Two objects, so that the driver learns the size without the block.
    """
    for path in references:
        if path not in _REFERENCES:
            _REFERENCES[path] = Reference.load(path)
    block = read_shared(shard, [_REFERENCES[path] for path in references], columns, alongside=alongside)
    faults.point("read")
    return block.nbytes, block


read_task = ray.remote(num_returns=2, max_retries=0)(read_shard)
"""Retries are the dispatcher's."""
