"""Landing one shard: cells and counts of the source in, a piece out."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow.compute as pc

from scviaduct import faults
from scviaduct.errors import DataError
from scviaduct.landing.cells import write_cells
from scviaduct.landing.counts import RECORD, read_record, write_counts
from scviaduct.landing.folder import remove
from scviaduct.landing.manifest import FORMAT, Piece
from scviaduct.sources import open_shard
from scviaduct.sources.counts import GeneTarget, Rows, assemble
from scviaduct.sources.source import KEY_COLUMN, TableSource
from scviaduct.sources.unreadable import quarantined
from scviaduct.store.files import read_json, size, write_once
from scviaduct.values import digest

if TYPE_CHECKING:
    from collections.abc import Callable

    import pyarrow as pa

    from scviaduct.landing.counts import CountsRecord
    from scviaduct.landing.folder import Landing
    from scviaduct.values import CellBlock, LongArray, Shard

TRIES = 3
"""Tries of what may pass, such as a lost connection."""
_COUNTED = ("nnz", "raw_sum")
"""What a Census says of the counts of each cell."""


@dataclass(frozen=True, slots=True)
class Lineage:
    """What tells whether a dataset of a Census release has the counts that it had in another release.

    Attributes
    ----------
    dataset_version
        ``dataset_version_id`` of ``census_info/datasets``.
    schema
        ``census_schema_version``: how counts were taken from the dataset.
    """

    dataset_version: str
    schema: str


@dataclass(frozen=True, slots=True)
class PieceJob:
    """A shard that is to be landed.

    Attributes
    ----------
    shard
        Of the source.
    columns
        obs columns to keep.
    genes, n_genes
        Address of the gene table of the shard's file, and its length.
    lineage
        Of the shard's dataset; None where a new version of the source says nothing of its parts.
    """

    shard: Shard
    columns: tuple[str, ...]
    genes: str
    n_genes: int
    lineage: Lineage | None = None

    @property
    def obs_address(self) -> str:
        """Digest of what determines the file of cells: the rows and the release, whose joinids they are."""
        return digest(FORMAT, "obs", self.shard.address, self.columns)

    def counts_address(self, keys: pa.Array, obs: pa.Table) -> str:
        """Digest of what determines the counts.

        A file or an experiment pins them by its version. A Census release does not: the same version of a dataset has
        the same counts in the next one, where its cells have other joinids. There the address is of the dataset's
        version, the ids of the cells in their order, and how many genes and counts the release says that each has.

        Parameters
        ----------
        keys, obs
            Of the shard's cells; obs with the columns ``nnz`` and ``raw_sum``, if the source has them.
        """
        shard = self.shard
        if self.lineage is None:
            return digest(FORMAT, "counts", shard.address)
        hasher = hashlib.blake2b(digest_size=16)
        hasher.update("\n".join(keys.to_pylist()).encode())
        for name in self.counted:
            values = pc.fill_null(obs[name].combine_chunks(), -1)
            hasher.update(np.ascontiguousarray(values.to_numpy(zero_copy_only=False), "<f8").tobytes())
        told = asdict(self.lineage), self.counted, hasher.hexdigest()
        return digest(FORMAT, "counts", shard.selection, shard.dataset_id, shard.cells, *told)

    @property
    def counted(self) -> tuple[str, ...]:
        """Columns of obs that say something of the counts."""
        return tuple(name for name in _COUNTED if self.lineage and name in self.columns)


class Landed(NamedTuple):
    """A piece that is in its place.

    Attributes
    ----------
    piece
        As the manifest names it.
    counts_written
        Whether its counts were written now; those that were there are reused.
    """

    piece: Piece
    counts_written: bool


def recall(landing: Landing, job: PieceJob) -> Piece | None:
    """The piece of a job, if it was completed before."""
    try:
        told = read_json(landing.obs_record(job.obs_address))
    except FileNotFoundError:
        return None
    if size(landing.obs_file(job.obs_address)) != told["obs_bytes"]:
        return None
    return _piece(landing, job, **told)


def counts_there(landing: Landing, job: PieceJob, address: str) -> CountsRecord | None:
    """What is known of counts that are there, with the gene table that they are numbered by.

    A job's own gene table is written before its piece (:meth:`~scviaduct.landing.planning.LandingPlan.begin`); that of
    an earlier release is in no source any more, and counts that have lost it are landed again.
    """
    folder = landing.counts_folder(address)
    if not address or not (folder / RECORD).is_file():
        return None
    held = read_record(folder)
    return held if held.genes == job.genes or landing.genes_file(held.genes).is_file() else None


def land_piece(landing: Landing, job: PieceJob) -> Landed:
    """Land a shard; what is there already is neither read nor written.

    Counts that cannot be read are noted in the piece, which then has cells and no counts.

    Raises
    ------
    SourceChangedError
        If the source no longer holds the planned cells.
    DataError
        If its cells cannot be read.
    """
    if there := recall(landing, job):
        return Landed(there, counts_written=False)
    source = table_source(job.shard)
    rows, obs = tried(lambda: source.select(job.shard, job.columns))
    address = job.counts_address(obs[KEY_COLUMN], obs)
    if counts_there(landing, job, address):
        return Landed(_complete(landing, job, rows, obs, address), counts_written=False)
    target = GeneTarget.of(job.n_genes, None, None, source.absent_genes)

    def read() -> Rows:
        with quarantined(f"Rows {job.shard.start} to {job.shard.stop} of dataset '{job.shard.dataset_id}'"):
            return assemble(source.counts(rows, target))

    try:
        counts = tried(read)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a source raises over its counts, the cells are landed without
        return Landed(_unreadable(landing, job, rows, obs, error), counts_written=False)
    return Landed(_keep(landing, job, rows, obs, counts), counts_written=True)


def land_block(landing: Landing, job: PieceJob, block: CellBlock) -> Landed:
    """Land a shard that was read already, in all genes of the source and with the columns of the job."""
    if there := recall(landing, job):
        return Landed(there, counts_written=False)
    address = job.counts_address(block.obs[KEY_COLUMN], block.obs)
    if counts_there(landing, job, address):
        return Landed(_complete(landing, job, block.rows, block.obs, address), counts_written=False)
    counts = Rows(block.indptr, block.indices, block.data)
    return Landed(_keep(landing, job, block.rows, block.obs, counts), counts_written=True)


def table_source(shard: Shard) -> TableSource:
    """The source of a shard, which has one obs table."""
    source = open_shard(shard)
    if not isinstance(source, TableSource):
        raise TypeError(f"{type(source).__name__} has shards of several tables")
    return source


def tried[T](read: Callable[[], T]) -> T:
    """What a call gives, tried again where that may help."""
    for _ in range(TRIES - 1):
        try:
            return read()
        except DataError:
            raise
        except Exception:  # noqa: BLE001, S112 - the last try raises what it meets
            continue
    return read()


def _keep(landing: Landing, job: PieceJob, rows: LongArray, obs: pa.Table, counts: Rows) -> Piece:
    address = job.counts_address(obs[KEY_COLUMN], obs)
    folder = landing.counts_folder(address)
    if folder.exists() and not counts_there(landing, job, address):
        remove(folder)  # half removed, or without its gene table: it would stay in the place of what is whole
    write_counts(folder, counts, job.n_genes, job.genes)
    faults.point("piece-written")
    return _complete(landing, job, rows, obs, address)


def _complete(landing: Landing, job: PieceJob, rows: LongArray, obs: pa.Table, address: str) -> Piece:
    """Write the cells, and the record that makes the piece complete."""
    told = asdict(_Cells(*_write_cells(landing, job, rows, obs), address))
    write_once(landing.obs_record(job.obs_address), told)
    piece = _piece(landing, job, **told)
    if piece is None:
        raise FileNotFoundError(landing.counts_folder(address) / RECORD)
    return piece


def _unreadable(landing: Landing, job: PieceJob, rows: LongArray, obs: pa.Table, error: Exception) -> Piece:
    """A piece of cells alone, without a record, so that the next run tries again."""
    held, nbytes = _write_cells(landing, job, rows, obs)
    reason = f"{type(error).__name__}: {error}"
    return Piece(*_placed(job.shard), job.obs_address, held, nbytes=nbytes, genes=job.genes, reason=reason)


def _write_cells(landing: Landing, job: PieceJob, rows: LongArray, obs: pa.Table) -> tuple[str, int]:
    """Write the cells; digest and size of their file."""
    # The record of a file that is written anew is of other bytes, if another version of pyarrow writes it.
    landing.obs_record(job.obs_address).unlink(missing_ok=True)
    file = landing.obs_file(job.obs_address)
    return write_cells(file, rows, obs[KEY_COLUMN].combine_chunks(), obs.drop([KEY_COLUMN]))


@dataclass(frozen=True, slots=True)
class _Cells:
    """The record of a complete piece."""

    obs_digest: str
    obs_bytes: int
    counts: str = field(default="")


def _piece(landing: Landing, job: PieceJob, obs_digest: str, obs_bytes: int, counts: str) -> Piece | None:
    held = counts_there(landing, job, counts)
    if held is None:
        return None
    return Piece(
        *_placed(job.shard),
        job.obs_address,
        obs_digest,
        counts,
        held.seal,
        held.genes,
        held.values,
        obs_bytes + held.nbytes,
        held.integer,
    )


def _placed(shard: Shard) -> tuple[str, int, int, int, str]:
    return shard.dataset_id, shard.start, shard.stop, shard.cells, shard.rows_digest
