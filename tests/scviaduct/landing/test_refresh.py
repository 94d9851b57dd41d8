"""Refreshing writes what changed, and nothing else; what no manifest names goes when it is asked to."""

from __future__ import annotations

import shutil

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import tiledbsoma
from scipy import sparse

from scviaduct.errors import SourceChangedError
from scviaduct.landing.pruning import prune
from scviaduct.sources import close_shards, open_shard, open_source

X = "census_data/homo_sapiens/ms/RNA/X/raw"
OBS = "census_data/homo_sapiens/obs"
DATASETS = "census_info/datasets"


def rewrite(frame, change):
    """Write the rows of a data frame again, as a function of pandas leaves them."""
    with tiledbsoma.open(str(frame)) as held:
        before, schema, names = held.read().concat(), held.schema, held.index_column_names
    after = change(before.to_pandas())
    shutil.rmtree(frame)
    top = int(after["soma_joinid"].max())
    tiledbsoma.DataFrame.create(str(frame), schema=schema, index_column_names=names, domain=[(0, top)]).close()
    # Opened anew: what is written through the handle that created a frame leaves its enumerations empty.
    with tiledbsoma.open(str(frame), "w") as held:
        held.write(pa.Table.from_pandas(after, schema=schema, preserve_index=False))


def counts_of(collection):
    with tiledbsoma.open(str(collection / X)) as held:
        return held.read((slice(None),)).tables().concat().to_pandas(), held.shape


def write_counts(collection, table, shape):
    shutil.rmtree(collection / X)
    tiledbsoma.SparseNDArray.create(str(collection / X), type=pa.float32(), shape=shape).close()
    with tiledbsoma.open(str(collection / X), "w") as held:
        held.write(pa.Table.from_pandas(table.sort_values(["soma_dim_0", "soma_dim_1"]), preserve_index=False))


@pytest.fixture
def release(census_collection, tmp_path):
    """A second release: its first dataset is gone, so that all joinids move; ``change`` alters one of the others."""

    def make(change=None):
        new = tmp_path / "release"
        shutil.copytree(census_collection, new)
        with tiledbsoma.open(str(census_collection / OBS)) as held:
            obs = held.read(column_names=["soma_joinid", "dataset_id"]).concat().to_pandas()
        datasets = list(dict.fromkeys(obs["dataset_id"]))
        kept = obs.loc[obs["dataset_id"] != datasets[0], "soma_joinid"].to_numpy()
        joinid = np.full(len(obs), -1)
        joinid[kept] = np.arange(len(kept))
        table, shape = counts_of(new)
        table = table[joinid[table["soma_dim_0"]] >= 0]
        table["soma_dim_0"] = joinid[table["soma_dim_0"]]
        write_counts(new, table, (len(kept), shape[1]))
        rewrite(new / OBS, lambda frame: frame.iloc[kept].assign(soma_joinid=np.arange(len(kept))))
        if change:
            change(new, datasets[1])
        return f"census:2026-02-01?uri={new}", datasets

    return make


def published(landing):
    return {(piece.dataset_id, piece.counts) for piece in landing.manifest().pieces}


def test_a_release_writes_the_cells_anew_and_no_counts(release, land, parity, census_collection, tmp_path):
    old = f"census:2026-01-01?uri={census_collection}"
    landing, written = land(old, tmp_path / "landing")
    before, pieces = published(landing), len(landing.manifest().pieces)
    assert written == pieces
    new, datasets = release()
    _, written = land(new, tmp_path / "landing")
    assert written == 0
    assert published(landing) == {(name, counts) for name, counts in before if name != datasets[0]}
    assert parity(new, landing.path).cells == 1860
    gone = prune(landing, dry_run=True)
    assert prune(landing) == gone
    assert gone.removed > 5
    parity(new, landing.path)
    assert prune(landing).removed == 0


def newer_version(collection, dataset):
    """Another version of a dataset, in which a cell has one count more of a gene that it had."""
    table, shape = counts_of(collection)
    cell = int(table["soma_dim_0"].min())
    table.loc[table.index[table["soma_dim_0"] == cell][0], "soma_data"] += 1
    write_counts(collection, table, shape)
    rewrite(
        collection / DATASETS,
        lambda frame: frame.assign(
            dataset_version_id=np.where(frame["dataset_id"] == dataset, "v2", frame["dataset_version_id"])
        ),
    )


