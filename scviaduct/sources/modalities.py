"""What modalities are called: in files, in URIs and in a gene table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scviaduct.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

OTHER = "other"
"""Modality of features that are measured, but that no reference encodes: guides, hashtags."""

_SPELLINGS = {
    "rna": ("rna", "mrna", "scrna", "gex", "gene", "genes", "gene expression", "expression", "transcriptome"),
    "protein": (
        *("protein", "proteins", "prot", "protein expression", "adt", "ab", "abs", "antibody", "antibodies"),
        *("antibody capture", "cite", "citeseq"),
    ),
    "atac": ("atac", "scatac", "peak", "peaks", "accessibility", "chromatin accessibility", "open chromatin"),
}
_CANONICAL = {spelling: name for name, spellings in _SPELLINGS.items() for spelling in spellings}
CANONICAL = tuple(_SPELLINGS)
"""``rna``, ``protein`` and ``atac``."""


def canonical(name: str) -> str:
    """``rna``, ``protein`` or ``atac`` by its usual names, in any case; empty for an unknown one."""
    return _CANONICAL.get(" ".join(name.lower().replace("_", " ").replace("-", " ").split()), "")


def token(name: str, modality: str) -> str:
    """How a canonical URI names one modality: as the file does, and what it is where that differs."""
    return name if name == modality else f"{name}:{modality}"


def chosen_modalities(
    wanted: str | None, there: Sequence[str], where: str, parameter: str = "modality"
) -> dict[str, str]:
    """Which modalities of a file are read, and what they are.

    Parameters
    ----------
    wanted
        ``modality=`` of the URI: names as in the file or canonical ones, joined by commas; ``NAME:atac`` says what
        NAME is. None takes all that are known by name.
    there
        Names in the file, in its order.
    where
        The file, for messages.
    parameter
        What the URI calls ``wanted``.

    Returns
    -------
    dict
        Name in the file to canonical name, in the order of the file.

    Raises
    ------
    SourceError
        If none is known by name, one that is named is absent or unknown, or two are of one kind.
    """
    listed = ", ".join(there) or "none"
    if wanted is None:
        found = {name: canonical(name) for name in there if canonical(name)}
        if not found:
            raise SourceError(f"{where} has no modality of a usual name; it has: {listed}.", _declare(parameter))
    else:
        named = dict(_named(part.strip(), there, where, parameter) for part in wanted.split(","))
        found = {name: named[name] for name in there if name in named}
    for name, modality in found.items():
        twins = [other for other, same in found.items() if same == modality]
        if len(twins) > 1:
            raise SourceError(
                f"Modalities {' and '.join(twins)} of {where} are both {modality}.", f"Choose one: {parameter}={name}."
            )
    return found


def _declare(parameter: str) -> str:
    return f"Say what it is: {parameter}=NAME:rna, NAME:protein or NAME:atac."


def _named(part: str, there: Sequence[str], where: str, parameter: str) -> tuple[str, str]:
    """One modality that the user named: its name in the file, and what it is."""
    listed = f"There are: {', '.join(there) or 'none'}."
    name, _, said = part.rpartition(":")
    if part in there:
        if not canonical(part):
            raise SourceError(f"{parameter}={part}: {where} does not tell what it is.", _declare(parameter))
        return part, canonical(part)
    if name in there:
        if not canonical(said):
            raise SourceError(f"{parameter}={part}: '{said}' is no modality that is known.", _declare(parameter))
        return name, canonical(said)
    same = [other for other in there if canonical(part) and canonical(other) == canonical(part)]
    if len(same) == 1:
        return same[0], canonical(part)
    if same:
        raise SourceError(f"{parameter}={part}: {where} has several: {', '.join(same)}.", "Name one as the file does.")
    raise SourceError(f"{parameter}={part}: {where} has no such {parameter}.", listed)


def chosen_layers(wanted: str | None, modalities: Mapping[str, str], where: str) -> dict[str, str]:
    """The layer that ``layer=`` names for each modality, by name in the file.

    Parameters
    ----------
    wanted
        ``rna:counts,protein:raw``; a name without a modality is for the first one.
    modalities
        Name in the file to canonical name.
    where
        The file, for messages.

    Raises
    ------
    SourceError
        If a modality is given two layers.
    """
    layers: dict[str, str] = {}
    for part in (wanted or "").split(",") if wanted else ():
        prefix, colon, layer = part.strip().partition(":")
        name = _modality_of(prefix, modalities) if colon else None
        name, layer = (next(iter(modalities)), part.strip()) if name is None else (name, layer)
        if name in layers:
            raise SourceError(
                f"layer={wanted} names two layers of modality {name} of {where}.",
                "Write one for each modality: layer=rna:counts,protein:raw.",
            )
        layers[name] = layer
    return layers


def _modality_of(prefix: str, modalities: Mapping[str, str]) -> str | None:
    """The modality that a prefix names, as the file calls it; None if it names none."""
    if prefix in modalities:
        return prefix
    return next((name for name, modality in modalities.items() if modality == canonical(prefix)), None)
