"""Brute force on a GPU: matrix products find candidates, the CPU's own distances decide among them.

Products round otherwise than differences do, and lose digits where latents lie far from the origin. So more candidates
are taken than neighbours are wanted; they are compared again as the exact search compares, and a query for which the
rounding could have hidden a neighbour is searched on the CPU. What comes out equals the exact search to the bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from scviaduct.families.precision import exactly
from scviaduct.store.index.comparing import among
from scviaduct.store.index.scanning import SLOT, Found, scan_all, settled

if TYPE_CHECKING:
    from collections.abc import Mapping

    from scviaduct.store.index.segments import Segment
    from scviaduct.values import FloatArray, LongArray

_QUERIES, _CELLS = 1024, 1 << 18
"""Of a block: 1 GB of distances."""
_MORE = 32
"""Candidates besides the neighbours."""
_EPSILON = 2.0**-23


class DeviceVectors:
    """The vectors of segments on a device, float32.

    Parameters
    ----------
    segments
        Number of each to the segment.
    device
        Of torch: ``"cuda"``, or ``"cpu"`` in tests.
    """

    def __init__(self, segments: Mapping[int, Segment], device: str) -> None:
        self._segments = segments
        slots, vectors = [], []
        for number, segment in segments.items():
            live = np.flatnonzero(segment.positions() >= 0)
            slots.append((number << SLOT) + live)
            vectors.append(torch.from_numpy(segment.vectors(live)).to(device))
        self._slots: LongArray = np.concatenate(slots)
        self._x = torch.cat(vectors)
        self._squares = self._x.square().sum(dim=1)
        self._longest = float(self._squares.max().sqrt()) if len(self._x) else 0.0

    def nearest(self, latent: FloatArray, k: int) -> Found:
        """The k nearest of all cells, as :func:`scviaduct.store.index.scanning.scan_all` finds them."""
        parts = [self._block(latent[start : start + _QUERIES], k) for start in range(0, len(latent), _QUERIES)]
        return Found.stacked(parts) if parts else Found.none(0, k)

    def _block(self, latent: FloatArray, k: int) -> Found:
        about, elements = self._candidates(latent, k + _MORE)
        found = self._compared(latent, self._slots[elements], k)
        if about.shape[1] < k + _MORE:  # every cell is a candidate
            return found
        # A product of d terms is off by (d + 2) roundings of the lengths that it is made of, at most.
        length = np.sqrt(np.square(latent, dtype=np.float64).sum(axis=1)) + self._longest
        slack = 2 * (latent.shape[1] + 2) * _EPSILON * np.square(length)
        unsure = np.flatnonzero(about[:, -1] - slack <= found.distance[:, -1])
        if len(unsure):
            again = scan_all(self._segments, np.ascontiguousarray(latent[unsure]), k)
            found.replace(unsure, again)
        return found

    def _candidates(self, latent: FloatArray, n: int) -> tuple[FloatArray, LongArray]:
        """About the n nearest: squared distances by products, ascending, and which vectors."""
        query = torch.from_numpy(np.array(latent)).to(self._x.device)
        square = query.square().sum(dim=1, keepdim=True)
        best = torch.empty((len(query), 0), device=query.device)
        which = torch.empty((len(query), 0), dtype=torch.int64, device=query.device)
        for start in range(0, len(self._x), _CELLS):
            block = self._x[start : start + _CELLS]
            with exactly(query.device.type):  # the bound of what a product is off by is that of float32
                distance = self._squares[start : start + _CELLS] - 2 * (query @ block.T) + square
            near, at = distance.topk(min(n, len(block)), dim=1, largest=False)
            best, which = torch.cat([best, near], dim=1), torch.cat([which, at + start], dim=1)
            best, chosen = best.topk(min(n, best.shape[1]), dim=1, largest=False)
            which = which.gather(1, chosen)
        return best.cpu().numpy(), which.cpu().numpy()

    def _compared(self, latent: FloatArray, slots: LongArray, k: int) -> Found:
        """The k nearest of each query's candidates, compared as the exact search compares."""
        vectors = np.empty((*slots.shape, latent.shape[1]), np.float32)
        positions = np.empty(slots.shape, np.int64)
        for number, segment in self._segments.items():
            here = slots >> SLOT == number
            elements = slots[here] & ((1 << SLOT) - 1)
            vectors[here], positions[here] = segment.vectors(elements), segment.positions(elements)
        return settled(among(vectors, positions, latent), slots, np.full(len(slots), slots.shape[1]), k)
