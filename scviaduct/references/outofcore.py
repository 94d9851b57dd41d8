"""Training cells that do not fit into memory: their counts on disk, mapped into memory as training asks for them.

The cells are streamed once from any source (filters, duplicates, layers and pinned versions are the source's own) into
three flat files: the arrays of a CSR matrix, 8 bytes a count. scvi-tools sees the same matrix as if it were held,
so that every family of one matrix trains as it does in memory, to the bit; the system loads the pages of the cells that
a mini-batch draws, and drops them when memory is short. What stays in memory a cell is its obs columns and its name.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, override

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import sparse

from scviaduct.errors import InputError
from scviaduct.values import digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from scviaduct.families import Family
    from scviaduct.references.features import Features
    from scviaduct.sources import Source
    from scviaduct.values import CellBlock, LongArray, Scan

    Obs = list[tuple[str, pa.Table]]

MODES = ("auto", "yes", "no")
COUNT_BYTES = 8
"""A float32 and an int32."""
_JOINED = 1.5
"""What joining the blocks takes at its peak, of what the counts take."""
_SHARE = 0.5
"""Of the free memory, what the counts may take before they are left on disk; training needs the rest."""
_WIDE = 2**31 - 1
"""Counts beyond which scipy numbers columns with 64 bits, as it numbers counts; other files it would copy."""
_SAMPLED_SHARDS, _SAMPLED_CELLS = 8, 1024
_CHUNK = 1 << 24
_FIRST = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
_SECOND = "memory.max", "memory.current", "inactive_file"
"""Files of a control group of version 1 and 2: its limit, what it takes, and in ``memory.stat`` files kept of that."""
_HEAD, _OBS = "cells.json", "obs.parquet"
_ARRAYS = ("indptr", "indices", "data")


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take: what the machine has to give, or a control group of it if that is less.

    Parameters
    ----------
    root
        Where ``proc`` and ``sys`` are.
    """
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    told = root / "proc/meminfo"  # Linux says what is free besides what it keeps of files
    if told.is_file():
        kilobytes = next(line.split()[1] for line in told.read_text().splitlines() if line.startswith("MemAvailable"))
        free = int(kilobytes) << 10
    return max(min([free, *_left_to_groups(root)]), 0)


