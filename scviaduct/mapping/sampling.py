"""Samples of query batches for surgery: the same cells however the source is cut into shards, and whoever reads them.

Every cell has a seeded hash of its dataset and its id; a batch's sample is the cells of the smallest hashes (bottom-k
sampling, Cohen and Kaplan, PODC 2007). It is uniform, one pass finds it in bounded memory, and samples of parts of a
query merge into the sample of the whole.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy import sparse

from scviaduct.errors import DataError, InputError
from scviaduct.mapping.batches import batches_of, group_columns
from scviaduct.mapping.mapper import model_columns, query_batch_key
from scviaduct.mapping.reading import read_block
from scviaduct.sources import open_shard
from scviaduct.sources.obs import as_text, store_type
from scviaduct.values import digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import numpy.typing as npt

    from scviaduct.mapping.batches import QueryBatch
    from scviaduct.references.package import Reference
    from scviaduct.values import CellBlock, FloatArray, IntArray, LongArray, Settings, Shard

    Hashes = npt.NDArray[np.uint64]

_NUMBER = "Give every cell a finite number, and a positive one as its size factor."


@dataclass(frozen=True, slots=True)
class Sample:
    """Some cells of a query batch, in the order of their hashes.

    Attributes
    ----------
    indptr, indices, data
        Counts as CSR in the reference's features, without explicit zeros: int64 of shape ``(n_cells + 1,)``, int32 and
        float32 of shape ``(nnz,)``.
    n_genes
        Width of the matrix.
    obs
        One row per cell: what the encoder reads and the size factor, if the reference has one; besides, where a source
        has them, the batch and covariates that the decoder alone reads (null for cells whose file lacks them; a column
        that all lack is left out). Categories are text, numbers double.
    observation_ids, datasets
        One per cell.
    hashes
        uint64, shape ``(n_cells,)``; ascending.
    seen
        Cells of the batch that have a count in the reference's genes, in all shards that were read.
    """

    indptr: LongArray
    indices: IntArray
    data: FloatArray
    n_genes: int
    obs: pa.Table
    observation_ids: tuple[str, ...]
    datasets: tuple[str, ...]
    hashes: Hashes
    seen: int

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.indptr) - 1

    @property
    def digest(self) -> str:
        """Of ids, counts and obs values: 32 hexadecimal characters of BLAKE2b, whatever shards the cells came in."""
        hasher = hashlib.blake2b(digest_size=16)
        kinds = ("<i8", self.indptr), ("<i4", self.indices), ("<f4", self.data)
        for kind, values in kinds:
            hasher.update(np.ascontiguousarray(values, dtype=kind).tobytes())
        columns = {name: self.obs[name].to_pylist() for name in sorted(self.obs.column_names)}
        return digest(hasher.hexdigest(), self.n_genes, self.datasets, self.observation_ids, columns)


def sample_batches(
    shards: Iterable[Shard],
    reference: Reference,
    settings: Settings,
    wanted: Sequence[QueryBatch],
    cells: int,
    seed: int,
    *,
    decoder: bool = False,
    columns: Sequence[str] = (),
) -> dict[QueryBatch, Sample]:
    """Sample the cells of some query batches, reading each shard once.

    Memory: one block and the samples.

    Parameters
    ----------
    shards
        Where the batches have cells (:meth:`~scviaduct.mapping.batches.QueryBatches.shards_of`).
    reference, settings
        What maps, and how.
    wanted
        The query batches.
    cells
        Cells of a sample, at most.
    seed
        Another one gives other samples.
    decoder
        As for :func:`~scviaduct.mapping.batches.query_batches`, which named the batches.
    columns
        Further obs columns to bring, as text; a missing value is empty.

    Returns
    -------
    dict
        Each wanted batch to its sample; of no cells if no shard has one with a count. A cell without a count in the
        reference's genes is not taken.

    Raises
    ------
    DataError
        If a shard cannot be read, or a cell that would be taken has a count or a covariate that is none. Who wants to
        go on without a shard samples shard by shard and calls :func:`merge_samples`.
    SourceError
        If a column that is needed does not exist.
    """
    if cells < 1:
        raise InputError(f"A sample cannot hold {cells} cells.", "Give a positive number, such as 1000.")
    asked = _Columns.of(reference, settings, columns, decoder=decoder)
    samples = {batch: _nothing(len(reference.genes), asked) for batch in wanted}
    for shard in shards:
        block = read_block(shard, reference, asked.of_source(open_shard(shard).obs_columns()))
        counted = _counted(block)
        batches, of = batches_of(block, reference, settings, decoder=decoder)
        for position, batch in enumerate(batches):
            if batch in samples:
                rows = np.flatnonzero((of == position) & counted)
                samples[batch] = _with(samples[batch], block, rows, cells, seed, asked)
    return {batch: _without_empty_columns(sample) for batch, sample in samples.items()}


def merge_samples(parts: Sequence[Mapping[QueryBatch, Sample]], cells: int) -> dict[QueryBatch, Sample]:
    """One sample per query batch of samples of parts of a query, which no two parts share cells of.

    Parameters
    ----------
    parts
        What :func:`sample_batches` gave, for the same reference, settings and seed.
    cells
        Cells of a sample, at most; no more than the parts were sampled with.

    Returns
    -------
    dict
        What :func:`sample_batches` would have given for all parts' shards at once.
    """
    merged: dict[QueryBatch, Sample] = {}
    for part in parts:
        for batch, sample in part.items():
            merged[batch] = _merged(merged[batch], sample, cells) if batch in merged else _cut(sample, cells)
    # A column may be left to cells alone that the merged sample has no room for.
    return {batch: _without_empty_columns(sample) for batch, sample in merged.items()}


class _Columns(NamedTuple):
    """obs columns of a sample: those of categories, those of numbers, and which of them a source may lack."""

    text: tuple[str, ...]
    numbers: tuple[str, ...]
    optional: frozenset[str]
    size_factor: str
    further: tuple[str, ...]

    @classmethod
    def of(cls, reference: Reference, settings: Settings, columns: Sequence[str], *, decoder: bool) -> _Columns:
        """What a reference and settings ask for."""
        grouped = group_columns(reference, settings, decoder=decoder)
        needed = {*grouped, *model_columns(reference, settings), reference.size_factor_key, *columns}
        batch = query_batch_key(reference, settings) if reference.batch_key else ""
        text = tuple(name for name in dict.fromkeys((batch, *grouped, *reference.categorical_covariates)) if name)
        named = dict.fromkeys((*reference.continuous_covariates, reference.size_factor_key))
        numbers = tuple(name for name in named if name and name not in text)
        further = tuple(name for name in dict.fromkeys(columns) if name not in (*text, *numbers))
        return cls(text, numbers, frozenset({*text, *numbers} - needed), reference.size_factor_key, further)

    def of_source(self, there: Sequence[str]) -> list[str]:
        """What to read of a source with some columns."""
        return [
            name for name in (*self.text, *self.numbers, *self.further) if name in there or name not in self.optional
        ]


def _nothing(n_genes: int, columns: _Columns) -> Sample:
    obs = {name: pa.array([], pa.string()) for name in (*columns.text, *columns.further)}
    obs |= {name: pa.array([], pa.float64()) for name in columns.numbers}
    counts = np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32)
    return Sample(*counts, n_genes, pa.table(obs), (), (), np.zeros(0, np.uint64), 0)


def _counted(block: CellBlock) -> npt.NDArray[np.bool_]:
    """Cells with a count in the reference's genes; what is no number is one here, so that it is not passed over."""
    if not block.n_cells:
        return np.zeros(0, np.bool_)
    nonzero = np.logical_or.reduceat(np.append(block.data != 0, np.False_), block.indptr[:-1])
    return np.asarray((np.diff(block.indptr) > 0) & nonzero, np.bool_)


