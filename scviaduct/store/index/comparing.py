"""Comparing queries with vectors: compiled loops over lists that are stored a dimension at a time.

Sixty-four vectors of a list and four queries share a tile: their 256 sums fill half of AVX-512's registers, and a value
that is loaded serves four queries. Which of the distances are within a query's bound comes out as bits, mostly none;
only for those is anything else done.

A sum runs over the dimensions in their order, by fused multiply-adds: a distance has the same bits in any tile, and
wherever a vector is stored. Neighbours are ordered by distance, then by position: what is found does not depend on how
cells are spread over lists, segments, threads and machines.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from scviaduct.compiling import compiled
from scviaduct.lanes import (
    LANES,
    LONG,
    ZEROS,
    bits_of,
    element,
    flags,
    fma,
    has_avx512,
    load,
    lowest,
    multiply_add,
    number_of,
    spread,
    store,
    typed_intrinsic,
)

TILE = 64
"""Vectors that are compared at a time."""
CHUNK = 256
"""Vectors that all queries of a list are compared with before the next: 30 kB of 30 dimensions, in the first cache."""
LAST = np.iinfo(np.int64).max
"""Position of a neighbour that is not there."""
MOST = 2**32 - 1
"""The largest position that a key has room for."""
FARTHEST = np.uint64(np.float32(np.inf).view(np.uint32)) << np.uint64(32) | np.uint64(MOST)
"""The largest key: at an infinite distance."""
_RANKED = 512
"""Neighbours up to which each is compared with all others instead of being sorted: a quarter of the time for 30, half
of it for 300, as much for 500."""
_ALL, _ONE, _HALF, _LOW = np.uint64(2**64 - 1), np.uint64(1), np.uint64(32), np.uint64(MOST)

_compiled = compiled(error_model="numpy")


def _near(queries: int, lines: int) -> Any:
    """An intrinsic that compares so many queries with so many lines of 16 vectors.

    Its arguments: ``x``, whose vectors begin at ``first``, with a dimension every ``step`` floats; ``latent``, whose
    queries begin at each of ``at``; the number of dimensions; the bound of each query; and ``out``, where distances are
    written, those of a query behind those of the one before. It returns a bit per vector that is not beyond the bound,
    in a word for each query and for each :data:`TILE` of its vectors.
    """
    words = queries * -(-lines * LANES // TILE)

    @typed_intrinsic
    def near(_typing: Any, x: Any, first: Any, step: Any, latent: Any, at: Any, d: Any, bounds: Any, out: Any) -> Any:
        signature = types.UniTuple(types.uint64, words)(x, first, step, latent, at, d, bounds, out)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            def place(argument: int, offset: Any) -> Any:
                return element(context, builder, signature.args[argument], args[argument], offset)

            rows, starts = place(0, args[1]), [place(3, builder.extract_value(args[4], i)) for i in range(queries)]
            bounds = [spread(builder, builder.extract_value(args[6], i)) for i in range(queries)]
            told = [LONG(0)] * words
            # Sixteen sums are half of AVX-512's registers; other processors take a line at a time, half of AVX2's.
            together = lines if has_avx512(context) else 1
            for some in (range(line, line + together) for line in range(0, lines, together)):
                held = [[cgutils.alloca_once_value(builder, ZEROS) for _ in some] for _ in range(queries)]
                with cgutils.for_range(builder, args[5]) as loop:
                    row = builder.gep(rows, [builder.mul(loop.index, args[2])])
                    vectors = [load(builder, row, line) for line in some]
                    for start, sums in zip(starts, held, strict=True):
                        value = spread(builder, builder.load(builder.gep(start, [loop.index])))
                        for vector, total in zip(vectors, sums, strict=True):
                            apart = builder.fsub(vector, value)
                            builder.store(multiply_add(builder, apart, apart, builder.load(total)), total)
                for query, sums in enumerate(held):
                    for line, total in zip(some, sums, strict=True):
                        distance = builder.load(total)
                        store(builder, distance, place(7, LONG(query * TILE)), line)
                        within = flags(builder, builder.fcmp_ordered("<=", distance, bounds[query]))
                        word, bit = divmod(line * LANES, TILE)
                        bits = builder.shl(within, LONG(bit))
                        told[query + word] = builder.or_(told[query + word], bits)
            return context.make_tuple(builder, signature.return_type, told)

        return signature, generate

    return near


four, _long = _near(4, TILE // LANES), _near(1, 4 * TILE // LANES)
_one, _few = _near(1, TILE // LANES), _near(1, 1)


@_compiled
def squared(x: Any, first: int, step: int, query: Any) -> Any:
    """Squared distance of a query to one vector, as a lane computes it."""
    total = np.float32(0)
    for c in range(len(query)):
        apart = x[first + c * step] - query[c]
        total = fma(apart, apart, total)
    return total


@typed_intrinsic
def _fetch(_typing: Any, x: Any, place: Any) -> Any:
    """Have the line of a float brought into the second cache, without waiting for it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        address = builder.bitcast(element(context, builder, signature.args[0], args[0], args[1]), pointer)
        builder.call(function, [address, number(0), number(2), number(1)])
        return context.get_dummy_value()

    return types.void(x, place), generate


