"""Gene tables of a landing, addressed by their content."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scviaduct.sources.unreadable import UnreadableError, reading
from scviaduct.store.files import write_parquet
from scviaduct.values import GeneTable, digest

if TYPE_CHECKING:
    from pathlib import Path

    from scviaduct.landing.folder import Landing
    from scviaduct.values import IntArray

_COLUMN, _MODALITY = "var/", "modality"
"""Columns of the file: identifiers under a prefix, so that none is taken for the modality."""


def address_of(table: GeneTable) -> str:
    """Digest of all identifiers, in order."""
    return digest(list(table.columns.items()), table.modality)


def keep_genes(landing: Landing, table: GeneTable) -> str:
    """Write a gene table unless it is there; its address."""
    address = address_of(table)
    file = landing.genes_file(address)
    if not file.exists():
        columns = {f"{_COLUMN}{name}": pa.array(values, pa.string()) for name, values in table.columns.items()}
        if table.modality:
            columns[_MODALITY] = pa.array(table.modality, pa.string())
        write_parquet(pa.table(columns), file)
    return address


def read_genes(file: Path, address: str) -> GeneTable:
    """Read a gene table back.

    Raises
    ------
    UnreadableError
        If the file is not there or is not of that address.
    """
    remedy = damaged(file, file.parents[1])
    try:
        with reading(str(file)):
            held = pq.read_table(file, partitioning=None)
    except UnreadableError as error:
        raise UnreadableError(error.problem, remedy) from error.__cause__
    columns = {
        name.removeprefix(_COLUMN): tuple(held[name].to_pylist()) for name in held.column_names if name != _MODALITY
    }
    modality = tuple(held[_MODALITY].to_pylist()) if _MODALITY in held.column_names else ()
    table = GeneTable(columns, modality)
    if address_of(table) != address:
        raise UnreadableError(f"{file} is not the gene table that was landed.", remedy)
    return table


def positions(of: GeneTable, among: GeneTable) -> IntArray:
    """Position of each gene of one table in another, -1 for one that it lacks; int32, shape ``(len(of),)``.

    Genes are told by their preferred identifier, which is unique in a Census.
    """
    name = next(iter(among.columns))
    known = {gene: number for number, gene in enumerate(among.columns[name]) if gene}
    return np.array([known.get(gene, -1) for gene in of.columns.get(name, ())], np.int32)


def damaged(what: Path, landing: Path) -> str:
    """The remedy for a file or a folder that is not what was written."""
    return f"Delete {what} and land again, which writes it anew: scviaduct land SOURCE --out {landing}."
