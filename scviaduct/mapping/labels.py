"""Labels and what is known of their certainty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import faiss
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from scviaduct.values import FloatArray, IntArray, LongArray

_CELLS = 1024
"""Cells that vote at a time: their candidates take 15 MB for a latent of 50."""
_MORE = 16
"""Candidates beyond the neighbours that are asked for."""


@dataclass(frozen=True, slots=True)
class Certainty:
    """The most probable label of each cell and how sure it is.

    Attributes
    ----------
    label
        int32, shape ``(n_cells,)``; column of the most probable label, the first of equals.
    probability, margin, entropy
        float32, shape ``(n_cells,)``: its probability, the distance to the runner-up's, and the Shannon entropy of all
        probabilities in nats.
    """

    label: IntArray
    probability: FloatArray
    margin: FloatArray
    entropy: FloatArray

    @classmethod
    def of(cls, probabilities: FloatArray) -> Self:
        """Summarise label probabilities.

        Parameters
        ----------
        probabilities
            Shape ``(n_cells, n_labels)``; rows sum to one.
        """
        from scviaduct.mapping.ranking import rank  # numba takes 0.4 s

        probabilities = np.ascontiguousarray(probabilities, np.float32)
        n_cells = len(probabilities)
        label: IntArray = np.empty(n_cells, np.int32)
        figures: list[FloatArray] = [np.empty(n_cells, np.float32) for _ in range(3)]
        rank(probabilities, label, *figures)
        return cls(label, *figures)


class NeighborVote:
    """Labels by distance-weighted vote of the nearest labelled reference cells.

    The weights are those of the weighted k-NN transfer of scArches (Lotfollahi et al., Nature Biotechnology 2022;
    used for the Human Lung Cell Atlas by Sikkema et al., Nature Medicine 2023): for distances d of a cell's k
    neighbours with standard deviation s, ``exp(-d * s**2 / 4)``, normalised to one. Neighbours are exact.

    Parameters
    ----------
    latent
        float32, shape ``(n_reference_cells, n_latent)``.
    labels
        One label per reference cell; None where the cell has none. Such cells do not vote.
    neighbors
        k; fewer if fewer cells are labelled.
    """

    def __init__(self, latent: FloatArray, labels: Sequence[str | None], neighbors: int) -> None:
        voting = np.array([label is not None for label in labels], dtype=bool)
        names, codes = np.unique(
            np.array([label for label in labels if label is not None], dtype=str), return_inverse=True
        )
        self.labels: tuple[str, ...] = tuple(names.tolist())
        self._codes = codes
        self._neighbors = min(neighbors, len(codes))
        voters = np.ascontiguousarray(latent[voting], dtype=np.float32)
        # About the middle, where the norms that faiss subtracts are small.
        self._centre = voters.mean(axis=0, dtype=np.float64).astype(np.float32) if len(voters) else np.float32(0)
        self._index = faiss.IndexFlatL2(latent.shape[1])
        self._index.add(voters - self._centre)

    def probabilities(self, latent: FloatArray) -> FloatArray:
        """Share of the vote that each label gets; a cell's does not depend on the other cells, to the bit.

        Parameters
        ----------
        latent
            float32, shape ``(n_cells, n_latent)``.

        Returns
        -------
        float32, shape ``(n_cells, n_labels)``; rows sum to one.
        """
        votes = np.zeros((len(latent), len(self.labels)))
        for start in range(0, len(latent), _CELLS):
            part = slice(start, start + _CELLS)
            squared, found = self._nearest(np.ascontiguousarray(latent[part], dtype=np.float32) - self._centre)
            distance = np.sqrt(squared)
            exponent = distance * distance.std(axis=1, keepdims=True) ** 2 / 4
            # Of a cell far from all voters every weight would be 0; beside the nearest one's, one is 1.
            weight = np.exp(exponent.min(axis=1, keepdims=True) - exponent)
            weight /= weight.sum(axis=1, keepdims=True)
            np.add.at(votes[part], (np.arange(len(found))[:, None], self._codes[found]), weight)
        return votes.astype(np.float32)

    def _nearest(self, cells: FloatArray) -> tuple[npt.NDArray[np.float64], LongArray]:
        """Squared distances to each cell's nearest voters and which they are, nearest first, the first of equals.

        faiss takes the squared distances of many cells (128,000; 20 before version 1.15, or as its global
        ``distance_compute_blas_threshold`` says) from norms and a matrix product, whose last bits depend on the other
        cells: labels would, too. So it names some more candidates, whose distances are taken anew. That others are
        further is certain where the farthest candidate is, by more than faiss errs; elsewhere all are looked at.
        """
        voters = faiss.rev_swig_ptr(self._index.get_xb(), self._index.ntotal * self._index.d)
        voters = voters.reshape(self._index.ntotal, self._index.d)
        approximate, candidates = self._index.search(cells, min(self._neighbors + _MORE, len(voters)))
        squared, found = self._nearest_of(cells, voters[candidates], candidates)
        if candidates.shape[1] < len(voters):
            own = np.linalg.norm(cells.astype(np.float64), axis=1)
            # A voter that is as near as the last has at most this norm, and faiss errs by so much of both norms.
            norms = own**2 + (own + np.sqrt(squared[:, -1])) ** 2
            error = 4 * (self._index.d + 4) * np.finfo(np.float32).eps * norms
            for row in np.flatnonzero(~(squared[:, -1] + error < approximate[:, -1])):
                one = slice(row, row + 1)
                squared[one], found[one] = self._nearest_of(cells[one], voters[None], np.arange(len(voters))[None])
        return squared, found

    def _nearest_of(
        self, cells: FloatArray, candidates: FloatArray, places: LongArray
    ) -> tuple[npt.NDArray[np.float64], LongArray]:
        squared = np.square(cells[:, None].astype(np.float64) - candidates).sum(axis=2)
        nearest = np.lexsort((places, squared), axis=1)[:, : self._neighbors]
        return np.take_along_axis(squared, nearest, axis=1), np.take_along_axis(places, nearest, axis=1)
