"""What came out of the trials of a search: a row each, scored, and the best of them."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING, Any

import ray

from scviaduct.errors import EngineError, InputError
from scviaduct.references.integration import require_scib
from scviaduct.references.tuning import score_latents, scores_integration

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from scviaduct.references.searchspace import Trial, Wanted
    from scviaduct.references.tuning import Prepared


def row_of(result: Any, trials: Sequence[Trial]) -> dict[str, Any]:
    """The row of a trial from what Ray Tune kept of it."""
    trial = trials[result.config["number"] - 1]
    told = result.metrics or {}
    lost = (str(result.error).strip().splitlines() or [""])[-1] if result.error is not None else ""
    said = str(told.get("error", "")) or lost
    state = "failed" if said else "finished" if told.get("whole") else "stopped early"
    scores = {name: told.get(name, "") for name in ("loss", "epochs")}
    seconds = round(float(told.get("time_total_s", 0.0)), 1)
    return {"trial": trial.number, **trial.values, "state": state, **scores, "seconds": seconds, "error": said[:300]}


def scored(rows: list[dict[str, Any]], prepared: Prepared, search: Wanted, folder: Path) -> list[dict[str, Any]]:
    """The rows with scIB's metrics, where they can be had: all in one process, which compiles them once."""
    if not scores_integration(prepared.recipe):
        return rows
    try:
        require_scib()
    except InputError:
        if search.metric == "scib":
            raise
        return rows
    paths = {row["trial"]: folder / "latents" / f"{row['trial']}.parquet" for row in rows if row["state"] == "finished"}
    task = ray.remote(num_cpus=1)(_score_all)
    try:
        scores: dict[int, dict[str, float]] = ray.get(task.remote(paths))
    except ray.exceptions.RayTaskError as error:
        if not isinstance(error.cause, InputError):
            raise
        if search.metric == "scib":
            raise error.cause from None
        return rows
    return [{**row, **scores.get(row["trial"], {})} for row in rows]


def _score_all(paths: Mapping[int, Path]) -> dict[int, dict[str, float]]:
    return {number: score_latents(path) for number, path in paths.items()}


def best_of(rows: Sequence[Mapping[str, Any]], metric: str) -> Mapping[str, Any]:
    """The best of the trials that came to their end.

    Raises
    ------
    EngineError
        If none did.
    """
    ended = [row for row in rows if row["state"] == "finished"]
    if not ended:
        why = next((row["error"] for row in rows if row["error"]), "")
        told = f"None of {len(rows)} trials came to its end{f': {why}' if why else ''}"
        raise EngineError(f"{told}.", "Search other values: --search lr=1e-4..1e-3 log; --restart begins anew.")
    return min(ended, key=lambda row: row["loss"]) if metric == "loss" else max(ended, key=lambda row: row["scib"])


def write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the rows as CSV, in the order of the trials."""
    names = dict.fromkeys(name for row in rows for name in row)
    order = [name for name in names if name not in ("seconds", "error")] + ["seconds", "error"]
    staged = path.with_name(f"{path.name}.new")
    with staged.open("w", newline="") as file:
        writer = csv.DictWriter(file, order, restval="")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: row["trial"]))
    staged.replace(path)
