"""Surgery within a run: fitted once, on Ray or not, kept, reused, and never in the way of cells that need none."""

from __future__ import annotations

import anndata
import numpy as np
import pytest

import pipelines as sv
from scviaduct.errors import InputError, NotFitError
from scviaduct.store import Store
from scviaduct.values import Settings

EPOCHS = 3


@pytest.fixture(scope="module")
def encoding(symphony, home, tmp_path_factory):
    """A SCANVI of 3' v1 whose encoder reads the batch: two halves of it, so that it knows two."""
    folder = tmp_path_factory.mktemp("encoding")
    cells = anndata.read_h5ad(symphony)
    cells = cells[(cells.obs["batch"] == "3pv1").to_numpy()].copy()
    cells.obs["batch"] = np.where(np.arange(cells.n_obs) % 2, "odd", "even")
    cells.write_h5ad(folder / "known.h5ad")
    keys = {"labels_key": "cell_type", "batch_key": "batch", "settings": {"encode_covariates": "True"}}
    told = {"genes": 400, "epochs": 3, "scanvi_epochs": 2, "device": "cpu", "quiet": True}
    sv.train(str(folder / "known.h5ad"), family="scanvi", out=str(folder / "encoding"), **keys, **told)
    return sv.reference.add(str(folder / "encoding"), name="encoding")


@pytest.fixture(scope="module")
def query(symphony, tmp_path_factory):
    """Every cell: those of 3' v1 under names that the reference knows, the others of two new batches."""
    cells = anndata.read_h5ad(symphony)
    own = (cells.obs["batch"] == "3pv1").to_numpy()
    names = np.where(np.cumsum(own) % 2, "even", "odd")
    cells.obs["batch"] = np.where(own, names, cells.obs["batch"].astype(str))
    path = tmp_path_factory.mktemp("query") / "query.h5ad"
    cells.write_h5ad(path)
    return str(path)


OPTIONS = {"reference": "encoding", "keep_obs": ["batch"], "shard_cells": 400, "surgery_epochs": EPOCHS, "quiet": True}


@pytest.fixture(scope="module")
def inline(encoding, query, tmp_path_factory):
    store = tmp_path_factory.mktemp("inline") / "store"
    return store, sv.map(query, store=str(store), engine="inline", **OPTIONS)


def test_new_batches_get_adapters_and_known_cells_none(inline, rows):
    store, result = inline
    assert result.state == "committed"
    assert {item.batch: item.state for item in result.adapters} == {"batch=3pv2": "fitted", "batch=5p": "fitted"}
    table = rows(store).to_pandas()
    addresses = {item.batch.removeprefix("batch="): item.adapter for item in result.adapters}
    for batch, part in table.groupby("batch", observed=True):
        assert set(part["adapter"]) == {addresses.get(batch)}, batch
    assert "surgery" in result.seconds
    assert sum(item.cells for item in result.adapters) == (table["adapter"].notna()).sum()


def test_cells_that_the_reference_knows_are_as_without_any_adapter(inline, encoding, query, rows, tmp_path):
    store, _ = inline
    known = f"{query}?filter=batch in ['even', 'odd']"
    sv.map(known, store=str(tmp_path / "s"), engine="inline", **OPTIONS | {"surgery": "off"})
    alone = rows(tmp_path / "s", columns=["dataset_id", "observation_id", "latent", "label", "probability"])
    mixed = rows(store, columns=["dataset_id", "observation_id", "latent", "label", "probability", "adapter"])
    mixed = mixed.filter(mixed["adapter"].is_null()).drop_columns(["adapter"])
    assert len(alone) == len(mixed) > 300
    for column in alone.column_names[1:]:
        assert alone[column].to_pylist() == mixed[column].to_pylist(), column


