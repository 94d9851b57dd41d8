"""The command line. Each command is the Python call of the same name in :mod:`pipelines`.

Exit status: 0 done; 1 not fit, or verification failed; 2 wrong input; 3 cannot tell; 4 committed, with units in
quarantine; 5 the machines gave way (disk, network, cluster); 130 interrupted.
"""

from __future__ import annotations

import atexit
import gc
import io
import os
import signal
import sys
from typing import Annotated, Any, override

import typer
from typer import Argument, Option
from typer.core import TyperGroup

from pipelines import printing
from pipelines.cli_adapter import app as adapter_app
from pipelines.cli_choose import choose
from pipelines.cli_derive import derive
from pipelines.cli_index import index
from pipelines.cli_land import land as land_
from pipelines.cli_publish import publish
from pipelines.cli_reference import app as reference_app
from pipelines.cli_train import train
from pipelines.options import (
    SOURCE_HELP,
    Accept,
    AsOf,
    BatchKey,
    Json,
    Quiet,
    Ref,
    SampleKey,
    Source,
    SpaceOf,
    StorePath,
    SurgeryMode,
    Where,
    listed,
)
from scviaduct import __version__
from scviaduct.errors import ScviaductError

MACHINE = 5
"""Exit status after an error of the system, such as a full disk."""
INTERRUPTED = 130
"""Exit status after Ctrl-C or SIGTERM, as shells count it."""


class _Commands(TyperGroup):
    """Turns what a command raises on purpose into a message and an exit status."""

    @override
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ScviaductError as error:
            typer.echo(f"scviaduct: {error}", err=True)
            raise typer.Exit(error.exit_status) from None
        except BrokenPipeError:  # whoever read the output has seen enough, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            typer.echo(f"scviaduct: {place}{error.strerror or error}. Mend it and run the same command.", err=True)
            raise typer.Exit(MACHINE) from None
        except KeyboardInterrupt:
            kept = "What is complete is kept: run the same command to go on."
            told = (
                kept
                if ctx.invoked_subcommand in ("map", "train", "derive", "land")
                else "Nothing is left half-written."
            )
            typer.echo(f"scviaduct: interrupted. {told}", err=True)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=_Commands,
    name="scviaduct",
    help="Carries query cells to a pretrained scvi-tools reference, and keeps what comes out in a versioned store.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(reference_app, name="reference")
app.command()(train)
app.command()(choose)
app.command()(publish)
app.command()(derive)
app.command()(index)
app.command("land")(land_)
app.add_typer(adapter_app, name="adapter")


@app.command()
def check(
    source: Source,
    reference: Ref,
    accept: Accept = None,
    batch_key: BatchKey = None,
    sample_key: SampleKey = None,
    surgery: SurgeryMode = None,
    as_json: Json = False,
) -> None:
    """Check whether a query fits a reference. Exit status: 0 fit, 1 not fit, 3 cannot tell."""
    from pipelines.preflight import check as run

    report = run(
        source,
        reference=reference,
        accept=listed(accept),
        batch_key=batch_key or "",
        sample_key=sample_key or "",
        surgery=surgery or "auto",
    )
    printing.preflight(report, as_json=as_json)
    raise typer.Exit(report.exit_status)


