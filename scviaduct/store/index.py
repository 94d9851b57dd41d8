"""The index beside a committed version: vectors to compare, rows to answer with, and an IVF-Flat index over many.

It is derived from one version of a space and lies in a folder of that number, made under another name and renamed. A
newer version makes it stale, and the next search builds anew and removes all but the newest two. All of it is
memory-mapped, so that several searches share it; one that was about to open what is removed builds it again.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scviaduct.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from scviaduct.store.space import Space
    from scviaduct.values import FloatArray

IVF_FROM = 20_000
"""Cells from which an IVF index is built; below, comparing with every cell is quick."""
_NEIGHBORS = 30
_CODED = pa.dictionary(pa.int32(), pa.string())
_SAMPLE = 256
_RECALL = 0.99
_SEED = 0
_TRIES = 5
_VALUES = 65_536
"""Distinct values up to which a text column is stored as a dictionary."""
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
        """Map a built index into memory.

        Raises
        ------
        FileNotFoundError
            If it is not there, or is just being removed.
        """
        manifest = Manifest(**json.loads((folder / "manifest.json").read_text()))
        shape = (manifest.cells, manifest.dimensions)
        vectors = np.memmap(folder / "vectors.f32", np.float32, "r", shape=shape) if manifest.cells else np.empty(shape)
        with pa.memory_map(str(folder / "rows.arrow")) as source:
            rows = pa.ipc.open_file(source).read_all()
        ivf = None
        if manifest.lists:
            ivf = _open_ivf(folder / "ivf.faiss")
            ivf.nprobe = manifest.probes
        return cls(manifest, np.asarray(vectors, np.float32), rows, ivf)


def _open_ivf(path: Path) -> Any:
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    except RuntimeError as error:  # faiss knows no other
        if path.exists():
            raise
        raise FileNotFoundError(path) from error


def manifest_of(space: Space) -> Manifest | None:
    """Manifest of the newest index that there is; None if there is none."""
    for folder in _built(space):
        with suppress(FileNotFoundError):  # it was just removed
            return Manifest(**json.loads((folder / "manifest.json").read_text()))
    return None


def _built(space: Space) -> list[Path]:
    """Folders of the indexes that there are, the newest version's first."""
    folders = (path for path in space.path.glob("index/*") if path.name.isdigit())
    return sorted(folders, key=lambda path: -int(path.name))


def ensure_index(space: Space, as_of: int | None = None) -> Index:
    """Open the index of a version, and build it first if it is not there.

    Raises
    ------
    StoreError
        If the version has no cells with a latent.
    """
    version = space.snapshot(as_of).version
    folder = space.path / "index" / f"{version}"
    for _ in range(_TRIES):
        if not (folder / "manifest.json").exists():
            _build(space, version, folder)
            _remove_old(space, folder)
        try:
            return Index.open(folder)
        except FileNotFoundError as error:  # another search removed it
            missing = error
    raise StoreError(
        f"The index of version {version} misses a file ({missing}).", f"Remove '{folder}': it is built anew."
    )


def _remove_old(space: Space, mine: Path) -> None:
    """Remove all indexes but the newest two and the one that was just built.

    Each is renamed first: nobody finds a part of one, and whoever has opened it keeps what is mapped.
    """
    for folder in _built(space)[2:]:
        if folder != mine:
            aside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
            with suppress(OSError):  # someone else removed it, or may and this one may not
                folder.rename(aside)
                shutil.rmtree(aside, ignore_errors=True)


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
    """Stream the version's mapped cells into vectors and rows; their number. Memory is bounded by a unit.

    Text that repeats is stored as a dictionary: a file of record batches has one for all of them, so its values are
    gathered first.
    """
    snapshot = space.snapshot(version)
    names = [name for name in snapshot.names if name != "latent"]
    kinds = {name: _plain(space.schema(snapshot).field(name).type) for name in names}
    text = [name for name in names if pa.types.is_string(kinds[name]) and name != "observation_id"]
    values = _values(space, version, text)
    stored = pa.schema([(name, _CODED if name in values else kind) for name, kind in kinds.items()])
    cells = 0
    with (
        (folder / "vectors.f32").open("wb") as vectors,
        pa.OSFile(str(folder / "rows.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, stored) as rows,
    ):
        for table in space.read(["latent", *names], as_of=version):
            mapped = table.filter(table["latent"].is_valid())
            flat = mapped["latent"].combine_chunks().flatten()
            vectors.write(np.ascontiguousarray(flat.to_numpy(), np.float32).tobytes())
            columns = [
                _coded(mapped[name], values[name]) if name in values else mapped[name].cast(kinds[name])
                for name in names
            ]
            rows.write_table(pa.table(columns, schema=stored))
            cells += len(mapped)
    return cells


def _values(space: Space, version: int, names: Sequence[str]) -> dict[str, pa.Array]:
    """Distinct values of those text columns that repeat."""
    found: dict[str, dict[str, None]] = {name: {} for name in names}
    for table in space.read(names, as_of=version):
        for name in list(found):
            found[name].update(dict.fromkeys(_encoded(table[name]).dictionary.to_pylist()))
            if len(found[name]) > _VALUES:
                del found[name]
    return {name: pa.array(values, pa.string()) for name, values in found.items()}


def _coded(column: pa.ChunkedArray, values: pa.Array) -> pa.DictionaryArray:
    """A text column as positions in these values."""
    encoded = _encoded(column)
    codes = pc.index_in(encoded.dictionary, value_set=values).take(encoded.indices)
    return pa.DictionaryArray.from_arrays(codes, values)


def _encoded(column: pa.ChunkedArray) -> pa.DictionaryArray:
    whole = column.combine_chunks()
    return whole if pa.types.is_dictionary(whole.type) else whole.dictionary_encode()


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
