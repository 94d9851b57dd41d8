"""Where a file keeps its raw counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from scviaduct.errors import SourceError
from scviaduct.sources.ondisk import DenseMatrix, Frame, SparseMatrix, encoding, kind_of, open_matrix

if TYPE_CHECKING:
    from collections.abc import Iterator

SAMPLE = 20_000
"""Values looked at in each of three places of a matrix."""
_USUAL = ("layers/counts", "layers/raw_counts", "layers/raw")


@dataclass(frozen=True, slots=True)
class Layer:
    """A chosen matrix.

    Attributes
    ----------
    name
        ``X``, ``raw`` or ``layers/NAME``.
    matrix
        Open matrix.
    var
        Its genes: ``raw`` has its own.
    why
        Reason of the choice, for people.
    """

    name: str
    matrix: SparseMatrix | DenseMatrix
    var: Frame
    why: str


def choose_layer(root: Any, wanted: str | None, where: str) -> Layer:
    """Find the raw counts of an AnnData file.

    Parameters
    ----------
    root
        Its root group.
    wanted
        ``X``, ``raw`` or a layer's name (also as ``layers/NAME``); None to look for counts: ``X``, ``raw``, the layers
        ``counts``, ``raw_counts``, ``raw``, then the others, the first whose sampled values are non-negative integers.
        If there is none, ``X``.
    where
        The file, for messages.

    Raises
    ------
    SourceError
        If there is no such matrix, or it cannot be read by rows.
    """
    there = list(_matrices(root))
    if not there:
        raise SourceError(f"{where} holds no matrix: X is empty and there is no layer.", "Write the counts into X.")
    if wanted:
        name = next((name for name in (wanted, f"layers/{wanted}") if name in there), None)
        if name is None:
            raise SourceError(f"{where} has no layer '{wanted}'.", f"There are: {', '.join(there)}.")
        return _open(root, name, where, "asked for")
    ordered = sorted(there, key=lambda name: _rank(name, there))
    for name in ordered:
        # A CSC matrix is no candidate here: it could not be read anyway, and another one may do.
        if kind_of(_element(root, name)) in ("csr_matrix", "array") and _holds_counts(root, name, where):
            return _open(root, name, where, "its sampled values are non-negative integers")
    return _open(root, ordered[0], where, "no matrix holds counts")


def _rank(name: str, there: list[str]) -> int:
    usual = ("X", "raw", *_USUAL)
    return usual.index(name) if name in usual else len(usual) + there.index(name)


def _matrices(root: Any) -> Iterator[str]:
    if "X" in root and encoding(root["X"]) != "null":
        yield "X"
    if "raw" in root and hasattr(root["raw"], "keys") and "X" in root["raw"]:
        yield "raw"
    if "layers" in root:
        yield from (f"layers/{name}" for name in sorted(root["layers"].keys()))


def _element(root: Any, name: str) -> Any:
    return root["raw/X"] if name == "raw" else root[name]


def _open(root: Any, name: str, where: str, why: str) -> Layer:
    path = "raw/X" if name == "raw" else name
    var = Frame(root["raw/var"], f"raw/var of {where}") if name == "raw" else Frame(root["var"], f"var of {where}")
    matrix = open_matrix(root[path], f"{path} of {where}")
    if matrix.shape[1] != len(var):
        raise SourceError(
            f"{path} of {where} has {matrix.shape[1]} genes, its var {len(var)}.", "Write the file again with anndata."
        )
    return Layer(name, matrix, var, why)


def _holds_counts(root: Any, name: str, where: str) -> bool:
    values = open_matrix(_element(root, name), f"{'raw/X' if name == 'raw' else name} of {where}").sample(SAMPLE)
    values = values[values != 0]
    return bool(len(values) and np.isfinite(values).all() and (values > 0).all() and (values == np.rint(values)).all())
