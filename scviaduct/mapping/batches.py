"""Query batches: which new categories a query has, in what combinations, and in which shards.

A *query batch* is what one adapter is fitted for: the cells that share the values of all covariates that the reference
does not know. Cells of the new batch ``B1`` are one query batch whether their sex, which the reference knows, is ``f``
or ``m``; cells of ``B1`` that also come from a new donor are another.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np

from scviaduct.errors import DataError, InputError
from scviaduct.families.slots import BATCH, SAMPLE, covariate
from scviaduct.mapping.mapper import query_batch_key, query_sample_key
from scviaduct.sources.grouping import Combinations

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from scviaduct.references.package import Reference
    from scviaduct.values import CellBlock, IntArray, Scan, Settings, Shard

_FILL = "Fill it, or filter those cells out."


@dataclass(frozen=True, slots=True, order=True)
class QueryBatch:
    """New categories that occur together.

    Attributes
    ----------
    values
        Pairs of a covariate (``batch``, ``sample``, or what :func:`~scviaduct.families.slots.covariate` gives) and a
        value of it that the reference does not know; the batch first, then the sample, then the categorical covariates
        in the reference's order.
    """

    values: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        """For people: ``batch=B1, donor=d1``."""
        return ", ".join(f"{name.removeprefix(covariate(''))}={value}" for name, value in self.values)

    @property
    def key(self) -> str:
        """Text that no other query batch has: ``values`` as JSON."""
        return json.dumps(self.values, separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def of_key(cls, key: str) -> Self:
        """The query batch of a key."""
        return cls(tuple((name, value) for name, value in json.loads(key)))


@dataclass(frozen=True, slots=True)
class ShardBatches:
    """What a shard has of query batches.

    Attributes
    ----------
    shard
        The shard.
    cells
        Query batch to number of cells.
    known
        Cells of which the reference knows every covariate.
    """

    shard: Shard
    cells: Mapping[QueryBatch, int]
    known: int


@dataclass(frozen=True, slots=True)
class QueryBatches:
    """The query batches of a scan.

    Attributes
    ----------
    shards
        What each shard has, in the scan's order.
    """

    shards: tuple[ShardBatches, ...]

    @property
    def cells(self) -> dict[QueryBatch, int]:
        """Query batch to number of cells, over all shards; sorted."""
        total: Counter[QueryBatch] = Counter()
        for held in self.shards:
            total.update(held.cells)
        return dict(sorted(total.items()))

    @property
    def known(self) -> int:
        """Cells of which the reference knows every covariate."""
        return sum(held.known for held in self.shards)

    def shards_of(self, *batches: QueryBatch) -> tuple[Shard, ...]:
        """Shards that have cells of any of some query batches, in the scan's order."""
        wanted = frozenset(batches)
        return tuple(held.shard for held in self.shards if not wanted.isdisjoint(held.cells))


class Read(NamedTuple):
    """A categorical covariate that is read: its name, the query's obs column, and the categories that are known."""

    name: str
    column: str
    known: tuple[str, ...]


def read_covariates(reference: Reference, settings: Settings, *, decoder: bool = False) -> tuple[Read, ...]:
    """Categorical covariates whose new values need an adapter: what the encoder reads.

    Parameters
    ----------
    reference, settings
        What maps, and how.
    decoder
        Also the batch where the decoder alone reads it (``encode_covariates=False``, or MRVI).
    """
    found = []
    if reference.encoded_batch or (decoder and reference.batch_key):
        found.append(Read(BATCH, query_batch_key(reference, settings), tuple(reference.batch_categories)))
    if reference.encoded_sample:
        found.append(Read(SAMPLE, query_sample_key(reference, settings), tuple(reference.sample_categories)))
    if reference.encode_covariates:
        items = reference.categorical_covariates.items()
        found += [Read(covariate(column), column, tuple(known)) for column, known in items]
    return tuple(found)


def group_columns(reference: Reference, settings: Settings, *, decoder: bool = False) -> tuple[str, ...]:
    """obs columns whose combinations tell query batches apart: what a scan is to group by.

    Parameters
    ----------
    reference, settings, decoder
        As :func:`read_covariates` takes them. Empty if nothing is read.
    """
    read = read_covariates(reference, settings, decoder=decoder)
    return tuple(dict.fromkeys(item.column for item in read))