def hashes_of(dataset: str, ids: Sequence[str], seed: int) -> Hashes:
    """64 bits of BLAKE2b of the seed, the dataset and each cell's id."""
    begun = hashlib.blake2b(f"{seed}\0{dataset}\0".encode(), digest_size=8)
    found = bytearray()
    for name in ids:
        hasher = begun.copy()
        hasher.update(name.encode())
        found += hasher.digest()
    return np.frombuffer(bytes(found), "<u8").astype(np.uint64)


def _with(sample: Sample, block: CellBlock, rows: LongArray, cells: int, seed: int, columns: _Columns) -> Sample:
    """A sample and what some cells of a block add to it."""
    dataset = block.shard.dataset_id
    all_ids, seen = block.obs["observation_id"].combine_chunks(), len(rows)
    hashes = hashes_of(dataset, all_ids.take(pa.array(rows)).to_pylist(), seed)
    if sample.n_cells >= cells:
        # Once a sample is full few cells of a block have a smaller hash, and only those are copied.
        smaller = hashes < sample.hashes[cells - 1]
        rows, hashes = rows[smaller], hashes[smaller]
    order = np.argsort(hashes, kind="stable")[:cells]
    rows, hashes = rows[order], hashes[order]
    ids = tuple(all_ids.take(pa.array(rows)).to_pylist())
    shape = block.n_cells, block.n_genes
    counts = sparse.csr_matrix((block.data, block.indices, block.indptr), shape=shape)[rows]
    _require_counts(counts, ids, dataset)
    counts.eliminate_zeros()
    obs = {name: _text(block.obs, name, rows) for name in columns.text}
    obs |= {name: pc.fill_null(_text(block.obs, name, rows), "") for name in columns.further}
    for name in columns.numbers:
        obs[name] = _numbers(block.obs, name, rows)
        floor = 0 if name == columns.size_factor else -np.inf
        _require_numbers(obs[name], name, ids, dataset, floor, optional=name in columns.optional)
    held = _csr(counts)
    return _merged(sample, Sample(*held, block.n_genes, pa.table(obs), ids, (dataset,) * len(ids), hashes, seen), cells)


