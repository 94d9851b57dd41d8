"""Exports: a version's cells, labels and latents in a file of another format, in the source's order."""

from __future__ import annotations

import secrets
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from anndata import AnnData

from scviaduct.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from scviaduct.store.space import Space

FORMATS = ("h5ad", "zarr", "parquet")
_NULLABLE = {pa.int64(): pd.Int64Dtype(), pa.bool_(): pd.BooleanDtype()}


def export(
    space: Space,
    to: str,
    out: Path,
    where: str | None = None,
    as_of: int | None = None,
    *,
    overwrite: bool = False,
    advance: Callable[[int], None] = lambda _: None,
) -> Path:
    """Write a version's cells to a file; it appears whole or not at all.

    Rows are in the order of source and row. parquet streams, in the memory of the units whose rows interleave at one
    place. An AnnData is built in memory: 4 bytes a latent dimension and cell, and its obs.

    Parameters
    ----------
    space
        What to export.
    to
        ``h5ad``, ``zarr`` or ``parquet``.
    out
        File or folder to write.
    where, as_of
        Condition and version.
    overwrite
        Replace what is there.
    advance
        Told of every few cells.

    Raises
    ------
    InputError
        If ``to`` is no format, or ``out`` is there and is not to be replaced, or is a folder that is not a zarr group,
        or cannot be written.
    StoreError
        If there is no such version, or a file of it cannot be read.
    """
    if to not in FORMATS:
        raise InputError(f"--to {to} is no format.", f"Formats: {', '.join(FORMATS)}.")
    temporary = out.with_name(f".{secrets.token_hex(4)}.{out.name}")
    try:
        _check_out(out, overwrite=overwrite)
        out.parent.mkdir(parents=True, exist_ok=True)
        if to == "parquet":
            _write_parquet(space, temporary, where, as_of, advance)
        else:
            data = _anndata(space, where, as_of, advance)
            data.write_h5ad(temporary) if to == "h5ad" else data.write_zarr(temporary)
        _put(temporary, out)
    except OSError as error:
        remedy = "Name a file in a folder that can be written and has room: --out FILE."
        raise InputError(f"'{out}' cannot be written ({error}).", remedy) from error
    finally:
        with suppress(OSError):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)
    return out


def _check_out(out: Path, *, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise InputError(f"'{out}' is there.", "Name another file, or --overwrite.")
    if out.is_dir() and not any((out / name).exists() for name in ("zarr.json", ".zgroup")):
        raise InputError(f"'{out}' is a folder, and not one of zarr.", "It is not overwritten: name another file.")


def _put(made: Path, out: Path) -> None:
    """Put what was made where something is, which is moved aside first if a rename would not replace it."""
    if not out.exists() or not (out.is_dir() or made.is_dir()):
        made.replace(out)
        return
    aside = made.with_name(f"{made.name}.old")
    out.rename(aside)
    try:
        made.replace(out)
    except OSError:
        aside.rename(out)
        raise
    shutil.rmtree(aside) if aside.is_dir() else aside.unlink()


def _write_parquet(
    space: Space, path: Path, where: str | None, as_of: int | None, advance: Callable[[int], None]
) -> None:
    snapshot = space.snapshot(as_of)
    schema = space.schema(snapshot)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for table in space.read_sorted(where, snapshot.version):
            writer.write_table(table)
            advance(len(table))


def _anndata(space: Space, where: str | None, as_of: int | None, advance: Callable[[int], None]) -> AnnData:
    """Cells as an AnnData without genes."""
    snapshot = space.snapshot(as_of)
    rest = [name for name in snapshot.names if name != "latent"]
    parts, latents = [], []
    for table in space.read(where=where, as_of=snapshot.version):
        latents.append(_matrix(table["latent"], space.n_latent))
        parts.append(table.select(rest))
        advance(len(table))
    schema = pa.schema([space.schema(snapshot).field(name) for name in rest])
    rows = pa.concat_tables(parts).unify_dictionaries() if parts else schema.empty_table()
    obs = rows.to_pandas(types_mapper=_NULLABLE.get)
    obs.index = pd.Index(obs.pop("observation_id").astype(str), name="observation_id")
    latent = np.concatenate(latents) if latents else np.empty((0, space.n_latent), np.float32)
    # Units of one source may interleave (datasets do), so the order of rows is made here.
    order = np.lexsort((obs["source_row"].to_numpy(np.int64), obs["source"].astype(str).to_numpy()))
    obs = _writable(obs.iloc[order])
    uns = {
        "scviaduct": {
            "reference": f"{space.reference}@{space.digest[:12]}",
            "version": snapshot.version,
            "run": snapshot.run,
        }
    }
    return AnnData(obs=obs, obsm={f"X_{space.reference}": latent[order]}, uns=uns)


def _writable(obs: pd.DataFrame) -> pd.DataFrame:
    """Columns as AnnData writes them: text as categories, integers and truths with gaps as nullable ones."""
    columns: dict[str, Any] = {}
    for name in obs.columns:
        values = obs[name]
        if name in ("soma_joinid", "adapter") and values.isna().all():
            continue  # files have none, and few mappings need adapters
        if isinstance(values.dtype, pd.CategoricalDtype):
            columns[name] = values.cat.remove_unused_categories()
        elif values.dtype == object:
            columns[name] = pd.Categorical(values)
        elif name in ("soma_joinid", "ambiguous") or values.isna().any():
            columns[name] = values
        else:
            columns[name] = values.to_numpy()
    return pd.DataFrame(columns, index=obs.index)


def _matrix(column: pa.ChunkedArray, dimensions: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Latents as a matrix; NaN rows for cells without one."""
    valid = column.is_valid().to_numpy()
    matrix = np.full((len(column), dimensions), np.nan, np.float32)
    matrix[valid] = column.combine_chunks().flatten().to_numpy().reshape(-1, dimensions)
    return matrix
