"""The reader task: a shard in, a block in the object store out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ray

from scviaduct import faults
from scviaduct.mapping.reading import read_block
from scviaduct.references.package import Reference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scviaduct.values import CellBlock, Shard

_REFERENCES: dict[str, Reference] = {}


def read_shard(shard: Shard, reference: str, columns: Sequence[str]) -> tuple[int, CellBlock]:
    """Read a shard in a reference's genes.

    Parameters
    ----------
    shard
        What to read.
    reference
        Path of the package; its manifest gives the genes, its weights are not loaded.
    columns
        obs columns to bring along.

    Returns
    -------
    tuple of int and CellBlock
        The block's size in bytes, and the block. Two objects, so that the driver learns the size without the block.
    """
    if reference not in _REFERENCES:
        _REFERENCES[reference] = Reference.load(reference)
    block = read_block(shard, _REFERENCES[reference], columns)
    faults.point("read")
    return block.nbytes, block


read_task = ray.remote(num_returns=2, max_retries=0)(read_shard)
"""Retries are the dispatcher's."""
