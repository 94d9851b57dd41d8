"""Training on Ray: an actor trains, the driver listens, and a lost actor is replaced by one that goes on."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from actors.training import Epoch, Failed, Line, Made, Started, TrainingActor
from cluster.connect import connect
from scviaduct.errors import EngineError, InputError
from scviaduct.families import family as family_of
from scviaduct.references.ranks import check_together
from scviaduct.references.registry import Registry
from scviaduct.references.training import new_folder
from scviaduct.sources.uri import parse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cluster.connect import Resources
    from scviaduct.families import Recipe
    from scviaduct.references.callbacks import OnEpoch
    from scviaduct.references.searchspace import Wanted
    from scviaduct.references.training import Options

TABLE = "tuning.csv"
RESTARTS = 3
"""Lost actors that are replaced before the run gives up."""
_LOST = (RayActorError, NodeDiedError, OutOfMemoryError)
_MOST_CPUS = 4
"""CPUs of a training unless said otherwise: mini-batches of 128 cells keep few threads busy."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a training reserves.

    Attributes
    ----------
    cpus
        CPUs of the process that trains, or of each of several.
    gpus
        Processes that train together; 0 for one that takes a GPU where there is one.
    gpu
        Whether each takes a GPU.
    """

    cpus: int
    gpus: int
    gpu: bool

    @classmethod
    def of(cls, resources: Resources, device: str, cpus: int | None, gpus: int | None) -> Machine:
        """What a cluster has for a training.

        Parameters
        ----------
        resources
            Of the cluster.
        device
            Of the recipe.
        cpus, gpus
            As the caller says; None for what the cluster has.

        Raises
        ------
        InputError
            If it has not so much.
        """
        has = int(resources.gpus)
        wanted = gpus or 0
        if wanted < 0 or (cpus is not None and cpus < 1):
            what = f"--gpus {gpus}" if wanted < 0 else f"--cpus {cpus}"
            raise InputError(f"{what} is too few.", "At least 1.")
        needs = wanted if device != "cpu" else 0
        if needs > has or (device == "cuda" and not has):
            told = f"--gpus {wanted}" if needs > has else "--device cuda"
            raise InputError(f"{told}: Ray has {has} GPUs.", "Join a cluster with GPUs: --address; or --device cpu.")
        each = cpus or max(1, min(_MOST_CPUS, int(resources.cpus) // max(wanted, 1)))
        if each * max(wanted, 1) > resources.cpus:
            told = f"--cpus {each} for each of {max(wanted, 1)} processes: Ray has {resources.cpus:g} CPUs"
            raise InputError(f"{told}.", f"--cpus {max(1, int(resources.cpus) // max(wanted, 1))}.")
        return cls(each, wanted, device != "cpu" and has > 0)


@dataclass(frozen=True, slots=True)
class OnRay:
    """What is asked of Ray.

    Attributes
    ----------
    address, cpus, gpus
        As ``train`` takes them.
    search
        For hyperparameters, before the training; None for none.
    """

    address: str | None = None
    cpus: int | None = None
    gpus: int | None = None
    search: Wanted | None = None


def run_on_ray(
    source: str,
    recipe: Recipe,
    out: Path,
    options: Options,
    asked: OnRay,
    on_epoch: OnEpoch,
    say: Callable[[str], None],
) -> Path:
    """Join a Ray, search hyperparameters where that is asked for, and train.

    Parameters
    ----------
    source, recipe, out, options
        As for training here. What is not absolute is taken from this process's folder; all machines read and write the
        same paths.
    asked
        Of Ray.
    on_epoch, say
        Told of what happens.

    Raises
    ------
    ScviaductError
        As :func:`train_on_ray`, or if the search cannot be.
    """
    from pipelines.tuning import check_search, folder_of, search_best

    found = family_of(recipe.family)
    check_together(found, asked.gpus or 1)
    if asked.search is not None:
        check_search(recipe, asked.search)
    source, out, recipe = str(parse(source)), out.absolute(), _absolute(recipe)
    new_folder(out)
    with connect(asked.address) as resources:
        machine = Machine.of(resources, recipe.device, asked.cpus, asked.gpus)
        if asked.search is not None:
            each = {"cpu": asked.cpus or 1, "gpu": int(machine.gpu)}
            tuned = search_best(source, recipe, asked.search, out, each, say, restart=options.restart)
            recipe = tuned.recipe
            told, extras = {"tuning": tuned.provenance}, {TABLE: tuned.table}
            options = replace(options, provenance={**options.provenance, **told}, extras={**options.extras, **extras})
        made = train_on_ray(source, recipe, out, options, machine, on_epoch, say)
    shutil.rmtree(folder_of(out), ignore_errors=True)
    return made


def _absolute(recipe: Recipe) -> Recipe:
    """The recipe with the path of the reference that it starts from, wherever it trains."""
    if not recipe.start:
        return recipe
    folder = Path(recipe.start)
    return replace(recipe, start=str(folder.absolute() if folder.is_dir() else Registry().get(recipe.start).path))


def train_on_ray(
    source: str,
    recipe: Recipe,
    out: Path,
    options: Options,
    machine: Machine,
    on_epoch: OnEpoch,
    say: Callable[[str], None],
) -> Path:
    """Train in an actor of the Ray that this process is connected to.

    Parameters
    ----------
    source, recipe, out, options
        As for training here; the paths must be the same on every machine.
    machine
        What is reserved.
    on_epoch, say
        Told of what happens, in this process.

    Returns
    -------
    Path
        The package.

    Raises
    ------
    ScviaductError
        What training raised.
    EngineError
        If actors were lost more than three times; the checkpoint is kept.
    """
    for lost in range(RESTARTS + 1):
        actor = _start(machine)
        try:
            for event in _events(actor, source, recipe, out, options, machine):
                match event:
                    case Started(pid, device):
                        say(f"training in process {pid} on {device}")
                    case Line(text):
                        say(text)
                    case Epoch(model, done, epochs, metrics):
                        on_epoch(model, done, epochs, metrics)
                    case Made(path):
                        return Path(path)
                    case Failed(error):
                        raise error
        except _LOST as error:
            why = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
            options = replace(options, restart=False)
            if lost < RESTARTS:
                say(
                    f"the training was lost ({why}); going on from its checkpoint, attempt {lost + 2} of {RESTARTS + 1}"
                )
        finally:
            ray.kill(actor, no_restart=True)
    told = f"The training was lost {RESTARTS + 1} times, the last time because: {why}"
    raise EngineError(
        f"{told}.", "What is done is kept: run the same command; with less memory to spare, --out-of-core yes."
    )


def _start(machine: Machine) -> Any:
    if machine.gpus > 1:  # the actor watches; those that it starts train
        return TrainingActor.options(num_cpus=0, num_gpus=0).remote(1)
    return TrainingActor.options(num_cpus=machine.cpus, num_gpus=int(machine.gpu)).remote(machine.cpus)


def _events(actor: Any, source: str, recipe: Recipe, out: Path, options: Options, machine: Machine) -> Iterator[Any]:
    # What is said is told by the actor's events: a listener of this process cannot be sent.
    sent = replace(options, say=print)
    resources = {"CPU": machine.cpus, **({"GPU": 1} if machine.gpu else {})}
    if machine.gpus > 1:
        stream = actor.run_together.options(num_returns="streaming").remote(
            source, recipe, out, sent, machine.gpus, resources
        )
    else:
        stream = actor.run.options(num_returns="streaming").remote(source, recipe, out, sent)
    for reference in stream:
        try:
            yield ray.get(reference)
        except RayTaskError as error:
            raise EngineError(f"The training actor failed: {error.cause}.", "Run the same command.") from error
        except RayError as error:
            if isinstance(error, _LOST):
                raise
            raise EngineError(f"Ray lost what the training said: {error}.", "Run the same command.") from error
