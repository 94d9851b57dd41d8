"""What has to be landed of a source: its parts, their gene tables, and a job for every piece."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from scviaduct import __version__
from scviaduct.errors import DataError, SourceChangedError, SourceError
from scviaduct.landing.cells import write_cells
from scviaduct.landing.counts import write_counts
from scviaduct.landing.genetables import address_of, keep_genes
from scviaduct.landing.manifest import Manifest, Part, Piece
from scviaduct.landing.writing import Lineage, PieceJob, counts_there, recall, table_source
from scviaduct.software import software
from scviaduct.sources.counts import Rows
from scviaduct.sources.source import KEY_COLUMN
from scviaduct.sources.uri import parse
from scviaduct.store.schema import TYPES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from scviaduct.landing.folder import Landing
    from scviaduct.sources import Source
    from scviaduct.sources.source import TableSource
    from scviaduct.values import GeneTable, Scan, Shard

_SAMPLE_CELLS = 512
_SOFTWARE = ("zarr", "zarrs", "pyarrow", "anndata", "tiledbsoma")


@dataclass(frozen=True, slots=True)
class LandingPlan:
    """A landing as it is to be.

    Attributes
    ----------
    manifest
        Without pieces.
    jobs
        Of each part, one a piece, in order.
    tables
        Gene tables by their addresses.
    """

    manifest: Manifest
    jobs: tuple[tuple[PieceJob, ...], ...]
    tables: Mapping[str, GeneTable]

    @property
    def cells(self) -> int:
        """Number of cells."""
        return sum(job.shard.cells for jobs in self.jobs for job in jobs)

    def recalled(self, landing: Landing) -> dict[PieceJob, Piece]:
        """Pieces that are complete."""
        found = {job: recall(landing, job) for jobs in self.jobs for job in jobs}
        return {job: piece for job, piece in found.items() if piece}

    def begin(self, landing: Landing) -> None:
        """Write the gene tables."""
        for table in self.tables.values():
            keep_genes(landing, table)

    def finished(self, pieces: Mapping[PieceJob, Piece]) -> Manifest:
        """The manifest with its pieces."""
        parts = tuple(
            replace(part, pieces=tuple(pieces[job] for job in jobs))
            for part, jobs in zip(self.manifest.parts, self.jobs, strict=True)
        )
        return replace(self.manifest, parts=parts)


def plan_landing(source: Source, piece_cells: int, scan: Scan | None = None) -> LandingPlan:
    """Cut a source into pieces.

    Parameters
    ----------
    source
        Open.
    piece_cells
        Cells of a full piece.
    scan
        Of the source, cut into shards of so many cells; None to scan it.

    Raises
    ------
    SourceError
        If nothing is selected.
    """
    scan = source.scan(piece_cells) if scan is None else scan
    if not scan.shards:
        raise SourceError(f"{source.uri} selects no cell to land.", "Check filter= and is_primary_data.")
    parts, jobs, tables = [], [], {}
    grouped = _by_table(scan.shards)
    for shards in grouped:
        # What is told of a part is taken before the next one is opened, which may close it.
        part, table, own = _part(shards)
        # Pinned, a source no longer says why a layer was chosen.
        parts.append(replace(part, described=source.describe()) if len(grouped) == 1 else part)
        jobs.append(own)
        tables[part.genes] = table
    told = {"scviaduct": __version__} | software(*_SOFTWARE)
    manifest = Manifest(source.uri, source.version, piece_cells, tuple(parts), scan.empty, told)
    return LandingPlan(manifest, tuple(jobs), tables)


def _by_table(shards: Sequence[Shard]) -> list[tuple[Shard, ...]]:
    """Shards of one file together."""
    found: dict[str, list[Shard]] = {}
    for shard in shards:
        found.setdefault(shard.uri, []).append(shard)
    return [tuple(own) for own in found.values()]


def _part(shards: Sequence[Shard]) -> tuple[Part, GeneTable, tuple[PieceJob, ...]]:
    first = shards[0]
    opened = table_source(first)
    table, described = opened.genes(first), opened.describe()
    columns, left_out = _columns(opened, first)
    part = Part(
        uri=first.uri,
        source=first.source,
        version=first.version,
        selection=first.selection,
        key=described.get("key", ""),
        var_index=opened.var_index,
        duplicates=parse(first.uri).keeps_duplicates,
        genes=address_of(table),
        n_genes=opened.n_genes,
        columns=columns,
        left_out=left_out,
        described=described,
    )
    lineages = _lineages(opened, first)
    jobs = [
        PieceJob(shard, tuple(columns), part.genes, part.n_genes, lineages.get(shard.dataset_id)) for shard in shards
    ]
    return part, table, tuple(jobs)


def _lineages(opened: TableSource, shard: Shard) -> dict[str, Lineage]:
    """Lineage of each dataset of a Census; a filter on var may mean other genes in another release."""
    if parse(shard.uri).scheme != "census" or "var_filter" in shard.selection:
        return {}
    from scviaduct.sources.census import CensusSource

    if not isinstance(opened, CensusSource):
        raise TypeError(f"{type(opened).__name__} opened {shard.uri}")
    schema = opened.schema_version()
    return {name: Lineage(told, schema) for name, told in opened.dataset_versions().items() if schema}


def _columns(opened: TableSource, shard: Shard) -> tuple[dict[str, str], dict[str, str]]:
    """obs columns that can be kept with their types, and the others with the reason."""
    wanted = [name for name in opened.obs_columns() if name != KEY_COLUMN]
    left_out = {name: "it has the name of a block's cell key" for name in opened.obs_columns() if name == KEY_COLUMN}
    try:
        return _types(opened.select(shard, wanted, limit=1)[1]), left_out
    except SourceChangedError:
        raise
    except (SourceError, DataError):
        opened.select(shard, limit=1)  # raises where it is no column, but the cells that cannot be read
        kept: dict[str, str] = {}
        for name in wanted:
            try:
                kept |= _types(opened.select(shard, [name], limit=1)[1])
            except (SourceError, DataError) as error:
                left_out[name] = error.problem
        return kept, left_out


def _types(obs: pa.Table) -> dict[str, str]:
    names = {kind: name for name, kind in TYPES.items()}
    plain = {
        field.name: field.type.value_type if pa.types.is_dictionary(field.type) else field.type for field in obs.schema
    }
    return {name: names[kind] for name, kind in plain.items() if name != KEY_COLUMN}


def foreseen(landing: Landing, jobs: Sequence[PieceJob]) -> dict[PieceJob, Piece]:
    """The piece of each job as far as it is known; sealed if its counts are there, as an unchanged dataset's are.

    Reads the cells of jobs that have a lineage.
    """
    return {job: _foreseen(landing, job) for job in jobs}


def _foreseen(landing: Landing, job: PieceJob) -> Piece:
    shard = job.shard
    piece = Piece(
        shard.dataset_id, shard.start, shard.stop, shard.cells, shard.rows_digest, job.obs_address, "", genes=job.genes
    )
    if not landing.is_there:
        return piece
    keys, obs = pa.array([], pa.string()), pa.table({})
    if job.lineage:
        _, obs = table_source(shard).select(shard, job.counted)
        keys = obs[KEY_COLUMN]
    address = job.counts_address(keys, obs)
    held = counts_there(landing, job, address)
    return replace(piece, counts=address, counts_digest=held.seal, genes=held.genes) if held else piece


def bytes_a_cell(jobs: Sequence[PieceJob]) -> float:
    """Bytes that a cell takes in a landing, by a few cells of three pieces that are encoded for it."""
    sampled = {jobs[0], jobs[len(jobs) // 2], jobs[-1]}
    cells, nbytes = 0, 0
    folder = Path(tempfile.mkdtemp(prefix="scviaduct-"))
    try:
        for number, job in enumerate(sampled):
            try:
                block = table_source(job.shard).read(job.shard, columns=job.columns, limit=_SAMPLE_CELLS)
            except DataError:  # the piece is landed without its counts, or reported; the others say what it would take
                continue
            held = write_counts(
                folder / f"{number}", Rows(block.indptr, block.indices, block.data), job.n_genes, job.genes
            )
            obs = block.obs.drop([KEY_COLUMN])
            nbytes += held.nbytes + write_cells(folder / f"{number}.parquet", block.rows, block.obs[KEY_COLUMN], obs)[1]
            cells += block.n_cells
    finally:
        shutil.rmtree(folder)
    return nbytes / max(cells, 1)
