"""The checks of preflight that look at panels: proteins that the reference lacks, peaks of another genome build.

Peaks have no names but their positions. Those of other cells, called anew on the same genome, overlap the reference's
without being the same; those of another build lie elsewhere and overlap by chance alone.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from scviaduct.mapping.finding import Finding
from scviaduct.mapping.mapper import some

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from scviaduct.mapping.genes import GeneMatch
    from scviaduct.values import GeneTable, LongArray

    Peaks = Mapping[str, LongArray]

FOUND_BELOW = 0.1
"""Share of the smaller side's peaks that are found by name below which positions are compared."""
OVERLAP_FROM = 0.2
"""Share of peaks that overlap one of the other side's from which both are taken to be of one build, if it is also
``OVERLAP_TIMES`` what chance gives. The 52,761 A549 peaks of sci-CAR (GRCh37), shifted by 5 kb to 2.5 Mb, overlap
themselves at 3 to 7%; 9% of 174 PBMC peaks (GRCh38) overlap one of them; with ends moved by up to 300 bases, 97% do."""
OVERLAP_TIMES = 2.0
SHIFTS = (-1_000_000, -300_000, 300_000, 1_000_000)
"""Bases that peaks are shifted by to see what chance gives."""

# As genes.py reads them: chr1:100-200 (10x), chr1-100-200 (Signac) and chr1_100_200 (ArchR, SnapATAC).
_PEAK = re.compile(r"^(.+)[:_-](\d+)[_-](\d+)$")
_ANEW = "in the reference's peaks, with Signac's FeatureMatrix, SnapATAC2's make_peak_matrix or bedtools coverage"


def features(
    matches: Mapping[str, GeneMatch],
    table_of: Callable[[str], GeneTable],
    reference: GeneTable,
    optional: Sequence[str] = (),
) -> Iterator[Finding]:
    """Is there a panel that is measured, and not found in the reference? The first file that has one is named.

    Parameters
    ----------
    matches
        URI of each file to how its features were found.
    table_of
        Features of a file; asked for only where few of a panel were found.
    reference
        Features of the reference.
    optional
        Modalities that the family can do without.
    """
    for check in (_proteins, _peaks):
        found = (check(uri, match, table_of, reference, optional) for uri, match in matches.items())
        stop = next((finding for finding in found if finding), None)
        if stop:
            yield stop


def _named(table: GeneTable, modality: str, *, unsaid: bool) -> dict[str, list[str]]:
    """Identifier columns of the features of one modality; ``unsaid`` takes those of no modality too."""
    kinds = table.modality or ("",) * len(table)
    rows = [row for row, kind in enumerate(kinds) if kind == modality or (unsaid and not kind)]
    return {column: [values[row] for row in rows] for column, values in table.columns.items()} if rows else {}


def _proteins(
    uri: str, match: GeneMatch, table_of: Callable[[str], GeneTable], reference: GeneTable, optional: Sequence[str]
) -> Finding | None:
    """Proteins of which none is the reference's."""
    if "protein" not in match.modalities or match.found("protein")[0]:
        return None
    first = match.modalities[0] == "protein"
    query = [name for name in next(iter(_named(table_of(uri), "protein", unsaid=first).values()), []) if name]
    if not query:
        return None
    known = next(iter(_named(reference, "protein", unsaid=first).values()))
    message = (
        f"None of the query's {len(query):,} proteins ({some(query, 3)}) is one of the reference's {len(known):,}"
        f" ({some(known, 3)}) in {uri}."
    )
    remedy = "Rename them to the reference's names (case and a TotalSeq tag do not matter)."
    overridable = "protein" in optional
    if overridable:
        remedy += " If the panels do differ, encode without proteins: --accept proteins."
    figures = {"proteins": len(query), "reference_proteins": len(known)}
    return Finding("proteins", "stop", message, remedy, overridable=overridable, figures=figures)


def _peaks(
    uri: str, match: GeneMatch, table_of: Callable[[str], GeneTable], reference: GeneTable, optional: Sequence[str]
) -> Finding | None:
    """Peaks of which hardly any is the reference's: called anew, named otherwise, or of another build."""
    if "atac" not in match.modalities:
        return None
    found, total = match.found("atac")
    if found >= FOUND_BELOW * total:
        return None
    first = match.modalities[0] == "atac"
    query = _intervals(_named(table_of(uri), "atac", unsaid=first))
    known = _intervals(_named(reference, "atac", unsaid=first))
    if query is None or known is None or found >= FOUND_BELOW * min(query.size, known.size):
        return None
    seen = _Comparison.of(query, known)
    message = (
        f"{found:,} of the query's {query.size:,} peaks ({some(query.names, 2)}) are among the reference's"
        f" {known.size:,} ({some(known.names, 2)}) in {uri}: {seen.told}."
    )
    figures = {"found": found, "peaks": query.size, "overlap": seen.overlap, "chance": seen.chance, "same": seen.same}
    overridable = "atac" in optional or found > 0
    return Finding("peaks", "stop", message, seen.remedy, overridable=overridable, figures=figures)


