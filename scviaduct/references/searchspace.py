"""What a search for hyperparameters tries: a space of values, and trials drawn from it by a seed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from scviaduct.errors import InputError
from scviaduct.references.options import model_arguments, plan_arguments
from scviaduct.values import digest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from scviaduct.families import Family

_EXAMPLE = (
    "Write NAME=VALUE,VALUE or NAME=LOW..HIGH, e.g. n_latent=10,20,30, dropout_rate=0.05..0.3, lr=1e-4..1e-2 log."
)
_DIGITS = 4
_TRIES = 200


@dataclass(frozen=True, slots=True)
class Choice:
    """One of some values, as text."""

    values: tuple[str, ...]

    def draw(self, rng: np.random.Generator) -> str:
        """One of them."""
        return self.values[int(rng.integers(len(self.values)))]

    def __str__(self) -> str:
        return ",".join(self.values)


@dataclass(frozen=True, slots=True)
class Range:
    """A number between two, evenly or evenly in its logarithm; whole numbers where both bounds are written so."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def draw(self, rng: np.random.Generator) -> str:
        """A number of four digits, as text; both bounds may come."""
        if self.whole and not self.log:
            return str(int(rng.integers(int(self.low), int(self.high) + 1)))
        ends = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = rng.uniform(*ends)
        value = min(max(math.exp(value) if self.log else value, self.low), self.high)
        return str(round(value)) if self.whole else f"{value:.{_DIGITS}g}"

    def __str__(self) -> str:
        ends = (f"{int(end)}" if self.whole else f"{end:g}" for end in (self.low, self.high))
        return "..".join(ends) + (" log" if self.log else "")


Space = dict[str, Choice | Range]

DEFAULT: dict[str, str] = {
    "n_latent": "10,20,30,50",
    "n_layers": "1,2,3",
    "n_hidden": "64,128,256,512",
    "dropout_rate": "0.05,0.1,0.2",
    "gene_likelihood": "zinb,nb",
    "lr": "1e-4..1e-2 log",
}
"""What is searched unless ``--search`` says otherwise; every value of it is one that scvi-tools documents."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a user asks a search for.

    Attributes
    ----------
    trials
        Number of them.
    space
        As :func:`parse_space` takes it.
    metric
        ``loss`` or ``scib``.
    epochs
        Of a trial at most; None for those of the recipe, or what scvi-tools chooses.
    """

    trials: int
    space: tuple[str, ...] = ()
    metric: str = "loss"
    epochs: int | None = None


def parse_space(told: Sequence[str], found: Family, fixed: Sequence[str] = ()) -> Space:
    """The default space, with what a user says in its place.

    Parameters
    ----------
    told
        ``NAME=VALUES`` each; a single value takes a name out of the search, and sets it.
    found
        Family that is trained.
    fixed
        Names that the recipe sets, which are not searched.

    Raises
    ------
    InputError
        If one is not written so, or the model takes no argument of that name or value.
    """
    said: dict[str, str] = {}
    for text in told:
        name, equals, values = text.partition("=")
        if not (name.strip() and equals and values.strip()):
            raise InputError(f"--search {text}: there is nothing to search.", _EXAMPLE)
        if name.strip() in fixed:
            raise InputError(f"--search {text}: --set or --plan sets {name.strip()} already.", "Leave one of them out.")
        said[name.strip()] = values.strip()
    texts = {name: values for name, values in DEFAULT.items() if name not in fixed} | said
    space = {name: _parsed(name, values) for name, values in texts.items()}
    for name, part in space.items():
        ends = part.values if isinstance(part, Choice) else (part.draw(np.random.default_rng(0)),)
        for value in ends:
            _check(name, value, found)
    return space


def _parsed(name: str, text: str) -> Choice | Range:
    values = tuple(value.strip() for value in text.split(","))
    if ".." not in text:
        if "" in values:
            raise InputError(f"--search {name}={text}: a value is missing.", _EXAMPLE)
        return Choice(values)
    ends, _, scale = text.partition(" ")
    low, _, high = ends.partition("..")
    try:
        bounds = float(low), float(high)
    except ValueError:
        raise InputError(f"--search {name}={text}: '{ends}' are no two numbers.", _EXAMPLE) from None
    log = scale.strip() == "log"
    if scale.strip() not in ("", "log") or not bounds[0] < bounds[1] or (log and bounds[0] <= 0):
        raise InputError(f"--search {name}={text}: it is no range.", _EXAMPLE)
    whole = all(end.strip().lstrip("-").isdigit() for end in (low, high))
    return Range(*bounds, log=log, whole=whole)


def is_plan(name: str, found: Family) -> bool:
    """Whether an argument is one of the training plan, and none of the model."""
    return name not in found.arguments()


def _check(name: str, value: str, found: Family) -> None:
    if is_plan(name, found):
        plan_arguments({name: value}, [found])
    else:
        model_arguments({name: value}, found)


@dataclass(frozen=True, slots=True)
class Trial:
    """One point of the space.

    Attributes
    ----------
    number
        From 1.
    settings, plan
        Model arguments, and those of its training plan, as text.
    """

    number: int
    settings: Mapping[str, str]
    plan: Mapping[str, str]

    @property
    def values(self) -> dict[str, str]:
        """All of them."""
        return {**self.settings, **self.plan}


def draw_trials(space: Space, number: int, seed: int, found: Family) -> list[Trial]:
    """Points of a space, drawn at random and no two alike; the same seed gives the same, and more begin with fewer.

    Raises
    ------
    InputError
        If the space has fewer points than asked for.
    """
    rng = np.random.default_rng(seed)
    seen: set[str] = set()
    trials: list[Trial] = []
    for _ in range(_TRIES * number):
        if len(trials) == number:
            break
        values: dict[str, Any] = {name: part.draw(rng) for name, part in space.items()}
        if (key := digest(values)) in seen:
            continue
        seen.add(key)
        plan = {name: value for name, value in values.items() if is_plan(name, found)}
        settings = {name: value for name, value in values.items() if name not in plan}
        trials.append(Trial(len(trials) + 1, settings, plan))
    if len(trials) < number:
        told = f"--tune {number}: the search space has only {len(trials)} points"
        raise InputError(f"{told}.", f"--tune {len(trials)}, or search more: --search n_latent=10,20,30.")
    return trials
