"""Staging: what a worker leaves behind for a unit, before anybody names it."""

from __future__ import annotations

import secrets
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from scviaduct import faults
from scviaduct.sources.hashing import hash_keys
from scviaduct.store.files import read_json, size, write_once, write_parquet
from scviaduct.store.index.assigned import assign
from scviaduct.store.schema import unit_rows
from scviaduct.store.tables import DataFile

if TYPE_CHECKING:
    import pyarrow as pa

    from scviaduct.values import CellBlock, Mapping, Settings, Unit

UNITS = "_units"
"""Folder of the data files in a table: the underscore keeps a stock Delta vacuum away from what is staged."""


@dataclass(frozen=True, slots=True)
class Completion:
    """The record that a unit is done.

    Attributes
    ----------
    unit
        Unit id.
    latents, cells
        Its file in each table.
    mapped
        Cells that have a latent.
    keys_digest
        Of the set of observation ids: two units with the same digest cover the same cells.
    """

    unit: str
    latents: DataFile
    cells: DataFile
    mapped: int
    keys_digest: str

    @classmethod
    def load(cls, record: Path) -> Self:
        """Read back a record."""
        told = read_json(record)
        latents, cells = DataFile(**told["latents"]), DataFile(**told["cells"])
        return cls(told["unit"], latents, cells, told["mapped"], told["keys_digest"])


@dataclass(frozen=True, slots=True)
class Stager:
    """Writes what came out of a unit where a commit can name it; picklable.

    Attributes
    ----------
    space
        Folder of the space.
    reference
        What the ``reference`` column says.
    run
        What the ``run`` column says.
    """

    space: str
    reference: str
    run: str

    def stage(self, unit: Unit, block: CellBlock, mapping: Mapping, settings: Settings) -> Completion:
        """Write a unit's rows, then the record that it is done.

        The first attempt wins: one that comes second removes its own files and returns the winner's record.
        """
        space = Path(self.space)
        latents, cells = unit_rows(unit, block, mapping, settings, self.reference, self.run)
        path = f"{UNITS}/{unit.id[:2]}/{unit.id}.{secrets.token_hex(4)}.parquet"
        shard, n = block.shard, block.n_cells
        files = [
            DataFile(path, write_parquet(rows, space / table / path), n, shard.source, shard.dataset_id, first)
            for table, rows, first in (("latents", latents, None), ("cells", cells, int(block.rows[0])))
        ]
        faults.point("staged")
        keys = keys_digest(cells["observation_id"])
        completion = Completion(unit.id, files[0], files[1], int(mapping.mapped.sum()), keys)
        record = record_path(space, unit.id)
        while not write_once(record, asdict(completion)):
            winner = Completion.load(record)
            if is_whole(space, winner):
                for table in ("latents", "cells"):
                    (space / table / path).unlink()
                return winner
            # The winner's files were removed since; this attempt takes its place.
            record.unlink(missing_ok=True)
        faults.point("recorded")
        # It spares a build some work. The unit is done without it: a full disk or an index that is being removed under
        # it is no reason to map the cells again.
        with suppress(OSError, ValueError, EOFError):
            assign(space, files[0].name, mapping.latent[mapping.mapped])
        return completion


def record_path(space: Path, unit: str) -> Path:
    """Where a unit's completion record lies."""
    return space / "units" / unit[:2] / f"{unit}.json"


def is_whole(space: Path, completion: Completion) -> bool:
    """Whether both files of a completion are there, with the recorded size."""
    pairs = (("latents", completion.latents), ("cells", completion.cells))
    return all(size(space / table / file.path) == file.size for table, file in pairs)


def keys_digest(observation_ids: pa.ChunkedArray) -> str:
    """Digest of a set of cell ids, in any order."""
    return blake2b(np.sort(hash_keys(observation_ids)).tobytes(), digest_size=16).hexdigest()
