"""Making one model and fitting it: seeds, metrics, early stopping, checkpoints and going on from them.

Training on the CPU is repeatable to the bit, and goes on from a checkpoint to the same bits: random states are kept
with it, and scvi-tools draws the order of the cells anew from them in every epoch. With processes that load
mini-batches, or on a GPU, sums may come out in another order.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from scviaduct.errors import InputError
from scviaduct.families.vae import quiet
from scviaduct.references.callbacks import SLOWER, Again, Checkpoints, Metrics
from scviaduct.references.options import split_plan
from scviaduct.references.states import StateIO

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lightning.pytorch.callbacks import Callback

    from scviaduct.families import Family, Recipe
    from scviaduct.references.callbacks import Run

PATIENCE = 45
"""What early stopping watches, and for how many epochs, where neither the user nor the family says: scvi-tools' own."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One model to train, of the one or two that a recipe asks for.

    Attributes
    ----------
    family
        Of the model.
    arguments, plan
        Of the model, and of its training plan.
    epochs
        None for what scvi-tools chooses.
    """

    family: Family
    arguments: Mapping[str, Any]
    plan: Mapping[str, Any] = field(default_factory=dict)
    epochs: int | None = None


def make_model(stage: Stage, data: Any, recipe: Recipe, start: Any = None) -> Any:
    """An untrained model, whose weights are drawn from the recipe's seed.

    Raises
    ------
    InputError
        If scvi-tools refuses its arguments.
    """
    import scvi

    try:
        with quiet():
            scvi.settings.seed = recipe.seed
            return stage.family.create(data, stage.arguments, recipe, start)
    except (ValueError, TypeError, AssertionError, RuntimeError, ArithmeticError, LookupError) as error:
        told = ", ".join(f"--set {name}={value}" for name, value in stage.arguments.items())
        where = stage.family.model_class()
        public = ".".join(part for part in where.__module__.split(".") if not part.startswith("_"))
        remedy = f"See the arguments of {public}.{where.__name__}."
        raise InputError(f"scvi-tools refuses {told or 'the model'}: {error}.", remedy) from error


def fit_model(stage: Stage, model: Any, data: Any, recipe: Recipe, run: Run) -> None:
    """Fit a model in place, from its checkpoint if there is one.

    Parameters
    ----------
    stage
        What is trained.
    model
        As :func:`make_model` gives it.
    data
        What the family's ``setup`` gave.
    recipe
        How to train.
    run
        Where progress goes; its rows are filled.

    Raises
    ------
    InputError
        If the loss is no longer a number, or a mini-batch holds a single cell.
    """
    import scvi

    told = _keywords(stage, data, recipe, run)
    before = scvi.settings.dl_num_workers
    with quiet(), _undisturbed():
        scvi.settings.seed = recipe.seed
        scvi.settings.dl_num_workers = recipe.loader_workers
        try:
            model.train(**told)
        except (ValueError, RuntimeError) as error:
            explained = _explained(error, stage.family, recipe)
            if explained is None:
                raise
            raise explained from error
        finally:
            scvi.settings.dl_num_workers = before


def _keywords(stage: Stage, data: Any, recipe: Recipe, run: Run) -> dict[str, Any]:
    """What the model's ``train`` is told."""
    found = stage.family
    own = dict(found.training(data, recipe))
    checkpoints = Checkpoints(run)
    callbacks = [checkpoints, *own.pop("callbacks", ()), Metrics(found.name, run), *_stopping(found, recipe)]
    there = run.checkpoint is not None and run.checkpoint.is_file()
    given = {
        "max_epochs": stage.epochs,
        "train_size": recipe.train_size,
        "validation_size": recipe.validation_size,
        "ckpt_path": str(run.checkpoint) if there else None,
        # It is among the callbacks: some classes take no patience or monitor.
        "early_stopping": False if "early_stopping" in _parameters(found) else None,
    }
    return {
        "batch_size": recipe.batch_size,
        "accelerator": {"cuda": "gpu"}.get(recipe.device, recipe.device),
        "devices": 1,
        "enable_progress_bar": False,
        "check_val_every_n_epoch": 1,
        "precision": recipe.precision,
        "logger": _loggers(run, found.name),
        "callbacks": [*callbacks, Again(checkpoints)],
        "plugins": [StateIO(), *run.ranks.plugins],
        **run.ranks.trainer,
        **own,
        **split_plan(found, stage.plan),
        **{name: value for name, value in given.items() if value is not None},
    }


def _explained(error: Exception, found: Family, recipe: Recipe) -> InputError | None:
    """What of scvi-tools' and torch's errors the user can mend."""
    if "more than 1 value per channel" in str(error):  # batch normalisation of a single cell
        remedy = f"Another --batch-size, e.g. {recipe.batch_size + 1}."
        return InputError(f"A mini-batch of {recipe.batch_size} leaves one of a single cell.", remedy)
    if "found invalid values" in str(error):  # parameters of a distribution
        return InputError(f"The training of the {found.name} diverged: its values are no longer numbers.", SLOWER)
    if "Early stopping conditioned on metric" in str(error):
        there = sorted(set(re.findall(r"`([a-z_]+_validation|validation_loss)`", str(error))))
        told = f"--monitor {recipe.monitor or found.monitor}: training a {found.name} gives no such metric"
        return InputError(f"{told}.", f"One of {', '.join(there)}." if there else "Leave it out.")
    return None


def _parameters(found: Family) -> Mapping[str, Any]:
    return inspect.signature(found.model_class().train).parameters


def _stopping(found: Family, recipe: Recipe) -> list[Callback]:
    from lightning.pytorch.callbacks import EarlyStopping

    known = _parameters(found)
    usual = bool(known["early_stopping"].default) if "early_stopping" in known else False
    asked = recipe.early_stopping
    if asked is None and (recipe.patience is not None or recipe.monitor):
        asked = True
    stops = usual if asked is None else asked
    if not stops or recipe.train_size == 1:
        return []
    # Classes differ in what they watch; most leave it to the trainer, some name it inside of their train.
    monitor = recipe.monitor or found.monitor
    own = known["early_stopping_patience"].default if "early_stopping_patience" in known else PATIENCE
    return [EarlyStopping(monitor, patience=recipe.patience or own, mode="min")]


def _loggers(run: Run, name: str) -> list[Any]:
    from scvi.train._logger import SimpleLogger

    loggers: list[Any] = [SimpleLogger()]
    if run.tensorboard is not None:
        from lightning.pytorch.loggers import TensorBoardLogger

        loggers.append(TensorBoardLogger(run.tensorboard, name=name, version=""))
    return loggers


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep what scvi-tools prints off standard output, and turn Lightning's exit back into an interruption."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
