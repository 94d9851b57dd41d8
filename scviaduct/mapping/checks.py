"""The single checks of preflight, each a function from what was seen to findings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scviaduct.mapping.finding import Finding
from scviaduct.mapping.genechecks import genes
from scviaduct.mapping.mapper import query_batch_key, query_sample_key, some
from scviaduct.mapping.reading import gene_match as match_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from scviaduct.errors import DataError
    from scviaduct.references.package import Reference
    from scviaduct.values import CellBlock, ColumnSummary, Scan, Settings

NAMES = ("cells", "reading", "genes", "gene-ids", "counts", "empty-cells", "batch", "sample", "covariates", "labels")
"""What ``--accept`` takes."""

EMPTY_STOP_ABOVE = 0.5
"""Share of sampled cells without a count in the reference's genes above which the query does not fit."""

_FLAG = {"batch": "--batch-key", "sample": "--sample-key"}


def cells(scan: Scan) -> Finding:
    """Is there anything to map?"""
    figures = {"cells": scan.cells, "shards": len(scan.shards), "duplicates_skipped": scan.duplicates_skipped}
    notes = []
    if scan.duplicates_skipped:
        notes.append(f"{scan.duplicates_skipped:,} duplicates (is_primary_data is false) left out")
    if scan.empty:
        notes.append(f"{len(scan.empty)} empty ({scan.empty[0]}{', ...' if len(scan.empty) > 1 else ''})")
    told = f"; {'; '.join(notes)}" if notes else ""
    if not scan.cells:
        remedy = "Widen the filter, or add duplicates=keep to the source if every cell is a duplicate."
        return Finding(
            "cells", "unknown", f"The source selects no cell{told}.", remedy, overridable=False, figures=figures
        )
    shards = f"{len(scan.shards):,} shard{'s' * (len(scan.shards) != 1)}"
    return Finding("cells", "ok", f"{scan.cells:,} cells in {shards}{told}.", figures=figures)


def reading(errors: Sequence[DataError], tried: int) -> Iterator[Finding]:
    """Pieces of the sample that could not be read; their units will end in quarantine, the others will not."""
    if not errors:
        return
    message = f"{len(errors)} of {tried} sampled shards cannot be read: {errors[0]}"
    if len(errors) == tried:
        yield Finding("reading", "stop", message, overridable=False)
    else:
        yield Finding("reading", "warn", message, "A run quarantines what it cannot read, and maps the rest.")


def counts(blocks: Sequence[CellBlock], reference: Reference) -> Iterator[Finding]:
    """Are the counts counts, and does every cell have some?"""
    sampled = sum(block.n_cells for block in blocks)
    if not sampled:
        yield Finding(
            "counts", "unknown", "No cell could be sampled.", "Check that the source has cells.", overridable=False
        )
        return
    wrong = [found for block in blocks if (found := _not_counts(block, reference))]
    if wrong:
        yield min(wrong, key=lambda found: found.overridable)  # what cannot be mapped at all before what can
    else:
        yield Finding(
            "counts", "ok", f"Non-negative integers in {sampled:,} sampled cells.", figures={"sampled": sampled}
        )
    empty = sum(int((np.diff(block.indptr) == 0).sum()) for block in blocks)
    figures = {"empty": empty, "sampled": sampled}
    message = f"{empty:,} of {sampled:,} sampled cells have no count in the reference's genes."
    if empty > EMPTY_STOP_ABOVE * sampled:
        yield Finding(
            "empty-cells", "stop", message, "Is it the right reference, and the right layer?", figures=figures
        )
    elif empty:
        yield Finding("empty-cells", "warn", message, "They get a null latent and a null label.", figures=figures)


def _not_counts(block: CellBlock, reference: Reference) -> Finding | None:
    """The first value that is not a count, with its cell and gene."""
    kinds = (
        ("NaN", np.isnan(block.data), False),
        ("infinite", np.isinf(block.data), False),
        ("negative", block.data < 0, False),
        ("not an integer", block.data != np.rint(block.data), True),
    )
    for kind, wrong, overridable in kinds:
        if not wrong.any():
            continue
        at = int(np.flatnonzero(wrong)[0])
        cell = block.obs["observation_id"][int(np.searchsorted(block.indptr, at, side="right")) - 1].as_py()
        gene = next(iter(reference.genes.columns.values()))[int(block.indices[at])]
        value = float(block.data[at])
        looks = " It looks log-normalised." if overridable and _looks_log_normalised(block) else ""
        message = f"Counts are {kind}: cell '{cell}', gene '{gene}', value {value:g} ({block.shard.uri}).{looks}"
        remedy = "The reference needs raw counts: name where they are, e.g. layer=counts or layer=raw."
        return Finding("counts", "stop", message, remedy, overridable=overridable, figures={"value": value})
    return None


def _looks_log_normalised(block: CellBlock) -> bool:
    """log1p of values that share one library size: fractions, small, and no count above e**15."""
    return bool(block.data.max() < 15 and np.mean(block.data != np.rint(block.data)) > 0.5)


def batch(scan: Scan, reference: Reference, settings: Settings) -> Iterator[Finding]:
    """Does the query's batch matter to the latent, and is it one that the reference knows?"""
    if not reference.batch_key:
        yield Finding("batch", "ok", "The reference was trained without batches.")
        return
    column = query_batch_key(reference, settings)
    summary = scan.columns.get(column)
    if not reference.encoded_batch:
        yield _ignored_batch(column, summary, reference)
        return
    yield from _must_be_known("batch", column, summary, reference.batch_categories, scan)


