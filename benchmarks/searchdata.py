"""Latents to search: a mixture with clusters of unequal size and shape, on disk as arrays and as a committed store."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from scviaduct.values import digest

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    from scviaduct.store import Space

    Vectors = npt.NDArray[np.float32]

DIMENSIONS, CLUSTERS, NEIGHBORS = 30, 200, 30
FILTERS = {
    "filter_recall_0p1": ("0.1 %, one dataset", "study = 'small'"),
    "filter_recall_2_correlated": ("2 %, cells of a few clusters", "tissue = 'rare'"),
    "filter_recall_10": ("10 %, at random", "assay = 'other'"),
}
"""Figure to its heading and the condition."""
_UNIT = 16_384


@dataclass(frozen=True, slots=True)
class Latents:
    """What is searched.

    Attributes
    ----------
    cells, queries
        Numbers.
    seed
        Of everything.
    """

    cells: int
    queries: int
    seed: int = 0

    def folder(self, scratch: Path) -> Path:
        """Where it lies, made if it is not there: vectors, queries, the truth, and kept columns."""
        path = scratch / f"latents-{self.cells}-{digest(asdict(self))[:8]}"
        if not (path / "truth.npy").exists():
            print(f"making {path.name}", flush=True)
            path.mkdir(parents=True, exist_ok=True)
            self._make(path)
        return path

    def _make(self, path: Path) -> None:
        random = np.random.default_rng(self.seed)
        weights = random.dirichlet(np.ones(CLUSTERS))
        centres = random.normal(0, 1.5, (CLUSTERS, DIMENSIONS))
        # Cells of a cluster differ along few axes, other ones in each cluster.
        scales = 0.2 + random.exponential(0.5, (CLUSTERS, DIMENSIONS)) * (random.random((CLUSTERS, DIMENSIONS)) < 0.4)

        def draw(n: int) -> tuple[npt.NDArray[np.int64], Vectors]:
            of = random.choice(CLUSTERS, n, p=weights)
            drawn = centres[of] + scales[of] * random.normal(size=(n, DIMENSIONS))
            return of, drawn.astype(np.float32)

        cluster, vectors = draw(self.cells)
        _, queries = draw(self.queries)
        np.savez(path / "columns.npz", allow_pickle=False, **_columns(random, cluster))
        np.save(path / "vectors.npy", vectors)
        np.save(path / "queries.npy", queries)
        np.save(path / "truth.npy", nearest(vectors, queries))


def _columns(random: np.random.Generator, cluster: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.str_]]:
    """Kept columns: a small study of few clusters, a rare tissue that is nearly those of some clusters, an assay."""
    n = len(cluster)
    sizes = np.bincount(cluster, minlength=CLUSTERS)
    order = np.argsort(sizes)
    # Clusters from the smallest on, until 1.8 % are theirs; the rest of the tissue is anywhere.
    chosen = order[np.cumsum(sizes[order]) <= 0.018 * n]
    rare = np.isin(cluster, chosen) | (random.random(n) < 0.002)
    few = np.flatnonzero(np.isin(cluster, order[-5:]))
    small = np.zeros(n, bool)
    small[random.choice(few, min(len(few), max(NEIGHBORS, n // 1000)), replace=False)] = True
    other = random.random(n) < 0.1
    return {
        "study": np.where(small, "small", "large"),
        "tissue": np.where(rare, "rare", "common"),
        "assay": np.where(other, "other", "usual"),
    }


def nearest(vectors: Vectors, queries: Vectors, k: int = NEIGHBORS) -> npt.NDArray[np.int64]:
    """Positions of the k nearest, by comparing with all."""
    import faiss

    keeper = faiss.ResultHeap(len(queries), min(k, len(vectors)))
    step = 100_000
    for start in range(0, len(vectors), step):
        block = np.ascontiguousarray(vectors[start : start + step])
        distance, found = faiss.knn(queries, block, min(k, len(block)))
        keeper.add_result(distance, found + start)
    keeper.finalize()
    found_: npt.NDArray[np.int64] = keeper.I
    return found_


def recall(found: npt.NDArray[np.int64], truth: npt.NDArray[np.int64]) -> float:
    """Share of the true neighbours that were found."""
    return float(np.mean([np.isin(a, b).mean() for a, b in zip(truth, found, strict=True)]))


def store_of(scratch: Path, latents: Latents) -> Space:
    """The latents as a space of a store: staged and committed as a run does; the cell of row i is called ``i``."""
    from scviaduct.store import Store

    data = latents.folder(scratch)
    path = data / "store"
    if not (path / "made").exists():
        _commit(data, path)
        (path / "made").touch()
    return Store.open(path).space()


def _commit(data: Path, path: Path) -> None:
    import pyarrow as pa

    from scviaduct.store import Stager, Store
    from scviaduct.values import CellBlock, Mapping, Settings, Shard, Unit

    vectors, columns = np.load(data / "vectors.npy", mmap_mode="r"), np.load(data / "columns.npz")
    columns = {name: columns[name] for name in columns}
    space = Store.create(path).create_space("latents", "0123456789abcdef" * 2, DIMENSIONS, ())
    settings = Settings(keep_obs=dict.fromkeys(columns, "string"))
    stager = Stager(str(space.path), f"{space.reference}@{space.digest[:12]}", "run")
    done = []
    for start in range(0, len(vectors), _UNIT):
        stop = min(start + _UNIT, len(vectors))
        rows, n = np.arange(start, stop), stop - start
        obs = {name: pa.array(values[start:stop]).dictionary_encode() for name, values in columns.items()}
        table = pa.table({"observation_id": pa.array(rows.astype(str)), **obs})
        shard = Shard("file:///latents", "file:///latents", "1", "", "all", start, stop, n, f"{start}")
        nothing = np.zeros(0, np.int32), np.zeros(0, np.float32)
        block = CellBlock(shard, np.zeros(n + 1, np.int64), *nothing, 1, rows, table)
        none, unsure = np.full(n, -1, np.int32), np.full(n, np.nan, np.float32)
        latent = np.array(vectors[start:stop])
        mapping = Mapping(latent, np.ones(n, bool), none, (), unsure, unsure.copy(), unsure.copy())
        done.append(stager.stage(Unit.of(shard, space.digest, settings), block, mapping, settings))
    space.commit(done, settings.keep_obs, {"run": "run"}, lambda: None)
