"""The checks of preflight that look at what an encoder reads beside counts: batch, sample, covariates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from scviaduct.mapping.batches import group_columns, query_batches
from scviaduct.mapping.finding import Finding
from scviaduct.mapping.mapper import query_batch_key, query_sample_key, some

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from scviaduct.mapping.batches import QueryBatch
    from scviaduct.references.package import Reference
    from scviaduct.values import ColumnSummary, Scan, Settings

Surgery = Literal["auto", "off", "decoder"]
"""What is done about categories that a reference does not know: adapters for what its encoder reads, nothing, or
adapters for its decoder's batches too."""

FEW_CELLS = 20
"""Cells of a query batch below which its adapter is poor."""

_FLAG = {"batch": "--batch-key", "sample": "--sample-key"}


class _Column(NamedTuple):
    """A categorical covariate that is read, by whom, and what the reference knows of it."""

    check: str
    name: str
    known: Sequence[str]
    reader: str = "encoder"
    why: str = "encode_covariates=True"


def batch(scan: Scan, reference: Reference, settings: Settings, surgery: Surgery = "auto") -> Iterator[Finding]:
    """Does the query's batch matter, and is it one that the reference knows?"""
    if not reference.batch_key:
        yield Finding("batch", "ok", "The reference was trained without batches.")
        return
    name = query_batch_key(reference, settings)
    if reference.encoded_batch:
        yield from _read_column(_Column("batch", name, reference.batch_categories), scan, surgery)
    elif surgery == "decoder":
        column = _Column("batch", name, reference.batch_categories, "decoder", "--surgery decoder")
        yield from _read_column(column, scan, surgery)
    else:
        yield _ignored_batch(name, scan.columns.get(name), reference)


def _ignored_batch(column: str, summary: ColumnSummary | None, reference: Reference) -> Finding:
    """What is said of a batch column that moves nothing."""
    why = "encode_covariates=False"
    if reference.encode_covariates:
        one = reference.batch_encoded and len(reference.batch_categories) < 2
        # scvi-tools gives a covariate of one category no input.
        why = "the reference was trained with one batch" if one else "the encoder reads the sample alone"
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


def sample(scan: Scan, reference: Reference, settings: Settings, surgery: Surgery = "auto") -> Iterator[Finding]:
    """Are the query's samples there, and are they ones that the reference knows?"""
    if reference.encoded_sample:
        column = _Column("sample", query_sample_key(reference, settings), reference.sample_categories)
        yield from _read_column(column, scan, surgery)


def covariates(scan: Scan, reference: Reference, surgery: Surgery = "auto") -> Iterator[Finding]:
    """Are the covariates there that the encoder reads?"""
    named = [*reference.categorical_covariates, *reference.continuous_covariates]
    if not named:
        return
    if not reference.encode_covariates:
        yield Finding(
            "covariates", "ok", f"The latent does not depend on {', '.join(named)} (encode_covariates=False)."
        )
        return
    for name, known in reference.categorical_covariates.items():
        yield from _read_column(_Column("covariates", name, known), scan, surgery)
    for name in reference.continuous_covariates:
        summary = scan.columns.get(name)
        if summary is None or name in scan.missing:
            yield _absent(_Column("covariates", name, ()), scan)
        elif summary.type not in ("double", "int64", "bool") or summary.nulls:
            what = f"{summary.nulls:,} cells without a value" if summary.nulls else f"{summary.type} values"
            message = f"Continuous covariate '{name}' has {what}."
            yield Finding("covariates", "stop", message, "Give every cell a number.", overridable=False)
        else:
            yield Finding("covariates", "ok", f"Continuous covariate '{name}' is there.")


def _read_column(column: _Column, scan: Scan, surgery: Surgery) -> Iterator[Finding]:
    """A categorical column that is read: there, complete, categorical, and of known values or with surgery."""
    summary = scan.columns.get(column.name)
    if summary is None or column.name in scan.missing:
        yield _absent(column, scan)
        return
    if summary.nulls:
        message = f"{summary.nulls:,} of {scan.cells:,} cells have no value in obs column '{column.name}'."
        remedy = f"Fill '{column.name}', or filter those cells out."
        yield Finding(column.check, "stop", message, remedy, overridable=False)
    if _is_numbers(summary, scan):
        message = f"obs column '{column.name}' holds numbers, where categories such as '{column.known[0]}' are meant."
        yield Finding(column.check, "stop", message, _other_column(column), overridable=False)
        return
    new = {value: cells for value, cells in summary.counts.items() if value not in column.known}
    if new:
        yield _new_values(column, new, surgery, truncated=summary.truncated)
    elif not summary.nulls:
        message = f"All {len(summary.counts)} values of '{column.name}' are known to the reference."
        yield Finding(column.check, "ok", message)