def same_version_other_sum(collection, dataset):
    """The release says of a cell that it has other counts, and nothing of another version."""

    def change(frame):
        frame.loc[np.flatnonzero(frame["dataset_id"] == dataset)[0], "raw_sum"] += 1
        return frame

    rewrite(collection / OBS, change)


@pytest.mark.parametrize("change", [newer_version, same_version_other_sum])
def test_a_dataset_that_changed_is_landed_again(change, release, land, parity, census_collection, tmp_path):
    landing, _ = land(f"census:2026-01-01?uri={census_collection}", tmp_path / "landing", 500)
    before = published(landing)
    new, datasets = release(change)
    _, written = land(new, tmp_path / "landing", 500)
    changed = {name for name, _ in published(landing) - before}
    assert changed == {datasets[1]}
    assert written == (2 if change is newer_version else 1)
    parity(new, landing.path, 400)


def test_genes_of_a_release_in_another_order(release, land, parity, scrambled, census_collection, tmp_path):
    """Counts that are reused are numbered by the genes of the release that they were landed from."""
    landing, _ = land(f"census:2026-01-01?uri={census_collection}", tmp_path / "landing")
    old = landing.manifest().parts[0].genes

    def reorder(collection, _dataset):
        table, shape = counts_of(collection)
        moved = np.random.default_rng(0).permutation(shape[1])
        table["soma_dim_1"] = moved[table["soma_dim_1"]]
        write_counts(collection, table, shape)
        rewrite(
            collection / "census_data/homo_sapiens/ms/RNA/var",
            lambda frame: frame.assign(soma_joinid=moved).sort_values("soma_joinid"),
        )

    new, _ = release(reorder)
    _, written = land(new, tmp_path / "landing")
    part = landing.manifest().parts[0]
    assert written == 0
    assert part.genes != old
    assert {piece.genes for piece in part.pieces} == {old}
    parity(new, landing.path, 400)
    gene_map, n_genes = scrambled(part.n_genes)
    parity(new, landing.path, 400, columns=(), gene_map=gene_map, n_genes=n_genes)
    prune(landing)
    parity(new, landing.path, 400)
    landing.genes_file(old).unlink()  # no source has it any more
    _, written = land(new, tmp_path / "landing")
    assert written == len(landing.manifest().pieces)
    parity(new, landing.path, 400)


def write_file(path, seed, cells=25):
    counts = sparse.csr_matrix(np.random.default_rng(seed).poisson(0.7, (cells, 6)).astype(np.float32))
    names = pd.DataFrame({"lot": "a"}, index=[f"{path.stem}-{i}" for i in range(cells)])
    anndata.AnnData(counts, obs=names, var=pd.DataFrame(index=list("ABCDEF"))).write_h5ad(path)


def test_a_file_that_changed_is_landed_again_and_the_others_not(land, parity, tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for seed in range(3):
        write_file(folder / f"s{seed}.h5ad", seed)
    assert land(folder, tmp_path / "landing", 10)[1] == 9
    assert land(folder, tmp_path / "landing", 10)[1] == 0
    with open_source(str(tmp_path / "landing")) as source:
        planned = source.scan(10).shards
    close_shards()  # HDF5 truncates no file that this process holds open
    write_file(folder / "s1.h5ad", 7)
    landing, written = land(folder, tmp_path / "landing", 10)
    assert written == 3
    parity(folder, landing.path, 10)
    # Shards of a file that stayed are still good, whatever else was refreshed.
    assert open_shard(planned[0]).read(planned[0]).n_cells == 10
    with pytest.raises(SourceChangedError, match="Plan again"):
        open_shard(planned[3])


def test_an_experiment_that_changed_is_landed_again_as_a_whole(land, parity, soma_from_r, tmp_path):
    copy = tmp_path / "soma"
    shutil.copytree(soma_from_r, copy)
    pieces = len(land(f"soma:{copy}", tmp_path / "landing", 30)[0].manifest().pieces)
    with tiledbsoma.open(str(copy)) as experiment:
        obs = str(experiment.obs.uri)
        table = experiment.obs.read().concat()
    with tiledbsoma.open(obs, "w") as frame:
        frame.write(table)  # the same values in a further fragment
    landing, written = land(f"soma:{copy}", tmp_path / "landing", 30)
    assert written == pieces
    parity(f"soma:{copy}", landing.path, 30)
