"""Encoding: our encoder against plain scvi-tools on the same cells and device, in one run.

``python -m benchmarks.encode [--device cuda] [--out FILE]``, or as a part of the suite. The models have the sizes of
typical references and their initial weights, the counts the density of a Census in that many genes. Both ways start
from CSR in host memory and end with the latent there; scvi-tools takes its best of several batch sizes. On a CPU both
use one thread of one core and are compared by CPU-seconds, on a GPU by the clock.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.context import Context
from benchmarks.data import Design, csr
from benchmarks.machine import machine
from benchmarks.models import CENSUS, TYPICAL, UNLABELED, WIDE, quiet, reference
from benchmarks.turns import Way, in_turns
from benchmarks.values import Figure, Ratio, Report

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.values import Measurement

    Once = Callable[[], dict[str, Any]]

TITLE = "Encoding"
COUNTS = (
    "CPU-seconds of one thread on one core, from CSR in memory to the latent in memory; models and cells are loaded."
    " scvi-tools is `get_latent_representation` at the quickest of four batch sizes, which its process tries first."
    " The difference is that of the worst cell, in standard deviations of the latent."
)
SIZES = {
    "encode_2000x128": ("2,000 genes, 128 x 1", TYPICAL, 158),
    "encode_8000x128": ("8,000 genes, 128 x 1", WIDE, 667),
    "encode_census": ("8,000 genes, 512 x 2, the Census's model", CENSUS, 667),
}
"""Figure to its heading, the model, and the non-zeros of a cell."""
_BATCHES = (128, 512, 1024, 4096)


def run(context: Context, device: str = "cpu", cells: int | None = None) -> Report:
    """Compare every size."""
    cells, times = cells or context.pick(16_384, 4_096), 5
    figures, measured, facts = [], {}, {}
    for name, (heading, size, nonzeros) in SIZES.items():
        design = Design(cells, size.genes, nonzeros)
        saved, package = reference(context.folder, design, size)
        out = {who: str(context.folder / f"latent-{name}-{who}.npy") for who in ("ours", "plain")}
        told = {"cells": cells, "genes": size.genes, "nonzeros": nonzeros, "device": device}
        mine = told | {"package": str(package), "out": out["ours"], "times": times}
        ways = [
            Way("ours", "benchmarks.encode:ours", mine, times * cells),
            Way("scvi-tools", "benchmarks.encode:plain", told | {"saved": str(saved), "out": out["plain"]}, cells),
        ]
        found = measured[heading] = in_turns(ways, context.log, context.samples)
        figures.append(_figure(name, found, device))
        facts[heading] = {"plain_batch": found[1].last("batch"), "difference_sd": _difference(out)}
    return Report(TITLE, COUNTS, figures, measured, facts)


def _figure(name: str, found: list[Measurement], device: str) -> Figure:
    """By CPU-seconds; by the clock where most of the work is not the CPU's."""
    if device == "cpu":
        return Figure.ratio(name, Ratio.of(*found))
    return Figure(name, found[1].wall / found[0].wall)


def _difference(out: dict[str, str]) -> float:
    ours_, plain_ = np.load(out["ours"]), np.load(out["plain"])
    return float((np.abs(ours_ - plain_) / plain_.std(axis=0)).max())


def ours(cells: int, genes: int, nonzeros: int, device: str, package: str, out: str, times: int) -> Once:
    """The package's encoder, several times in a sample: once takes 50 ms."""
    import torch

    from scviaduct.families import Covariates
    from scviaduct.references.package import Reference

    torch.set_num_threads(1)
    encoder = Reference.load(package).encoder(device)
    counts = csr(Design(cells, genes, nonzeros))
    parts = counts.indptr.astype(np.int64), counts.indices.astype(np.int32), counts.data
    np.save(out, encoder.encode(*parts, Covariates()).mean)

    def once() -> dict[str, Any]:
        return {"cells": sum(len(encoder.encode(*parts, Covariates()).mean) for _ in range(times))}

    return once


def plain(cells: int, genes: int, nonzeros: int, device: str, saved: str, out: str) -> Once:
    """scvi-tools at its best batch size."""
    import anndata
    import scvi
    import torch

    torch.set_num_threads(1)
    query = anndata.AnnData(csr(Design(cells, genes, nonzeros)))
    query.var_names = Design(cells, genes, nonzeros).gene_ids()
    query.obs["assay"], query.obs["cell_type"] = "assay 0", UNLABELED
    with quiet():
        model = scvi.model.SCANVI.load(saved, adata=query, accelerator="cpu" if device == "cpu" else "gpu")
        np.save(out, model.get_latent_representation())
        spent = {}
        for size in _BATCHES:
            model.get_latent_representation(batch_size=size)
            began = time.perf_counter() if device != "cpu" else time.process_time()
            model.get_latent_representation(batch_size=size)
            spent[size] = (time.perf_counter() if device != "cpu" else time.process_time()) - began
    batch = min(spent, key=lambda size: spent[size])

    def once() -> dict[str, Any]:
        return {"cells": len(model.get_latent_representation(batch_size=batch)), "batch": batch}

    return once


def main() -> None:
    """Encoding alone, on either device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--cells", type=int, help="cells; 16,384 on a CPU and 262,144 on a GPU unless said")
    parser.add_argument("--folder", type=Path, default=Path("build/bench"), help="scratch; kept for another run")
    parser.add_argument("--out", type=Path, help="JSON file to write the figures to")
    told = parser.parse_args()
    told.folder.mkdir(parents=True, exist_ok=True)
    context = Context(told.folder.absolute(), told.folder.absolute() / "encode.log")
    report = run(context, told.device, told.cells or (16_384 if told.device == "cpu" else 262_144))
    rows = []
    for (heading, found), figure in zip(report.measurements.items(), report.figures, strict=True):
        seconds = [one.cpu if told.device == "cpu" else one.wall for one in found]
        rates = {one.way: one.amount / spent for one, spent in zip(found, seconds, strict=True)}
        rows.append(
            {"configuration": heading, "ratio": figure.value, "cells_per_second": rates, **report.facts[heading]}
        )
        print(
            f"{heading}: ratio {figure.value:.1f}; " + ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
        )
    if told.out:
        command = f"python -m benchmarks.encode --device {told.device}"
        found_ = {"command": command, "machine": machine(), "device": told.device, "rows": rows}
        told.out.write_text(json.dumps(found_, indent=1) + "\n")


if __name__ == "__main__":
    main()
