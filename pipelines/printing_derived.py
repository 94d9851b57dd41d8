"""What the command line prints of adapters and of what was derived."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import typer

from pipelines.printing import SHOWN_ROWS, dump, facts_table, quarantined, some, table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pipelines.derived import DeriveResult

_SHOWN_COLUMNS = 8


def adapters(found: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    """Print a store's adapters."""
    if as_json:
        dump(list(found))
        return
    if not found:
        typer.echo("There is no adapter: no batch of a query needed one yet.")
        return
    columns = ("adapter", "batch", "cells", "sampled", "epochs", "gain", "used", "bytes", "fitted", "space")
    rows = [
        [row["adapter"][:12], *(row[name] for name in columns[1:-2]), f"{row['fitted']:%Y-%m-%d %H:%M}", row["space"]]
        for row in found
    ]
    table(columns, rows)


def adapter(found: Mapping[str, Any], *, as_json: bool) -> None:
    """Print one adapter."""
    if as_json:
        dump(found)
        return
    facts = {key: value for key, value in found.items() if key not in ("facts", "tensors")}
    facts |= {key.replace("_", " "): value for key, value in found["facts"].items() if key != "surgery"}
    facts |= {f"surgery: {key}": str(value) for key, value in found["facts"]["surgery"].items()}
    for part, held in found["tensors"].items():
        facts |= {f"{part}: {covariate}": some(names) for covariate, names in held.items()}
    facts_table({key: str(value) if isinstance(value, dict) else value for key, value in facts.items()})


def analyses(found: Sequence[tuple[str, str, Mapping[str, Any]]], *, as_json: bool) -> None:
    """Print what can be derived."""
    if as_json:
        dump([{"what": name, "about": about, "options": dict(options)} for name, about, options in found])
        return
    rows = [(name, about, ", ".join(f"--{key.replace('_', '-')}" for key in options)) for name, about, options in found]
    table(("what", "gives", "options"), rows)


def derived(found: DeriveResult, out: str | None, *, as_json: bool) -> None:
    """Print what a derivation came to, and write its tables."""
    if out:
        for name, rows in found.tables.items():
            path = Path(out, f"{found.name}.{name}.csv")
            path.parent.mkdir(parents=True, exist_ok=True)
            rows.to_csv(path, index=not isinstance(rows.index, pd.RangeIndex))
    if as_json:
        tables = {name: json.loads(rows.to_json(orient="records")) for name, rows in found.tables.items()}
        told = {field.name: getattr(found, field.name) for field in fields(found) if field.name != "tables"}
        left = [asdict(item) for item in found.quarantined]
        dump({"exit_status": found.exit_status, **told, "quarantined": left, "tables": tables})
        return
    for name, rows in found.tables.items():
        _frame(rows, f"{found.name}: {name}")
    quarantined(found.quarantined)
    cells = f" of {found.cells:,} cells" if found.units else ""  # a comparison has tables alone
    what = f"'{found.name}'{cells}"
    if found.state == "failed":
        typer.echo(f"{found.what}: every unit is in quarantine; nothing was committed.")
    elif found.state == "nothing to do":
        typer.echo(f"Nothing to do: version {found.version} has {what}.")
    else:
        more = [f"columns {', '.join(found.columns)}"] if found.columns else []
        more += [f"matrices {', '.join(found.matrices)}"] if found.matrices else []
        more += [f"{found.derived_units:,} unit{'s' * (found.derived_units != 1)} now"] if found.units else []
        typer.echo(f"Version {found.version} has {what} ({'; '.join([*more, f'{found.seconds} s'])}).")


def _frame(rows: pd.DataFrame, title: str) -> None:
    named = rows if isinstance(rows.index, pd.RangeIndex) else rows.reset_index()
    shown = named.iloc[:SHOWN_ROWS, :_SHOWN_COLUMNS]
    table([str(name) for name in shown.columns], shown.astype(object).to_numpy().tolist(), title=title)
    left = [(len(named) - SHOWN_ROWS, "row"), (named.shape[1] - _SHOWN_COLUMNS, "column")]
    if told := " and ".join(f"{n:,} {what}{'s' * (n != 1)}" for n, what in left if n > 0):
        typer.echo(f"{told} more; --out FOLDER writes them all.")
