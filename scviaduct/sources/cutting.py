"""Cutting a stream of cells into shards, and refusing cell keys that repeat."""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import numpy as np

from scviaduct.errors import SourceError
from scviaduct.sources.hashing import hash_keys
from scviaduct.values import Shard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import numpy.typing as npt

    from scviaduct.sources.obs import Cells
    from scviaduct.values import LongArray


def rows_hasher() -> hashlib.blake2b:
    """The digest that pins a shard's rows; feed it with :func:`rows_bytes`."""
    return hashlib.blake2b(digest_size=16)


def rows_bytes(rows: LongArray) -> bytes:
    """Row numbers as little-endian int64."""
    return np.ascontiguousarray(rows, dtype="<i8").tobytes()


@dataclass(slots=True)
class _Growing:
    """The open shard of one dataset."""

    start: int
    stop: int = 0
    cells: int = 0
    rows: hashlib.blake2b = field(default_factory=rows_hasher)
    groups: Counter[int] = field(default_factory=Counter)


class Cutter:
    """Cuts shards per dataset: one is open for each dataset, and closes when it is full.

    Datasets may interleave; every row still falls into exactly one shard, that of its dataset whose range holds it.

    Parameters
    ----------
    template
        A shard that carries the address; the rest is filled in.
    shard_cells
        Cells of a full shard.
    """

    def __init__(self, template: Shard, shard_cells: int) -> None:
        if shard_cells < 1:
            raise SourceError(f"A shard cannot hold {shard_cells} cells.", "Give a positive number, such as 16384.")
        self._template = template
        self._shard_cells = shard_cells
        self._open: dict[str, _Growing] = {}
        self._done: list[tuple[Shard, Counter[int]]] = []

    def add(self, cells: Cells, groups: LongArray | None = None) -> None:
        """Take the next batch; rows ascend within it and from batch to batch.

        Parameters
        ----------
        cells
            The batch.
        groups
            int64, one a cell: which group it is of, to be counted by shard.
        """
        for dataset, positions in by_dataset(cells):
            self._extend(dataset, cells.rows[positions], None if groups is None else groups[positions])

    def _extend(self, dataset: str, rows: LongArray, groups: LongArray | None) -> None:
        at = 0
        while at < len(rows):
            shard = self._open.setdefault(dataset, _Growing(int(rows[at])))
            taken = rows[at : at + self._shard_cells - shard.cells]
            if groups is not None:
                found, cells = np.unique(groups[at : at + len(taken)], return_counts=True)
                shard.groups.update(dict(zip(found.tolist(), cells.tolist(), strict=True)))
            shard.rows.update(rows_bytes(taken))
            shard.cells += len(taken)
            shard.stop = int(taken[-1]) + 1
            at += len(taken)
            if shard.cells == self._shard_cells:
                self._close(dataset)

    def _close(self, dataset: str) -> None:
        grown, known = self._open.pop(dataset), self._template
        shard = Shard(
            known.uri,
            known.source,
            known.version,
            known.selection,
            dataset,
            grown.start,
            grown.stop,
            grown.cells,
            grown.rows.hexdigest(),
        )
        self._done.append((shard, grown.groups))

    def finish(self) -> tuple[Shard, ...]:
        """Close what is open.

        Returns
        -------
        tuple of Shard
            In the order of their first rows.
        """
        for dataset in list(self._open):
            self._close(dataset)
        self._done.sort(key=lambda item: (item[0].start, item[0].dataset_id))
        return tuple(shard for shard, _ in self._done)

    @property
    def groups(self) -> tuple[Counter[int], ...]:
        """Group to cells of each shard, in the order of :meth:`finish`."""
        return tuple(groups for _, groups in self._done)


def by_dataset(cells: Cells) -> Iterator[tuple[str, LongArray]]:
    """Each dataset of a batch with the positions of its cells, ascending."""
    if not len(cells.rows):
        return
    if len(cells.datasets) == 1:
        yield cells.datasets[0], np.arange(len(cells.rows))
        return
    order = np.argsort(cells.dataset_of, kind="stable")
    ends = np.cumsum(np.bincount(cells.dataset_of, minlength=len(cells.datasets)))
    for name, positions in zip(cells.datasets, np.split(order, ends[:-1]), strict=True):
        if len(positions):
            yield name, positions


class KeyCheck:
    """Finds cell keys that repeat within a dataset, in the memory of one dataset's 64-bit hashes.

    Hashes are spooled to an unnamed temporary file (8 bytes a cell), because datasets may interleave and a Census has
    more cells than a driver should hold. Equal hashes are compared as strings before anything is refused.
    """

    def __init__(self) -> None:
        self._spool = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self._pieces: dict[str, list[tuple[int, int]]] = defaultdict(list)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._spool.close()

    def add(self, cells: Cells) -> None:
        """Take the next batch."""
        hashes = hash_keys(cells.keys)
        for dataset, positions in by_dataset(cells):
            self._pieces[dataset].append((self._spool.tell(), len(positions)))
            self._spool.write(hashes[positions].tobytes())

    def finish(self, again: Callable[[], Iterable[Cells]], where: str) -> None:
        """Judge.

        Parameters
        ----------
        again
            Streams the cells a second time; called only if hashes repeat.
        where
            Place, for the message.

        Raises
        ------
        SourceError
            If two cells of a dataset have the same key, naming one.
        """
        suspects = {dataset: repeated for dataset in self._pieces if len(repeated := self._repeated(dataset))}
        if not suspects:
            return
        seen: dict[str, set[str]] = defaultdict(set)
        for cells in again():
            hashes = hash_keys(cells.keys)
            for dataset, positions in by_dataset(cells):
                if dataset not in suspects:
                    continue
                for position in positions[np.isin(hashes[positions], suspects[dataset])]:
                    key = cells.keys[int(position)].as_py()
                    if key in seen[dataset]:
                        raise SourceError(
                            f"Cell key '{key}' occurs more than once in dataset '{dataset}' of {where}.",
                            "Name an obs column that is unique within a dataset, key=COLUMN, or write the file again"
                            " after adata.obs_names_make_unique().",
                        )
                    seen[dataset].add(key)

    def _repeated(self, dataset: str) -> npt.NDArray[np.uint64]:
        hashes = np.empty(sum(count for _, count in self._pieces[dataset]), np.uint64)
        filled = 0
        for offset, count in self._pieces[dataset]:
            self._spool.seek(offset)
            self._spool.readinto(memoryview(hashes[filled : filled + count]).cast("B"))
            filled += count
        hashes.sort()
        return np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
