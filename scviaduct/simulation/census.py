"""Writing simulated cells as a local SOMA collection of the Census schema.

It holds what a Census holds of its cells, genes and datasets, but for ``X/normalized`` and the columns that a
simulation has nothing to say about. ``cellxgene_census.open_soma(uri=...)`` opens it.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import tiledbsoma

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from scipy import sparse

    from scviaduct.simulation.cells import Simulation

ORGANISM = "homo_sapiens"
_PLAIN = {"observation_joinid": pa.large_string(), "is_primary_data": pa.bool_(), "raw_sum": pa.float32()}
_PLAIN |= {"nnz": pa.int64(), "soma_joinid": pa.int64()}
_TILE = 2048  # as in the Census


def write_census(simulation: Simulation, path: Path, advance: Callable[[int], None] | None = None) -> Path:
    """Write a simulation as a Census-like collection, block by block.

    Parameters
    ----------
    simulation
        What to write.
    path
        Folder of the collection; what is there is replaced, and only when the new one is complete.
    advance
        Called with the number of cells after each block.

    Returns
    -------
    Path
        ``path``.
    """
    temporary = path.with_name(f".{path.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    columns = next(simulation.blocks(0))[1].columns
    _create(simulation, temporary, [*columns, "raw_sum", "nnz"])
    seen = _write_cells(simulation, temporary, advance)
    _write_genes(simulation, temporary, seen)
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)
    return path


def _create(simulation: Simulation, path: Path, obs_columns: list[str]) -> None:
    """Lay out the collection, empty but for what it says of itself."""
    cells, genes = simulation.cells, simulation.genes
    with tiledbsoma.Collection.create(str(path)) as collection:
        info = collection.add_new_collection("census_info")
        total = str(cells)
        told = {"census_schema_version": "2.4.0", "census_build_date": "2026-01-01", "total_cell_count": total}
        _frame(info, "summary", pd.DataFrame({"label": list(told), "value": list(told.values())}))
        _frame(info, "datasets", _datasets(simulation))
        organism = {
            "organism": ORGANISM,
            "organism_label": "Homo sapiens",
            "organism_ontology_term_id": "NCBITaxon:9606",
        }
        _frame(info, "organisms", pd.DataFrame([organism]))
        data = collection.add_new_collection("census_data")
        experiment = data.add_new_collection(ORGANISM, tiledbsoma.Experiment)
        schema = pa.schema([("soma_joinid", pa.int64()), *((name, _type(name)) for name in obs_columns)])
        domain = [(0, cells - 1)]
        experiment.add_new_dataframe("obs", schema=schema, index_column_names=["soma_joinid"], domain=domain)
        measurement = experiment.add_new_collection("ms").add_new_collection("RNA", tiledbsoma.Measurement)
        layers = measurement.add_new_collection("X")
        tiles = {name: {"tile": _TILE} for name in ("soma_dim_0", "soma_dim_1")}
        layers.add_new_sparse_ndarray(
            "raw", type=pa.float32(), shape=(cells, genes), platform_config={"tiledb": {"create": {"dims": tiles}}}
        )
        measurement.add_new_sparse_ndarray(
            "feature_dataset_presence_matrix", type=pa.bool_(), shape=(len(simulation.datasets), genes)
        )


def _type(name: str) -> pa.DataType:
    return _PLAIN.get(name, pa.dictionary(pa.int32(), pa.large_string()))


def _datasets(simulation: Simulation) -> pd.DataFrame:
    rows = [
        {
            "collection_name": "Simulated cells",
            "dataset_id": dataset.id,
            "dataset_version_id": dataset.id,
            "dataset_title": dataset.title,
            "dataset_total_cell_count": dataset.cells,
        }
        for dataset in simulation.datasets
    ]
    return pd.DataFrame(rows)


def _frame(parent: Any, name: str, values: pd.DataFrame) -> None:
    """Write a small data frame without categories."""
    table = _table(values, 0)
    frame = parent.add_new_dataframe(
        name, schema=table.schema, index_column_names=["soma_joinid"], domain=[(0, len(values) - 1)]
    )
    frame.write(table)


def _table(values: pd.DataFrame, first: int) -> pa.Table:
    """The values with ``soma_joinid`` counted from ``first``, text as large strings."""
    numbered = values.assign(soma_joinid=np.arange(first, first + len(values), dtype=np.int64))
    table = pa.Table.from_pandas(numbered, preserve_index=False)
    fields = [
        pa.field(field.name, pa.large_string() if pa.types.is_string(field.type) else field.type)
        for field in table.schema
    ]
    return table.cast(pa.schema(fields))


def _write_cells(
    simulation: Simulation, path: Path, advance: Callable[[int], None] | None
) -> list[np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Write obs and counts; the number of cells of each dataset in which each gene was seen."""
    # Opened anew: what is written through the handle that created a frame leaves its enumerations empty (tiledbsoma
    # 2.3), and filters on them then select nothing, without an error.
    root = path / "census_data" / ORGANISM
    sorted_already = tiledbsoma.TileDBWriteOptions(sort_coords=False)
    first = 0
    seen = []
    for number in range(len(simulation.datasets)):
        found = np.zeros(simulation.genes, np.int64)
        for counts, obs in simulation.blocks(number):
            found += counts.getnnz(axis=0)
            told = obs.assign(raw_sum=np.asarray(counts.sum(1), np.float32).ravel(), nnz=counts.getnnz(axis=1))
            plain = _table(told, first)
            schema = pa.schema([(name, _type(name)) for name in plain.column_names])
            with tiledbsoma.DataFrame.open(str(root / "obs"), "w") as frame:
                frame.write(pa.table([_encoded(plain[field.name], field.type) for field in schema], schema=schema))
            with tiledbsoma.SparseNDArray.open(str(root / "ms" / "RNA" / "X" / "raw"), "w") as array:
                array.write(_coordinates(counts, first), platform_config=sorted_already)
            first += len(obs)
            if advance is not None:
                advance(len(obs))
        seen.append(found)
    return seen


def _encoded(column: pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
    values = column.combine_chunks()
    return values.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else values.cast(kind)


def _coordinates(counts: sparse.csr_matrix, first: int) -> pa.Table:
    """Counts as coordinates in TileDB's global order, tile by tile: left to itself it takes five times as long."""
    matrix = counts.tocoo()
    rows, columns = matrix.row.astype(np.int64) + first, matrix.col.astype(np.int64)
    order = np.lexsort((columns, rows, columns // _TILE, rows // _TILE))
    return pa.table({"soma_dim_0": rows[order], "soma_dim_1": columns[order], "soma_data": matrix.data[order]})


def _write_genes(simulation: Simulation, path: Path, seen: list[np.ndarray[tuple[int], np.dtype[np.int64]]]) -> None:
    with tiledbsoma.open(str(path / "census_data" / ORGANISM / "ms" / "RNA"), "w") as measurement:
        told = simulation.var().assign(
            feature_type="protein_coding",
            feature_length=np.int64(0),
            nnz=np.sum(seen, axis=0),
            n_measured_obs=np.int64(simulation.cells),
        )
        _frame(measurement, "var", told)
        datasets, genes = np.divmod(np.arange(len(seen) * simulation.genes), simulation.genes)
        present = np.ones(len(genes), bool)
        coordinates = {"soma_dim_0": datasets, "soma_dim_1": genes, "soma_data": present}
        measurement["feature_dataset_presence_matrix"].write(pa.table(coordinates))
