"""From a scan to the units of a run."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING

from scviaduct.errors import InputError, SourceError
from scviaduct.values import Plan, Unit, digest

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from scviaduct.mapping.batches import QueryBatches
    from scviaduct.mapping.fleet import Fleet
    from scviaduct.references.package import Reference
    from scviaduct.sources import Source
    from scviaduct.values import Scan, Settings, Shard


@dataclass(frozen=True, slots=True)
class Bundle:
    """What one reading of a shard serves: units of one or several references.

    Attributes
    ----------
    shard
        Of all of them.
    units
        Position of the reference among those of the command, and its unit.
    """

    shard: Shard
    units: tuple[tuple[int, Unit], ...]

    @property
    def references(self) -> tuple[int, ...]:
        """Positions of the references."""
        return tuple(position for position, _ in self.units)

    def only(self, units: Collection[str]) -> Bundle:
        """The same with some of the units, by their ids."""
        return replace(self, units=tuple(pair for pair in self.units if pair[1].id in units))

    def split(self) -> tuple[Bundle, ...]:
        """One for each unit."""
        return tuple(replace(self, units=(pair,)) for pair in self.units)


def bundled(shards: Iterable[Shard], units: Sequence[Sequence[Unit]]) -> list[Bundle]:
    """Put units of the same shards together.

    Parameters
    ----------
    shards
        Of the scan that all plans were made from; bundles come in their order.
    units
        What is left of each reference's plan.
    """
    found: dict[Shard, list[tuple[int, Unit]]] = {shard: [] for shard in shards}
    for position, left in enumerate(units):
        for unit in left:
            found[unit.shard].append((position, unit))
    return [Bundle(shard, tuple(pairs)) for shard, pairs in found.items() if pairs]


def kept_types(scan: Scan, keep_obs: Sequence[str], available: Sequence[str]) -> dict[str, str]:
    """Arrow types of the kept obs columns.

    Raises
    ------
    InputError
        If a file of the source lacks one of them.
    """
    for column in keep_obs:
        if column in scan.missing:
            close = get_close_matches(column, available, n=3) or sorted(available)[:8]
            raise InputError(
                f"obs column '{column}' is not in {scan.missing[column]} (there are: {', '.join(close)}).",
                "Name existing columns: --keep-obs tissue,disease.",
            )
    return {column: scan.columns[column].type for column in keep_obs}


def make_plan(
    source: Source,
    scan: Scan,
    reference: Reference,
    settings: Settings,
    accepted: Sequence[str] = (),
    adapted: tuple[QueryBatches, Fleet] | None = None,
) -> Plan:
    """Address every unit of a run and the run itself.

    Parameters
    ----------
    source
        Gives the canonical URI and the version.
    scan
        Gives the shards.
    reference, settings
        What maps them, and how.
    accepted
        Preflight findings that were overridden.
    adapted
        The query batches of the scan and their adapters; None for a query that needs none.

    Returns
    -------
    Plan
        The same arguments give the same run id, so the same command resumes the same run.

    Raises
    ------
    SourceError
        If two files of the source hold the very same cells of the same dataset.
    """
    addresses = adapter_digests(scan, adapted)
    units = tuple(
        Unit.of(shard, reference.digest, settings, address)
        for shard, address in zip(scan.shards, addresses, strict=True)
    )
    repeated = [unit for unit, times in Counter(unit.id for unit in units).items() if times > 1]
    if repeated:
        shards = [unit.shard for unit in units if unit.id == repeated[0]]
        raise SourceError(
            f"Two files hold the same cells of dataset '{shards[0].dataset_id}': {shards[0].uri} and {shards[1].uri}.",
            "Remove one of them from the source.",
        )
    accepted = tuple(sorted(accepted))
    # The run names the data as the user sees it (uri) as well as by content (units): two mirrors of a release are two
    # runs over the same units, and the second finds nothing to do.
    run = digest(reference.digest, source.uri, asdict(settings), [unit.id for unit in units], accepted)[:16]
    named = reference.name, reference.digest, source.uri, source.version
    fleet = adapted[1] if adapted else None
    told = tuple((batch.key, fleet.addresses.get(batch, "")) for batch in adapted[0].cells) if adapted and fleet else ()
    return Plan(run, *named, settings, units, accepted, told, decoder=bool(fleet and fleet.decoder))


def adapter_digests(scan: Scan, adapted: tuple[QueryBatches, Fleet] | None) -> list[str]:
    """What each shard's unit id says of the adapters of its cells."""
    if adapted is None:
        return [""] * len(scan.shards)
    found, fleet = adapted
    return [fleet.digest(held.cells) for held in found.shards]
