"""``scviaduct publish``: a reference as a repository of scvi-hub."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from pipelines import printing
from pipelines.options import Json, Quiet, RefArgument, listed

if TYPE_CHECKING:
    from pipelines.publishing import Publication


def publish(
    name: RefArgument,
    target: Annotated[str, Argument(metavar="TARGET", help="Repository: hf://OWNER/NAME.")],
    private: Annotated[bool, Option("--private", help="Make a private repository.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Show what would be published, and upload nothing.")] = False,
    out: Annotated[str | None, Option(help="Folder that keeps the repository's files.")] = None,
    with_counts: Annotated[bool, Option("--with-counts", help="Publish counts that the package has.")] = False,
    with_ids: Annotated[bool, Option("--with-ids", help="Publish the names of cells instead of numbers.")] = False,
    allow_column: Annotated[
        list[str] | None, Option(help="obs column that may be published, such as donor; repeatable.")
    ] = None,
    licence: Annotated[str, Option(help="Identifier of the hub, e.g. cc-by-4.0.")] = "",
    description: Annotated[str, Option(help="Markdown for the card, or @FILE.")] = "",
    data_url: Annotated[str, Option(help="Where the training data can be had.")] = "",
    tissue: Annotated[str | None, Option(help="Tissues, comma-separated, for the hub's search.")] = None,
    criticise: Annotated[
        str, Option(metavar="SOURCE", help="Cells to compare the model's samples with (scvi.criticism).")
    ] = "",
    replace: Annotated[bool, Option("--replace", help="Take the place of another model.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Publish a reference on the Hugging Face hub, where scvi-tools finds and loads it, too.

    Counts, names of cells and obs columns that the model does not need stay here; a column that may name donors is
    refused. All files appear in one commit, which is fetched back and compared. The token is read from HF_TOKEN.
    """
    from pipelines.publishing import publish as run

    made = run(
        name,
        target,
        private=private,
        dry_run=dry_run,
        out=out,
        with_counts=with_counts,
        with_ids=with_ids,
        allow_columns=tuple(allow_column or ()),
        licence=licence,
        description=description,
        data_url=data_url,
        tissues=listed(tissue),
        criticise=criticise,
        replace=replace,
        quiet=quiet,
    )
    if as_json:
        told = asdict(made)
        # A folder that was not named is gone by now.
        told["contents"]["folder"] = out
        printing.dump(told)
    else:
        _print(made, out)


def _print(made: Publication, out: str | None) -> None:
    contents = made.contents
    printing.table(("file", "bytes"), [(name, size) for name, size in contents.files.items()], title=made.uri)
    typer.echo(f"{contents.family}; data: {contents.data}, {contents.cells:,} cells.")
    typer.echo(f"obs columns of the data: {', '.join(contents.columns) or 'none'}.")
    for one in contents.refused:
        typer.echo(f"Left out: {one}.")
    if not made.dry_run:
        typer.echo(f"Published {made.uri}")
    elif out is None:
        typer.echo("Nothing was uploaded. --out DIR keeps the files.")
    else:
        typer.echo(f"Nothing was uploaded. The files are in {out}.")
