"""Labels and what is known of their certainty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import faiss
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scviaduct.values import FloatArray, IntArray


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
        label = probabilities.argmax(axis=1).astype(np.int32)
        ordered = np.sort(probabilities, axis=1)
        first = ordered[:, -1]
        second = ordered[:, -2] if probabilities.shape[1] > 1 else np.zeros_like(first)
        logs = np.log(probabilities, out=np.zeros_like(probabilities), where=probabilities > 0)
        entropy = np.maximum(-(probabilities * logs).sum(axis=1), 0.0)
        return cls(label, first.astype(np.float32), (first - second).astype(np.float32), entropy.astype(np.float32))


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
        self._index = faiss.IndexFlatL2(latent.shape[1])
        self._index.add(np.ascontiguousarray(latent[voting], dtype=np.float32))

    def probabilities(self, latent: FloatArray) -> FloatArray:
        """Share of the vote that each label gets.

        Parameters
        ----------
        latent
            float32, shape ``(n_cells, n_latent)``.

        Returns
        -------
        float32, shape ``(n_cells, n_labels)``; rows sum to one.
        """
        squared, found = self._index.search(np.ascontiguousarray(latent, dtype=np.float32), self._neighbors)
        distance = np.sqrt(np.maximum(squared, 0.0)).astype(np.float64)
        weight = np.exp(-distance * distance.std(axis=1, keepdims=True) ** 2 / 4)
        weight /= weight.sum(axis=1, keepdims=True)
        votes = np.zeros((len(latent), len(self.labels)))
        np.add.at(votes, (np.arange(len(latent))[:, None], self._codes[found]), weight)
        return votes.astype(np.float32)
