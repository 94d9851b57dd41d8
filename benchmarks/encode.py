"""Encoding, cells a second: our sparse encoder against the same network on dense mini-batches, on one device.

``python -m benchmarks.encode [--device cuda]``. The networks have random weights and the sizes of typical references;
counts are simulated at the densities of real data. Both ways start from CSR in host memory and end with the latent
there. The dense way makes each mini-batch dense on the device, as scvi-tools does at its fastest, and takes its best of
several batch sizes. On a CPU both use one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import sparse
from torch import nn

from scviaduct.families.base import Covariates
from scviaduct.families.network import Layer, Network
from scviaduct.families.vae import VaeEncoder

if TYPE_CHECKING:
    from collections.abc import Callable

CONFIGURATIONS = {
    "2,000 genes, 128 x 1": (2000, 128, 1, 0.08),
    "8,000 genes, 128 x 1": (8000, 128, 1, 0.08),
    "8,000 genes, 512 x 2": (8000, 512, 2, 0.08),
}
_BATCHES = {"cpu": (128, 512, 1024), "cuda": (1024, 4096, 16_384)}
_CELLS = {"cpu": 8192, "cuda": 262_144}
_LATENT = 30


def main() -> None:
    """Time both ways for every configuration, check that they agree, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, help="JSON file to write the figures to")
    told = parser.parse_args()
    torch.set_num_threads(1)
    rows = [_compare(name, *sizes, device=told.device) for name, sizes in CONFIGURATIONS.items()]
    device = torch.cuda.get_device_name() if told.device == "cuda" else "one CPU thread"
    if told.out:
        found = {"device": device, "torch": torch.__version__, "numpy": np.__version__, "rows": rows}
        told.out.write_text(json.dumps(found, indent=1) + "\n")
    print(device)
    for row in rows:
        print(
            f"{row['configuration']}: sparse {row['sparse']:,.0f} cells/s, dense {row['dense']:,.0f} (batch"
            f" {row['dense_batch']:,}), ratio {row['ratio']:.1f}; largest difference {row['difference']:.1e} sd"
        )


def _compare(name: str, genes: int, hidden: int, layers: int, density: float, *, device: str) -> dict[str, Any]:
    counts = _counts(_CELLS[device], genes, density)
    network = _network(genes, hidden, layers)
    parts = counts.indptr.astype(np.int64), counts.indices.astype(np.int32), counts.data
    encoder = VaeEncoder(network, device)
    latent, fast = _best(lambda: encoder.encode(*parts, Covariates()).mean, device)
    dense = {
        batch: _best(lambda b=batch: _dense(network.to(device), counts, b, device), device)
        for batch in _BATCHES[device]
    }
    batch = min(dense, key=lambda size: dense[size][1])
    expected, slow = dense[batch]
    return {
        "configuration": name,
        "cells": counts.shape[0],
        "sparse": counts.shape[0] / fast,
        "dense": counts.shape[0] / slow,
        "dense_batch": batch,
        "ratio": slow / fast,
        "difference": float(np.abs(latent - expected).max() / expected.std()),
    }


def _counts(cells: int, genes: int, density: float) -> sparse.csr_matrix:
    """Counts of a few thousand cells, repeated."""
    rng = np.random.default_rng(0)
    some = min(cells, 8192)
    made = sparse.random(some, genes, density, "csr", np.float32, rng, data_rvs=lambda n: rng.geometric(0.5, n))
    made.sort_indices()
    return sparse.vstack([made] * (cells // some), format="csr")


def _network(genes: int, hidden: int, layers: int) -> Network:
    torch.manual_seed(0)

    def layer(n_in: int, n_out: int, activation: str = "ReLU()") -> Layer:
        linear = nn.Linear(n_in, n_out)
        return Layer(linear.weight.detach(), linear.bias.detach(), activation=activation)

    stack = [layer(genes if i == 0 else hidden, hidden) for i in range(layers)]
    return Network(tuple(stack), layer(hidden, _LATENT, ""), layer(hidden, _LATENT, ""), genes)


@torch.inference_mode()
def _dense(network: Network, counts: sparse.csr_matrix, batch: int, device: str) -> np.ndarray:
    latent = np.empty((counts.shape[0], _LATENT), np.float32)
    for start in range(0, counts.shape[0], batch):
        part = counts[start : start + batch]
        columns, values = (torch.from_numpy(array).to(device) for array in (part.indices, part.data))
        rows = torch.repeat_interleave(
            torch.arange(part.shape[0], device=device), torch.from_numpy(np.diff(part.indptr)).to(device)
        )
        hidden = torch.zeros(part.shape, device=device)
        hidden[rows, columns.long()] = torch.log1p(values)
        for layer in network.layers:
            hidden = layer(hidden)
        network.variance(hidden)
        latent[start : start + batch] = network.mean(hidden).cpu().numpy()
    return latent


def _best(call: Callable[[], np.ndarray], device: str) -> tuple[np.ndarray, float]:
    """The result, and the shortest of three times after one that warms up."""
    call()
    spent = []
    for _ in range(3):
        began = time.perf_counter()
        result = call()
        if device == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - began)
    return result, min(spent)


if __name__ == "__main__":
    main()
