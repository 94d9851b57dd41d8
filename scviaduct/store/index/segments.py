"""Segments: the vectors and rows of some files of a space, list after list; written once, and memory-mapped.

A segment depends on its files, which never change, and on the quantizer, so that versions share it: the folder of each
has hard links to it. What a version does not name any more of it is masked by a negative base.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa

from scviaduct.store.index.assigned import assigned
from scviaduct.store.index.kernels import fetch, pack
from scviaduct.store.index.linking import require_rows, require_vectors
from scviaduct.store.index.manifest import FORMAT, Part
from scviaduct.store.index.quantizer import Quantizer, cached
from scviaduct.store.index.rows import write_rows
from scviaduct.store.reading import read_units
from scviaduct.store.space import Space
from scviaduct.values import digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from scviaduct.store.reading import Snapshot
    from scviaduct.values import FloatArray, IntArray, LongArray


@dataclass(frozen=True, slots=True)
class Task:
    """A segment to write; picklable. Its memory is bounded by its cells: vectors and rows of them, twice.

    Attributes
    ----------
    space, version
        Folder of the space, and which version's columns the rows have.
    names
        Files, in the order of the version.
    folder
        Of the index that is being built.
    quantizer
        Digest of the centroids in that folder; empty for one list.
    rows
        What the rows are called by.
    threads
        Of faiss.
    """

    space: str
    version: int
    names: tuple[str, ...]
    folder: str
    quantizer: str
    rows: str
    threads: int = 1

    @property
    def id(self) -> str:
        """Folder of the segment: what decides its vectors."""
        return digest("segment", FORMAT, self.quantizer, list(self.names))

    def run(self) -> str:
        """Write what is not there yet of the segment; its id."""
        space, folder = Space(Path(self.space)), Path(self.folder) / self.id
        folder.mkdir(exist_ok=True)
        snapshot = space.snapshot(self.version)
        snapshot = replace(snapshot, pairs={name: snapshot.pairs[name] for name in self.names})
        if (folder / "segment.json").exists():  # of other rows
            part = Part(self.id, "", 0, (0,) * len(self.names))
            segment = Segment.open(part, folder, lists_of(self._quantizer()), rows=False)
            tables = [
                _rows(table) for _, table in _tables(space, snapshot, [n for n in snapshot.names if n != "latent"])
            ]
            starts = np.concatenate([[0], np.cumsum(segment.mapped)])
            order = (starts[segment.members[:, 0]] + segment.members[:, 1]).astype(np.int64)
            write_rows(tables, order, segment.offsets, folder, self.rows)
        else:
            self._write(space, snapshot, folder)
        return self.id

    def _write(self, space: Space, snapshot: Snapshot, folder: Path) -> None:
        """Vectors and rows of files."""
        tables, latents, lists, squares, mapped = [], [], [], 0.0, dict.fromkeys(self.names, 0)
        quantizer = self._quantizer()
        for name, table in _tables(space, snapshot, list(snapshot.names)):
            latent = latent_of(table, space.n_latent)
            tables.append(_rows(table))
            latents.append(latent)
            found, square = self._lists(quantizer, name, latent)
            lists.append(found)
            squares += square
            mapped[name] = len(latent)
        each = np.array(list(mapped.values()))
        files = np.repeat(np.arange(len(each)), each)
        rows = np.arange(len(files)) - np.repeat(np.concatenate([[0], np.cumsum(each)[:-1]]), each)
        x, offsets, order = in_lists(np.concatenate(latents), np.concatenate(lists), lists_of(quantizer))
        x.tofile(folder / "vectors.f32")
        offsets.tofile(folder / "offsets.i64")
        np.stack([files[order], rows[order]], axis=1).astype(np.int32).tofile(folder / "members.i32")
        write_rows(tables, order, offsets, folder, self.rows)
        told = {"names": list(self.names), "mapped": each.tolist(), "squares": squares, "dimensions": space.n_latent}
        (folder / "segment.json").write_text(json.dumps(told))

    def _quantizer(self) -> Quantizer | None:
        return cached(self.folder, self.quantizer) if self.quantizer else None

    def _lists(self, quantizer: Quantizer | None, name: str, latent: FloatArray) -> tuple[IntArray, float]:
        """Lists of a file's cells, as their worker assigned them or now; and the summed squared distances."""
        if quantizer is None:
            return np.zeros(len(latent), np.int32), 0.0
        known = assigned(Path(self.space), self.quantizer, name, len(latent))
        if known is None:
            found, squares = quantizer.assign(latent, self.threads)
            return found, float(squares.sum(dtype=np.float64))
        return known


@dataclass(frozen=True, slots=True)
class Builder:
    """How segments are written.

    Attributes
    ----------
    run
        Runs tasks; None runs them one after the other in this process.
    workers
        Tasks that ``run`` works on at a time: new cells are cut into as many segments.
    """

    run: Callable[[Sequence[Task]], None] | None = None
    workers: int = 1

    def write(self, tasks: Sequence[Task]) -> None:
        """Run all tasks."""
        if self.run is not None:
            self.run(tasks)
            return
        for task in tasks:
            task.run()


