"""A shard is read by any process; a process keeps few sources open."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from scviaduct.errors import SourceChangedError
from scviaduct.sources import close_shards, open_shard, open_source, opening

READ = """
import pickle, sys
from scviaduct.sources import open_shard
shard = pickle.load(sys.stdin.buffer)
block = open_shard(shard).read(shard)
print(block.n_cells, block.data.sum(dtype="float64"), block.obs["observation_id"][0])
"""


@pytest.fixture(autouse=True)
def _nothing_open():
    close_shards()
    yield
    close_shards()


@pytest.fixture(params=["file", "soma", "census"])
def uri(request, symphony, soma_from_r, census_collection):
    """A source of every scheme."""
    return {
        "file": f"{symphony}?filter=batch != '5p'",
        "soma": f"soma:{soma_from_r}?filter=groups == 'g1'",
        "census": f"census:sim?uri={census_collection}&filter=sex != 'male'",
    }[request.param]


def test_shard_reads_the_same_in_another_process(uri):
    with open_source(uri) as source:
        shard = source.scan(300).shards[-1]
        block = source.read(shard)
    told = subprocess.run(
        [sys.executable, "-c", READ],
        input=pickle.dumps(shard),
        capture_output=True,
        check=True,
        cwd=Path(__file__).parents[3],
    ).stdout.decode()
    assert told.split() == [
        str(block.n_cells),
        str(block.data.sum(dtype="float64")),
        block.obs["observation_id"][0].as_py(),
    ]


def test_sources_stay_open_and_the_longest_unused_is_closed(make_adata, tmp_path):
    shards = []
    for i in range(opening.KEPT_OPEN + 1):
        make_adata(3, seed=i).write_h5ad(tmp_path / f"{i}.h5ad")
        with open_source(f"{tmp_path}/{i}.h5ad") as source:
            shards += source.scan(5).shards
    first = open_shard(shards[0])
    assert open_shard(shards[0]) is first
    for shard in shards[1:-1]:
        open_shard(shard)
    assert open_shard(shards[0]) is first
    second = opening._OPEN[shards[1].uri]
    open_shard(shards[-1])
    assert shards[0].uri in opening._OPEN
    assert shards[1].uri not in opening._OPEN
    with pytest.raises(KeyError, match="invalid identifier"):
        second.read(shards[1])


def test_open_source_that_changed_is_opened_again_and_refused(make_adata, tmp_path):
    make_adata(3).write_h5ad(tmp_path / "a.h5ad")
    with open_source(f"{tmp_path}/a.h5ad") as source:
        (shard,) = source.scan(5).shards
    assert open_shard(shard).read(shard).n_cells == 3
    make_adata(3, seed=1).write_h5ad(tmp_path / "b.h5ad")
    (tmp_path / "b.h5ad").replace(tmp_path / "a.h5ad")
    with pytest.raises(SourceChangedError, match=f"planned as version {shard.version}"):
        open_shard(shard)
