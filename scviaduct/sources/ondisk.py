"""AnnData's on-disk elements, read by slice: data frames and matrices in h5py or zarr groups alike.

The encodings are those of https://anndata.readthedocs.io/en/stable/fileformat-prose.html, data frames of version 0.2.0
(anndata 0.8 and later) and of version 0.1.0 before it, which MuData of its first years holds. anndata itself reads
whole elements; a stream needs slices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pyarrow as pa

from scviaduct.errors import SourceError
from scviaduct.sources.codecs import compiled_codecs
from scviaduct.sources.counts import SLAB_BYTES, Rows, runs
from scviaduct.sources.deflated import inflating
from scviaduct.sources.unreadable import reading

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from scviaduct.sources.counts import GeneTarget
    from scviaduct.values import LongArray

VALUE_BYTES = 40
"""What one stored value costs while its slab is worked on: itself, its gene, and their mapped copies."""
REWRITE = "Write it again with a current anndata: anndata.read_h5ad(PATH).write_h5ad(PATH)."
_NULLABLE = ("nullable-integer", "nullable-boolean", "nullable-string-array")
_COLUMNS = ("array", "string-array", "categorical", *_NULLABLE)
_CATEGORIES = "__categories"
"""Where a data frame of version 0.1.0 keeps the categories of its columns."""


def encoding(element: Any) -> str:
    """``encoding-type`` of an element, empty if it has none."""
    return _text(element.attrs.get("encoding-type", ""))


def kind_of(element: Any) -> str:
    """``encoding-type`` of a matrix; a plain table of numbers without one, as anndata once wrote them, is an array."""
    return encoding(element) or ("array" if len(getattr(element, "shape", ())) == 2 else "")


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def strings(dataset: Any, start: int, stop: int) -> list[str]:
    """Some of a dataset of texts."""
    values = dataset.asstr()[start:stop] if isinstance(dataset, h5py.Dataset) else dataset[start:stop]
    return list(values.tolist())


def _dtype(dataset: Any) -> np.dtype[Any]:
    try:
        return dataset.dtype  # type: ignore[no-any-return]
    except TypeError as error:  # how h5py says that numpy has no such type
        raise ValueError(str(error)) from error


def is_string(dataset: Any) -> bool:
    """Whether a dataset holds texts."""
    return encoding(dataset) == "string-array" or _dtype(dataset).kind in "OTUS"


class Frame:
    """A data frame (``obs`` or ``var``) on disk.

    Parameters
    ----------
    group
        Its h5py or zarr group.
    where
        File and element, for messages.

    Raises
    ------
    SourceError
        If it is not a data frame of the current encoding.
    """

    def __init__(self, group: Any, where: str) -> None:
        version = _text(group.attrs.get("encoding-version", "none"))
        if encoding(group) != "dataframe" or version not in ("0.1.0", "0.2.0"):
            raise SourceError(
                f"{where} is in an encoding of old ('{encoding(group) or 'no encoding-type'}', version {version}).",
                REWRITE,
            )
        self._group = group
        self._where = where
        self.index = _text(group.attrs["_index"])
        self.columns = tuple(_text(name) for name in group.attrs["column-order"])
        has_codes = version == "0.1.0" and _CATEGORIES in group
        self._coded = frozenset(group[_CATEGORIES].keys()) if has_codes else frozenset()
        self._plain_kind = "array" if version == "0.1.0" else ""
        self._categories: dict[str, pa.Array] = {}

    def _kind(self, name: str) -> str:
        """``encoding-type`` of a column; before version 0.2.0 columns have none."""
        return encoding(self._group[name]) or self._plain_kind

    def __len__(self) -> int:
        index = self._group[self.index]
        if hasattr(index, "keys"):
            index = index["codes"] if encoding(index) == "categorical" else index["values"]
        return int(index.shape[0])

    def is_text(self, name: str) -> bool:
        """Whether a column holds strings or categories of strings."""
        element = self._group[name]
        if name in self._coded:
            return is_string(self._group[_CATEGORIES][name])
        match self._kind(name):
            case "categorical":
                return is_string(element["categories"])
            case "string-array" | "nullable-string-array":
                return True
            case "array":
                return _dtype(element).kind in "OTUS"
        return False

    def is_bool(self, name: str) -> bool:
        """Whether a column holds booleans."""
        kind = self._kind(name)
        plain = kind == "array" and name not in self._coded
        return kind == "nullable-boolean" or (plain and _dtype(self._group[name]).kind == "b")

    def is_number(self, name: str) -> bool:
        """Whether a column holds integers or real numbers."""
        kind = self._kind(name)
        plain = kind == "array" and name not in self._coded
        return kind == "nullable-integer" or (plain and _dtype(self._group[name]).kind in "iuf")

    def read(self, name: str, start: int, stop: int) -> pa.Array:
        """Rows ``[start, stop)`` of a column (or of the index), as Arrow; categories stay dictionary-encoded.

        Raises
        ------
        SourceError
            If the column is in an encoding that holds no scalars.
        UnreadableError
            If it cannot be read.
        """
        with reading(f"Column '{name}', rows {start} to {stop}, of {self._where}"):
            return self._read(name, start, stop)

    def _read(self, name: str, start: int, stop: int) -> pa.Array:
        element = self._group[name]
        if name in self._coded:
            return self._decoded(name, element[start:stop], self._group[_CATEGORIES][name])
        match self._kind(name):
            case "categorical":
                return self._decoded(name, element["codes"][start:stop], element["categories"])
            case "nullable-integer" | "nullable-boolean" | "nullable-string-array":
                values, mask = element["values"], element["mask"][start:stop]
                held = strings(values, start, stop) if is_string(values) else values[start:stop]
                return pa.array(held, mask=mask)
            case "array" | "string-array":
                return self._plain(element, start, stop)
        raise SourceError(
            f"Column '{name}' of {self._where} has encoding '{encoding(element) or 'none'}'.",
            f"Columns are read from {', '.join(_COLUMNS)}. {REWRITE}",
        )

    def _decoded(self, name: str, codes: npt.NDArray[np.signedinteger], held: Any) -> pa.Array:
        if name not in self._categories:
            values = held["values"] if encoding(held) in _NULLABLE else held
            self._categories[name] = self._plain(values, 0, values.shape[0])
        indices = pa.array(codes.astype(np.int32), mask=codes < 0)
        return pa.DictionaryArray.from_arrays(indices, self._categories[name])

    @staticmethod
    def _plain(dataset: Any, start: int, stop: int) -> pa.Array:
        if is_string(dataset):
            return pa.array(strings(dataset, start, stop), pa.string())
        values = dataset[start:stop]
        return pa.array(values.astype(np.float32) if values.dtype == np.float16 else values)


class SparseMatrix:
    """A CSR matrix on disk.

    Parameters
    ----------
    group
        Its group: ``indptr``, ``indices``, ``data``.
    where
        File and element, for messages.
    """

    def __init__(self, group: Any, where: str) -> None:
        self._where = where
        with compiled_codecs(group):
            arrays = [group[name] for name in ("indptr", "indices", "data")]
        for array in arrays:
            _dtype(array)
        self._indptr, self._indices, self._data = map(inflating, arrays)
        self.shape = int(group.attrs["shape"][0]), int(group.attrs["shape"][1])

    def read(self, rows: LongArray, target: GeneTarget) -> Iterator[Rows]:
        """Selected rows in order, a slab at a time."""
        for start, stop, chosen in runs(rows):
            with reading(f"{self._where}, rows {start} to {stop},"):
                indptr = self._indptr[start : stop + 1].astype(np.int64)
                if len(indptr) != stop - start + 1 or indptr[0] < 0 or (np.diff(indptr) < 0).any():
                    raise ValueError("indptr does not ascend")
            for first, last in _slabs(indptr):
                low, high = int(indptr[first]), int(indptr[last])
                with reading(f"{self._where}, rows {start + first} to {start + last},"):
                    inside = chosen[(chosen >= first) & (chosen < last)] - first
                    indices, data = self._values(low, high)
                    slab = target.align(indptr[first : last + 1] - low, indices, data, inside)
                yield slab

    def _values(self, low: int, high: int) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.generic]]:
        indices, data = self._indices[low:high], self._data[low:high]
        if not len(indices) == len(data) == high - low:
            raise ValueError(
                f"{high - low} values are announced, {len(indices)} genes and {len(data)} values are there"
            )
        return indices, data

    def sample(self, count: int) -> npt.NDArray[np.generic]:
        """Some stored values: from the beginning, the middle and the end."""
        total = int(self._data.shape[0])
        starts = sorted({0, max(0, (total - count) // 2), max(0, total - count)})
        with reading(f"data of {self._where}"):
            return np.concatenate([self._data[start : start + count] for start in starts])


class DenseMatrix:
    """A dense matrix on disk, made sparse slab by slab.

    Parameters
    ----------
    dataset
        Its array of shape ``(n_cells, n_genes)``.
    where
        File and element, for messages.
    """

    def __init__(self, dataset: Any, where: str) -> None:
        self._dataset, self._where = dataset, where
        _dtype(dataset)
        rows, genes = dataset.shape
        self.shape = int(rows), int(genes)

    def read(self, rows: LongArray, target: GeneTarget) -> Iterator[Rows]:
        """Selected rows in order, a slab at a time."""
        size = max(1, SLAB_BYTES // (max(1, self.shape[1]) * (self._dataset.dtype.itemsize + VALUE_BYTES)))
        for start, stop, chosen in runs(rows):
            for first in range(0, stop - start, size):
                last = min(start + first + size, stop)
                with reading(f"{self._where}, rows {start + first} to {last},"):
                    dense = self._dataset[start + first : last]
                inside = chosen[(chosen >= first) & (chosen < first + size)] - first
                at_row, at_gene = np.nonzero(dense)
                indptr = np.concatenate(([0], np.cumsum(np.bincount(at_row, minlength=len(dense)))))
                yield target.align(indptr, at_gene, dense[at_row, at_gene], inside)

    def sample(self, count: int) -> npt.NDArray[np.generic]:
        """Some non-zero values: from the first, the middle and the last rows."""
        size, total = max(1, count // max(1, self.shape[1])), self.shape[0]
        starts = {0, max(0, (total - size) // 2), max(0, total - size)}
        with reading(self._where):
            values = np.concatenate([self._dataset[start : start + size].ravel() for start in sorted(starts)])
        return np.asarray(values[values != 0])


def _slabs(indptr: LongArray) -> Iterator[tuple[int, int]]:
    """Ranges of rows whose values fit a slab; a row that alone does not is a slab of its own."""
    limit, first, rows = SLAB_BYTES // VALUE_BYTES, 0, len(indptr) - 1
    while first < rows:
        last = min(max(int(np.searchsorted(indptr, indptr[first] + limit, side="right")) - 1, first + 1), rows)
        yield first, last
        first = last


def open_matrix(element: Any, where: str) -> SparseMatrix | DenseMatrix:
    """A matrix that can be read by rows.

    Raises
    ------
    SourceError
        If it is stored by columns, or in an encoding of old.
    """
    match kind_of(element):
        case "csr_matrix":
            return SparseMatrix(element, where)
        case "array":
            return DenseMatrix(element, where)
        case "csc_matrix":
            raise SourceError(
                f"{where} is stored by columns (csc_matrix): reading a few cells would read all of it.",
                "Write it again by rows: adata.X = adata.X.tocsr(); adata.write_h5ad(PATH).",
            )
    raise SourceError(f"{where} has encoding '{encoding(element) or 'none'}', not csr_matrix or array.", REWRITE)
