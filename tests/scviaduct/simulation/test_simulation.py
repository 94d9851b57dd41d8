"""Simulated cells are what they say: repeatable, integer, of known types, and a Census to whoever opens them."""

from __future__ import annotations

from dataclasses import replace

import cellxgene_census
import numpy as np
import pytest
from scipy import sparse

from scviaduct.simulation import DATASETS, Simulation, write_census
from scviaduct.sources import open_source

SMALL = Simulation(tuple(replace(dataset, cells=300) for dataset in DATASETS), genes=200)


def whole(simulation, number):
    blocks = list(simulation.blocks(number))
    return sparse.vstack([counts for counts, _ in blocks]).tocsr(), [obs for _, obs in blocks]


def test_the_same_arguments_give_the_same_cells_and_more_cells_leave_them():
    counts, (obs,) = whole(SMALL, 1)
    again, (told,) = whole(SMALL, 1)
    assert (counts != again).nnz == 0
    assert obs.equals(told)
    longer = replace(SMALL, datasets=(DATASETS[0], replace(DATASETS[1], cells=300), DATASETS[2]))
    assert (whole(longer, 1)[0] != counts).nnz == 0
    other, _ = whole(replace(SMALL, seed=1), 1)
    assert (counts != other).nnz > 0


def test_cells_are_counts_of_distinct_types_donors_and_sizes():
    counts, (obs,) = whole(replace(SMALL, datasets=tuple(replace(d, cells=2000) for d in DATASETS)), 2)
    assert counts.dtype == np.float32
    assert (counts.data == np.round(counts.data)).all()
    assert counts.data.min() >= 1
    assert obs["observation_joinid"].is_unique
    assert obs["cell_type"].nunique() == 8
    assert obs["donor_id"].nunique() == DATASETS[2].donors
    assert set(obs["disease"]) == {"normal", "COVID-19"}
    sizes = np.asarray(counts.sum(1)).ravel()
    assert 0.8 < np.median(sizes) / DATASETS[2].counts < 1.25
    # Types differ in more genes than two halves of one type do.
    kind = obs["cell_type"].to_numpy()
    mean = {name: counts[kind == name].mean(0) for name in ("B cell", "classical monocyte")}
    b = np.flatnonzero(kind == "B cell")
    halves = np.abs(counts[b[::2]].mean(0) - counts[b[1::2]].mean(0)).sum()
    assert np.abs(mean["B cell"] - mean["classical monocyte"]).sum() > 2 * halves


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    return write_census(SMALL, tmp_path_factory.mktemp("simulated") / "census")


def test_cellxgene_census_opens_and_filters_it(collection):
    with cellxgene_census.open_soma(uri=str(collection)) as census:
        counts = census["census_info"]["datasets"].read().concat()["dataset_total_cell_count"].to_pylist()
        assert counts == [300, 300, 300]
        filtered = cellxgene_census.get_obs(census, "homo_sapiens", value_filter="disease == 'COVID-19'")
        expected = whole(SMALL, 2)[1][0]
        assert len(filtered) == (expected["disease"] == "COVID-19").sum() > 0
        presence = cellxgene_census.get_presence_matrix(census, "homo_sapiens")
        assert presence.shape == (3, 200)


def test_what_is_read_back_is_what_was_simulated(collection):
    source = f"census:simulated?organism=homo_sapiens&uri={collection}&filter=dataset_id == '{DATASETS[1].id}'"
    counts, (obs,) = whole(SMALL, 1)
    with open_source(source) as opened:
        (shard,) = opened.scan(1000).shards
        block = opened.read(shard, columns=("cell_type",))
    found = sparse.csr_matrix((block.data, block.indices, block.indptr), shape=(300, 200))
    assert (found != counts).nnz == 0
    assert block.obs["observation_id"].to_pylist() == obs["observation_joinid"].tolist()
    assert block.obs["cell_type"].to_pylist() == obs["cell_type"].tolist()


def test_writing_again_replaces_the_whole(collection):
    smaller = replace(SMALL, datasets=SMALL.datasets[:1])
    target = collection.with_name("again")
    write_census(SMALL, target)
    seen = []
    write_census(smaller, target, seen.append)
    assert sum(seen) == 300
    with cellxgene_census.open_soma(uri=str(target)) as census:
        assert len(census["census_data"]["homo_sapiens"].obs) == 300
