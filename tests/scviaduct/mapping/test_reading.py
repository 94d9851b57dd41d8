"""Shards in a reference's genes, and sources that change between planning and reading."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from scviaduct.errors import DataError, SourceChangedError
from scviaduct.mapping import reading
from scviaduct.mapping.reading import gene_match, read_block, read_shared
from scviaduct.references.package import Reference
from scviaduct.sources import counts
from scviaduct.values import GeneTable


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch):
    monkeypatch.setattr(reading, "_MATCHES", {})


@pytest.fixture
def reference(make_cells, tmp_path):
    """A reference of every second gene in reverse order and of one that no query has; the model is not touched."""
    genes = (*reversed(make_cells().var_names[::2]), "ENSG99999999999")
    facts = {"genes": GeneTable({"index": genes}), "n_latent": 10, "encode_covariates": False, "scvi_version": "1.5.1"}
    return Reference(path=tmp_path, name="odd", digest="d" * 32, family="SCVI", **facts)


def as_array(block):
    return sparse.csr_matrix((block.data, block.indices, block.indptr), shape=(block.n_cells, block.n_genes)).toarray()


def test_a_block_is_in_the_reference_s_genes(write, scan, make_cells, reference):
    adata = make_cells()
    (shard,) = scan(write(adata)).shards
    block = read_block(shard, reference, ("age", "batch"))
    expected = np.hstack([adata.X.toarray()[:, ::2][:, ::-1], np.zeros((60, 1))])
    np.testing.assert_array_equal(as_array(block), expected)
    assert block.obs.column_names == ["observation_id", "age", "batch"]
    assert block.obs["age"].to_pylist() == adata.obs["age"].tolist()


def versioned(adata):
    adata.var_names = [f"{name}.{i + 1}" for i, name in enumerate(adata.var_names)]
    return adata


def in_a_column(adata):
    adata.var = adata.var.assign(ids=adata.var_names).set_axis([f"gene{i}" for i in range(adata.n_vars)])
    return adata


def shuffled(adata):
    return adata[:, np.random.default_rng(0).permutation(adata.n_vars)].copy()


@pytest.mark.parametrize("change", [versioned, in_a_column, shuffled])
def test_what_genes_are_called_changes_nothing(write, scan, make_cells, reference, change):
    adata = make_cells()
    (shard,) = scan(write(adata, "plain")).shards
    (other,) = scan(write(change(adata), "changed")).shards
    np.testing.assert_array_equal(
        as_array(read_block(other, reference, ())), as_array(read_block(shard, reference, ()))
    )


def test_genes_that_mean_the_same_are_summed(write, scan, make_cells, reference):
    adata = make_cells()
    adata.var_names = [*adata.var_names[:39], f"{adata.var_names[0]}.7"]
    (shard,) = scan(write(adata)).shards
    counts = adata.X.toarray()
    found = as_array(read_block(shard, reference, ()))
    np.testing.assert_array_equal(found[:, 19], counts[:, 0] + counts[:, 39])
    assert gene_match(shard, reference).summed == 1


@pytest.mark.parametrize(("limit", "cells"), [(None, 60), (100, 60), (60, 60), (7, 7), (1, 1), (0, 0)])
def test_a_limit_takes_the_first_cells(write, scan, make_cells, reference, limit, cells):
    adata = make_cells()
    (shard,) = scan(write(adata)).shards
    block = read_block(shard, reference, ("age",), limit)
    assert (block.n_cells, len(block.obs), len(block.rows)) == (cells, cells, cells)
    assert block.obs["observation_id"].to_pylist() == adata.obs_names[:cells].tolist()
    np.testing.assert_array_equal(as_array(block), as_array(read_block(shard, reference, ()))[:cells])


def test_genes_are_matched_once_for_the_shards_of_a_file(write, scan, make_cells, reference, monkeypatch):
    calls = []
    match_genes = reading.match_genes
    monkeypatch.setattr(reading, "match_genes", lambda *given: calls.append(given) or match_genes(*given))
    path = write(make_cells())
    shards = scan(path, 10).shards
    assert len(shards) == 6
    for shard in shards:
        read_block(shard, reference, ())
    assert len(calls) == 1
    other = replace(reference, digest="e" * 32, genes=GeneTable({"index": ("A",)}))
    assert gene_match(shards[0], other).present.tolist() == [False]
    assert gene_match(shards[0], reference).present.sum() == 20
    assert len(calls) == 2
    write(make_cells(seed=2)[:, :5].copy())
    assert gene_match(scan(path).shards[0], reference).present.sum() == 3
    assert len(calls) == 3


def test_the_matches_kept_are_bounded_and_the_oldest_goes(write, scan, make_cells, reference, monkeypatch):
    monkeypatch.setattr(reading, "_MATCHES_KEPT", 2)
    shards = [scan(write(make_cells(10, i), f"q{i}")).shards[0] for i in range(3)]
    for shard in shards:
        gene_match(shard, reference)
    assert [key[0] for key in reading._MATCHES] == [shard.uri for shard in shards[1:]]


def test_a_source_that_changed_since_it_was_planned(write, scan, make_cells, reference):
    path = write(make_cells())
    first, second = scan(path, 30).shards
    assert read_block(first, reference, ()).n_cells == 30
    write(make_cells(seed=2))
    for shard in (first, second):
        with pytest.raises(SourceChangedError, match=f"planned as version {shard.version} and is") as error:
            read_block(shard, reference, ())
        assert error.value.remedy.startswith("Plan again")
        assert isinstance(error.value, DataError)  # the unit is quarantined; the run goes on
    assert read_block(scan(path, 30).shards[1], reference, ()).n_cells == 30


def test_rows_that_are_not_those_planned(write, scan, make_cells, reference):
    (shard,) = scan(write(make_cells())).shards
    with pytest.raises(SourceChangedError, match="select 59 cells, not the 60 that were planned"):
        read_block(replace(shard, stop=59), reference, ())


@pytest.fixture
def named(tmp_path):
    """References that know some genes by a column."""

    def make(name, genes, column="index"):
        facts = {"genes": GeneTable({column: tuple(genes)}), "n_latent": 10, "encode_covariates": False}
        return Reference(path=tmp_path, name=name, digest=name * 8, family="SCVI", scvi_version="1.5.1", **facts)

    return make


OTHERS = {
    "half of them": lambda genes: genes[10:30],
    "others": lambda genes: genes[1::2],
    "the same": lambda genes: genes[::2][::-1],
    "one that is not there": lambda genes: ("ENSG99999999999", *genes[:3]),
}


@pytest.mark.parametrize("which", OTHERS)
def test_what_is_read_for_several_is_to_the_bit_what_is_read_for_each(which, write, scan, make_cells, named):
    adata = make_cells()
    genes = tuple(adata.var_names)
    references = [named("odd", genes[::2][::-1]), named("other", OTHERS[which](genes))]
    (shard,) = scan(write(adata)).shards
    shared = read_shared(shard, references, ("age",))
    for at, (reference, block) in enumerate(zip(references, shared.together(0), strict=True)):
        alone = read_block(shard, reference, ("age",))
        assert_same(shared.of(at), alone)
        assert_same(block, alone)


@pytest.mark.parametrize("nnz", [0, 40, 8000])
@pytest.mark.parametrize("references", [1, 4, 5, 9])
def test_references_are_aligned_together_as_alone(nnz, references, monkeypatch, write, scan, make_cells, named):
    """Some rows at a time, and some references at a time; genes of some are in another order."""
    monkeypatch.setattr(counts, "_CACHE_BYTES", 3000)
    rng = np.random.default_rng(references)
    adata = make_cells(400)
    adata.X = sparse.random(*adata.shape, nnz / np.prod(adata.shape), "csr", np.float32, rng)
    adata.X.data = np.ceil(9 * adata.X.data)
    orders = [rng.permutation(adata.n_vars)[: 5 + 3 * i] for i in range(references)]
    asked = [
        named(f"{i}", tuple(adata.var_names[np.sort(order) if i % 2 else order])) for i, order in enumerate(orders)
    ]
    (shard,) = scan(write(adata)).shards
    shared = read_shared(shard, asked, ())
    found = [block for first in range(0, references, 4) for block in shared.together(first)]
    for reference, block in zip(asked, found, strict=True):
        assert_same(block, read_block(shard, reference, ()))


def test_genes_that_are_one_to_one_reference_and_two_to_another(write, scan, make_cells, named):
    """Three source genes of one symbol are summed for the reference that knows symbols, fractions too."""
    adata = make_cells()
    adata.X.data += np.float32(0.1)
    adata.var["symbol"] = [f"S{i // 3}" for i in range(adata.n_vars)]
    references = [
        named("symbols", sorted(set(adata.var["symbol"])), "symbol"),
        named("ids", adata.var_names[::-1]),
    ]
    (shard,) = scan(write(adata)).shards
    shared = read_shared(shard, references, (), 40)
    for at, reference in enumerate(references):
        assert_same(shared.of(at), read_block(shard, reference, (), 40))
    assert shared.of(0).indices.max() == len(references[0].genes) - 1
    assert shared.nbytes > shared.block.nbytes


def assert_same(left, right):
    assert (left.shard, left.n_genes) == (right.shard, right.n_genes)
    assert left.obs.equals(right.obs)
    for name in ("indptr", "indices", "data", "rows"):
        one, other = getattr(left, name), getattr(right, name)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other, err_msg=name)