def query_batches(reference: Reference, settings: Settings, scan: Scan, *, decoder: bool = False) -> QueryBatches:
    """Find the query batches of a scan.

    Parameters
    ----------
    reference, settings, decoder
        As :func:`read_covariates` takes them.
    scan
        Grouped by :func:`group_columns` of the same arguments.

    Raises
    ------
    InputError
        If cells have no value in a column that is read, or the scan is not grouped.
    """
    assign = _Assignment(reference, settings, decoder=decoder)
    if not assign.columns:
        return QueryBatches(tuple(ShardBatches(shard, {}, shard.cells) for shard in scan.shards))
    if len(scan.groups) != len(scan.shards):
        raise InputError(
            f"The scan of {len(scan.shards)} shards does not count combinations of {', '.join(assign.columns)}.",
            "Scan with groups=group_columns(reference, settings).",
        )
    shards = []
    for shard, counts in zip(scan.shards, scan.groups, strict=True):
        cells: Counter[QueryBatch] = Counter()
        known = 0
        for combination, number in counts.items():
            if lacking := assign.lacking(combination):
                raise InputError(
                    f"{number:,} cells of dataset '{shard.dataset_id}' have no value in obs column '{lacking}'.", _FILL
                )
            batch = assign.batch(combination)
            if batch is None:
                known += number
            else:
                cells[batch] += number
        shards.append(ShardBatches(shard, dict(sorted(cells.items())), known))
    return QueryBatches(tuple(shards))


def batches_of(
    block: CellBlock, reference: Reference, settings: Settings, *, decoder: bool = False
) -> tuple[tuple[QueryBatch, ...], IntArray]:
    """Query batch of each cell of a block.

    Parameters
    ----------
    block
        With the obs columns of :func:`group_columns`.
    reference, settings, decoder
        As :func:`read_covariates` takes them.

    Returns
    -------
    tuple
        The query batches that the block has, sorted, and int32 of shape ``(n_cells,)``: each cell's position in them,
        -1 for a cell of which the reference knows every covariate.

    Raises
    ------
    DataError
        If a cell has no value in a column that is read.
    """
    assign = _Assignment(reference, settings, decoder=decoder)
    combinations = Combinations(assign.columns)
    numbers = combinations.number(block.obs, block.n_cells)
    for number, combination in enumerate(combinations.values):
        if lacking := assign.lacking(combination):
            cell = block.obs["observation_id"][int(np.flatnonzero(numbers == number)[0])].as_py()
            raise DataError(
                f"Cell '{cell}' of dataset '{block.shard.dataset_id}' has no value in obs column '{lacking}'.", _FILL
            )
    batch_of = [assign.batch(combination) for combination in combinations.values]
    batches = tuple(sorted({batch for batch in batch_of if batch is not None}))
    position: dict[QueryBatch | None, int] = {batch: at for at, batch in enumerate(batches)}
    codes = np.array([position.get(batch, -1) for batch in batch_of], np.int32)
    return batches, codes[numbers]


class _Assignment:
    """From a combination of obs values, in the order of ``columns``, to its query batch."""

    def __init__(self, reference: Reference, settings: Settings, *, decoder: bool) -> None:
        self._read = [
            (item.name, item.column, frozenset(item.known))
            for item in read_covariates(reference, settings, decoder=decoder)
        ]
        # One column may play several covariates.
        self.columns = group_columns(reference, settings, decoder=decoder)

    def lacking(self, combination: Sequence[str | None]) -> str:
        """The first column without a value; empty if there is none."""
        pairs = zip(self.columns, combination, strict=True)
        return next((column for column, value in pairs if value is None), "")

    def batch(self, combination: Sequence[str | None]) -> QueryBatch | None:
        """The query batch of complete values; None if all are known."""
        told = dict(zip(self.columns, combination, strict=True))
        values = tuple(
            (name, value)
            for name, column, known in self._read
            if (value := told[column]) is not None and value not in known
        )
        return QueryBatch(values) if values else None
