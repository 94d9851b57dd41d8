"""Finding the lists within reach, compiled: nearly all are told from products with centroids.

Squared distances to all centroids would take a tenth of a batch. Nearly all are far enough beyond the bound, or below
it, to be told from ``|x|² + |q|² - 2 x·q``, half of the work but rounded more coarsely: where that could err, the
distance is taken as it is between cells. So the lists are those that such distances give, to the bit.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from scviaduct.compiling import compiled
from scviaduct.lanes import (
    LANES,
    LONG,
    VECTOR,
    ZEROS,
    element,
    flags,
    has_avx512,
    load,
    lowest,
    multiply_add,
    number_of,
    spread,
    store,
    typed_intrinsic,
)
from scviaduct.store.index.comparing import TILE, four, squared

_ROOM = 16
"""Lists of a query that there is room for to begin with."""
_TOGETHER = 8
"""Queries that each tile of centroids is compared with while it is in the first cache."""
_USABLE = 0.125
"""Error of a product, in squares of the least radius, above which distances are not taken from products: a choice, not
measured. Of the million simulated latents that search is measured with, the error is .12 of it."""
_FAR, _ROUND = np.float32(np.inf), np.float32(np.finfo(np.float32).eps)
_ALL, _ONE = np.uint64(2**64 - 1), np.uint64(1)
_BITS = ir.VectorType(ir.IntType(32), LANES)

_compiled = compiled(error_model="numpy")


@typed_intrinsic
def _low(_typing: Any, values: Any, first: Any) -> Any:
    """Bits of the least of the :data:`TILE` numbers behind the first; of positive numbers, bits ascend as they do."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        start = element(context, builder, signature.args[0], args[0], args[1])
        lines = [builder.bitcast(load(builder, start, line), _BITS) for line in range(TILE // LANES)]
        least = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_BITS, [_BITS] * 2), "llvm.smin.v16i32")
        across = ir.FunctionType(_BITS.element, [_BITS])
        reduced = cgutils.get_or_insert_function(builder.module, across, "llvm.vector.reduce.smin.v16i32")
        return builder.call(reduced, [reduce(lambda one, other: builder.call(least, [one, other]), lines)])

    return types.int32(values, first), generate


