"""Encoding, cells a second: our encoder against plain scvi-tools on the same cells and device, in one run.

``python -m benchmarks.encode [--device cuda]``. The models have the sizes of typical references and their initial
weights, the counts the density of real data. Both ways start from CSR in host memory and end with the latent there;
scvi-tools takes its best of several batch sizes. On a CPU both use one thread.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import scvi
import torch
from scipy import sparse

from benchmarks.machine import machine
from scviaduct.families.base import Covariates
from scviaduct.families.vae import VaeEncoder, fold

if TYPE_CHECKING:
    from collections.abc import Callable

CONFIGURATIONS = {
    "2,000 genes, 128 x 1": (2000, 128, 1),
    "8,000 genes, 128 x 1": (8000, 128, 1),
    "8,000 genes, 512 x 2": (8000, 512, 2),
}
_BATCHES = (128, 512, 1024, 4096)
_CELLS = {"cpu": 8192, "cuda": 262_144}
_DENSITY = 0.08
_TIMES = 3


def main() -> None:
    """Time both ways for every configuration, check that they agree, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, help="JSON file to write the figures to")
    told = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("scvi").setLevel(logging.ERROR)
    found = {"command": f"python -m benchmarks.encode --device {told.device}", "machine": machine()}
    found["device"] = torch.cuda.get_device_name() if told.device == "cuda" else "one CPU thread"
    found["rows"] = [_compare(name, *sizes, device=told.device) for name, sizes in CONFIGURATIONS.items()]
    if told.out:
        told.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{found['device']}, {found['machine']['processor']}, load before {found['machine']['load_before'][0]}")
    for row in found["rows"]:
        print(
            f"{row['configuration']}: {row['ours']:,.0f} cells/s, scvi-tools {row['plain']:,.0f} (batch size"
            f" {row['plain_batch']:,}), ratio {row['ratio']:.1f}; largest difference {row['difference']:.1e} sd"
        )


def _compare(name: str, genes: int, hidden: int, layers: int, *, device: str) -> dict[str, Any]:
    cells = _cells(_CELLS[device], genes)
    scvi.settings.seed = 0
    scvi.model.SCVI.setup_anndata(cells)
    model = scvi.model.SCVI(cells, n_hidden=hidden, n_layers=layers, n_latent=30)
    model.is_trained = True
    model.to_device(device)
    model.module.eval()
    with torch.inference_mode():
        encoder = VaeEncoder({"latent": fold(model.module, genes, ())}, device)
    counts = cells.X
    parts = counts.indptr.astype(np.int64), counts.indices.astype(np.int32), counts.data
    latent, fast = _best(lambda: encoder.encode(*parts, Covariates()).mean)
    plain = {size: _best(lambda b=size: model.get_latent_representation(batch_size=b)) for size in _BATCHES}
    batch = min(plain, key=lambda size: plain[size][1])
    expected, slow = plain[batch]
    return {
        "configuration": name,
        "cells": cells.n_obs,
        "ours": cells.n_obs / fast,
        "plain": cells.n_obs / slow,
        "plain_batch": batch,
        "ratio": slow / fast,
        "difference": float(np.abs(latent - expected).max() / expected.std()),
    }


def _cells(n: int, genes: int) -> anndata.AnnData:
    """Counts of a few thousand cells, repeated."""
    rng = np.random.default_rng(0)
    some = min(n, 8192)
    made = sparse.random(some, genes, _DENSITY, "csr", np.float32, rng, data_rvs=lambda size: rng.geometric(0.5, size))
    made.sort_indices()
    return anndata.AnnData(sparse.csr_matrix(sparse.vstack([made] * (n // some))))


def _best(call: Callable[[], np.ndarray]) -> tuple[np.ndarray, float]:
    """The result, and the shortest of some times after one that warms up; both ways end with the result on the host."""
    call()
    spent = []
    for _ in range(_TIMES):
        began = time.perf_counter()
        result = call()
        spent.append(time.perf_counter() - began)
    return result, min(spent)


if __name__ == "__main__":
    main()
