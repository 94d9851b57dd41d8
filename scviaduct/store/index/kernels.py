"""Comparing queries with vectors: compiled loops over lists that are stored a dimension at a time.

A list of m vectors is one block of d x m floats, so that a chunk of its vectors is compared with a query in full vector
registers, whatever d is: 3.3 ns a vector of 30 dimensions, on a core beside other work. The
sum runs over the dimensions in their order, without contraction: a distance has the same bits wherever a vector is
stored. Neighbours are ordered by distance, then by position: what is found does not depend on how cells are spread over
lists, segments, threads and machines.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from scviaduct.compiling import compiled

CHUNK = 256
"""Vectors that are compared at a time: 30 kB of 30 dimensions stay in the first cache for all queries of a list."""
LAST = np.iinfo(np.int64).max


_compiled = compiled(error_model="numpy")


@_compiled
def _distances(x: Any, first: int, m: int, w: int, query: Any, out: Any) -> None:
    """Squared distances of ``w`` vectors from ``first`` in a list of ``m``; five dimensions a pass, in their order."""
    d = query.shape[0]
    for j in range(w):
        out[j] = np.float32(0)
    c = 0
    while c + 5 <= d:
        at = first + c * m
        x0, x1, x2 = x[at : at + w], x[at + m : at + m + w], x[at + 2 * m : at + 2 * m + w]
        x3, x4 = x[at + 3 * m : at + 3 * m + w], x[at + 4 * m : at + 4 * m + w]
        q0, q1, q2, q3, q4 = query[c], query[c + 1], query[c + 2], query[c + 3], query[c + 4]
        for j in range(w):
            total = out[j]
            total += (x0[j] - q0) * (x0[j] - q0)
            total += (x1[j] - q1) * (x1[j] - q1)
            total += (x2[j] - q2) * (x2[j] - q2)
            total += (x3[j] - q3) * (x3[j] - q3)
            total += (x4[j] - q4) * (x4[j] - q4)
            out[j] = total
        c += 5
    while c < d:
        at = first + c * m
        x0, q0 = x[at : at + w], query[c]
        for j in range(w):
            out[j] += (x0[j] - q0) * (x0[j] - q0)
        c += 1


@_compiled
def _push(distance: Any, position: Any, slot: Any, d: float, p: int, s: int, k: int) -> None:
    """Replace the farthest of a heap of k, which is its first."""
    i = 0
    while True:
        child = 2 * i + 1
        if child >= k:
            break
        other = child + 1
        if other < k and (
            distance[other] > distance[child]
            or (distance[other] == distance[child] and position[other] > position[child])
        ):
            child = other
        if distance[child] < d or (distance[child] == d and position[child] < p):
            break
        distance[i], position[i], slot[i] = distance[child], position[child], slot[child]
        i = child
    distance[i], position[i], slot[i] = d, p, s


@_compiled
def scan(
    x: Any,
    offsets: Any,
    files: Any,
    rows: Any,
    base: Any,
    mask: Any,
    starts: Any,
    queries: Any,
    latent: Any,
    distance: Any,
    position: Any,
    slot: Any,
    first: int,
) -> None:
    """Offer the vectors of lists to the heaps of queries.

    Parameters
    ----------
    x, offsets
        float32, flat; int64, shape ``(lists + 1,)``: list l is the block of ``d x (offsets[l + 1] - offsets[l])``
        floats from ``offsets[l] * d``.
    files, rows, base
        int32, int32, shape ``(n,)``, int64: vector i has the position ``base[files[i]] + rows[i]``; those of a file
        with a negative base are left out.
    mask
        bool, shape ``(n,)``: vectors that count; of length 0 for all of them.
    starts, queries
        int64, shape ``(lists + 1,)``, int32: list l is compared with ``queries[starts[l] : starts[l + 1]]``; of length
        0 for all queries with all lists.
    latent
        float32, shape ``(n_queries, d)``.
    distance, position, slot
        float32, int64, int64, shape ``(n_queries, k)``: heaps, the farthest first; they change.
    first
        Slot of vector 0.
    """
    d, k = latent.shape[1], distance.shape[1]
    out = np.empty(CHUNK, np.float32)
    every, masked = len(starts) == 0, len(mask) > 0
    for one in range(len(offsets) - 1):
        begin, m = offsets[one], offsets[one + 1] - offsets[one]
        n = len(latent) if every else starts[one + 1] - starts[one]
        if n == 0:
            continue
        for j0 in range(0, m, CHUNK):
            w = min(CHUNK, m - j0)
            for i in range(n):
                q = i if every else queries[starts[one] + i]
                _distances(x, begin * d + j0, m, w, latent[q], out)
                bound, near = distance[q, 0], 0
                for j in range(w):
                    near += out[j] <= bound
                if near == 0:
                    continue
                for j in range(w):
                    if out[j] > distance[q, 0]:
                        continue
                    at = begin + j0 + j
                    if masked and not mask[at]:
                        continue
                    start = base[files[at]]
                    if start < 0:
                        continue
                    place = start + rows[at]
                    if out[j] < distance[q, 0] or place < position[q, 0]:
                        _push(distance[q], position[q], slot[q], out[j], place, first + at, k)


@_compiled
def settle(distance: Any, position: Any, slot: Any) -> None:
    """Sort heaps by distance and position, the nearest first."""
    k = distance.shape[1]
    for q in range(len(distance)):
        for end in range(k - 1, 0, -1):
            d, p, s = distance[q, end], position[q, end], slot[q, end]
            distance[q, end], position[q, end], slot[q, end] = distance[q, 0], position[q, 0], slot[q, 0]
            _push(distance[q], position[q], slot[q], d, p, s, end)


@_compiled
def invert(order: Any, begin: int, end: Any, lists: int) -> Any:
    """Queries of each list, of those lists that stand in columns ``begin`` to ``end[q]`` of ``order``.

    Parameters
    ----------
    order
        int64, shape ``(n_queries, n)``: lists of each query, the nearest first.
    begin, end
        Columns; ``end`` int64, shape ``(n_queries,)``.
    lists
        Number of lists.

    Returns
    -------
    tuple
        ``starts`` and ``queries`` as :func:`scan` takes them.
    """
    starts = np.zeros(lists + 1, np.int64)
    for q in range(len(order)):
        for i in range(begin, end[q]):
            starts[order[q, i] + 1] += 1
    for one in range(lists):
        starts[one + 1] += starts[one]
    queries, at = np.empty(starts[lists], np.int32), starts[:-1].copy()
    for q in range(len(order)):
        for i in range(begin, end[q]):
            queries[at[order[q, i]]] = q
            at[order[q, i]] += 1
    return starts, queries


@_compiled
def pack(latent: Any, order: Any, offsets: Any, x: Any) -> None:
    """Store vectors in lists.

    Parameters
    ----------
    latent
        float32, shape ``(n, d)``.
    order
        int64, shape ``(n,)``: which of them comes where, list after list.
    offsets, x
        As :func:`scan` takes them; ``x`` is filled.
    """
    d = latent.shape[1]
    for one in range(len(offsets) - 1):
        begin, m = offsets[one], offsets[one + 1] - offsets[one]
        for j in range(m):
            for c in range(d):
                x[begin * d + c * m + j] = latent[order[begin + j], c]


@_compiled
def gather(x: Any, offsets: Any, elements: Any, d: int, at: Any, to: Any, out: Any) -> None:
    """Copy some vectors of lists into other lists.

    Parameters
    ----------
    x, offsets
        As :func:`scan` takes them.
    elements
        int64: which vectors, in their order.
    d
        Dimensions.
    at
        int64, shape ``(lists,)``: next free vector of each list of ``out``; it moves on. Of length 1 for one.
    to, out
        Offsets and floats of the lists that are written.
    """
    i, n = 0, len(elements)
    for one in range(len(offsets) - 1):
        end = i
        while end < n and elements[end] < offsets[one + 1]:
            end += 1
        if end == i:
            continue
        begin, m = offsets[one], offsets[one + 1] - offsets[one]
        target = one if len(at) > 1 else 0
        base, width = to[target], to[target + 1] - to[target]
        for c in range(d):
            source, there = begin * d + c * m - begin, base * d + c * width + at[target] - base
            for j in range(end - i):
                out[there + j] = x[source + elements[i + j]]
        at[target] += end - i
        i = end


@_compiled
def fetch(x: Any, offsets: Any, elements: Any, out: Any) -> None:
    """Copy vectors, in any order, into the rows of ``out``, float32, shape ``(n, d)``."""
    for i in range(len(elements)):
        one = np.searchsorted(offsets, elements[i], side="right") - 1
        begin, m = offsets[one], offsets[one + 1] - offsets[one]
        for c in range(out.shape[1]):
            out[i, c] = x[begin * out.shape[1] + c * m + elements[i] - begin]


@_compiled
def among(vectors: Any, positions: Any, slots: Any, latent: Any, distance: Any, position: Any, slot: Any) -> None:
    """The nearest of each query's own candidates, sorted.

    Parameters
    ----------
    vectors, positions, slots
        Candidates, float32, shape ``(n_queries, n, d)``; int64, shape ``(n_queries, n)``.
    latent, distance, position, slot
        As :func:`scan` takes them.
    """
    for q in range(len(latent)):
        for i in range(vectors.shape[1]):
            total = np.float32(0)
            for c in range(latent.shape[1]):
                total += (vectors[q, i, c] - latent[q, c]) * (vectors[q, i, c] - latent[q, c])
            if total < distance[q, 0] or (total == distance[q, 0] and positions[q, i] < position[q, 0]):
                _push(distance[q], position[q], slot[q], total, positions[q, i], slots[q, i], distance.shape[1])
    settle(distance, position, slot)
