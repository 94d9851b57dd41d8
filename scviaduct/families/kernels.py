"""The compiled arithmetic of an encoder: counts gathered, layers multiplied, a cell at a time to the bit.

Each output is summed in one order, by fused multiply-adds over a cell's counts as they lie or over the inputs of a
layer. So a cell's bits depend neither on other cells nor on its place among them, nor on how wide the processor's
registers are: AVX2 and AVX-512 give the same ones. Nothing is compiled with ``fastmath``, which may change an order,
nor as ``parallel``: an actor has one thread, and numba's own would raise PyTorch's number.

The two loops that take the time are written down in LLVM's terms, because the compiler keeps sums of numpy arrays in
memory and uses half the width of AVX-512. Sums and weights must begin at a multiple of :data:`ALIGNMENT` bytes: a
register of AVX-512 loaded from elsewhere takes two cache lines, and gathering twice as long.

Kernels take read-only arrays, as blocks come out of Ray's object store. Sizes are not checked here: callers do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numba import types
from numba.core import cgutils

from scviaduct.compiling import compiled
from scviaduct.lanes import (
    LANES,
    LONG,
    ZEROS,
    bits_of,
    element,
    fma,
    has_avx512,
    load,
    multiply_add,
    number_of,
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
ROWS = 6
"""Cells that share a tile of a product: 6 x 64 sums fill 24 of AVX-512's 32 registers."""
_TILE_GENES = 2048
"""Genes gathered at a time: with 64 outputs 512 KB of weights, which stay in a core's second cache. Of 8,000 genes and
512 outputs, gathering takes 16 us a cell so, and 25 with all genes at a time."""
_CHAIN = 48
"""Products summed from zero before they are added to a cell's sums. 16, 32 and 64 leave as little rounding in a latent;
a SCANVI's probabilities came nearest to scvi-tools' with this."""
_LINES = WIDTH // LANES


def _array(dtype: types.Type, dimensions: int = 1, *, written: bool = False) -> types.Array:
    return types.Array(dtype, dimensions, "C", readonly=not written)


_counts, _rows, _features = _array(types.float32), _array(types.int64), _array(types.int32)
_weights, _table, _sums = _array(types.float32, 3), _array(types.float32, 2), _array(types.float32, 2, written=True)


@typed_intrinsic
def _gathered(
    _typing: Any, sums: Any, weights: Any, places: Any, genes: Any, values: Any, start: Any, stop: Any
) -> Any:
    """Add to 64 sums the weights of the genes ``start`` to ``stop``, times their values.

    ``places`` are where the sums lie, and the weights of the first gene.
    """
    signature = types.void(sums, weights, places, genes, values, start, stop)

    def generate(context: Any, builder: Any, signature: Any, args: Sequence[Any]) -> Any:
        kinds, zero = signature.args, LONG(0)
        at = [builder.extract_value(args[2], i) for i in range(2)]
        out, rows = (element(context, builder, kinds[i], args[i], at[i]) for i in range(2))
        gene, value = (element(context, builder, kinds[i], args[i], zero) for i in (3, 4))
        held = [cgutils.alloca_once_value(builder, ZEROS) for _ in range(_LINES)]
        with cgutils.for_range_slice(builder, args[5], args[6], LONG(1)) as (place, _):
            number = builder.zext(builder.load(builder.gep(gene, [place])), LONG)
            row = builder.gep(rows, [builder.mul(number, LONG(WIDTH))])
            factor = spread(builder, builder.load(builder.gep(value, [place])))
            for line, total in enumerate(held):
                weight = load(builder, row, line)
                builder.store(multiply_add(builder, factor, weight, builder.load(total)), total)
        for line, total in enumerate(held):
            store(builder, builder.fadd(load(builder, out, line), builder.load(total)), out, line)
        return context.get_dummy_value()

    return signature, generate


@typed_intrinsic
def _multiplied(_typing: Any, sums: Any, values: Any, weights: Any, places: Any, steps: Any, size: Any) -> Any:
    """Add to 64 sums of :data:`ROWS` cells the product of so many of their values with the weights.

    ``places`` are where the sums, the values and the weights lie; ``steps`` are from one cell's to the next one's of
    the first two.
    """
    signature = types.void(sums, values, weights, places, steps, size)

    def generate(context: Any, builder: Any, signature: Any, args: Sequence[Any]) -> Any:
        at = [builder.extract_value(args[3], i) for i in range(3)]
        out, inputs, rows = (element(context, builder, signature.args[i], args[i], at[i]) for i in range(3))
        outs, ins = (
            [builder.gep(first, [builder.mul(builder.extract_value(args[4], i), LONG(row))]) for row in range(ROWS)]
            for i, first in enumerate((out, inputs))
        )
        # 24 vectors are registers of AVX-512; other processors take a quarter at a time, twelve registers of AVX2.
        together = _LINES if has_avx512(context) else 1
        for lines in (range(line, line + together) for line in range(0, _LINES, together)):
            held = [[cgutils.alloca_once_value(builder, ZEROS) for _ in lines] for _ in range(ROWS)]
            with cgutils.for_range(builder, args[5]) as loop:
                row = builder.gep(rows, [builder.mul(loop.index, LONG(WIDTH))])
                weight = [load(builder, row, line) for line in lines]
                for start, totals in zip(ins, held, strict=True):
                    factor = spread(builder, builder.load(builder.gep(start, [loop.index])))
                    for part, total in zip(weight, totals, strict=True):
                        builder.store(multiply_add(builder, factor, part, builder.load(total)), total)
            for start, totals in zip(outs, held, strict=True):
                for line, total in zip(lines, totals, strict=True):
                    store(builder, builder.fadd(load(builder, start, line), builder.load(total)), start, line)
        return context.get_dummy_value()

    return signature, generate


