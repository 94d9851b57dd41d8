"""The main job on real cells: right to the last cell, whoever runs it, however it is cut."""

from __future__ import annotations

import shutil

import anndata
import numpy as np
import pytest
import scvi

import pipelines as sv
from scviaduct.errors import DataError, InputError, NotFitError
from scviaduct.families.vae import quiet
from scviaduct.store import Store

KEPT = ["cell_type", "assay", "donor_id"]


@pytest.fixture(scope="module")
def census(census_collection):
    return f"census:2026-01-01?organism=homo_sapiens&uri={census_collection}"


@pytest.fixture(scope="module")
def inline(census, pbmc, tmp_path_factory):
    """The whole local Census in this process, in shards of 500."""
    store = tmp_path_factory.mktemp("inline") / "store"
    options = {"reference": "pbmc", "keep_obs": KEPT, "shard_cells": 500, "quiet": True}
    result = sv.map(census, store=str(store), engine="inline", **options)
    return store, result, options


def test_every_cell_of_the_source_is_there_once(inline, rows, census_collection):
    store, result, _ = inline
    table = rows(store)
    assert result.state == "committed"
    assert (result.cells, result.units, len(table)) == (3360, 7, 3360)
    keys = set(zip(table["dataset_id"].to_pylist(), table["observation_id"].to_pylist(), strict=True))
    assert len(keys) == 3360
    assert sorted(table["soma_joinid"].to_pylist()) == list(range(3360))
    assert set(table["run"].to_pylist()) == {result.run}
    assert table.column_names[:5] == ["source", "dataset_id", "observation_id", "source_row", "soma_joinid"]


def test_two_actors_equal_one_process_row_for_row(inline, census, local_ray, rows, same, tmp_path):
    store, alone, options = inline
    result = sv.map(census, store=str(tmp_path / "store"), actors=2, readers=1, **options)
    assert (result.state, result.run, result.mapped_units) == ("committed", alone.run, 7)
    assert same(rows(store), rows(tmp_path / "store"))


def test_another_cut_gives_the_same_cells(inline, census, rows, same, tmp_path):
    """A matrix product rounds by its shape, so latents may differ by some 1e-6 of their spread; labels do not."""
    store, _, options = inline
    sv.map(census, store=str(tmp_path / "store"), engine="inline", **{**options, "shard_cells": 16_384})
    left, right = rows(store), rows(tmp_path / "store")
    own = ("latent", "probability", "margin", "entropy", "unit", "unit_row", "run")
    assert same(left, right, but=own)
    a, b = (np.stack(table["latent"].to_pylist()) for table in (left, right))
    assert np.abs(a - b).max() / a.std() <= 1e-5


def test_labels_and_latents_are_those_of_plain_scvi_tools(five_prime, symphony, pbmc, rows, tmp_path):
    """Tolerance 1e-5 of the latent's spread: both sum the same float32 products, in another order."""
    sv.map(five_prime, reference="pbmc", store=str(tmp_path / "s"), keep_obs=["cell_type"], engine="inline", quiet=True)
    table = rows(tmp_path / "s")
    cells = anndata.read_h5ad(symphony)
    query = cells[(cells.obs["batch"] == "5p").to_numpy()].copy()
    query.obs["truth"] = query.obs["cell_type"].astype(str)
    query.obs["cell_type"] = "unknown"  # scvi-tools is not shown the query's labels either
    query = query[table["observation_id"].to_pylist()].copy()
    with quiet():
        model = scvi.model.SCANVI.load(str(pbmc.export(tmp_path / "model")))
        scvi.model.SCANVI.prepare_query_anndata(query, model)
        loaded = scvi.model.SCANVI.load_query_data(query, model)
        loaded.is_trained = True
        latent, label = loaded.get_latent_representation(), loaded.predict()
    ours = np.stack(table["latent"].to_pylist())
    assert np.abs(ours - latent).max() / latent.std() <= 1e-5
    assert table["label"].to_pylist() == list(label)
    truth = query.obs["truth"].to_numpy()
    accuracy = np.mean(truth == np.array(label))
    assert accuracy >= 0.85  # 60 query epochs of scvi-tools reach .94; this model has 15 + 6 epochs of training


