"""What was found out about the data, as sentences with their figures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from scviaduct.references.choosing.columns import MIN_GROUP, complete_enough, has_control
from scviaduct.references.choosing.commands import FEW_CELLS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from scviaduct.references.choosing.columns import Column
    from scviaduct.references.choosing.profile import Profile

    Figures = dict[str, float | int | str]

_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Property:
    """One thing that was found out about the data.

    Attributes
    ----------
    name
        What it is about: ``cells``, ``modalities``, ``counts``, ``labels``, ``batch``, ``samples``, ``perturbation``,
        ``organism`` or ``references``.
    found
        A sentence with the figures.
    level
        ``ok``, ``warn``, or ``unknown`` where it cannot be told.
    figures
        The numbers behind the sentence.
    """

    name: str
    found: str
    level: Literal["ok", "warn", "unknown"] = "ok"
    figures: Mapping[str, float | int | str] = field(default_factory=dict)


def properties_of(profile: Profile) -> tuple[Property, ...]:
    """Everything worth saying of a profile."""
    return tuple(_properties(profile))


def _properties(p: Profile) -> Iterator[Property]:
    few = f"; fewer than {FEW_CELLS:,} are few to train on" if p.cells < FEW_CELLS else ""
    yield Property("cells", f"{p.cells:,} cells{few}.", "warn" if few else "ok", {"cells": p.cells})
    yield _modalities(p)
    yield _counts(p)
    yield _labels(p)
    yield _batch(p)
    yield _samples(p)
    yield _perturbation(p)
    if p.organism:
        yield Property("organism", f"{p.organism}.", figures={"organism": p.organism})
    else:
        yield Property("organism", "Cannot tell: neither obs nor the identifiers of the genes say it.", "unknown")
    yield _references(p)


def _modalities(p: Profile) -> Property:
    told = ", ".join(f"{count:,} {name}" for name, count in p.features.items()) or "none that is known"
    figures: Figures = {**p.features}
    if len(p.features) > 1:
        figures["paired"] = p.paired
        told += f"; {p.paired:.0%} of the sampled cells have counts in all of them"
    if p.declared:
        return Property("modalities", f"{told}. {p.declared}.", "warn", figures)
    if not p.named:
        return Property("modalities", f"{told}; the source does not say so, genes are assumed.", figures=figures)
    return Property("modalities", f"{told}.", figures=figures)


def _counts(p: Profile) -> Property:
    figures: Figures = {"sampled": p.sampled, "layer": p.layer}
    if not p.sampled:
        return Property("counts", f"Cannot tell: {p.unread or 'no cell could be read'}.", "unknown", figures)
    if p.wrong:
        return Property("counts", f"{'; '.join(p.wrong.values())} ({p.layer}).", "warn", figures)
    if p.unread:
        told = f"In {p.layer}; checked in {p.sampled:,} cells, others cannot be read: {p.unread}"
        return Property("counts", told, "warn", figures)
    return Property("counts", f"In {p.layer}; checked in {p.sampled:,} cells.", figures=figures)


def _labels(p: Profile) -> Property:
    c = p.labels
    if c is None:
        return Property("labels", "No column of labels was found by its name.")
    told = f"'{c.name}': {len(c.values):,} labels, {c.lacking:,} cells without{_untold(c)}{_others(p, 'labels')}."
    figures: Figures = {"column": c.name, "labels": len(c.values), "without": c.lacking}
    return Property("labels", told, "ok" if complete_enough(c, p.cells) else "warn", figures)


def _batch(p: Profile) -> Property:
    c = p.batch
    if c is None:
        return Property("batch", "No column of batches was found by its name.")
    mean = c.told / len(c.values)
    told = f"'{c.name}': {_number(len(c.values), 'batch', 'batches')} of {mean:,.0f} cells on average"
    told += f", {c.missing:,} cells without" if c.missing else ""
    figures: Figures = {"column": c.name, "batches": len(c.values), "cells_per_batch": mean}
    return Property(
        "batch", f"{told}{_others(p, 'batch')}.", "warn" if c.missing or mean < MIN_GROUP else "ok", figures
    )


def _samples(p: Profile) -> Property:
    c = p.samples
    if c is None:
        return Property("samples", "No column of several samples or donors was found by its name.")
    told = f"'{c.name}': {len(c.values):,} samples"
    for name, counts in p.conditions.items():
        told += f"; '{name}' is constant within each ({_some(counts)})"
    if not p.conditions:
        told += "; no column that is constant within each sets them apart"
    told += "" if c.sure else f"; cannot tell whether '{c.name}' is a donor"
    figures: Figures = {"column": c.name, "samples": len(c.values)}
    return Property("samples", f"{told}.", "ok" if c.sure else "unknown", figures)


def _perturbation(p: Profile) -> Property:
    c = p.perturbation
    if c is None:
        return Property("perturbation", "No column of perturbations was found by its name.")
    figures: Figures = {"column": c.name, "values": len(c.values), "control_cells": c.in_control}
    told = f"'{c.name}': {len(c.values):,} values"
    if not has_control(c):
        return Property("perturbation", f"{told}, no control among them ({_some(c.values)}).", figures=figures)
    told += f", control {', '.join(c.controls[:_SHOWN])} ({c.in_control:,} cells)"
    return Property("perturbation", f"{told}, {c.lacking:,} cells without{_untold(c)}.", figures=figures)


def _references(p: Profile) -> Property:
    able = sum(fit.fits for fit in p.fits)
    told = "; ".join(
        f"{fit.reference} ({fit.family}) {'fits' if fit.fits else 'does not fit'}: {fit.why}" for fit in p.fits
    )
    figures: Figures = {"registered": len(p.fits), "fitting": able, "broken": len(p.broken)}
    torn = "".join(f" '{name}' cannot be read: {why}" for name, why in p.broken.items())
    head = f"{len(p.fits)} registered, {able} fitting. {told}." if p.fits else "None is registered."
    return Property("references", f"{head}{torn}", "warn" if torn else "ok", figures)


def _untold(c: Column) -> str:
    told = ", ".join(f"'{value}'" for value in c.untold)
    return f" ({told})" if told else ""


def _others(p: Profile, role: str) -> str:
    names = p.others.get(role, ())
    return f"; also {', '.join(names)}" if names else ""


def _some(counts: Mapping[str, int]) -> str:
    shown = ", ".join(f"{count:,} {value}" for value, count in list(counts.items())[:_SHOWN])
    return f"{shown}, ..." if len(counts) > _SHOWN else shown


def _number(count: int, one: str, several: str) -> str:
    return f"{count:,} {one if count == 1 else several}"
