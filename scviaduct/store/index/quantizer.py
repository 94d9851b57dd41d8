"""The quantizer of a space: centroids that all its segments share, trained once on a bounded sample."""

from __future__ import annotations

import json
import math
import os
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Self

import faiss
import numpy as np

from scviaduct.store.files import read_remade

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scviaduct.values import FloatArray, IntArray, LongArray

POINTS_PER_LIST = 48
"""Cells of the sample, per list; below 39, faiss warns that k-means has too few. With 120, a query of a million cells
is compared with 3 to 6 % fewer cells, which was no faster, and training takes 2.3 times as long."""
_LEAST_PER_LIST = 39
_ROUNDS = 8
"""Of k-means. Between 6 and 10, chosen when all queries looked into the same number of lists: 32 and 36 of 2,000 at a
million cells."""
_MOST_LISTS = 16_384
"""Lists at most, reached at 137 million cells: the time of k-means grows with their square. 14,000, those of 100
million cells, took 78 CPU-seconds."""
_SEED = 0
_LEAST_RADIUS, _TINY = 0.3, 1e-9
GROWTH, SPREAD, IMBALANCE = 4.0, 1.5, 2.0
"""What drift is allowed: lists of the cells of the training, times 4; their mean squared distance to the centroids,
times 1.5; the imbalance factor (lists x sum of squared shares: what a query that falls where cells are compares, over
what it would compare in lists of one size), times 2."""


def cores() -> int:
    """Cores that this process may use; one thread each."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class Trained:
    """What the training saw.

    Attributes
    ----------
    cells
        Of the version that it was trained on.
    distance
        Mean squared distance of the sample to the nearest centroids.
    imbalance
        Imbalance factor of the sample: 1 for lists of one size.
    """

    cells: int
    distance: float
    imbalance: float


@dataclass(frozen=True, slots=True, eq=False)
class Quantizer:
    """Centroids, addressed by their content.

    Attributes
    ----------
    centroids
        float32, shape ``(lists, dimensions)``.
    radii
        float32, shape ``(lists,)``: root mean squared distance to each centroid of the sample's cells in its list; at
        least 0.3 of that over all lists, for a list of one cell has none. Positive even where all cells are one.
    trained
        What the training saw.
    """

    centroids: FloatArray
    radii: FloatArray
    trained: Trained

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of BLAKE2b over the centroids."""
        told = repr(self.centroids.shape).encode() + np.ascontiguousarray(self.centroids).tobytes()
        return blake2b(told, digest_size=8).hexdigest()

    @classmethod
    def train(cls, sample: FloatArray, cells: int, threads: int) -> Self:
        """k-means over a sample; seeded.

        Parameters
        ----------
        sample
            float32, shape ``(n, dimensions)``.
        cells
            That the sample stands for.
        threads
            Of faiss.
        """
        n, dimensions = sample.shape
        lists = max(1, min(lists_for(cells), n // _LEAST_PER_LIST))
        means = faiss.Kmeans(dimensions, lists, niter=_ROUNDS, seed=_SEED, max_points_per_centroid=POINTS_PER_LIST)
        with _threads(threads):
            means.train(sample)
        centroids = np.ascontiguousarray(means.centroids, np.float32)
        found, squares = _assign(sample, centroids, threads)
        sizes, mean = np.bincount(found, minlength=lists), float(squares.mean())
        radii = np.sqrt(np.bincount(found, squares, minlength=lists) / np.maximum(sizes, 1))
        radii = np.maximum(radii, max(_LEAST_RADIUS * math.sqrt(mean), _TINY))
        return cls(centroids, radii.astype(np.float32), Trained(cells, mean, imbalance(sizes)))

    def assign(self, latent: FloatArray, threads: int) -> tuple[IntArray, FloatArray]:
        """Nearest centroid of each cell, and the squared distance."""
        return _assign(latent, self.centroids, threads)

    def drift(self, sizes: LongArray, squares: float) -> str:
        """In which way cells have left what the training saw; empty if they have not.

        Parameters
        ----------
        sizes
            int64, shape ``(lists,)``: cells of each list.
        squares
            Their squared distances to the centroids, summed.
        """
        cells, trained = int(sizes.sum()), self.trained
        if cells > GROWTH * trained.cells and len(sizes) < _MOST_LISTS:
            return f"{cells:,} cells, trained on {trained.cells:,}"
        if squares > SPREAD * trained.distance * cells:
            return f"mean squared distance {squares / cells:.3g}, {trained.distance:.3g} at training"
        if imbalance(sizes) > IMBALANCE * trained.imbalance:
            return f"imbalance {imbalance(sizes):.2f}, {trained.imbalance:.2f} at training"
        return ""

    def save(self, folder: Path) -> None:
        """Write into the folder of an index; :meth:`load` reads it back."""
        np.save(folder / f"centroids-{self.digest}.npy", self.centroids)
        np.save(folder / f"radii-{self.digest}.npy", self.radii)
        (folder / f"centroids-{self.digest}.json").write_text(json.dumps(asdict(self.trained)))

    @classmethod
    def load(cls, folder: Path, digest: str) -> Self:
        """Read back.

        Raises
        ------
        FileNotFoundError
            If it is not there, or was cut off when a machine went down.
        """
        told = read_remade(folder / f"centroids-{digest}.json")
        try:
            centroids, radii = (np.load(folder / f"{name}-{digest}.npy") for name in ("centroids", "radii"))
        except (EOFError, ValueError) as error:
            raise FileNotFoundError(f"Files of '{folder}' are cut off ({error})") from error
        return cls(centroids, radii, Trained(**told))


def _assign(latent: FloatArray, centroids: FloatArray, threads: int) -> tuple[IntArray, FloatArray]:
    with _threads(threads):
        squares, found = faiss.knn(np.ascontiguousarray(latent, np.float32), centroids, 1)
    return found[:, 0].astype(np.int32), squares[:, 0]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Threads of faiss, for as long as the block lasts: PyTorch has the same OpenMP, and would compute on as many."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


@lru_cache(maxsize=4)
def cached(folder: str, digest: str) -> Quantizer:
    """A quantizer, read once per process."""
    return Quantizer.load(Path(folder), digest)


def lists_for(cells: int) -> int:
    """Lists that so many cells are spread over: 1.4 sqrt(n).

    At a million cells and a recall of .999, a query is compared with 4,460, 4,120, 4,030 and 3,510 cells where there
    are 1,000, 1,400, 2,000 and 4,000 lists, and with all centroids besides.
    """
    return min(int(1.4 * math.sqrt(cells)), _MOST_LISTS)


def imbalance(sizes: LongArray) -> float:
    """Lists times the sum of squared shares: 1 for lists of one size."""
    total = float(sizes.sum())
    return float(len(sizes) * np.square(sizes / total).sum()) if total else 1.0
