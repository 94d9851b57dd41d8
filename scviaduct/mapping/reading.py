"""Reading a shard in the genes of a reference, or of several at once, wherever the reader runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from scviaduct.mapping.genes import GeneMatch, match_genes
from scviaduct.sources import open_shard
from scviaduct.sources.counts import GeneTarget, align_each

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scviaduct.landing.alongside import Alongside
    from scviaduct.references.package import Reference
    from scviaduct.sources.counts import Rows
    from scviaduct.values import CellBlock, IntArray, Shard

_MATCHES: dict[tuple[str, str, str], GeneMatch] = {}
_TOGETHER = 4
"""References that counts are aligned to at a time. Each holds a quarter of the shared block's counts or so, and more
at a time would save little."""
_MATCHES_KEPT = 64  # a match holds 4 bytes a source gene: 64 of 60,000 genes are 15 MB


@dataclass(frozen=True, slots=True)
class SharedBlock:
    """A shard's counts, read once for several references.

    Attributes
    ----------
    block
        Counts of the source's genes that any of the references reads, in the source's order and not summed: which genes
        are one differs from reference to reference. For a single reference, and for several of the same genes, they are
        in the references' genes already.
    targets
        Where those genes go, one per reference; None for all of them where they are there.
    """

    block: CellBlock
    targets: tuple[GeneTarget | None, ...]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.block.nbytes + sum(target.columns.nbytes for target in self.targets if target)

    def of(self, position: int) -> CellBlock:
        """The counts in the genes of a reference, as a reading for it alone gives them.

        Parameters
        ----------
        position
            Of the reference, among those that the shard was read for.
        """
        block, target = self.block, self.targets[position]
        if target is None:
            return block
        return _aligned(block, target, target.align(block.indptr, block.indices, block.data))

    def together(self, position: int) -> list[CellBlock]:
        """What :meth:`of` gives of a reference and of some that follow, in less time than one after the other.

        Parameters
        ----------
        position
            Of the first reference.
        """
        block, targets = self.block, self.targets[position : position + _TOGETHER]
        there = [target for target in targets if target is not None]
        if not there:
            return [block] * len(targets)
        found = align_each(there, block.indptr, block.indices, block.data)
        return [_aligned(block, target, rows) for target, rows in zip(there, found, strict=True)]


def _aligned(block: CellBlock, target: GeneTarget, rows: Rows) -> CellBlock:
    return replace(block, indptr=rows.indptr, indices=rows.indices, data=rows.data, n_genes=target.n_genes)


def gene_match(shard: Shard, reference: Reference) -> GeneMatch:
    """How the genes of a shard's file map onto the reference's; worked out once per file and process."""
    return gene_matches(shard, [reference])[0]


def gene_matches(shard: Shard, references: Sequence[Reference]) -> list[GeneMatch]:
    """How the genes of a shard's file map onto those of each reference; the file's are read once."""
    keys = [(shard.uri, shard.version, reference.digest) for reference in references]
    found = [_MATCHES.get(key) for key in keys]
    if None not in found:
        return [match for match in found if match]
    genes = open_shard(shard).genes(shard)
    matches = [match or match_genes(genes, one.genes) for match, one in zip(found, references, strict=True)]
    for key, match in zip(keys, matches, strict=True):
        while len(_MATCHES) >= _MATCHES_KEPT and key not in _MATCHES:
            _MATCHES.pop(next(iter(_MATCHES)))
        _MATCHES[key] = match
    return matches


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


def read_shared(
    shard: Shard,
    references: Sequence[Reference],
    columns: Sequence[str],
    limit: int | None = None,
    alongside: Alongside | None = None,
) -> SharedBlock:
    """Read a shard's counts once, for several references.

    Parameters
    ----------
    shard, columns, limit
        As :func:`read_block` takes them.
    references
        At least one.
    alongside
        Lands the shard while it is read; not together with a limit.

    Raises
    ------
    SourceChangedError
        If the source no longer holds the planned cells.
    """
    targets = [
        GeneTarget(match.target, len(reference.genes))
        for match, reference in zip(gene_matches(shard, references), references, strict=True)
    ]
    first, *others = targets
    if all(one.n_genes == first.n_genes and np.array_equal(one.columns, first.columns) for one in others):
        block = _read(shard, first.columns, first.n_genes, columns, limit, alongside)
        return SharedBlock(block, (None,) * len(targets))
    wanted = np.flatnonzero(np.any([one.columns >= 0 for one in targets], axis=0))
    union = np.full(len(first.columns), -1, np.int32)
    union[wanted] = np.arange(len(wanted), dtype=np.int32)
    block = _read(shard, union, len(wanted), columns, limit, alongside)
    return SharedBlock(block, tuple(GeneTarget(one.columns[wanted], one.n_genes) for one in targets))


def _read(
    shard: Shard,
    genes: IntArray,
    n_genes: int,
    columns: Sequence[str],
    limit: int | None,
    alongside: Alongside | None,
) -> CellBlock:
    if alongside is not None and limit is None:
        return alongside.read(shard, genes, n_genes, columns)
    return open_shard(shard).read(shard, genes, n_genes, columns, limit)
