"""Cells of a MuData file: one obs over all modalities, and where each modality keeps them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa

from scviaduct.errors import SourceError
from scviaduct.sources.obs import PRIMARY
from scviaduct.sources.unreadable import reading

if TYPE_CHECKING:
    from collections.abc import Mapping

    from scviaduct.sources.ondisk import Frame
    from scviaduct.values import LongArray

CHECKED = 24
"""Cells whose names are compared in a modality's map; the names of all are a pass over two columns of text."""
UPDATE = "Write it again: mdata.update(); mdata.write_h5mu(PATH)."


class MuObs:
    """The obs of a MuData file: its global columns, and those that its modalities have of their own.

    A modality's column is called ``rna:batch``, and also ``batch`` if the global obs has no such column and no other
    modality has one. It is missing for cells that the modality lacks.

    Parameters
    ----------
    whole
        The global obs.
    own
        obs of each modality, and the row of every cell in it (as :func:`cell_rows` gives it).
    """

    def __init__(self, whole: Frame, own: Mapping[str, tuple[Frame, LongArray | None]]) -> None:
        self._whole = whole
        self.index = whole.index
        known = {whole.index, *whole.columns}
        self._own: dict[str, tuple[Frame, str, LongArray | None]] = {}
        for name, (frame, at) in own.items():
            for column in frame.columns:
                if f"{name}:{column}" not in known:
                    self._own[f"{name}:{column}"] = (frame, column, at)
        for name, (frame, at) in own.items():
            others = {column for other in own if other != name for column in own[other][0].columns}
            for column in frame.columns:
                # A cell that the modality lacks has no flag there, and would be taken for a duplicate.
                lacking = column == PRIMARY and at is not None and bool((at < 0).any())
                if column not in known | others and not lacking:
                    self._own[column] = (frame, column, at)
        self.columns = (*whole.columns, *self._own)

    def __len__(self) -> int:
        return len(self._whole)

    def is_bool(self, name: str) -> bool:
        """Whether a column holds booleans."""
        if name not in self._own:
            return self._whole.is_bool(name)
        frame, column, _ = self._own[name]
        return frame.is_bool(column)

    def read(self, name: str, start: int, stop: int) -> pa.Array:
        """Rows ``[start, stop)`` of a column or of the index.

        Raises
        ------
        SourceError
            If the column is in an encoding that holds no scalars.
        UnreadableError
            If it cannot be read.
        """
        if name not in self._own:
            return self._whole.read(name, start, stop)
        frame, column, at = self._own[name]
        if at is None:
            return frame.read(column, start, stop)
        rows = at[start:stop]
        there = rows >= 0
        if not there.any():
            return pa.nulls(len(rows), frame.read(column, 0, 0).type)
        low, high = int(rows[there].min()), int(rows.max()) + 1
        return frame.read(column, low, high).take(pa.array(rows - low, mask=~there))


def cell_rows(root: Any, name: str, whole: Frame, own: Frame, where: str) -> LongArray | None:
    """Row of every cell in one modality.

    Parameters
    ----------
    root
        Root group of the file; ``obsmap`` in it says where the cells are. MuData of before 0.2 has none: names tell.
    name
        The modality.
    whole, own
        The global obs, and that of the modality.
    where
        The file, for messages.

    Returns
    -------
    numpy.ndarray or None
        int64, shape ``(n_cells,)``; -1 for a cell that the modality lacks. None if both have the same rows.

    Raises
    ------
    SourceError
        If the map is not one of these cells.
    """
    if "obsmap" in root and name in root["obsmap"]:
        at = _mapped(root["obsmap"][name], name, whole, own, where)
    else:
        at = _matched(name, whole, own, where)
    return None if np.array_equal(at, np.arange(len(own))) else at


def _mapped(held: Any, name: str, whole: Frame, own: Frame, where: str) -> LongArray:
    """What ``obsmap`` says, which counts rows from 1; 0 is a cell that the modality lacks."""
    with reading(f"obsmap/{name} of {where}"):
        at = np.asarray(held[...]).astype(np.int64).ravel() - 1
    there = at[at >= 0]
    if len(at) != len(whole) or not np.array_equal(np.sort(there), np.arange(len(own))):
        raise SourceError(
            f"obsmap of modality '{name}' of {where} places {len(there):,} of {len(at):,} cells in its {len(own):,}"
            f" rows, and obs has {len(whole):,} cells.",
            UPDATE,
        )
    cells = np.flatnonzero(at >= 0)
    for cell in cells[np.linspace(0, len(cells) - 1, min(CHECKED, len(cells)), dtype=np.int64)]:
        row = int(at[cell])
        here, there_name = (frame.read(frame.index, i, i + 1)[0].as_py() for frame, i in ((whole, cell), (own, row)))
        if here != there_name:
            raise SourceError(
                f"obsmap of modality '{name}' of {where} says that cell '{here}' is row {row}, which is"
                f" '{there_name}'.",
                UPDATE,
            )
    return at


def _matched(name: str, whole: Frame, own: Frame, where: str) -> LongArray:
    """Rows by the names of the cells."""
    names, local = _index(whole), _index(own)
    if not local.is_unique or not names.is_unique:
        side = f"Modality '{name}' of {where}" if not local.is_unique else f"obs of {where}"
        unclear = local if not local.is_unique else names
        repeated = unclear[unclear.duplicated()][0]
        raise SourceError(
            f"{side} has cell '{repeated}' more than once, and no obsmap tells them apart.", f"Rename one. {UPDATE}"
        )
    at = np.asarray(local.get_indexer(names), np.int64)
    if (at >= 0).sum() != len(own):
        lost = local.difference(names)[0]
        raise SourceError(f"Cell '{lost}' of modality '{name}' of {where} is not in obs.", UPDATE)
    return at


def _index(frame: Frame) -> Any:
    return pd.Index(frame.read(frame.index, 0, len(frame)).to_pylist(), dtype=object)
