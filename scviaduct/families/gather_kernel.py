"""The first layer of an encoder as a Triton kernel: imported only where Triton is installed."""

# ruff: noqa: ANN001, ANN201, N803 - the signature is Triton's

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gather_sum(  # type: ignore[no-untyped-def]
    pointers,
    genes,
    counts,
    values,
    weight,
    bias,
    table,
    codes,
    out,
    n_hidden,
    codes_stride,
    LOOKED_UP: tl.constexpr,
    COVARIATES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One cell's hidden units, some columns of them: the weights of its genes times its counts, bias and covariates.

    A program sums ``ROWS`` genes side by side, each in the order of the cell's genes, and adds these sums up at the
    end: an order that depends on the cell alone. So do its bits.
    """
    cell = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < n_hidden
    begin = tl.load(pointers + cell)
    end = tl.load(pointers + cell + 1)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for low in range(begin, end, ROWS):
        at = low + tl.arange(0, ROWS)
        there = at < end
        gene = tl.load(genes + at, mask=there, other=0).to(tl.int64)
        value = tl.load(counts + at, mask=there, other=0)
        if LOOKED_UP:  # log1p of a whole number, as PyTorch has it: the same whatever the count travelled as
            value = tl.load(values + value.to(tl.int32), mask=there, other=0.0)
        rows = tl.load(
            weight + gene[:, None] * n_hidden + columns[None, :], mask=there[:, None] & inside[None, :], other=0.0
        )
        sums += value[:, None] * rows.to(tl.float32)
    total = tl.sum(sums, axis=0) + tl.load(bias + columns, mask=inside, other=0.0)
    for covariate in tl.static_range(COVARIATES):
        row = tl.load(codes + covariate * codes_stride + cell).to(tl.int64)
        total += tl.load(table + row * n_hidden + columns, mask=inside, other=0.0)
    tl.store(out + cell.to(tl.int64) * n_hidden + columns, total, mask=inside)
