"""What a recipe may say, checked before anything is read or trained."""

from __future__ import annotations

import ast
import inspect
import re
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch

from scviaduct.errors import InputError
from scviaduct.families.columns import require_read

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from scviaduct.families import Family, Recipe

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
_LEAST: dict[str, float] = {
    "genes": 0,
    "epochs": 1,
    "scanvi_epochs": 1,
    "samples_per_label": 1,
    "batch_size": 2,
    "loader_workers": 0,
    "patience": 1,
}
_SHARES = ("train_size", "validation_size", "min_cells_per_peak")
_KINDS: dict[type, tuple[str, tuple[type, ...]]] = {
    bool: ("True or False", (bool,)),
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
    str: ("a name", (str,)),
}
"""Type of an argument's default to what it asks for, and the types that will do."""
_NOT_TOLD = ("self", "module", "args", "kwargs", "loss_kwargs", "plan_kwargs")


def check_options(recipe: Recipe, found: Family) -> None:
    """Refuse options that training would fail on, or pass over, after the cells were read.

    Raises
    ------
    InputError
        If there is one.
    """
    for name, least in _LEAST.items():
        value = getattr(recipe, name)
        if value is not None and value < least:
            raise InputError(f"{flag(name)} {value} is too few.", f"At least {least}.")
    _check_shares(recipe)
    for name, known in (("device", DEVICES), ("precision", PRECISIONS)):
        value = getattr(recipe, name)
        if value not in known:
            what = "a device to train on" if name == "device" else "a precision to train in"
            raise InputError(f"'{value}' is not {what}.", f"One of {', '.join(known)}.")
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no GPU here.", "--device cpu, or auto for a GPU if there is one.")
    for name in ("samples_per_label", "scanvi_epochs"):
        value = getattr(recipe, name)
        if not found.starts_from and value is not None:
            raise InputError(f"{flag(name)} {value} is for a SCANVI, not for a {found.name}.", "Leave it out.")
    if recipe.start and not found.starts_from:
        told = f"--from {recipe.start}: a {found.name} is trained from nothing, not from another model"
        raise InputError(f"{told}.", "Leave it out.")
    if recipe.early_stopping is False and recipe.patience is not None:
        raise InputError("--patience without early stopping waits for nothing.", "Add --early-stopping.")
    _check_needs(recipe, found)


def _check_shares(recipe: Recipe) -> None:
    for name in _SHARES:
        value = getattr(recipe, name)
        most_of_all = name == "train_size"
        if value is not None and not (0 < value <= 1 if most_of_all else 0 <= value < 1):
            interval = "above 0 and at most 1" if most_of_all else "from 0 and below 1"
            raise InputError(f"{flag(name)} {value} is no such share of the cells.", f"A number {interval}, e.g. 0.1.")
    if (recipe.train_size or 0.9) + (recipe.validation_size or 0) > 1:
        both = f"{flag('train_size')} {recipe.train_size or 0.9} and {flag('validation_size')} {recipe.validation_size}"
        raise InputError(f"{both} are more than all cells.", "Shares that add up to 1 or less, e.g. 0.8 and 0.2.")
    if recipe.early_stopping and recipe.train_size == 1:
        told = "--early-stopping watches validation cells, and --train-size 1 leaves none"
        raise InputError(f"{told}.", "E.g. --train-size 0.9.")


def _check_needs(recipe: Recipe, found: Family) -> None:
    if found.needs.labels == "required" and not recipe.labels_key:
        raise InputError(f"A {found.name} needs labels, and no labels column is named.", "--labels-key cell_type.")
    require_read(found, recipe)
    if found.needs.sample and not recipe.sample_key:
        told = f"A {found.name} compares samples, and no column of them is named"
        raise InputError(f"{told}.", "Name one: --sample-key donor.")
    if found.needs.background and not recipe.background:
        told = f"A {found.name} needs background cells (controls), and none are named"
        raise InputError(f"{told}.", "Name their column and value: --background perturbation=control.")
    for text in recipe.background:
        column, equals, value = text.partition("=")
        if not (column and equals and value):
            told = f"--background {text}: it is not a column and a value"
            raise InputError(f"{told}.", "E.g. --background perturbation=control.")
    if recipe.calibrate_by and recipe.calibrate_by != "none" and not recipe.labels_key:
        told = f"--calibrate-by {recipe.calibrate_by} measures how sure labels are, and there are none"
        raise InputError(f"{told}.", "Name a column of them: --labels-key cell_type.")