def _left_to_groups(root: Path) -> Iterator[int]:
    """What each control group of this process may still take, up to the root's, of either version of them.

    Files that the kernel keeps in memory count as a group's own, and are given up for whatever needs it.
    """
    told = root / "proc/self/cgroup"
    for line in told.read_text().splitlines() if told.is_file() else ():
        _, controllers, inside = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / ("sys/fs/cgroup/memory" if controllers else "sys/fs/cgroup")
        most, used, kept = _FIRST if controllers else _SECOND
        group = top / inside.lstrip("/")
        for one in (group, *group.parents):
            # A container sees its own group as the top, or the machine's: then the path leads to nothing.
            if not one.is_relative_to(top) or not all((one / name).is_file() for name in (most, used, "memory.stat")):
                continue
            if (limit := (one / most).read_text().strip()) != "max":
                held = dict(entry.split() for entry in (one / "memory.stat").read_text().splitlines())
                yield int(limit) - int((one / used).read_text()) + int(held.get(kept, 0))


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the counts of the training cells take.

    Attributes
    ----------
    cells, counts
        Of the source; the counts that are not zero, of the chosen features, as a sample of the cells has them.
    memory
        Bytes that are free.
    """

    cells: int
    counts: int
    memory: int

    @property
    def held(self) -> int:
        """Bytes at the peak, where the counts are held in memory."""
        return int(self.counts * COUNT_BYTES * _JOINED)

    @property
    def file(self) -> int:
        """Bytes on disk, where they are not."""
        return self.counts * COUNT_BYTES

    @property
    def beyond(self) -> bool:
        """Whether they are too many to be held."""
        return self.held > self.memory * _SHARE

    def __str__(self) -> str:
        each = self.counts / max(self.cells, 1)
        took, free = _size(self.held), _size(self.memory)
        return f"{self.cells:,} cells of about {each:,.0f} counts would take {took} of {free} of free memory"


def _size(count: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if count >= 10 or unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def estimate(opened: Source, scan: Scan, features: Features, found: Family) -> Estimate:
    """Count a sample of the cells: the first of some shards, evenly taken from the source."""
    step = max(1, -(-len(scan.shards) // _SAMPLED_SHARDS))
    cells = counts = 0
    for shard in scan.shards[::step]:
        target = features.target(opened.genes(shard), found)
        block = opened.read(shard, target, len(features), limit=_SAMPLED_CELLS)
        cells += block.n_cells
        counts += len(block.data)
    return Estimate(scan.cells, round(counts / max(cells, 1) * scan.cells), free_memory())


def _unsaid(line: str) -> None:
    """Says nothing."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the counts of training cells go.

    Attributes
    ----------
    folder
        For those that are left on disk; it may lack its parents. Many small random reads: a local disk suits it.
    mode
        ``yes`` and ``no``, or ``auto`` for what :class:`Estimate` suggests.
    say
        Told the estimate, and what is done.
    """

    folder: Path | None = None
    mode: str = "no"
    say: Callable[[str], None] = _unsaid

    def check(self, found: Family) -> None:
        """Refuse what cannot be, before anything is read.

        Raises
        ------
        InputError
            If the mode is not known, or the family's cells are always held.
        """
        if self.mode not in MODES:
            raise InputError(f"--out-of-core {self.mode} is not known.", f"One of {', '.join(MODES)}.")
        if self.mode == "yes" and not trains_from_disk(found):
            raise InputError(f"--out-of-core yes: {_held_always(found)}.", _FEWER)

    def on_disk(self, opened: Source, scan: Scan, features: Features, found: Family) -> bool:
        """Decide, and say why.

        Raises
        ------
        InputError
            If they fit neither into memory nor on the disk.
        """
        if self.folder is None or self.mode == "no":
            return False
        most = Estimate(scan.cells, scan.cells * len(features), free_memory())
        if self.mode == "auto" and not most.beyond:  # not even if no count were zero
            return False
        guess = estimate(opened, scan, features, found)
        if self.mode == "auto" and not guess.beyond:
            self.say(f"{guess}: held in memory")
            return False
        if not trains_from_disk(found):
            if guess.held > guess.memory:
                raise InputError(f"{guess}, and {_held_always(found)}.", _FEWER)
            self.say(f"{guess}: held in memory, as {_held_always(found)}")
            return False
        free = shutil.disk_usage(_there(self.folder)).free
        if guess.file > free:
            told = f"{guess}, and {_size(guess.file)} of {_size(free)} that are free at '{self.folder.parent}'"
            raise InputError(f"{told}.", "Name an --out on a larger disk, or fewer genes: --genes 2000.")
        self.say(f"{guess}: left on disk (out of core), {_size(guess.file)} in {self.folder}")
        return True


_FEWER = "Train on a machine with more memory, or on fewer features or cells: --genes 2000, filter= in the source."


def trains_from_disk(found: Family) -> bool:
    """Whether a family trains on one matrix, whose counts can stay on disk."""
    return len(found.needs.modalities) == 1


def _held_always(found: Family) -> str:
    modalities = " and ".join(found.needs.modalities)
    return (
        f"a {found.name} is set up from a MuData of {modalities}, whose matrices are cut out of the counts, so that its"
        f" memory is bounded by twice the counts ({2 * COUNT_BYTES} bytes each)"
    )


def _there(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.is_dir())


class MappedCounts(sparse.csr_matrix):
    """Counts mapped from files. A copy of what cannot be written to is the same: scvi-tools copies to minify."""

    @override
    def copy(self) -> Self:
        """The same where it is read-only; a slice holds arrays of its own, and is copied."""
        return self if not self.data.flags.writeable else super().copy()

    def plain(self) -> sparse.csr_matrix:
        """The same arrays as a matrix of scipy's own class, which is what anndata writes."""
        return sparse.csr_matrix((self.data, self.indices, self.indptr), shape=self.shape, copy=False)


