"""Counts on their way out: genes mapped, sparse, sorted, in memory that is bounded.

Memory: one slab of the source, at most ``SLAB_BYTES``, plus the block that grows. Nothing here depends on the size of
the source. A cell's counts are never dense but in a slab of a matrix that is stored dense.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from scviaduct.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy.typing as npt

    from scviaduct.values import FloatArray, IntArray, LongArray

SLAB_BYTES = 64 << 20
"""Bytes that a reader holds of the source at a time, decoded."""
_CACHE_BYTES = 1 << 20
"""Of counts that are aligned to several references before the next: half of a core's second cache, or all of it."""
_GAP = 32
"""Rows between two selected ones that are read rather than skipped: a request costs more than they do."""


@dataclass(frozen=True, slots=True)
class GeneTarget:
    """Where the genes of a source go.

    Attributes
    ----------
    columns
        int32, shape ``(n_source_genes,)``; column in the block, -1 for a gene that is dropped.
    n_genes
        Width of the block.
    """

    columns: IntArray
    n_genes: int

    @classmethod
    def of(
        cls, genes: int, gene_map: IntArray | None, n_genes: int | None, absent: npt.NDArray[np.bool_] | None
    ) -> GeneTarget:
        """Check what the caller gave.

        Parameters
        ----------
        genes
            Number of genes of the source.
        gene_map, n_genes
            As in ``Source.read``; None keeps the source's genes.
        absent
            bool, shape ``(genes,)``; genes that ``var_filter`` leaves out.

        Raises
        ------
        InputError
            If the map does not fit the source or the width.
        """
        if gene_map is None:
            columns, n_genes = np.arange(genes, dtype=np.int32), genes
        else:
            columns = np.asarray(gene_map, dtype=np.int32)
            n_genes = int(columns.max(initial=-1)) + 1 if n_genes is None else n_genes
        if len(columns) != genes:
            raise InputError(
                f"gene_map has {len(columns)} entries for {genes} source genes.", "Make it from genes(shard)."
            )
        if columns.max(initial=-1) >= n_genes:
            raise InputError(f"gene_map points at column {columns.max()} of {n_genes}.", "Give a larger n_genes.")
        if absent is not None:
            columns = np.where(absent, np.int32(-1), columns)
        return cls(columns, n_genes)

    def align(
        self,
        indptr: LongArray,
        indices: npt.NDArray[np.integer],
        data: npt.NDArray[np.generic],
        chosen: LongArray | None = None,
    ) -> Rows:
        """Map the genes of some rows, sum those that share a column, sort.

        One compiled pass, which leaves zeros out and allocates what it returns. What is given may be read-only, and may
        be mapped to one reference after the other.

        Parameters
        ----------
        indptr
            int64, shape ``(n_rows + 1,)``, beginning at 0.
        indices, data
            Shape ``(nnz,)``; source genes and their values, of any integer and any real type.
        chosen
            int64; positions of the rows wanted. None for all.

        Raises
        ------
        ValueError
            If these are not rows of a matrix with as many genes as the source.
        """
        from scviaduct.sources import kernels

        _check_rows(indptr, indices, data)
        starts, stops = indptr[:-1], indptr[1:]
        if chosen is not None and len(chosen) < len(starts):
            starts, stops = starts[chosen], stops[chosen]
        pointers = np.zeros(len(starts) + 1, np.int64)
        room = int((stops - starts).sum())
        columns, values = np.empty(room, np.int32), np.empty(room, np.float32)
        read = [kernels.given(array) for array in (starts, stops, _plain(indices), _plain(data), self.columns)]
        if not kernels.align(*read, pointers, columns, values, *kernels.scratch(self.n_genes)):
            raise ValueError(f"genes {indices.min()} to {indices.max()} of {len(self.columns)}")
        return Rows(pointers, *cut(int(pointers[-1]), columns, values))


