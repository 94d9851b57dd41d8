"""Matching the genes of a source to those of a reference.

Either side may carry several identifiers per gene: Ensembl ids with or without a version, symbols, or both. Every pair
of identifier columns is tried, and the pair that finds the most reference genes wins.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from scviaduct.values import FloatArray, GeneTable, IntArray

# ENSG00000141510.19 and ENSMUSG00000059552.14 lose the version; ENSG00000182378.15_PAR_Y is a locus of its own and
# keeps its whole name, so that it is never summed into its X-chromosomal twin.
_VERSIONED = re.compile(r"^(ENS[A-Z]*G\d{11})\.\d+$")


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
        Identifier columns that were matched.
    versions_stripped
        True if an Ensembl version suffix was dropped on either side.
    summed
        Source genes that share their target with an earlier one.
    ambiguous
        Reference identifiers in ``reference_column`` that name several reference genes; these are not matched.
    """

    target: IntArray
    present: np.ndarray[tuple[int], np.dtype[np.bool_]]
    source_column: str
    reference_column: str
    versions_stripped: bool
    summed: int
    ambiguous: int

    @property
    def share(self) -> float:
        """Share of the reference's genes that the source measures."""
        return float(self.present.mean()) if len(self.present) else 0.0

    def weighted_share(self, influence: FloatArray) -> float:
        """Share of the encoder's influence that the measured genes carry.

        Parameters
        ----------
        influence
            float32, shape ``(n_reference_genes,)``; how much each gene moves the encoder, non-negative.
        """
        total = float(influence.sum())
        return float(influence[self.present].sum()) / total if total > 0 else self.share


def _plain(identifiers: tuple[str, ...]) -> tuple[pd.Index, bool]:
    """Identifiers without Ensembl versions, and whether any had one."""
    matches = [_VERSIONED.match(name) for name in identifiers]
    plain = [match.group(1) if match else name for match, name in zip(matches, identifiers, strict=True)]
    return pd.Index(plain, dtype=object), any(match is not None for match in matches)


def match_genes(source: GeneTable, reference: GeneTable) -> GeneMatch:
    """Find the reference gene of every source gene.

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
    sources = {name: _plain(values) for name, values in source.columns.items()}
    best: GeneMatch | None = None
    for reference_column, values in reference.columns.items():
        known, known_versions = _plain(values)
        unique = (known != "") & ~known.duplicated(keep=False)
        lookup = pd.Series(np.flatnonzero(unique), index=known[unique], dtype=np.int32)
        ambiguous = int(known[known.duplicated(keep=False) & (known != "")].nunique())
        for source_column, (names, versions) in sources.items():
            target = lookup.reindex(names).fillna(-1).to_numpy(np.int32)
            present = np.zeros(len(reference), dtype=bool)
            present[target[target >= 0]] = True
            if best is not None and present.sum() <= best.present.sum():
                continue
            stripped = versions or known_versions
            summed = int((target >= 0).sum() - present.sum())
            best = GeneMatch(target, present, source_column, reference_column, stripped, summed, ambiguous)
    if best is None:
        nothing = np.full(len(source), -1, np.int32)
        return GeneMatch(nothing, np.zeros(len(reference), dtype=bool), "", "", False, 0, 0)  # noqa: FBT003
    return best
