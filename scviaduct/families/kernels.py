"""The compiled products of an encoder: counts gathered, layers multiplied, a cell at a time to the bit.

Each output is summed in one order, by fused multiply-adds over a cell's counts as they lie or over the inputs of a
layer. So a cell's bits depend neither on other cells nor on its place among them, nor on how wide the processor's
registers are: AVX2 and AVX-512 give the same ones. Nothing is compiled with ``fastmath``, which may change an order,
nor as ``parallel``: an actor has one thread, and numba's own would raise PyTorch's number.

The two loops that take the time are written down in LLVM's terms, because the compiler keeps sums of numpy arrays in
memory and uses half the width of AVX-512. Sums and weights must begin at a multiple of :data:`ALIGNMENT` bytes: a
register of AVX-512 loaded from elsewhere takes two cache lines, and gathering twice as long.

Kernels take read-only arrays, as blocks come out of Ray's object store. Sizes are not checked here: callers do
(:mod:`scviaduct.families.compiled`).
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import types
from numba.core import cgutils

from scviaduct.compiling import compiled
from scviaduct.elementary import log1p_of
from scviaduct.lanes import (
    LANES,
    LONG,
    VECTOR,
    ZEROS,
    element,
    has_avx512,
    load,
    multiply_add,
    spread,
    store,
    typed_intrinsic,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scviaduct.values import FloatArray, IntArray, LongArray

ALIGNMENT = 64
WIDTH = 64
"""Outputs that are summed at a time; layers are padded to a multiple."""
NARROW = 32
"""Outputs of a layer that has no more than these, such as a posterior of 10 dimensions or a classifier of 20 labels."""
ROWS = 12
"""Cells of a product are a multiple: a tile of 6 x 64 sums, or of 12 x 32, fills 24 of AVX-512's 32 registers."""
_TILE_GENES = 2048
"""Genes gathered at a time: with 64 outputs 512 KB of weights, which stay in a core's second cache. Of 8,000 genes and
512 outputs, gathering takes 16 us a cell so, and 25 with all genes at a time."""
_CHAIN = 48
"""Products summed before they are added to a cell's sums; in a product, the first of them to the bias. 16, 32 and 64
leave as little rounding in a latent; a SCANVI's probabilities came nearest to scvi-tools' with this."""
_LINES = WIDTH // LANES
_ZERO = np.float32(0)


def _array(dtype: types.Type, dimensions: int = 1, *, written: bool = False) -> types.Array:
    return types.Array(dtype, dimensions, "C", readonly=not written)


_counts, _rows, _features = _array(types.float32), _array(types.int64), _array(types.int32)
_bias = _array(types.float32)
_weights, _table, _sums = _array(types.float32, 3), _array(types.float32, 2), _array(types.float32, 2, written=True)


def _gathering(*, looked_up: bool) -> Any:
    """What adds to 64 sums the weights of the genes ``start`` to ``stop``, times their values or those of a table."""

    @typed_intrinsic
    def gathered(
        _typing: Any, sums: Any, weights: Any, places: Any, genes: Any, values: Any, table: Any, start: Any, stop: Any
    ) -> Any:
        # ``places`` are where the sums lie, and the weights of the first gene.
        signature = types.void(sums, weights, places, genes, values, table, start, stop)

        def generate(context: Any, builder: Any, signature: Any, args: Sequence[Any]) -> Any:
            kinds, zero = signature.args, LONG(0)
            at = [builder.extract_value(args[2], i) for i in range(2)]
            out, rows = (element(context, builder, kinds[i], args[i], at[i]) for i in range(2))
            gene, value, told = (element(context, builder, kinds[i], args[i], zero) for i in (3, 4, 5))
            held = [cgutils.alloca_once_value(builder, ZEROS) for _ in range(_LINES)]
            with cgutils.for_range_slice(builder, args[6], args[7], LONG(1)) as (place, _):
                number = builder.zext(builder.load(builder.gep(gene, [place])), LONG)
                row = builder.gep(rows, [builder.mul(number, LONG(WIDTH))])
                count = builder.load(builder.gep(value, [place]))
                if looked_up:
                    count = builder.load(builder.gep(told, [builder.fptosi(count, LONG)]))
                factor = spread(builder, count)
                for line, total in enumerate(held):
                    weight = load(builder, row, line)
                    builder.store(multiply_add(builder, factor, weight, builder.load(total)), total)
            for line, total in enumerate(held):
                store(builder, builder.fadd(load(builder, out, line), builder.load(total)), out, line)
            return context.get_dummy_value()

        return signature, generate

    return gathered


_gathered, _gathered_of_table = _gathering(looked_up=False), _gathering(looked_up=True)