class Rows(NamedTuple):
    """A few rows as CSR: int64 pointers from 0, int32 columns in order, float32 values."""

    indptr: LongArray
    indices: IntArray
    data: FloatArray


def align_each(
    targets: Sequence[GeneTarget],
    indptr: LongArray,
    indices: npt.NDArray[np.integer],
    data: npt.NDArray[np.generic],
) -> list[Rows]:
    """What :meth:`GeneTarget.align` gives for each of some targets, in less time than one after the other.

    Parameters
    ----------
    targets
        Of as many genes each.
    indptr, indices, data
        As there.

    Raises
    ------
    ValueError
        If these are not rows of a matrix with as many genes as the source.
    """
    from scviaduct.sources import kernels

    _check_rows(indptr, indices, data)
    columns = np.stack([target.columns for target in targets])
    pointers = np.zeros((len(targets), len(indptr)), np.int64)
    # Room for all values in each; what is not written takes no memory.
    genes, values = np.empty((len(targets), len(data)), np.int32), np.empty((len(targets), len(data)), np.float32)
    scratch = kernels.scratch(max(target.n_genes for target in targets))
    read = [kernels.given(array) for array in (indptr[:-1], indptr[1:], _plain(indices), _plain(data), columns)]
    together = max(1, _CACHE_BYTES * len(indptr) // max(8 * len(data), 1))
    if not kernels.align_each(*read, pointers, genes, values, *scratch, together):
        raise ValueError(f"genes {indices.min()} to {indices.max()} of {columns.shape[1]}")
    ends = pointers[:, -1].tolist()
    return [Rows(pointers[i], genes[i, :end], values[i, :end]) for i, end in enumerate(ends)]


def _check_rows(indptr: LongArray, indices: npt.NDArray[np.integer], data: npt.NDArray[np.generic]) -> None:
    """Refuse what kernels would read beyond the end of."""
    if not (indptr[0] == 0 and indptr[-1] == len(indices) == len(data) and (np.diff(indptr) >= 0).all()):
        raise ValueError(f"indptr leads from {indptr[0]} to {indptr[-1]} of {len(indices)} genes, {len(data)} values")
    if indices.dtype.kind not in "iu":
        raise ValueError(f"genes are of type {indices.dtype}")


def _plain(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same values in a type that is compiled for."""
    if array.dtype.kind in "iu" and array.dtype.itemsize in (1, 2, 4, 8):
        return array.astype(array.dtype.newbyteorder("="), copy=False)
    return array.astype(np.float64 if array.dtype.itemsize > 4 else np.float32, copy=False)


def cut(size: int, columns: IntArray, values: FloatArray) -> tuple[IntArray, FloatArray]:
    """Give back the memory behind the first values; nothing is copied."""
    columns.resize(size, refcheck=False)
    values.resize(size, refcheck=False)
    return columns, values


def assemble(parts: Iterable[Rows]) -> Rows:
    """Put rows under each other; each kind of array is joined and let go before the next."""
    pointers, columns, values = [np.zeros(1, np.int64)], [], []
    total = 0
    for part in parts:
        pointers.append(part.indptr[1:] + total)
        columns.append(part.indices)
        values.append(part.data)
        total += len(part.data)
    if len(columns) == 1:
        return Rows(np.concatenate(pointers), columns[0], values[0])
    indices = np.concatenate([np.zeros(0, np.int32), *columns])
    columns.clear()
    data = np.concatenate([np.zeros(0, np.float32), *values])
    return Rows(np.concatenate(pointers), indices, data)


def runs(rows: LongArray) -> Iterator[tuple[int, int, LongArray]]:
    """Stretches of the source that hold the selected rows.

    Yields
    ------
    tuple
        First row, row after the last, and the selected positions within, int64.
    """
    if not len(rows):
        return
    breaks = np.flatnonzero(np.diff(rows) > _GAP) + 1
    for run in np.split(rows, breaks):
        yield int(run[0]), int(run[-1]) + 1, run - run[0]
