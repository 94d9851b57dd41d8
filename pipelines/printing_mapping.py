"""What ``map`` prints."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from pipelines.printing import dump, quarantined
from pipelines.printing_landing import landing as print_landing
from pipelines.results import MapResults

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipelines.results import MapResult
    from pipelines.surgery import BatchAdapter


def mapping(found: MapResult | MapResults, *, as_json: bool) -> None:
    """Print what a map run came to, or what each of several did."""
    if isinstance(found, MapResults):
        if as_json:
            runs = [_facts(run) for run in found.runs]
            landed = asdict(found.landing) if found.landing else None
            dump({"exit_status": found.exit_status, "seconds": found.seconds, "runs": runs, "landing": landed})
            return
        for run in found.runs:
            _run(run, f"{run.reference}: ")
        typer.echo(f"{len(found.runs)} references on one reading: {found.seconds:.1f} s.")
    elif as_json:
        dump(_facts(found))
        return
    else:
        _run(found)
    if found.landing:
        print_landing(found.landing, as_json=False)


def _facts(found: MapResult) -> dict[str, Any]:
    return {"exit_status": found.exit_status, **asdict(found)}


def _run(found: MapResult, of: str = "") -> None:
    """What a run came to, in one line; before it what could not be done, and the adapters."""
    quarantined(found.quarantined, of)
    _adapted(found.adapters, of)
    spent = sum(found.seconds.values())
    size = f"{found.cells:,} cells in {found.units:,} unit{'s' * (found.units != 1)}"
    run = f"{of}Run {found.run}"
    if found.state == "planned" and not found.run:
        typer.echo(f"{of}A run would fit those adapters, then map {size}; nothing was done (--dry-run).")
    elif found.state == "planned":
        typer.echo(f"{run} would map {size}; nothing was mapped (--dry-run).")
    elif found.state == "nothing to do":
        typer.echo(f"{run}: nothing to do, version {found.version} holds its {size}.")
    elif found.state == "failed":
        typer.echo(f"{run}: all of its {size} are in quarantine; nothing was committed.")
    else:
        left = f", {len(found.quarantined):,} in quarantine" if found.quarantined else ""
        held = f"{found.cells_done:,} of its {size}" if found.quarantined else f"its {size}"
        took = "" if of else f"; {spent:.1f} s"
        typer.echo(f"{run}: version {found.version} holds {held} ({found.mapped_units:,} mapped now{left}{took}).")


def _adapted(found: Sequence[BatchAdapter], of: str) -> None:
    """What became of new batches: one line, and the reasons of those that failed."""
    if not found:
        return
    counts = Counter(item.state for item in found)
    told = ", ".join(f"{count:,} {state}" for state, count in counts.items())
    cells = sum(item.cells for item in found)
    typer.echo(f"{of}Adapters for {len(found):,} new batch{'es' * (len(found) != 1)} ({cells:,} cells): {told}.")
    for item in found:
        if item.state == "failed":
            typer.echo(f"{of}No adapter for {item.batch} ({item.cells:,} cells): {item.reason}", err=True)