def _tables(space: Space, snapshot: Snapshot, names: Sequence[str]) -> Iterator[tuple[str, pa.Table]]:
    """Files and their cells that have a latent."""
    wanted = names if "latent" in names else ["latent", *names]
    for pair, table in read_units(space.path, snapshot, wanted, None):
        yield pair.cells.name, table.filter(table["latent"].is_valid())


def _rows(table: pa.Table) -> pa.Table:
    return table.drop_columns(["latent"])


def latent_of(table: pa.Table, dimensions: int) -> FloatArray:
    """Latents of cells that have one, float32, shape ``(n, dimensions)``."""
    flat = table["latent"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(flat, np.float32).reshape(-1, dimensions)


def in_lists(latent: FloatArray, lists: IntArray, count: int) -> tuple[FloatArray, LongArray, LongArray]:
    """Vectors, list after list.

    Parameters
    ----------
    latent, lists
        float32, shape ``(n, dimensions)``, and int32, shape ``(n,)``: the list of each.
    count
        Number of lists.

    Returns
    -------
    tuple
        ``x`` and ``offsets`` as :func:`scviaduct.store.index.comparing.scan` takes them, and int64, shape ``(n,)``:
        which vector comes where.
    """
    order = np.argsort(lists, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(lists, minlength=count))]).astype(np.int64)
    x = np.empty(latent.size, np.float32)
    pack(latent, order, offsets, x)
    return x, offsets, order


def lists_of(quantizer: Quantizer | None) -> int:
    """Lists of each segment: one in an exact index."""
    return len(quantizer.centroids) if quantizer else 1


def rows_key(snapshot: Snapshot) -> str:
    """Digest of what decides the rows of a version's cells, besides the files: columns, and derived sets."""
    derived = {name: one.told() for name, one in snapshot.derived.items()}
    return digest("rows", FORMAT, [f"{field.name}: {field.type}" for field in snapshot.schema], derived)[:16]


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """An open segment.

    Attributes
    ----------
    x, offsets
        float32, flat; int64, shape ``(lists + 1,)``: the vectors, as :func:`scviaduct.store.index.comparing.scan` takes
        them.
    members
        int32, shape ``(n, 2)``: file of each vector, and its place among the cells of the file.
    bases
        int64, shape ``(files,)``: position of each file's first cell; -1 for none.
    mapped
        int64, shape ``(files,)``: cells of each file.
    squares
        Squared distances to the centroids, summed.
    table, counts
        Rows to answer with, and the counts of their values per list; memory-mapped.
    dimensions
        Of a vector.
    """

    x: FloatArray
    offsets: LongArray
    members: IntArray
    bases: LongArray
    mapped: LongArray
    squares: float
    table: pa.Table
    counts: pa.Table
    dimensions: int

    @classmethod
    def open(cls, part: Part, folder: Path, lists: int, *, rows: bool = True) -> Self:
        """Map a segment into memory.

        Parameters
        ----------
        part
            As the manifest has it.
        folder
            Of the segment.
        lists
            That its vectors are in.
        rows
            Whether rows are opened, too.

        Raises
        ------
        FileNotFoundError
            If it is not there, or not whole.
        """
        told = require_vectors(folder, lists)
        members = _mapped(folder / "members.i32", np.int32).reshape(-1, 2)
        table, counts = require_rows(folder, part.rows, len(members)) if rows else (pa.table({}), pa.table({}))
        return cls(
            _mapped(folder / "vectors.f32", np.float32),
            _mapped(folder / "offsets.i64", np.int64),
            members,
            np.array(part.bases, np.int64),
            np.array(told["mapped"], np.int64),
            told["squares"],
            table,
            counts,
            told["dimensions"],
        )

    @property
    def sizes(self) -> LongArray:
        """int64, shape ``(lists,)``: vectors of each list, masked ones included."""
        return np.diff(self.offsets)

    @property
    def whole(self) -> bool:
        """Whether no file is masked."""
        return bool((self.bases >= 0).all())

    def positions(self, elements: LongArray | None = None) -> LongArray:
        """Positions of vectors among the version's cells; -1 for masked ones."""
        at = slice(None) if elements is None else elements
        members = self.members[at]
        base = self.bases[members[:, 0]]
        return np.where(base < 0, -1, base + members[:, 1])

    def vectors(self, elements: LongArray) -> FloatArray:
        """Vectors, float32, shape ``(n, dimensions)``."""
        out = np.empty((len(elements), self.dimensions), np.float32)
        fetch(self.x, self.offsets, elements, out)
        return out


def _mapped(path: Path, kind: type[np.generic]) -> Any:
    """An array in a file; read-only, and never copied."""
    if path.stat().st_size == 0:
        empty = np.empty(0, kind)
        empty.flags.writeable = False
        return empty
    return np.asarray(np.memmap(path, kind, "r"))
