"""The commands of ``scviaduct adapter``."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Argument, Option

from pipelines import printing_derived as printing
from pipelines.options import Json, SpaceOf, StorePath

app = typer.Typer(
    no_args_is_help=True,
    help="Adapters: what scArches surgery learnt of new batches, kept in the store for later runs.",
)
Adapter = Annotated[str, Argument(metavar="ADAPTER", help="Address of the adapter, or the beginning of it.")]


@app.command("list")
def list_(store: StorePath, reference: SpaceOf = None, as_json: Json = False) -> None:
    """List a store's adapters: batch, cells, what fitting gained, and how many cells were encoded with each."""
    from pipelines.adapters import list_adapters

    printing.adapters(list_adapters(store, reference=reference), as_json=as_json)


@app.command()
def show(store: StorePath, adapter: Adapter, reference: SpaceOf = None, as_json: Json = False) -> None:
    """Show one adapter: its batch, sample, settings, losses and tensors."""
    from pipelines.adapters import show_adapter

    printing.adapter(show_adapter(store, adapter, reference=reference), as_json=as_json)


@app.command()
def drop(
    store: StorePath,
    adapter: Adapter,
    reference: SpaceOf = None,
    force: Annotated[bool, Option("--force", help="Also one that stored cells were encoded with.")] = False,
) -> None:
    """Remove an adapter. Stored latents stay; a later run that needs it fits it again."""
    from pipelines.adapters import drop_adapter

    typer.echo(f"Dropped {drop_adapter(store, adapter, reference=reference, force=force)}.")