def test_the_same_command_again_does_nothing_and_says_so(inline, census):
    store, before, options = inline
    versions = len(Store.open(store).space().versions())
    again = sv.map(census, store=str(store), engine="inline", **options)
    assert (again.state, again.version, again.mapped_units) == ("nothing to do", before.version, 0)
    assert len(Store.open(store).space().versions()) == versions


def test_a_changed_setting_replaces_the_same_cells_in_one_version(census, pbmc, rows, same, tmp_path):
    options = {"reference": "pbmc", "store": str(tmp_path / "s"), "engine": "inline", "quiet": True}
    first = sv.map(census, **options)
    before = rows(tmp_path / "s")
    second = sv.map(census, **options, ambiguous_entropy=0.01, shard_cells=700)
    assert (second.state, second.version) == ("committed", first.version + 1)
    after = rows(tmp_path / "s")
    assert len(after) == 3360
    assert sum(after["ambiguous"].to_pylist()) > sum(before["ambiguous"].to_pylist())
    assert set(after["run"].to_pylist()) == {second.run}
    assert same(rows(tmp_path / "s", as_of=first.version), before)


def test_a_dry_run_leaves_nothing(census, pbmc, tmp_path):
    found = sv.map(census, reference="pbmc", store=str(tmp_path / "s"), dry_run=True, quiet=True)
    assert (found.state, found.cells, found.version) == ("planned", 3360, None)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("engine", ["inline", "ray"])
def test_what_cannot_be_mapped_is_quarantined_with_its_reason(engine, spoil, pbmc, local_ray, rows, tmp_path):
    path, whole = spoil(np.nan)
    options = {"reference": "pbmc", "store": str(tmp_path / "s"), "shard_cells": 300, "engine": engine, "quiet": True}
    result = sv.map(str(path), **options)
    assert (result.exit_status, result.state, result.cells_done) == (4, "committed", whole.n_obs - 300)
    (item,) = result.quarantined
    assert (item.unit.shard.start, item.unit.shard.stop) == (300, 600)
    assert "cell599" in item.reason
    assert "nan" in item.reason
    assert len(rows(tmp_path / "s")) == whole.n_obs - 300
    (run,) = sv.status(tmp_path / "s").runs
    assert run["quarantined"][0]["reason"] == item.reason
    assert sv.map(str(path), **options).mapped_units == 0  # tried again, and quarantined again


def test_fractions_that_the_sample_missed_are_let_through_by_whoever_finishes_the_run(spoil, pbmc, rows, tmp_path):
    path, whole = spoil(2.5)
    options = {"reference": "pbmc", "store": str(tmp_path / "s"), "shard_cells": 300, "engine": "inline", "quiet": True}
    first = sv.map(str(path), **options)
    assert (first.exit_status, first.cells_done) == (4, whole.n_obs - 300)
    assert "has 2.5 of gene" in first.quarantined[0].reason
    second = sv.map(str(path), **options, accept=["counts"])
    assert (second.run, second.mapped_units, second.exit_status) == (first.run, 1, 0)
    assert len(rows(tmp_path / "s")) == whole.n_obs
    with pytest.raises(DataError, match=r"has 2\.5 of gene .* --accept counts\."):
        sv.search(tmp_path / "s", cells=str(path), k=1, quiet=True)
    assert len(sv.search(tmp_path / "s", cells=str(path), k=1, accept=["counts"], quiet=True)) == whole.n_obs


def test_inline_quarantines_what_the_dispatcher_would_and_gives_threads_back(symphony, pbmc, monkeypatch, tmp_path):
    """Any error is tried three times, as on Ray; and the notebook that called goes on with its own threads."""
    import torch

    tried = []

    def flaky(shard, *_, **__):
        tried.append(shard.start)
        raise ConnectionError("gone away")

    monkeypatch.setattr("pipelines.together.read_shared", flaky)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = sv.map(str(symphony), reference="pbmc", store=str(tmp_path / "s"), engine="inline", quiet=True)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert tried == [0, 0, 0]
    assert (found.state, found.quarantined[0].reason) == ("failed", "ConnectionError: gone away")


