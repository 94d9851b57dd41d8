"""Matching the genes of a source to those of a reference, modality by modality.

Genes stand for features: a gene ``CD4`` and a protein ``CD4`` never meet. Either side may carry several identifiers per
gene: Ensembl ids with or without a version, symbols, or both. Every pair of identifier columns is tried, and the pair
that finds the most reference genes of a modality wins.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from scviaduct.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import numpy.typing as npt

    from scviaduct.values import FloatArray, GeneTable, IntArray

    Positions = npt.NDArray[np.intp]

# ENSG00000141510.19 and ENSMUSG00000059552.14 lose the version; ENSG00000182378.15_PAR_Y is a locus of its own and
# keeps its whole name, so that it is never summed into its X-chromosomal twin.
_VERSIONED = re.compile(r"^(ENS[A-Z]*G\d{11})\.\d+$")
# chr1:100-200 (10x), chr1-100-200 (Signac) and chr1_100_200 (ArchR, SnapATAC) are one peak.
_PEAK = re.compile(r"^(.+)[:_-](\d+)[_-](\d+)$")
# CD3_TotalSeqB (10x), CD3_TotalSeq-B, CD3-TotalC.
_TAG = re.compile(r"[ ._-]total(seq)?[ ._-]?[a-d]$")


@dataclass(frozen=True, slots=True)
class GeneMatch:
    """How a source's genes map onto a reference's.

    Attributes
    ----------
    target
        int32, shape ``(n_source_genes,)``; position of the reference gene, -1 for a gene the reference lacks. Source
        genes with the same target mean the same gene, and their counts are summed.
    present
        bool, shape ``(n_reference_genes,)``; reference genes that the source measures. The others read as zero.
    source_column, reference_column
        Identifier columns that were matched; of the reference's first modality.
    versions_stripped
        True if an Ensembl version suffix was dropped on either side.
    summed
        Source genes that share their target with an earlier one.
    ambiguous
        Reference identifiers in ``reference_column`` that name several reference genes; these are not matched.
    modality
        One per reference gene; empty if the reference does not say.
    notes
        What else was done to find them, as sentences.
    """

    target: IntArray
    present: np.ndarray[tuple[int], np.dtype[np.bool_]]
    source_column: str
    reference_column: str
    versions_stripped: bool
    summed: int
    ambiguous: int
    modality: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Share of the reference's genes that the source measures."""
        return float(self.present.mean()) if len(self.present) else 0.0

    @property
    def modalities(self) -> tuple[str, ...]:
        """Modalities of the reference, in order; empty if it does not say."""
        return tuple(dict.fromkeys(self.modality))

    def found(self, modality: str) -> tuple[int, int]:
        """How many of the reference's genes of one modality the source measures, and how many there are.

        Raises
        ------
        InputError
            If the reference has none of that modality.
        """
        if modality not in self.modality:
            raise InputError(
                f"The reference has no genes of modality '{modality}'.",
                f"It has: {', '.join(self.modalities) or 'genes of a modality that it does not name'}.",
            )
        chosen = np.array([name == modality for name in self.modality], np.bool_)
        return int(self.present[chosen].sum()), int(chosen.sum())

    def share_of(self, modality: str) -> float:
        """Share of the reference's genes of one modality that the source measures.

        Raises
        ------
        InputError
            If the reference has none of that modality.
        """
        found, total = self.found(modality)
        return found / total

    def weighted_share(self, influence: FloatArray) -> float:
        """Share of the encoder's influence that the measured genes carry.

        Parameters
        ----------
        influence
            float32, shape ``(n_reference_genes,)``; how much each gene moves the encoder, non-negative.
        """
        total = float(influence.sum())
        return float(influence[self.present].sum()) / total if total > 0 else self.share


class _Side(NamedTuple):
    """Genes of one modality on one side: plain identifiers by column, and which columns had versions."""

    columns: Mapping[str, pd.Index]
    versioned: frozenset[str]
    size: int


class _Found(NamedTuple):
    """How the genes of one modality were found, in positions within it."""

    target: IntArray
    present: npt.NDArray[np.bool_]
    source_column: str
    reference_column: str
    versions_stripped: bool
    ambiguous: int
    notes: tuple[str, ...]

    @property
    def summed(self) -> int:
        return int((self.target >= 0).sum() - self.present.sum())


def match_genes(source: GeneTable, reference: GeneTable) -> GeneMatch:
    """Find the reference gene of every source gene.

    A reference gene is looked for among the source's genes of its modality; one of the reference's first modality also
    among those whose modality the source does not say. A reference that says of no gene what it is is looked for in
    that modality of the source in which most of it is found.

    Parameters
    ----------
    source, reference
        Identifier columns of either side, the preferred one first. Of two pairs of columns that find equally many
        genes, the earlier one is taken.

    Returns
    -------
    GeneMatch
        The best match; its ``present`` may be all false.
    """
    target, present = np.full(len(source), -1, np.int32), np.zeros(len(reference), np.bool_)
    pieces: list[_Found] = []
    for modality, wanted, candidates in _pairs(source, reference):
        side = _side(reference, wanted, modality)
        tried = [(rows, _best(_side(source, rows, modality), side, modality)) for rows in candidates]
        rows, found = max(tried, key=lambda item: int(item[1].present.sum()))
        hit = found.target >= 0
        target[rows[hit]] = wanted[found.target[hit]]
        present[wanted[found.present]] = True
        pieces.append(found)
    return GeneMatch(
        target,
        present,
        pieces[0].source_column,
        pieces[0].reference_column,
        any(piece.versions_stripped for piece in pieces),
        sum(piece.summed for piece in pieces),
        sum(piece.ambiguous for piece in pieces),
        reference.modality,
        tuple(note for piece in pieces for note in piece.notes),
    )


