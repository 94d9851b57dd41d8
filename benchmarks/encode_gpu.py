"""Encoding on a GPU, cells a second: ours, plain scvi-tools on the same card, and what the bytes alone would take.

    python -m benchmarks.encode_gpu [--out FILE] [--cells N]

Both ways start from CSR in ordinary host memory and end with the latent in host memory. The models are SCANVI with
their initial weights, the counts have the density of real data. The limit is the measured bandwidth from pinned memory
over the bytes of a cell: 8 a count as a reader gives them, and as many as were really sent. scvi-tools takes its best
of several batch sizes. Errors are against plain scvi-tools on the CPU in float32. ``--device cpu`` runs every step on a
few cells without a GPU, to see that the command works; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import subprocess
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import scvi
import torch
from scipy import sparse

from scviaduct.families import gather, narrowing
from scviaduct.families.base import Covariates, Encoded
from scviaduct.families.device import DeviceEncoder
from scviaduct.families.lane import Lane
from scviaduct.families.vae import fold

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from scviaduct.families.network import Network

CONFIGURATIONS = {
    "2,000 genes, 128 x 1": (2000, 128, 1, 158),
    "8,000 genes, 128 x 1": (8000, 128, 1, 667),
    "8,000 genes, 512 x 2": (8000, 512, 2, 667),
}
_CELLS, _SHARD, _CHECKED = 1_048_576, 16_384, 4_096
_BATCHES = (1_024, 4_096, 32_768, 131_072)
_FEEDERS = (1, 2, 4, 8, 12, 16)
_TIMES = 5
_PIECE = 1 << 20
_PACKAGES = ("scvi-tools", "torch", "triton", "anndata", "numpy", "numba", "lightning")


def main() -> None:
    """Measure everything, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--cells", type=int, default=_CELLS, help="cells of 158 counts; fewer of those that have more")
    parser.add_argument("--out", type=Path, help="JSON file to write the figures to")
    told = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("scvi").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    lane = Lane.of(told.device, 1)
    found: dict[str, Any] = {"command": f"python -m benchmarks.encode_gpu --device {told.device}", **_machine(lane)}
    found["bandwidth"] = _bandwidth(lane)
    found["narrowing"] = _narrowing(lane)
    _show(found)
    found["rows"] = []
    for name, sizes in CONFIGURATIONS.items():
        row = {"configuration": name, **_measure(*sizes, lane=lane, cells=told.cells, bandwidth=found["bandwidth"])}
        found["rows"].append(row)
        _show(row)
        if told.out:
            told.out.write_text(json.dumps(found, indent=1) + "\n")