def _csr(counts: sparse.csr_matrix) -> tuple[LongArray, IntArray, FloatArray]:
    return counts.indptr.astype(np.int64), counts.indices.astype(np.int32), counts.data.astype(np.float32)


def _merged(first: Sample, second: Sample, cells: int) -> Sample:
    """The cells of the smallest hashes of both."""
    seen = first.seen + second.seen
    if first.n_cells and not second.n_cells:
        return replace(_cut(first, cells), seen=seen)
    hashes = np.concatenate([first.hashes, second.hashes])
    order = np.argsort(hashes, kind="stable")[:cells]
    counts = sparse.vstack([_matrix(first), _matrix(second)], format="csr")[order]
    obs = pa.concat_tables([first.obs, second.obs], promote_options="default").take(pa.array(order)).combine_chunks()
    ids, datasets = first.observation_ids + second.observation_ids, first.datasets + second.datasets
    told = tuple(ids[i] for i in order), tuple(datasets[i] for i in order)
    return Sample(*_csr(counts), first.n_genes, obs, *told, hashes[order], seen)


def _cut(sample: Sample, cells: int) -> Sample:
    """The first cells of a sample."""
    if sample.n_cells <= cells:
        return sample
    end = int(sample.indptr[cells])
    held = sample.indptr[: cells + 1].copy(), sample.indices[:end].copy(), sample.data[:end].copy()
    told = sample.observation_ids[:cells], sample.datasets[:cells]
    return Sample(*held, sample.n_genes, sample.obs.slice(0, cells), *told, sample.hashes[:cells].copy(), sample.seen)


def _matrix(sample: Sample) -> sparse.csr_matrix:
    return sparse.csr_matrix((sample.data, sample.indices, sample.indptr), shape=(sample.n_cells, sample.n_genes))


def _without_empty_columns(sample: Sample) -> Sample:
    """A sample without the columns that its cells' sources lack."""
    lacking = [name for name in sample.obs.column_names if 0 < sample.n_cells == sample.obs[name].null_count]
    return replace(sample, obs=sample.obs.drop_columns(lacking)) if lacking else sample


def _text(obs: pa.Table, name: str, rows: LongArray) -> pa.Array:
    if name not in obs.column_names:
        return pa.nulls(len(rows), pa.string())
    return as_text(obs[name].combine_chunks().take(pa.array(rows)))


def _numbers(obs: pa.Table, name: str, rows: LongArray) -> pa.Array:
    if name not in obs.column_names:
        return pa.nulls(len(rows), pa.float64())
    values = obs[name].combine_chunks()
    if store_type(values.type) not in ("int64", "double", "bool"):
        raise DataError(f"obs column '{name}' holds text, such as '{values[0]}', where numbers are meant.", _NUMBER)
    return values.take(pa.array(rows)).cast(pa.float64(), safe=False)


def _require_numbers(
    values: pa.Array, name: str, ids: Sequence[str], dataset: str, floor: float, *, optional: bool
) -> None:
    found = values.to_numpy(zero_copy_only=False)
    lacking = np.asarray(pc.is_null(values).to_numpy(zero_copy_only=False), np.bool_)
    wrong = np.flatnonzero(~((found > floor) & (found < np.inf)) & ~(lacking & optional))
    if len(wrong):
        cell, value = ids[int(wrong[0])], values[int(wrong[0])].as_py()
        told = "no value" if value is None else f"{value:g}"
        raise DataError(f"Cell '{cell}' of dataset '{dataset}' has {told} in obs column '{name}'.", _NUMBER)


def _require_counts(counts: sparse.csr_matrix, ids: Sequence[str], dataset: str) -> None:
    wrong = np.flatnonzero(~((counts.data >= 0) & (counts.data < np.inf)))
    if len(wrong):
        cell = ids[int(np.searchsorted(counts.indptr, wrong[0], side="right")) - 1]
        raise DataError(
            f"Cell '{cell}' of dataset '{dataset}' has {counts.data[wrong[0]]:g} of a gene, which is not a count.",
            "Mend the cell, or name where raw counts are, e.g. layer=counts or layer=raw.",
        )
