"""The columns of the two tables, and the rows of a unit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from scviaduct.errors import InputError
from scviaduct.sources.obs import as_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from collections.abc import Mapping as MappingType

    from scviaduct.values import CellBlock, FloatArray, IntArray, Mapping, Settings, Unit

KEY = [("source", pa.string()), ("dataset_id", pa.string()), ("observation_id", pa.string())]
ORIGIN = [("unit", pa.string()), ("unit_row", pa.int32()), ("run", pa.string())]
LATENTS = pa.schema(
    [
        *KEY,
        ("latent", pa.list_(pa.float32())),
        ("label", pa.string()),
        ("probability", pa.float32()),
        ("margin", pa.float32()),
        ("entropy", pa.float32()),
        ("ambiguous", pa.bool_()),
        ("reference", pa.string()),
        ("adapter", pa.string()),
        *ORIGIN,
    ]
)
LATENT_COLUMNS = ("latent", "label", "probability", "margin", "entropy", "ambiguous", "reference", "adapter")
CELLS = pa.schema([*KEY, ("source_row", pa.int64()), ("soma_joinid", pa.int64())])
RESERVED = frozenset({*LATENTS.names, *CELLS.names})
TYPES = {"string": pa.string(), "bool": pa.bool_(), "int64": pa.int64(), "double": pa.float64()}


def cells_schema(kept: MappingType[str, str]) -> pa.Schema:
    """Schema of the ``cells`` table with these kept obs columns."""
    taken = {name.lower(): name for name in RESERVED}
    for name in kept:
        other = taken.setdefault(name.lower(), name)
        if other != name or name in RESERVED:
            raise InputError(
                f"obs column '{name}' cannot be kept: there is a column '{other}', and Delta Lake tells no case apart.",
                f"Rename it in the source, or leave it out; the store's own: {', '.join(sorted(RESERVED))}.",
            )
    return pa.schema([*CELLS, *((name, TYPES[kind]) for name, kind in kept.items()), *ORIGIN])


def new_columns(there: pa.Schema, kept: MappingType[str, str], derived: Iterable[str] = ()) -> list[pa.Field]:
    """Kept columns that a ``cells`` table lacks.

    Parameters
    ----------
    there
        Schema of the table.
    kept
        Kept obs column to its type.
    derived
        Columns of the space's derived sets.

    Raises
    ------
    InputError
        If the table has a column of that name and another type, or of that name in other letters, or a derived set has
        one of that name.
    """
    remedy = "Rename the column in the source, or leave it out of --keep-obs."
    wanted, known = cells_schema(kept), {name.lower(): name for name in there.names}
    taken = {name.lower(): name for name in derived}
    new = []
    for name in kept:
        if set_column := taken.get(name.lower()):
            raise InputError(f"obs column '{name}' is called as the column '{set_column}' of a derived set.", remedy)
        other = known.get(name.lower())
        if other is None:
            new.append(wanted.field(name))
        elif other != name:
            problem = f"obs column '{name}' is '{other}' in the store, and Delta Lake tells no case apart."
            raise InputError(problem, remedy)
        elif there.field(name).type != wanted.field(name).type:
            raise InputError(
                f"obs column '{name}' is {kept[name]} here and {there.field(name).type} in the store.", remedy
            )
    return new


def _coded(codes: pa.Array, words: Sequence[str]) -> pa.Array:
    """Text as categories."""
    return pa.DictionaryArray.from_arrays(codes, pa.array(words, pa.string()))


def _constant(value: str, n: int) -> pa.Array:
    return _coded(pa.array(np.zeros(n, np.int8)), [value])


def unit_rows(
    unit: Unit, block: CellBlock, mapping: Mapping, settings: Settings, reference: str, run: str
) -> tuple[pa.Table, pa.Table]:
    """Rows of a unit for ``latents`` and for ``cells``, in the block's order.

    Text that repeats is categories, which a file has as plain strings: parquet would find them again by a hash of every
    cell's string, 0.2 us a cell of the 1.3 that both files take.
    """
    n, shard = block.n_cells, block.shard
    key = [
        _constant(shard.source, n),
        _constant(shard.dataset_id, n),
        block.obs["observation_id"].combine_chunks().cast(pa.string()),
    ]
    origin = [_constant(unit.id, n), pa.array(np.arange(n, dtype=np.int32)), _constant(run, n)]
    unlabelled = mapping.label < 0
    label = _coded(pa.array(mapping.label, mask=unlabelled), mapping.labels or ("",))
    figures = [pa.array(values, mask=unlabelled) for values in (mapping.probability, mapping.margin, mapping.entropy)]
    ambiguous = pa.array(mapping.entropy > settings.ambiguous_entropy, mask=unlabelled)
    said = [label, *figures, ambiguous, _constant(reference, n), _adapters(mapping)]
    latents = _table([*key, _lists(mapping), *said, *origin], LATENTS)
    # By the namespace, not by where the shard was read: rows of a landing are those of what was landed.
    joinids = pa.array(block.rows) if shard.source.startswith(("census:", "soma:")) else pa.nulls(n, pa.int64())
    kept = [
        _text(block.obs[name]) if kind == "string" else block.obs[name].cast(TYPES[kind])
        for name, kind in settings.keep_obs.items()
    ]
    cells = _table([*key, pa.array(block.rows), joinids, *kept, *origin], cells_schema(settings.keep_obs))
    return latents, cells


def _table(columns: Sequence[pa.Array | pa.ChunkedArray], schema: pa.Schema) -> pa.Table:
    """A table of these columns, in which categories stand for strings."""
    fields = [
        field.with_type(column.type) if pa.types.is_dictionary(column.type) else field
        for field, column in zip(schema, columns, strict=True)
    ]
    return pa.table(columns, schema=pa.schema(fields))


def _text(column: pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """A kept column of text: its categories if they are strings, and plain strings otherwise."""
    kind = column.type
    return column if pa.types.is_dictionary(kind) and pa.types.is_string(kind.value_type) else as_text(column)


def _adapters(mapping: Mapping) -> pa.Array:
    """Name of each cell's adapter; null for none."""
    if mapping.adapter is None:
        return pa.nulls(len(mapping.label), pa.string())
    return _coded(pa.array(mapping.adapter, pa.int32(), mask=mapping.adapter < 0), mapping.adapters or ("",))


def _lists(mapping: Mapping) -> pa.Array:
    """Latents as lists; null where a cell was not mapped."""
    n_cells, dimensions = mapping.latent.shape
    if mapping.mapped.all():
        offsets: IntArray = np.arange(n_cells + 1, dtype=np.int32) * np.int32(dimensions)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(_flat(mapping.latent)))
    lengths = np.where(mapping.mapped, dimensions, 0)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    values = pa.array(_flat(mapping.latent[mapping.mapped]))
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=pa.array(~mapping.mapped))


def _flat(latent: FloatArray) -> FloatArray:
    return np.ascontiguousarray(latent, np.float32).reshape(-1)