@app.command("map")
def map_(
    source: Annotated[str | None, Argument(metavar="SOURCE", help=SOURCE_HELP)] = None,
    reference: Annotated[
        list[str] | None,
        Option(help="Registered name of the reference, or path of a package; repeated, all map on one reading."),
    ] = None,
    store: Annotated[str | None, Option(help="Folder of the store; made if absent.")] = None,
    keep_obs: Annotated[str | None, Option(help="obs columns to keep, comma-separated.")] = None,
    shard_cells: Annotated[int | None, Option(help="Cells of a shard. [default: 16384]")] = None,
    accept: Accept = None,
    batch_key: BatchKey = None,
    sample_key: SampleKey = None,
    ambiguous_entropy: Annotated[
        float | None, Option(help="Entropy in nats above which a label is ambiguous. [default: 1.0]")
    ] = None,
    neighbors: Annotated[int | None, Option(help="k of labels by nearest neighbours (scvi). [default: 15]")] = None,
    surgery: SurgeryMode = None,
    surgery_cells: Annotated[
        int | None, Option(help="Cells of a new batch that its adapter is fitted on. [default: 512]")
    ] = None,
    surgery_epochs: Annotated[int | None, Option(help="Epochs of an adapter, at most. [default: 100]")] = None,
    background: Annotated[
        list[str] | None, Option(help="Controls of the query, COLUMN=VALUE (ContrastiveVI); repeatable.")
    ] = None,
    engine: Annotated[str | None, Option(help="ray, or inline: in this process. [default: ray]")] = None,
    address: Annotated[str | None, Option(help="Ray cluster: local, auto or HOST:PORT.")] = None,
    actors: Annotated[int | None, Option(help="Mapping actors. [default: one a GPU share, or half the CPUs]")] = None,
    readers: Annotated[int | None, Option(help="Reader tasks at a time. [default: the CPUs left]")] = None,
    gpus_per_actor: Annotated[float | None, Option(help="GPU share of an actor. [default: 1 where there are]")] = None,
    land: Annotated[str | None, Option(help="Also land the source into this folder, while it is read.")] = None,
    job: Annotated[str | None, Option(help="TOML file with any of these but switches; flags win.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Check and plan, then stop.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Map query cells to a reference, or to several on one reading, into a store.

    All cells of a run become visible in one commit. The same command resumes a run that was killed, and does nothing
    once the run is complete. Exit status: 1 where the query does not fit; 4 where units are in quarantine (see
    `status`), and the others, if there are any, are committed.
    """
    from pipelines.jobs import MapJob

    flags: dict[str, Any] = {
        "source": source,
        "reference": reference[0] if reference and len(reference) == 1 else reference or None,
        "store": store,
        "keep_obs": listed(keep_obs) or None,
        "shard_cells": shard_cells,
        "accept": listed(accept) or None,
        "batch_key": batch_key,
        "sample_key": sample_key,
        "ambiguous_entropy": ambiguous_entropy,
        "neighbors": neighbors,
        "surgery": surgery,
        "surgery_cells": surgery_cells,
        "surgery_epochs": surgery_epochs,
        "background": background or None,
        "engine": engine,
        "address": address,
        "actors": actors,
        "readers": readers,
        "gpus_per_actor": gpus_per_actor,
        "land": land,
    }
    told = MapJob.of(job, flags)  # a wrong flag is answered before the seconds that loading torch takes
    from pipelines.mapping import map as run
    from pipelines.printing_mapping import mapping as print_mapping

    result = run(**told.model_dump(), dry_run=dry_run, quiet=quiet)
    print_mapping(result, as_json=as_json)
    raise typer.Exit(result.exit_status)


@app.command()
def status(
    store: StorePath,
    run: Annotated[str | None, Option(help="Show one run: its plan, settings and quarantined units.")] = None,
    as_json: Json = False,
) -> None:
    """Show a store's spaces, versions, runs and quarantined units, with the reasons."""
    from pipelines.reporting import status as ask

    printing.status(ask(store, run=run), as_json=as_json)


@app.command()
def search(
    store: StorePath,
    cells: Annotated[str | None, Option(help="Query cells: a source such as QUERY.h5ad, mapped on the fly.")] = None,
    stored: Annotated[
        str | None, Option("--from", help="Query with the store's own cells for which this holds.")
    ] = None,
    label: Annotated[str | None, Option(help="Query with the store's cells of this label.")] = None,
    k: Annotated[int, Option("-k", help="Neighbours of each query cell.")] = 30,
    where: Annotated[
        str | None, Option(help="Neighbours are cells for which this holds, e.g. \"tissue = 'lung'\".")
    ] = None,
    out: Annotated[str | None, Option(help="Write the hits to this parquet file.")] = None,
    exact: Annotated[bool, Option("--exact", help="Compare with every cell, without the index.")] = False,
    actors: Annotated[
        int | None, Option(help="Search on Ray, with so many actors that hold a slice of the index each.")
    ] = None,
    address: Annotated[str | None, Option(help="Ray cluster for --actors: local, auto or HOST:PORT.")] = None,
    reference: SpaceOf = None,
    package: Annotated[
        str | None, Option(help="Path of the space's package, for --cells, where it is not registered.")
    ] = None,
    batch_key: BatchKey = None,
    sample_key: SampleKey = None,
    accept: Accept = None,
    as_of: AsOf = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find the nearest stored cells of query cells: keys, distances, labels and kept columns."""
    from pipelines.searching import search as run

    hits = run(
        store,
        cells=cells,
        stored=stored,
        label=label,
        k=k,
        where=where,
        out=out,
        exact=exact,
        actors=actors,
        address=address,
        reference=reference,
        package=package,
        batch_key=batch_key or "",
        sample_key=sample_key or "",
        accept=listed(accept),
        as_of=as_of,
        quiet=quiet,
    )
    printing.hits(hits, out, as_json=as_json)


@app.command()
def export(
    store: StorePath,
    to: Annotated[str, Option(help="h5ad, zarr or parquet.")],
    out: Annotated[str, Option(help="File or folder to write.")],
    where: Where = None,
    reference: SpaceOf = None,
    as_of: AsOf = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace what is there.")] = False,
    quiet: Quiet = False,
) -> None:
    """Write cells, labels and latents to a file, in the source's order."""
    from pipelines.exporting import export as run

    made = run(store, to=to, out=out, where=where, reference=reference, as_of=as_of, overwrite=overwrite, quiet=quiet)
    typer.echo(f"Wrote {made}.")


@app.command()
def demo(
    folder: Annotated[str, Option(help="Where everything goes.")] = "demo",
    cells: Annotated[int, Option(help="Query cells to simulate.")] = 24_000,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run the main job end to end on simulated cells: train, map on Ray, commit, index, search."""
    from pipelines.demo import demo as run

    printing.demo(run(folder, cells=cells, quiet=quiet), as_json=as_json)


def _version(*, value: bool) -> None:
    if value:
        typer.echo(f"scviaduct {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        Option("--version", help="Print the version.", callback=lambda value: _version(value=value), is_eager=True),
    ] = False,
) -> None:
    """Carries query cells over to a pretrained scvi-tools reference, and keeps what comes out in a versioned store."""


def _terminate(*_: object) -> None:
    """Stop as Ctrl-C does: ``ray job stop`` and schedulers send SIGTERM."""
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; ends the process with the exit status.

    Parameters
    ----------
    arguments
        Without the program's name; None for those of the process.
    """
    signal.signal(signal.SIGTERM, _terminate)
    atexit.register(_spare_the_last_collection)
    for stream in (sys.stdout, sys.stderr):  # a label that a terminal's encoding lacks is no reason to fail
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app(args=arguments, prog_name="scviaduct")


def _spare_the_last_collection() -> None:
    """Have the interpreter end without looking for garbage among all that PyTorch and others made: a second a command.

    Not with Triton, which prints the objects that it then finds not freed.
    """
    if "triton" not in sys.modules:
        gc.freeze()