def _pairs(source: GeneTable, reference: GeneTable) -> Iterator[tuple[str, Positions, list[Positions]]]:
    """Each modality of the reference, its genes, and the sets of the source's genes to look for them in."""
    told = pd.Index(source.modality or [""] * len(source), dtype=object)
    if not reference.modality:
        kinds = list(dict.fromkeys(told)) or [""]
        yield "", np.arange(len(reference)), [np.flatnonzero(told == kind) for kind in kinds]
        return
    known = pd.Index(reference.modality, dtype=object)
    for position, modality in enumerate(dict.fromkeys(reference.modality)):
        taken = (told == modality) | ((told == "") & (position == 0))
        yield modality, np.flatnonzero(known == modality), [np.flatnonzero(taken)]


def _side(table: GeneTable, rows: Positions, modality: str) -> _Side:
    """Some genes of a table, with identifiers that can be compared."""
    columns, versioned = {}, set[str]()
    for name, values in table.columns.items():
        plain, stripped = _plain((values[row] for row in rows), modality)
        columns[name] = plain
        if stripped:
            versioned.add(name)
    return _Side(columns, frozenset(versioned), len(rows))


def _plain(identifiers: Iterable[str], modality: str) -> tuple[pd.Index, bool]:
    """Identifiers without Ensembl versions, peaks in one spelling, and whether any had a version."""
    plain, stripped = [], False
    for name in identifiers:
        versioned = _VERSIONED.match(name)
        stripped |= versioned is not None
        peak = None if modality != "atac" else _PEAK.match(name)
        plain.append(versioned[1] if versioned else f"{peak[1]}:{peak[2]}-{peak[3]}" if peak else name)
    return pd.Index(plain, dtype=object), stripped


def _best(source: _Side, reference: _Side, modality: str) -> _Found:
    """The pair of columns that finds the most."""
    nothing = np.full(source.size, -1, np.int32)
    best: _Found | None = None
    for reference_column, known in reference.columns.items():
        unique = (known != "") & ~known.duplicated(keep=False)
        lookup = pd.Series(np.flatnonzero(unique), index=known[unique], dtype=np.int32)
        ambiguous = int(known[known.duplicated(keep=False) & (known != "")].nunique())
        for source_column, names in source.columns.items():
            target, notes = lookup.reindex(names).fillna(-1).to_numpy(np.int32), tuple[str, ...]()
            if modality == "protein":
                target, notes = _loosely(target, names, known)
            present = np.zeros(reference.size, dtype=bool)
            present[target[target >= 0]] = True
            if best is not None and present.sum() <= best.present.sum():
                continue
            stripped = source_column in source.versioned or reference_column in reference.versioned
            best = _Found(target, present, source_column, reference_column, stripped, ambiguous, notes)
    return best or _Found(nothing, np.zeros(reference.size, dtype=bool), "", "", False, 0, ())  # noqa: FBT003


def _loosely(target: IntArray, names: pd.Index, known: pd.Index) -> tuple[IntArray, tuple[str, ...]]:
    """Proteins that were not found by their names, by names without case and TotalSeq tag where these are unique."""
    plain, plain_known = _untagged(names), _untagged(known)
    unclear = plain.duplicated(keep=False) | (plain == "")
    unique = ~plain_known.duplicated(keep=False) & (plain_known != "")
    lookup = pd.Series(np.flatnonzero(unique), index=plain_known[unique], dtype=np.int32)
    loose = lookup.reindex(plain).fillna(-1).to_numpy(np.int32)
    # What an exact name has found is taken.
    usable = (target < 0) & (loose >= 0) & ~np.isin(loose, target[target >= 0])
    added, passed_over = usable & ~unclear, usable & unclear
    notes = []
    if added.any():
        first = int(np.flatnonzero(added)[0])
        notes.append(
            f"{int(added.sum())} proteins were found by name without case and TotalSeq tag"
            f" ('{names[first]}' as '{known[loose[first]]}')."
        )
    if passed_over.any():
        first = int(np.flatnonzero(passed_over)[0])
        notes.append(
            f"{int(passed_over.sum())} proteins of the source, such as '{names[first]}', have names that differ by"
            " case or TotalSeq tag alone and were not matched."
        )
    return np.where(added, loose, target), tuple(notes)


def _untagged(names: pd.Index) -> pd.Index:
    return pd.Index([_TAG.sub("", name.strip().lower()) for name in names], dtype=object)
