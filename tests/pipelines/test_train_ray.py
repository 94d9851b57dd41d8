"""Training in an actor gives what training here gives; a lost actor goes on, an error comes back, several train one."""

from __future__ import annotations

import json
import os
import re
import signal

import numpy as np
import pytest

import pipelines as sv
from cluster.connect import Resources, connect
from pipelines import remote
from pipelines.remote import Machine, train_on_ray
from scviaduct.errors import EngineError, InputError
from scviaduct.families import Recipe
from scviaduct.references.package import Reference
from scviaduct.references.saved.portable import read_model
from scviaduct.references.training import Options
from scviaduct.references.training import train as train_here

KEYS = {"batch_key": "batch", "labels_key": "cell_type"}
SMALL = {"n_latent": "3", "n_hidden": "8"}
ONE = Machine(cpus=1, gpus=0, gpu=False)


@pytest.fixture(scope="module")
def few(symphony, tmp_path_factory):
    """200 real cells in a file."""
    import anndata

    cells = anndata.read_h5ad(symphony)[::8, :300].copy()
    path = tmp_path_factory.mktemp("few") / "cells.h5ad"
    cells.write_h5ad(path)
    return path


def recipe(**told):
    return Recipe(family="scvi", **{**KEYS, "genes": 0, "epochs": 6, "device": "cpu", "settings": SMALL, **told})


@pytest.fixture(scope="module")
def alone(few, tmp_path_factory):
    """What training here gives."""
    return train_here(str(few), recipe(), tmp_path_factory.mktemp("alone") / "package")


def weights(package):
    return {name: value.numpy() for name, value in read_model(package).state_dict.items()}


