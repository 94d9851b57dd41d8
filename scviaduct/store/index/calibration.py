"""How far beyond its nearest list a query looks, measured."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from scviaduct.store.index.coarse import Coarse
from scviaduct.store.index.scanning import scan_all, threaded

if TYPE_CHECKING:
    from scviaduct.store.index.manifest import Manifest
    from scviaduct.store.index.opened import Index
    from scviaduct.values import FloatArray, LongArray

RECALL = 0.999
"""What the reach is chosen for."""
NEIGHBORS = 30
_SAMPLE, _COMPARED = 1024, 1 << 30
_LEAST = 32
HELD = 2
"""Cells of a query's nearest lists, for each neighbour that is asked for."""
_SPANNED = 0.995
"""Share of the sample whose neighbours all lie within the span; queries of which that is not so are searched twice."""
_SEED = 0


def calibrate(index: Index) -> Manifest:
    """Find the least reach within which lie the lists of the share :data:`RECALL` of a sample of cells' neighbours.

    A cell is not its own neighbour here. The lists of all true neighbours are known, and so is the reach that each
    takes. At most 2^30 pairs of cells are compared, but at least for 32 cells: 1 s a million cells.

    Returns
    -------
    Manifest
        With lists, probes, reach, span, recall and the size of the sample.
    """
    manifest, quantizer = index.manifest, index.quantizer
    if quantizer is None:
        return manifest
    latent = _sample(index, max(_LEAST, min(_SAMPLE, _COMPARED // manifest.cells)))
    wanted = min(NEIGHBORS + 1, manifest.cells)
    found = threaded(lambda part: scan_all(index.segments, part, wanted), latent)
    coarse, least = Coarse.of(quantizer), HELD * wanted
    sizes = np.sum([segment.sizes for segment in index.segments.values()], axis=0)
    nearest = coarse.within(latent, 0, sizes, least)
    of_others = quantizer.centroids[_lists_of(index, found.slot[:, 1:])]  # the first is the cell itself
    beyond = np.square(latent[:, None] - of_others).sum(axis=2) - nearest.square[:, None]
    taken = np.sort((beyond / nearest.spread[:, None]).ravel())
    # A little more, for what rounding leaves of a difference of squares; a single cell has no neighbour.
    reach = max(0.0, float(taken[math.ceil(RECALL * len(taken)) - 1]) if len(taken) else 0.0) * 1.0001 + 1e-6
    lists = coarse.within(latent, reach, sizes, least)
    return replace(
        manifest,
        lists=len(quantizer.centroids),
        probes=math.ceil(lists.upto.mean()),
        reach=reach,
        span=float(np.quantile(found.distance[:, -1] / lists.mean, _SPANNED)),
        recall=float((taken <= reach).mean()) if len(taken) else 1.0,
        sample=len(latent),
    )


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