def _ignored_batch(column: str, summary: ColumnSummary | None, reference: Reference) -> Finding:
    """What is said of a batch column that moves nothing."""
    why = "the encoder reads the sample alone" if reference.encode_covariates else "encode_covariates=False"
    message = f"The latent does not depend on the batch ({why})"
    if summary is None:
        return Finding("batch", "ok", f"{message}; the query has no obs column '{column}'.")
    new = [value for value in summary.counts if value not in reference.batch_categories]
    figures = {"values": len(summary.counts), "new": len(new), "missing": summary.nulls}
    seen = (
        f"'{column}' has {len(summary.counts):,} values, {len(new):,} new to the reference, {summary.nulls:,} missing"
    )
    if summary.type in ("double", "int64"):
        return Finding(
            "batch", "warn", f"{message}; {seen}, and holds numbers where categories are meant.", figures=figures
        )
    return Finding("batch", "ok", f"{message}; {seen}.", figures=figures)


def sample(scan: Scan, reference: Reference, settings: Settings) -> Iterator[Finding]:
    """Are the query's samples ones that the reference knows?"""
    if reference.encoded_sample:
        column = query_sample_key(reference, settings)
        yield from _must_be_known("sample", column, scan.columns.get(column), reference.sample_categories, scan)


def covariates(scan: Scan, reference: Reference) -> Iterator[Finding]:
    """Are the covariates there that the encoder reads?"""
    named = [*reference.categorical_covariates, *reference.continuous_covariates]
    if not named:
        return
    if not reference.encode_covariates:
        yield Finding(
            "covariates", "ok", f"The latent does not depend on {', '.join(named)} (encode_covariates=False)."
        )
        return
    for column, known in reference.categorical_covariates.items():
        yield from _must_be_known("covariates", column, scan.columns.get(column), known, scan)
    for column in reference.continuous_covariates:
        summary = scan.columns.get(column)
        if summary is None or column in scan.missing:
            yield _absent("covariates", column, scan)
        elif summary.type not in ("double", "int64") or summary.nulls:
            what = f"{summary.nulls:,} cells without a value" if summary.nulls else f"{summary.type} values"
            message = f"Continuous covariate '{column}' has {what}."
            yield Finding("covariates", "stop", message, "Give every cell a number.", overridable=False)
        else:
            yield Finding("covariates", "ok", f"Continuous covariate '{column}' is there.")


def _must_be_known(
    name: str, column: str, summary: ColumnSummary | None, known: Sequence[str], scan: Scan
) -> Iterator[Finding]:
    """A categorical column that the encoder reads: there, complete, categorical, and of known values."""
    if summary is None or column in scan.missing:
        yield _absent(name, column, scan)
        return
    if summary.nulls:
        message = f"{summary.nulls:,} of {scan.cells:,} cells have no value in obs column '{column}'."
        yield Finding(name, "stop", message, f"Fill '{column}', or filter those cells out.", overridable=False)
    # A scan counts neither real numbers nor the values of an identifier or a measurement in integers.
    if sum(summary.counts.values()) + summary.nulls < scan.cells and not (summary.truncated and summary.counts):
        message = f"obs column '{column}' holds numbers, where categories such as '{known[0]}' are meant."
        yield Finding(name, "stop", message, _other_column(name, column), overridable=False)
        return
    new = [value for value in summary.counts if value not in known]
    if new:
        message = (
            f"obs column '{column}' has {len(new)} value{'s' * (len(new) != 1)} that the reference does not know"
            f" ({some(new)}), and its"
            " encoder reads them (encode_covariates=True): new ones need scArches surgery, which is not built yet."
        )
        remedy = f"Map cells of known values only ({some(known)}), or with encode_covariates=False."
        yield Finding(name, "stop", message, remedy, overridable=False, figures={"new": len(new)})
    elif not summary.nulls:
        yield Finding(name, "ok", f"All {len(summary.counts)} values of '{column}' are known to the reference.")


def _absent(name: str, column: str, scan: Scan) -> Finding:
    place = scan.missing.get(column, "the source")
    message = f"obs column '{column}' is not in {place}, and the reference's encoder reads it."
    remedy = f"Name the column that holds it: {_FLAG[name]} COLUMN." if name in _FLAG else "Add it to the source's obs."
    return Finding(name, "stop", message, remedy, overridable=False)


def _other_column(name: str, column: str) -> str:
    """Remedy for numbers in the place of categories."""
    return f"Name a categorical column: {_FLAG[name]} COLUMN." if name in _FLAG else f"Write '{column}' as text."


def labels(scan: Scan, reference: Reference) -> Finding:
    """What labels can come out, and how the query's own compare."""
    if not reference.labels:
        if not reference.has_latents:
            return Finding("labels", "warn", "The reference has no labels: every label will be null.")
        message = "The reference has no classifier: labels come from its nearest labelled cells, null if it has none."
        return Finding("labels", "ok", message)
    message = f"{len(reference.labels)} labels can come out."
    own = scan.columns.get(reference.labels_key or "")
    if own is None:
        return Finding("labels", "ok", message)
    foreign = sorted(value for value in own.counts if value not in reference.labels)
    figures = {"labels": len(reference.labels), "own": len(own.counts), "foreign": len(foreign)}
    if foreign:
        message += f" The query's own '{reference.labels_key}' is not used; it has others ({some(foreign)})."
    return Finding("labels", "ok", message, figures=figures)


__all__ = [
    "NAMES",
    "Finding",
    "batch",
    "cells",
    "counts",
    "covariates",
    "genes",
    "labels",
    "match_of",
    "reading",
    "sample",
]
