"""Connecting: what does not answer is told within seconds."""

from __future__ import annotations

import socket
import time

import pytest

from cluster.connect import require_answer
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