def _measure(
    genes: int, hidden: int, layers: int, nnz: int, *, lane: Lane, cells: int, bandwidth: dict[str, float]
) -> dict[str, Any]:
    """One configuration: ours, scvi-tools, the limits, precisions and kernels."""
    device, n_cells = str(lane.device), max(_SHARD, cells * 158 // nnz // _SHARD * _SHARD)
    model, network = _model(genes, hidden, layers, nnz)
    held = _counts(n_cells, genes, nnz)
    there = network.to(device)
    ours = _ours(there, device, held)
    exact = [name for name in ours["cells_per_second"] if name.endswith("feeders")]
    best = max(exact, key=lambda name: ours["cells_per_second"][name]["best"])
    speed = ours["cells_per_second"][best]["best"]
    plain8 = 8 * held.nnz / n_cells + 8
    sent = 3 * held.nnz / n_cells + 4
    limits = {"8 bytes a count": bandwidth["to_device"] / plain8, "bytes sent": bandwidth["to_device"] / sent}
    row: dict[str, Any] = {"cells": n_cells, "counts_per_cell": held.nnz / n_cells}
    row["bytes_per_cell"] = {"csr": plain8, "sent": sent}
    row |= {"ours": ours, "best": best, "limit_cells_per_second": limits}
    row["share_of_limit"] = {name: speed / limit for name, limit in limits.items()}
    row["error"] = _errors(model, there, device, held)
    row["kernels_us"] = _kernels(there, lane, held)
    row["plain"] = _plain(model, held, device)
    row["ratio"] = speed / row["plain"]["best"]
    return row


def _model(genes: int, hidden: int, layers: int, nnz: int) -> tuple[Any, Network]:
    cells = anndata.AnnData(_counts(_CHECKED, genes, nnz))
    cells.obs["label"] = [f"type {i % 19}" for i in range(cells.n_obs)]
    scvi.settings.seed = 0
    scvi.model.SCANVI.setup_anndata(cells, labels_key="label", unlabeled_category="none")
    model = scvi.model.SCANVI(cells, n_hidden=hidden, n_layers=layers, n_latent=30)
    model.is_trained = True
    model.module.eval()
    labels = tuple(model._label_mapping)[:19]  # noqa: SLF001
    with torch.inference_mode():
        return model, fold(model.module, genes, labels)


def _ours(network: Network, device: str, held: sparse.csr_matrix) -> dict[str, Any]:
    """From counts in host memory to latents there: by threads, by the size of blocks, by what counts travel as."""
    n_cells, rates, whole = held.shape[0], {}, _parts(held)
    for feeders in _FEEDERS:
        encoder = DeviceEncoder({"latent": network}, device, feeders=feeders)
        rates[f"{feeders} feeders"] = _rate(partial(_encoded, encoder, [whole]), n_cells)
    told = encoder.path
    shards = [_parts(held[start : start + _SHARD]) for start in range(0, n_cells, _SHARD)]
    for feeders in (1, 4, 8):
        encoder = DeviceEncoder({"latent": network}, device, feeders=feeders)
        name = f"{feeders} feeders, shards of {_SHARD:,}"
        rates[name] = _rate(partial(_encoded, encoder, shards), n_cells)
    for name, value in {"uint16": 300.0, "float32": 0.5}.items():
        other = whole[2].copy()
        other[::1000] = value
        encoder = DeviceEncoder({"latent": network}, device, feeders=8)
        rates[f"8 feeders, {name}"] = _rate(partial(_encoded, encoder, [(*whole[:2], other)]), n_cells)
    for precision in ("tf32", "bf16"):
        encoder = DeviceEncoder({"latent": network}, device, feeders=8, precision=precision)
        rates[f"8 feeders, {precision}"] = _rate(partial(_encoded, encoder, [whole]), n_cells)
    encoder = DeviceEncoder({"latent": network}, device, feeders=8, kernel="torch")
    rates["8 feeders, embedding_bag"] = _rate(partial(_encoded, encoder, [whole]), n_cells)
    return {"path": told, "cells_per_second": rates}


def _encoded(encoder: DeviceEncoder, blocks: Sequence[tuple[Any, Any, Any]]) -> list[Encoded]:
    return [encoder.encode(*block, Covariates()) for block in blocks]


def _plain(model: Any, held: sparse.csr_matrix, device: str) -> dict[str, Any]:
    """scvi-tools on the same card, by batch size; its latents alone, labels would take a second pass."""
    cells = anndata.AnnData(held[: min(held.shape[0], 131_072)])
    cells.obs["label"] = "none"
    model.to_device(device)
    found = {}
    for size in _BATCHES:
        if size <= cells.n_obs:
            call = partial(model.get_latent_representation, cells, batch_size=size)
            found[f"{size:,}"] = _rate(call, cells.n_obs, times=2)["best"]
    return {"cells": cells.n_obs, "cells_per_second": found, "best": max(found.values(), default=float("nan"))}


def _errors(model: Any, network: Network, device: str, held: sparse.csr_matrix) -> dict[str, Any]:
    """Largest difference from scvi-tools on the CPU, in sd of the latent, and labels that differ, by precision."""
    cells = anndata.AnnData(held[:_CHECKED])
    cells.obs["label"] = "none"
    model.to_device("cpu")
    expected, labels = model.get_latent_representation(cells), model.predict(cells)
    found: dict[str, Any] = {}
    for precision in ("float32", "tf32", "bf16"):
        encoder = DeviceEncoder({"latent": network}, device, precision=precision)
        encoded = encoder.encode(*_parts(held[:_CHECKED]), Covariates())
        difference = np.abs(encoded.mean - expected).max() / expected.std()
        out = torch.tensor(encoded.location, device=device)
        for layer in network.classifier:
            out = layer(out)
        told = np.asarray(network.labels)[out.argmax(1).cpu().numpy()]
        found[precision] = {"sd": float(difference), "labels_that_differ": int((told != labels).sum())}
    return found | {"cells": _CHECKED}


def _kernels(network: Network, lane: Lane, held: sparse.csr_matrix) -> dict[str, float]:
    """The first layer of a shard that lies on the device, us: ways of PyTorch, and the kernel in several shapes."""
    part = held[:_SHARD]
    weight = network.layers[0].weight[:, : network.n_genes].T.contiguous()
    with torch.inference_mode(), lane.held():
        pointers, genes = lane.send(part.indptr.astype(np.int32)), lane.send(part.indices.astype(np.int32))
        values = torch.log1p(lane.send(part.data))
        matrix = torch.sparse_csr_tensor(pointers, genes, values, part.shape)
        feed = lane.feed(*_parts(part), n_genes=part.shape[1], step=_SHARD)
        sent = next(feed)  # the whole shard, or as much as is a piece
        share = (sent.stop - sent.start) / _SHARD
        out = torch.empty((sent.stop - sent.start, weight.shape[1]), device=lane.device)
        dense = matrix.to_dense()
        calls: dict[str, Callable[[], Any]] = {
            "embedding_bag": lambda: torch.nn.functional.embedding_bag(
                genes, weight, pointers, mode="sum", per_sample_weights=values, include_last_offset=True
            ),
            "sparse CSR @ dense": lambda: matrix @ weight,
            "dense @ dense": lambda: torch.mm(dense, weight),
        }
        found = {name: _device_us(call, lane) for name, call in calls.items()}
        bagged = gather.FirstLayer(network, "torch")
        found["embedding_bag, with log1p and bias"] = _device_us(lambda: bagged(sent, None, out), lane) / share
        if lane.pinned:
            first = gather.FirstLayer(network, "triton")
            for shape in (
                (32, 8, 1),
                (64, 4, 1),
                (64, 8, 1),
                (64, 8, 2),
                (64, 16, 1),
                (128, 4, 1),
                (128, 8, 1),
                (128, 16, 4),
            ):
                first.shape = gather.Shape(*shape)
                name = "Triton, {} columns, {} genes, {} warps".format(*shape)
                found[name] = _device_us(lambda: first(sent, None, out), lane) / share
        feed.close()
    return found


def _bandwidth(lane: Lane) -> dict[str, float]:
    """Bytes a second of copies of 256 MB from and to pinned memory, alone and both at once."""
    n = 1 << 28 if lane.pinned else 1 << 22
    here, there = (torch.ones(n, dtype=torch.uint8, pin_memory=lane.pinned) for _ in range(2))
    up, down = (torch.ones(n, dtype=torch.uint8, device=lane.device) for _ in range(2))
    ways = (lane.module.Stream(), lane.module.Stream())

    def both() -> None:
        for way, (target, source) in zip(ways, ((up, here), (there, down)), strict=True):
            with lane.module.stream(way):
                target.copy_(source, non_blocking=True)
        lane.module.synchronize()

    return {
        "to_device": n / _device_us(lambda: up.copy_(here, non_blocking=True), lane) * 1e6,
        "from_device": n / _device_us(lambda: there.copy_(down, non_blocking=True), lane) * 1e6,
        "each_of_both": _rate(both, n)["best"],
    }


def _narrowing(lane: Lane) -> dict[str, float]:
    """Counts a second that threads write into pinned buffers as 3 bytes; and as 8, as ``memcpy`` would."""
    rng, n = np.random.default_rng(0), 16
    indices = rng.integers(0, 2000, n * _PIECE, dtype=np.int32)
    data = rng.geometric(0.5, n * _PIECE).astype(np.float32)
    buffers = [torch.empty(9 * _PIECE, dtype=torch.uint8, pin_memory=lane.pinned).numpy() for _ in range(n)]
    found = {}
    for gene, count in ((np.uint16, np.uint8), (np.int32, np.float32)):
        layout = narrowing.Layout(1, _PIECE, np.dtype(gene), np.dtype(count))
        for threads in _FEEDERS:
            with ThreadPoolExecutor(threads) as pool:

                def write(i: int, layout: narrowing.Layout = layout) -> None:
                    part = slice(i * _PIECE, (i + 1) * _PIECE)
                    _, genes, counts = layout.views(buffers[i])
                    narrowing.narrow(indices[part], data[part], genes, counts, 2000)

                def write_all(pool: ThreadPoolExecutor = pool, write: Callable[[int], None] = write) -> None:
                    list(pool.map(write, range(n)))

                name = f"{layout.gene.itemsize + layout.count.itemsize} bytes, {threads} threads"
                found[name] = _rate(write_all, n * _PIECE)["best"]
    return found


def _counts(n: int, genes: int, nnz: int) -> sparse.csr_matrix:
    """Counts of a few thousand cells, repeated."""
    rng = np.random.default_rng(0)
    some = min(n, 4096)
    made = sparse.random(
        some, genes, nnz / genes, "csr", np.float32, rng, data_rvs=lambda size: rng.geometric(0.5, size)
    )
    made.sort_indices()
    return sparse.csr_matrix(sparse.vstack([made] * (n // some)))


def _parts(counts: sparse.csr_matrix) -> tuple[Any, Any, Any]:
    return counts.indptr.astype(np.int64), counts.indices, counts.data


def _rate(call: Callable[[], Any], n: int, times: int = _TIMES) -> dict[str, float]:
    """Things a second, the best and the median of some times after one that warms up."""
    call()
    spent = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        spent.append(time.perf_counter() - began)
    return {"best": n / min(spent), "median": n / statistics.median(spent)}


def _device_us(call: Callable[[], Any], lane: Lane, times: int = 20) -> float:
    """Microseconds on the device, the median of some times: between events, without the launches."""
    if not lane.pinned:
        return 1e6 / _rate(call, 1, times=2)["best"]
    call()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)]
    for begin, end in marks:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    spent: list[float] = [begin.elapsed_time(end) for begin, end in marks]
    return 1e3 * statistics.median(spent)


def _machine(lane: Lane) -> dict[str, Any]:
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    card = {"name": "none, a CPU", "driver": None}
    if lane.pinned:
        query = [
            "nvidia-smi",
            "--query-gpu=driver_version,pcie.link.gen.max,pcie.link.width.max",
            "--format=csv,noheader",
        ]
        driver, generation, width = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split(",")[
            :3
        ]
        card = {"name": torch.cuda.get_device_name(), "driver": driver, "cuda": torch.version.cuda}
        card["pcie"] = f"generation {generation.strip()}, {width.split()[0]} lanes"
    processor = next(
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    )
    host = {"processor": processor, "cpus": os.cpu_count(), "system": platform.platform(terse=True)}
    return {"card": card, "host": host, "python": platform.python_version(), "versions": versions}


def _show(found: dict[str, Any]) -> None:
    """A line a figure."""
    print(json.dumps(_rounded(found)), flush=True)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return float(f"{value:.3g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
