"""How well a latent keeps labels apart and mixes batches: scIB's metrics (Luecken et al., Nature Methods 2022).

Those of scib-metrics that read a latent alone are taken; what compares with the counts (principal component regression)
or clusters at many resolutions (Leiden) is not, because a search scores many models.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scviaduct.errors import InputError
from scviaduct.families.vae import quiet

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scviaduct.values import FloatArray, LongArray

MOST_CELLS = 5000
"""Cells that are scored at most; scIB's silhouettes are quadratic in them."""
BIO, BATCH = 0.6, 0.4
"""Weights of label conservation and of batch mixing in the total, as scIB has them."""
_NEIGHBORS, _CONNECTED = 90, 15


def require_scib() -> None:
    """Refuse to score without scib-metrics.

    Raises
    ------
    InputError
        If it is not installed.
    """
    if find_spec("scib_metrics") is None:
        told = "--tune-metric scib needs the package scib-metrics, which is not installed"
        raise InputError(f"{told}.", "pip install 'scviaduct[tune]', or score by held-out loss: --tune-metric loss.")


def scib_scores(latent: FloatArray, labels: Sequence[str], batches: Sequence[str]) -> dict[str, float]:
    """Score a latent.

    Parameters
    ----------
    latent
        float32, shape ``(n_cells, n_latent)``.
    labels, batches
        One per cell, of two kinds at least each.

    Returns
    -------
    dict of str to float
        ``nmi``, ``ari``, ``silhouette_label``, ``clisi`` and their mean ``bio``; ``bras``, ``ilisi``,
        ``graph_connectivity`` and their mean ``batch``; ``scib``, the weighted mean of both. Each from 0 to 1, the more
        the better.
    """
    require_scib()
    import faiss

    with quiet():
        import scib_metrics
        from scib_metrics.nearest_neighbors import NeighborsResults

        label, batch = _codes(labels), _codes(batches)
        points = np.ascontiguousarray(latent, np.float32)
        index = faiss.IndexFlatL2(points.shape[1])
        index.add(points)
        squares, rows = index.search(points, min(_NEIGHBORS, len(points)))
        near = NeighborsResults(indices=rows, distances=np.sqrt(np.maximum(squares, 0)))
        clusters = scib_metrics.nmi_ari_cluster_labels_kmeans(points, label)
        bio = {
            "nmi": clusters["nmi"],
            "ari": clusters["ari"],
            "silhouette_label": scib_metrics.silhouette_label(points, label),
            "clisi": scib_metrics.clisi_knn(near, label),
        }
        mixed = {
            "bras": scib_metrics.bras(points, label, batch),
            "ilisi": scib_metrics.ilisi_knn(near, batch),
            "graph_connectivity": scib_metrics.graph_connectivity(
                near.subset_neighbors(n=min(_CONNECTED, len(points))), label
            ),
        }
    means = {"bio": float(np.mean([*bio.values()])), "batch": float(np.mean([*mixed.values()]))}
    found = {**bio, **mixed, **means, "scib": BIO * means["bio"] + BATCH * means["batch"]}
    return {name: float(value) for name, value in found.items()}


def _codes(values: Sequence[str]) -> LongArray:
    codes: LongArray = pd.factorize(np.asarray(values, object), sort=True)[0].astype(np.int64)
    return codes
