"""``scviaduct index``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from typer import Option

from pipelines import printing
from pipelines.options import AsOf, Json, Quiet, SpaceOf, StorePath


def index(
    store: StorePath,
    rebuild: Annotated[
        bool, Option("--rebuild", help="Write it again from the tables, with centroids trained anew.")
    ] = False,
    engine: Annotated[str, Option(help="inline: in this process; ray. --address and --workers imply ray.")] = "",
    address: Annotated[str | None, Option(help="Ray cluster: local, auto or HOST:PORT.")] = None,
    workers: Annotated[int | None, Option(help="Segments written at a time on Ray. [default: one a CPU]")] = None,
    reference: SpaceOf = None,
    as_of: AsOf = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Build the index of a version, which the first search of it would build.

    Only what was committed since the last index is written; the rest is taken over.
    """
    from pipelines.indexing import index as run
    from scviaduct.errors import InputError

    told = engine or ("ray" if address or workers else "inline")
    if told not in ("ray", "inline"):
        raise InputError(f"--engine {told} is not known.", "Give ray or inline.")
    made = run(
        store,
        rebuild=rebuild,
        engine="ray" if told == "ray" else "inline",
        address=address,
        workers=workers,
        reference=reference,
        as_of=as_of,
        quiet=quiet,
    )
    if as_json:
        printing.dump(asdict(made))
    else:
        typer.echo(
            f"Index of version {made.version} {made.state}: {made.cells:,} cells in {made.segments} segments,"
            f" about {made.probes} of {made.lists} lists a query, recall {made.recall:.4f}, {made.seconds:.1f} s."
        )
