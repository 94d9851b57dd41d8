"""How registered references fit some cells: by their modalities, their genes and preflight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from scviaduct.errors import ScviaductError
from scviaduct.mapping import preflight
from scviaduct.mapping.genechecks import WARN_BELOW
from scviaduct.references.package import STATISTICS
from scviaduct.values import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from scviaduct.mapping.preflight import Report
    from scviaduct.references.package import Reference
    from scviaduct.sources import Source
    from scviaduct.values import FloatArray, Scan

SAMPLE_CELLS = 512
"""Cells that preflight reads for each reference, at most."""
ENOUGH = WARN_BELOW
"""Share of the encoder's influence that the measured genes must carry; preflight warns below it."""


@dataclass(frozen=True, slots=True)
class Fit:
    """How one registered reference fits.

    Attributes
    ----------
    reference, family
        Its name, and its family.
    fits
        Whether preflight lets it through and enough of its genes were found.
    complete
        Whether it reads every modality that the source has.
    share, weighted
        Share of its genes that were found, plain and by the encoder's influence.
    labels
        Number of labels that it can give by a classifier.
    batch_key
        Column of the query that has to play its batch; empty for its own name.
    why
        What stands against it, or what it was judged by.
    """

    reference: str
    family: str
    fits: bool
    complete: bool
    share: float
    weighted: float
    labels: int
    batch_key: str
    why: str

    @property
    def rank(self) -> tuple[object, ...]:
        """Sorts the best first: one that fits, reads all modalities, finds most, and labels."""
        return (not self.fits, not self.complete, -self.weighted, not self.labels, self.reference)


def scan_columns(references: Sequence[Reference]) -> list[str]:
    """obs columns that preflight looks at for any of the references."""
    plain = Settings()
    return list(dict.fromkeys(name for reference in references for name in preflight.scan_columns(reference, plain)))


def fits_of(
    source: Source, scan: Scan, references: Sequence[Reference], features: Mapping[str, int], batch: str = ""
) -> tuple[Fit, ...]:
    """Check every reference, the best first.

    Parameters
    ----------
    source, scan
        Open, and scanned with :func:`scan_columns`.
    references
        The registered ones.
    features
        Modalities of the source, to number of features.
    batch
        Column that may play the batch of a reference whose own the source lacks; empty for none.
    """
    found = [_fit(source, scan, reference, features, batch) for reference in references]
    return tuple(sorted(found, key=lambda fit: fit.rank))


def _fit(source: Source, scan: Scan, reference: Reference, features: Mapping[str, int], batch: str) -> Fit:
    reads = set(reference.genes.modalities or ("rna",))
    complete = set(features) <= reads
    if not reads & set(features):
        told = f"reads {' and '.join(sorted(reads))}, which the source lacks"
        return _unfit(reference, told, complete=complete)
    try:
        influence = _influence(reference)
        report, key = _checked(source, scan, reference, influence, ""), ""
        own = reference.batch_key
        if report.verdict != "fit" and reference.encode_covariates and own in scan.missing and batch:
            second = _checked(source, scan, reference, influence, batch)
            report, key = (second, batch) if second.verdict == "fit" else (report, "")
    except ScviaductError as error:
        return _unfit(reference, f"cannot be checked: {error}", complete=complete)
    figures = next((finding.figures for finding in report.findings if finding.name == "genes"), {})
    share, weighted = (float(figures.get(name, 0)) for name in ("share", "weighted_share"))
    stops = [finding for finding in report.findings if finding.level in ("stop", "unknown")]
    why = f"{share:.1%} of its {len(reference.genes):,} genes found, {weighted:.1%} by influence"
    if stops and stops[0].name != "genes":
        why += f"; {stops[0].name}: {stops[0].message.rstrip('.')}"
    elif weighted < ENOUGH:
        why += f", of {ENOUGH:.0%} that are needed"
    if new := _unknown(report):
        why += f"; surgery for {new:,} new value{'s' * (new != 1)} of what its encoder reads"
    if not complete:
        why += f"; leaves {' and '.join(sorted(set(features) - reads))} unused"
    fits = report.verdict == "fit" and weighted >= ENOUGH
    return Fit(reference.name, reference.family, fits, complete, share, weighted, len(reference.labels), key, why)


def _unknown(report: Report) -> int:
    """Values of batch, sample and covariates that surgery would fit: found, let through, and counted by cells."""
    told = [finding.figures for finding in report.findings if finding.name in ("batch", "sample", "covariates")]
    return sum(int(figures["new"]) for figures in told if "cells" in figures)


def _unfit(reference: Reference, why: str, *, complete: bool) -> Fit:
    return Fit(reference.name, reference.family, False, complete, 0.0, 0.0, len(reference.labels), "", why)  # noqa: FBT003


def _checked(source: Source, scan: Scan, reference: Reference, influence: FloatArray, batch: str) -> Report:
    settings = Settings(batch_key=batch)
    return preflight.check(source, scan, reference, settings, influence, sample=SAMPLE_CELLS)


def _influence(reference: Reference) -> FloatArray:
    """From the statistics of the reference's cells, which need no model; else from its encoder."""
    if STATISTICS in reference.files:
        return reference.statistics().influence
    return reference.encoder().gene_influence()
