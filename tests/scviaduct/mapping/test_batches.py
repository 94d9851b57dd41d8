"""Which query batches a query has: combinations of the values that a reference does not know."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from scviaduct.errors import DataError, InputError
from scviaduct.mapping.batches import QueryBatch, batches_of, group_columns, query_batches, read_covariates
from scviaduct.mapping.reading import read_block
from scviaduct.references.package import Reference
from scviaduct.sources import open_source
from scviaduct.values import GeneTable, Settings


@pytest.fixture
def reference(make_cells, tmp_path):
    """Facts of an encoder that reads two batches, and sexes; the model is not touched."""
    return Reference(
        path=tmp_path,
        name="odd",
        digest="d" * 32,
        family="SCVI",
        genes=GeneTable({"index": tuple(make_cells().var_names)}),
        n_latent=10,
        encode_covariates=True,
        scvi_version="1.5.1",
        batch_key="batch",
        batch_categories=("b0", "b1"),
        categorical_covariates={"sex": ("f", "m")},
        continuous_covariates=("age",),
    )


@pytest.fixture
def found(write):
    """Query batches of an AnnData."""

    def found(adata, reference, settings=None, shard_cells=25, **options):
        told = settings or Settings()
        with open_source(str(write(adata))) as source:
            scan = source.scan(shard_cells, groups=group_columns(reference, told, **options))
            return query_batches(reference, told, scan, **options)

    return found


def batch(**values):
    names = {"batch": "batch", "sample": "sample"}
    return QueryBatch(tuple((names.get(name, f"covariate:{name}"), value) for name, value in values.items()))


def test_query_batches_are_combinations_of_new_values_alone(make_cells, reference, found):
    adata = make_cells(60, sex=["f", "m", "x"] * 20, batch=[*["b0"] * 20, *["B1"] * 30, *["b1"] * 10])
    batches = found(adata, reference)
    by_hand = {batch(batch="B1"): 20, batch(batch="B1", sex="x"): 10, batch(sex="x"): 10}
    assert batches.cells == by_hand
    assert list(batches.cells) == sorted(batches.cells)
    assert batches.known == 20
    assert [held.shard.start for held in batches.shards] == [0, 25, 50]
    assert [sum(held.cells.values()) + held.known for held in batches.shards] == [25, 25, 10]
    assert batches.shards[2].cells == {batch(sex="x"): 4}
    assert [shard.start for shard in batches.shards_of(batch(batch="B1"))] == [0, 25]
    assert [shard.start for shard in batches.shards_of(*batches.cells)] == [0, 25, 50]
    assert batches.shards_of() == ()
    assert pickle.loads(pickle.dumps(batches)) == batches


def test_names_are_for_people_and_keys_for_machines():
    one = batch(batch="B1", donor="d1")
    assert one.name == "batch=B1, donor=d1"
    assert one.key == '[["batch","B1"],["covariate:donor","d1"]]'
    assert batch(batch="B1").key != QueryBatch((("covariate:batch", "B1"),)).key


def test_a_query_of_known_values_has_none(make_cells, reference, found):
    batches = found(make_cells(60, batch=["b0", "b1"] * 30), reference)
    assert (batches.cells, batches.known) == ({}, 60)


def test_what_is_read_depends_on_the_encoder(reference):
    def names(changed, settings=None, **options):
        return [item.name for item in read_covariates(changed, settings or Settings(), **options)]

    assert names(reference) == ["batch", "covariate:sex"]
    deaf = replace(reference, encode_covariates=False)
    assert (names(deaf), names(deaf, decoder=True)) == ([], ["batch"])
    assert group_columns(deaf, Settings(batch_key="lane"), decoder=True) == ("lane",)
    one = replace(reference, batch_categories=("b0",))
    assert names(one) == ["covariate:sex"], "a covariate of one batch has no input"
    samples = replace(reference, batch_encoded=False, sample_key="donor", sample_categories=("d0",))
    assert names(samples) == ["sample", "covariate:sex"]
    assert names(samples, decoder=True) == ["batch", "sample", "covariate:sex"]
    assert group_columns(samples, Settings(sample_key="who"), decoder=True) == ("batch", "who", "sex")
    assert names(replace(deaf, batch_key=""), decoder=True) == []


def test_one_column_may_play_several_covariates(make_cells, reference, found):
    settings = Settings(batch_key="sex")
    assert group_columns(reference, settings) == ("sex",)
    assert found(make_cells(10), reference, settings).cells == {batch(batch="f"): 5, batch(batch="m"): 5}


def test_numbers_and_booleans_are_text(make_cells, reference, found):
    told = replace(reference, batch_categories=("1", "True"))
    adata = make_cells(10, batch=[1, 2] * 5)
    assert found(adata, told).cells == {batch(batch="2"): 5}
    adata.obs["batch"] = [True, False] * 5
    assert found(adata, told).cells == {batch(batch="False"): 5}


def test_a_missing_value_belongs_to_no_query_batch(make_cells, reference, found, write, scan):
    adata = make_cells(10, batch=["b0", None, *["b9"] * 8])
    with pytest.raises(InputError) as error:
        found(adata, reference)
    assert str(error.value) == (
        "1 cells of dataset 'query' have no value in obs column 'batch'. Fill it, or filter those cells out."
    )
    (shard,) = scan(write(adata)).shards
    with pytest.raises(DataError, match=r"Cell 'cell1' of dataset 'query' has no value in obs column 'batch'"):
        batches_of(read_block(shard, reference, ["batch", "sex"]), reference, Settings())


def test_a_scan_without_groups_is_refused(make_cells, reference, write, scan):
    with pytest.raises(InputError, match="does not count combinations of batch, sex"):
        query_batches(reference, Settings(), scan(write(make_cells())))
    deaf = replace(reference, encode_covariates=False)
    assert query_batches(deaf, Settings(), scan(write(make_cells()))).known == 60, "nothing is read"


def test_cells_of_a_block_find_their_query_batch(make_cells, reference, write, scan):
    sexes, batches = ["f", "m", "x"] * 4, ["b0", "B1"] * 6
    (shard,) = scan(write(make_cells(12, sex=sexes, batch=batches))).shards
    told, codes = batches_of(read_block(shard, reference, ["sex", "batch"]), reference, Settings())
    assert told == (batch(batch="B1"), batch(batch="B1", sex="x"), batch(sex="x"))
    assert codes.dtype == np.int32
    by_hand = [
        {key: value for key, value in (("batch", b), ("sex", s)) if value in ("B1", "x")}
        for b, s in zip(batches, sexes, strict=True)
    ]
    assert [told[code] if code >= 0 else None for code in codes] == [batch(**v) if v else None for v in by_hand]
