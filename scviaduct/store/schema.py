"""The columns of the two tables, and the rows of a unit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from scviaduct.errors import InputError
from scviaduct.sources.obs import as_text

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Mapping as MappingType

    from scviaduct.values import CellBlock, Mapping, Settings, Unit

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


def _constant(value: str, n: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), pa.array([value])).cast(pa.string())


def unit_rows(
    unit: Unit, block: CellBlock, mapping: Mapping, settings: Settings, reference: str, run: str
) -> tuple[pa.Table, pa.Table]:
    """Rows of a unit for ``latents`` and for ``cells``, in the block's order."""
    n, shard = block.n_cells, block.shard
    key = [
        _constant(shard.source, n),
        _constant(shard.dataset_id, n),
        block.obs["observation_id"].combine_chunks().cast(pa.string()),
    ]
    origin = [_constant(unit.id, n), pa.array(np.arange(n, dtype=np.int32)), _constant(run, n)]
    unlabelled = mapping.label < 0
    codes = pa.array(mapping.label, mask=unlabelled)
    label = pa.DictionaryArray.from_arrays(codes, pa.array(mapping.labels or ("",), pa.string())).cast(pa.string())
    figures = [pa.array(values, mask=unlabelled) for values in (mapping.probability, mapping.margin, mapping.entropy)]
    ambiguous = pa.array(mapping.entropy > settings.ambiguous_entropy, mask=unlabelled)
    said = [label, *figures, ambiguous, _constant(reference, n), _adapters(mapping)]
    latents = pa.table([*key, _lists(mapping), *said, *origin], schema=LATENTS)
    # By the namespace, not by where the shard was read: rows of a landing are those of what was landed.
    joinids = pa.array(block.rows) if shard.source.startswith(("census:", "soma:")) else pa.nulls(n, pa.int64())
    schema = cells_schema(settings.keep_obs)
    kept = [
        as_text(block.obs[name]) if kind == "string" else block.obs[name].cast(TYPES[kind])
        for name, kind in settings.keep_obs.items()
    ]
    cells = pa.table([*key, pa.array(block.rows), joinids, *kept, *origin], schema=schema)
    return latents, cells


def _adapters(mapping: Mapping) -> pa.Array:
    """Name of each cell's adapter; null for none."""
    if mapping.adapter is None:
        return pa.nulls(len(mapping.label), pa.string())
    codes = pa.array(mapping.adapter, pa.int32(), mask=mapping.adapter < 0)
    return pa.DictionaryArray.from_arrays(codes, pa.array(mapping.adapters or ("",), pa.string())).cast(pa.string())


def _lists(mapping: Mapping) -> pa.Array:
    """Latents as lists; null where a cell was not mapped."""
    dimensions = mapping.latent.shape[1]
    lengths = np.where(mapping.mapped, dimensions, 0)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    values = pa.array(np.ascontiguousarray(mapping.latent[mapping.mapped], np.float32).reshape(-1))
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=pa.array(~mapping.mapped))
