"""The checks of preflight that look at genes: are the reference's there, and how were they found?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scviaduct.mapping.finding import Finding

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from scviaduct.mapping.genes import GeneMatch
    from scviaduct.values import FloatArray

STOP_BELOW = 0.5
"""A reference whose measured genes carry less than this share of the encoder's influence does not fit."""
WARN_BELOW = 0.8
_CHECK = {"protein": "proteins", "atac": "peaks"}
"""Modality to the check of :mod:`scviaduct.mapping.panelchecks` that says why nothing of it is found."""


def genes(
    matches: Mapping[str, GeneMatch],
    influence: FloatArray,
    optional: Sequence[str] = (),
    told: Collection[str] = (),
) -> Iterator[Finding]:
    """Are the reference's genes there, and how were they found? Judged by the file that has fewest.

    A modality that the family can do without, and of which nothing is there, is left out of the share: it was not
    measured. ``told`` names findings that already say why a modality is not found.
    """
    if not matches:
        return
    shares = {uri: _weighted_share(match, influence, optional) for uri, match in matches.items()}
    uri = min(shares, key=lambda key: shares[key])
    worst, weighted = matches[uri], shares[uri]
    found, total = int(worst.present.sum()), len(worst.present)
    where = f" in {uri}" if len(matches) > 1 else ""
    kinds = {name: worst.found(name) for name in worst.modalities} if len(worst.modalities) > 1 else {}
    each = "".join(f"; {name} {have:,} of {size:,}" for name, (have, size) in kinds.items())
    message = f"{found:,} of {total:,} reference genes ({worst.share:.1%}; {weighted:.1%} by influence{each}){where}."
    figures = {"found": found, "genes": total, "share": worst.share, "weighted_share": weighted, "files": len(matches)}
    if weighted < STOP_BELOW:
        remedy = f"The latent needs at least {STOP_BELOW:.0%} by influence: choose a reference trained on these genes."
        yield Finding("genes", "stop", message, remedy, overridable=found > 0, figures=figures)
    elif weighted < WARN_BELOW:
        yield Finding("genes", "warn", message, "Missing genes read as zero.", figures=figures)
    elif absent := [name for name, (have, _) in kinds.items() if not have and _CHECK.get(name) not in told]:
        remedy = f"Encoded without {' and '.join(absent)}. If the source has it, name it: proteins=KEY or modality=..."
        yield Finding("genes", "warn", message, remedy, figures=figures)
    else:
        yield Finding("genes", "ok", message, figures=figures)
    if found:
        yield _ids(worst)


def _weighted_share(match: GeneMatch, influence: FloatArray, optional: Sequence[str]) -> float:
    absent = [name for name in match.modalities if name in optional and not match.found(name)[0]]
    if not absent or len(absent) == len(match.modalities):
        return match.weighted_share(influence)
    kept = ~np.isin(np.array(match.modality, object), absent)
    total = float(influence[kept].sum())
    return float(influence[kept & match.present].sum()) / total if total > 0 else 0.0


def _ids(match: GeneMatch) -> Finding:
    notes = [f"source '{match.source_column}' with reference '{match.reference_column}'"]
    if match.versions_stripped:
        notes.append("Ensembl versions ignored")
    if match.summed:
        notes.append(f"{match.summed:,} source genes summed into one that means the same")
    if match.ambiguous:
        notes.append(f"{match.ambiguous:,} reference identifiers name several genes and were not matched")
    notes += [note.removesuffix(".") for note in match.notes]
    figures = {"summed": match.summed, "ambiguous": match.ambiguous}
    return Finding("gene-ids", "ok", f"Matched {'; '.join(notes)}.", figures=figures)