def _product(width: int, *, begins: bool) -> Any:
    """What adds to so many sums of some cells the product of their values with the weights, or begins with a bias."""
    lines = width // LANES
    cells = ROWS * NARROW // width

    @typed_intrinsic
    def multiplied(
        _typing: Any, sums: Any, values: Any, weights: Any, bias: Any, places: Any, steps: Any, size: Any
    ) -> Any:
        # ``places`` are where the sums, the values, the weights and the bias lie; ``steps`` are from one cell's to the
        # next one's of the first two.
        signature = types.void(sums, values, weights, bias, places, steps, size)

        def generate(context: Any, builder: Any, signature: Any, args: Sequence[Any]) -> Any:
            *arrays, places, steps, size = args
            out, inputs, rows, start = (
                element(context, builder, signature.args[i], array, builder.extract_value(places, i))
                for i, array in enumerate(arrays)
            )
            outs, ins = (
                [builder.gep(first, [builder.mul(builder.extract_value(steps, i), LONG(row))]) for row in range(cells)]
                for i, first in enumerate((out, inputs))
            )
            # 24 vectors are registers of AVX-512; other processors take a part at a time, twelve registers of AVX2.
            together = lines if has_avx512(context) else 1
            parts = [range(line, line + together) for line in range(0, lines, together)]
            groups = [range(cells)] if has_avx512(context) else [range(row, row + 6) for row in range(0, cells, 6)]
            for part, group in itertools.product(parts, groups):
                first = [load(builder, start, line) if begins else ZEROS for line in part]
                held = [[cgutils.alloca_once(builder, VECTOR) for _ in part] for _ in group]
                for value, total in zip(first * len(held), itertools.chain(*held), strict=True):
                    builder.store(value, total)
                with cgutils.for_range(builder, size) as loop:
                    row = builder.gep(rows, [builder.mul(loop.index, LONG(width))])
                    weight = [load(builder, row, line) for line in part]
                    for cell, totals in zip(group, held, strict=True):
                        factor = spread(builder, builder.load(builder.gep(ins[cell], [loop.index])))
                        for one, total in zip(weight, totals, strict=True):
                            builder.store(multiply_add(builder, factor, one, builder.load(total)), total)
                for cell, totals in zip(group, held, strict=True):
                    for line, place in zip(part, totals, strict=True):
                        total = builder.load(place)
                        added = total if begins else builder.fadd(load(builder, outs[cell], line), total)
                        store(builder, added, outs[cell], line)
            return context.get_dummy_value()

        return signature, generate

    return multiplied


_begun, _added = _product(WIDTH, begins=True), _product(WIDTH, begins=False)
_begun_narrow, _added_narrow = _product(NARROW, begins=True), _product(NARROW, begins=False)


@compiled(types.void(_counts, _array(types.float32, written=True)))
def logarithms(counts: FloatArray, out: FloatArray) -> None:
    """``log1p`` of counts."""
    for i in range(len(counts)):
        out[i] = log1p_of(counts[i])


LOGARITHMS: FloatArray = np.empty(1 << 14, np.float32)
"""``log1p`` of whole numbers. To look it up takes no time beside the weights; to compute it, a tenth of gathering."""
logarithms(np.arange(len(LOGARITHMS), dtype=np.float32), LOGARITHMS)


@compiled(types.boolean(_counts, types.int64))
def _are_listed(counts: FloatArray, size: int) -> bool:
    """Whether all counts are whole, and places of a table of some size."""
    right, limit = True, np.float32(size)
    for i in range(len(counts)):
        right &= (counts[i] >= _ZERO) & (counts[i] < limit) & (counts[i] == np.floor(counts[i]))
    return right


@compiled(_array(types.int64, 2, written=True)(_rows, _features, types.int64))
def _cut(indptr: LongArray, genes: IntArray, n_tiles: int) -> LongArray:
    """Where each tile of genes begins among the counts of each cell: int64, shape ``(n_tiles + 1, n_cells)``.

    Where a cell's genes are not in order, tiles are not well cut, but hold every count once all the same.
    """
    n_cells = len(indptr) - 1
    cut = np.empty((n_tiles + 1, n_cells), np.int64)
    cut[0], cut[n_tiles] = indptr[:-1], indptr[1:]
    for tile in range(1, n_tiles):
        for cell in range(n_cells):
            low, high = cut[tile - 1, cell], indptr[cell + 1]
            while low < high:
                middle = (low + high) >> 1
                if genes[middle] < tile * _TILE_GENES:
                    low = middle + 1
                else:
                    high = middle
            cut[tile, cell] = low
    return cut