def _is_numbers(summary: ColumnSummary, scan: Scan) -> bool:
    """A scan counts neither real numbers nor the values of an identifier or a measurement in integers."""
    uncounted = sum(summary.counts.values()) + summary.nulls < scan.cells
    return uncounted and not (summary.truncated and summary.counts)


def _new_values(column: _Column, new: Mapping[str, int], surgery: Surgery, *, truncated: bool) -> Finding:
    """Values that the reference does not know: surgery fits adapters for them, unless it is switched off."""
    at_least = "at least " if truncated else ""
    cells = sum(new.values())
    message = (
        f"obs column '{column.name}' has {at_least}{len(new):,} value{'s' * (len(new) != 1)} that the reference does"
        f" not know ({some(tuple(new))}), in {at_least}{cells:,} cell{'s' * (cells != 1)}, and its {column.reader}"
        f" reads them ({column.why}): "
    )
    figures = {"new": len(new), "cells": cells}
    if surgery == "off":
        remedy = f"Fit them, --surgery auto, or map cells of known values only ({some(column.known)})."
        told = f"{message}new ones need scArches surgery, which is switched off."
        return Finding(column.check, "stop", told, remedy, overridable=False, figures=figures)
    return Finding(column.check, "ok", f"{message}scArches surgery fits an adapter for each.", figures=figures)


def query_adapters(
    scan: Scan, reference: Reference, settings: Settings, surgery: Surgery = "auto"
) -> Iterator[Finding]:
    """Which query batches surgery will fit adapters for, and are there cells enough in each?

    Nothing is said of a scan that is not grouped, or whose columns another check stops.
    """
    decoder = surgery == "decoder"
    columns = group_columns(reference, settings, decoder=decoder)
    if surgery == "off" or not columns or len(scan.groups) != len(scan.shards):
        return
    summaries = [scan.columns.get(name) for name in columns if name not in scan.missing]
    sound = [summary for summary in summaries if summary and not summary.nulls and not _is_numbers(summary, scan)]
    if len(sound) < len(columns):
        return
    found = query_batches(reference, settings, scan, decoder=decoder).cells
    if not found:
        return
    size_factor = reference.size_factor_key
    if size_factor and (size_factor not in scan.columns or size_factor in scan.missing):
        message = (
            f"obs column '{size_factor}' is not in {scan.missing.get(size_factor, 'the source')}: the reference was"
            " trained with size factors, and surgery needs them."
        )
        yield Finding("surgery", "stop", message, f"Add '{size_factor}' to the source's obs.", overridable=False)
        return
    few = {item.name: cells for item, cells in found.items() if cells < FEW_CELLS}
    figures = {"query_batches": len(found), "cells": sum(found.values()), "few": len(few)}
    batches = f"{len(found):,} query batch{'es' * (len(found) != 1)}"
    message = f"Surgery fits adapters for {batches}, {figures['cells']:,} cells ({_some_batches(found)})."
    if few:
        told = some([f"{name}: {cells}" for name, cells in few.items()])
        message += f" {len(few):,} of them {'have' if len(few) != 1 else 'has'} fewer than {FEW_CELLS} cells ({told})."
        yield Finding("surgery", "warn", message, "Adapters from few cells are poor; filter them out?", figures=figures)
    else:
        yield Finding("surgery", "ok", message, figures=figures)


def _some_batches(found: Mapping[QueryBatch, int]) -> str:
    return "; ".join(item.name for item in list(found)[:3]) + ("; ..." if len(found) > 3 else "")


def _absent(column: _Column, scan: Scan) -> Finding:
    place = scan.missing.get(column.name, "the source")
    message = f"obs column '{column.name}' is not in {place}, and the reference's {column.reader} reads it."
    flag = _FLAG.get(column.check)
    remedy = f"Name the column that holds it: {flag} COLUMN." if flag else "Add it to the source's obs."
    return Finding(column.check, "stop", message, remedy, overridable=False)


def _other_column(column: _Column) -> str:
    """Remedy for numbers in the place of categories."""
    flag = _FLAG.get(column.check)
    return f"Name a categorical column: {flag} COLUMN." if flag else f"Write '{column.name}' as text."
