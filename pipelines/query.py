"""A query that passed the gate: its shards, what the checks found, and which of its batches need adapters."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, cast, get_args

from scviaduct.errors import InputError
from scviaduct.families import family
from scviaduct.mapping import preflight
from scviaduct.mapping.batches import group_columns, query_batches, read_covariates
from scviaduct.mapping.fitting import Training
from scviaduct.mapping.planning import kept_types, make_plan
from scviaduct.mapping.surgery import CELLS, Mode, Surgery, trained_kl_weight
from scviaduct.store.schema import cells_schema

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from scviaduct.mapping.batches import QueryBatches
    from scviaduct.mapping.fleet import Fleet
    from scviaduct.mapping.preflight import Report
    from scviaduct.references.package import Reference
    from scviaduct.sources import Source
    from scviaduct.values import Plan, Scan, Settings


@dataclass(frozen=True, slots=True)
class Query:
    """Cells that fit a reference.

    Attributes
    ----------
    source
        Open.
    reference, settings
        What maps them, and how.
    scan
        Of the source.
    report
        Of the preflight.
    surgery
        How new batches are fitted.
    batches
        The query's new batches; None where none needs an adapter.
    """

    source: Source
    reference: Reference
    settings: Settings
    scan: Scan
    report: Report
    surgery: Surgery
    batches: QueryBatches | None

    @property
    def fractional(self) -> bool:
        """Whether the user lets counts through that are not whole."""
        return "counts" in self.report.overridden

    def plan(self, fleet: Fleet | None) -> Plan:
        """The units, addressed by what maps them."""
        adapted = (self.batches, fleet) if self.batches and fleet else None
        return make_plan(self.source, self.scan, self.reference, self.settings, self.report.accepted, adapted)


@dataclass(frozen=True, slots=True)
class Asked:
    """What cells are to be mapped with.

    Attributes
    ----------
    reference
        The package.
    surgery
        How new batches are fitted.
    """

    reference: Reference
    surgery: Surgery

    def columns(self, settings: Settings) -> tuple[str, ...]:
        """obs columns that the checks and the surgery look at."""
        controls = (pair.partition("=")[0] for pair in self.surgery.background)
        return (*preflight.scan_columns(self.reference, settings), *controls)

    def groups(self, settings: Settings) -> tuple[str, ...]:
        """obs columns that tell query batches apart."""
        if self.surgery.mode == "off":
            return ()
        return group_columns(self.reference, settings, decoder=self.surgery.decoder)


def scan_query(
    source: Source,
    asked: Sequence[Asked],
    settings: Settings,
    keep_obs: Sequence[str] = (),
    shard_cells: int = 0,
) -> tuple[list[Scan], Settings]:
    """Scan a source once, for what the checks, the surgery and the store need.

    Parameters
    ----------
    source
        Open.
    asked
        The references.
    settings
        Of the mapping.
    keep_obs, shard_cells
        As ``map`` takes them.

    Returns
    -------
    tuple
        What a scan for each reference alone says, all of the same shards; and the settings with the types of kept
        columns.

    Raises
    ------
    InputError
        If a kept column is not there or has a name that the store needs itself, or no cell is a named control.
    """
    there = source.obs_columns()
    columns = dict.fromkeys([*(name for one in asked for name in one.columns(settings)), *keep_obs])
    groups = tuple(dict.fromkeys(name for one in asked for name in one.groups(settings)))
    scan = source.scan(shard_cells, list(columns), groups)
    settings = replace(settings, keep_obs=kept_types(scan, keep_obs, there))
    cells_schema(settings.keep_obs)
    scans = [_share(scan, groups, (*one.columns(settings), *keep_obs), one.groups(settings)) for one in asked]
    for one, share in zip(asked, scans, strict=True):
        _require_background(share, one.surgery)
    return scans, settings


def _share(scan: Scan, grouped: Sequence[str], columns: Sequence[str], groups: Sequence[str]) -> Scan:
    """What a scan for some of the columns and groups says."""
    own = {*columns, *groups}
    counts = scan.groups
    if tuple(groups) != tuple(grouped):
        at = [grouped.index(name) for name in groups]
        counts = tuple(_projected(shard, at) for shard in scan.groups) if at else ()
    return replace(
        scan,
        columns={name: summary for name, summary in scan.columns.items() if name in columns},
        missing={name: where for name, where in scan.missing.items() if name in own},
        groups=counts,
    )


def _projected(counts: Mapping[tuple[str | None, ...], int], at: Sequence[int]) -> dict[tuple[str | None, ...], int]:
    """Cells by the values of some of the columns."""
    found: Counter[tuple[str | None, ...]] = Counter()
    for values, cells in counts.items():
        found[tuple(values[i] for i in at)] += cells
    return dict(found)


def _require_background(scan: Scan, surgery: Surgery) -> None:
    """Refuse controls that no cell is one of: every cell would be taken for a target, in silence."""
    for pair in surgery.background:
        column, _, value = pair.partition("=")
        if column in scan.missing:
            raise InputError(
                f"--background {pair}: {scan.missing[column]} has no obs column '{column}'.",
                "E.g. --background guide=NT.",
            )
        known = scan.columns[column]
        if value not in known.counts and not known.truncated:
            close = ", ".join(get_close_matches(value, known.counts, n=3) or list(known.counts)[:8])
            raise InputError(f"--background {pair}: no cell has '{value}' in '{column}'.", f"There are: {close}.")


def batches_of_query(reference: Reference, settings: Settings, scan: Scan, surgery: Surgery) -> QueryBatches | None:
    """The query's new batches; None where none needs an adapter.

    Parameters
    ----------
    reference, settings, surgery
        What maps, and how.
    scan
        Of a query that passed the checks.
    """
    if surgery.mode == "off" or not read_covariates(reference, settings, decoder=surgery.decoder):
        return None
    found = query_batches(reference, settings, scan, decoder=surgery.decoder)
    return found if found.cells else None


def told_surgery(
    mode: str, cells: int | None, epochs: int | None, background: Sequence[str], reference: Reference
) -> Surgery:
    """What was told of surgery.

    Parameters
    ----------
    mode, cells, epochs, background
        As ``map`` takes them.
    reference
        The package.

    Raises
    ------
    InputError
        If a value cannot be, naming it.
    """
    if mode not in get_args(Mode):
        raise InputError(f"--surgery '{mode}' is not a way of surgery.", "There are: auto, decoder, off.")
    for option, value in (("cells", cells), ("epochs", epochs)):
        if value is not None and value < 1:
            raise InputError(f"--surgery-{option} {value} fits nothing.", "Give at least 1, or --surgery off.")
    name = reference.family
    if background and not family(name).needs.background:
        raise InputError(
            f"--background {' '.join(background)}: a {name} tells no background from targets.", "Leave the option out."
        )
    for pair in background:
        column, equals, text = pair.partition("=")
        if not (column and equals and text):
            raise InputError(f"--background {pair}: it is not a column and a value.", "E.g. --background guide=NT.")
    training = replace(Training(), kl_weight=trained_kl_weight(reference))
    if epochs is not None:
        training = replace(training, epochs=epochs)
    return Surgery(cast("Mode", mode), CELLS if cells is None else cells, training, tuple(background))
