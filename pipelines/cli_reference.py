"""``scviaduct reference``: pretrained models as verified packages."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Argument, Option

from pipelines import printing, reference
from pipelines.options import Json, RefArgument

app = typer.Typer(help="Pretrained models as verified packages.", no_args_is_help=True)


@app.command("add")
def add_reference(
    folder: Annotated[str, Argument(metavar="DIR", help="Package, trained scvi-tools folder, or hub layout.")],
    name: Annotated[str, Option(help="Name to register it under.")],
    replace: Annotated[bool, Option("--replace", help="Take the name from another reference.")] = False,
    as_json: Json = False,
) -> None:
    """Check a model, make a package of it and register it. Nothing is unpickled unchecked."""
    printing.reference(reference.add(folder, name=name, replace=replace), as_json=as_json)


@app.command("list")
def list_references(as_json: Json = False) -> None:
    """List the registered references."""
    printing.references(reference.list(), as_json=as_json)
    for name, reason in reference.broken().items():
        typer.echo(f"Reference '{name}' cannot be used: {reason}", err=True)


@app.command("show")
def show_reference(name: RefArgument, as_json: Json = False) -> None:
    """Show what a reference is: family, genes, batches, labels, provenance."""
    printing.reference(reference.show(name), as_json=as_json)


@app.command("verify")
def verify_reference(name: RefArgument, as_json: Json = False) -> None:
    """Check every digest, load the model, and compare what it encodes with what it encoded when it was packaged."""
    report = reference.verify(name)
    printing.verification(report, as_json=as_json)
    raise typer.Exit(0 if report.ok else 1)


@app.command("remove")
def remove_reference(name: Annotated[str, Argument(metavar="NAME", help="Registered name.")]) -> None:
    """Unregister a reference and delete its package. Stores keep what it mapped."""
    reference.remove(name)
    typer.echo(f"Removed '{name}'.")
