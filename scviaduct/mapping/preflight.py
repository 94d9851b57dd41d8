"""Preflight: does a query fit a reference? Asked of the metadata and of a bounded sample, before any work.

Each finding has a name, a verdict and a remedy. The gate opens if no finding stops it; a user may accept a finding by
name, and what was accepted is recorded with the run. Findings that would make mapping impossible cannot be accepted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from scviaduct.errors import DataError, InputError, NotFitError
from scviaduct.families import family
from scviaduct.mapping import checks
from scviaduct.mapping.mapper import query_batch_key, query_sample_key
from scviaduct.mapping.reading import read_block
from scviaduct.sources import open_shard

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scviaduct.mapping.checks import Finding
    from scviaduct.references.package import Reference
    from scviaduct.sources import Source
    from scviaduct.values import CellBlock, FloatArray, Scan, Settings, Shard

SAMPLE_CELLS = 4096
"""Cells read for the sample, at most; spread over the files and along each."""
SAMPLE_FILES = 64
"""Files that the sample reads from, at most."""
SAMPLE_PLACES = 16
"""Places along the source that the sample reads from, unless there are more files."""

Verdict = Literal["fit", "not fit", "cannot tell"]
_EXIT: dict[Verdict, int] = {"fit": 0, "not fit": 1, "cannot tell": 3}


@dataclass(frozen=True, slots=True)
class Report:
    """What preflight found.

    Attributes
    ----------
    source, version
        Canonical URI and version of what was checked.
    reference
        Name of the reference.
    cells, shards
        Size of the query.
    sampled
        Cells whose counts were looked at.
    findings
        In the order of the checks.
    """

    source: str
    version: str
    reference: str
    cells: int
    shards: int
    sampled: int
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> Verdict:
        """``not fit`` if a finding stops, else ``cannot tell`` if one could not be decided, else ``fit``."""
        levels = {finding.level for finding in self.findings}
        if "stop" in levels:
            return "not fit"
        return "cannot tell" if "unknown" in levels else "fit"

    @property
    def exit_status(self) -> int:
        """0 fit, 1 not fit, 3 cannot tell."""
        return _EXIT[self.verdict]

    @property
    def accepted(self) -> tuple[str, ...]:
        """Names of the findings that were overridden."""
        return tuple(sorted({finding.name for finding in self.findings if finding.level == "accepted"}))

    def accept(self, names: Sequence[str]) -> Report:
        """Override findings by name.

        Raises
        ------
        InputError
            If a name is not one of a check, or its finding cannot be overridden.
        """
        for name in names:
            if name not in checks.NAMES:
                raise InputError(f"--accept {name}: no check has that name.", f"Checks: {', '.join(checks.NAMES)}.")
            for finding in self.findings:
                if finding.name == name and finding.level == "stop" and not finding.overridable:
                    raise InputError(
                        f"--accept {name}: {finding.message}", f"It cannot be overridden. {finding.remedy}"
                    )
        findings = tuple(
            replace(finding, level="accepted") if finding.name in names and finding.level == "stop" else finding
            for finding in self.findings
        )
        return replace(self, findings=findings)

    def require_fit(self) -> None:
        """Close the gate unless the verdict is ``fit``.

        Raises
        ------
        NotFitError
            Naming every finding that stops.
        """
        if self.verdict == "fit":
            return
        stops = [finding for finding in self.findings if finding.level in ("stop", "unknown")]
        lines = "".join(f"\n  {finding.name}: {finding.message} {finding.remedy}" for finding in stops)
        overridable = sorted({finding.name for finding in stops if finding.overridable})
        remedy = f"\nOverride what you know better: --accept {','.join(overridable)}" if overridable else ""
        raise NotFitError(f"The query does not fit reference '{self.reference}'; nothing was mapped.{lines}", remedy)


def check(
    source: Source,
    scan: Scan,
    reference: Reference,
    settings: Settings,
    influence: FloatArray,
    *,
    sample: int = SAMPLE_CELLS,
    surgery: checks.Surgery = "auto",
) -> Report:
    """Check a query against a reference.

    Parameters
    ----------
    source
        Open source.
    scan
        Its scan, with the columns of :func:`scan_columns`; grouped by
        :func:`~scviaduct.mapping.batches.group_columns` to have query batches counted.
    reference, settings
        What would map it, and how.
    influence
        float32, shape ``(n_genes,)``; how much each reference gene moves the encoder.
    sample
        Cells whose counts are looked at, at most.
    surgery
        What is done about categories that the reference does not know: ``auto`` fits adapters for those that its
        encoder reads, ``decoder`` also for batches that its decoder alone reads, ``off`` fits none.
    """
    files = {shard.uri: shard for shard in _one_per_file(scan.shards)}
    matches = {uri: checks.match_of(shard, reference) for uri, shard in files.items()}
    optional = family(reference.family).needs.optional
    foreign = tuple(
        checks.features(matches, lambda uri: open_shard(files[uri]).genes(files[uri]), reference.genes, optional)
    )
    blocks: list[CellBlock] = []
    errors: list[DataError] = []
    for shard, limit in _sample(scan.shards, sample):
        try:
            blocks.append(read_block(shard, reference, (), limit))
        except DataError as error:
            errors.append(error)
    findings: list[Finding] = [
        checks.cells(scan),
        *checks.reading(errors, len(blocks) + len(errors)),
        *checks.genes(matches, influence, optional, told={finding.name for finding in foreign}),
        *foreign,
        *checks.counts(blocks, reference),
        *checks.batch(scan, reference, settings, surgery),
        *checks.sample(scan, reference, settings, surgery),
        *checks.covariates(scan, reference, surgery),
        *checks.query_adapters(scan, reference, settings, surgery),
        checks.labels(scan, reference),
    ]
    sampled = sum(block.n_cells for block in blocks)
    return Report(source.uri, source.version, reference.name, scan.cells, len(scan.shards), sampled, tuple(findings))


def scan_columns(reference: Reference, settings: Settings) -> tuple[str, ...]:
    """obs columns whose values the checks look at."""
    batch, sample = query_batch_key(reference, settings), query_sample_key(reference, settings)
    wanted = (
        batch,
        sample,
        reference.labels_key or "",
        *reference.categorical_covariates,
        *reference.continuous_covariates,
        reference.size_factor_key,
    )
    return tuple(dict.fromkeys(column for column in wanted if column))


def _one_per_file(shards: Sequence[Shard]) -> list[Shard]:
    return list({shard.uri: shard for shard in reversed(shards)}.values())[::-1]


def _sample(shards: Sequence[Shard], cells: int) -> list[tuple[Shard, int]]:
    """Where to look and how many cells to read there: every file (up to a bound), and evenly along the source."""
    chosen = _evenly(_one_per_file(shards), min(SAMPLE_FILES, cells))
    places = min(SAMPLE_PLACES, cells)
    chosen = list(dict.fromkeys([*chosen, *_evenly(shards, places - len(chosen))]))
    if not chosen:
        return []
    limit = cells // len(chosen)
    return [piece for shard in chosen for piece in _along(shard, limit, max(1, places // len(chosen)))]


def _evenly[T](items: Sequence[T], n: int) -> list[T]:
    """At most ``n`` of the items, evenly spaced, the first and the last among them."""
    if n >= len(items):
        return list(items)
    return [items[i * (len(items) - 1) // max(n - 1, 1)] for i in range(n)]


def _along(shard: Shard, limit: int, places: int) -> list[tuple[Shard, int]]:
    """A few cells at several places of a shard; a reader that is given a limit does not verify what a shard holds."""
    if shard.cells <= limit or places == 1:
        return [(shard, limit)]
    cuts = [shard.start + i * (shard.stop - shard.start) // places for i in range(places + 1)]
    return [(replace(shard, start=low, stop=high), limit // places) for low, high in pairwise(cuts)]
