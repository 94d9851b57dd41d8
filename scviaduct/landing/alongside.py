"""Landing a shard while it is read for something else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from scviaduct.errors import ScviaductError
from scviaduct.landing.writing import PieceJob, land_block, recall, table_source
from scviaduct.sources.counts import GeneTarget
from scviaduct.sources.source import KEY_COLUMN

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scviaduct.landing.folder import Landing
    from scviaduct.values import CellBlock, IntArray, Shard


@dataclass(frozen=True, slots=True)
class Alongside:
    """Reads a shard as its source does, and lands it on the way, unless it is landed already.

    Picklable: a driver makes one for each shard, and a reader uses it in the place of the source.

    Attributes
    ----------
    landing
        Where the piece goes.
    job
        Of the shard.
    """

    landing: Landing
    job: PieceJob

    def read(
        self, shard: Shard, gene_map: IntArray | None, n_genes: int | None, columns: Sequence[str] = ()
    ) -> CellBlock:
        """What :meth:`scviaduct.sources.source.Source.read` gives.

        All genes and obs columns of the shard are read once, and its block in all genes is held beside the one that is
        handed on: 8 bytes a count. Where that, or the writing of the piece, fails, what was asked for is read alone.
        """
        source = table_source(shard)
        if recall(self.landing, self.job):
            return source.read(shard, gene_map, n_genes, columns)
        try:
            whole = source.read(shard, columns=self.job.columns)
            land_block(self.landing, self.job, whole)
        except (ScviaductError, OSError):
            # Cells that can be mapped are mapped, though a column that the mapping does not read is damaged or the
            # landing's disk is full. The piece stays open: whoever ends the landing tries it again and says why not.
            return source.read(shard, gene_map, n_genes, columns)
        target = GeneTarget.of(whole.n_genes, gene_map, n_genes, None)
        rows = target.align(whole.indptr, whole.indices, whole.data)
        obs = whole.obs.select([KEY_COLUMN, *dict.fromkeys(columns)])
        return replace(whole, indptr=rows.indptr, indices=rows.indices, data=rows.data, n_genes=target.n_genes, obs=obs)