@_compiled
def _key(distance: float, position: int) -> Any:
    """What neighbours are ordered by: the bits of the distance, which ascend with it, above the position."""
    return (np.uint64(bits_of(np.float32(distance))) << _HALF) | np.uint64(position)


@_compiled
def _bound(key: Any) -> Any:
    """The distance of a key."""
    return number_of(np.int32(key >> _HALF))


@_compiled
def _thin(key: Any, slot: Any, q: int, n: int, k: int) -> Any:
    """Keep the k nearest of a query's first n, in any order; the key of the farthest of them.

    Where to cut is found by halving, with about nine looks at 64 keys. No two are the same.
    """
    low, high = _ALL, np.uint64(0)
    for i in range(n):
        low, high = min(low, key[q, i]), max(high, key[q, i])
    cut = high
    while low < high:
        cut = low + ((high - low) >> _ONE)
        below = 0
        for i in range(n):
            below += key[q, i] <= cut
        if below == k:
            break
        if below < k:
            low = cut + _ONE
        else:
            high = cut
        cut = high
    kept, farthest = 0, np.uint64(0)
    for i in range(n):
        one, place = key[q, i], slot[q, i]
        key[q, kept], slot[q, kept] = one, place
        if one <= cut:
            kept += 1
            farthest = max(farthest, one)
    return farthest


