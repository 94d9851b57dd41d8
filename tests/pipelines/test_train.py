"""The ``train`` command: job files, what it says, and a process that is killed and started again."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest
import torch

import pipelines as sv
from pipelines.jobs import TrainJob
from scviaduct.errors import InputError, PackageError
from scviaduct.references.package import Reference
from scviaduct.references.saved.portable import read_model
from scviaduct.references.states import read_state

SMALL = ("--genes", "300", "--set", "n_latent=4", "--set", "n_hidden=16", "--device", "cpu", "--batch-key", "batch")


def wait_for_epoch(folder, epoch, process):
    """Until a checkpoint of so many epochs is there."""
    checkpoint = folder / "checkpoint-0.safetensors"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if checkpoint.is_file():
            try:
                if read_state(checkpoint)["epoch"] >= epoch:
                    return
            except PackageError:  # it was replaced between the two
                pass
        time.sleep(0.02)
    pytest.fail(f"no checkpoint of epoch {epoch} in {folder}")


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_bits(cli, symphony, tmp_path):
    command = ("train", symphony, "--family", "scvi", "--epochs", "25", "--checkpoint-minutes", "0", *SMALL)
    started = cli(*command, "--out", tmp_path / "killed", background=True, OMP_NUM_THREADS="1")
    wait_for_epoch(tmp_path / ".killed.training", 4, started)
    os.kill(started.pid, signal.SIGKILL)
    started.communicate()
    assert started.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    again = cli(*command, "--out", tmp_path / "killed", OMP_NUM_THREADS="1")
    assert again.returncode == 0, again.stderr
    assert f"going on with the training in {tmp_path / '.killed.training'}" in again.stderr
    assert "training SCVI: 25 epochs, going on after epoch" in again.stderr
    settings = {"n_latent": "4", "n_hidden": "16"}
    whole = {"genes": 300, "settings": settings, "device": "cpu", "batch_key": "batch", "epochs": 25, "quiet": True}
    sv.train(str(symphony), family="scvi", out=tmp_path / "whole", **whole)
    killed, undisturbed = (Reference.load(tmp_path / name) for name in ("killed", "whole"))
    left, right = read_model(killed.path).state_dict, read_model(undisturbed.path).state_dict
    assert all(torch.equal(left[name], right[name]) for name in right)
    np.testing.assert_array_equal(killed.latents().latent, undisturbed.latents().latent)
    assert (killed.path / "metrics.csv").read_bytes() == (undisturbed.path / "metrics.csv").read_bytes()
    assert killed.provenance["epochs"] == {"SCVI": 25}
    assert killed.verify().ok
    assert {path.name for path in tmp_path.iterdir()} == {"killed", "whole"}


def test_a_job_file_trains_and_flags_win(cli, symphony, tmp_path):
    job = tmp_path / "job.toml"
    job.write_text(
        f'source = "{symphony}"\nfamily = "scvi"\nout = "{tmp_path / "job"}"\nepochs = 9\ngenes = 100\n'
        'batch_key = "batch"\nlabels_key = "cell_type"\ndevice = "cpu"\nrecipe = "scarches"\nearly_stopping = true\n'
        "[settings]\nn_latent = 3\nn_hidden = 8\ndropout_rate = 0.1\n[plan]\nlr = 0.002\n"
    )
    done = cli("train", "--job", job, "--epochs", "2", "--out", tmp_path / "flag")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        f"Trained {tmp_path / 'flag'}. Register it: scviaduct reference add {tmp_path / 'flag'} --name NAME\n"
    )
    assert "training SCVI: 2 epochs" in done.stderr
    assert "training SCVI: epoch 2 of 2, loss " in done.stderr
    assert ", validation loss " in done.stderr
    made = Reference.load(tmp_path / "flag")
    told = made.provenance["recipe"]
    assert (told["epochs"], told["preset"], told["plan"], told["early_stopping"]) == (
        2,
        "scarches",
        {"lr": "0.002"},
        True,
    )
    assert (made.n_latent, made.encode_covariates, told["settings"]["dropout_rate"]) == (3, True, "0.1")
    assert {path.name for path in tmp_path.iterdir()} == {"job.toml", "flag"}


WRONG = {
    "key": ('famly = "scvi"\n', r"unknown key 'famly' \(do you mean 'family'\?\)"),
    "start": ('start_from = "x"\n', "unknown key 'start_from'"),
    "kind": ('family = "scvi"\nout = "m"\nepochs = "many"\n', r"'epochs' is 'many': input should be a valid integer"),
    "missing": ('family = "scvi"\n', "'out' is missing"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_job_file_that_is_wrong(case, tmp_path):
    text, message = WRONG[case]
    job = tmp_path / "job.toml"
    job.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        TrainJob.of(job, {"source": "cells.h5ad"})
    assert 'family = "scanvi"' in caught.value.remedy


def test_a_job_file_names_where_training_starts(tmp_path):
    job = tmp_path / "job.toml"
    job.write_text('source = "a.h5ad"\nfamily = "scanvi"\nout = "m"\nfrom = "pbmc"\n')
    assert TrainJob.of(job, {}).start == "pbmc"
    assert TrainJob.of(job, {"from": "other"}).model_dump()["start"] == "other"


def test_pairs_without_a_value_are_refused(cli, symphony, tmp_path):
    done = cli("train", symphony, "--family", "scvi", "--out", tmp_path / "m", "--plan", "lr")
    assert done.returncode == 2
    assert "--plan lr: there is no '='. Write NAME=VALUE, e.g. --plan lr=0.0005." in done.stderr
