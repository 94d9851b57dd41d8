"""Writing the latents of a reference's own cells as they come, and summing them up on the way.

Memory: one block of cells, and a matrix of sums a label; nothing that grows with the cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow.parquet as pq

from scviaduct.references.latents import Statistics

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt

    from scviaduct.references.latents import ReferenceLatents
    from scviaduct.values import FloatArray

    Array = npt.NDArray[np.float64]


@dataclass(slots=True)
class _Sums:
    """Cells, their mean, and the sums of products of what is left of them; in float64.

    Joined block by block as Chan, Golub and LeVeque (The American Statistician 1983) do, which does not cancel as plain
    sums of squares would.
    """

    cells: int
    mean: Array
    products: Array

    @classmethod
    def none(cls, size: int) -> Self:
        return cls(0, np.zeros(size), np.zeros((size, size)))

    def add(self, latent: FloatArray) -> None:
        if not len(latent):
            return
        rows = latent.astype(np.float64)
        mean, cells = rows.mean(axis=0), len(rows)
        rows -= mean
        apart, both = mean - self.mean, self.cells + cells
        self.products += rows.T @ rows + np.outer(apart, apart) * (self.cells * cells / both)
        self.mean = self.mean + apart * (cells / both)
        self.cells = both

    @property
    def covariance(self) -> Array:
        return self.products / (self.cells - 1) if self.cells > 1 else np.zeros_like(self.products)


class LatentWriter:
    """Writes ``latents.parquet``, a row group a block; a context manager.

    Parameters
    ----------
    path
        Of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Any = None
        self._every: _Sums | None = None
        self._labels: dict[str, _Sums] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, latents: ReferenceLatents, names: Sequence[str]) -> None:
        """Write some cells.

        Parameters
        ----------
        latents
            Of the cells.
        names
            One per cell.
        """
        table = latents.table(names)
        if self._file is None:
            self._file = pq.ParquetWriter(self._path, table.schema, compression="zstd", use_dictionary=["label"])
        self._file.write_table(table)
        size = latents.latent.shape[1]
        self._every = self._every or _Sums.none(size)
        self._every.add(latents.latent)
        told = np.array([label or "" for label in latents.labels], object)
        for label in set(told) - {""}:
            self._labels.setdefault(label, _Sums.none(size)).add(latents.latent[told == label])

    def statistics(self, influence: FloatArray) -> Statistics:
        """What all cells sum up to; at least one was written.

        Parameters
        ----------
        influence
            float32, shape ``(n_features,)``.
        """
        every = self._every or _Sums.none(0)
        size, labels = len(every.mean), tuple(sorted(self._labels))
        sums = [self._labels[label] for label in labels]
        return Statistics(
            labels,
            np.array([one.cells for one in sums], np.int64),
            np.array([one.mean for one in sums], np.float32).reshape(len(labels), size),
            np.array([one.covariance for one in sums], np.float32).reshape(len(labels), size, size),
            every.mean.astype(np.float32),
            every.covariance.astype(np.float32),
            influence,
        )
