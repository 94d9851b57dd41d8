"""Other indexes on the same latents: each built as its makers advise, and searched at the least effort that is right.

Only numpy and the peer are imported, so that another interpreter can run a peer (``--peer-python``).
"""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    Once = Callable[[], dict[str, Any]]
    Search = Callable[[npt.NDArray[np.float32], int], npt.NDArray[np.int64]]
    """Queries and effort to positions of the 30 nearest."""

NEIGHBORS = 30
RECALL = 0.999
_EFFORTS = (4, 8, 12, 16, 24, 32, 48, 64, 100, 150, 250, 400, 800, 1600)


def lists_of(cells: int) -> int:
    """Lists of an IVF index: 4 sqrt(n)."""
    return max(1, min(int(4 * np.sqrt(cells)), cells // 39))


def _load(data: str) -> tuple[Any, Any, Any]:
    """Vectors, queries, and the true neighbours of the queries."""
    vectors, queries, truth = (np.load(Path(data) / f"{name}.npy") for name in ("vectors", "queries", "truth"))
    return vectors, queries, truth


def _recall(found: Any, truth: Any) -> float:
    return float(np.mean([np.isin(a, b).mean() for a, b in zip(truth, found, strict=True)]))


def _least(search: Search, queries: Any, truth: Any, wanted: float) -> tuple[int, float]:
    """The least effort that reaches a recall on some queries, and the recall; the most of all where none does."""

    def reached(effort: int) -> float:
        return _recall(search(queries, effort), truth)

    low, high = _EFFORTS[0] - 1, 0
    for high in _EFFORTS:
        if (recall := reached(high)) >= wanted:
            break
        low = high
    else:
        return high, recall
    while high - low > 1:
        middle = (low + high) // 2
        if (found := reached(middle)) >= wanted:
            high, recall = middle, found
        else:
            low = middle
    return high, recall


def _searched(search: Search, data: str, queries: int | None = None, wanted: float = RECALL) -> Once:
    """All queries at once, at the least effort that reaches a recall; one by one beforehand."""
    _, asked, truth = _load(data)
    asked, truth = asked[:queries], truth[:queries]
    effort, reached = _least(search, asked, truth, wanted)
    spent = []
    for query in asked[:100]:
        began = time.perf_counter()
        search(query[None], effort)
        spent.append(1e3 * (time.perf_counter() - began))
    told = {"recall": reached, "effort": effort, "single_ms": statistics.median(spent), "queries": len(asked)}

    def once() -> dict[str, Any]:
        search(asked, effort)
        return told

    return once


def hnsw_build(data: str, threads: int, links: int = 16) -> Once:
    """faiss HNSW with its default construction, from vectors in memory to a file."""
    import faiss

    faiss.omp_set_num_threads(threads)
    vectors, _, _ = _load(data)

    def once() -> dict[str, Any]:
        index = faiss.IndexHNSWFlat(vectors.shape[1], links)
        index.add(vectors)
        faiss.write_index(index, str(Path(data) / "hnsw.faiss"))
        return {}

    return once


def hnsw(data: str, wanted: float = RECALL) -> Once:
    """The graph that was built."""
    import faiss

    faiss.omp_set_num_threads(1)
    index = faiss.read_index(str(Path(data) / "hnsw.faiss"))

    def search(asked: Any, effort: int) -> Any:
        return index.search(asked, NEIGHBORS, params=faiss.SearchParametersHNSW(efSearch=max(effort, NEIGHBORS)))[1]

    return _searched(search, data, wanted=wanted)


def usearch_build(data: str, threads: int) -> Once:
    """usearch, its defaults."""
    from usearch.index import Index

    vectors, _, _ = _load(data)

    def once() -> dict[str, Any]:
        index = Index(ndim=vectors.shape[1], metric="l2sq", dtype="f32")
        index.add(np.arange(len(vectors)), vectors, threads=threads)
        index.save(str(Path(data) / "index.usearch"))
        return {}

    return once


def usearch(data: str) -> Once:
    """The graph that was built."""
    from usearch.index import Index

    index = Index.restore(str(Path(data) / "index.usearch"))

    def search(asked: Any, effort: int) -> Any:
        index.expansion_search = max(effort, NEIGHBORS)
        return np.atleast_2d(index.search(asked, NEIGHBORS, threads=1).keys).astype(np.int64)

    return _searched(search, data)


def lance(data: str) -> Once:
    """Lance IVF_FLAT; 1,000 queries, because one takes milliseconds."""
    import lancedb
    import pyarrow as pa

    vectors, _, _ = _load(data)
    folder = Path(data) / "lance"
    shutil.rmtree(folder, ignore_errors=True)
    n, d = vectors.shape
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), d)
    table = lancedb.connect(str(folder)).create_table("cells", pa.table({"id": np.arange(n), "vector": column}))
    began, cpu = time.perf_counter(), time.process_time()
    table.create_index(metric="l2", index_type="IVF_FLAT", num_partitions=lists_of(n))
    built = {"build_wall": time.perf_counter() - began, "build_cpu": time.process_time() - cpu}

    def search(asked: Any, effort: int) -> Any:
        told = table.search(list(asked) if len(asked) > 1 else asked[0]).nprobes(effort).limit(NEIGHBORS)
        found = told.select(["id", "_distance"]).to_arrow()
        if len(asked) == 1:
            return found["id"].to_numpy()[None]
        order = np.lexsort((found["_distance"].to_numpy(), found["query_index"].to_numpy()))
        return found["id"].to_numpy()[order].reshape(len(asked), -1)

    once = _searched(search, data, 1000)
    return lambda: once() | built


def tiledb(data: str) -> Once:
    """TileDB vector search, IVF_FLAT in memory."""
    import tiledb.vector_search as vector_search

    vectors, _, _ = _load(data)
    folder = Path(data) / "tiledb"
    shutil.rmtree(folder, ignore_errors=True)
    began, cpu = time.perf_counter(), time.process_time()
    vector_search.ingest("IVF_FLAT", str(folder), input_vectors=vectors, partitions=lists_of(len(vectors)))
    built = {"build_wall": time.perf_counter() - began, "build_cpu": time.process_time() - cpu}
    index = vector_search.IVFFlatIndex(str(folder))

    def search(asked: Any, effort: int) -> Any:
        return index.query(asked, k=NEIGHBORS, nprobe=effort, nthreads=1)[1].astype(np.int64)

    once = _searched(search, data)
    return lambda: once() | built
