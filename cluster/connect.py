"""Connecting to Ray: a cluster that is there, or one of our own on this machine."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray

from scviaduct.allocator import environment
from scviaduct.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

OBJECT_STORE_BYTES = 1 << 30
"""Object store of a Ray that we start ourselves. The dispatcher's byte budget is half of it, so that nothing spills."""


_ANSWER_SECONDS = 5.0

_UNWATCHED = {
    "RAY_enable_metrics_collection": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "600000",
    "RAY_event_stats": "0",
    "LOG_NAME_UPDATE_INTERVAL_S": "3600",
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
}
"""Environment of a Ray that we start: nothing is collected that nobody sees.

Metrics are for a dashboard, which is not started. The log monitor follows the workers' files for a driver that prints
them, which ours does not; the files stay in the session's folder. Both look by the clock: an idle Ray with two workers
took 46 to 53 ms of CPU a second with them, and takes 29 without. A Ray that does not know a name passes it over."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What a cluster offers.

    Attributes
    ----------
    cpus, gpus
        Over all nodes.
    object_store
        Bytes, over all nodes.
    local
        True if the cluster was started here and ends with the run.
    """

    cpus: float
    gpus: float
    object_store: int
    local: bool


def require_answer(address: str | None = None) -> None:
    """Find out within seconds whether a cluster is there; ``ray.init`` takes minutes to give up.

    Parameters
    ----------
    address
        As for :func:`connect`.

    Raises
    ------
    EngineError
        If ``HOST:PORT`` takes no connection.
    """
    target = address or os.environ.get("RAY_ADDRESS") or "local"
    host, colon, port = target.rpartition("://")[2].rpartition(":")
    if ray.is_initialized() or not colon:
        return
    if not port.isdigit():
        raise EngineError(f"'{target}' is no address of a Ray cluster.", "Write local, auto or HOST:PORT.")
    try:
        socket.create_connection((host, int(port)), _ANSWER_SECONDS).close()
    except OSError as error:
        raise EngineError(
            f"Ray at '{target}' does not answer: {error.strerror or error}.", "Start it, or use --address local."
        ) from error


@contextmanager
def connect(address: str | None = None, cpus: int | None = None) -> Iterator[Resources]:
    """Join a Ray cluster for the length of a run.

    Parameters
    ----------
    address
        ``"local"`` starts a Ray on this machine that ends with the run; ``"auto"`` or ``HOST:PORT`` joins one. None
        takes ``RAY_ADDRESS`` (which ``ray job submit`` sets) and ``"local"`` without it. A Ray that this process is
        already connected to is used as it is and left running.
    cpus
        CPUs that a local Ray offers; None for all of the machine's.

    Raises
    ------
    EngineError
        If the cluster does not answer.
    """
    if ray.is_initialized():
        yield _resources(local=False)
        return
    require_answer(address)
    target = address or os.environ.get("RAY_ADDRESS") or "local"
    local = target == "local"
    own = {"num_cpus": cpus, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False} if local else {}
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        with _environment(_UNWATCHED | environment() if local else {}):
            ray.init(address=target, logging_level=logging.ERROR, log_to_driver=False, **own)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise EngineError(
            f"Ray at '{target}' does not answer: {error}.", "Start it, or use --address local."
        ) from error
    if threading.current_thread() is threading.main_thread():
        # Ray takes SIGTERM for itself and aborts on it; whoever runs us decides what it means.
        signal.signal(signal.SIGTERM, on_terminate)
    try:
        yield _resources(local=local)
    finally:
        ray.shutdown()


@contextmanager
def _environment(told: Mapping[str, str]) -> Iterator[None]:
    """Environment of what is started meanwhile; what the user has set stays."""
    added = {name: value for name, value in told.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _resources(*, local: bool) -> Resources:
    total = ray.cluster_resources()
    return Resources(total.get("CPU", 0.0), total.get("GPU", 0.0), int(total.get("object_store_memory", 0)), local)
