"""Cells to read: a local SOMA collection of the Census schema, as large as one likes, written tile by tile.

``X/raw`` has a Census's layout: tiles of 2048 x 2048, zstd with a byte shuffle before it where a Census has one, 65,536
cells a data tile. Genes are detected as unevenly as real ones, and counts are small. There is no biology in it:
decoding costs what the layout and the number of non-zeros cost. Everything follows from the seed; a collection that is
there is taken as it is.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import tiledbsoma
from scipy import sparse

from scviaduct.values import digest

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

ORGANISM = "homo_sapiens"
TILE = 2048
DATASETS, TYPES, DONORS = 4, 20, 40
_LAYOUT = 1
"""Part of a collection's address, so that a change of this module writes anew."""
_POOL = 8
"""Blocks of tiles that are drawn; larger collections repeat them, which no reader can tell: a block is 80 MB."""
_SHUFFLED = ["ByteShuffleFilter", {"_type": "ZstdFilter", "level": 5}]
_X = {
    "capacity": 1 << 16,
    "dims": {
        "soma_dim_0": {"tile": TILE, "filters": [{"_type": "ZstdFilter", "level": 5}]},
        "soma_dim_1": {"tile": TILE, "filters": _SHUFFLED},
    },
    "attrs": {"soma_data": {"filters": _SHUFFLED}},
    "cell_order": "row-major",
    "tile_order": "row-major",
    "allows_duplicates": True,
}
_TEXT = pa.dictionary(pa.int32(), pa.large_string())
_OBS = {
    "dataset_id": _TEXT,
    "assay": _TEXT,
    "cell_type": _TEXT,
    "disease": _TEXT,
    "donor_id": _TEXT,
    "tissue": _TEXT,
    "tissue_general": _TEXT,
    "is_primary_data": pa.bool_(),
    "observation_joinid": pa.large_string(),
}


@dataclass(frozen=True, slots=True)
class Design:
    """What is written.

    Attributes
    ----------
    cells, genes
        Size.
    nonzeros
        Of a cell, on average.
    seed
        Of everything.
    """

    cells: int
    genes: int = 20_000
    nonzeros: float = 1_700.0
    seed: int = 0

    def rates(self) -> npt.NDArray[np.float32]:
        """float32, shape ``(genes,)``; share of the cells in which each gene is seen, most of them in few."""
        spread = np.random.default_rng([self.seed, 0]).lognormal(0, 1.5, self.genes)
        low, high = 0.0, 1e3
        for _ in range(60):  # the share of a gene is at most .95, so the scale has no closed form
            middle = (low + high) / 2
            low, high = (middle, high) if np.minimum(middle * spread, 0.95).sum() < self.nonzeros else (low, middle)
        return np.minimum(low * spread, 0.95).astype(np.float32)

    def gene_ids(self) -> list[str]:
        """Ensembl-like names."""
        return [f"ENSG9{number:010d}" for number in range(self.genes)]


