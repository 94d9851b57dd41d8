"""Which cells of a segment a condition selects, and which lists it need not look at.

The counts of a column's values per list say it without looking at a cell where the condition is on such a column alone:
the condition is evaluated on the values. Conditions that ``and`` joins are evaluated one by one, the others on rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from scviaduct.store.index.rows import codes_of, count_key, values_of
from scviaduct.store.where import parse_where

if TYPE_CHECKING:
    import numpy.typing as npt
    import pyarrow.compute as pc

    from scviaduct.store.index.segments import Segment
    from scviaduct.values import LongArray

    Mask = npt.NDArray[np.bool_]
    Term = tuple[pc.Expression, tuple[str, ...]]


def selected(segment: Segment, where: str) -> LongArray:
    """Vectors of a segment whose cells fulfil a condition, int64, ascending.

    Parameters
    ----------
    segment
        Where to look.
    where
        The condition.

    Raises
    ------
    FilterError
        If it does not parse.
    """
    terms = parse_where(where, segment.table.schema).terms
    most = at_most(segment, terms)
    begins, sizes = segment.offsets[:-1][most > 0], segment.sizes[most > 0]
    total = int(sizes.sum())
    if total == len(segment.members):
        elements = np.arange(total)
    else:
        elements = np.arange(total) + np.repeat(begins - np.concatenate([[0], np.cumsum(sizes)[:-1]]), sizes)
    for term in terms:
        elements = elements[_holds(segment.table, term, elements)]
    return elements if segment.whole else elements[segment.positions(elements) >= 0]


def at_most(segment: Segment, terms: tuple[Term, ...]) -> LongArray:
    """Cells of each list that conditions can select together, at most; int64, shape ``(lists,)``.

    It is what they do select where there is one condition, on a counted column, and the segment is not masked.
    """
    most = segment.sizes
    for term in terms:
        counts = _counted(segment, term)
        if counts is not None:
            most = np.minimum(most, counts)
    return most


def _counted(segment: Segment, term: Term) -> LongArray | None:
    """Cells of each list for which a condition on one counted column holds; None for another one."""
    columns = term[1]
    values = values_of(segment.table[columns[0]]) if len(columns) == 1 else None
    if values is None:
        return None
    held = np.flatnonzero(_of_values(segment.table.schema.field(columns[0]), values, term))
    keys = segment.counts["key"].to_numpy()
    wanted = count_key(segment.table.schema.get_field_index(columns[0]), held)
    begins, ends = np.searchsorted(keys, wanted), np.searchsorted(keys, wanted, side="right")
    at = np.concatenate([np.arange(begin, end) for begin, end in zip(begins, ends, strict=True)] or [np.zeros(0, int)])
    lists, counts = segment.counts["list"].to_numpy()[at], segment.counts["count"].to_numpy()[at]
    return np.bincount(lists, counts, minlength=len(segment.sizes)).astype(np.int64)


def _of_values(field: pa.Field, values: pa.Array, term: Term) -> Mask:
    """For which values of a column, and for null behind them, a condition holds."""
    every = pa.concat_arrays([values, pa.nulls(1, values.type)])
    return _evaluate(pa.table({field.name: every}), term[0])


def _holds(table: pa.Table, term: Term, elements: LongArray) -> Mask:
    """For which of some rows a condition holds."""
    expression, columns = term
    rows = table.select(list(columns))
    if len(elements) < len(table):
        rows = rows.take(pa.array(elements)).combine_chunks()
    values = values_of(rows[columns[0]]) if len(columns) == 1 else None
    if values is None:
        return _evaluate(rows, expression)
    return _of_values(table.schema.field(columns[0]), values, term)[codes_of(rows[columns[0]], values)]


def _evaluate(rows: pa.Table, expression: pc.Expression) -> Mask:
    mask = np.zeros(len(rows), bool)
    marked = rows.append_column("#", pa.array(np.arange(len(rows))))
    mask[marked.filter(expression)["#"].to_numpy()] = True
    return mask
