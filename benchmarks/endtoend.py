"""SOMA to a committed store in one process on one core: against a scvi-tools script, and against reading alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.data import ORGANISM, source_of
from benchmarks.models import CENSUS, TYPICAL, UNLABELED, quiet, reference
from benchmarks.turns import Way, in_turns
from benchmarks.values import Figure, Ratio, Report

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.context import Context

    Once = Callable[[], dict[str, Any]]

TITLE = "End to end"
COUNTS = (
    "CPU-seconds of one process on one core, from an atlas on disk to latents and labels of every cell; imports are"
    " outside on both sides, everything else is inside. The script reads slices of 16,384 cells of the reference's"
    " genes by `cellxgene_census.get_anndata`, then `SCANVI.load_query_data`, `get_latent_representation` and"
    " `predict` at a batch size that is quick for it, and keeps both in memory. Ours is `pipelines.map`, inline: scan,"
    " preflight, mapping, parquet and commit of a new store, two obs columns kept. Read-only is the same reader on the"
    " same shards and genes, which throws its blocks away."
)
SHARD = 16_384
KEPT = ("cell_type", "donor_id")


def run(context: Context) -> Report:
    """Compare at both sizes."""
    figures: list[Figure] = []
    measured = {}
    for name, heading, size, most in (
        ("e2e_2000", "2,000 genes, 128 x 1", TYPICAL, 196_608),
        ("e2e_census", "8,000 genes, 512 x 2, the Census's model", CENSUS, 98_304),
    ):
        saved, package = reference(context.folder, context.design, size)
        cells = context.pick(most, 8_192)
        told = {"collection": str(context.collection()), "cells": cells}
        script = told | {"saved": str(saved), "batch": size.plain_batch}
        scratch = told | {"package": str(package), "folder": str(context.folder)}
        mine = Way("ours, one process", "benchmarks.endtoend:ours", scratch, cells)
        plain_ = Way("scvi-tools script", "benchmarks.endtoend:plain", script, cells)
        reads = Way("read only", "benchmarks.endtoend:read_only", told | {"package": str(package)}, cells)
        found = measured[heading] = in_turns([mine, plain_], context.log, context.samples)
        figures.append(Figure.ratio(name, Ratio.of(*found)))
        if name == "e2e_2000":
            against = in_turns([mine, reads], context.log, context.samples, rounds=context.rounds)
            measured[f"{heading}, against reading"] = against
            figures.append(Figure.ratio("e2e_vs_read_only", Ratio.of(*against)))
    return Report(TITLE, COUNTS, figures, measured)


def ours(collection: str, cells: int, package: str, folder: str) -> Once:
    """The command, in one process."""
    import pipelines as sv

    source, store = source_of(collection, cells), Path(folder) / "store-endtoend"

    def once() -> dict[str, Any]:
        shutil.rmtree(store, ignore_errors=True)
        told = {"keep_obs": KEPT, "shard_cells": SHARD, "engine": "inline", "quiet": True}
        result = sv.map(source, reference=package, store=str(store), **told)
        if result.state != "committed" or result.cells_done != cells:
            raise RuntimeError(f"not all cells were mapped: {result}")
        return {"cells": result.cells_done, "stages": result.seconds}

    return once


def read_only(collection: str, cells: int, package: str) -> Once:
    """The same reader on the same shards."""
    from scviaduct.mapping.reading import read_block
    from scviaduct.references.package import Reference
    from scviaduct.sources import open_source

    with open_source(source_of(collection, cells)) as source:
        shards = source.scan(SHARD).shards
    known = Reference.load(package)

    def once() -> dict[str, Any]:
        return {"cells": sum(read_block(shard, known, KEPT).n_cells for shard in shards)}

    return once


def plain(collection: str, cells: int, saved: str, batch: int) -> Once:
    """What one writes with scvi-tools and cellxgene-census."""
    import cellxgene_census
    import scvi
    import torch

    torch.set_num_threads(1)
    with quiet():
        genes = scvi.model.SCANVI.load(saved, accelerator="cpu").adata.var_names.tolist()

    def once() -> dict[str, Any]:
        latents, labels = [], []
        with quiet(), cellxgene_census.open_soma(uri=collection) as census:
            for first in range(0, cells, SHARD):
                query = cellxgene_census.get_anndata(
                    census,
                    ORGANISM,
                    var_value_filter=f"feature_id in {genes}",
                    obs_coords=slice(first, min(first + SHARD, cells) - 1),
                    obs_column_names=["assay", *KEPT],
                )
                query.var_names = query.var["feature_id"].to_numpy(str)
                query.obs["cell_type"] = UNLABELED
                model = scvi.model.SCANVI.load_query_data(query, saved, accelerator="cpu")
                model.is_trained = True
                latents.append(model.get_latent_representation(batch_size=batch))
                labels.append(model.predict(batch_size=batch))
        return {"cells": len(np.concatenate(latents)), "labels": len(np.unique(np.concatenate(labels)))}

    return once
