"""A process whose GPU has given up: an actor ends, and one that a user runs says what failed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from actors import mapping
from actors.mapping import Failure, MappingWorker, lost
from scviaduct.errors import DataError

ILLEGAL = "CUDA error: an illegal memory access was encountered"


def gone():
    raise RuntimeError(ILLEGAL)


class Broken:
    """A mapper whose kernel fails."""

    def map(self, block):
        raise RuntimeError(ILLEGAL)


def worker_of(kind, device):
    """A worker of one reference, without loading any."""
    worker = kind.__new__(kind)
    stager = SimpleNamespace(stage=None)
    assignment = mapping.Assignment("reference", None, stager, ())
    vars(worker).update(device=device, _assignments=(assignment,), _mappers=[Broken()])
    return worker


def ran(worker):
    bundle = SimpleNamespace(units=[(0, SimpleNamespace(id="u0")), (0, SimpleNamespace(id="u1"))])
    return worker.run(bundle, SimpleNamespace(together=lambda at: [None]))


def test_the_device_tells_whether_it_is_lost(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", gone)
    assert lost(RuntimeError(ILLEGAL), "cuda")
    assert not lost(RuntimeError("of PyTorch on a CPU"), "cpu")
    assert not lost(DataError("Cell 'x' has -1 counts.", "Look at it."), "cuda")
    assert not lost(OSError("disk full"), "cuda")
    if hasattr(torch, "AcceleratorError"):
        assert lost(torch.AcceleratorError(ILLEGAL), "cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert not lost(torch.OutOfMemoryError("CUDA out of memory"), "cuda")


def test_in_one_process_every_unit_fails_and_the_process_goes_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", gone)
    ended = ran(worker_of(MappingWorker, "cuda"))
    assert not ended.done
    assert [one.unit for one in ended.failed] == ["u0", "u1"]
    assert all(isinstance(one, Failure) and "illegal memory access" in one.reason for one in ended.failed)
    assert not any(one.final for one in ended.failed)


def test_an_actor_ends_at_once_and_says_why(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "synchronize", gone)
    monkeypatch.setattr(mapping.os, "_exit", lambda status: (_ for _ in ()).throw(SystemExit(status)))
    with pytest.raises(SystemExit, match="1"):
        ran(worker_of(mapping._Actor, "cuda"))
    assert "illegal memory access" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert len(ran(worker_of(mapping._Actor, "cuda")).failed) == 2
