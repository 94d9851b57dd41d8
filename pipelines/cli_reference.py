"""``scviaduct reference``: pretrained models as verified packages."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Argument, Option

from pipelines import printing, reference
from pipelines.options import Json, Quiet, RefArgument
from scviaduct.families import family

app = typer.Typer(help="Pretrained models as verified packages.", no_args_is_help=True)


@app.command("add")
def add_reference(
    source: Annotated[
        str,
        Argument(
            metavar="SOURCE",
            help="hf://OWNER/NAME@REVISION, s3://BUCKET/FOLDER/, https://HOST/MODEL.zip, or a folder: a package, what"
            " scvi-tools saved, scvi-hub's layout.",
        ),
    ],
    name: Annotated[str, Option(help="Name to register it under.")],
    replace: Annotated[bool, Option("--replace", help="Take the name from another reference.")] = False,
    no_data: Annotated[
        bool, Option("--no-data", help="Take the model alone: it then has no latents of its own cells.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fetch a model, check it, make a package of it and register it. Nothing is unpickled unchecked.

    A branch or tag of the hub is resolved once, and the commit is recorded. What was fetched once is not fetched again,
    and an interrupted download goes on. A token for private models is read from HF_TOKEN.
    """
    printing.reference(
        reference.add(source, name=name, replace=replace, data=not no_data, quiet=quiet), as_json=as_json
    )


@app.command("search")
def search_references(
    text: Annotated[str, Argument(metavar="TEXT", help="Words that a model's name or tags have.")] = "",
    family: Annotated[str | None, Option(help="Class of the model, e.g. scanvi.")] = None,
    tissue: Annotated[str | None, Option(help="Tissue that its tags name, e.g. lung.")] = None,
    collection: Annotated[
        str | None, Option(help="Collection on the hub: its slug, or words of its title, e.g. census.")
    ] = None,
    limit: Annotated[int, Option(help="Most models to list.", min=1)] = 50,
    as_json: Json = False,
) -> None:
    """Find models of scvi-tools on the Hugging Face hub."""
    found = reference.search(text, family=family, tissue=tissue, collection=collection, limit=limit)
    printing.found_references(found, as_json=as_json)


@app.command("list")
def list_references(as_json: Json = False) -> None:
    """List the registered references."""
    printing.references(reference.list(), as_json=as_json)
    for name, reason in reference.broken().items():
        typer.echo(f"Reference '{name}' cannot be used: {reason}", err=True)


@app.command("show")
def show_reference(
    name: RefArgument,
    card: Annotated[bool, Option("--card", help="Print its publisher's card instead.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a reference is: family, genes, batches, labels, provenance; or its model card."""
    if card:
        typer.echo(reference.card(name) or f"Reference '{name}' has no card.")
        return
    printing.reference(reference.show(name), as_json=as_json)


@app.command("export")
def export_reference(
    name: RefArgument, out: Annotated[str, Option(help="Folder to write: model.pt and a template of its data.")]
) -> None:
    """Write the model as scvi-tools saves it, for use there."""
    made = reference.export(name, out)
    found = family(reference.show(name).family)
    typer.echo(f"Wrote {made}. In Python: {found.module}.{found.name}.load('{made}')")


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
