"""Proteins that an AnnData file keeps beside its genes, in ``obsm``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from scviaduct.errors import SourceError
from scviaduct.sources.counts import SLAB_BYTES, Rows, runs
from scviaduct.sources.features import Names, Part, checked
from scviaduct.sources.ondisk import VALUE_BYTES, Frame, encoding, is_string, kind_of, open_matrix, strings
from scviaduct.sources.unreadable import reading

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from scviaduct.sources.counts import GeneTarget
    from scviaduct.values import LongArray

_KINDS = ("csr_matrix", "array", "dataframe")


class FrameMatrix:
    """A data frame of numbers, read by rows as a matrix.

    Parameters
    ----------
    frame
        On disk; every column is numeric.
    where
        File and element, for messages.
    """

    def __init__(self, frame: Frame, where: str) -> None:
        self._frame, self._where = frame, where
        self.shape = len(frame), len(frame.columns)

    def read(self, rows: LongArray, target: GeneTarget) -> Iterator[Rows]:
        """Selected rows in order, a slab at a time; a missing value is NaN."""
        size = max(1, SLAB_BYTES // (max(1, self.shape[1]) * (VALUE_BYTES + 8)))
        for start, stop, chosen in runs(rows):
            for first in range(0, stop - start, size):
                last = min(first + size, stop - start)
                dense = self._dense(start + first, start + last)
                inside = chosen[(chosen >= first) & (chosen < last)] - first
                at_row, at_column = np.nonzero(dense)
                indptr = np.concatenate(([0], np.cumsum(np.bincount(at_row, minlength=len(dense)))))
                yield target.align(indptr, at_column, dense[at_row, at_column], inside)

    def _dense(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        values = np.empty((stop - start, self.shape[1]), np.float32)
        for position, name in enumerate(self._frame.columns):
            column = self._frame.read(name, start, stop).to_numpy(zero_copy_only=False)
            with reading(f"Column '{name}', rows {start} to {stop}, of {self._where}"):
                if len(column) != stop - start:
                    raise ValueError(f"{stop - start} rows are announced, {len(column)} are there")
                values[:, position] = column
        return values


def open_proteins(root: Any, key: str, cells: int, where: str) -> Part:
    """The proteins of an AnnData file.

    Parameters
    ----------
    root
        Its root group.
    key
        Element of obsm: a data frame whose columns are proteins, or a matrix whose names ``uns`` holds, in
        ``KEY_names`` or ``protein_names``.
    cells
        Number of cells of obs.
    where
        The file, for messages.

    Raises
    ------
    SourceError
        If there is no such element, it has no names, or it is not numeric.
    """
    held = root.get("obsm", {})
    if key not in held:
        raise SourceError(
            f"proteins={key}: obsm of {where} has no such element.", f"There are: {', '.join(held.keys()) or 'none'}."
        )
    element, place = held[key], f"obsm/{key} of {where}"
    if encoding(element) == "dataframe":
        frame = Frame(element, place)
        _refuse_text(frame, place)
        matrix: Any = FrameMatrix(frame, place)
        part = _part(matrix, frame.columns, key, place)
    elif kind_of(element) in _KINDS:
        matrix = open_matrix(element, place)
        part = _part(matrix, _names(root, key, matrix.shape[1], place), key, place)
    else:
        raise SourceError(
            f"{place} has encoding '{encoding(element) or 'none'}', not {', '.join(_KINDS)}.",
            f"Write it as a data frame of cells by proteins: adata.obsm['{key}'] = pandas.DataFrame(...).",
        )
    return checked(part, matrix.shape, cells, where)


def _part(matrix: Any, names: Sequence[str], key: str, place: str) -> Part:
    named = ("protein",) * len(names)
    return Part("protein", named, matrix, Names(names), f"names of {place}", f"obsm/{key}", "asked for by proteins=")


def _refuse_text(frame: Frame, place: str) -> None:
    for name in frame.columns:
        if not frame.is_number(name):
            raise SourceError(
                f"Column '{name}' of {place} does not hold numbers.",
                "Counts of one protein a column are needed: take the others out of it.",
            )


def _names(root: Any, key: str, width: int, place: str) -> list[str]:
    """Names of the columns of a matrix, as ``uns`` gives them."""
    uns = root.get("uns", {})
    example = f"adata.uns['{key}_names'] = ['CD3', 'CD4', ...]"
    for name in (f"{key}_names", "protein_names"):
        if name not in uns:
            continue
        with reading(f"uns/{name} of {place}"):
            held = uns[name]["values"] if hasattr(uns[name], "keys") else uns[name]
            values = strings(held, 0, width + 1) if is_string(held) else []
        if len(values) != width:
            raise SourceError(
                f"{place} has {width} columns, and uns/{name} names {len(values)}.", f"Name each once: {example}."
            )
        return values
    raise SourceError(
        f"{place} is a matrix without names: uns has neither '{key}_names' nor 'protein_names'.",
        f"Name its columns: {example}, or make it a data frame.",
    )
