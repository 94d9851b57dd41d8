"""Staging of derived values: what a worker leaves behind for a unit of a derived set, before a commit names it.

An attempt writes all its files into a folder of its own. The completion record, written only if absent, says whose
attempt it is that counts, and only that one's files are then moved to their places; whoever finds a record whose files
wait moves them. So the files of two attempts never mix, and a unit that is killed anywhere is either done or not begun.
"""

from __future__ import annotations

import os
import secrets
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scviaduct import faults
from scviaduct.errors import StoreError
from scviaduct.store.derived import FOLDER, DerivedSet, MatrixLayout
from scviaduct.store.files import read_json, size, write_once, write_parquet
from scviaduct.store.schema import TYPES
from scviaduct.values import digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy.typing as npt

    from scviaduct.analysis.base import Part

_ATTEMPTS = ".attempts"
_SUM = "sum "
"""Before the name of every sum in its file, so that none is taken for an argument of numpy's."""


@dataclass(frozen=True, slots=True)
class DerivedCompletion:
    """The record that a unit of a derived set is done.

    Attributes
    ----------
    unit
        Unit id.
    slot
        First slot.
    rows, mapped
        Cells, and those of them that have values.
    attempt
        Folder that the files were written into.
    files
        Path relative to the set, as to the attempt's folder, to size in bytes.
    """

    unit: str
    slot: int
    rows: int
    mapped: int
    attempt: str
    files: Mapping[str, int]

    @classmethod
    def load(cls, record: Path) -> Self:
        """Read back a record."""
        return cls(**read_json(record))


def record_path(folder: Path, unit: str) -> Path:
    """Where the completion record of a unit lies in the folder of a set."""
    return folder / "units" / unit[:2] / f"{unit}.json"


def is_whole(folder: Path, completion: DerivedCompletion) -> bool:
    """Whether every file is in its place or waits to be moved there, with the recorded size."""
    waits = folder / _ATTEMPTS / completion.attempt
    # In this order: what is moved in between is seen at either end.
    return all(nbytes in (size(waits / path), size(folder / path)) for path, nbytes in completion.files.items())


def publish(folder: Path, completion: DerivedCompletion) -> None:
    """Move what waits to its place; several may do so at a time."""
    waits = folder / _ATTEMPTS / completion.attempt
    if not waits.exists():
        return
    for path, nbytes in completion.files.items():
        if size(waits / path) == nbytes:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # someone else has just moved it
                (waits / path).replace(folder / path)
            faults.point("placed")
    shutil.rmtree(waits, ignore_errors=True)


def settled_key(units: Iterable[str]) -> str:
    """Key of columns that depend on what exactly these units came to."""
    return digest(sorted(units))


