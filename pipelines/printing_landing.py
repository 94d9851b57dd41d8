"""What the command line prints of a landing."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from pipelines.printing import dump

if TYPE_CHECKING:
    from pipelines.landed import LandResult


def landing(result: LandResult, *, as_json: bool) -> None:
    """Print what landing came to."""
    if as_json:
        dump({**asdict(result), "pruned": result.pruned._asdict() if result.pruned else None})
        return
    for item in result.unreadable:
        typer.echo(
            f"Unreadable: {item.dataset_id} rows {item.start}-{item.stop} ({item.cells:,} cells):\n{item.reason}"
        )
    for name, reason in result.left_out.items():
        typer.echo(f"obs column '{name}' is left out: {reason}")
    if line := _line(result):
        typer.echo(line)
    if result.fractional:
        typer.echo(
            f"{_counted(result.fractional, 'piece')} {'has' if result.fractional == 1 else 'have'} counts that are not"
            " whole numbers; they are kept as float32."
        )
    if result.pruned is not None:
        verb = "would go" if result.state == "planned" else "removed"
        typer.echo(f"Pruning: {_counted(result.pruned.removed, 'file')} {verb}, {_size(result.pruned.nbytes)}.")


def _line(result: LandResult) -> str:
    held = f"{result.cells:,} cells in {_counted(result.pieces, 'piece')}"
    new = f"{result.written:,} written, {result.reused:,} reused"
    unread = len(result.unreadable)
    match result.state:
        case "planned" if result.written or result.reused:
            return f"{held}: {result.written:,} to write (about {_size(result.nbytes)}), {result.reused:,} reused."
        case "nothing to do":
            return f"Nothing to do: {result.landing} holds version {result.version} ({held}, {_size(result.nbytes)})."
        case "landed":
            without = f", {unread:,} without counts" if unread else ""
            took = f"; {result.seconds['land']:.1f} s" if result.seconds else ""
            return f"{result.landing} holds {held}, {_size(result.nbytes)} ({new}{without}{took})."
        case "failed":
            return (
                f"Not published: cells of {_counted(unread, 'piece')} cannot be read. What is complete is kept ({new})."
            )
    return ""


def _counted(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


def _size(nbytes: int) -> str:
    """Bytes for people."""
    size, unit = float(nbytes), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"
