"""Highly variable genes from a stream of cells (Seurat v3: Stuart et al., Cell 2019), as scanpy ranks them.

Two passes over the cells: sums and sums of squares of each gene in each batch, from which the variance that is
expected at a gene's mean is fitted; then sums of the counts clipped at what is expected. Nothing of the cells is held
between blocks. Memory: six float64 a gene and batch (60,000 genes in 100 batches: 288 MB).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scviaduct.errors import InputError
from scviaduct.families.vae import quiet

if TYPE_CHECKING:
    import numpy.typing as npt

    from scviaduct.values import CellBlock

    Array = npt.NDArray[np.float64]

_SPANS = (0.3, 0.6, 1.0)
"""Shares of the genes that the local regression of variance on mean looks at: scanpy's own, then wider ones. It is
singular where few genes share a mean, as in a panel or a small batch."""


@dataclass(slots=True)
class _Batch:
    """Sums over the cells of a batch; each array has a value a gene."""

    total: Array
    squares: Array
    cells: int = 0
    mean: Array = field(default_factory=lambda: np.zeros(0))
    deviation: Array = field(default_factory=lambda: np.zeros(0))
    clipped: Array = field(default_factory=lambda: np.zeros(0))
    clipped_squares: Array = field(default_factory=lambda: np.zeros(0))


class VariableGenes:
    """Ranks genes; feed it every block with :meth:`add`, call :meth:`fit`, feed them again with :meth:`clip`.

    Parameters
    ----------
    n_genes
        Genes; the first columns of every block.
    batch_key
        obs column within whose values genes are ranked; None to rank them over all cells.
    """

    def __init__(self, n_genes: int, batch_key: str | None) -> None:
        self._n_genes = n_genes
        self._key = batch_key
        self._batches: dict[str, _Batch] = {}
        self.cells = 0

    def add(self, block: CellBlock) -> None:
        """First pass: sums. Counts are whole numbers, whose sums are exact, so the blocks' cut does not matter."""
        self.cells += block.n_cells
        for name, cells, genes, counts in self._parts(block):
            batch = self._batches.setdefault(name, _Batch(np.zeros(self._n_genes), np.zeros(self._n_genes)))
            batch.cells += cells
            batch.total += np.bincount(genes, counts, self._n_genes)
            batch.squares += np.bincount(genes, counts**2, self._n_genes)

    def fit(self) -> None:
        """Between the passes: fit variance against mean in every batch of more than one cell.

        Raises
        ------
        InputError
            If the method fails on these cells, as it does on very few or very even ones.
        """
        self._batches = {name: batch for name, batch in self._batches.items() if batch.cells > 1}
        singular: ValueError | None = None
        for span in _SPANS if self._batches else ():
            try:
                for batch in self._batches.values():
                    _fit(batch, span)
            except ValueError as error:
                singular = error
            else:
                return
        told = f"Variable genes cannot be chosen among {self._n_genes:,} genes of {self.cells:,} cells."
        raise InputError(told, "Train on all genes: --genes 0.") from singular

    def clip(self, block: CellBlock) -> None:
        """Second pass: sums of the counts, clipped as Seurat does; in the cells' order, which decides the last bit."""
        for name, _, genes, counts in self._parts(block):
            batch = self._batches.get(name)
            if batch is None:
                continue
            most = batch.deviation * np.sqrt(batch.cells) + batch.mean
            values = np.minimum(counts, most[genes])
            np.add.at(batch.clipped, genes, values)
            np.add.at(batch.clipped_squares, genes, values**2)

    def chosen(self, n_top: int) -> npt.NDArray[np.bool_]:
        """The most variable genes: those of the best median rank over the batches in which they are among the first.

        Parameters
        ----------
        n_top
            How many.

        Returns
        -------
        numpy.ndarray
            bool, shape ``(n_genes,)``.
        """
        normal = np.stack([_normalised(batch) for batch in self._batches.values()])
        ranks = np.argsort(np.argsort(-normal, axis=1), axis=1).astype(np.float32)
        in_batches = (ranks < n_top).sum(axis=0)
        ranks[ranks >= n_top] = np.nan
        median = np.ma.median(np.ma.masked_invalid(ranks), axis=0).filled(np.nan)
        order = pd.DataFrame({"rank": median, "batches": in_batches}).sort_values(
            ["rank", "batches"], ascending=[True, False], na_position="last"
        )
        found = np.zeros(self._n_genes, np.bool_)
        found[order.index[:n_top]] = True
        return found

    def _parts(self, block: CellBlock) -> list[tuple[str, int, npt.NDArray[np.int32], Array]]:
        """Cells, genes and counts of each batch in a block, in the block's order."""
        of_genes = block.indices < self._n_genes
        cell = np.repeat(np.arange(block.n_cells), np.diff(block.indptr))[of_genes]
        genes, counts = block.indices[of_genes], block.data[of_genes].astype(np.float64)
        if self._key is None:
            return [("", block.n_cells, genes, counts)]
        codes, names = pd.factorize(block.obs[self._key].to_pandas().astype(object).astype(str))
        of_count = codes[cell]
        return [
            (str(name), int((codes == i).sum()), genes[of_count == i], counts[of_count == i])
            for i, name in enumerate(names)
        ]


def _fit(batch: _Batch, span: float) -> None:
    from skmisc.loess import loess

    n = batch.cells
    batch.mean = batch.total / n
    variance = (batch.squares / n - batch.mean**2) * (n / (n - 1))
    fitted = np.zeros_like(variance)
    varies = variance > 0
    if varies.any():
        with quiet():
            model = loess(np.log10(batch.mean[varies]), np.log10(variance[varies]), span=span, degree=2)
            model.fit()
        fitted[varies] = model.outputs.fitted_values
    batch.deviation = np.sqrt(10**fitted)
    batch.clipped, batch.clipped_squares = np.zeros_like(variance), np.zeros_like(variance)


def _normalised(batch: _Batch) -> Array:
    """Variance of the clipped counts over what is expected at their mean."""
    scale = 1 / ((batch.cells - 1) * np.square(batch.deviation))
    spread = batch.cells * np.square(batch.mean) + batch.clipped_squares - 2 * batch.clipped * batch.mean
    found: Array = scale * spread
    return found