def flag(name: str) -> str:
    """How the command line calls a field of a recipe."""
    return f"--{name.replace('_', '-')}"


def model_arguments(told: Mapping[str, str], found: Family) -> dict[str, Any]:
    """Arguments of the model from text.

    Raises
    ------
    InputError
        If the model takes none of that name, or another type.
    """
    known = found.arguments()
    values = {}
    for name, text in told.items():
        value = _checked("--set", "model", name, text, known)
        if type(known[name]) is int and known[name] > 0 and value < 1:  # a number of layers or of their nodes
            raise InputError(f"--set {name}={text} is too few.", f"At least 1, e.g. --set {name}={known[name]}.")
        values[name] = value
    return values


def plan_arguments(told: Mapping[str, str], stages: Sequence[Family]) -> list[dict[str, Any]]:
    """Arguments of training from text, for each model that is trained: those that it takes.

    Parameters
    ----------
    told
        As given with ``--plan``.
    stages
        Families of the models, in the order of training.

    Raises
    ------
    InputError
        If no model takes one of that name, or it is of another type.
    """
    known = [_plan_of(found) for found in stages]
    every = {name: default for taken in known for name, default in taken.items()}
    values = {name: _checked("--plan", "training plan", name, text, every) for name, text in told.items()}
    for name, value in values.items():
        allowed = next((c for found in stages if (c := _choices(found, name))), ())
        if allowed and value not in allowed:
            raise InputError(f"--plan {name}={value} is not known.", f"One of {', '.join(map(str, allowed))}.")
        if name == "lr" and value <= 0:
            raise InputError(f"--plan lr={value} does not learn.", "A number above 0, e.g. --plan lr=0.001.")
    return [{name: value for name, value in values.items() if name in taken} for taken in known]


def split_plan(found: Family, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of a model's ``train`` that hand the plan's arguments over.

    Some families set plan arguments themselves in ``train``, and would overwrite those in ``plan_kwargs``.
    """
    own = inspect.signature(found.model_class().train).parameters
    direct = {name: value for name, value in plan.items() if name in own}
    rest = {name: value for name, value in plan.items() if name not in own}
    return direct | ({"plan_kwargs": rest} if rest else {})


def _plan_parameters(found: Family) -> list[inspect.Parameter]:
    model_class = found.model_class()
    plan = inspect.signature(model_class._training_plan_cls.__init__).parameters  # noqa: SLF001 - it has no other name
    own = inspect.signature(model_class.train).parameters
    return [own.get(name, parameter) for name, parameter in plan.items() if name not in _NOT_TOLD]


def _plan_of(found: Family) -> dict[str, Any]:
    plain = (bool, int, float, str, type(None))
    return {p.name: p.default for p in _plan_parameters(found) if isinstance(p.default, plain)}


def _choices(found: Family, name: str) -> tuple[Any, ...]:
    """Values that an argument may have, where its annotation lists them."""
    text = next((str(p.annotation) for p in _plan_parameters(found) if p.name == name), "")
    inner = re.search(r"^(?:typing\.)?Literal\[(.*)\]$", text, re.DOTALL)
    return tuple(ast.literal_eval(f"[{inner[1]}]")) if inner else ()


def _checked(option: str, taker: str, name: str, text: str, known: Mapping[str, Any]) -> Any:
    if name not in known:
        close = get_close_matches(name, known, n=3) or sorted(known)
        raise InputError(f"{option} {name}={text}: the {taker} takes no '{name}'.", f"It takes: {', '.join(close)}.")
    value: Any
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    default = known[name]
    wanted = next((kind for kind in _KINDS if type(default) is kind), None)
    if wanted is not None and type(value) not in _KINDS[wanted][1]:
        remedy = f"E.g. {option} {name}={default}."
        raise InputError(f"{option} {name}={text}: '{text}' is not {_KINDS[wanted][0]}.", remedy)
    return value
