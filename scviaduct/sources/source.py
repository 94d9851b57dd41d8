"""The streaming interface that every source has, and what sources of one obs table share."""

from __future__ import annotations

import abc
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Self

import numpy as np
import pyarrow as pa

from scviaduct.errors import SourceChangedError, SourceError
from scviaduct.sources.counts import GeneTarget, assemble
from scviaduct.sources.cutting import Cutter, KeyCheck, rows_bytes, rows_hasher
from scviaduct.sources.grouping import Combinations
from scviaduct.sources.summary import Summariser
from scviaduct.sources.unreadable import quarantined, refused
from scviaduct.values import CellBlock, Scan, Shard

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from scviaduct.sources.counts import Rows
    from scviaduct.sources.obs import Cells
    from scviaduct.values import GeneTable, IntArray, LongArray

BATCH_ROWS = 65_536
"""Rows of obs that are worked on at a time."""
MAX_VAR_COLUMNS = 12
"""Text columns of var that a gene table takes, at most."""
KEY_COLUMN = "observation_id"
"""First column of a block's obs."""
REPLAN = "Plan again: run the same command, which maps what the source holds now."


class Source(AbstractContextManager["Source"], abc.ABC):
    """Query cells that can be streamed. Holds open handles, so it is never pickled; its shards are.

    Attributes
    ----------
    uri
        Canonical and pinned: opened anywhere it gives the same cells, or an error.
    version
        What pins the content: a Census release, a fingerprint or a content digest.
    """

    uri: str
    version: str

    @abc.abstractmethod
    def describe(self) -> dict[str, str]:
        """What was opened and which matrix was chosen and why, for people."""

    @abc.abstractmethod
    def obs_columns(self) -> tuple[str, ...]:
        """Names of the obs columns; of the first file, where there are several."""

    @abc.abstractmethod
    def scan(self, shard_cells: int, columns: Sequence[str] = (), groups: Sequence[str] = ()) -> Scan:
        """Stream obs once: cut shards, refuse keys that repeat, summarise columns, count combinations of values.

        Memory: one batch of the columns needed, plus 8 bytes a cell of the largest dataset, plus the combinations. The
        key hashes (8 bytes a cell) are spooled to a temporary file.

        Parameters
        ----------
        shard_cells
            Cells of a full shard.
        columns
            obs columns to summarise; those that are absent come back in ``Scan.missing``.
        groups
            obs columns whose combinations of values are counted by shard (``Scan.groups``); absent ones come back in
            ``Scan.missing`` too.

        Raises
        ------
        SourceError
            If a cell has no key or no dataset, a key occurs twice in a dataset, a piece cannot be read, or the columns
            of ``groups`` have more than ``grouping.MAX_COMBINATIONS`` combinations.
        FilterError
            If the filter compares unlike things.
        """

    @abc.abstractmethod
    def genes(self, shard: Shard | None = None) -> GeneTable:
        """Identifiers of the genes, in the order of ``read`` without a map.

        ``"index"`` comes first (``var_names``; for SOMA ``feature_id``, ``var_id``, ``gene_id`` or the joinid), then
        the text columns of var, at most ``MAX_VAR_COLUMNS``. Genes outside ``var_filter`` are ``""`` throughout.

        Parameters
        ----------
        shard
            Tells which file is meant, where a source has several.

        Raises
        ------
        SourceError
            If there are several files and no shard is given.
        """

    @abc.abstractmethod
    def read(
        self,
        shard: Shard,
        gene_map: IntArray | None = None,
        n_genes: int | None = None,
        columns: Sequence[str] = (),
        limit: int | None = None,
    ) -> CellBlock:
        """Read a shard's counts and obs columns.

        Memory, whatever the size of the source: one slab of it (64 MB decoded, ``counts.SLAB_BYTES``) plus the block.

        Parameters
        ----------
        shard
            One of this source's.
        gene_map
            int32, shape ``(n_source_genes,)``; column of each source gene, -1 to drop it. Genes that share a column are
            summed. None keeps all genes in the source's order.
        n_genes
            Width of the block.
        columns
            obs columns to bring: text as ``dictionary<int32, string>``, others as bool, int64 or double.
        limit
            Only the first so many cells; what the shard holds is then not verified.

        Raises
        ------
        SourceChangedError
            If the source is of another version, or the selected rows are not those planned.
        DataError
            If a piece of it cannot be read; what may pass, such as a lost connection, is raised as it is.
        SourceError
            If a requested column does not exist, or is called ``observation_id``.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Close the handles."""

    def is_current(self) -> bool:
        """Whether the handles still show what the URI leads to; cheap, so that a cached source can be trusted."""
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> str:
        raise TypeError(
            f"{type(self).__name__} holds open handles and is not pickled: send a Shard, or the URI {self.uri}."
        )


