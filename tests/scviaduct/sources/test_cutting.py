"""Shards that overlap or leave a row out would map a cell twice or never."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scviaduct.errors import SourceError
from scviaduct.sources import cutting
from scviaduct.sources.cutting import Cutter, KeyCheck
from scviaduct.sources.obs import Cells
from scviaduct.values import Shard

TEMPLATE = Shard("file:///a?layer=X", "file:///a", "v", "layer=X", "", 0, 0, 0, "")


def cells_of(rows, datasets, keys=None):
    coded = pa.array(datasets, pa.string()).dictionary_encode()
    keys = pa.array([f"k{row}" for row in rows] if keys is None else keys, pa.string())
    names = tuple(coded.dictionary.to_pylist())
    return Cells(np.array(rows, np.int64), keys, names, coded.indices.to_numpy(), pa.table({}), 0, frozenset())


def cut(rows, datasets, batches, shard_cells):
    cutter = Cutter(TEMPLATE, shard_cells)
    edges = [0, *sorted(min(edge, len(rows)) for edge in batches), len(rows)]
    for first, last in itertools.pairwise(edges):
        cutter.add(cells_of(rows[first:last], datasets[first:last]))
    return cutter.finish()


@given(st.data())
def test_shards_partition_the_rows_whatever_the_batches(data):
    rows = sorted(data.draw(st.sets(st.integers(0, 400), max_size=80)))
    datasets = data.draw(st.lists(st.sampled_from("abc"), min_size=len(rows), max_size=len(rows)))
    batches = data.draw(st.lists(st.integers(0, 80), max_size=4))
    shard_cells = data.draw(st.integers(1, 30))
    shards = cut(rows, datasets, batches, shard_cells)

    held = [
        [r for r, d in zip(rows, datasets, strict=True) if d == shard.dataset_id and shard.start <= r < shard.stop]
        for shard in shards
    ]
    assert sorted(row for part in held for row in part) == rows
    assert [len(part) for part in held] == [shard.cells for shard in shards]
    assert all(shard.cells == shard_cells or shard is last_of(shards, shard.dataset_id) for shard in shards)
    assert [s.start for s in shards] == sorted(s.start for s in shards)
    for part, shard in zip(held, shards, strict=True):
        expected = hashlib.blake2b(np.array(part, "<i8").tobytes(), digest_size=16).hexdigest()
        assert shard.rows_digest == expected
    assert shards == cut(rows, datasets, [], shard_cells), "the batches of a reader must not decide the shards"


def last_of(shards, dataset):
    return [shard for shard in shards if shard.dataset_id == dataset][-1]


def test_shard_carries_the_address():
    (shard,) = cut([3, 4], ["a", "a"], [], 10)
    assert (shard.uri, shard.source, shard.version, shard.selection) == (
        "file:///a?layer=X",
        "file:///a",
        "v",
        "layer=X",
    )
    assert (shard.start, shard.stop, shard.cells) == (3, 5, 2)


@pytest.mark.parametrize("size", [0, -1])
def test_refuses_a_shard_of_no_cells(size):
    with pytest.raises(SourceError, match=f"cannot hold {size} cells. Give a positive number"):
        Cutter(TEMPLATE, size)


def check_keys(*batches):
    with KeyCheck() as keys:
        for cells in batches:
            keys.add(cells)
        keys.finish(lambda: batches, "file:///a")


def test_same_key_in_two_datasets_is_allowed():
    check_keys(cells_of([0, 1], ["a", "b"], ["k", "k"]), cells_of([2], ["c"], ["k"]))


def test_repeated_key_is_named_across_batches():
    with pytest.raises(SourceError, match=r"'k' occurs more than once in dataset 'a' of file:///a.*key=COLUMN"):
        check_keys(cells_of([0, 1], ["a", "b"], ["k", "x"]), cells_of([2, 3], ["b", "a"], ["y", "k"]))


def test_hashes_that_collide_are_no_repetition(monkeypatch):
    monkeypatch.setattr(cutting, "hash_keys", lambda keys: np.zeros(len(keys), np.uint64))
    check_keys(cells_of([0, 1, 2], ["a", "a", "b"], ["k", "l", "k"]))
    with pytest.raises(SourceError, match="'l' occurs more than once"):
        check_keys(cells_of([0, 1, 2], ["a", "a", "a"], ["k", "l", "l"]))
