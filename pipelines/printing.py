"""What the command line prints: tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from scviaduct.references.fetching.searching import safe

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import pyarrow as pa

    from cluster.dispatch import Quarantined
    from pipelines.demo import DemoSummary
    from pipelines.reporting import Status
    from scviaduct.mapping.preflight import Report
    from scviaduct.references.fetching.searching import Found
    from scviaduct.references.package import Reference, Verification

SHOWN_ROWS = 20
_SPACE_COLUMNS = ("space", "version", "cells", "versions", "index")
_RUN_COLUMNS = ("run", "state", "version", "units done", "cells done", "started", "reference")
_WHOLE = ("run", "state", "version", "units done", "cells done", "check", "name")  # columns that are never folded
_HIT_COLUMNS = ("query", "rank", "distance", "dataset_id", "observation_id", "label", "probability")
_HIT_DETAILS = ("query_dataset", "source", "soma_joinid", "margin", "entropy", "ambiguous", "reference", "adapter")
_STYLES = {"ok": "green", "warn": "yellow", "stop": "red", "unknown": "yellow", "failed": "red"}
_WIDE = 160  # columns where the output is no terminal


def dump(value: Any) -> None:
    """Print a value as JSON; what JSON lacks (paths, times) becomes text."""
    typer.echo(json.dumps(value, indent=2, default=str, ensure_ascii=False))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> None:
    """Print a table; numbers to the right, and names in one piece."""
    rows = [list(row) for row in rows]
    made = Table(title=None if title is None else _text(title), title_justify="left", header_style="bold")
    for i, name in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[i], int | float) and not isinstance(row[i], bool) for row in rows)
        whole = numeric or name in _WHOLE or (i == 0 and len(columns) > 2)  # what a row is of is never squeezed out
        made.add_column(_text(name), justify="right" if numeric else "left", overflow="fold", no_wrap=whole)
    for row in rows:
        # Text, not markup: what is printed is data, and a label may hold brackets.
        made.add_row(*(value if isinstance(value, Text) else _text(_cell(value)) for value in row))
    _console().print(made)


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=_WIDE)


def _text(text: str, style: str = "") -> Text:
    """What may be a stranger's, in one line and without what a terminal would obey."""
    return Text(safe(text.replace("\n", " "), lines=False), style)


def _mark(word: str) -> Text:
    return _text(word, _STYLES.get(word, ""))


