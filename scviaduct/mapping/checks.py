"""The single checks of preflight, each a function from what was seen to findings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scviaduct.mapping.batchchecks import Surgery, batch, covariates, query_adapters, sample
from scviaduct.mapping.finding import Finding
from scviaduct.mapping.genechecks import genes
from scviaduct.mapping.mapper import some
from scviaduct.mapping.panelchecks import features
from scviaduct.mapping.reading import gene_match as match_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from scviaduct.errors import DataError
    from scviaduct.references.package import Reference
    from scviaduct.values import CellBlock, Scan

NAMES = (
    *("cells", "reading", "genes", "gene-ids", "proteins", "peaks", "counts", "empty-cells"),
    *("batch", "sample", "covariates", "surgery", "labels"),
)
"""What ``--accept`` takes."""

EMPTY_STOP_ABOVE = 0.5
"""Share of sampled cells without a count in the reference's genes above which the query does not fit."""


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
    "Surgery",
    "batch",
    "cells",
    "counts",
    "covariates",
    "features",
    "genes",
    "labels",
    "match_of",
    "query_adapters",
    "reading",
    "sample",
]
