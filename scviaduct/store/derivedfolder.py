"""The folder of a derived set, as the one process sees it that hands out the work: slots, arrays, what is done."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

from scviaduct.store.derived import FOLDER, DerivedSet, MatrixLayout
from scviaduct.store.derivedstaging import (
    DerivedCompletion,
    DerivedStager,
    create_array,
    is_whole,
    publish,
    record_path,
)
from scviaduct.store.files import read_json, write_once

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class DerivedFolder:
    """A set on disk, and what a driver does with it. Several drivers may do so at a time.

    Attributes
    ----------
    space
        Folder of the space.
    made
        What the set is.
    """

    space: Path
    made: DerivedSet

    @classmethod
    def create(cls, space: Path, made: DerivedSet) -> Self:
        """Open the folder of a set, and make it first if it is not there; its sizes stay as they were made."""
        folder = space / FOLDER / made.id
        write_once(folder / "set.json", asdict(made))
        opened = cls(space, DerivedSet.load(folder))
        opened._grow()
        return opened

    @property
    def path(self) -> Path:
        """The folder."""
        return self.space / FOLDER / self.made.id

    def stager(self) -> DerivedStager:
        """What workers write with."""
        return DerivedStager(str(self.space), self.made)

    def assign(self, units: Mapping[str, int]) -> dict[str, int]:
        """Give every unit its slots, and let the arrays reach that far; call it before workers start.

        Parameters
        ----------
        units
            Unit id to its number of cells, all of them, mapped or not.

        Returns
        -------
        dict
            Unit id to its first slot: that of earlier calls, whoever made them, where there is one.
        """
        slots, end = self._slots()
        while fresh := [unit for unit in units if unit not in slots]:
            # A batch is called by its first slot and written if absent: of two drivers that hand out the same slots
            # one is refused and goes on behind the other's.
            at, batch = end, {}
            for unit in fresh:
                batch[unit] = at
                at += self.made.span(units[unit])
            write_once(self._batch(end), {"end": at, "units": batch})
            slots, end = self._slots()
        self._grow()
        return {unit: slots[unit] for unit in units}

    def completions(self, units: Iterable[str]) -> dict[str, DerivedCompletion]:
        """Units that are done; what a killed worker had recorded and not put in its place is put there."""
        found = {}
        for unit in units:
            record = record_path(self.path, unit)
            if record.exists() and is_whole(self.path, completion := DerivedCompletion.load(record)):
                publish(self.path, completion)
                found[unit] = completion
        return found

    def _batch(self, first: int) -> Path:
        return self.path / "slots" / f"{first:010}.json"

    def _slots(self) -> tuple[dict[str, int], int]:
        """Slots that were given, and the first one that was not."""
        slots: dict[str, int] = {}
        end = 0
        while (batch := self._batch(end)).exists():
            told = read_json(batch)
            slots |= told["units"]
            end = told["end"]
        return slots, end

    def _grow(self) -> None:
        """Let every array reach to the last slot that was given.

        Another driver may do the same with less in mind. Each looks again when it has written, so whoever writes last
        has seen all that was given by then.
        """
        for name, layout in self.made.matrices.items():
            while True:
                rows = max(1, self._slots()[1]) * self.made.shard_rows
                reached = _reach(self.path / f"{name}.zarr", layout, rows)
                if reached >= max(1, self._slots()[1]) * self.made.shard_rows:
                    break


def _reach(path: Path, layout: MatrixLayout, rows: int) -> int:
    """Make an array, or let it grow to so many rows; it never shrinks. The rows that it has."""
    import zarr
    from zarr.errors import ContainsArrayError

    if not (path / "zarr.json").exists():
        try:
            create_array(path, layout, rows)
        except ContainsArrayError:  # another driver was quicker
            return 0
    array: Any = zarr.open_array(path, mode="r+")
    if array.shape[0] < rows:
        array.resize((rows, array.shape[1]))
    return int(zarr.open_array(path, mode="r").shape[0])
