"""What can be derived of cells that a reference has mapped, and what each kind of it owes the rest.

Two kinds. An :class:`Output` is computed cell by cell, a unit at a time, and goes into the store beside the cells: a
scalar a cell as a column, a value per cell and feature as a matrix, and what is summed over cells as a table. A
:class:`Comparison` looks at a bounded sample of two selections of cells, and gives a table.

Both are handed the model of scvi-tools itself, in evaluation mode, whose categories are those of the reference and,
behind them, the new batches that adapters were fitted for. They import neither Ray nor the store.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import numpy.typing as npt
    import pandas as pd

    from scviaduct.families.base import Encoded, Facts


@dataclass(frozen=True, slots=True)
class Cells:
    """Some cells, as a model decodes them.

    Attributes
    ----------
    model
        Of scvi-tools, in evaluation mode. It belongs to the worker: leave it as it was.
    data
        AnnData or MuData in the layout that the model was set up with: raw counts, and the obs columns that it was
        set up with, all of values that it knows. Every cell has a count.
    obs
        One row a cell: the obs columns that :meth:`Analysis.obs` asked for, as the source has them.
    encoded
        Latents of the cells, by the reference's encoder and the adapters of their batches.
    facts
        Of the reference.
    seed
        Of everything random: a digest of the unit, so that a cell's values do not depend on who computes them.
    """

    model: Any
    data: Any
    obs: pd.DataFrame
    encoded: Encoded
    facts: Facts
    seed: int


@dataclass(frozen=True, slots=True)
class Shape:
    """What an output writes.

    Attributes
    ----------
    columns
        Name of each column to its type in the store: ``string``, ``bool``, ``int64`` or ``double``.
    matrices
        Name of each matrix to the names of its features (columns).
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    matrices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Part:
    """What an output makes of some cells.

    Attributes
    ----------
    columns
        Name to one value a cell, shape ``(n_cells,)``.
    matrices
        Name to float32 of shape ``(n_cells, n_features)``.
    sums
        Name to an array of any shape that :meth:`Output.finish` puts together.
    """

    columns: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    matrices: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    sums: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Finished:
    """What an output comes to once every unit is done.

    Attributes
    ----------
    tables
        Name to table.
    facts
        JSON-serialisable figures that :meth:`Output.settle` or a reader needs.
    """

    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Strata:
    """A bounded sample that an output looks at before the units.

    Attributes
    ----------
    column
        obs column whose values are the strata.
    cells
        Cells of each stratum, at most.
    """

    column: str
    cells: int


class Analysis(abc.ABC):
    """What both kinds share. A module of this package lists its own in ``ANALYSES``."""

    name: ClassVar[str]
    """As ``scviaduct derive --what`` takes it, in lower case with hyphens."""
    families: ClassVar[tuple[str, ...]]
    """Families that it is for."""
    about: ClassVar[str]
    """What it gives, in a line."""
    options: ClassVar[type]
    """Frozen dataclass of what can be told, every field with a default. Fields of one name mean one thing in all."""

    def check(self, facts: Facts, options: Any) -> None:  # noqa: B027 - most have nothing to refuse
        """Refuse what cannot be, before anything is read.

        Raises
        ------
        InputError
            Naming the value.
        """

    def obs(self, facts: Facts, options: Any) -> tuple[str, ...]:  # noqa: ARG002
        """obs columns that it reads, besides those that the model was set up with."""
        return ()


class Output(Analysis):
    """Computed cell by cell, a unit at a time."""

    @abc.abstractmethod
    def shape(self, facts: Facts, options: Any) -> Shape:
        """What it writes."""

    def strata(self, facts: Facts, options: Any) -> Strata | None:  # noqa: ARG002
        """The sample that :meth:`prepare` looks at; None for none."""
        return None

    def prepare(self, cells: Cells, options: Any) -> Mapping[str, npt.NDArray[Any]]:  # noqa: ARG002
        """What every unit is told of the sample."""
        return {}

    @abc.abstractmethod
    def unit(self, cells: Cells, told: Mapping[str, npt.NDArray[Any]], options: Any) -> Part:
        """What it makes of a unit's cells; ``told`` is what :meth:`prepare` gave."""

    def finish(self, sums: Sequence[Mapping[str, npt.NDArray[Any]]], facts: Facts, options: Any) -> Finished:  # noqa: ARG002
        """Put the units' sums together, in the order of the store."""
        return Finished()

    def settle(
        self,
        columns: Mapping[str, npt.NDArray[Any]],  # noqa: ARG002
        finished: Finished,  # noqa: ARG002
        options: Any,  # noqa: ARG002
    ) -> Mapping[str, npt.NDArray[Any]]:
        """Columns of a unit that depend on what all units came to, from those that :meth:`unit` gave."""
        return {}


class Comparison(Analysis):
    """Looks at a bounded sample of two selections of cells.

    Its options have ``select`` and ``against``: conditions on the store's columns, and ``cells``: of each selection at
    most, drawn evenly over its batches.
    """

    @abc.abstractmethod
    def compare(self, cells: Cells, first: npt.NDArray[np.bool_], options: Any) -> Finished:
        """Compare the sampled cells of the first selection with the others, which are of the second.

        Parameters
        ----------
        cells
            Of both selections.
        first
            bool, shape ``(n_cells,)``.
        options
            As told.
        """
