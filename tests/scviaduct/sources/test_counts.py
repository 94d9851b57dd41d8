"""Mapping genes must add up, and its memory must not depend on the source."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from scviaduct.errors import InputError
from scviaduct.sources import open_source
from scviaduct.sources.counts import GeneTarget, Rows, assemble, runs


def rows_of(matrix, target):
    return target.align(matrix.indptr.astype(np.int64), matrix.indices, matrix.data)


def dense(rows, width):
    return sparse.csr_matrix((rows.data, rows.indices, rows.indptr), shape=(len(rows.indptr) - 1, width)).toarray()


@settings(deadline=None)  # the first call compiles
@given(st.integers(0, 5), st.integers(1, 8), st.integers(0, 1000), st.data())
def test_align_is_a_product_with_the_gene_map(cells, genes, seed, data):
    counts = np.random.default_rng(seed).poisson(0.7, (cells, genes)).astype(np.float64)
    gene_map = np.array(data.draw(st.lists(st.integers(-1, 3), min_size=genes, max_size=genes)), np.int32)
    target = GeneTarget.of(genes, gene_map, 4, None)
    mapped = np.zeros((genes, 4))
    mapped[np.flatnonzero(gene_map >= 0), gene_map[gene_map >= 0]] = 1
    rows = rows_of(sparse.csr_matrix(counts), target)
    np.testing.assert_array_equal(dense(rows, 4), counts @ mapped)
    assert all((np.diff(rows.indices[a:b]) > 0).all() for a, b in zip(rows.indptr, rows.indptr[1:], strict=False))


def test_unsorted_and_repeated_entries_and_stored_zeros():
    stored = Rows(np.array([0, 4, 4]), np.array([2, 0, 2, 1], np.int32), np.array([1, 5, 2, 0], np.float32))
    rows = GeneTarget.of(3, None, None, None).align(*stored)
    assert rows.indices.tolist() == [0, 2]
    assert rows.data.tolist() == [5, 3]
    assert rows.indptr.tolist() == [0, 2, 2]


def test_not_a_number_is_kept_for_preflight_to_see():
    rows = GeneTarget.of(2, None, None, None).align(np.array([0, 1]), np.array([1]), np.array([np.nan]))
    assert np.isnan(rows.data).all()


def test_genes_outside_the_var_filter_are_dropped():
    target = GeneTarget.of(3, np.array([0, 1, 1], np.int32), 2, np.array([False, True, False]))
    assert target.columns.tolist() == [0, -1, 1]


def test_refuses_a_map_that_does_not_fit():
    with pytest.raises(InputError, match="gene_map has 2 entries for 3 source genes"):
        GeneTarget.of(3, np.zeros(2, np.int32), 1, None)
    with pytest.raises(InputError, match="points at column 5 of 3"):
        GeneTarget.of(1, np.array([5], np.int32), 3, None)


@given(st.lists(st.integers(0, 300), unique=True, max_size=40))
def test_runs_cover_the_selected_rows(rows):
    rows = np.array(sorted(rows), np.int64)
    found = [start + position for start, _, chosen in runs(rows) for position in chosen]
    assert found == rows.tolist()


def test_assemble_of_nothing_is_an_empty_matrix():
    rows = assemble([])
    assert rows.indptr.tolist() == [0]
    assert (rows.indices.dtype, rows.data.dtype) == (np.int32, np.float32)


@pytest.mark.parametrize("kind", [sparse.csr_matrix, np.asarray])
def test_reading_holds_one_slab_whatever_the_file(kind, make_adata, tmp_path, monkeypatch):
    """A file 16 times as large costs no more than its row numbers; the smaller one is a few slabs already."""
    slab = 256 << 10
    for module in ("counts", "ondisk"):
        monkeypatch.setattr(f"scviaduct.sources.{module}.SLAB_BYTES", slab)
    for cells in (2_000, 32_000):
        path = tmp_path / f"{cells}.h5ad"
        make_adata(cells, 200, matrix=kind).write_h5ad(path)
        with open_source(str(path)) as source:
            rows, target = np.arange(cells, dtype=np.int64), GeneTarget.of(200, None, None, None)
            list(source.counts(rows[:1], target))  # what the first read compiles and imports is not of the slab
            tracemalloc.start()
            parts = sum(1 for _ in source.counts(rows, target))
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert parts > cells / 300
        # 32 bytes a cell: its number, its place in the run, and its pointer into the values.
        assert peak < slab + 32 * cells + (64 << 10)
