"""``scviaduct derive``."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer import Option

from pipelines import printing_derived as printing
from pipelines.options import Json, Quiet, SpaceOf, StorePath, listed


def derive(
    store: StorePath,
    what: Annotated[
        str | None, Option(help="What to derive, e.g. normalised-expression; leave it out to see what there is.")
    ] = None,
    name: Annotated[str | None, Option(help="Name of the set in the store. [default: that of the analysis]")] = None,
    genes: Annotated[str | None, Option(help="Genes, comma-separated. [default: all]")] = None,
    proteins: Annotated[str | None, Option(help="Proteins, comma-separated. [default: all]")] = None,
    peaks: Annotated[str | None, Option(help="Peaks, comma-separated. [default: all]")] = None,
    transform_batch: Annotated[
        str | None, Option(help="Batches of the reference to decode as, comma-separated; their mean if several.")
    ] = None,
    library_size: Annotated[
        float | None, Option(help="Counts of a cell that expression is scaled to; 0 for each cell's own.")
    ] = None,
    samples: Annotated[int | None, Option(help="Samples of the posterior of each cell.")] = None,
    select: Annotated[str | None, Option(help="Cells to compare, as a condition: \"label = 'B'\".")] = None,
    against: Annotated[str | None, Option(help="Cells to compare them with. [default: all others]")] = None,
    cells: Annotated[int | None, Option(help="Cells of a selection or a stratum, at most.")] = None,
    group_by: Annotated[str | None, Option(help="obs column that tables are grouped by.")] = None,
    sample_covariates: Annotated[
        str | None,
        Option(help="Covariates of samples, comma-separated, such as sex,site,sex:site (mrvi)."),
    ] = None,
    perturbation: Annotated[str | None, Option(help="obs column of perturbations (contrastivevi).")] = None,
    controls: Annotated[str | None, Option(help="Its value for controls, e.g. non-targeting.")] = None,
    guide: Annotated[str | None, Option(help="obs column of guides (contrastivevi).")] = None,
    quantile: Annotated[float | None, Option(help="Quantile of the controls' scores above which one is high.")] = None,
    permutations: Annotated[int | None, Option(help="Permutations of a test.")] = None,
    mode: Annotated[str | None, Option(help="How something is compared; the analysis says which modes it has.")] = None,
    delta: Annotated[float | None, Option(help="Least log2 fold change, or difference, that counts.")] = None,
    fdr: Annotated[float | None, Option(help="False discovery rate.")] = None,
    batch_correction: Annotated[
        bool | None, Option("--batch-correction", help="Compare cells as if of the same batches.")
    ] = None,
    seed: Annotated[int | None, Option(help="Seed of permutations (perturbation-score).")] = None,
    reference: SpaceOf = None,
    package: Annotated[str | None, Option(help="Path of the space's package, where it is not registered.")] = None,
    engine: Annotated[str, Option(help="ray, or inline: in this process.")] = "ray",
    address: Annotated[str | None, Option(help="Ray cluster: local, auto or HOST:PORT.")] = None,
    actors: Annotated[int | None, Option(help="Deriving actors. [default: one a GPU share, or half the CPUs]")] = None,
    readers: Annotated[int | None, Option(help="Reader tasks at a time. [default: the CPUs left]")] = None,
    gpus_per_actor: Annotated[float | None, Option(help="GPU share of an actor. [default: 1 where there are]")] = None,
    out: Annotated[str | None, Option(help="Write the tables to this folder as CSV, besides.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Derive expression, proteins, accessibility, sample effects or perturbation scores of mapped cells.

    Columns, matrices and tables go into the store, beside the cells, in one commit; counts are read again from where
    they were mapped from. The same command does nothing once all cells are derived, and only what is new after a
    further `map`. Exit status 4 where units are in quarantine.
    """
    from pipelines.deriving import analyses_of
    from pipelines.deriving import derive as run

    if what is None:
        printing.analyses(analyses_of(store, reference=reference, package=package), as_json=as_json)
        return
    options: dict[str, Any] = {
        "library_size": library_size,
        "samples": samples,
        "select": select,
        "against": against,
        "cells": cells,
        "group_by": group_by,
        "perturbation": perturbation,
        "controls": controls,
        "guide": guide,
        "quantile": quantile,
        "permutations": permutations,
        "mode": mode,
        "delta": delta,
        "fdr": fdr,
        "batch_correction": batch_correction,
        "seed": seed,
    }
    many = {
        "genes": genes,
        "proteins": proteins,
        "peaks": peaks,
        "transform_batch": transform_batch,
        "sample_covariates": sample_covariates,
    }
    options |= {key: listed(value) or None for key, value in many.items()}
    where: dict[str, Any] = {"engine": engine, "address": address, "actors": actors, "readers": readers}
    told: dict[str, Any] = {"name": name, "reference": reference, "package": package, "quiet": quiet}
    result = run(store, what, **told, **where, gpus_per_actor=gpus_per_actor, **options)
    printing.derived(result, out, as_json=as_json)
    raise typer.Exit(result.exit_status)
