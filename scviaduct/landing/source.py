"""A landing as a source: the cells, rows and shards of what was landed, read from its pieces."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scviaduct.errors import SourceChangedError, SourceError
from scviaduct.landing.cells import read_cells
from scviaduct.landing.counts import StoredCounts
from scviaduct.landing.folder import Landing
from scviaduct.landing.genetables import positions, read_genes
from scviaduct.sources.counts import GeneTarget
from scviaduct.sources.filters import parse_filter
from scviaduct.sources.obs import PRIMARY, Cells
from scviaduct.sources.source import REPLAN, TableSource, without_genes
from scviaduct.sources.unreadable import UnreadableError, quarantined, refused
from scviaduct.sources.uri import Address, extended, local_path
from scviaduct.values import GeneTable

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from scviaduct.landing.cells import PieceCells
    from scviaduct.landing.manifest import Part, Piece
    from scviaduct.sources.counts import Rows
    from scviaduct.values import LongArray, Shard

_ROWS_KEPT = 64
"""Pieces whose rows are remembered: 64 of 16,384 cells are 8 MB."""


class LandingSource(TableSource):
    """One table of cells of a landing.

    Cells have the namespace, version, rows and keys of the source that was landed, so that a shard has the address
    that it has there.

    Parameters
    ----------
    address
        Decoded; ``version`` in it is compared with what was landed.
    landing
        Its folder.
    part
        What is read.
    stamp
        Of the landing, from before its manifest was read.

    Raises
    ------
    SourceError
        If the address asks for what was fixed when the source was landed.
    SourceChangedError
        If the landing was refreshed since.
    """

    def __init__(self, address: Address, landing: Landing, part: Part, stamp: tuple[int, int]) -> None:
        self._stamp = stamp
        self._landing, self._part = landing, part
        self.version, self.source, self.n_genes = part.version, part.source, part.n_genes
        self.var_index = part.var_index
        planned = address.parameters.get("version")
        if planned not in (None, self.version):
            raise SourceChangedError(
                f"{landing.path} was planned as version {planned} of {self.source} and holds {self.version} now.",
                REPLAN,
            )
        self._tables: dict[str, GeneTable] = {}
        self._rows: dict[str, LongArray] = {}
        self._primary_only = self._leaves_out(address)
        self._filter = parse_filter(address.parameters["filter"]) if "filter" in address.parameters else None
        if self._filter:
            self._filter.check((*part.columns, part.key), f"obs of {self.source}")
        with refused():
            self.absent_genes = self._absent(address)
        text = address.parameters.get("var_filter")
        self.selection = part.selection if text is None else extended(part.selection, var_filter=text)
        self.uri = str(address.pinned(version=self.version))

    def _leaves_out(self, address: Address) -> bool:
        """Whether cells that are not primary data are to be left out of what was landed."""
        told = self._part.columns.get(PRIMARY) == "bool"
        if told and address.keeps_duplicates and not self._part.duplicates:
            raise SourceError(
                f"{self._landing.path} was landed without cells whose {PRIMARY} is false.",
                "Land them too: scviaduct land 'SOURCE?duplicates=keep' --out LANDING.",
            )
        return told and not address.keeps_duplicates

    def _absent(self, address: Address) -> npt.NDArray[np.bool_] | None:
        """Genes that ``var_filter`` leaves out."""
        text = address.parameters.get("var_filter")
        if text is None:
            return None
        table = self._table(self._part.genes)
        if "var_filter" in self._part.selection or len(table.modalities) > 1:
            raise SourceError(
                f"{self._landing.path} takes no var_filter: it was landed with one, or has several modalities.",
                "Give it with the source: scviaduct land 'SOURCE?var_filter=...' --out LANDING.",
            )
        names = {self.var_index if name == "index" else name: values for name, values in table.columns.items()}
        chosen = parse_filter(text)
        chosen.check(names, f"the gene table of {self._landing.path}, which keeps identifiers,")
        columns = {name: pa.array([value or None for value in values]) for name, values in names.items()}
        return ~chosen.mask(pa.table(columns))

    def describe(self) -> dict[str, str]:
        """See :meth:`~scviaduct.sources.source.Source.describe`."""
        part = self._part
        unread = sum(not piece.counts for piece in part.pieces)
        return {
            **part.described,
            "kind": f"landing of {part.described.get('kind', 'a source')}",
            "place": str(self._landing.path),
            "size": f"{part.cells:,} cells x {part.n_genes:,} genes in {len(part.pieces):,} pieces",
            "landed from": part.uri,
            **({"without counts": f"{unread:,} pieces, unreadable when landed"} if unread else {}),
        }

    def obs_columns(self) -> tuple[str, ...]:
        """Names of the obs columns that were landed."""
        return tuple(self._part.columns)

    def genes(self, shard: Shard | None = None) -> GeneTable:
        """See :meth:`~scviaduct.sources.source.Source.genes`."""
        with quarantined(f"Genes of {self.source}") if shard else refused():
            table = self._table(self._part.genes)
        if self.absent_genes is None:
            return table
        columns = {name: without_genes(values, self.absent_genes) for name, values in table.columns.items()}
        return GeneTable(columns, table.modality)

    def _table(self, address: str) -> GeneTable:
        if address not in self._tables:
            self._tables[address] = read_genes(self._landing.genes_file(address), address)
        return self._tables[address]

    def cells(self, columns: tuple[str, ...], start: int = 0, stop: int | None = None) -> Iterator[Cells]:
        """See :meth:`~scviaduct.sources.source.TableSource.cells`; a piece at a time, of one dataset after another."""
        for piece in self._pieces(start, stop):
            yield self._selected(piece, columns, start, stop)

    def cells_of(self, dataset: str, columns: tuple[str, ...], start: int, stop: int) -> Iterator[Cells]:
        """See :meth:`~scviaduct.sources.source.TableSource.cells_of`."""
        for piece in self._pieces(start, stop):
            if piece.dataset_id == dataset:
                yield self._selected(piece, columns, start, stop)

    def _pieces(self, start: int, stop: int | None) -> list[Piece]:
        return [piece for piece in self._part.pieces if piece.stop > start and (stop is None or piece.start < stop)]

    def _read(self, piece: Piece, columns: tuple[str, ...] = ()) -> PieceCells:
        held = read_cells(self._landing.obs_file(piece.obs), piece.obs_digest, columns)
        self._rows[piece.obs] = held.rows
        while len(self._rows) > _ROWS_KEPT:
            self._rows.pop(next(iter(self._rows)))
        return held

    def _selected(self, piece: Piece, columns: tuple[str, ...], start: int, stop: int | None) -> Cells:
        filtered = self._filter.columns if self._filter else ()
        primary = (PRIMARY,) if self._primary_only else ()
        known = tuple(name for name in dict.fromkeys((*columns, *filtered, *primary)) if name in self._part.columns)
        rows, keys, obs = self._read(piece, known)
        chosen = (rows >= start) & (rows < (np.iinfo(np.int64).max if stop is None else stop))
        if self._filter:
            table = pa.table({name: obs[name] if name in known else keys for name in filtered})
            chosen &= self._filter.mask(table)
        candidates = int(chosen.sum())
        if self._primary_only:
            chosen &= pc.fill_null(obs[PRIMARY], False).to_numpy()  # noqa: FBT003
        found = int(chosen.sum())
        obs = obs.select(list(columns))
        if found < len(rows):
            kept = pa.array(chosen)
            # A table without columns has no rows that a filter could take.
            rows, keys, obs = rows[chosen], keys.filter(kept), obs.filter(kept) if columns else obs
        unselected = frozenset() if found else frozenset({piece.dataset_id})
        return Cells(rows, keys, (piece.dataset_id,), np.zeros(found, np.int32), obs, candidates - found, unselected)

    def counts(self, rows: LongArray, target: GeneTarget) -> Iterator[Rows]:
        """Stream the counts of some rows of one dataset, in order, in bounded slabs."""
        if not len(rows):
            return
        overlapping = self._pieces(int(rows[0]), int(rows[-1]) + 1)
        dataset = next(piece.dataset_id for piece in overlapping if rows[0] in self._rows_of(piece))
        for piece in overlapping:
            wanted = rows[(rows >= piece.start) & (rows < piece.stop)]
            if piece.dataset_id == dataset and len(wanted):
                at = np.searchsorted(self._rows_of(piece), wanted)
                yield from self._stored(piece).read(at, self._target(piece, target))

    def _rows_of(self, piece: Piece) -> LongArray:
        return self._rows[piece.obs] if piece.obs in self._rows else self._read(piece).rows

    def _stored(self, piece: Piece) -> StoredCounts:
        if not piece.counts:
            rows = f"rows {piece.start} to {piece.stop}"
            raise UnreadableError(
                f"Counts of {rows} could not be read when they were landed ({piece.reason}).",
                f"Mend the source and land again: scviaduct land SOURCE --out {self._landing.path}.",
            )
        return StoredCounts(self._landing.counts_folder(piece.counts), piece.counts_digest)

    def _target(self, piece: Piece, target: GeneTarget) -> GeneTarget:
        """Where the genes go that a piece is numbered by: those of an earlier release, perhaps in another order."""
        if piece.genes == self._part.genes:
            return target
        at = positions(self._table(piece.genes), self._table(self._part.genes))
        return GeneTarget(np.append(target.columns, np.int32(-1))[at], target.n_genes)

    def is_current(self) -> bool:
        """Whether the landing was not published anew since it was opened."""
        return self._landing.stamp() == self._stamp

    def close(self) -> None:
        """Forget what was remembered; no file stays open."""
        self._rows.clear()
        self._tables.clear()


def landing_at(address: Address) -> Landing:
    """The landing of an address.

    Raises
    ------
    SourceError
        If it is not on a file system.
    """
    path = local_path(address.location)
    if path is None:
        raise SourceError(
            f"A landing lies on a file system, not at {address.location}.",
            "Write landing:PATH, a folder that all nodes see.",
        )
    return Landing(path)