def _cell(value: object) -> str:
    if isinstance(value, list):
        return some(value)
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def facts_table(facts: Mapping[str, object], title: str | None = None) -> None:
    """Print names and values, one below the other."""
    title_text = None if title is None else _text(title)
    made = Table(title=title_text, title_justify="left", show_header=False, box=None, pad_edge=False)
    made.add_column(no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in facts.items():
        made.add_row(_text(name, "bold"), _text(_cell(value)))
    _console().print(made)


def referencefacts_table(found: Reference) -> dict[str, Any]:
    """What is worth saying of a reference."""
    return {
        "name": found.name,
        "digest": found.digest,
        "family": found.family,
        "scvi_tools": found.scvi_version,
        "genes": len(found.genes),
        "modalities": {name: found.genes.modality.count(name) for name in found.genes.modalities},
        "gene_identifiers": list(found.genes.columns),
        "latent_size": found.n_latent,
        "latent_sizes": dict(found.latent_sizes),
        "encode_covariates": found.encode_covariates,
        "batch_key": found.batch_key,
        "batches": list(found.batch_categories),
        "sample_key": found.sample_key,
        "samples": list(found.sample_categories),
        "labels_key": found.labels_key,
        "labels": list(found.labels),
        "categorical_covariates": {key: list(values) for key, values in found.categorical_covariates.items()},
        "continuous_covariates": list(found.continuous_covariates),
        "latents": found.has_latents,
        "repairs": list(found.repairs),
        "notes": list(found.notes),
        "provenance": dict(found.provenance),
        "path": str(found.path),
    }


def reference(found: Reference, *, as_json: bool) -> None:
    """Print one reference."""
    facts = referencefacts_table(found)
    if as_json:
        dump(facts)
        return
    provenance = facts.pop("provenance")
    for name in ("notes", "repairs"):
        facts[name] = " ".join(facts[name])
    facts = {key.replace("_", " "): value for key, value in facts.items()}
    for name, value in provenance.items():
        if name != "files":  # sizes and checksums of what was fetched, for --json
            told = {key: part for key, part in value.items() if part} if isinstance(value, dict) else value
            facts[f"from: {name}"] = told  # a stranger's keys stand for no fact
    shown = {key: some(value) if isinstance(value, list | dict) else value for key, value in facts.items()}
    facts_table({key: value for key, value in shown.items() if value not in ("", None)})


def some(values: list[Any] | dict[str, Any], limit: int = 12) -> str:
    """The first values in one line, and how many more there are."""
    texts = [f"{key} {value}" for key, value in values.items()] if isinstance(values, dict) else list(map(str, values))
    rest = len(texts) - limit
    return ", ".join(texts[:limit]) + (f" and {rest} more" if rest > 0 else "")


def references(found: Sequence[Reference], *, as_json: bool) -> None:
    """Print the registered references."""
    if as_json:
        dump([referencefacts_table(item) for item in found])
        return
    if not found:
        typer.echo("No reference is registered. Add one: scviaduct reference add DIR --name NAME")
        return
    rows = [
        (r.name, r.family, len(r.genes), r.n_latent, len(r.labels), r.encode_covariates, r.digest[:12]) for r in found
    ]
    table(("name", "family", "genes", "latent", "labels", "encodes covariates", "digest"), rows)


def found_references(found: Sequence[Found], *, as_json: bool) -> None:
    """Print models that a search of the hub found."""
    if as_json:
        dump([asdict(item) for item in found])
        return
    if not found:
        typer.echo("No model on the hub is like that. Fewer words find more: scviaduct reference search")
        return
    columns = ("repository", "family", "tissues", "modalities", "labels", "scvi-tools", "licence", "downloads")
    rows = []
    for f in found:
        tags = (f.family or None, ", ".join(f.tissues) or None, ", ".join(f.modalities) or None, f.annotated)
        rows.append((f.repository, *tags, f.scvi_version or None, f.licence or None, f.downloads))
    table(columns, rows)
    if other := sorted({f.family for f in found if f.family and not f.mapped_here}):
        typer.echo(safe(f"Not mapped here: models of class {', '.join(other)}.", lines=False))
    typer.echo(safe(f"Add one: scviaduct reference add hf://{found[0].repository} --name NAME", lines=False))


def verification(found: Verification, *, as_json: bool) -> None:
    """Print what verifying a package found."""
    if as_json:
        dump({"ok": found.ok, "checks": [asdict(check) for check in found.checks]})
        return
    table(
        ("check", "", "detail"),
        [(c.name, _mark("ok" if c.ok else "failed"), c.detail) for c in found.checks],
    )


def preflight(found: Report, *, as_json: bool) -> None:
    """Print a preflight report."""
    if as_json:
        dump({"verdict": found.verdict, **asdict(found)})
        return
    rows = [(f.name, _mark(f.level), f.message + (f" {f.remedy}" if f.level != "ok" else "")) for f in found.findings]
    table(("check", "", "finding"), rows, title=f"{found.source} -> {found.reference}")
    typer.echo(f"Verdict: {found.verdict} ({found.cells:,} cells, {found.sampled:,} sampled).")


def status(found: Status, *, as_json: bool) -> None:
    """Print the state of a store, or of one run."""
    if as_json:
        dump(asdict(found))
        return
    if found.spaces:
        table(_SPACE_COLUMNS, [[space[name] for name in _SPACE_COLUMNS] for space in found.spaces], title=found.store)
    table(_RUN_COLUMNS, [_run_row(run) for run in found.runs])
    for run in found.runs:
        if run["state"] == "open":
            typer.echo(f"Run {run['run']} is not complete: run the same command again to go on ({run['source']}).")
        for item in run["quarantined"]:
            where = f"{item['dataset_id']} rows {item['start']:,}-{item['stop']:,}"
            typer.echo(f"Quarantined in {run['run']}: {where}: {item['reason']}")
    if found.details:
        facts_table(found.details, title=f"run {found.runs[0]['run']}")


def _run_row(run: Mapping[str, Any]) -> list[object]:
    done = [f"{run[f'{what}_done']:,} of {run[what]:,}" for what in ("units", "cells")]
    return [
        run["run"],
        run["state"],
        run["version"],
        *done,
        str(run["started"])[:16].replace("T", " "),
        run["reference"],
    ]


def hits(found: pa.Table, out: str | None, *, as_json: bool) -> None:
    """Print the nearest neighbours, or where they were written."""
    if as_json:
        dump(found.to_pylist())
    elif out:
        typer.echo(f"Wrote {found.num_rows:,} hits to {out}.")
    else:
        kept = [name for name in found.column_names if name not in (*_HIT_COLUMNS, *_HIT_DETAILS)]
        shown = found.slice(0, SHOWN_ROWS).select([*_HIT_COLUMNS, *kept])
        table(shown.column_names, [list(row.values()) for row in shown.to_pylist()])
        if found.num_rows > SHOWN_ROWS:
            typer.echo(f"{found.num_rows - SHOWN_ROWS:,} more; --out hits.parquet writes them all.")


def demo(found: DemoSummary, *, as_json: bool) -> None:
    """Print the demo's summary."""
    if as_json:
        dump(asdict(found))
        return
    facts_table(found.facts(), title="scviaduct demo")


def quarantined(items: Sequence[Quarantined], of: str = "") -> None:
    """Print what could not be done, and why, as an error; ``of`` comes first."""
    for item in items:
        shard = item.unit.shard
        where = f"{shard.dataset_id} rows {shard.start:,}-{shard.stop:,}"
        tries = f"{item.attempts} attempt{'s' * (item.attempts != 1)}"
        typer.echo(f"{of}Quarantined after {tries}: {where} ({shard.cells:,} cells): {item.reason}", err=True)
