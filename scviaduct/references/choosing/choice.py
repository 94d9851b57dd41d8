"""Choosing a reference to map to, or a family to train, from what a source holds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from scviaduct.errors import InputError, SourceError
from scviaduct.references.choosing import columns
from scviaduct.references.choosing.commands import (
    add_command,
    map_command,
    notes_of,
    others_of,
    questions_of,
    search_command,
    train_command,
)
from scviaduct.references.choosing.fits import fits_of, scan_columns
from scviaduct.references.choosing.profile import AIMS, SAMPLE_CELLS, profile_of, undeclared, with_parameters
from scviaduct.references.choosing.properties import Property, properties_of
from scviaduct.references.choosing.tree import TREE, Step, explained, usable, walk
from scviaduct.sources import open_source

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from scviaduct.references.choosing.profile import Aim, Profile
    from scviaduct.references.choosing.tree import Leaf
    from scviaduct.references.package import Reference

_EXIT = {"reference": 0, "family": 0, "nothing": 1, "cannot tell": 3}


@dataclass(frozen=True, slots=True)
class Alternative:
    """What else would do.

    Attributes
    ----------
    name
        A reference or a family.
    why
        When it is the better choice.
    command
        To run next.
    """

    name: str
    why: str
    command: str


@dataclass(frozen=True, slots=True)
class Choice:
    """What to do with a source, and why.

    Attributes
    ----------
    source, version, aim
        What it was asked of; ``source`` has the parameters that declare proteins or peaks.
    kind
        ``reference``, ``family``, ``nothing`` or ``cannot tell``.
    name
        Of the registered reference or the family; empty otherwise.
    why
        In a sentence.
    steps
        The questions of the tree, with the figure that answered each.
    properties
        What was found out about the data.
    commands
        To run next, in this order.
    notes
        What to know before they are run.
    alternatives
        What else would do, and when.
    """

    source: str
    version: str
    aim: Aim
    kind: Literal["reference", "family", "nothing", "cannot tell"]
    name: str
    why: str
    steps: tuple[Step, ...]
    properties: tuple[Property, ...]
    commands: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    alternatives: tuple[Alternative, ...] = ()

    @property
    def exit_status(self) -> int:
        """0 where there is something to run, 1 where there is nothing, 3 where it cannot be told."""
        return _EXIT[self.kind]

    def explained(self) -> Iterator[str]:
        """The whole tree as lines, with the branch taken marked by ``>``."""
        return explained(self.steps)


def choose(
    source: str,
    references: Sequence[Reference] = (),
    *,
    aim: Aim = "",
    broken: Mapping[str, str] | None = None,
    shard_cells: int = 16_384,
    sample: int = SAMPLE_CELLS,
) -> Choice:
    """Walk the decision tree on what a source holds.

    Reads the obs columns whose names may mean something, the gene list of the sampled files, and the counts of a
    bounded sample. What the cells' own labels are does not enter.

    Parameters
    ----------
    source
        URI of the cells.
    references
        The registered ones.
    aim
        ``map``, ``integrate``, ``compare-samples`` or ``perturbation``; empty lets the data decide.
    broken
        Registered references that cannot be read, with the reason.
    shard_cells
        Cells of a shard of the scan.
    sample
        Cells whose counts are looked at, at most.

    Raises
    ------
    InputError
        If the aim is none, or the source cannot be opened.
    """
    if aim and aim not in AIMS:
        raise InputError(f"--aim {aim}: there is no such aim.", f"One of {', '.join(AIMS)}, or leave it out.")
    profile = _profile(source, references, aim, shard_cells, sample)
    profile = replace(profile, broken=dict(broken or {}))
    name, steps = walk(profile)
    leaf: Any = TREE[name]
    told = _told(profile, leaf, steps)
    return Choice(profile.uri, profile.version, aim, leaf.kind, steps=steps, properties=properties_of(profile), **told)


def _profile(
    uri: str, references: Sequence[Reference], aim: Aim, shard_cells: int, sample: int, declared: str = ""
) -> Profile:
    """Open, scan and look; a second time where the file holds more than it says."""
    with open_source(uri) as opened:
        wanted = [*columns.candidates(opened.obs_columns()), *scan_columns(references)]
        scan = opened.scan(shard_cells, wanted)
        more, why = undeclared(opened, scan, uri) if not declared else ({}, "")
        if not more:
            profile = profile_of(opened, scan, uri, aim, sample)
            batch = profile.batch.name if profile.batch else ""
            fits = fits_of(opened, scan, references, profile.features, batch) if scan.shards else ()
            return replace(profile, fits=fits, declared=declared)
    told = ", ".join(f"{name}={value}" for name, value in more.items())
    try:
        return _profile(with_parameters(uri, more), references, aim, shard_cells, sample, f"{why}: {told} is added")
    except SourceError as error:
        return _profile(uri, references, aim, shard_cells, sample, f"{why}, and cannot be read: {error}")


def _told(profile: Profile, leaf: Leaf, steps: tuple[Step, ...]) -> dict[str, Any]:
    """Name, reason, commands, notes and alternatives of a leaf."""
    last = steps[-1]
    if leaf.kind == "family":
        return {
            "name": leaf.family,
            "why": f"{leaf.family} {leaf.why}: {last.figure}.",
            "commands": (train_command(profile, leaf.family), add_command(profile, leaf.family)),
            "notes": notes_of(profile, leaf.family),
            "alternatives": (
                *_partial(profile),
                *_trained(profile, questions_of(profile, leaf.family)),
                *_trained(profile, others_of(profile, leaf.family)),
            ),
        }
    if leaf.kind != "reference":
        return {"name": "", "why": f"{last.figure[0].upper()}{last.figure[1:]}. {leaf.why}"}
    best, *others = usable(profile, leaf.family)
    as_well = [Alternative(fit.reference, f"fits as well: {fit.why}", map_command(profile, fit)) for fit in others]
    return {
        "name": best.reference,
        "why": f"Reference '{best.reference}' ({best.family}) fits: {best.why}.",
        "commands": (map_command(profile, best),),
        "notes": (f"'{best.batch_key}' plays the reference's batch.",) if best.batch_key else (),
        "alternatives": (*as_well, *_own(profile), *_trained(profile, questions_of(profile, best.family))),
    }


def _trained(profile: Profile, families: Iterable[tuple[str, str]]) -> Iterator[Alternative]:
    for name, why in families:
        yield Alternative(name, why, train_command(profile, name))


def _own(profile: Profile) -> Iterator[Alternative]:
    """What would be trained if no reference were asked for."""
    alone = replace(profile, aim="integrate")
    leaf: Any = TREE[walk(alone)[0]]
    if leaf.kind == "family":
        why = "to integrate these cells among themselves (--aim integrate)"
        yield Alternative(leaf.family, why, train_command(alone, leaf.family))


def _partial(profile: Profile) -> Iterator[Alternative]:
    """References that fit and leave a modality unused, and a place to look for others."""
    if profile.aim in ("", "map"):
        for fit in profile.fits:
            if fit.fits:
                yield Alternative(fit.reference, fit.why, map_command(profile, fit))
        if profile.tissue:
            yield Alternative("a published reference", f"one of {profile.tissue} may fit", search_command(profile))
