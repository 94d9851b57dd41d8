"""Choosing the cells of a comparison from what the store has of them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scviaduct.errors import InputError
from scviaduct.mapping.sampling import hashes_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy.typing as npt

    from scviaduct.store import Space

    Rows = npt.NDArray[np.int64]

_COLUMNS = ("unit", "unit_row", "dataset_id", "adapter", "observation_id")
_SEED = 0
_EXAMPLE = "--select \"label = 'B'\" --against \"label = 'NK'\""


@dataclass(frozen=True, slots=True)
class _Held:
    """Cells of a unit for which a condition holds: rows, what stratum each is of, and seeded hashes of their keys."""

    unit: str
    rows: Rows
    strata: list[tuple[str, str]]
    hashes: npt.NDArray[np.uint64]


def choose(space: Space, select: str, against: str, cells: int) -> dict[str, Rows]:
    """Cells of two selections, drawn evenly over their datasets and batches.

    Parameters
    ----------
    space
        Newest version of which is asked.
    select, against
        Conditions; an empty second one stands for all cells that the first does not hold for.
    cells
        Of each selection, at most.

    Returns
    -------
    dict
        Unit to int64 of shape ``(n, 2)``: row in the unit, and 1 for a cell of the first selection, else 0.

    Raises
    ------
    InputError
        If no first condition is given, a selection is empty, or both hold for some cells.
    """
    if not select:
        raise InputError("No cells to compare are named.", f"Name some, and others: {_EXAMPLE}.")
    taken: dict[str, list[Rows]] = defaultdict(list)

    def noted(tables: Iterable[_Held]) -> Iterator[_Held]:
        for held in tables:
            taken[held.unit].append(held.rows)
            yield held

    first = _drawn(noted(_cells_of(space, select)), cells)
    both = 0

    def others() -> Iterator[_Held]:
        nonlocal both
        for held in _cells_of(space, against or None):
            shared = np.isin(held.rows, np.concatenate(taken.get(held.unit, [np.zeros(0, np.int64)])))
            both += int(shared.sum())
            keep = np.flatnonzero(~shared)
            yield _Held(held.unit, held.rows[keep], [held.strata[i] for i in keep], held.hashes[keep])

    second = _drawn(others(), cells)
    if against and both:
        problem = f"--select and --against both hold for {both:,} cells."
        raise InputError(problem, "Change one so that they exclude each other.")
    for option, told, found in (("--select", select, first), ("--against", against or f"NOT ({select})", second)):
        if not found:
            raise InputError(f'{option} "{told}" holds for no cell.', "scviaduct status shows what the store has.")
    chosen: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for flag, found in ((1, first), (0, second)):
        for unit, row in found:
            chosen[unit].append((row, flag))
    return {unit: np.array(sorted(rows), np.int64) for unit, rows in sorted(chosen.items())}


def _cells_of(space: Space, where: str | None) -> Iterator[_Held]:
    """Cells for which a condition holds, a unit at a time."""
    for table in space.read(list(_COLUMNS), where):
        dataset, unit = table["dataset_id"][0].as_py(), table["unit"][0].as_py()  # a unit has one dataset
        adapters = [value or "" for value in table["adapter"].to_pylist()]
        hashes = hashes_of(dataset, table["observation_id"].to_pylist(), _SEED)
        rows = table["unit_row"].to_numpy().astype(np.int64)
        yield _Held(unit, rows, [(dataset, adapter) for adapter in adapters], hashes)


def _drawn(tables: Iterable[_Held], cells: int) -> list[tuple[str, int]]:
    """At most so many cells, as evenly over the strata as their sizes allow: those of the smallest hashes."""
    smallest: dict[tuple[str, str], list[tuple[int, str, int]]] = defaultdict(list)
    for held in tables:
        for found, row, stratum in zip(held.hashes.tolist(), held.rows.tolist(), held.strata, strict=True):
            smallest[stratum].append((found, held.unit, row))
        for stratum in set(held.strata):
            smallest[stratum] = sorted(smallest[stratum])[:cells]
    drawn: list[tuple[str, int]] = []
    left, sizes = cells, sorted(smallest.items(), key=lambda item: (len(item[1]), item[0]))
    for position, (_, ones) in enumerate(sizes):
        share = min(left // (len(sizes) - position), len(ones))  # what a small stratum leaves goes to the larger ones
        drawn += [(unit, row) for _, unit, row in ones[:share]]
        left -= share
    return drawn
