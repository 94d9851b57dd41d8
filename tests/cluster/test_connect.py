"""Connecting: what does not answer is told within seconds."""

from __future__ import annotations

import os
import socket
import time

import pytest

from cluster.connect import connect, require_answer
from scviaduct.errors import EngineError


@pytest.fixture
def apart(monkeypatch):
    """As in a process that is connected to no Ray."""
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def closed_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_closed_port_is_told_at_once(apart, scheme):
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"does not answer.*--address local"):
        require_answer(f"{scheme}127.0.0.1:{closed_port()}")
    assert time.monotonic() - began < 30


def test_an_address_without_a_port_number_is_refused(apart):
    with pytest.raises(EngineError, match=r"'head:ten' is no address.*HOST:PORT"):
        require_answer("head:ten")


@pytest.mark.parametrize("address", [None, "local", "auto"])
def test_what_names_no_host_is_left_to_ray(apart, address):
    require_answer(address)


def test_the_environment_names_the_cluster_where_nothing_else_does(apart, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed_port()}")
    with pytest.raises(EngineError, match="does not answer"):
        require_answer()


def test_a_port_that_answers_passes(apart):
    with socket.socket() as there:
        there.bind(("127.0.0.1", 0))
        there.listen()
        require_answer(f"127.0.0.1:{there.getsockname()[1]}")


@pytest.fixture
def started(apart, monkeypatch):
    """Environments that Ray was started in; none is started."""
    seen = []
    monkeypatch.setattr("ray.init", lambda **_: seen.append(dict(os.environ)))
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr("ray.shutdown", lambda: None)
    return seen


def test_a_ray_of_our_own_collects_no_metrics_and_the_process_keeps_its_environment(started, monkeypatch):
    monkeypatch.setenv("REPORTER_UPDATE_INTERVAL_MS", "1000")
    before = dict(os.environ)
    with connect("local"):
        assert dict(os.environ) == before
    (seen,) = started
    assert seen["RAY_enable_metrics_collection"] == "0"
    assert seen["MALLOC_ARENA_MAX"] == "1"  # its workers keep their memory from the first instruction on
    assert seen["REPORTER_UPDATE_INTERVAL_MS"] == "1000"  # what the user has set stays


def test_a_cluster_that_is_there_is_joined_as_it_is(started):
    before = dict(os.environ)
    with connect("auto"):
        pass
    assert started == [before]
