"""Our index and search, through the store's public interface: all that the suite knows of it is here."""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.searchdata import FILTERS, NEIGHBORS, Latents, nearest, recall, store_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    Once = Callable[[], dict[str, Any]]


def _searcher(folder: str, cells: int, queries: int) -> tuple[Any, npt.NDArray[np.float32], Path]:
    latents = Latents(cells, queries)
    searcher = store_of(Path(folder), latents).searcher(threads=1)
    data = latents.folder(Path(folder))
    return searcher, np.load(data / "queries.npy"), data


def _hits(searcher: Any, latent: npt.NDArray[np.float32], where: str | None = None) -> Any:
    from scviaduct.store.search import Queries

    names = [str(number) for number in range(len(latent))]
    return searcher.search(Queries(["queries"] * len(latent), names, latent), NEIGHBORS, where)


def _found(hits: Any, queries: int) -> npt.NDArray[np.int64]:
    """Rows of the neighbours, as the cells are called."""
    found: npt.NDArray[np.int64] = hits.table["observation_id"].to_numpy().astype(np.int64).reshape(queries, -1)
    return found


def build(folder: str, cells: int, queries: int) -> Once:
    """From the committed parquet files to an index that can be opened."""
    from scviaduct.store.index import ensure_index

    latents = Latents(cells, queries)
    space = store_of(Path(folder), latents)

    def once() -> dict[str, Any]:
        shutil.rmtree(space.path / "index", ignore_errors=True)
        manifest = ensure_index(space).manifest
        return {"recall": manifest.recall, "lists": manifest.lists, "probes": manifest.probes}

    return once


def vectors(folder: str, cells: int, queries: int) -> Once:
    """From vectors in memory to lists in a file: what building a graph is compared with. No rows, and no reading."""
    from scviaduct.store.index.quantizer import POINTS_PER_LIST, Quantizer, lists_for
    from scviaduct.store.index.segments import in_lists

    latent = np.load(Latents(cells, queries).folder(Path(folder)) / "vectors.npy")
    written = Path(folder) / "lists.f32"

    def once() -> dict[str, Any]:
        size = min(len(latent), POINTS_PER_LIST * lists_for(len(latent)))
        sample = latent[np.sort(np.random.default_rng(0).choice(len(latent), size, replace=False))]
        quantizer = Quantizer.train(sample, len(latent), 1)
        lists, _ = quantizer.assign(latent, 1)
        x, _, _ = in_lists(latent, lists, len(quantizer.centroids))
        x.tofile(written)
        return {"lists": len(quantizer.centroids)}

    return once


def batch(folder: str, cells: int, queries: int) -> Once:
    """All queries at once: positions and distances. Recall of queries midway between two others is told, too."""
    searcher, latent, data = _searcher(folder, cells, queries)
    hits = _hits(searcher, latent)
    reached = recall(_found(hits, len(latent)), np.load(data / "truth.npy"))
    half = len(latent) // 2
    between = (latent[:half] + latent[half : 2 * half]) / np.float32(2)
    truth = nearest(np.load(data / "vectors.npy", mmap_mode="r"), between)
    told = {"recall": reached, "recall_between": recall(_found(_hits(searcher, between), half), truth)}
    told |= {"method": hits.method, "recall_told": hits.recall}

    def once() -> dict[str, Any]:
        searcher.neighbors(latent, NEIGHBORS)
        return told

    return once


def batch_rows(folder: str, cells: int, queries: int) -> Once:
    """All queries at once, and the rows of every neighbour."""
    searcher, latent, _ = _searcher(folder, cells, queries)
    return lambda: {"rows": len(_hits(searcher, latent).table)}


def single(folder: str, cells: int, queries: int) -> Once:
    """One query at a time, milliseconds each: positions and distances, and with rows."""
    searcher, latent, _ = _searcher(folder, cells, queries)

    def once() -> dict[str, Any]:
        told: dict[str, Any] = {}
        ways = {"ms": lambda one: searcher.neighbors(one, NEIGHBORS), "ms_rows": lambda one: _hits(searcher, one)}
        for name, ask in ways.items():
            spent = []
            for query in latent[:300]:
                began = time.perf_counter()
                ask(query[None])
                spent.append(1e3 * (time.perf_counter() - began))
            told[name] = statistics.median(spent)
        return told

    return once


def filtered(folder: str, cells: int, queries: int, figure: str) -> Once:
    """All queries at once under a condition; recall against comparing with every selected cell."""
    searcher, latent, data = _searcher(folder, cells, queries)
    latent, where = latent[:1000], FILTERS[figure][1]
    column, _, value = where.partition(" = ")
    chosen = np.flatnonzero(np.load(data / "columns.npz")[column] == value.strip("'"))
    truth = chosen[nearest(np.load(data / "vectors.npy", mmap_mode="r")[chosen], latent)]
    hits = _hits(searcher, latent, where)
    told = {"recall": recall(_found(hits, len(latent)), truth), "method": hits.method, "recall_told": hits.recall}
    told["share"] = len(chosen) / cells

    def once() -> dict[str, Any]:
        searcher.neighbors(latent, NEIGHBORS, where)
        return told

    return once
