"""``scviaduct choose``: which reference or family, why, and what to run next."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, cast

import typer
from typer import Option

from pipelines import printing
from pipelines.options import Json, Source

if TYPE_CHECKING:
    from scviaduct.references.choosing.choice import Choice
    from scviaduct.references.choosing.profile import Aim

_HEADS = {"reference": "Map to", "family": "Train", "nothing": "Nothing fits", "cannot tell": "Cannot tell"}


def choose(
    source: Source,
    aim: Annotated[
        str | None,
        Option(help="map, integrate, compare-samples or perturbation. [default: decided from the data]"),
    ] = None,
    explain: Annotated[bool, Option("--explain", help="Print the whole tree, with the branch taken marked.")] = False,
    as_json: Json = False,
) -> None:
    """Say which registered reference fits, or which family to train, and why. Exit status: 0, 1 none, 3 cannot tell."""
    from pipelines.choosing import choose as run

    found = run(source, aim=cast("Aim", aim or ""))
    if as_json:
        told = asdict(found) | {"exit_status": found.exit_status}
        printing.dump(told | ({"tree": list(found.explained())} if explain else {}))
    else:
        _print(found, explain=explain)
    raise typer.Exit(found.exit_status)


def _print(found: Choice, *, explain: bool) -> None:
    levels = {"ok": "", "warn": "!", "unknown": "?"}
    rows = [(item.name, levels[item.level], item.found) for item in found.properties]
    printing.table(("property", "", "found"), rows, title=found.source)
    if explain:
        typer.echo("\n".join(["", *found.explained()]))
    else:
        printing.table(("question", "answer", "because"), [(s.question, s.answer, s.figure) for s in found.steps])
    typer.echo(f"\n{_HEADS[found.kind]}{f' {found.name}' if found.name else ''}. {found.why}")
    for note in found.notes:
        typer.echo(f"Note: {note}")
    for command in found.commands:
        typer.echo(f"  {command}")
    for other in found.alternatives:
        typer.echo(f"\nOr {other.name}, {other.why}:\n  {other.command}")