def test_ray_equals_one_process_row_for_row(inline, encoding, query, local_ray, rows, tmp_path):
    store, _ = inline
    result = sv.map(query, store=str(tmp_path / "s"), actors=2, readers=1, **OPTIONS)
    assert {item.state for item in result.adapters} == {"fitted"}
    ours, theirs = rows(tmp_path / "s"), rows(store)
    for column in ("observation_id", "latent", "label", "probability", "margin", "entropy", "adapter", "unit"):
        assert ours[column].to_pylist() == theirs[column].to_pylist(), column


def test_a_run_again_does_nothing_and_a_part_of_it_reuses(inline, query, rows, tmp_path):
    store, first = inline
    again = sv.map(query, store=str(store), engine="inline", **OPTIONS)
    assert (again.state, again.run, again.version) == ("nothing to do", first.run, first.version)
    assert {item.state for item in again.adapters} == {"reused"}
    assert "surgery" not in again.seconds
    addresses = {item.batch: item.adapter for item in first.adapters}
    # Another cut is sampled anew and comes to the same cells.
    other = sv.map(query, store=str(store), engine="inline", **OPTIONS | {"shard_cells": 700})
    assert {item.batch: item.adapter for item in other.adapters} == addresses
    assert {item.state for item in other.adapters} == {"reused"}
    planned = sv.map(query, store=str(store), engine="inline", dry_run=True, **OPTIONS | {"shard_cells": 700})
    assert (planned.state, planned.run) == ("planned", other.run)


def test_a_dry_run_names_what_would_be_fitted(encoding, query, tmp_path):
    planned = sv.map(query, store=str(tmp_path / "s"), dry_run=True, **OPTIONS)
    assert [(item.batch, item.state) for item in planned.adapters] == [("batch=3pv2", "to fit"), ("batch=5p", "to fit")]
    assert planned.run == ""
    assert not (tmp_path / "s").exists()
    finding = next(item for item in planned.report.findings if item.name == "batch")
    assert finding.level == "ok"
    assert "2" in finding.message


def test_a_latent_that_cannot_move_needs_no_surgery_and_the_report_says_why(pbmc, five_prime, rows, tmp_path):
    told = {"reference": "pbmc", "engine": "inline", "quiet": True}
    result = sv.map(five_prime, store=str(tmp_path / "auto"), **told)
    assert result.adapters == ()
    finding = next(item for item in result.report.findings if item.name == "batch")
    assert "encode_covariates=False" in finding.message
    # Fitted for what is decoded, adapters leave every latent as it was, to the bit.
    decoder = sv.map(five_prime, store=str(tmp_path / "decoder"), surgery="decoder", surgery_epochs=1, **told)
    assert [item.state for item in decoder.adapters] == ["fitted"]
    plain, fitted = rows(tmp_path / "auto"), rows(tmp_path / "decoder")
    for column in ("observation_id", "latent", "label", "probability", "entropy"):
        assert plain[column].to_pylist() == fitted[column].to_pylist(), column
    assert set(fitted["adapter"].to_pylist()) == {decoder.adapters[0].adapter}


@pytest.mark.parametrize("engine", ["inline", "ray"])
def test_a_shard_that_cannot_be_read_is_left_out_of_the_sample(encoding, spoil, local_ray, rows, engine, tmp_path):
    path, _ = spoil(-3.0, cell=800)
    told = {"reference": "encoding", "surgery_epochs": 1, "surgery_cells": 50, "engine": engine, "quiet": True}
    result = sv.map(str(path), store=str(tmp_path / "s"), shard_cells=3000, **told)
    assert [item.state for item in result.adapters] == ["fitted"]
    assert (result.state, len(result.quarantined), result.exit_status) == ("committed", 1, 4)
    assert set(rows(tmp_path / "s")["adapter"].to_pylist()) == {result.adapters[0].adapter}


