"""What travels to a GPU of a block's counts: pieces of cells, each in as few bytes as say exactly the same.

A reader gives 8 bytes a count, an int32 gene and a float32 count. Of up to 65,536 genes a uint16 names each, and counts
of cells are small whole numbers: 3 bytes a count then say the same. What is sent decides how fast a GPU encodes, so
each piece is narrowed while it is copied into the buffer it leaves from: one pass, which writes less than a copy would.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import float32, int32, uint32

from scviaduct.compiling import compiled
from scviaduct.errors import DataError

if TYPE_CHECKING:
    import numpy.typing as npt

    from scviaduct.values import FloatArray, IntArray, LongArray

COUNTS = (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.float32))
"""What a count can travel as, the narrowest first; the last holds every count."""
_ALIGNED = 16
"""Parts of a piece begin at multiples of so many bytes: the widest load of a GPU's thread."""
_RUN = 4096
"""Counts narrowed between two looks at whether they fit; what it writes stays in a core's first cache."""
_FITS, _WIDER, _STRANGE = 0, 1, 2


def gene_type(n_genes: int) -> np.dtype[Any]:
    """What a position among so many genes travels as."""
    return np.dtype(np.uint16 if n_genes <= 1 << 16 else np.int32)


def cut(indptr: LongArray, step: int, counts: int) -> list[tuple[int, int]]:
    """Cut cells into pieces of a bounded number of counts.

    Parameters
    ----------
    indptr
        int64, shape ``(n_cells + 1,)``.
    step
        Cells of a step; no piece lies in two.
    counts
        Most counts of a piece; a single cell of more is a piece of its own.

    Returns
    -------
    list of tuples
        First cell of each piece, and the one behind its last.
    """
    pieces, start, n_cells = [], 0, len(indptr) - 1
    while start < n_cells:
        end = min(n_cells, (start // step + 1) * step)
        fits = int(np.searchsorted(indptr, indptr[start] + counts, side="right")) - 1
        stop = min(end, max(fits, start + 1))
        pieces.append((start, stop))
        start = stop
    return pieces


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the parts of a piece lie in its buffer.

    Attributes
    ----------
    cells, counts
        How many.
    gene, count
        What each of the genes and counts is held as. Row pointers are int32.
    """

    cells: int
    counts: int
    gene: np.dtype[Any]
    count: np.dtype[Any]

    @property
    def genes_at(self) -> int:
        """First byte of the genes; row pointers lie before them."""
        return _rounded(4 * (self.cells + 1))

    @property
    def counts_at(self) -> int:
        """First byte of the counts, behind the genes."""
        return self.genes_at + _rounded(self.counts * self.gene.itemsize)

    @property
    def n_bytes(self) -> int:
        """All of it."""
        return self.counts_at + self.counts * self.count.itemsize

    def views(self, buffer: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
        """Row pointers, genes and counts in a buffer of bytes."""
        pointers = buffer[: 4 * (self.cells + 1)].view(np.int32)
        genes = buffer[self.genes_at : self.genes_at + self.counts * self.gene.itemsize].view(self.gene)
        return pointers, genes, buffer[self.counts_at : self.n_bytes].view(self.count)


def _rounded(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNED) * _ALIGNED


def narrow(
    indices: IntArray, data: FloatArray, genes: npt.NDArray[Any], counts: npt.NDArray[Any], n_genes: int
) -> bool:
    """Write genes and counts as what they travel as; other threads run meanwhile.

    Parameters
    ----------
    indices, data
        int32 and float32, shape ``(nnz,)``.
    genes, counts
        Where to, same shape: uint16 or int32, and one of :data:`COUNTS`.
    n_genes
        Genes that there are.

    Returns
    -------
    bool
        False if a count does not fit; what is written is then not complete.

    Raises
    ------
    DataError
        If a gene is not one of them: a GPU would read whatever lies there.
    """
    if counts.dtype.kind == "f":
        found = _copied(indices, data, np.uint32(n_genes), genes, counts)
    else:
        found = _narrowed(indices, data, np.uint32(n_genes), np.uint32(np.iinfo(counts.dtype).max), genes, counts)
    if found == _STRANGE:
        bad = int(indices[(indices < 0) | (indices >= n_genes)][0])
        raise DataError(
            f"A count is of the gene at position {bad:,}, and the reference has {n_genes:,} genes.",
            "Give counts in the reference's genes, as the readers do.",
        )
    return bool(found == _FITS)


@compiled()
def _narrowed(indices, data, n_genes, most, genes, counts):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Whole numbers up to ``most``: both loops become vector instructions, 1.9 counts a ns of a core from its cache."""
    for low in range(0, len(data), _RUN):
        of, x, gene, count = indices[low : low + _RUN], data[low : low + _RUN], genes[low:], counts[low:]
        highest = uint32(0)
        for i in range(len(of)):
            g = uint32(of[i])  # a negative one becomes a large one
            highest = max(highest, g)
            gene[i] = g
        wrong = uint32(0)
        for i in range(len(x)):
            c = int32(x[i])
            wrong |= uint32(float32(c) != x[i])
            wrong |= uint32(uint32(c) > most)
            count[i] = c
        if highest >= n_genes:
            return _STRANGE
        if wrong:
            return _WIDER
    return _FITS


@compiled()
def _copied(indices, data, n_genes, genes, counts):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Counts as they are."""
    highest = uint32(0)
    for i in range(len(indices)):
        g = uint32(indices[i])
        highest = max(highest, g)
        genes[i] = g
    for i in range(len(data)):
        counts[i] = data[i]
    return _STRANGE if len(indices) and highest >= n_genes else _FITS
