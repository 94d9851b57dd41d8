"""The same cells as h5ad and zarr, and what reading their arrays alone takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Once = Callable[[], dict[str, Any]]

ARRAYS = ("data", "indices", "indptr")


def write_files(folder: Path, collection: Path, cells: int) -> dict[str, Path]:
    """The first cells of a collection as h5ad (plain and gzip) and as zarr 3, written if they are not there.

    Returns
    -------
    dict
        Name of the format to the file.
    """
    stem = f"{collection.name}-first-{cells}"
    paths = {
        "h5ad, uncompressed": folder / f"{stem}.h5ad",
        "h5ad, gzip": folder / f"{stem}-gzip.h5ad",
        "zarr 3": folder / f"{stem}.zarr",
    }
    if not all(path.exists() for path in paths.values()):
        data = cells_of(collection, cells)
        data.write_h5ad(paths["h5ad, uncompressed"])
        data.write_h5ad(paths["h5ad, gzip"], compression="gzip")
        _write_zarr(data, paths["zarr 3"])
    return paths


def cells_of(collection: Path, cells: int) -> Any:
    """AnnData of the first cells, names and counts alone."""
    import anndata
    import pandas as pd
    from scipy import sparse

    from benchmarks.data import source_of
    from scviaduct.sources import open_source

    with open_source(source_of(collection, cells)) as source:
        blocks = [source.read(shard) for shard in source.scan(16_384).shards]
        names = source.genes().columns["index"]
    parts = [sparse.csr_matrix((b.data, b.indices, b.indptr), (b.n_cells, b.n_genes)) for b in blocks]
    ids = [name for block in blocks for name in block.obs["observation_id"].to_pylist()]
    counts = sparse.csr_matrix(sparse.vstack(parts))
    return anndata.AnnData(counts, pd.DataFrame(index=ids), pd.DataFrame(index=list(names)))


def _write_zarr(data: Any, path: Path) -> None:
    import zarr
    from anndata.io import write_elem

    write_elem(zarr.open_group(str(path), mode="w", zarr_format=3), "/", data)


def bare_h5(path: str) -> Once:
    """The three arrays of X by h5py."""
    import h5py

    def once() -> dict[str, Any]:
        with h5py.File(path) as file:
            arrays = [file["X"][name][:] for name in ARRAYS]
        return {"cells": len(arrays[2]) - 1, "nonzeros": len(arrays[0])}

    return once


def bare_zarr(path: str) -> Once:
    """The three arrays of X by zarr-python."""
    import zarr

    def once() -> dict[str, Any]:
        group = zarr.open_group(path, mode="r")["X"]
        arrays = [group[name][:] for name in ARRAYS]
        return {"cells": len(arrays[2]) - 1, "nonzeros": len(arrays[0])}

    return once
