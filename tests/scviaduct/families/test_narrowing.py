"""What travels says exactly what the block says, in the bytes that are needed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scviaduct.errors import DataError
from scviaduct.families.narrowing import COUNTS, Layout, cut, gene_type, narrow

UINT8, UINT16, FLOAT32 = COUNTS


def written(indices, data, *, count, n_genes=2000, cells=3):
    layout = Layout(cells, len(data), gene_type(n_genes), count)
    pointers, genes, counts = layout.views(np.full(layout.n_bytes, 0xAA, np.uint8))
    assert pointers.shape == (cells + 1,)
    pointers[:] = -1
    fits = narrow(indices, data, genes, counts, n_genes)
    assert (pointers == -1).all()  # the parts do not overlap
    return fits, genes, counts


@pytest.mark.parametrize("n", [0, 1, 4095, 4096, 4097, 50_000])
@pytest.mark.parametrize("count", COUNTS)
def test_counts_are_written_as_they_are(count, n):
    rng = np.random.default_rng(0)
    indices, data = rng.integers(0, 2000, n).astype(np.int32), rng.integers(0, 256, n).astype(np.float32)
    for values in (indices, data):
        values.setflags(write=False)  # as they come out of the object store
    fits, genes, counts = written(indices, data, count=count)
    assert fits
    assert (genes.dtype, counts.dtype) == (np.uint16, count)
    np.testing.assert_array_equal(genes, indices)
    np.testing.assert_array_equal(counts, data)


@pytest.mark.parametrize(
    ("value", "narrowest"),
    [
        *((0.0, UINT8), (255.0, UINT8), (256.0, UINT16), (65_535.0, UINT16), (65_536.0, FLOAT32), (0.5, FLOAT32)),
        *((-1.0, FLOAT32), (255.5, FLOAT32), (2.0**31, FLOAT32), (2.0**32 + 512, FLOAT32), (1e-30, FLOAT32)),
        *((np.nan, FLOAT32), (np.inf, FLOAT32), (-np.inf, FLOAT32)),
    ],
)
@pytest.mark.parametrize("at", [0, 4095, 4096, 9999])
def test_a_count_travels_as_the_narrowest_that_holds_it(value, narrowest, at):
    data = np.ones(10_000, np.float32)
    data[at] = value
    for count in COUNTS:
        fits, _, counts = written(np.zeros(10_000, np.int32), data, count=count)
        assert fits == (COUNTS.index(count) >= COUNTS.index(narrowest))
        if fits:
            np.testing.assert_array_equal(counts, data)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("gene", [-1, 2000, 2**31 - 1])
def test_a_gene_that_there_is_not_is_refused(gene, count):
    indices = np.zeros(9000, np.int32)
    indices[8000] = gene
    with pytest.raises(DataError, match=rf"position {gene:,}, and the reference has 2,000 genes"):
        written(indices, np.ones(9000, np.float32), count=count)


def test_many_genes_take_four_bytes():
    assert gene_type(65_536) == np.uint16
    assert gene_type(65_537) == np.int32
    indices = np.array([65_536, 3], np.int32)
    fits, genes, _ = written(indices, np.ones(2, np.float32), count=UINT8, n_genes=65_537)
    assert fits
    np.testing.assert_array_equal(genes, indices)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 20), st.integers(1, 120), st.integers(0, 1000))
def test_pieces_cover_all_cells_and_are_bounded(lengths, step, most, offset):
    indptr = offset + np.concatenate([[0], np.cumsum(np.array(lengths, np.int64))])
    pieces = cut(indptr, step, most)
    assert [cell for start, stop in pieces for cell in range(start, stop)] == list(range(len(lengths)))
    for start, stop in pieces:
        assert start // step == (stop - 1) // step
        assert indptr[stop] - indptr[start] <= most or stop == start + 1