class _Intervals(NamedTuple):
    """Features that are intervals of a genome: how they are written, and where they lie by chromosome."""

    names: list[str]
    at: Peaks

    @property
    def size(self) -> int:
        return len(self.names)


def _intervals(columns: Mapping[str, Sequence[str]]) -> _Intervals | None:
    """Intervals in the identifier column that has most; None if most features are none."""
    best: list[tuple[str, re.Match[str]]] = []
    for names in columns.values():
        parsed = [(name, hit) for name in names if (hit := _PEAK.match(name))]
        best = parsed if len(parsed) > len(best) else best
    if not best or len(best) < 0.5 * len(next(iter(columns.values()))):
        return None
    at: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for _, hit in best:
        at[hit[1]].append((int(hit[2]), int(hit[3])))
    return _Intervals([name for name, _ in best], {name: np.array(sorted(held)) for name, held in at.items()})


class _Comparison(NamedTuple):
    """How the peaks of two sides lie to each other.

    Attributes
    ----------
    overlap, chance
        Share of peaks that overlap one of the other side's, of that side of which more do; and the same with the
        query's peaks shifted, on average.
    same
        Share of the query's peaks that are the reference's, chromosomes compared without ``chr``.
    renamed
        Whether no chromosome is found as it is written, and some are without ``chr``.
    """

    overlap: float
    chance: float
    same: float
    renamed: bool
    query_chromosome: str
    known_chromosome: str

    @classmethod
    def of(cls, query: _Intervals, known: _Intervals) -> _Comparison:
        """Compare."""
        there, here = _plain(known.at), _plain(query.at)
        shares = [_overlap(_shifted(here, bases), there) for bases in SHIFTS]
        common = sum(len(_rows(here[name]) & _rows(there[name])) for name in here.keys() & there.keys())
        renamed = not query.at.keys() & known.at.keys() and bool(here.keys() & there.keys())
        names = (min(at, key=lambda name: (-len(at[name]), name)) for at in (query.at, known.at))
        return cls(_overlap(here, there), float(np.mean(shares)), common / query.size, renamed, *names)

    @property
    def one_build(self) -> bool:
        """Whether more peaks overlap than chance gives."""
        return self.overlap >= max(OVERLAP_FROM, OVERLAP_TIMES * self.chance)

    @property
    def told(self) -> str:
        """What that means."""
        shares = f"{self.overlap:.0%} overlap one of the other side's where chance gives {self.chance:.0%}"
        written = (
            f"the query writes chromosomes as '{self.query_chromosome}', the reference as '{self.known_chromosome}'"
        )
        if not self.one_build:
            also = f" ({written})" if self.renamed else ""
            return f"{shares}, so they are of another genome build or chromosomes have other names{also}"
        if self.renamed and self.same >= FOUND_BELOW:
            return f"{written}, and without that {self.same:.0%} of the peaks are the reference's"
        return f"{shares}, so they are other peak calls of the same build{f', and {written}' if self.renamed else ''}"

    @property
    def remedy(self) -> str:
        """What to do about it."""
        if not self.one_build:
            return (
                f"Lift the query's fragments over to the reference's build and count them {_ANEW}; lifted peaks would"
                " still be others than the reference's. If only chromosomes are called otherwise, rename them."
            )
        if self.renamed and self.same >= FOUND_BELOW:
            return "Write them as the reference does, such as adata.var_names.str.removeprefix('chr')."
        return f"Peaks are matched by name: count the query's fragments {_ANEW}."


def _plain(at: Peaks) -> Peaks:
    """Peaks by chromosome without ``chr``."""
    merged: dict[str, list[LongArray]] = defaultdict(list)
    for name, held in at.items():
        merged[re.sub("^chr", "", name, flags=re.IGNORECASE)].append(held)
    return {name: np.concatenate(held)[np.argsort(np.concatenate(held)[:, 0])] for name, held in merged.items()}


def _rows(intervals: LongArray) -> set[tuple[int, int]]:
    return {(start, stop) for start, stop in intervals.tolist()}


def _shifted(at: Peaks, bases: int) -> Peaks:
    return {name: held + bases for name, held in at.items()}


def _overlap(query: Peaks, known: Peaks) -> float:
    """Share of peaks that overlap one of the other side's, of that side of which more do.

    A selection of peaks, such as a reference's most variable, is overlapped by few of a whole genome's.
    """
    return max(_overlapping(query, known), _overlapping(known, query))


def _overlapping(peaks: Peaks, others: Peaks) -> float:
    """Share of peaks that share a base with another; intervals are sorted by their starts, and half-open."""
    found = 0
    for name in peaks.keys() & others.keys():
        starts, furthest = others[name][:, 0], np.maximum.accumulate(others[name][:, 1])
        # Of those that start before a peak ends, the one that reaches furthest tells.
        before = np.searchsorted(starts, peaks[name][:, 1], side="left") - 1
        found += int(((before >= 0) & (furthest[before] > peaks[name][:, 0])).sum())
    return found / max(1, sum(len(held) for held in peaks.values()))
