"""The training actor: trains and packages one reference, and tells its driver as it goes."""

from __future__ import annotations

import os
import queue
import shutil
import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import ray
import torch

from scviaduct.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from scviaduct.families import Recipe
    from scviaduct.references.training import Options

_ALIVE_SECONDS = 1.0
"""Between two signs of life, so that a driver that waits can be interrupted, and sees a dead actor."""
_FAILURES = 3
"""Times that processes which train together are begun again after one of them was lost."""
_WAIT_SECONDS = 7 * 24 * 3600
"""For each other: the first reads the cells, and makes the package, alone."""


@dataclass(frozen=True, slots=True)
class Line:
    """Something worth a line was said."""

    text: str


@dataclass(frozen=True, slots=True)
class Epoch:
    """An epoch is done, or the first is to begin.

    Attributes
    ----------
    model
        Name of its class.
    done, epochs
        Epochs done, and in all.
    metrics
        Of the epoch; empty before the first.
    """

    model: str
    done: int
    epochs: int
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Started:
    """Training begins: the process that trains, and on what."""

    pid: int
    device: str


@dataclass(frozen=True, slots=True)
class Made:
    """The package is there."""

    path: str


@dataclass(frozen=True, slots=True)
class Failed:
    """Training raised an error, which is no fault of the machine: it would come again."""

    error: BaseException


Event = Line | Epoch | Started | Made | Failed | None
"""What an actor tells; None is a sign of life."""


class TrainingWorker:
    """Trains a reference in a thread, so that the driver hears of it meanwhile.

    Parameters
    ----------
    cpus
        Threads to compute with.
    """

    def __init__(self, cpus: int) -> None:
        torch.set_num_threads(cpus)

    def run(self, source: str, recipe: Recipe, out: Path, options: Options) -> Iterator[Event]:
        """Train and package; the package is written where the driver reads it.

        Parameters
        ----------
        source, recipe, out, options
            As :func:`scviaduct.references.training.train` takes them, with absolute paths.

        Yields
        ------
        Event
            What happens, and a sign of life every second without an event.
        """
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        threading.Thread(target=_train, args=(source, recipe, out, options, events.put), daemon=True).start()
        yield Started(os.getpid(), "cuda" if torch.cuda.is_available() else "cpu")
        while True:
            try:
                event = events.get(timeout=_ALIVE_SECONDS)
            except queue.Empty:
                event = None
            yield event
            if isinstance(event, Made | Failed):
                return

    def run_together(
        self, source: str, recipe: Recipe, out: Path, options: Options, count: int, resources: dict[str, float]
    ) -> Iterator[Event]:
        """Train in several processes through Ray Train, one on each GPU; this one only watches.

        Parameters
        ----------
        source, recipe, out, options
            As for :meth:`run`.
        count
            Processes.
        resources
            What each reserves, as Ray names it.

        Yields
        ------
        Event
            What the first process tells, and a sign of life every second without an event.
        """
        from ray.util.queue import Empty, Queue

        mailbox = Queue(actor_options={"num_cpus": 0})
        told = {"source": source, "recipe": recipe, "out": out, "options": options, "mailbox": mailbox}
        ended: queue.SimpleQueue[Failed | None] = queue.SimpleQueue()
        threading.Thread(target=_together, args=(told, count, resources, ended.put), daemon=True).start()
        while True:
            try:
                event = mailbox.get(timeout=_ALIVE_SECONDS)
            except Empty:
                event = None if ended.empty() else ended.get()
            if isinstance(event, Made):
                event = ended.get() or event  # Ray Train takes its own leave
            yield event
            if isinstance(event, Made | Failed):
                return


def _together(
    told: dict[str, Any], count: int, resources: dict[str, float], end: Callable[[Failed | None], None]
) -> None:
    """Run the processes until they are done; lost ones are begun again, and go on from the checkpoint."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    out: Path = told["out"]
    folder = out.parent / f".{out.name}.ray"
    gpu = resources.get("GPU", 0) > 0
    try:
        TorchTrainer(
            _rank,
            train_loop_config=told,
            scaling_config=ScalingConfig(num_workers=count, use_gpu=gpu, resources_per_worker=resources),
            run_config=RunConfig("run", str(folder), failure_config=FailureConfig(max_failures=_FAILURES)),
            torch_config=TorchConfig("nccl" if gpu else "gloo", timeout_s=_WAIT_SECONDS),
        ).fit()
        shutil.rmtree(folder, ignore_errors=True)
        end(None)
    except BaseException as error:  # noqa: BLE001 - the driver raises it
        end(Failed(EngineError(f"Ray Train gave up: {error}.", "What is done is kept: run the same command.")))


def _rank(told: dict[str, Any]) -> None:
    """One of the processes."""
    import torch.distributed
    from ray.train import get_context
    from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment

    from scviaduct.references.ranks import Ranks

    context, mailbox = get_context(), told["mailbox"]
    rank, count = context.get_world_rank(), context.get_world_size()
    trainer = {"strategy": RayDDPStrategy(find_unused_parameters=True), "devices": "auto"}
    ranks = Ranks(rank, count, trainer, (RayLightningEnvironment(),), torch.distributed.barrier)

    def tell(event: Event) -> None:
        if rank == 0 or isinstance(event, Failed):
            mailbox.put(event)

    tell(Started(os.getpid(), f"{'cuda' if torch.cuda.is_available() else 'cpu'}, with {count - 1} more"))
    _train(told["source"], told["recipe"], told["out"], replace(told["options"], ranks=ranks), tell)


def _train(source: str, recipe: Recipe, out: Path, options: Options, tell: Callable[[Event], None]) -> None:
    from scviaduct.references.training import train

    def on_epoch(model: str, done: int, epochs: int, metrics: Mapping[str, float]) -> None:
        tell(Epoch(model, done, epochs, dict(metrics)))

    try:
        made = train(source, recipe, out, on_epoch, replace(options, say=lambda line: tell(Line(line))))
        tell(Made(str(made.path)))
    except BaseException as error:  # noqa: BLE001 - the driver raises it
        tell(Failed(error))


TrainingActor: Any = ray.remote(TrainingWorker)
"""Restarts are the driver's (``max_restarts=0``): a new actor goes on from the checkpoint."""
