"""``scviaduct land``."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer import Argument, Option

from pipelines import printing_landing as printing
from pipelines.options import SOURCE_HELP, Json, Quiet


def land(
    out: Annotated[str, Option(help="Folder of the landing; made if absent, refreshed if there.")],
    source: Annotated[str | None, Argument(metavar="SOURCE", help=SOURCE_HELP)] = None,
    piece_cells: Annotated[
        int | None, Option(help="Cells of a piece. [default: those of the landing that is there, or 16384]")
    ] = None,
    engine: Annotated[str, Option(help="ray, or inline: in this process.")] = "ray",
    address: Annotated[str | None, Option(help="Ray cluster: local, auto or HOST:PORT.")] = None,
    readers: Annotated[int | None, Option(help="Pieces at a time. [default: one a CPU]")] = None,
    prune: Annotated[
        bool, Option("--prune", help="Remove pieces that the landing names no more; without SOURCE, do only that.")
    ] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Say what would be written and reused, then stop.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Transcode a source once into compressed integers, which later runs read many times faster.

    The folder is a source itself: give it to `map`, `check`, `train` or `derive` in the place of SOURCE. The same
    command goes on where it was, does nothing where nothing changed, and writes only what a newer version of the source
    has changed. Exit status 4 where cells or counts cannot be read.
    """
    from pipelines.landing import land as run

    where: dict[str, Any] = {"engine": engine, "address": address, "readers": readers}
    result = run(source, out=out, piece_cells=piece_cells, **where, prune=prune, dry_run=dry_run, quiet=quiet)
    printing.landing(result, as_json=as_json)
    raise typer.Exit(result.exit_status)