@typed_intrinsic
def _up_to(_typing: Any, values: Any, first: Any, bound: Any) -> Any:
    """Which of the :data:`TILE` numbers behind the first are not larger than a bound, a bit each."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        start, bounds = element(context, builder, signature.args[0], args[0], args[1]), spread(builder, args[2])
        told = LONG(0)
        for line in range(TILE // LANES):
            within = flags(builder, builder.fcmp_ordered("<=", load(builder, start, line), bounds))
            told = builder.or_(told, builder.shl(within, LONG(line * LANES)))
        return told

    return types.uint64(values, first, bound), generate


@typed_intrinsic
def _rough(_typing: Any, around: Any, norms: Any, tile: Any, latent: Any, at: Any, d: Any, out: Any, to: Any) -> Any:
    """Squared distances of four queries to a tile of centroids, from products; 0 for what rounding makes less.

    ``around`` and ``norms`` are those of :class:`scviaduct.store.index.coarse.Coarse`. ``latent`` has the queries, off
    the middle and times -2, at the first numbers of ``at``; their own squared norms are the others. What comes out goes
    to ``out`` from ``to`` on, that of a query behind that of the one before.
    """
    signature = types.void(around, norms, tile, latent, at, d, out, to)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def place(argument: int, offset: Any) -> Any:
            return element(context, builder, signature.args[argument], args[argument], offset)

        first = builder.mul(args[2], LONG(TILE))
        rows, own, outs = place(0, builder.mul(first, args[5])), place(1, first), place(6, args[7])
        lines = TILE // LANES
        starts = [place(3, builder.extract_value(args[4], [0, query])) for query in range(4)]
        squares = [spread(builder, builder.extract_value(args[4], [1, query])) for query in range(4)]
        most = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(VECTOR, [VECTOR] * 2), "llvm.maxnum.v16f32"
        )
        # As in :mod:`scviaduct.store.index.comparing`: other processors take a line at a time.
        together = lines if has_avx512(context) else 1
        for some in (range(line, line + together) for line in range(0, lines, together)):
            norm = [load(builder, own, line) for line in some]
            held = [[cgutils.alloca_once_value(builder, ZEROS) for _ in some] for _ in range(4)]
            for square, sums in zip(squares, held, strict=True):
                for vector, total in zip(norm, sums, strict=True):
                    builder.store(builder.fadd(vector, square), total)
            with cgutils.for_range(builder, args[5]) as loop:
                row = builder.gep(rows, [builder.mul(loop.index, LONG(TILE))])
                vectors = [load(builder, row, line) for line in some]
                for start, sums in zip(starts, held, strict=True):
                    value = spread(builder, builder.load(builder.gep(start, [loop.index])))
                    for vector, total in zip(vectors, sums, strict=True):
                        builder.store(multiply_add(builder, vector, value, builder.load(total)), total)
            for query, sums in enumerate(held):
                for line, total in zip(some, sums, strict=True):
                    distance = builder.call(most, [builder.load(total), ZEROS])
                    store(builder, distance, builder.gep(outs, [LONG(query * TILE)]), line)
        return context.get_dummy_value()

    return signature, generate


@_compiled
def _holding(latent: Any, x: Any, lists: Any, sizes: Any, least: int, square: Any) -> Any:
    """The squared distance within which lists hold enough cells, and the first centroid at that distance.

    Parameters
    ----------
    latent
        The query.
    x, lists, sizes, least
        As :func:`within` has them.
    square
        Of the nearest list.
    """
    m = len(lists)
    distances = np.empty(m, np.float32)
    for one in range(m):
        distances[one] = squared(x, one, m, latent)
    while True:
        cells, near, farther = 0, m, _FAR
        for one in range(m):
            distance = distances[one]
            if distance <= square:
                cells += sizes[lists[one]]
                if distance == square:
                    near = min(near, one)
            else:
                farther = min(farther, distance)
        if cells >= least or not farther < _FAR:
            return square, near
        square = farther


@_compiled
def _nearest(latent: Any, x: Any, m: int, far: Any, lows: Any, t: int, bound: Any) -> Any:
    """The squared distance of the nearest centroid, the first of equals, and which it is.

    Parameters
    ----------
    latent, x, m
        The query; centroids as :func:`within` has them, and how many.
    far, lows, t
        Distances that may err, of the query's group; the least of each tile; and which of the group the query is.
    bound
        What the nearest one's is not above.
    """
    there, square, near = _ALL >> np.uint64(max(0, TILE - m)), _FAR, m
    for tile in range(len(lows)):
        if lows[tile] > bound:
            continue
        low, bits = min(tile * TILE, max(0, m - TILE)), there & _up_to(far, (tile * _TOGETHER + t) * TILE, bound)
        while bits:
            one = low + lowest(bits)
            bits &= bits - _ONE
            distance = squared(x, one, m, latent)
            if distance < square or (distance == square and one < near):
                square, near = distance, one
    return square, near


@_compiled
def _off(latent: Any, middle: Any) -> Any:
    """What queries are off the middle, times -2, and the squares of that before, summed."""
    n, d = latent.shape
    off, norms = np.empty(n * d, np.float32), np.zeros(n, np.float32)
    for q in range(n):
        for c in range(d):
            apart = latent[q, c] - middle[c]
            off[q * d + c] = np.float32(-2) * apart
            norms[q] += apart * apart
    return off, norms


@_compiled
def within(
    latent: Any,
    x: Any,
    middle: Any,
    around: Any,
    norms: Any,
    lists: Any,
    radii: Any,
    sizes: Any,
    reach: Any,
    least: int,
) -> Any:
    """What :class:`scviaduct.store.index.coarse.Lists` has.

    Parameters
    ----------
    x
        Centroids, float32, a dimension after the other.
    latent, middle, around, norms, lists, radii, sizes, reach, least
        As :class:`scviaduct.store.index.coarse.Coarse` and its ``within`` have them.
    """
    m, d, n, flat = len(radii), latent.shape[1], len(latent), latent.reshape(-1)
    upto, held = np.empty(n, np.int64), np.empty(n, np.int64)
    squares, radiuses = np.empty(n, np.float32), np.empty(n, np.float32)
    told, filled = np.empty(m + _ROOM * n, np.int32), 0
    # Of some queries: squared distances to the centroids of each tile, and the least of them. The last tile may be
    # short, or begin earlier and have some centroids again.
    tiles = -(-m // TILE)
    far, lows = np.full(tiles * _TOGETHER * TILE, _FAR, np.float32), np.empty((_TOGETHER, tiles), np.float32)
    there = _ALL >> np.uint64(max(0, TILE - m))
    off, own = _off(latent, middle)
    # Off by so much of both norms, at most: 5 d + 14 roundings of half of `_ROUND`, of the norms, of what vectors are
    # off the middle, of the products and of the squares that a distance is the sum of otherwise.
    error, largest = np.float32(4 * (d + 4)) * _ROUND, norms.max() if m >= TILE else _FAR
    # Where lists are so far from each other that most would be in doubt, products are of no use.
    usable = radii.min() * radii.min() * np.float32(_USABLE)
    for first in range(0, n, _TOGETHER):
        group = min(_TOGETHER, n - first)
        rough = m >= TILE and error * (largest + own[first : first + group].max()) <= usable
        for tile in range(tiles):
            low, place = min(tile * TILE, max(0, m - TILE)), tile * _TOGETHER * TILE
            for one in range(0, group if m >= TILE else 0, 4):
                a, last = first + one, first + group - 1
                b, c, e = min(a + 1, last), min(a + 2, last), min(a + 3, last)
                starts, to = (a * d, b * d, c * d, e * d), place + one * TILE
                if rough:
                    _rough(around, norms, tile, off, (starts, (own[a], own[b], own[c], own[e])), d, far, to)
                else:
                    four(x, low, m, flat, starts, d, (_FAR, _FAR, _FAR, _FAR), far[to : to + 4 * TILE])
            for t in range(group):
                for v in range(m if m < TILE else 0):
                    far[place + t * TILE + v] = squared(x, v, m, latent[first + t])
                lows[t, tile] = number_of(_low(far, place + t * TILE))
        for t in range(group):
            query = latent[first + t]
            doubt = error * (largest + own[first + t]) if rough else np.float32(0)
            square, near = _nearest(query, x, m, far, lows[t], t, lows[t].min() + doubt + doubt)
            if sizes[lists[near]] < least:
                square, near = _holding(query, x, lists, sizes, least, square)
            radius = radii[near]
            bound, count, cells = square + reach * radius * max(np.sqrt(square), radius), 0, 0
            for tile in range(tiles):
                if lows[t, tile] > bound + doubt:
                    continue
                low, place = min(tile * TILE, max(0, m - TILE)), (tile * _TOGETHER + t) * TILE
                sure, bits = _up_to(far, place, bound - doubt), _up_to(far, place, bound + doubt)
                bits &= there & (_ALL << np.uint64(tile * TILE - low))
                while bits:
                    one = low + lowest(bits)
                    certain = sure & bits & (~bits + _ONE)
                    bits &= bits - _ONE
                    if certain or squared(x, one, m, query) <= bound:
                        told[filled + count] = lists[one]
                        cells += sizes[lists[one]]
                        count += 1
            upto[first + t], held[first + t] = count, cells
            squares[first + t], radiuses[first + t] = square, radius
            filled += count
            if filled + m > len(told):
                told = np.concatenate((told[:filled], np.empty(len(told) + m, np.int32)))
    order, at = np.zeros((n, upto.max() if n else 0), np.int32), 0
    for q in range(n):
        for i in range(upto[q]):
            order[q, i] = told[at + i]
        at += upto[q]
    return order, upto, held, squares, radiuses
