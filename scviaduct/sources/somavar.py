"""Measurements of a SOMA experiment: the genes of each, and a layer of counts of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import tiledbsoma

from scviaduct.errors import SourceError
from scviaduct.sources.features import Part
from scviaduct.sources.obs import normal, store_type
from scviaduct.sources.somacounts import read_counts
from scviaduct.sources.source import MAX_VAR_COLUMNS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from scviaduct.sources.counts import GeneTarget, Rows
    from scviaduct.values import IntArray, LongArray

JOINID = "soma_joinid"
_FEATURE_IDS = ("feature_id", "var_id", "gene_id")


class SomaMatrix:
    """A layer of X, by the positions of its genes in var.

    Parameters
    ----------
    x
        Open ``SparseNDArray``.
    gene_at
        int32; position of a gene by its joinid, -1 for a joinid that var lacks.
    where
        Layer and experiment, for messages.
    """

    def __init__(self, x: Any, gene_at: IntArray, where: str) -> None:
        self._x, self._gene_at, self._where = x, gene_at, where

    def read(self, rows: LongArray, target: GeneTarget) -> Iterator[Rows]:
        """Selected rows in order, a few tiles at a time."""
        return read_counts(self._x, rows, self._gene_at, target, self._where)


class SomaVars:
    """Identifiers of the genes, in the order of their joinids, held in memory.

    Parameters
    ----------
    var
        Open var.
    where
        Experiment, for messages.
    """

    def __init__(self, var: Any, where: str) -> None:
        schema = var.schema
        texts = [name for name in schema.names if name != JOINID and store_type(schema.field(name).type) == "string"]
        self.index = next((name for name in _FEATURE_IDS if name in texts), JOINID)
        wanted = [JOINID, *texts[:MAX_VAR_COLUMNS]]
        if self.index != JOINID and self.index not in wanted:
            wanted.append(self.index)
        table = var.read(column_names=wanted).concat().sort_by(JOINID)
        self.joinids: LongArray = table[JOINID].to_numpy()
        self.columns = tuple(name for name in wanted if name not in (JOINID, self.index, "index"))
        self._held = {
            name: normal(table[name], name, f"var of {where}").cast(pa.string()) for name in (self.index, *self.columns)
        }

    def __len__(self) -> int:
        return len(self.joinids)

    def is_text(self, name: str) -> bool:
        """Whether a column is one of identifiers."""
        return name in self._held

    def read(self, name: str, start: int, stop: int) -> pa.Array:
        """Rows ``[start, stop)`` of a column or of the index."""
        return self._held[name].slice(start, stop - start)


def open_measurement(
    measurement: Any, name: str, modality: str, layer: str, why: str, source: str
) -> tuple[Part, LongArray]:
    """One measurement as a part of the features.

    Parameters
    ----------
    measurement
        Open ``Measurement``.
    name, modality
        What the experiment calls it, and what it is; ``""`` if its name does not say.
    layer, why
        Layer of ``X``, and why it was chosen.
    source
        Experiment and measurement, for messages.

    Returns
    -------
    tuple
        The part, and the joinid of each of its genes.

    Raises
    ------
    SourceError
        If the layer is dense.
    """
    x, var = measurement.X[layer], SomaVars(measurement.var, source)
    if not isinstance(x, tiledbsoma.SparseNDArray):
        raise SourceError(f"Layer '{layer}' of {source} is dense.", "Name a sparse layer: layer=NAME.")
    gene_at = np.full(int(var.joinids.max(initial=-1)) + 1, -1, np.int32)
    gene_at[var.joinids] = np.arange(len(var), dtype=np.int32)
    matrix = SomaMatrix(x, gene_at, f"X/{layer} of {source}")
    named = (modality,) * len(var) if modality else ()
    return Part(name, named, matrix, var, f"var of {source}", layer, why), var.joinids


def chosen(parameter: str, wanted: str | None, there: Sequence[str], preferred: Sequence[str], where: str) -> str:
    """What the user named, else what is preferred, else the only one.

    Raises
    ------
    SourceError
        If there is no such thing, or several and none is preferred.
    """
    for name in (wanted,) if wanted else preferred:
        if name in there:
            return name
    if wanted is None and len(there) == 1:
        return there[0]
    problem = f"has no {parameter} '{wanted}'" if wanted else f"has no {parameter} {' or '.join(preferred)}"
    raise SourceError(
        f"{where} {problem}.", f"Name one: {parameter}={there[0] if there else 'NAME'} of {', '.join(there) or 'none'}."
    )
