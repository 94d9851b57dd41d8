"""Vectors in lists: a list of m of them is one block of d x m floats, stored a dimension at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from scviaduct.compiling import compiled

_compiled = compiled(error_model="numpy")


@_compiled
def invert(order: Any, upto: Any, lists: int) -> Any:
    """Queries of each list, of those lists that stand in the first ``upto[q]`` columns of ``order``.

    Parameters
    ----------
    order
        Integers, shape ``(n_queries, n)``: lists of each query.
    upto
        int64, shape ``(n_queries,)``.
    lists
        Number of lists.

    Returns
    -------
    tuple
        ``starts`` and ``queries`` as :func:`scviaduct.store.index.comparing.scan` takes them.
    """
    starts = np.zeros(lists + 1, np.int64)
    for q in range(len(order)):
        for i in range(upto[q]):
            starts[order[q, i] + 1] += 1
    for one in range(lists):
        starts[one + 1] += starts[one]
    queries, at = np.empty(starts[lists], np.int32), starts[:-1].copy()
    for q in range(len(order)):
        for i in range(upto[q]):
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
        As :func:`scviaduct.store.index.comparing.scan` takes them; ``x`` is filled.
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
        As :func:`scviaduct.store.index.comparing.scan` takes them.
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
