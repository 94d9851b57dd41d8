"""A training that was broken off goes on to what it would have been, bit for bit."""

from __future__ import annotations

import errno
import json

import numpy as np
import pytest
import torch

from scviaduct.errors import InputError
from scviaduct.references.saved.portable import read_model
from scviaduct.references.states import read_state, write_state
from scviaduct.references.training import Options, Recipe, train

EVERY_EPOCH = Options(checkpoint_minutes=0)


class BrokenOffError(Exception):
    """Stands for a kill at the end of an epoch; tests/pipelines kill a process."""


def break_off(name, epoch):
    def listen(model, done, epochs, metrics):
        if metrics and (model, done) == (name, epoch):
            raise BrokenOffError

    return listen


@pytest.fixture(scope="module")
def source(cells, tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "cells.h5ad"
    cells.write_h5ad(path)
    return str(path)


def recipe(family="scanvi", **told):
    small = {"genes": 30, "batch_key": "batch", "labels_key": "cell_type", "device": "cpu", "batch_size": 32}
    stages = {"epochs": 4, "scanvi_epochs": 4, "samples_per_label": 8} if family == "scanvi" else {"epochs": 5}
    return Recipe(family=family, **small | stages | {"settings": {"n_latent": "3", "n_hidden": "8"}} | told)


def same(one, other):
    left, right = read_model(one.path).state_dict, read_model(other.path).state_dict
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
    np.testing.assert_array_equal(one.latents().latent, other.latents().latent)
    metrics = [(made.path / "metrics.csv").read_text() for made in (one, other)]
    assert metrics[0] == metrics[1]
    assert one.genes == other.genes


def went_on(source, told, folder, at):
    """Train with a break, and again; what was said."""
    lines, seen = [], []
    with pytest.raises(BrokenOffError):
        train(source, told, folder, break_off(*at), EVERY_EPOCH)
    options = Options(checkpoint_minutes=0, say=lines.append)
    made = train(source, told, folder, lambda *event: seen.append(event[:3]), options)
    assert lines == [f"going on with the training in {folder.parent / f'.{folder.name}.training'}"]
    assert sorted(path.name for path in folder.parent.iterdir() if path.name.startswith(f".{folder.name}")) == []
    return made, seen


def test_a_scvi_goes_on(source, tmp_path):
    # A schedule of the learning rate that falls every other epoch, and a metric to stop by: both have a state.
    plan = {"reduce_lr_on_plateau": "True", "lr_patience": "1", "lr_threshold": "1e6", "lr": "0.01"}
    told = recipe("scvi", plan=plan, early_stopping=True, patience=3)
    whole = train(source, told, tmp_path / "whole")
    made, seen = went_on(source, told, tmp_path / "broken", ("SCVI", 4))
    assert seen == [("SCVI", 3, 5), ("SCVI", 4, 5), ("SCVI", 5, 5)]
    same(whole, made)
    assert made.verify().ok
    rates = {line.split(",")[2] for line in (made.path / "metrics.csv").read_text().splitlines()[1:]}
    assert len(rates) > 1


def test_a_scanvi_goes_on_in_its_second_model(source, tmp_path):
    whole = train(source, recipe(), tmp_path / "whole")
    made, seen = went_on(source, recipe(), tmp_path / "broken", ("SCANVI", 3))
    assert seen == [("SCANVI", 2, 4), ("SCANVI", 3, 4), ("SCANVI", 4, 4)]
    same(whole, made)
    assert made.provenance["epochs"] == {"SCVI": 4, "SCANVI": 4}


@pytest.mark.slow
def test_a_scanvi_goes_on_in_its_first_model(source, tmp_path):
    whole = train(source, recipe(), tmp_path / "whole")
    made, seen = went_on(source, recipe(), tmp_path / "broken", ("SCVI", 3))
    assert seen[:2] == [("SCVI", 2, 4), ("SCVI", 3, 4)]
    assert seen[3:] == [("SCANVI", done, 4) for done in range(5)]
    same(whole, made)


@pytest.fixture
def broken(source, tmp_path):
    """A training that was broken off after its second epoch of five."""
    with pytest.raises(BrokenOffError):
        train(source, recipe("scvi"), tmp_path / "out", break_off("SCVI", 2), EVERY_EPOCH)
    return tmp_path / "out"


def test_another_recipe_is_refused(source, broken, cells, tmp_path):
    folder = broken.parent / ".out.training"
    assert {path.name for path in folder.iterdir()} == {"record.json", "checkpoint-0.safetensors"}
    with pytest.raises(InputError, match=r"differs in epochs \(5, now 6\), seed \(0, now 1\)\. Start over: --restart;"):
        train(source, recipe("scvi", epochs=6, seed=1), broken)
    changed = cells[10:].copy()
    changed.write_h5ad(tmp_path / "other.h5ad")
    with pytest.raises(InputError, match="differs in source, source_version"):
        train(str(tmp_path / "other.h5ad"), recipe("scvi"), broken)
    made = train(source, recipe("scvi", epochs=1), broken, options=Options(restart=True))
    assert made.provenance["epochs"] == {"SCVI": 1}
    assert not folder.exists()


def test_what_does_not_decide_the_result_may_change(source, broken):
    told = recipe(
        "scvi", with_counts=True, calibrate_by="none", device="auto" if not torch.cuda.is_available() else "cpu"
    )
    assert train(source, told, broken).provenance["epochs"] == {"SCVI": 5}


def test_a_work_folder_runs_nothing(source, broken):
    """A checkpoint is data: one that was swapped for a pickle is refused, and one for other weights too."""
    folder = broken.parent / ".out.training"
    path = folder / "checkpoint-0.safetensors"
    whole = path.read_bytes()
    path.write_bytes(b"PK\x03\x04 not a state")
    with pytest.raises(InputError, match=r"holds no state of a training .*--restart"):
        train(source, recipe("scvi"), broken)
    path.write_bytes(whole)
    state = read_state(path)
    state["state_dict"].popitem()
    write_state(state, path)
    with pytest.raises(RuntimeError, match="Missing key"):
        train(source, recipe("scvi"), broken)
    record = folder / "record.json"
    record.write_text(json.dumps(["nothing"]))
    with pytest.raises(InputError, match=r"record\.json cannot be read .*--restart"):
        train(source, recipe("scvi"), broken)


def test_two_processes_do_not_train_into_one_folder(source, tmp_path):
    told = recipe("scvi", epochs=1)

    def inside(*_):
        train(source, told, tmp_path / "out")

    with pytest.raises(InputError, match=r"Another process is training into '\.out\.training'\. Wait for it"):
        train(source, told, tmp_path / "out", inside)


# filelock says that it locks by a file's being there instead.
@pytest.mark.filterwarnings("ignore:flock not supported on this filesystem")
def test_a_file_system_without_locks_is_trained_on(source, tmp_path, monkeypatch):
    def lacking(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", lacking)
    told = recipe("scvi", epochs=1)

    def inside(*_):
        train(source, told, tmp_path / "out")

    with pytest.raises(InputError, match="Another process is training"):
        train(source, told, tmp_path / "out", inside)


def test_a_loss_that_is_no_number_ends_training(source, tmp_path):
    with pytest.raises(InputError, match=r"SCVI (is (nan|inf) after epoch \d+|diverged: .*)\. Learn more slowly"):
        train(source, recipe("scvi", plan={"lr": "1e30"}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