class TableSource(Source):
    """A source of one obs table and one matrix."""

    source: str
    """Namespace of the cell key, without version or filter."""
    selection: str
    """Canonical text of what else decides the values."""
    n_genes: int
    absent_genes: npt.NDArray[np.bool_] | None
    """Genes that ``var_filter`` leaves out."""
    var_index: str
    """What the file calls the column that is ``"index"`` of the gene table (of its first modality)."""

    @abc.abstractmethod
    def cells(self, columns: tuple[str, ...], start: int = 0, stop: int | None = None) -> Iterator[Cells]:
        """Stream the selected cells with rows in ``[start, stop)``, in order, in bounded batches."""

    def cells_of(self, dataset: str, columns: tuple[str, ...], start: int, stop: int) -> Iterator[Cells]:
        """The same of one dataset alone."""
        return (cells.only(dataset) for cells in self.cells(columns, start, stop))

    @abc.abstractmethod
    def counts(self, rows: LongArray, target: GeneTarget) -> Iterator[Rows]:
        """Stream the counts of some rows, in order, in bounded slabs."""

    def scan(self, shard_cells: int, columns: Sequence[str] = (), groups: Sequence[str] = ()) -> Scan:
        """See :meth:`Source.scan`."""
        there = self.obs_columns()
        present = tuple(dict.fromkeys(column for column in (*columns, *groups) if column in there))
        summaries = {column: Summariser() for column in present if column in columns}
        combinations = Combinations(groups, self.source)
        cutter = Cutter(Shard(self.uri, self.source, self.version, self.selection, "", 0, 0, 0, ""), shard_cells)
        skipped, unselected = 0, dict[str, None]()
        with refused(), KeyCheck() as keys:
            for cells in self.cells(present):
                cutter.add(cells, combinations.number(cells.obs, len(cells.rows)) if groups else None)
                keys.add(cells)
                for column, summary in summaries.items():
                    summary.add(cells.obs[column].combine_chunks())
                skipped += cells.skipped
                unselected.update(dict.fromkeys(sorted(cells.unselected)))
            keys.finish(lambda: self.cells(()), self.source)
        shards = cutter.finish()
        selected = {shard.dataset_id for shard in shards}
        empty = tuple(name for name in unselected if name not in selected) or (() if shards else (self.source,))
        return Scan(
            shards=shards,
            cells=sum(shard.cells for shard in shards),
            duplicates_skipped=skipped,
            empty=empty,
            columns={column: summary.summary() for column, summary in summaries.items()},
            missing={column: self.source for column in (*columns, *groups) if column not in there},
            groups=tuple(combinations.told(counts) for counts in cutter.groups) if groups else (),
        )

    def read(
        self,
        shard: Shard,
        gene_map: IntArray | None = None,
        n_genes: int | None = None,
        columns: Sequence[str] = (),
        limit: int | None = None,
    ) -> CellBlock:
        """See :meth:`Source.read`."""
        self._check(shard, columns)
        target = GeneTarget.of(self.n_genes, gene_map, n_genes, self.absent_genes)
        with quarantined(f"Rows {shard.start} to {shard.stop} of dataset '{shard.dataset_id}' in {self.source}"):
            rows, obs = self._select(shard, tuple(dict.fromkeys(columns)), limit)
            counts = assemble(self.counts(rows, target))
        return CellBlock(shard, counts.indptr, counts.indices, counts.data, target.n_genes, rows, obs)

    def select(self, shard: Shard, columns: Sequence[str] = (), limit: int | None = None) -> tuple[LongArray, pa.Table]:
        """Read a shard's rows and obs columns without its counts; arguments and errors as of :meth:`Source.read`.

        Returns
        -------
        tuple
            int64 rows, and a table as ``CellBlock.obs`` is.
        """
        self._check(shard, columns)
        with quarantined(f"Rows {shard.start} to {shard.stop} of dataset '{shard.dataset_id}' in {self.source}"):
            return self._select(shard, tuple(dict.fromkeys(columns)), limit)

    def _check(self, shard: Shard, columns: Sequence[str]) -> None:
        if shard.version != self.version:
            raise SourceChangedError(
                f"{self.source} was planned as version {shard.version} and is {self.version} now.", REPLAN
            )
        for column in columns:
            if column == KEY_COLUMN:
                raise SourceError(
                    f"obs column '{column}' of {self.source} has the name of a block's cell key.", "Rename it in obs."
                )
            if column not in self.obs_columns():
                raise SourceError(
                    f"{self.source} has no obs column '{column}'.", f"There are: {', '.join(self.obs_columns())}."
                )

    def _select(self, shard: Shard, columns: tuple[str, ...], limit: int | None) -> tuple[LongArray, pa.Table]:
        """Rows and obs of the shard's cells, verified."""
        rows, tables, hasher, found = [np.zeros(0, np.int64)], [], rows_hasher(), 0
        for cells in self.cells_of(shard.dataset_id, columns, shard.start, shard.stop):
            rows.append(cells.rows)
            tables.append(pa.table({KEY_COLUMN: cells.keys, **{name: cells.obs[name] for name in columns}}))
            hasher.update(rows_bytes(cells.rows))
            found += len(cells.rows)
            if limit is not None and found >= limit:
                break
        if limit is None and (found != shard.cells or hasher.hexdigest() != shard.rows_digest):
            raise SourceChangedError(
                f"Rows {shard.start} to {shard.stop} of dataset '{shard.dataset_id}' in {self.source} select {found}"
                f" cells, not the {shard.cells} that were planned.",
                REPLAN,
            )
        table = pa.concat_tables(tables).slice(0, limit)
        return np.concatenate(rows)[:limit], _encoded(table)


def _encoded(table: pa.Table) -> pa.Table:
    """Text columns as categories of the values that occur; keys stay plain."""
    columns = {}
    for name in table.column_names:
        array = table[name].combine_chunks()
        textual = name != KEY_COLUMN and pa.types.is_string(array.type)
        columns[name] = array.dictionary_encode() if textual else array
    return pa.table(columns)


def without_genes(values: Sequence[str], absent: npt.NDArray[np.bool_] | None) -> tuple[str, ...]:
    """Identifiers with ``""`` for the genes that are left out."""
    if absent is None:
        return tuple(values)
    return tuple("" if out else value for value, out in zip(values, absent, strict=True))
