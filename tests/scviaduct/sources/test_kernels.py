"""The compiled passes give what scipy gives, whatever the order, the types and the map."""

from __future__ import annotations

import os
import subprocess
import sys

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from scviaduct.sources.counts import GeneTarget
from scviaduct.sources.registers import in_registers
from scviaduct.sources.somacounts import _Staging

GENES = 150


def plainly(rows, genes, values, target, shape):
    """Mask, gather and sum with numpy and scipy."""
    columns = target[genes]
    kept = (rows >= 0) & (columns >= 0) & (values != 0)
    triplets = (values[kept].astype(np.float32), (rows[kept], columns[kept]))
    matrix = sparse.coo_matrix(triplets, shape=shape).tocsr()
    matrix.sum_duplicates()
    return matrix


def same(rows, matrix):
    assert (rows.indptr.dtype, rows.indices.dtype, rows.data.dtype) == (np.int64, np.int32, np.float32)
    np.testing.assert_array_equal(rows.indptr, matrix.indptr)
    np.testing.assert_array_equal(rows.indices, matrix.indices)
    np.testing.assert_array_equal(rows.data, matrix.data)


def a_map(rng, kind, width):
    """Columns of the genes: in the source's order, in another, or several genes to one column."""
    if kind == "several":
        return rng.integers(-1, width, GENES, dtype=np.int32)
    chosen = rng.choice(GENES, width, replace=False)
    target = np.full(GENES, -1, np.int32)
    target[np.sort(chosen) if kind == "ordered" else chosen] = np.arange(width, dtype=np.int32)
    return target


maps = st.sampled_from(["ordered", "permuted", "several"])


@settings(deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(0, 400),
    st.sampled_from([1, 5, 60]),
    st.integers(1, GENES),
    maps,
    st.booleans(),
    st.integers(1, 4),
)
def test_coordinates_become_rows_as_with_scipy(seed, size, n_rows, width, kind, by_row, tables):
    rng = np.random.default_rng(seed)
    chosen = np.unique(rng.integers(100, 160, 20))
    target = a_map(rng, kind, width)
    joinids, genes = rng.integers(100, 100 + n_rows, size), rng.integers(0, GENES, size)
    values = rng.integers(0, 4, size).astype(np.float32)
    if by_row:  # as TileDB gives a tile
        order = np.lexsort((genes, joinids))
        joinids, genes = joinids[order], genes[order]
    at_row = np.full(200, -1)
    at_row[chosen] = np.arange(len(chosen))
    staging = _Staging(target, width)
    for _ in range(2):  # its memory serves the next slab too
        for part in np.array_split(np.arange(size), tables):
            assert staging.add(joinids[part], genes[part], values[part], chosen)
        same(staging.take(len(chosen)), plainly(at_row[joinids], genes, values, target, (len(chosen), width)))


def test_a_gene_that_is_not_there_is_told_even_in_a_row_that_is_not_wanted():
    staging = _Staging(np.zeros(3, np.int32), 1)
    assert not staging.add(np.array([7]), np.array([3]), np.ones(1, np.float32), np.array([8]))


@pytest.mark.parametrize("strange", [-1, 3, 2**32, 2**40])
@pytest.mark.parametrize("at", [0, 1, 15, 16, 31, 32, 39])
def test_a_gene_that_is_not_there_is_told_wherever_it_stands(at, strange):
    genes = np.zeros(40, np.int64)
    genes[at] = strange
    values = np.ones(40, np.float32)
    staging = _Staging(np.zeros(3, np.int32), 1)
    assert not staging.add(np.repeat([7, 8, 9], [2, 21, 17]), genes, values, np.array([8]))
    with pytest.raises(ValueError, match="of 3"):
        GeneTarget(np.zeros(3, np.int32), 1).align(np.array([0, 2, 23, 40]), genes, values)


INTEGERS = [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64]


VALUES = [*INTEGERS, np.float32, np.float64, np.float16, np.bool_, ">f4"]


# Each type of either, not all pairs: every pair is compiled for.
@pytest.mark.parametrize(
    ("index", "value"),
    [*((index, np.float32) for index in (*INTEGERS, ">i4")), *((np.int32, value) for value in VALUES)],
)
@pytest.mark.parametrize("kind", ["ordered", "permuted", "several"])
def test_align_takes_any_types_read_only_and_some_rows(index, value, kind):
    rng = np.random.default_rng(3)
    lengths = rng.integers(0, 40, 30)
    indptr = np.concatenate(([0], np.cumsum(lengths)))
    most = min(GENES, np.iinfo(index).max)
    indices = np.concatenate([rng.choice(most, length, replace=False) for length in lengths]).astype(index)
    data = rng.integers(0, 3, len(indices)).astype(value)
    if np.dtype(value).kind in "iuf":  # what a float32 does not hold, and values below zero
        whole = np.dtype(value).kind in "iu"
        some = np.array([np.iinfo(value).max, np.iinfo(value).min, 3] if whole else [2.3, -1e-7, 3], value)
        data[::5] = np.resize(some, len(data[::5]))
    for array in (indptr, indices, data):
        array.flags.writeable = False
    target = a_map(rng, kind, 40)
    chosen = np.array([0, 3, 4, 29])
    at_row = np.repeat(np.arange(30), lengths)
    whole = plainly(at_row, indices.astype(np.int64), data.astype(np.float32), target, (30, 40))
    same(GeneTarget(target, 40).align(indptr, indices, data), whole)
    same(GeneTarget(target, 40).align(indptr, indices, data, chosen), whole[chosen])


