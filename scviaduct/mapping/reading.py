"""Reading a shard in a reference's genes, wherever the reader runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scviaduct.mapping.genes import GeneMatch, match_genes
from scviaduct.sources import open_shard

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scviaduct.references.package import Reference
    from scviaduct.values import CellBlock, Shard

_MATCHES: dict[tuple[str, str, str], GeneMatch] = {}
_MATCHES_KEPT = 64  # a match holds 4 bytes a source gene: 64 of 60,000 genes are 15 MB


def gene_match(shard: Shard, reference: Reference) -> GeneMatch:
    """How the genes of a shard's file map onto the reference's; worked out once per file and process."""
    key = (shard.uri, shard.version, reference.digest)
    if key not in _MATCHES:
        while len(_MATCHES) >= _MATCHES_KEPT:
            _MATCHES.pop(next(iter(_MATCHES)))
        _MATCHES[key] = match_genes(open_shard(shard).genes(shard), reference.genes)
    return _MATCHES[key]


def read_block(shard: Shard, reference: Reference, columns: Sequence[str], limit: int | None = None) -> CellBlock:
    """Read a shard's counts in the reference's gene order.

    Parameters
    ----------
    shard
        What to read.
    reference
        Gives the genes; those that the source lacks are zero.
    columns
        obs columns to bring along.
    limit
        Only so many cells, for a sample.

    Raises
    ------
    SourceChangedError
        If the source no longer holds the planned cells.
    """
    target = gene_match(shard, reference).target
    return open_shard(shard).read(shard, target, len(reference.genes), columns, limit)
