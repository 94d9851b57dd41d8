"""Building the index of a version: which segments are taken over, which are written, and what is measured.

A commit adds files; only they are written into a new segment, the others are linked from the index of an older version.
Of a segment whose files were replaced in part the rest is masked, and it is written anew once a quarter of its cells
is. Small segments are put together when there are many. Where cells have drifted away from the quantizer, a new one is
trained and all segments are written anew, which ``--rebuild`` asks for by hand.
"""

from __future__ import annotations

import secrets
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from scviaduct.errors import StoreError
from scviaduct.store.index import calibration
from scviaduct.store.index.assigned import forget
from scviaduct.store.index.comparing import MOST
from scviaduct.store.index.linking import link, told_of
from scviaduct.store.index.manifest import Manifest, Part, built, is_built, place, remove, remove_old
from scviaduct.store.index.opened import Index
from scviaduct.store.index.quantizer import POINTS_PER_LIST, Quantizer, cores, lists_for
from scviaduct.store.index.segments import Builder, Task, latent_of, lists_of, rows_key
from scviaduct.store.reading import order_of, read_units

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from scviaduct.store.reading import Snapshot
    from scviaduct.store.space import Space
    from scviaduct.values import FloatArray

IVF_FROM = 20_000
"""Cells from which there is an IVF index; below, comparing with every cell is quick (0.07 ms a query)."""
SEGMENT_CELLS = 1 << 21
"""Cells of a segment at most: what a build holds in memory, about 0.5 kB a cell, so 1 GB."""
SEGMENTS = 8
"""Segments of less than :data:`SEGMENT_CELLS` cells, above which the smaller half of them is put together;
as many as there are workers, where these are more."""
MASKED = 0.25
"""Share of a segment's cells that may be masked."""
_SEED = 0
_TRIES = 5


def ensure_index(
    space: Space, as_of: int | None = None, builder: Builder | None = None, *, rebuild: bool = False
) -> Index:
    """Open the index of a version, and build it first if it is not there.

    Parameters
    ----------
    space
        Whose.
    as_of
        Version; None for the newest.
    builder
        How segments are written; None for this process.
    rebuild
        Build it from the tables alone, with a quantizer of its own, though it is there.

    Raises
    ------
    StoreError
        If the version has no cells with a latent.
    """
    folder = ready_index(space, as_of, builder, rebuild=rebuild)
    for attempt in range(_TRIES):
        try:
            return Index.open(folder)
        except FileNotFoundError as error:  # another search removed it, or a file of it is missing or cut off
            missing = error
        if attempt:
            remove(folder)
        ready_index(space, int(folder.name), builder)
    raise StoreError(
        f"The index of version {folder.name} misses a file ({missing}).", f"Remove '{folder}': it is built anew."
    )


def ready_index(
    space: Space, as_of: int | None = None, builder: Builder | None = None, *, rebuild: bool = False
) -> Path:
    """Build the index of a version if it is not there; its folder. Parameters are those of :func:`ensure_index`."""
    snapshot = space.snapshot(as_of)
    folder = space.path / "index" / f"{snapshot.version}"
    if rebuild or not is_built(folder):
        _build(space, snapshot, folder, builder or Builder(), anew=rebuild)
        remove_old(space.path, folder)
        forget(space.path)
    return folder


def _build(space: Space, snapshot: Snapshot, folder: Path, builder: Builder, *, anew: bool) -> None:
    """Build under another name, then rename; of two builders one finds the folder there and drops its own.

    One that builds anew does not: what it finds there is what it was to replace.
    """
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    temporary.mkdir(parents=True)
    try:
        _Build(space, snapshot, temporary, builder).run(anew=anew)
        place(temporary, folder, anew=anew)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@dataclass(slots=True)
class _Reused:
    """A segment of an older index, and the cells of it that the version names."""

    folder: Path
    names: list[str]
    live: list[str]
    cells: int


