"""A scan counts which values occur together in each shard: in files, folders, SOMA and a Census."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scviaduct.errors import SourceError
from scviaduct.sources import grouping, open_source
from scviaduct.sources.grouping import Combinations
from scviaduct.sources.obs import as_text

OBS = {
    "batch": [f"b{i % 3}" for i in range(20)],
    "lane": [i % 2 for i in range(20)],
    "fresh": [i < 5 for i in range(20)],
    "donor": [None if i == 7 else f"d{i // 10}" for i in range(20)],
}


def counted(source, scan, columns):
    """What the blocks of the same shards hold, as a mapper reads it."""
    told = []
    for shard in scan.shards:
        obs = source.read(shard, columns=[column for column in columns if column in source.obs_columns()]).obs
        values = [
            as_text(obs[column].combine_chunks()).to_pylist() if column in obs.column_names else [None] * len(obs)
            for column in columns
        ]
        told.append(Counter(zip(*values, strict=True)))
    return told


def test_combinations_are_those_that_blocks_hold(make_adata, tmp_path):
    make_adata(20, obs=OBS).write_h5ad(tmp_path / "q.h5ad")
    columns = ["batch", "lane", "fresh", "donor"]
    with open_source(str(tmp_path / "q.h5ad")) as source:
        plain, scan = source.scan(6, ["lane"]), source.scan(6, ["lane"], columns)
        assert list(scan.groups) == counted(source, scan, columns)
    assert plain.groups == ()
    assert (scan.shards, list(scan.columns)) == (plain.shards, ["lane"])
    assert scan.groups[1][("b1", "1", "False", None)] == 1
    assert [sum(counts.values()) for counts in scan.groups] == [6, 6, 6, 2]
    whole = sum((Counter(counts) for counts in scan.groups), Counter())
    frame = pd.DataFrame(OBS).astype({"lane": str, "fresh": str})
    expected = frame.groupby(columns, dropna=False, observed=True).size()
    assert sorted(whole.values()) == sorted(expected)


def test_filters_and_datasets_that_interleave(make_adata, tmp_path):
    make_adata(20, obs=OBS).write_h5ad(tmp_path / "q.h5ad")
    with open_source(f"{tmp_path}/q.h5ad?dataset=lane&filter=batch != 'b1'") as source:
        scan = source.scan(3, groups=["batch"])
        assert list(scan.groups) == counted(source, scan, ["batch"])
    assert {shard.dataset_id for shard in scan.shards} == {"0", "1"}
    assert {value for counts in scan.groups for (value,) in counts} == {"b0", "b2"}


def test_a_folder_of_files_of_other_columns(make_adata, tmp_path):
    make_adata(20, obs=OBS).write_h5ad(tmp_path / "a.h5ad")
    make_adata(5, obs={"lane": [1.0, 1.5, np.nan, 2.0, 1.0]}).write_h5ad(tmp_path / "b.h5ad")
    with open_source(str(tmp_path)) as source:
        scan = source.scan(10, groups=["batch", "lane"])
        assert len(scan.groups) == len(scan.shards) == 3
        only = source.scan(10, groups=["batch"])
    assert scan.missing == {"batch": f"file://{tmp_path}/b.h5ad"}
    assert scan.columns == {}
    assert scan.groups[2] == {(None, "1"): 2, (None, "1.5"): 1, (None, None): 1, (None, "2"): 1}
    assert only.groups[2] == {(None,): 5}, "a file without any of the columns has cells all the same"


def test_a_census_and_experiments_from_r(census_collection, soma_from_r):
    sources = {
        f"census:2026-01-01?uri={census_collection}": ["dataset_id", "assay", "is_primary_data"],
        f"soma:{soma_from_r}?dataset=groups": ["groups", "RNA_snn_res.1"],
    }
    for uri, columns in sources.items():
        with open_source(uri) as source:
            scan = source.scan(900, groups=columns)
            assert list(scan.groups) == counted(source, scan, columns)
            assert sum(sum(counts.values()) for counts in scan.groups) == scan.cells


@given(st.lists(st.tuples(st.sampled_from(["x", "y", None]), st.sampled_from([1, 2, None])), max_size=30), st.data())
def test_numbers_are_the_same_whatever_the_batches(cells, data):
    edge = data.draw(st.integers(0, len(cells)))
    combinations, numbers = Combinations(["a", "b"]), []
    for part in (cells[:edge], cells[edge:]):
        table = pa.table(
            {
                "a": pa.array([a for a, _ in part], pa.string()).dictionary_encode(),
                "b": pa.array([b for _, b in part], pa.int64()),
            }
        )
        numbers += combinations.number(table, len(part)).tolist()
    texts = [(a, None if b is None else str(b)) for a, b in cells]
    assert combinations.values == tuple(dict.fromkeys(texts))
    assert [combinations.values[number] for number in numbers] == texts


def test_a_column_of_identifiers_is_refused_before_memory_runs_out(make_adata, tmp_path, monkeypatch):
    monkeypatch.setattr(grouping, "MAX_COMBINATIONS", 19)
    make_adata(20, obs={"n": range(20)}).write_h5ad(tmp_path / "q.h5ad")
    with (
        open_source(str(tmp_path / "q.h5ad")) as source,
        pytest.raises(SourceError, match=r"obs columns n of file:.* have more than 19 combinations .*--batch-key"),
    ):
        source.scan(10, groups=["n"])
