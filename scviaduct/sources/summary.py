"""What a scan says of obs columns, gathered batch by batch and file by file."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pyarrow.compute as pc

from scviaduct.sources.obs import as_text, store_type
from scviaduct.values import ColumnSummary, Scan

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import pyarrow as pa


class Summariser:
    """Counts the values of one column; real numbers are not counted."""

    def __init__(self) -> None:
        self._type = ""
        self._counts: Counter[str] = Counter()
        self._nulls = 0
        self._truncated = False

    def add(self, values: pa.Array) -> None:
        """Take the next batch, in a store type."""
        self._type = store_type(values.type) or self._type
        self._nulls += values.null_count
        if self._type != "double":
            counted = pc.value_counts(values.drop_null())
            texts = as_text(counted.field("values")).to_pylist()
            self._truncated |= _add(self._counts, zip(texts, counted.field("counts").to_pylist(), strict=True))

    def summary(self) -> ColumnSummary:
        """What was seen so far."""
        # An integer column of many values is a measurement or an identifier: a part of its values would mislead.
        counts = {} if self._type == "int64" and self._truncated else dict(self._counts)
        return ColumnSummary(self._type, counts, self._nulls, self._truncated)


def _add(counts: Counter[str], more: Iterable[tuple[str, int]]) -> bool:
    """Count values, the first ``MAX_CATEGORIES`` of them; True if some were left out."""
    truncated = False
    for value, count in more:
        if value in counts or len(counts) < ColumnSummary.MAX_CATEGORIES:
            counts[value] += count
        else:
            truncated = True
    return truncated


def merge_columns(parts: Sequence[ColumnSummary]) -> ColumnSummary:
    """One summary of a column over several files; integers with reals are ``double``, other mixtures ``string``."""
    types = {part.type for part in parts if part.type}
    nulls = sum(part.nulls for part in parts)
    if types == {"int64", "double"}:
        return ColumnSummary("double", {}, nulls)
    counts: Counter[str] = Counter()
    truncated = any(part.truncated for part in parts)
    for part in parts:
        truncated |= _add(counts, part.counts.items())
    kind = "" if not types else types.pop() if len(types) == 1 else "string"
    return ColumnSummary(kind, dict(counts), nulls, truncated)


def merge_scans(scans: Sequence[Scan]) -> Scan:
    """One scan over several files, in their order."""
    names = dict.fromkeys(name for scan in scans for name in scan.columns)
    missing: dict[str, str] = {}
    for scan in scans:
        missing = {**scan.missing, **missing}
    return Scan(
        shards=tuple(shard for scan in scans for shard in scan.shards),
        cells=sum(scan.cells for scan in scans),
        duplicates_skipped=sum(scan.duplicates_skipped for scan in scans),
        empty=tuple(place for scan in scans for place in scan.empty),
        columns={name: merge_columns([scan.columns[name] for scan in scans if name in scan.columns]) for name in names},
        missing=missing,
        groups=tuple(counts for scan in scans for counts in scan.groups),
    )
