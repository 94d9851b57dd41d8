"""An encoder with adapters: the right one for every cell, and nothing else changed by a bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from scviaduct.errors import DataError, StoreError
from scviaduct.families.vae import quiet
from scviaduct.mapping.adapters import Adapter, Shelf, address
from scviaduct.mapping.batches import QueryBatch, group_columns, query_batches
from scviaduct.mapping.decoding import AVERAGE, Decoder, Wanted
from scviaduct.mapping.fitting import Training
from scviaduct.mapping.fleet import Fleet
from scviaduct.mapping.mapper import Mapper, model_columns
from scviaduct.mapping.picking import subset
from scviaduct.mapping.reading import read_block
from scviaduct.mapping.sampling import sample_batches
from scviaduct.mapping.surgery import Job, Surgeon, Surgery, memo_key, recalled, trained_kl_weight
from scviaduct.sources import open_source
from scviaduct.values import Settings

SURGERY = Surgery(training=Training(epochs=4, batch_size=32))
SETTINGS = Settings()


@pytest.fixture
def query(make_cells, write):
    """Cells of a known batch, of two new ones, and of a new sex in a known and in a new batch."""
    cells = make_cells(300, seed=5)
    at = np.arange(300) % 5
    cells.obs["batch"] = np.array(["b1", "new1", "new2", "b0", "new1"])[at]
    cells.obs["sex"] = np.array(["f", "m", "f", "x", "x"])[at]
    return str(write(cells))


@pytest.fixture
def operate(conditional, tmp_path):
    """Fit everything that a source needs: the adapters, the batches and the scan."""

    def operate(uri, surgery=SURGERY, shard_cells=1000):
        with open_source(uri) as source:
            scan = source.scan(shard_cells, (), group_columns(conditional, SETTINGS))
        found = query_batches(conditional, SETTINGS, scan)
        shelf = Shelf(str(tmp_path / "adapters"))
        there, jobs = recalled(found, shelf, conditional, surgery)
        surgeon = Surgeon(conditional, SETTINGS, surgery, shelf) if jobs else None
        for job in jobs:
            done = surgeon.run(job)
            assert not done.failures
            there |= done.addresses
        return Fleet(shelf, there), found, scan

    return operate


def block_of(reference, scan):
    columns = dict.fromkeys([*model_columns(reference, SETTINGS), *group_columns(reference, SETTINGS)])
    return read_block(scan.shards[0], reference, tuple(columns))


def test_reference_cells_among_query_cells_change_by_exactly_nothing(conditional, query, operate):
    fleet, _, scan = operate(query)
    block = block_of(conditional, scan)
    known = np.flatnonzero(np.array(block.obs["batch"].to_pylist()) == "b1")
    alone = Mapper(conditional, SETTINGS).map(subset(block, known))
    mixed = Mapper(conditional, SETTINGS, fleet=fleet).map(block)
    for field in ("latent", "label", "probability", "margin", "entropy"):
        assert np.array_equal(getattr(mixed, field)[known], getattr(alone, field), equal_nan=True), field
    assert (mixed.adapter[known] == -1).all()
    assert (mixed.adapter >= 0).sum() == 300 - len(known)


def test_each_cell_gets_what_scvi_tools_gives_with_columns_where_they_belong(conditional, query, operate):
    fleet, found, scan = operate(query)
    assert [batch.name for batch in found.cells] == ["batch=new1", "batch=new1, sex=x", "batch=new2", "sex=x"]
    block = block_of(conditional, scan)
    mapped = Mapper(conditional, SETTINGS, fleet=fleet).map(block)
    decoder = Decoder(conditional, SETTINGS, fleet)
    cells, counted = decoder.cells(Wanted.of(conditional, SETTINGS, fleet, ()).read(scan.shards[0], conditional), (), 0)
    with quiet():
        expected = decoder.model.get_latent_representation(cells.data)
    difference = np.abs(mapped.latent[counted] - expected) / expected.std(axis=0)
    assert difference.max() < 1e-5
    # Two adapters of one batch value have names of their own; a third covariate value is no category of the reference.
    assert set(cells.data.obs["batch"]) == {"b0", "b1", "new1", "new2", "new1 (batch=new1, sex=x)"}
    assert AVERAGE in decoder.model.adata_manager.get_state_registry("batch")["categorical_mapping"]


def test_batches_fitted_together_equal_batches_fitted_alone(conditional, query, operate, tmp_path):
    fleet, found, scan = operate(query)
    told = conditional, SETTINGS, list(found.cells), SURGERY.cells, SURGERY.training.seed
    samples = sample_batches(scan.shards, *told)
    for batch in reversed(found.cells):
        alone = Surgeon(conditional, SETTINGS, SURGERY, Shelf(str(tmp_path / "other"))).fit(batch, samples[batch])
        expected = fleet.shelf.get(fleet.addresses[batch])
        assert alone.digest == expected.digest
        for part, other in ((alone.vectors, expected.vectors), (alone.encoder, expected.encoder)):
            assert part.keys() == other.keys() == {name for name, _ in batch.values}
            for name, vectors in other.items():
                assert all((part[name][slot] == vector).all() for slot, vector in vectors.items())


def test_the_cut_into_shards_and_the_version_do_not_enter(conditional, query, operate):
    fleet, found, _ = operate(query)
    _, jobs = recalled(found, fleet.shelf, conditional, SURGERY)
    assert not jobs  # remembered without reading
    cut, _, _ = operate(query, shard_cells=37)  # other shards: sampled again, and found to be the same
    assert cut.addresses == fleet.addresses
    assert len(fleet.shelf.manifests()) == len(fleet.addresses)
    other, _, _ = operate(query, replace(SURGERY, cells=20))
    assert not set(other.addresses.values()) & set(fleet.addresses.values())


def test_an_adapter_holds_kilobytes_and_comes_back_as_it_was(conditional, query, operate, tmp_path):
    fleet, _, _ = operate(query)
    for told in fleet.shelf.manifests():
        assert told["bytes"] < 30_000
        adapter = fleet.shelf.get(told["digest"])
        adapter.save(tmp_path / "copy" / adapter.digest)
        again = Adapter.load(tmp_path / "copy" / adapter.digest)
        assert again.batch == adapter.batch
        assert again.facts == adapter.facts
        assert {name: list(rows) for name, rows in again.encoder.items()} == {
            name: list(rows) for name, rows in adapter.encoder.items()
        }
        assert all(
            (again.vectors[name][slot] == vector).all()
            for name, vectors in adapter.vectors.items()
            for slot, vector in vectors.items()
        )


def test_a_damaged_or_dropped_adapter_is_named(conditional, query, operate):
    fleet, _, scan = operate(query)
    where = next(iter(fleet.addresses.values()))
    (fleet.shelf.path(where) / "adapter.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(StoreError, match="holds no adapter"):
        Mapper(conditional, SETTINGS, fleet=fleet).map(block_of(conditional, scan))
    fleet.shelf.drop(where)
    assert not fleet.shelf.has(where)
    missing = replace(fleet, addresses={b: a for b, a in fleet.addresses.items() if a != where})
    with pytest.raises(DataError, match="There is no adapter for batch=new1"):
        Mapper(conditional, SETTINGS, fleet=missing).map(block_of(conditional, scan))


def test_what_was_learnt_before_a_batch_failed_maps_the_next_block(conditional, query, operate):
    fleet, found, scan = operate(query)
    *learnt, failed = found.cells
    addresses = {batch: fleet.addresses[batch] for batch in learnt}
    fleet = replace(fleet, addresses=addresses, failures={failed: "the loss is NaN"})
    block, mapper = block_of(conditional, scan), Mapper(conditional, SETTINGS, fleet=fleet)
    with pytest.raises(DataError, match="the loss is NaN"):
        mapper.map(block)
    some = subset(block, np.flatnonzero(np.array(block.obs["batch"].to_pylist()) == "new2"))
    alone = Mapper(conditional, SETTINGS, fleet=fleet).map(some)
    assert np.array_equal(mapper.map(some).latent, alone.latent)


def test_a_batch_of_which_nothing_can_be_read_fails_by_itself(conditional, make_cells, write, tmp_path):
    cells = make_cells(60, seed=2)
    cells.obs["batch"] = ["bad" if i < 30 else "good" for i in range(60)]
    cells.X.data[:5] = -1
    uri = str(write(cells))
    with open_source(uri) as source:
        scan = source.scan(30, (), group_columns(conditional, SETTINGS))
    found = query_batches(conditional, SETTINGS, scan)
    bad, good = found.cells
    shelf = Shelf(str(tmp_path / "adapters"))
    keys = {batch: memo_key(batch, found.shards_of(batch), conditional, SURGERY) for batch in found.cells}
    job = Job(tuple(keys.items()), scan.shards)
    done = Surgeon(conditional, SETTINGS, SURGERY, shelf).run(job)
    assert set(done.addresses) == {good}
    assert "is not a count" in done.failures[bad]
    assert shelf.recall(keys[good]) is None  # a mended shard is to be sampled


def test_addresses_tell_apart_what_decides_an_adapter():
    batch = QueryBatch((("batch", "B1"),))
    base = address("reference", batch, "sample", SURGERY)
    assert base == address("reference", batch, "sample", replace(SURGERY, mode="decoder"))
    others = [
        address("other", batch, "sample", SURGERY),
        address("reference", QueryBatch((("batch", "B2"),)), "sample", SURGERY),
        address("reference", batch, "another", SURGERY),
        address("reference", batch, "sample", replace(SURGERY, cells=3)),
        address("reference", batch, "sample", replace(SURGERY, training=replace(SURGERY.training, kl_weight=0.5))),
    ]
    assert len({base, *others}) == 6


def test_the_weight_of_divergences_is_that_of_the_references_training(conditional):
    assert trained_kl_weight(conditional) == pytest.approx(1 / 400)  # one epoch of a warm-up of 400
    asked = {"recipe": {"plan": {"n_epochs_kl_warmup": "2"}}, "epochs": {"SCVI": 1}}
    assert trained_kl_weight(replace(conditional, provenance=asked)) == 0.5
    assert trained_kl_weight(replace(conditional, provenance={})) == 0.25
    assert trained_kl_weight(replace(conditional, provenance={}, family="PEAKVI")) == 1.0