@dataclass(frozen=True, slots=True)
class Spool:
    """The counts and the obs of training cells in a folder.

    Attributes
    ----------
    folder
        Of the files; what else is in it goes when they are written.
    key
        Digest of what the cells are; a folder of another key is written anew.
    n_features
        Columns.
    """

    folder: Path
    key: str
    n_features: int
    wide: int = field(default=_WIDE)

    @classmethod
    def of(cls, folder: Path, version: str, features: Features, columns: Sequence[str]) -> Spool:
        """That of the cells of a source's version, of some features and with some obs columns."""
        return cls(folder, digest(version, features.names, features.modality, list(columns)), len(features))

    @property
    def whole(self) -> bool:
        """Whether the cells are all there."""
        path = self.folder / _HEAD
        return path.is_file() and bool(json.loads(path.read_text()).get("key") == self.key)

    def write(self, blocks: Iterable[CellBlock]) -> None:
        """Write the cells; memory is that of one block, and of the obs columns."""
        if self.folder.is_dir():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        total, tables = 0, []
        with (self.folder / "indptr").open("wb") as pointers:
            np.zeros(1, np.int64).tofile(pointers)
            with (self.folder / "indices").open("wb") as indices, (self.folder / "data").open("wb") as data:
                for block in blocks:
                    (block.indptr[1:].astype(np.int64) + total).tofile(pointers)
                    block.indices.astype(np.int32, copy=False).tofile(indices)
                    block.data.astype(np.float32, copy=False).tofile(data)
                    total += len(block.data)
                    names = pa.array([block.shard.dataset_id] * block.n_cells, pa.string()).dictionary_encode()
                    tables.append(block.obs.append_column(_DATASET, names))
        if total > self.wide:
            _widen(self.folder / "indices")
        pq.write_table(pa.concat_tables(tables, promote_options="permissive").unify_dictionaries(), self.folder / _OBS)
        told = {"key": self.key, "counts": total, "columns": "int64" if total > self.wide else "int32"}
        (self.folder / _HEAD).write_text(json.dumps(told))

    def counts(self) -> MappedCounts:
        """The counts, float32 of shape ``(n_cells, n_features)``, mapped from the files and read-only."""
        told = json.loads((self.folder / _HEAD).read_text())
        kinds: tuple[Any, ...] = (np.int64, np.dtype(told["columns"]), np.float32)
        indptr, indices, data = (_mapped(self.folder / name, kind) for name, kind in zip(_ARRAYS, kinds, strict=True))
        whole: LongArray = np.array(indptr)
        return MappedCounts((data, indices, whole), shape=(len(whole) - 1, self.n_features), copy=False)

    def obs(self) -> Obs:
        """The obs columns of each run of cells of one dataset, in the order of the rows."""
        table = pq.read_table(self.folder / _OBS)
        datasets = table[_DATASET].to_numpy()
        starts = [0, *(np.flatnonzero(datasets[1:] != datasets[:-1]) + 1).tolist(), len(datasets)]
        plain = table.drop_columns([_DATASET])
        return [(str(datasets[low]), plain.slice(low, high - low)) for low, high in pairwise(starts) if high > low]


_DATASET = "scviaduct:dataset"


def _mapped(path: Path, kind: Any) -> Any:
    return np.memmap(path, kind, "r") if path.stat().st_size else np.zeros(0, kind)


def _widen(path: Path) -> None:
    """Rewrite a file of int32 as int64."""
    wide = path.with_name(f"{path.name}.wide")
    narrow = np.memmap(path, np.int32, "r")
    with wide.open("wb") as file:
        for start in range(0, len(narrow), _CHUNK):
            narrow[start : start + _CHUNK].astype(np.int64).tofile(file)
    wide.replace(path)
