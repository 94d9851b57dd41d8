"""Commits: what makes staged units visible, all at once.

``latents`` is committed first and ``cells`` second, and only the second makes anything visible. Both carry the space's
app id with the next transaction version, so that of two writers one is refused and starts again. A writer that died in
between leaves a ``latents`` version that nobody names; the next commit begins with the one that the newest ``cells``
names, and drops the rest.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from scviaduct.errors import StoreError
from scviaduct.store.files import size, write_parquet
from scviaduct.store.staging import UNITS, Completion, is_whole, record_path
from scviaduct.store.tables import DataFile
from scviaduct.values import digest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Pair:
    """The two files of a unit, or of what is left of one."""

    latents: DataFile
    cells: DataFile


@dataclass(slots=True)
class Change:
    """What a commit adds to a snapshot and removes from it."""

    add: list[Pair] = field(default_factory=list)
    remove: list[Pair] = field(default_factory=list)


def replace_cells(space: Path, active: Mapping[str, Pair], completions: Sequence[Completion]) -> Change:
    """Work out the change that makes every completed unit visible and every cell visible once.

    Keys are compared one dataset at a time, so memory is bounded by the keys of the largest one.

    Parameters
    ----------
    space
        Folder of the space.
    active
        Name of a pair to the pair, as the snapshot has them.
    completions
        Units to make visible.
    """
    change = Change()
    fresh: dict[tuple[str, str], list[Completion]] = defaultdict(list)
    for completion in completions:
        if completion.cells.name not in active:
            fresh[completion.cells.source, completion.cells.dataset_id].append(completion)
            change.add.append(Pair(completion.latents, completion.cells))
    named = {completion.cells.name for completion in completions}
    candidates: dict[tuple[str, str], list[Pair]] = defaultdict(list)
    for name, pair in active.items():
        key = (pair.cells.source, pair.cells.dataset_id)
        if key in fresh and name not in named:
            candidates[key].append(pair)
    for key, pairs in candidates.items():
        _replace_in_dataset(space, pairs, fresh[key], change)
    return change


def _replace_in_dataset(space: Path, pairs: Sequence[Pair], fresh: Sequence[Completion], change: Change) -> None:
    """Drop from older files of one dataset the cells that fresh units cover."""
    same = {completion.keys_digest for completion in fresh}
    unsure = []
    for pair in pairs:
        if _keys_of(space, pair) in same:
            change.remove.append(pair)
        else:
            unsure.append(pair)
    if not unsure:
        return
    covered = pa.concat_arrays(
        [ids for completion in fresh for ids in _observation_ids(space / "cells" / completion.cells.path).chunks]
    )
    for pair in unsure:
        left = pc.invert(pc.is_in(_observation_ids(space / "cells" / pair.cells.path), value_set=covered))
        if pc.all(left).as_py():
            continue
        change.remove.append(pair)
        if pc.any(left).as_py():
            change.add.append(_rewrite(space, pair, left))


def _observation_ids(path: Path) -> pa.ChunkedArray:
    """Ids of a file's cells; large strings, because those of all fresh units of a dataset may come to 2 GiB."""
    ids = pq.read_table(path, columns=["observation_id"], partitioning=None)["observation_id"]
    return ids.cast(pa.large_string())


def _keys_of(space: Path, pair: Pair) -> str | None:
    """Digest of a pair's keys, if it is a unit's own and not what is left of one."""
    record = record_path(space, pair.cells.unit)
    if not record.exists():
        return None
    completion = Completion.load(record)
    return completion.keys_digest if completion.cells.name == pair.cells.name else None


def _rewrite(space: Path, pair: Pair, left: pa.ChunkedArray) -> Pair:
    """Write the rows that stay, of both tables alike, keeping ``unit`` and ``unit_row``."""
    rows = np.flatnonzero(left.to_numpy())
    # Named after the unit's attempt and all that was cut from it: however often it is cut, the name keeps its length.
    attempt = ".".join(pair.cells.name.split(".")[:2])
    name = f"{attempt}.r{digest(pair.cells.name, rows.tolist())[:12]}"
    path = f"{UNITS}/{pair.cells.unit[:2]}/{name}.parquet"
    files = []
    for table, file in (("latents", pair.latents), ("cells", pair.cells)):
        kept = pq.read_table(space / table / file.path, partitioning=None).filter(left)
        written = write_parquet(kept, space / table / path)
        first = pc.min(kept["source_row"]).as_py() if table == "cells" else None
        files.append(DataFile(path, written, len(kept), file.source, file.dataset_id, first))
    return Pair(*files)


def require_whole(space: Path, completions: Sequence[Completion], pairs: Sequence[Pair]) -> None:
    """Refuse to name a file that is not there: a commit that did would make the table unreadable.

    Raises
    ------
    StoreError
        Naming the first such file.
    """
    for completion in completions:
        if not is_whole(space, completion):
            raise StoreError(
                f"A staged file of unit {completion.unit} is missing or has another size ({completion.cells.path}).",
                "Nothing was committed. Run the same command again: the unit is mapped anew.",
            )
    for pair in pairs:
        for table, file in (("latents", pair.latents), ("cells", pair.cells)):
            if size(space / table / file.path) != file.size:
                raise StoreError(f"{space / table / file.path} is not what was written.", "Nothing was committed.")


def milliseconds() -> int:
    """Now, as Delta writes it."""
    return time.time_ns() // 1_000_000
