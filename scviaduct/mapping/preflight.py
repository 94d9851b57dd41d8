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
from scviaduct.mapping.reading import read_block, read_shared
from scviaduct.sources import open_shard

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from scviaduct.mapping.checks import Finding
    from scviaduct.mapping.reading import SharedBlock
    from scviaduct.references.package import Reference
    from scviaduct.sources import Source
    from scviaduct.values import CellBlock, FloatArray, Scan, Settings, Shard

SAMPLE_CELLS = 1024
"""Cells read for the sample, at most; spread over the files and along each. It is there to say no before the work:
mapping looks at every count."""
SAMPLE_FILES = 64
"""Files that the sample reads from, at most."""
SAMPLE_PLACES = 2, 8
"""Fewest and most places along the source that the sample reads from, unless there are more files. Each costs 20 ms of
a Census, where all genes of some more cells are decoded, and 30 us a cell."""
_CELLS_A_PLACE = 98_304
"""The sample takes a sixtieth of the time of reading a query of SOMA then, unless that is small."""

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
    overridden
        Names that the user accepts findings of, whether or not the sample had one: what it missed may come up later.
    """

    source: str
    version: str
    reference: str
    cells: int
    shards: int
    sampled: int
    findings: tuple[Finding, ...]
    overridden: tuple[str, ...] = ()

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
        return replace(self, findings=findings, overridden=tuple(names))

    def require_fit(self) -> None:
        """Close the gate unless the verdict is ``fit``.

        Raises
        ------
        NotFitError
            Naming every finding that stops.
        """
        require_fit([self])


def require_fit(reports: Sequence[Report]) -> None:
    """Close the gate unless every reference fits: then nothing is mapped, with none of them.

    Raises
    ------
    NotFitError
        Naming the references that do not fit, and every finding that stops.
    """
    closed = [report for report in reports if report.verdict != "fit"]
    if not closed:
        return
    told, overridable = "", set[str]()
    for report in closed:
        stops = [finding for finding in report.findings if finding.level in ("stop", "unknown")]
        lines = "".join(f"\n  {finding.name}: {finding.message} {finding.remedy}" for finding in stops)
        told += f"The query does not fit reference '{report.reference}'; nothing was mapped.{lines}\n"
        overridable |= {finding.name for finding in stops if finding.overridable}
    remedy = f"\nOverride what you know better: --accept {','.join(sorted(overridable))}" if overridable else ""
    fitting = [report.reference for report in reports if report not in closed]
    if fitting:
        left = " ".join(f"--reference {name}" for name in fitting)
        remedy += f"\nOr leave {'it' if len(closed) == 1 else 'them'} out: {left}"
    raise NotFitError(told.rstrip("\n"), remedy)


def check(
    source: Source,
    scan: Scan,
    reference: Reference,
    settings: Settings,
    influence: FloatArray,
    *,
    sample: int = SAMPLE_CELLS,
    surgery: checks.Surgery = "auto",
    looked: Sequence[CellBlock | DataError] | None = None,
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
    looked
        The sample, where it was read already (:func:`read_sample`).
    """
    files = {shard.uri: shard for shard in _one_per_file(scan.shards)}
    matches = {uri: checks.match_of(shard, reference) for uri, shard in files.items()}
    optional = family(reference.family).needs.optional
    foreign = tuple(
        checks.features(matches, lambda uri: open_shard(files[uri]).genes(files[uri]), reference.genes, optional)
    )
    if looked is None:
        looked = [
            _read_or_error(read_block, shard, reference, (), limit) for shard, limit in _sample(scan.shards, sample)
        ]
    blocks = [piece for piece in looked if not isinstance(piece, DataError)]
    errors = [piece for piece in looked if isinstance(piece, DataError)]
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


def read_sample(
    scan: Scan, references: Sequence[Reference], sample: int = SAMPLE_CELLS
) -> list[SharedBlock | DataError]:
    """Read once what :func:`check` looks at for each of several references; an error for a piece that is unreadable."""
    return [_read_or_error(read_shared, shard, references, (), limit) for shard, limit in _sample(scan.shards, sample)]


def _read_or_error[**P, Block](read: Callable[P, Block], *told: P.args, **more: P.kwargs) -> Block | DataError:
    try:
        return read(*told, **more)
    except DataError as error:
        return error


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
    fewest, most = SAMPLE_PLACES
    places = min(max(sum(shard.cells for shard in shards) // _CELLS_A_PLACE, fewest), most, cells)
    chosen = list(dict.fromkeys([*chosen, *_evenly(shards, places - len(chosen) + 1)]))  # of both, the first is one
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