@dataclass(slots=True)
class _Build:
    space: Space
    snapshot: Snapshot
    folder: Path
    builder: Builder
    order: list[str] = field(init=False)

    def __post_init__(self) -> None:
        files = sorted(self.snapshot.pairs.values(), key=order_of)
        self.order = [pair.cells.name for pair in files]

    def run(self, *, anew: bool) -> None:
        """Write the whole index, the manifest last."""
        if self.snapshot.cells > MOST:
            told = (
                f"Version {self.snapshot.version} of {self.space.name} has {self.snapshot.cells:,} cells, more than the"
            )
            raise StoreError(f"{told} {MOST:,} that an index orders.", "Map into several stores, and search each.")
        quantizer = None if anew else self._known()
        known = quantizer is not None
        quantizer = quantizer or self._train()
        parts, sizes, squares = self._write(quantizer, anew=anew)
        if quantizer and known and quantizer.drift(sizes, squares):
            self._clear()
            quantizer = self._train()
            parts, *_ = self._write(quantizer, anew=True)
        cells = sum(part.cells for part in parts)
        told = quantizer.digest if quantizer else ""
        manifest = Manifest(self.snapshot.version, cells, self.space.n_latent, 0, 0, 0.0, 0.0, 1.0, 0, told, parts)
        calibration.calibrate(Index.of(manifest, self.folder)).save(self.folder)

    def _clear(self) -> None:
        shutil.rmtree(self.folder)
        self.folder.mkdir()

    def _known(self) -> Quantizer | None:
        """The quantizer of the newest index, if there is one and the version is large enough for it."""
        if self.snapshot.cells < IVF_FROM:
            return None
        for folder in filter(is_built, built(self.space.path)):
            try:
                manifest = Manifest.load(folder)
                if manifest.quantizer:
                    return Quantizer.load(folder, manifest.quantizer)
            except FileNotFoundError:  # it was just removed
                continue
        return None

    def _train(self) -> Quantizer | None:
        """A quantizer of a seeded sample of the version's cells; None for a version that needs none."""
        if self.snapshot.cells < IVF_FROM:
            return None
        sample = self._sample(POINTS_PER_LIST * lists_for(self.snapshot.cells))
        return Quantizer.train(sample, self.snapshot.cells, cores())

    def _sample(self, cells: int) -> FloatArray:
        """Latents of about so many cells, the same share of every file."""
        rng, share = np.random.default_rng(_SEED), min(1.0, cells / self.snapshot.cells)
        parts = []
        for _, table in read_units(self.space.path, self.snapshot, ["latent"], None):
            mapped = table.filter(table["latent"].is_valid())
            count = min(len(mapped), int(len(mapped) * share + rng.random()))
            latent = latent_of(mapped, self.space.n_latent)
            parts.append(latent[np.sort(rng.choice(len(latent), count, replace=False))])
        sample = np.concatenate(parts)
        if not len(sample):
            raise self._nothing()
        return sample

    def _nothing(self) -> StoreError:
        told = f"Version {self.snapshot.version} of {self.space.name} has no cell with a latent."
        return StoreError(told, "Map something into it first.")

    def _write(self, quantizer: Quantizer | None, *, anew: bool) -> tuple[tuple[Part, ...], np.ndarray, float]:
        """Link or write all segments; the parts, cells of each list, and the summed squared distances."""
        if quantizer:
            quantizer.save(self.folder)
        digest = quantizer.digest if quantizer else ""
        rows = rows_key(self.snapshot)
        reused, groups = self._planned([] if anew else self._reused(digest))
        tasks = [self._task(names, digest, rows) for names in groups]
        segments = [*tasks]
        for one in reused:
            task, done = self._take_over(one, digest, rows, lists_of(quantizer))
            segments.append(task)
            if not done:
                tasks.append(task)
        self.builder.write(tasks)
        return self._parts(segments, rows)

    def _task(self, names: Sequence[str], digest: str, rows: str) -> Task:
        threads = cores() if self.builder.run is None else 1
        return Task(str(self.space.path), self.snapshot.version, tuple(names), str(self.folder), digest, rows, threads)

    def _take_over(self, one: _Reused, digest: str, rows: str, lists: int) -> tuple[Task, bool]:
        """Link a segment into this index; the task that makes it, and whether nothing is left to do for it."""
        task = self._task(one.names, digest, rows)
        try:
            if link(one.folder, self.folder / task.id, rows, lists):
                return task, True
        except FileNotFoundError:  # it was just removed, or is cut off
            shutil.rmtree(self.folder / task.id, ignore_errors=True)
        else:
            if len(one.live) == len(one.names):  # other columns: rows alone are written
                return task, False
            shutil.rmtree(self.folder / task.id)  # the version lacks rows that are masked
        return self._task(one.live, digest, rows), False

    def _reused(self, digest: str) -> list[_Reused]:
        """Segments of older indexes that hold files of this version, each file once."""
        found, open_names = [], set(self.order)
        for folder in filter(is_built, built(self.space.path)):
            try:
                manifest = Manifest.load(folder)
                for part in manifest.parts if manifest.quantizer == digest else ():
                    told = told_of(folder / part.id)
                    each = dict(zip(told["names"], told["mapped"], strict=True))
                    live = [name for name in each if name in open_names]
                    cells = sum(each[name] for name in live)
                    if live and cells >= (1 - MASKED) * sum(each.values()):
                        found.append(_Reused(folder / part.id, list(each), live, cells))
                        open_names.difference_update(live)
            except FileNotFoundError:  # it was just removed
                continue
        return found

    def _planned(self, reused: list[_Reused]) -> tuple[list[_Reused], list[tuple[str, ...]]]:
        """Segments that are taken over, and the files of those that are written.

        What is put together is not cut for the workers again: it would be put together with every commit.
        """
        new = self._missing(reused)
        groups = self._groups(new, self.builder.workers)
        if len(reused) + len(groups) <= max(SEGMENTS, self.builder.workers) + self.snapshot.cells // SEGMENT_CELLS:
            return reused, groups
        small = sorted((one for one in reused if one.cells < SEGMENT_CELLS // 2), key=lambda one: one.cells)
        put_together = small[: -(-len(small) // 2)]
        if len(put_together) + (len(groups) == 1) < 2:  # one alone would be written again for nothing
            return reused, groups
        left = [one for one in reused if one not in put_together]
        names = self._missing(left)
        if len(groups) <= 1:
            return left, self._groups(names, 1)
        return left, [*groups, *self._groups([name for name in names if name not in set(new)], 1)]

    def _missing(self, reused: Sequence[_Reused]) -> list[str]:
        """Files that no segment holds."""
        held = {name for one in reused for name in one.live}
        return [name for name in self.order if name not in held]

    def _groups(self, names: Sequence[str], workers: int) -> list[tuple[str, ...]]:
        """Files cut into segments."""
        rows = [self.snapshot.pairs[name].cells.rows for name in names]
        before = np.concatenate([[0], np.cumsum(rows)])
        total = int(before[-1])
        count = max(1, -(-total // SEGMENT_CELLS), min(workers, total // IVF_FROM))
        groups: dict[int, list[str]] = {}
        for name, start in zip(names, before.tolist(), strict=False):
            groups.setdefault(start * count // max(1, total), []).append(name)
        return [tuple(group) for group in groups.values()]

    def _parts(self, tasks: Sequence[Task], rows: str) -> tuple[tuple[Part, ...], np.ndarray, float]:
        """What the manifest says of the segments; positions follow the order of the version's files."""
        told = {task.id: told_of(self.folder / task.id) for task in tasks}
        owner: dict[str, str] = {}
        for task in tasks:
            owner |= {name: task.id for name in told[task.id]["names"] if name not in owner}
        mapped = {name: dict(zip(one["names"], one["mapped"], strict=True)) for name, one in told.items()}
        base, cells = {}, 0
        for name in self.order:
            base[name] = cells
            cells += mapped[owner[name]][name]
        if not cells:
            raise self._nothing()
        parts = []
        for task in tasks:
            live = [name for name in told[task.id]["names"] if name in base and owner[name] == task.id]
            count = sum(mapped[task.id][name] for name in live)
            bases = tuple(base[name] if name in live else -1 for name in told[task.id]["names"])
            parts.append(Part(task.id, rows, count, bases))
        offsets = [np.fromfile(self.folder / task.id / "offsets.i64", np.int64) for task in tasks]
        sizes = np.sum([np.diff(one) for one in offsets], axis=0)
        return tuple(parts), sizes, sum(one["squares"] for one in told.values())