def test_hits_come_from_one_version_whoever_commits_meanwhile(symphony, pbmc, monkeypatch, tmp_path):
    from pipelines import searching

    store = str(tmp_path / "s")
    options = {"reference": "pbmc", "store": store, "engine": "inline", "quiet": True}
    sv.map(f"{symphony}?filter=batch == '5p'", **options)
    ask = searching.Searcher.stored

    def and_commit(*arguments):
        found = ask(*arguments)
        sv.map(f"{symphony}?filter=batch == '3pv1'", **options)
        return found

    monkeypatch.setattr(searching.Searcher, "stored", and_commit)
    hits = sv.search(store, label="B", k=3, quiet=True)
    assert all(hit["query"] != hit["observation_id"] for hit in hits.to_pylist())


def test_a_copy_of_what_a_file_once_held_does_not_bring_it_back(symphony, pbmc, rows, tmp_path):
    here, store, options = tmp_path / "here" / "query.h5ad", str(tmp_path / "s"), {"engine": "inline", "quiet": True}
    here.parent.mkdir()
    cells = anndata.read_h5ad(symphony)[:300].copy()
    cells.write_h5ad(here)
    sv.map(str(here), reference="pbmc", store=store, **options)
    moved, copy = tmp_path / "there" / "query.h5ad", tmp_path / "backup" / "query.h5ad"
    for other in (moved, copy):
        other.parent.mkdir()
        shutil.copyfile(here, other)
    assert sv.map(str(moved), reference="pbmc", store=store, **options).state == "nothing to do"
    cells.X[:5] *= 2
    cells.write_h5ad(tmp_path / "changed.h5ad")
    (tmp_path / "changed.h5ad").rename(here)
    sv.map(str(here), reference="pbmc", store=store, **options)
    newest = rows(store)
    with pytest.raises(InputError, match=f"'.*{copy}' holds cells that '.*{here}' held before it changed"):
        sv.map(str(copy), reference="pbmc", store=store, **options)
    assert rows(store).equals(newest)
    assert sv.map(str(here), reference="pbmc", store=store, **options).state == "nothing to do"


def test_a_run_without_a_single_mapped_unit_commits_nothing(spoil, pbmc, tmp_path):
    path, _ = spoil(np.nan, cell=1100)
    found = sv.map(str(path), reference="pbmc", store=str(tmp_path / "s"), engine="inline", quiet=True)
    assert (found.state, found.version, found.exit_status) == ("failed", None, 4)
    assert sv.status(tmp_path / "s").runs[0]["state"] == "failed"


@pytest.fixture(scope="module")
def conditional(symphony, home):
    """A registered SCVI whose encoder reads the batch."""
    known = f"{symphony}?filter=batch in ['3pv1', '3pv2']"
    out = home / "conditional-model"
    settings = {"encode_covariates": "True", "n_layers": "2"}
    keys = {"labels_key": "cell_type", "batch_key": "batch", "settings": settings}
    sv.train(known, family="scvi", out=out, genes=500, epochs=3, device="cpu", quiet=True, **keys)
    return sv.reference.add(out, name="conditional")


def test_known_batches_map_with_a_reference_that_encodes_them(conditional, symphony, rows, tmp_path):
    known = f"{symphony}?filter=batch == '3pv1'"
    sv.map(known, reference="conditional", store=str(tmp_path / "s"), engine="inline", quiet=True)
    table = rows(tmp_path / "s")
    latents = conditional.latents()
    own = dict(zip(_ids(conditional), latents.latent, strict=True))
    expected = np.stack([own[key] for key in table["observation_id"].to_pylist()])
    assert np.abs(np.stack(table["latent"].to_pylist()) - expected).max() / expected.std() <= 1e-5
    assert set(table["label"].to_pylist()) <= set(latents.labels) - {None}


def _ids(reference):
    import pyarrow.parquet as pq

    names = pq.read_table(reference.path / "latents.parquet")["observation_id"].to_pylist()
    return [name.partition(":")[2] for name in names]