@pytest.mark.parametrize(
    ("indptr", "indices", "values", "message"),
    [
        ([0, 2], [0, 5], 2, "genes 0 to 5 of 5"),
        ([0, 2], [-1, 0], 2, "genes -1 to 0 of 5"),
        ([0, 3], [0, 1], 2, "indptr leads from 0 to 3 of 2 genes, 2 values"),
        ([0, 2, 1, 2], [0, 1], 2, "indptr leads"),
        ([0, 2], [0, 1], 1, "2 genes, 1 values"),
    ],
)
def test_align_refuses_what_is_no_matrix(indptr, indices, values, message):
    with pytest.raises(ValueError, match=message):
        GeneTarget.of(5, None, None, None).align(np.array(indptr), np.array(indices), np.ones(values, np.float32))


def test_genes_that_are_no_whole_numbers_are_refused():
    with pytest.raises(ValueError, match="genes are of type float64"):
        GeneTarget.of(5, None, None, None).align(np.array([0, 2]), np.array([0.0, 1.0]), np.ones(2))


def test_sixteen_at_a_time_where_the_processor_can():
    """Without this, all of the others would pass with one value after the other."""

    @numba.njit
    def asked():
        return in_registers()

    features = numba.core.registry.cpu_target.target_context.codegen().magic_tuple()[2]
    assert asked() == ("+avx512f" in features)


def test_what_is_no_count_survives():
    """NaN and infinity are for others to find; a zero that has a sign is one."""
    values = np.tile(np.float32([np.nan, np.inf, -0.0, -1, 0, 2]), 8)
    columns = np.arange(48, dtype=np.int8)
    rows = GeneTarget.of(300, None, None, None).align(np.array([0, 48]), columns, values)
    there = values != 0
    np.testing.assert_array_equal(rows.indices, columns[there])
    np.testing.assert_array_equal(rows.data, values[there])
    columns[40] = -1  # 255, if its sign were lost
    with pytest.raises(ValueError, match="genes -1 to 47 of 300"):
        GeneTarget.of(300, None, None, None).align(np.array([0, 48]), columns, values)


def test_an_order_of_columns_survives_many_words():
    """Columns at both ends of words of the bitmap, and a row that is full."""
    columns = np.concatenate([np.arange(0, 6400, 63), np.arange(1, 6400, 64)])
    columns = np.unique(columns)[::-1].astype(np.int32)
    rows = GeneTarget.of(6400, None, None, None).align(np.array([0, len(columns)]), columns, columns + 1)
    np.testing.assert_array_equal(rows.indices, columns[::-1])
    np.testing.assert_array_equal(rows.data, columns[::-1] + 1)


SCRIPT = """
import sys
import numpy as np
sys.path.insert(0, {root!r})
from tests.scviaduct.sources.test_kernels import selected_and_aligned
np.savez({out!r}, *selected_and_aligned())
"""


def selected_and_aligned():
    """Some rows, by way of either pass."""
    rng = np.random.default_rng(5)
    target, size = a_map(rng, "permuted", 40), 3_000
    rows, genes, values = np.sort(rng.integers(0, 50, size)), rng.integers(0, GENES, size), rng.integers(0, 3, size)
    staging = _Staging(target, 40)
    assert staging.add(rows, genes, values.astype(np.float32), np.arange(0, 50, 2))
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=50))])
    return *staging.take(25), *GeneTarget(target, 40).align(indptr, genes, values)


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="names a processor of x86-64")
def test_a_processor_without_avx512_selects_the_same(tmp_path, request):
    out = str(tmp_path / "rows.npz")
    code = SCRIPT.format(root=str(request.config.rootpath), out=out)
    told = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | told)
    there = np.load(out)
    for one, name in zip(selected_and_aligned(), there.files, strict=True):
        np.testing.assert_array_equal(one, there[name])


def test_sources_and_commands_start_without_the_compiler():
    code = "import sys, scviaduct.sources, scviaduct.sources.files, pipelines.cli; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0