_TWO_THIRDS = np.int32(np.float32(2 / 3).view(np.int32))
_EXPONENT, _BIAS = np.int32(23), np.int32(127)
_ONE, _LOG_2 = np.float32(1), np.float32(np.log(2))
_SERIES: tuple[np.float32, ...] = tuple(
    np.array([0.13756539, -0.1504943, 0.14054218, -0.1648158, 0.20007323, -0.25004205, 0.33333272, -0.49999985], "f4")
)
"""Of ``(log(1 + f) - f) / f**2`` for ``|f| <= 1/3``, the highest power first: a Chebyshev fit of degree 7."""


@compiled(types.void(_counts, _array(types.float32, written=True)))
def logarithms(counts: FloatArray, out: FloatArray) -> None:
    """``log1p`` of counts to 6.5e-8 of itself (1.7e-7 between whole numbers); rounding alone leaves 6.0e-8.

    PyTorch's takes 2.0 ns a count on one core, which is 320 ns a cell of 158; this takes 0.7.
    """
    for i in range(len(counts)):
        whole = _ONE + counts[i]
        bits = bits_of(whole)
        power = (bits - _TWO_THIRDS) >> _EXPONENT  # of the multiple of two that is within a third of it
        scale = number_of(np.int32(max(_BIAS - power, np.int32(0)) << _EXPONENT))
        lost = counts[i] - (whole - _ONE)  # by rounding 1 + count
        rest = fma(lost, scale, number_of(np.int32(bits - (power << _EXPONENT))) - _ONE)
        total = _SERIES[0]
        for factor in _SERIES[1:]:
            total = fma(total, rest, factor)
        out[i] = fma(np.float32(power), _LOG_2, fma(rest * rest, total, rest))


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


@compiled(types.void(_sums, _weights, _rows, _features, _counts, types.boolean, types.int64))
def gather(
    sums: FloatArray,
    weights: FloatArray,
    indptr: LongArray,
    genes: IntArray,
    counts: FloatArray,
    logarithmic: bool,  # noqa: FBT001 - numba takes arguments by position
    together: int,
) -> None:
    """Add the weights of each cell's genes, times its counts or their logarithms.

    Parameters
    ----------
    sums
        float32, shape ``(>= n_cells, n_blocks * WIDTH)``.
    weights
        float32, shape ``(n_blocks, n_genes, WIDTH)``.
    indptr, genes, counts
        int64 of shape ``(n_cells + 1,)``, int32 and float32 of shape ``(nnz,)``.
    logarithmic
        Whether to take ``log1p`` of the counts.
    together
        Cells that each part of the weights is read for.
    """
    n_cells, n_blocks, n_genes = len(indptr) - 1, weights.shape[0], weights.shape[1]
    n_tiles = max(-(-n_genes // _TILE_GENES), 1)
    out, rows = sums.reshape(-1), weights.reshape(-1)
    for first in range(0, n_cells, together):
        pointers = indptr[first : min(first + together, n_cells) + 1]
        own = slice(pointers[0], pointers[-1])
        pointers = pointers - pointers[0]
        there = genes[own]
        values = np.empty(pointers[-1], np.float32)
        if logarithmic:
            logarithms(counts[own], values)
        else:
            values[:] = counts[own]
        cut = _cut(pointers, there, n_tiles)
        for block in range(n_blocks):
            for tile in range(n_tiles):
                for cell in range(len(pointers) - 1):
                    at = ((first + cell) * n_blocks + block) * WIDTH
                    for low in range(cut[tile, cell], cut[tile + 1, cell], _CHAIN):
                        high = min(low + _CHAIN, cut[tile + 1, cell])
                        _gathered(out, rows, (at, block * n_genes * WIDTH), there, values, low, high)


@compiled(types.void(_sums, _table, _weights))
def multiply(sums: FloatArray, values: FloatArray, weights: FloatArray) -> None:
    """Add the product of values and weights.

    Parameters
    ----------
    sums
        float32, shape ``(n_rows, n_blocks * WIDTH)``; ``n_rows`` is a multiple of :data:`ROWS`.
    values
        float32, shape ``(n_rows, >= n_in)``.
    weights
        float32, shape ``(n_blocks, n_in, WIDTH)``.
    """
    n_blocks, size, wide, deep = weights.shape[0], weights.shape[1], sums.shape[1], values.shape[1]
    out, inputs, rows = sums.reshape(-1), values.reshape(-1), weights.reshape(-1)
    for block in range(n_blocks):
        for row in range(0, len(sums), ROWS):
            for low in range(0, size, _CHAIN):
                places = row * wide + block * WIDTH, row * deep + low, (block * size + low) * WIDTH
                _multiplied(out, inputs, rows, places, (wide, deep), min(_CHAIN, size - low))
