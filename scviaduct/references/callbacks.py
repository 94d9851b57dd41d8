"""What happens at every epoch of a training: metrics are kept, checkpoints written, random states brought back."""

from __future__ import annotations

import contextlib
import math
import random
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, override

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from scviaduct.errors import InputError
from scviaduct.references.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    OnEpoch = Callable[[str, int, int, Mapping[str, float]], None]
    Row = dict[str, float]

SLOWER = "Learn more slowly, e.g. --plan lr=0.0005, or look for odd counts."


@dataclass(slots=True)
class Run:
    """Where the progress of a stage goes.

    Attributes
    ----------
    on_epoch
        Told of the class, the epochs done and in all, and the epoch's metrics.
    checkpoint
        File of the checkpoint, whether it is there or not; None for none.
    before_checkpoint
        Called before one is written.
    minutes
        Between two checkpoints; 0 for one an epoch.
    tensorboard
        Folder for TensorBoard; None for none.
    rows
        Metrics of each epoch, filled in by training.
    ranks
        Which of several processes this is that train together.
    """

    on_epoch: OnEpoch
    checkpoint: Path | None = None
    before_checkpoint: Callable[[], None] = lambda: None
    minutes: float = 10.0
    tensorboard: Path | None = None
    rows: list[Row] = field(default_factory=list)
    ranks: Ranks = ALONE


class Metrics(Callback):
    """Keeps the metrics of every epoch, and tells of them."""

    def __init__(self, name: str, run: Run) -> None:
        self._name, self._run, self._out = name, run, sys.stdout

    def _tell(self, trainer: Any, done: int, row: Mapping[str, float]) -> None:
        with contextlib.redirect_stdout(self._out):  # what the listener prints is its own
            self._run.on_epoch(self._name, done, trainer.max_epochs, row)

    @override
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._tell(trainer, trainer.current_epoch, {})

    @override
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items() if not name.endswith("_step")}
        row = {"epoch": trainer.current_epoch + 1, **logged}
        self._run.rows.append(row)
        wrong = [name for name in ("train_loss_epoch", "train_loss", "loss") if not math.isfinite(row.get(name, 0.0))]
        if wrong:
            told = f"The loss of the {self._name} is {row[wrong[0]]} after epoch {row['epoch']}"
            raise InputError(f"{told}.", SLOWER)
        self._tell(trainer, trainer.current_epoch + 1, row)


class Checkpoints(Callback):
    """Writes checkpoints at the start of epochs, and brings random states back.

    It must be the first callback: what others draw at the start of an epoch is drawn again after a restart.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._last = time.monotonic()
        self._random: dict[str, Any] = {}
        self.resumed = False

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"random": _random_state(), "rows": [dict(row) for row in self._run.rows]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._random = state_dict["random"]
        self._run.rows[:] = state_dict["rows"]

    @override
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self._random:
            _set_random_state(self._random)
            self._random = {}
            self.resumed = True
            return
        due = time.monotonic() - self._last >= self._run.minutes * 60
        due = trainer.strategy.broadcast(due)  # processes that train together write a checkpoint together
        if self._run.checkpoint is not None and trainer.current_epoch > 0 and due:
            if self._run.ranks.first:
                self._run.before_checkpoint()
            trainer.save_checkpoint(self._run.checkpoint)
            self._last = time.monotonic()


class Again(Callback):
    """Starts the first epoch after a restart over, as any other is started; it must be the last callback.

    Lightning makes the iterator of the first epoch, which draws the order of the cells, before the epoch's hooks.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints

    @override
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self._checkpoints.resumed:
            self._checkpoints.resumed = False
            iter(trainer.fit_loop._data_fetcher)  # noqa: SLF001 - as its own loop does at the start of an epoch


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    numpy = np.random.get_state()  # noqa: NPY002 - the state that scvi-tools draws from
    return {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