def test_a_batch_without_a_shard_that_can_be_read_has_no_adapter(encoding, spoil, tmp_path):
    path, _ = spoil(-3.0, cell=700)
    told = {"reference": "encoding", "shard_cells": 100_000, "engine": "inline", "quiet": True}
    # Every cell is sampled, the bad one among them.
    result = sv.map(str(path), store=str(tmp_path / "s"), surgery_cells=100_000, surgery_epochs=1, **told)
    assert [item.state for item in result.adapters] == ["failed"]
    assert "-3" in result.adapters[0].reason
    assert (result.state, result.version) == ("failed", None)
    assert "-3" in result.quarantined[0].reason


def test_a_command_that_cannot_be_is_refused_before_anything_is_read(encoding, query, tmp_path):
    store = str(tmp_path / "s")
    for told, expected in (
        ({"surgery": "yes"}, "--surgery 'yes'.*auto, decoder, off"),
        ({"surgery_cells": 0}, "--surgery-cells 0"),
        ({"surgery_epochs": -1}, "--surgery-epochs -1"),
        ({"background": ["guide"]}, "a SCANVI tells no background"),
    ):
        with pytest.raises(InputError, match=f"(?s){expected}"):
            sv.map(query, store=store, **OPTIONS | told)
    assert not (tmp_path / "s").exists()


def test_a_missing_or_incomplete_batch_column_stops_before_surgery(encoding, query, tmp_path):
    cells = anndata.read_h5ad(query)
    cells.obs["batch"] = cells.obs["batch"].astype(object)
    cells.obs.loc[cells.obs_names[3], "batch"] = None
    cells.write_h5ad(tmp_path / "nan.h5ad")
    with pytest.raises(NotFitError, match=r"(?s)1 of 1,500 cells have no value in obs column 'batch'"):
        sv.map(str(tmp_path / "nan.h5ad"), store=str(tmp_path / "s"), **OPTIONS | {"keep_obs": []})
    del cells.obs["batch"]
    cells.write_h5ad(tmp_path / "none.h5ad")
    with pytest.raises(NotFitError, match=r"(?s)'batch' is not in .*--batch-key"):
        sv.map(str(tmp_path / "none.h5ad"), store=str(tmp_path / "s"), **OPTIONS | {"keep_obs": []})
    assert not (tmp_path / "s").exists()


def test_search_with_cells_of_new_batches_says_what_to_do(inline, query):
    store, _ = inline
    with pytest.raises(InputError, match=r"(?s)batch=3pv2.*Map them into the store"):
        sv.search(str(store), cells=query, quiet=True)
    hits = sv.search(str(store), stored="batch = '5p'", k=3, quiet=True)
    assert hits.num_rows


@pytest.mark.slow
@pytest.mark.cluster
def test_a_worker_killed_while_it_fits_loses_nothing(inline, encoding, query, cli, rows, tmp_path):
    store, _ = inline
    marker = tmp_path / "fitted"
    told = ["--reference", encoding.path, "--store", tmp_path / "s", "--keep-obs", "batch", "--shard-cells", 400]
    done = cli(
        *("map", query, *told, "--surgery-epochs", EPOCHS, "--address", "local", "--quiet"),
        SCVIADUCT_FAULT=f"fitted@{marker}",
    )
    assert done.returncode == 0, done.stderr
    assert marker.exists()
    # What the killed worker had put on the shelf is found there.
    told = next(
        line for line in done.stdout.splitlines() if line.startswith("Adapters for 2 new batches (1,138 cells)")
    )
    assert "1 fitted" in told
    assert "1 reused" in told
    ours, theirs = rows(tmp_path / "s"), rows(store)
    for column in ("observation_id", "latent", "label", "adapter"):
        assert ours[column].to_pylist() == theirs[column].to_pylist(), column


def test_adapters_lie_in_the_space_and_the_run_names_them(inline):
    store, result = inline
    space = Store.open(store).space()
    assert {told["digest"] for told in space.adapters.manifests()} >= {item.adapter for item in result.adapters}
    plan = Store.open(store).plan(result.run)
    assert sorted(address for _, address in plan["adapters"]) == sorted(item.adapter for item in result.adapters)
    assert Settings(**plan["settings"]).neighbors == 15
