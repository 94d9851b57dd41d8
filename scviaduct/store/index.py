"""The index beside a committed version: vectors to compare, rows to answer with, and an IVF-Flat index over many.

It is derived from one version of a space and lies in a folder of that number, made under another name and renamed. A
newer version makes it stale, and the next search builds anew. All of it is memory-mapped, so that several searches
share it.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

import faiss
import numpy as np
import pyarrow as pa

from scviaduct.errors import StoreError

if TYPE_CHECKING:
    from pathlib import Path

    from scviaduct.store.space import Space
    from scviaduct.values import FloatArray

IVF_FROM = 20_000
"""Cells from which an IVF index is built; below, comparing with every cell takes less than a millisecond a query."""
_NEIGHBORS = 30
_SAMPLE = 256
_RECALL = 0.99
_SEED = 0
_POINTS_PER_LIST = 39  # below, faiss warns that k-means has too few points


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an index is.

    Attributes
    ----------
    version
        Of the space.
    cells, dimensions
        Size; cells without a latent are not in it.
    lists, probes
        Of the IVF index: all lists, and those that a query looks into; 0 for an exact index.
    recall
        Measured share of the 30 true neighbours found, over a sample of the index's own cells; 1 for an exact index.
    """

    version: int
    cells: int
    dimensions: int
    lists: int
    probes: int
    recall: float


@dataclass(frozen=True, slots=True)
class Index:
    """An open index.

    Attributes
    ----------
    manifest
        What it is.
    vectors
        float32, shape ``(n_cells, n_latent)``, memory-mapped.
    rows
        One row per vector: key, label and its uncertainty, kept columns; memory-mapped.
    ivf
        The faiss index; None for an exact one.
    """

    manifest: Manifest
    vectors: FloatArray
    rows: pa.Table
    ivf: Any

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Map a built index into memory."""
        manifest = Manifest(**json.loads((folder / "manifest.json").read_text()))
        shape = (manifest.cells, manifest.dimensions)
        vectors = np.memmap(folder / "vectors.f32", np.float32, "r", shape=shape) if manifest.cells else np.empty(shape)
        with pa.memory_map(str(folder / "rows.arrow")) as source:
            rows = pa.ipc.open_file(source).read_all()
        path = folder / "ivf.faiss"
        ivf = faiss.read_index(str(path), faiss.IO_FLAG_MMAP) if path.exists() else None
        if ivf is not None:
            ivf.nprobe = manifest.probes
        return cls(manifest, np.asarray(vectors, np.float32), rows, ivf)


def manifest_of(space: Space) -> Manifest | None:
    """Manifest of the newest index that there is; None if there is none."""
    built = list(space.path.glob("index/[0-9]*/manifest.json"))
    if not built:
        return None
    return Manifest(**json.loads(max(built, key=lambda path: int(path.parent.name)).read_text()))


def ensure_index(space: Space, as_of: int | None = None) -> Index:
    """Open the index of a version, and build it first if it is not there.

    Raises
    ------
    StoreError
        If the version has no cells with a latent.
    """
    version = space.snapshot(as_of).version
    folder = space.path / "index" / f"{version}"
    if not (folder / "manifest.json").exists():
        _build(space, version, folder)
    return Index.open(folder)


def _build(space: Space, version: int, folder: Path) -> None:
    """Build under another name, then rename; of two builders one finds the folder there and drops its own."""
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    temporary.mkdir(parents=True)
    try:
        cells = _write_rows(space, version, temporary)
        if not cells:
            raise StoreError(
                f"Version {version} of {space.name} has no cell with a latent.", "Map something into it first."
            )
        vectors = np.memmap(temporary / "vectors.f32", np.float32, "r", shape=(cells, space.n_latent))
        lists, probes, recall = _build_ivf(vectors, temporary / "ivf.faiss") if cells >= IVF_FROM else (0, 0, 1.0)
        manifest = Manifest(version, cells, space.n_latent, lists, probes, recall)
        (temporary / "manifest.json").write_text(json.dumps(asdict(manifest)))
        try:
            os.rename(temporary, folder)  # noqa: PTH104 - pathlib's replaces a folder on some systems
        except OSError:
            if not (folder / "manifest.json").exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_rows(space: Space, version: int, folder: Path) -> int:
    """Stream the version's mapped cells into vectors and rows; their number. Memory is bounded by a unit."""
    snapshot = space.snapshot(version)
    names = [name for name in snapshot.names if name != "latent"]
    kinds = space.schema(snapshot)
    plain = pa.schema([(name, _plain(kinds.field(name).type)) for name in names])
    cells = 0
    with (
        (folder / "vectors.f32").open("wb") as vectors,
        pa.OSFile(str(folder / "rows.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, plain) as rows,
    ):
        for table in space.read(["latent", *names], as_of=version):
            mapped = table.filter(table["latent"].is_valid())
            flat = mapped["latent"].combine_chunks().flatten()
            vectors.write(np.ascontiguousarray(flat.to_numpy(), np.float32).tobytes())
            rows.write_table(mapped.select(names).cast(plain))
            cells += len(mapped)
    return cells


def _plain(kind: pa.DataType) -> pa.DataType:
    return pa.string() if pa.types.is_dictionary(kind) else kind


def _build_ivf(vectors: FloatArray, path: Path) -> tuple[int, int, float]:
    """Build IVF-Flat with 4 sqrt(n) lists; lists, probes for a recall of .99, and the recall measured."""
    n, dimensions = vectors.shape
    lists = max(1, min(int(4 * math.sqrt(n)), n // _POINTS_PER_LIST))
    rng = np.random.default_rng(_SEED)
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(dimensions), dimensions, lists)
    index.cp.seed = _SEED
    index.cp.max_points_per_centroid = 64
    train = np.sort(rng.choice(n, min(n, 64 * lists), replace=False))
    index.train(np.ascontiguousarray(vectors[train]))
    step = 100_000
    for start in range(0, n, step):
        index.add(np.ascontiguousarray(vectors[start : start + step]))
    sample = np.ascontiguousarray(vectors[np.sort(rng.choice(n, min(n, _SAMPLE), replace=False))])
    _, truth = exact_neighbors(vectors, sample, _NEIGHBORS)
    probes, recall = 1, 0.0
    while probes <= lists:
        index.nprobe = probes
        _, found = index.search(sample, _NEIGHBORS)
        recall = float(np.mean([np.isin(a, b).mean() for a, b in zip(truth, found, strict=True)]))
        if recall >= _RECALL:
            break
        probes *= 2
    probes = min(probes, lists)
    faiss.write_index(index, str(path))
    return lists, probes, recall


def exact_neighbors(vectors: FloatArray, queries: FloatArray, k: int) -> tuple[FloatArray, Any]:
    """Squared distances and positions of the exact neighbours, over blocks of the vectors."""
    keeper = faiss.ResultHeap(len(queries), k)
    step = 100_000
    for start in range(0, len(vectors), step):
        block = np.ascontiguousarray(vectors[start : start + step])
        distance, found = faiss.knn(queries, block, min(k, len(block)))
        keeper.add_result(distance, found + start)
    keeper.finalize()
    return keeper.D, keeper.I