def same(package, other):
    ours, theirs = weights(package), weights(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


class Listener:
    """Hears of a training, and may kill the process that does it."""

    def __init__(self, kill_after=None, times=1):
        self.lines, self.epochs, self._kill_after, self._times = [], [], kill_after, times

    def say(self, line):
        self.lines.append(line)

    @property
    def pids(self):
        return [int(found[1]) for line in self.lines if (found := re.search(r"in process (\d+) on cpu", line))]

    def on_epoch(self, model, done, epochs, metrics):
        self.epochs.append((model, done, epochs, sorted(metrics)))
        if self._times and done == self._kill_after and metrics:
            self._times -= 1
            os.kill(self.pids[-1], signal.SIGKILL)


def run(few, out, heard, machine=ONE, told=None, **options):
    options = Options(checkpoint_minutes=0, **options)
    return train_on_ray(str(few), told or recipe(), out, options, machine, heard.on_epoch, heard.say)


def test_an_actor_trains_as_this_process_does(local_ray, few, alone, tmp_path):
    heard = Listener()
    made = run(few, tmp_path / "package", heard)
    assert made == tmp_path / "package"
    assert Reference.load(made).digest
    same(made, alone.path)
    assert heard.pids != [os.getpid()]
    assert [done for _, done, _, _ in heard.epochs] == [0, 1, 2, 3, 4, 5, 6]
    assert "elbo_validation" in heard.epochs[-1][3]
    assert not list(tmp_path.glob(".*"))


def test_a_killed_actor_goes_on_from_its_checkpoint(local_ray, few, alone, tmp_path):
    heard = Listener(kill_after=3)
    same(run(few, tmp_path / "package", heard), alone.path)
    assert len(set(heard.pids)) == 2
    done = [done for _, done, _, _ in heard.epochs]
    assert done[:4] == [0, 1, 2, 3]
    assert done[4] >= 2
    assert done[-1] == 6
    assert done.count(1) == 1  # the second did not begin anew
    lost = [line for line in heard.lines if "the training was lost" in line]
    assert len(lost) == 1
    assert lost[0].endswith("going on from its checkpoint, attempt 2 of 4")


@pytest.mark.slow
def test_it_gives_up_and_the_same_command_goes_on(local_ray, few, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "RESTARTS", 0)
    with pytest.raises(EngineError, match=r"lost 1 times.* run the same command"):
        run(few, tmp_path / "package", Listener(kill_after=3))
    assert list(tmp_path.glob(".package.training/checkpoint-*"))
    heard = Listener()
    same(run(few, tmp_path / "package", heard), alone.path)
    assert any("going on with the training" in line for line in heard.lines)


def test_an_error_comes_back_as_it_is(local_ray, few, tmp_path):
    with pytest.raises(InputError, match=r"obs column 'batches' is not in .*\. There are: batch"):
        run(few, tmp_path / "package", Listener(), told=recipe(batch_key="batches"))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_engine_of_the_interface(local_ray, few, alone, tmp_path, monkeypatch):
    """Through the public function, with relative places, in the Ray that this process is connected to."""
    told = {"genes": 0, "epochs": 6, "device": "cpu", "settings": SMALL, "quiet": True, **KEYS}
    monkeypatch.chdir(tmp_path)
    made = sv.train(os.path.relpath(few), family="scvi", out="package", engine="ray", cpus=1, **told)
    assert made == tmp_path / "package"
    same(made, alone.path)


@pytest.mark.slow
def test_two_processes_train_one_model(local_ray, few, tmp_path):
    """Data parallel through Ray Train, on CPUs: every cell of an epoch goes to one of them, and their weights agree."""
    heard = Listener()
    made = run(few, tmp_path / "package", heard, Machine(cpus=1, gpus=2, gpu=False), told=recipe(epochs=3))
    assert [done for _, done, _, _ in heard.epochs] == [0, 1, 2, 3]
    reference = Reference.load(made)
    assert reference.verify().ok
    assert json.loads((made / "manifest.json").read_text())["provenance"]["processes"] == 2
    assert any("cpu, with 1 more" in line for line in heard.lines)
    assert any("left on disk" in line for line in heard.lines)  # they share the counts
    assert not list(tmp_path.glob(".*"))


def test_several_processes_train_some_families(local_ray, few, tmp_path):
    told = {"engine": "ray", "gpus": 2, "device": "cpu", "quiet": True, "sample_key": "batch"}
    with pytest.raises(InputError, match="several processes train an SCVI or SCANVI, not a MRVI"):
        sv.train(few, family="mrvi", out=tmp_path / "package", **told)
    with pytest.raises(InputError, match=r"--gpus 2 is for --engine ray"):
        sv.train(few, family="scvi", out=tmp_path / "package", **told | {"engine": "inline"})


@pytest.mark.parametrize(
    ("cluster", "device", "cpus", "gpus", "expected"),
    [
        ((8, 0), "auto", None, None, Machine(4, 0, False)),
        ((2, 0), "auto", None, None, Machine(2, 0, False)),
        ((8, 2), "auto", None, None, Machine(4, 0, True)),
        ((8, 2), "cpu", 3, None, Machine(3, 0, False)),
        ((16, 4), "auto", None, 4, Machine(4, 4, True)),
        ((4, 4), "auto", None, 4, Machine(1, 4, True)),
        ((2, 0), "cpu", None, 2, Machine(1, 2, False)),
    ],
)
def test_what_a_training_reserves(cluster, device, cpus, gpus, expected):
    assert Machine.of(Resources(*cluster, 1, local=False), device, cpus, gpus) == expected


@pytest.mark.parametrize(
    ("device", "cpus", "gpus", "told"),
    [
        ("auto", None, 2, "--gpus 2: Ray has 1 GPUs"),
        ("auto", 0, None, "--cpus 0 is too few"),
        ("auto", None, -1, "--gpus -1 is too few"),
        ("auto", 3, None, "--cpus 3 for each of 1 processes: Ray has 2 CPUs"),
        ("cpu", None, 3, "--cpus 1 for each of 3 processes: Ray has 2 CPUs"),
    ],
)
def test_what_it_cannot_reserve(device, cpus, gpus, told):
    with pytest.raises(InputError, match=re.escape(told)):
        Machine.of(Resources(2, 1, 1, local=False), device, cpus, gpus)
    with pytest.raises(InputError, match="--device cuda: Ray has 0 GPUs"):
        Machine.of(Resources(2, 0, 1, local=False), "cuda", None, None)


def test_the_session_is_joined(local_ray):
    with connect() as resources:
        assert resources.cpus == 2
