"""How many lists a query looks into, measured."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from scviaduct.store.index.scanning import Coarse, scan_all, threaded

if TYPE_CHECKING:
    from scviaduct.store.index.manifest import Manifest
    from scviaduct.store.index.opened import Index
    from scviaduct.values import FloatArray, LongArray

RECALL = 0.999
"""What the number of lists is chosen for. At a million cells in 2,000 lists, .99 takes 19 of them, .999 36 and .9999
46, and 49, 73 and 88 microseconds a query: the last percent is cheap."""
NEIGHBORS = 30
_SAMPLE, _COMPARED = 256, 1 << 30
_LEAST = 32
_SEED = 0


def calibrate(index: Index) -> Manifest:
    """Find the least number of lists that hold the share :data:`RECALL` of the true neighbours of a sample of cells.

    A cell is not its own neighbour here. The lists of all true neighbours are known, so every number of lists is
    measured at once. At most 2^30 pairs of cells are compared, but at least for 32 cells: 0.4 s a million cells.

    Returns
    -------
    Manifest
        With lists, probes, recall and the size of the sample.
    """
    manifest, quantizer = index.manifest, index.quantizer
    if quantizer is None:
        return manifest
    latent = _sample(index, max(_LEAST, min(_SAMPLE, _COMPARED // manifest.cells)))
    lists = len(quantizer.centroids)
    wanted = min(NEIGHBORS + 1, manifest.cells)
    found = threaded(lambda part: scan_all(index.segments, part, wanted), latent)
    order = Coarse.of(quantizer.centroids).nearest(latent, lists)
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(lists)[None], axis=1)
    seen = np.take_along_axis(rank, _lists_of(index, found.slot[:, 1:]), axis=1)  # the first is the cell itself
    share = np.cumsum(np.bincount(seen.ravel(), minlength=lists)) / max(1, seen.size)
    probes = min(lists, int(np.searchsorted(share, RECALL)) + 1)
    return replace(manifest, lists=lists, probes=probes, recall=float(share[probes - 1]), sample=len(latent))


def _sample(index: Index, cells: int) -> FloatArray:
    """Latents of some cells, every segment's in proportion."""
    rng = np.random.default_rng(_SEED)
    parts = []
    for segment in index.segments.values():
        live = np.flatnonzero(segment.positions() >= 0)
        count = min(len(live), -(-cells * len(live) // index.manifest.cells))
        parts.append(segment.vectors(np.sort(rng.choice(live, count, replace=False))))
    return np.concatenate(parts)


def _lists_of(index: Index, slots: LongArray) -> LongArray:
    """List of each slot."""
    found = np.empty(slots.shape, np.int64)
    for number, segment in index.segments.items():
        here = slots >> 40 == number
        found[here] = np.searchsorted(segment.offsets, slots[here] & ((1 << 40) - 1), side="right") - 1
    return found