@_compiled
def scan(
    x: Any,
    offsets: Any,
    members: Any,
    base: Any,
    mask: Any,
    starts: Any,
    queries: Any,
    latent: Any,
    key: Any,
    slots: Any,
    limit: Any,
    places: Any,
    k: int,
    first: int,
) -> None:
    """Offer the vectors of lists to queries.

    One long loop: what numba calls from several places it does not inline, and a call that hands over ten arrays takes
    longer than what it would do here.

    Parameters
    ----------
    x, offsets
        float32, flat; int64, shape ``(lists + 1,)``: list l is the block of ``d x (offsets[l + 1] - offsets[l])``
        floats from ``offsets[l] * d``.
    members, base
        int32, shape ``(n, 2)``, int64: file and row of each vector, whose position is ``base[file] + row``; those of a
        file with a negative base are left out.
    mask
        bool, shape ``(n,)``: vectors that count; of length 0 for all of them.
    starts, queries
        int64, shape ``(lists + 1,)``, int32: list l is compared with ``queries[starts[l] : starts[l + 1]]``; of length
        0 for all queries with all lists.
    latent
        float32, shape ``(n_queries, d)``.
    key, slots, limit, places, k
        Of a :class:`scviaduct.store.index.scanning.Nearest`; the arrays change.
    first
        Slot of vector 0.
    """
    d, flat, width = latent.shape[1], latent.reshape(-1), key.shape[1]
    out = np.empty(4 * TILE, np.float32)
    every, masked = len(starts) == 0, len(mask) > 0
    for one in range(len(offsets) - 1):
        begin, m = offsets[one], offsets[one + 1] - offsets[one]
        head = 0 if every else starts[one]
        n = len(latent) if every else starts[one + 1] - head
        wide = TILE if m >= TILE else min(m, LANES)
        # The next list is brought nearer meanwhile, some lines a tile: a third to a half of a batch waited for memory.
        after = one + 1
        while n and not every and after < len(offsets) - 1 and starts[after + 1] == starts[after]:
            after += 1
        ahead, end = offsets[after] * d, offsets[min(after + 1, len(offsets) - 1)] * d
        tiles = max(1, -(-m // max(wide, 1)) * -(-n // 4))
        stride = -(-(end - ahead) // (LANES * tiles)) * LANES
        for j0 in range(0, m if n else 0, CHUNK):
            i = 0
            while i < n:
                # Three are compared as four, one of them twice: that takes less than one after the other.
                together = min(4, n - i) if wide == TILE and i + 3 <= n else 1
                a = i if every else queries[head + i]
                b, c, e = a, a, a
                if together > 1:
                    last = min(i + 3, n - 1)
                    b = i + 1 if every else queries[head + i + 1]
                    c = i + 2 if every else queries[head + i + 2]
                    e = last if every else queries[head + last]
                names = a, b, c, e
                j, stop = j0, min(j0 + CHUNK, m)
                while j < stop:
                    # The last tile begins earlier, and passes over what the one before had.
                    low = min(j, m - wide)
                    at, words, far = begin * d + low, together, 0
                    for place in range(ahead, min(ahead + stride, end), LANES):
                        _fetch(x, place)
                    ahead += stride
                    if together > 1:
                        bounds = _bound(limit[a]), _bound(limit[b]), _bound(limit[c]), _bound(limit[e])
                        within = four(x, at, m, flat, (a * d, b * d, c * d, e * d), d, bounds, out)
                    elif j + 4 * TILE <= stop:
                        words, far = 4, TILE
                        within = _long(x, at, m, flat, (a * d,), d, (_bound(limit[a]),), out)
                    elif wide == TILE:
                        (bits,) = _one(x, at, m, flat, (a * d,), d, (_bound(limit[a]),), out)
                        within = bits, bits, bits, bits
                    elif wide == LANES:
                        (bits,) = _few(x, at, m, flat, (a * d,), d, (_bound(limit[a]),), out)
                        within = bits, bits, bits, bits
                    else:
                        for v in range(m):
                            out[v] = squared(x, at + v, m, latent[a])
                        bits = _ALL >> np.uint64(64 - m)
                        within = bits, bits, bits, bits
                    for t in range(words):
                        bits, q, row = within[t] & (_ALL << np.uint64(j - low)), names[t], t * TILE
                        while bits:
                            v = lowest(bits)
                            bits &= bits - _ONE
                            element = begin + low + t * far + v
                            start = base[members[element, 0]]
                            if start < 0 or (masked and not mask[element]):
                                continue
                            new = _key(out[row + v], start + members[element, 1])
                            if new > limit[q]:
                                continue
                            key[q, places[q]], slots[q, places[q]] = new, first + element
                            places[q] += 1
                            if places[q] == width:
                                limit[q], places[q] = _thin(key, slots, q, width, k), k
                    j += 4 * TILE if far else wide
                i += together


@_compiled
def _sort(key: Any, slot: Any, q: int, n: int) -> None:
    """Sort a query's first n by Shell's method."""
    gap = 1
    while 3 * gap < n:
        gap = 3 * gap + 1
    while gap > 0:
        for i in range(gap, n):
            one, place, j = key[q, i], slot[q, i], i
            while j >= gap and key[q, j - gap] > one:
                key[q, j], slot[q, j] = key[q, j - gap], slot[q, j - gap]
                j -= gap
            key[q, j], slot[q, j] = one, place
        gap //= 3


@_compiled
def settle(key: Any, slots: Any, places: Any, distance: Any, position: Any, slot: Any) -> None:
    """Sort the k nearest of each query, and take their keys apart.

    Parameters
    ----------
    key, slots
        uint64, int64, shape ``(n_queries, n)``: what was compared; of no use afterwards.
    places
        int64, shape ``(n_queries,)``: how many there are of each.
    distance, position, slot
        float32, int64, int64, shape ``(n_queries, k)``: what is filled in; infinite, :data:`LAST` and -1 where there is
        no neighbour.
    """
    k = distance.shape[1]
    for q in range(len(key)):
        n = places[q]
        if n > k:
            _thin(key, slots, q, n, k)
            n = k
        if n > _RANKED:
            _sort(key, slots, q, n)
        for i in range(n):
            one, rank = key[q, i], i
            if n <= _RANKED:
                rank = 0
                for j in range(n):
                    rank += key[q, j] < one
            distance[q, rank] = _bound(one)
            position[q, rank], slot[q, rank] = np.int64(one & _LOW), slots[q, i]
        distance[q, n:], position[q, n:], slot[q, n:] = np.inf, LAST, -1


@_compiled
def among(vectors: Any, positions: Any, latent: Any) -> Any:
    """Keys of each query's own candidates: uint64, shape ``(n_queries, n)``.

    Parameters
    ----------
    vectors, positions
        Candidates, float32, shape ``(n_queries, n, d)``; int64, shape ``(n_queries, n)``.
    latent
        float32, shape ``(n_queries, d)``.
    """
    key = np.empty(positions.shape, np.uint64)
    for q in range(len(latent)):
        for i in range(vectors.shape[1]):
            key[q, i] = _key(squared(vectors[q, i], 0, 1, latent[q]), positions[q, i])
    return key
