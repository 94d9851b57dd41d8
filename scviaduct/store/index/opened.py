"""An open index: the segments of a version, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import pyarrow as pa

from scviaduct.store.index.manifest import Manifest
from scviaduct.store.index.quantizer import Quantizer
from scviaduct.store.index.segments import Segment, lists_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from scviaduct.values import FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class Index:
    """An open index, memory-mapped.

    Attributes
    ----------
    manifest
        What it is.
    segments
        Number of each open segment in the manifest to the segment.
    quantizer
        Centroids; None for an exact index.
    """

    manifest: Manifest
    segments: dict[int, Segment]
    quantizer: Quantizer | None

    @classmethod
    def open(cls, folder: Path, only: Sequence[int] | None = None) -> Self:
        """Map a built index into memory.

        Parameters
        ----------
        folder
            Of the version.
        only
            Numbers of the segments to open; None for all.

        Raises
        ------
        FileNotFoundError
            If it is not there or not whole, or is just being removed.
        """
        return cls.of(Manifest.load(folder), folder, only)

    @classmethod
    def of(cls, manifest: Manifest, folder: Path, only: Sequence[int] | None = None) -> Self:
        """Map the index that a manifest describes into memory; parameters and errors are those of :meth:`open`.

        Folders of segments and files of centroids are named by what is in them: where another index has come to lie in
        the folder, it is either of the same segments or not found.
        """
        numbers = range(len(manifest.parts)) if only is None else only
        quantizer = Quantizer.load(folder, manifest.quantizer) if manifest.quantizer else None
        lists = lists_of(quantizer)
        segments = {n: Segment.open(manifest.parts[n], folder / manifest.parts[n].id, lists) for n in numbers}
        return cls(manifest, segments, quantizer)

    @property
    def lists(self) -> int:
        """Lists of each segment; 1 in an exact index."""
        return self.manifest.lists or 1

    @property
    def vectors(self) -> FloatArray:
        """All vectors in the order of positions, float32, shape ``(n_cells, n_latent)``; a copy."""
        out = np.empty((self.manifest.cells, self.manifest.dimensions), np.float32)
        for segment in self.segments.values():
            at = segment.positions()
            live = np.flatnonzero(at >= 0)
            out[at[live]] = segment.vectors(live)
        return out

    @property
    def rows(self) -> pa.Table:
        """All rows in the order of positions: key, label and its uncertainty, kept columns; a copy."""
        at = np.concatenate([segment.positions() for segment in self.segments.values()])
        order = np.argsort(at, kind="stable")[np.count_nonzero(at < 0) :]
        whole = pa.concat_tables(alike([segment.table for segment in self.segments.values()]))
        return whole.unify_dictionaries().combine_chunks().take(pa.array(order))


def alike(tables: Sequence[pa.Table]) -> list[pa.Table]:
    """Tables of the same columns; text that one holds as a dictionary and another does not becomes plain."""
    if len({table.schema for table in tables}) == 1:
        return list(tables)
    return [plain(table) for table in tables]


def plain(table: pa.Table) -> pa.Table:
    """A table without dictionaries."""
    coded = [i for i, field in enumerate(table.schema) if pa.types.is_dictionary(field.type)]
    for i in coded:
        table = table.set_column(i, table.schema.field(i).name, table.column(i).cast(pa.string()))
    return table