def test_new_batches_are_refused_without_surgery_and_told_why(conditional, five_prime, tmp_path):
    told = {"reference": "conditional", "store": str(tmp_path / "s"), "engine": "inline", "quiet": True}
    with pytest.raises(NotFitError, match=r"(?s)batch: .*5p.*--surgery auto"):
        sv.map(five_prime, surgery="off", **told)
    assert not (tmp_path / "s").exists()


def test_one_store_holds_several_references(conditional, pbmc, symphony, tmp_path):
    known = f"{symphony}?filter=batch == '3pv1'"
    for name in ("pbmc", "conditional"):
        sv.map(known, reference=name, store=str(tmp_path / "s"), engine="inline", quiet=True)
    assert [space["reference"] for space in sv.status(tmp_path / "s").spaces] == ["conditional", "pbmc"]
    with pytest.raises(InputError, match=r"several spaces.*--reference"):
        sv.search(tmp_path / "s", label="B", quiet=True)
    assert len(sv.search(tmp_path / "s", label="B", k=3, reference="pbmc", quiet=True)) > 0


def test_experiments_written_by_r_map(soma_from_r, old_soma_from_r, home, rows, tmp_path):
    """80 cells of 230 genes, encodings 1.1.0 and 1; the counts of such an experiment lie in its own layer names."""
    found = {}
    for name, folder in (("new", soma_from_r), ("old", old_soma_from_r)):
        source = f"soma:{folder}?measurement=RNA&layer=counts"
        if not found:
            out = home / "r-model"
            sv.train(source, family="scvi", out=out, genes=0, epochs=2, device="cpu", quiet=True)
            sv.reference.add(out, name="from-r")
        sv.map(source, reference="from-r", store=str(tmp_path / name), engine="inline", quiet=True)
        found[name] = rows(tmp_path / name)
    assert len(found["new"]) == len(found["old"]) == 80
    assert found["new"]["latent"].equals(found["old"]["latent"])


def test_the_pancreas_model_maps_cells_of_a_technology_that_it_knows(shared_data, rows, tmp_path):
    """A real SCVI of 2022 without its data, whose encoder reads the study: latents, and null labels, which it says."""
    added = sv.reference.add(shared_data / "models" / "pancreas_scvi_0.16.1_resaved", name="pancreas")
    assert any("null label" in note for note in added.notes)
    query = anndata.read_h5ad(shared_data / "pancreas_2study_cepo.h5ad")
    query.obs["study"] = query.obs["assay"].map({"inDrop": "Pancreas inDrop"}).astype(object).fillna("Smart-seq2")
    query.write_h5ad(tmp_path / "query.h5ad")
    options = {"reference": "pancreas", "keep_obs": ["cell_type"], "engine": "inline", "quiet": True}
    with pytest.raises(NotFitError, match=r"(?s)genes: 114 of 1,000 .*batch: .*\(Smart-seq2\).*surgery"):
        sv.map(str(tmp_path / "query.h5ad"), store=str(tmp_path / "s"), surgery="off", **options)
    known = f"{tmp_path / 'query.h5ad'}?filter=assay == 'inDrop'"
    sv.map(known, store=str(tmp_path / "s"), accept=["genes"], **options)
    assert sv.status(tmp_path / "s").runs[0]["accepted"] == ["genes"]
    table = rows(tmp_path / "s")
    assert len(table) == int((query.obs["assay"] == "inDrop").sum())
    assert table["label"].null_count == len(table)
    # The other technology is new to it: surgery fits an adapter on a model that scvi-tools saved four years ago.
    told = options | {"surgery_cells": 100, "surgery_epochs": 2}
    (adapter,) = sv.map(str(tmp_path / "query.h5ad"), store=str(tmp_path / "both"), accept=["genes"], **told).adapters
    assert (adapter.batch, adapter.state) == ("batch=Smart-seq2", "fitted")
    both = rows(tmp_path / "both", where="adapter IS NULL", columns=["dataset_id", "observation_id", "latent"])
    assert both["latent"].to_pylist() == table["latent"].to_pylist()
    # Beta and ductal cells fall apart in a latent that never saw this study.
    hits = sv.search(tmp_path / "s", stored="cell_type = 'ductal'", k=10, quiet=True)
    assert np.mean([kind == "ductal" for kind in hits["cell_type"].to_pylist()]) > 0.9