def census(folder: Path, design: Design) -> Path:
    """The collection of a design, written if it is not there.

    Parameters
    ----------
    folder
        Scratch; collections are kept there.
    design
        What it holds.
    """
    path = folder / f"census-{design.cells}x{design.genes}-{digest(_LAYOUT, asdict(design))[:8]}"
    if path.exists():
        return path
    print(f"writing {path.name}", flush=True)
    temporary = path.with_name(f".{path.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    _create(design, temporary)
    root = temporary / "census_data" / ORGANISM
    _write_obs(design, str(root / "obs"))
    _write_counts(design, str(root / "ms" / "RNA" / "X" / "raw"))
    temporary.rename(path)
    return path


def source_of(collection: Path | str, cells: int | None = None) -> str:
    """URI of a collection, or of its first cells."""
    uri = f"census:benchmark?organism={ORGANISM}&uri={collection}"
    return uri if cells is None else f"{uri}&filter=soma_joinid < {cells}"


def _create(design: Design, path: Path) -> None:
    """Everything but obs and counts."""
    with tiledbsoma.Collection.create(str(path)) as collection:
        info = collection.add_new_collection("census_info")
        told = {"census_schema_version": "2.4.0", "census_build_date": "2026-01-01"}
        _frame(info, "summary", {"label": list(told), "value": list(told.values())})
        names = [f"dataset {number}" for number in range(DATASETS)]
        _frame(info, "datasets", {"dataset_id": names, "dataset_title": names})
        _frame(info, "organisms", {"organism": [ORGANISM], "organism_label": ["Homo sapiens"]})
        experiment = collection.add_new_collection("census_data").add_new_collection(ORGANISM, tiledbsoma.Experiment)
        schema = pa.schema([("soma_joinid", pa.int64()), *_OBS.items()])
        domain = [(0, design.cells - 1)]
        experiment.add_new_dataframe("obs", schema=schema, index_column_names=["soma_joinid"], domain=domain)
        measurement = experiment.add_new_collection("ms").add_new_collection("RNA", tiledbsoma.Measurement)
        genes = design.gene_ids()
        _frame(measurement, "var", {"feature_id": genes, "feature_name": [f"G{name[5:]}" for name in genes]})
        shape = (design.cells, design.genes)
        layout = {"tiledb": {"create": _X}}
        layers = measurement.add_new_collection("X")
        layers.add_new_sparse_ndarray("raw", type=pa.float32(), shape=shape, platform_config=layout)
        presence = (DATASETS, design.genes)
        measurement.add_new_sparse_ndarray("feature_dataset_presence_matrix", type=pa.bool_(), shape=presence)


def _frame(parent: Any, name: str, columns: dict[str, list[str]]) -> None:
    table = pa.table({key: pa.array(values, pa.large_string()) for key, values in columns.items()})
    table = table.append_column("soma_joinid", pa.array(np.arange(len(table))))
    domain = [(0, len(table) - 1)]
    parent.add_new_dataframe(name, schema=table.schema, index_column_names=["soma_joinid"], domain=domain).write(table)


def _write_obs(design: Design, uri: str) -> None:
    """Opened anew: a frame written through the handle that created it keeps no enumerations (tiledbsoma 2.3)."""
    step = 64 * TILE
    for first in range(0, design.cells, step):
        rows = np.arange(first, min(first + step, design.cells))
        random = np.random.default_rng([design.seed, 1, first])
        dataset = rows * DATASETS // design.cells
        coded = {
            "dataset_id": ("dataset", DATASETS, dataset),
            "assay": ("assay", 4, dataset % 4),
            "cell_type": ("type", TYPES, random.integers(TYPES, size=len(rows))),
            "disease": ("disease", 3, dataset % 3),
            "donor_id": ("donor", DONORS, random.integers(DONORS, size=len(rows))),
            "tissue": ("tissue", 5, dataset % 5),
            "tissue_general": ("tissue", 5, dataset % 5),
        }
        columns: dict[str, Any] = {"soma_joinid": rows}
        for name, (word, n, codes) in coded.items():
            values = pa.array([f"{word} {number}" for number in range(n)], pa.large_string())
            columns[name] = pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32)), values)
        columns["is_primary_data"] = pa.array(np.ones(len(rows), bool))
        columns["observation_joinid"] = pa.array([f"c{row:09x}" for row in rows.tolist()], pa.large_string())
        with tiledbsoma.DataFrame.open(uri, "w") as frame:
            frame.write(pa.table(columns))


def _write_counts(design: Design, uri: str) -> None:
    """Four blocks of tiles at a time, in TileDB's global order, so that nothing is sorted."""
    pool = min(_POOL, -(-design.cells // TILE))
    blocks = [block(design, number) for number in range(pool)]
    sorted_already = tiledbsoma.TileDBWriteOptions(sort_coords=False)
    starts = range(0, design.cells, TILE)
    for group in range(0, len(starts), 4):
        tables = []
        for start in starts[group : group + 4]:
            rows, genes, counts = blocks[start // TILE % pool]
            if design.cells - start < TILE:
                kept = rows < design.cells - start
                rows, genes, counts = rows[kept], genes[kept], counts[kept]
            at = rows.astype(np.int64) + start
            tables.append(pa.table({"soma_dim_0": at, "soma_dim_1": genes.astype(np.int64), "soma_data": counts}))
        with tiledbsoma.SparseNDArray.open(uri, "w") as array:
            array.write(pa.concat_tables(tables).combine_chunks(), platform_config=sorted_already)


def block(design: Design, number: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Rows, genes and counts of 2048 cells, tile by tile, each in row-major order."""
    random = np.random.default_rng([design.seed, 2, number])
    rates = design.rates()
    size = random.lognormal(0, 0.4, TILE).astype(np.float32)
    size /= size.mean()
    rows, genes = [], []
    for first in range(0, design.genes, TILE):
        share = np.minimum(size[:, None] * rates[first : first + TILE], 0.98)
        row, gene = np.nonzero(random.random(share.shape, np.float32) < share)
        rows.append(row.astype(np.int32))
        genes.append((gene + first).astype(np.int32))
    at_row, at_gene = np.concatenate(rows), np.concatenate(genes)
    # Two thirds of the counts are ones, as in 10x data of a few thousand counts a cell.
    counts = random.geometric(0.66, len(at_row)).astype(np.float32)
    return at_row, at_gene, counts


def csr(design: Design) -> sparse.csr_matrix:
    """Counts of a design in memory, float32 of shape ``(cells, genes)``; for designs that fit."""
    parts = []
    for number in range(-(-design.cells // TILE)):
        rows, genes, counts = block(design, number)
        parts.append(sparse.coo_matrix((counts, (rows, genes)), shape=(TILE, design.genes)).tocsr())
    made = sparse.csr_matrix(sparse.vstack(parts)[: design.cells])
    made.sort_indices()
    return made