@dataclass(frozen=True, slots=True)
class DerivedStager:
    """Writes what was derived of a unit's cells where a commit can name it; picklable.

    Attributes
    ----------
    space
        Folder of the space.
    made
        The set.
    """

    space: str
    made: DerivedSet

    @property
    def _folder(self) -> Path:
        return Path(self.space) / FOLDER / self.made.id

    def stage(self, unit: str, slot: int, mapped: npt.NDArray[np.bool_], part: Part) -> DerivedCompletion:
        """Write a unit's values, then the record that it is done.

        The first attempt wins: one that comes second removes its own files and returns the winner's record.

        Parameters
        ----------
        unit
            Unit id.
        slot
            Its first slot, as ``DerivedFolder.assign`` gave it.
        mapped
            bool, shape ``(n_rows,)``: which of the unit's cells ``part`` speaks of. The others are null, or NaN.
        part
            Values of those cells, in their order: columns of shape ``(n_mapped,)``, matrices of shape
            ``(n_mapped, n_features)``, sums of any shape. A column of the set may be missing here and settled later.

        Raises
        ------
        StoreError
            If a name is not one of the set's, or values have another shape or type than it says.
        """
        self._check(mapped, part)
        folder = self._folder
        attempt = f"{unit}.{secrets.token_hex(4)}"
        waits = folder / _ATTEMPTS / attempt
        try:
            self._write(waits, unit, slot, mapped, part)
            files = {str(path.relative_to(waits)): path.stat().st_size for path in _files(waits)}
            completion = DerivedCompletion(unit, slot, len(mapped), int(mapped.sum()), attempt, files)
            faults.point("staged")
            record = record_path(folder, unit)
            while not write_once(record, asdict(completion)):
                winner = DerivedCompletion.load(record)
                if is_whole(folder, winner):
                    shutil.rmtree(waits)
                    publish(folder, winner)
                    return winner
                # The winner's files were removed since; this attempt takes its place.
                record.unlink(missing_ok=True)
        except BaseException:
            shutil.rmtree(waits, ignore_errors=True)
            raise
        faults.point("recorded")
        publish(folder, completion)
        return completion

    def _check(self, mapped: npt.NDArray[np.bool_], part: Part) -> None:
        """Refuse what is not the set's."""
        told, n = f"Derived set {self.made.id} ({self.made.what})", int(mapped.sum())
        if set(part.matrices) != set(self.made.matrices):
            problem = f"{told} is given the matrices {sorted(part.matrices)}."
            raise StoreError(problem, f"It has: {', '.join(self.made.matrices) or 'none'}.")
        for name, values in part.matrices.items():
            expected = n, len(self.made.matrices[name].features)
            if values.shape != expected:
                raise StoreError(f"Matrix '{name}' of {told} has the shape {values.shape}.", f"It needs {expected}.")
        for name, values in part.sums.items():
            if np.asarray(values).dtype.hasobject:
                raise StoreError(f"Sum '{name}' of {told} holds Python objects.", "Sums are numbers, truths or text.")

    def _write(self, waits: Path, unit: str, slot: int, mapped: npt.NDArray[np.bool_], part: Part) -> None:
        """Write an attempt's files, in the folders that they will have in the set."""
        rows = self._rows(unit, mapped, part.columns)
        write_parquet(rows, waits / "columns" / f"{unit}.parquet")
        if part.sums:
            path = waits / "sums" / f"{unit}.npz"
            path.parent.mkdir(parents=True)
            np.savez(path, allow_pickle=False, **{_SUM + name: values for name, values in part.sums.items()})
            _flush(path)
        reach = (slot + self.made.span(len(mapped))) * self.made.shard_rows
        for name, values in part.matrices.items():
            path = waits / f"{name}.zarr"
            # Of the same shape as far as the unit's last slot, so that shards are called as they are in the set.
            array = create_array(path, self.made.matrices[name], reach)
            first = slot * self.made.shard_rows
            array[first : first + len(mapped)] = _spread(values, mapped)
            (path / "zarr.json").unlink()
            for shard in _files(path):
                _flush(shard)

    def _rows(self, unit: str, mapped: npt.NDArray[np.bool_], columns: Mapping[str, npt.NDArray[Any]]) -> pa.Table:
        """Rows of a unit, all of them, in the order of ``unit_row``."""
        n = len(mapped)
        where = pa.array(np.cumsum(mapped) - 1, mask=~mapped)
        values = {name: self._column(name, column, int(mapped.sum())).take(where) for name, column in columns.items()}
        row = {"unit": pa.array([unit] * n, pa.string()), "unit_row": pa.array(np.arange(n, dtype=np.int32))}
        return pa.table({**row, "mapped": pa.array(mapped), **values})

    def _column(self, name: str, values: npt.NDArray[Any], n: int) -> pa.Array:
        """Values in their type in the store; NaN and None are null."""
        told = f"of derived set {self.made.id} ({self.made.what})"
        if name not in self.made.columns:
            there = ", ".join(self.made.columns) or "none"
            raise StoreError(f"There is no column '{name}' {told}.", f"Columns: {there}.")
        if np.shape(values) != (n,):
            raise StoreError(f"Column '{name}' {told} has the shape {np.shape(values)}.", f"It needs {(n,)}.")
        kind = TYPES[self.made.columns[name]]
        try:
            return pa.array(np.asarray(values), from_pandas=True).cast(kind)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            problem = f"Column '{name}' {told} is not {kind}: {error}."
            raise StoreError(problem, "Give it the type that the output's shape says.") from error

    def settle(self, unit: str, key: str, columns: Mapping[str, npt.NDArray[Any]]) -> None:
        """Write columns of a staged unit that depend on what all units came to; once for a key.

        Parameters
        ----------
        unit
            Unit id.
        key
            What tells these values from those of other units: :func:`settled_key`.
        columns
            Name to one value per mapped cell.
        """
        path = settled_path(self._folder, key, unit)
        if path.exists():  # the same units come to the same values
            return
        write_parquet(self._rows(unit, self._read(unit)["mapped"].to_numpy(), columns), path)

    def columns(self, unit: str) -> dict[str, npt.NDArray[Any]]:
        """Columns that :meth:`stage` was given of a unit, one value per mapped cell; null is NaN or None."""
        rows = self._read(unit)
        mapped = rows.filter(rows["mapped"])
        names = [name for name in self.made.columns if name in rows.column_names]
        return {name: mapped[name].to_numpy() for name in names}

    def sums(self, unit: str) -> dict[str, npt.NDArray[Any]]:
        """Sums that :meth:`stage` was given of a unit."""
        path = self._folder / "sums" / f"{unit}.npz"
        if not path.exists():
            return {}
        with np.load(path, allow_pickle=False) as stored:
            return {name.removeprefix(_SUM): stored[name] for name in stored.files}

    def _read(self, unit: str) -> pa.Table:
        return pq.read_table(self._folder / "columns" / f"{unit}.parquet", partitioning=None)


def settled_path(folder: Path, key: str, unit: str) -> Path:
    """Where settled columns of a unit lie in the folder of a set."""
    return folder / "settled" / key / f"{unit}.parquet"


def create_array(path: Path, layout: MatrixLayout, rows: int) -> Any:
    """Make the array of a matrix, with room for so many rows, a whole number of slots."""
    import zarr
    from zarr.codecs import BloscCodec

    return zarr.create_array(
        path,
        shape=(rows, len(layout.features)),
        dtype="float32",
        chunks=layout.chunks,
        shards=layout.shards,
        compressors=BloscCodec(cname="zstd", clevel=3, shuffle="shuffle"),
        fill_value=np.nan,
        dimension_names=("row", "feature"),
    )


def _spread(values: npt.NDArray[np.float32], mapped: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    """Rows of mapped cells among those of all cells, which are NaN."""
    if mapped.all():
        return np.asarray(values, np.float32)
    whole = np.full((len(mapped), values.shape[1]), np.nan, np.float32)
    whole[mapped] = values
    return whole


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _flush(path: Path) -> None:
    """Have the file on disk, as :func:`write_parquet` does: numpy and zarr leave it to the system."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