@compiled(types.void(_sums, _table, _rows))
def add_rows(sums: FloatArray, table: FloatArray, codes: LongArray) -> None:
    """Add the row of each cell's category."""
    for row in range(len(codes)):
        code = codes[row]
        for column in range(table.shape[1]):
            sums[row, column] += table[code, column]


@compiled(types.boolean(_features, types.int32))
def _are_genes(genes: IntArray, n_genes: int) -> bool:
    """Whether there is a gene of each number."""
    right = True  # no branch, so that vectors do it
    for i in range(len(genes)):
        right &= (genes[i] >= 0) & (genes[i] < n_genes)
    return right


@compiled(types.boolean(_sums, _weights, _bias, _rows, _features, _counts, _counts, types.int64))
def gather(
    sums: FloatArray,
    weights: FloatArray,
    bias: FloatArray,
    indptr: LongArray,
    genes: IntArray,
    counts: FloatArray,
    logs: FloatArray,
    together: int,
) -> bool:
    """Fill in the bias and the weights of each cell's genes, times its counts or their logarithms.

    Parameters
    ----------
    sums
        float32, shape ``(>= n_cells, n_blocks * WIDTH)``. Rows behind the last cell's become the bias.
    weights, bias
        float32, shapes ``(n_blocks, n_genes, WIDTH)`` and ``(n_blocks * WIDTH,)``.
    indptr, genes, counts
        int64 of shape ``(n_cells + 1,)``, which need not begin at 0; int32 and float32.
    logs
        :data:`LOGARITHMS`, to take ``log1p`` of the counts; or none of them.
    together
        Cells that each part of the weights is read for.

    Returns
    -------
    bool
        Whether the weights have every gene; if not, sums are of no use.
    """
    n_cells, n_blocks, n_genes = len(indptr) - 1, weights.shape[0], weights.shape[1]
    n_tiles = max(-(-n_genes // _TILE_GENES), 1)
    out, rows = sums.reshape(-1), weights.reshape(-1)
    sums[n_cells:] = bias
    for first in range(0, n_cells, together):
        pointers = indptr[first : min(first + together, n_cells) + 1]
        own = slice(pointers[0], pointers[-1])
        pointers = pointers - pointers[0]
        there = genes[own]
        if not _are_genes(there, np.int32(n_genes)):
            return False
        values = counts[own]
        listed = len(logs) > 0 and _are_listed(values, len(logs))
        if len(logs) and not listed:
            found = np.empty(len(values), np.float32)
            logarithms(values, found)
            values = found
        cut = _cut(pointers, there, n_tiles)
        for block in range(n_blocks):
            for tile in range(n_tiles):
                for cell in range(len(pointers) - 1):
                    at = ((first + cell) * n_blocks + block) * WIDTH
                    if tile == 0:
                        for column in range(WIDTH):
                            out[at + column] = bias[block * WIDTH + column]
                    for low in range(cut[tile, cell], cut[tile + 1, cell], _CHAIN):
                        high = min(low + _CHAIN, cut[tile + 1, cell])
                        places = at, block * n_genes * WIDTH
                        if listed:
                            _gathered_of_table(out, rows, places, there, values, logs, low, high)
                        else:
                            _gathered(out, rows, places, there, values, logs, low, high)
    return True


@compiled(types.void(_sums, _table, _weights, _bias))
def multiply(sums: FloatArray, values: FloatArray, weights: FloatArray, bias: FloatArray) -> None:
    """Fill in the product of values and weights, and the bias; or add the product, if there is none.

    Parameters
    ----------
    sums
        float32, shape ``(n_rows, n_blocks * width)``; ``n_rows`` is a multiple of :data:`ROWS`.
    values
        float32, shape ``(n_rows, >= n_in)``.
    weights
        float32, shape ``(n_blocks, n_in, width)``; the width is :data:`WIDTH`, or :data:`NARROW`.
    bias
        float32, shape ``(n_blocks * width,)``, or none.
    """
    n_blocks, size, width = weights.shape
    steps = sums.shape[1], values.shape[1]
    out, inputs, rows = sums.reshape(-1), values.reshape(-1), weights.reshape(-1)
    cells = ROWS * NARROW // width
    for block in range(n_blocks):
        for row in range(0, len(sums), cells):
            for low in range(0, size, _CHAIN):
                high = min(low + _CHAIN, size)
                at = row * steps[0] + block * width, row * steps[1] + low, (block * size + low) * width, block * width
                if width == WIDTH:
                    if low == 0 and len(bias):
                        _begun(out, inputs, rows, bias, at, steps, high - low)
                    else:
                        _added(out, inputs, rows, bias, at, steps, high - low)
                elif low == 0 and len(bias):
                    _begun_narrow(out, inputs, rows, bias, at, steps, high - low)
                else:
                    _added_narrow(out, inputs, rows, bias, at, steps, high - low)
