"""Counts of a piece: a sharded zarr of unsigned integers, as CSR, that checks what it reads.

A piece is a zarr group of three arrays, each one zarr v3 shard of inner chunks: ``indptr``, ``data``, and ``steps``,
the genes of CSR's ``indices`` as differences from the value before, modulo the integer's range, beginning anew at every
inner chunk. Genes ascend within a cell, so that steps are small: they take 40 % less than the genes themselves.

Every inner chunk ends in a CRC-32C, which the zarrs pipeline verifies when it decodes it; a seal pins them all
(:mod:`scviaduct.landing.sealing`).
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from scviaduct.landing.genetables import damaged
from scviaduct.landing.kernels import add_up, add_up_wanted
from scviaduct.landing.sealing import ARRAYS, seal
from scviaduct.sources.counts import SLAB_BYTES, Rows, runs
from scviaduct.sources.unreadable import UnreadableError, told

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy.typing as npt

    from scviaduct.sources.counts import GeneTarget
    from scviaduct.values import FloatArray, IntArray, LongArray

    _Csr = tuple[LongArray, npt.NDArray[Any], npt.NDArray[Any]]

CHUNK = 65_536
"""Values of an inner chunk. Of 32k, 64k, 128k and 256k values, those up to 64k decode fastest (203k cells a CPU-second
for the steps of 2,300 genes a cell, 172k at 256k), and a few cells cost one chunk."""
RECORD = "piece.json"
_VALUE_BYTES = 12
"""What a stored value costs while it is worked on: itself and its gene, and their mapped copies."""
_FEW = 0.5
"""Share of genes below which the wanted ones are picked before they are renumbered."""


@dataclass(frozen=True, slots=True)
class CountsRecord:
    """What is known of the counts of a piece; ``piece.json`` beside them.

    Attributes
    ----------
    cells, n_genes, values
        Shape, and number of stored counts.
    genes
        Address of the gene table that they are numbered by.
    integer
        Whether all are whole numbers from 0 on.
    seal
        Digest that pins every byte of the arrays.
    nbytes
        On disk.
    """

    cells: int
    n_genes: int
    values: int
    genes: str
    integer: bool
    seal: str
    nbytes: int


@contextmanager
def pipeline() -> Iterator[None]:
    """zarr through zarrs, on the calling process's one thread; an array keeps the pipeline that it is opened with."""
    settings = {
        "codec_pipeline.path": "zarrs.ZarrsCodecPipeline",
        "codec_pipeline.strict": True,
        "codec_pipeline.validate_checksums": True,
        "threading.max_workers": 1,
    }
    with zarr.config.set(settings):
        yield


def narrowed(data: FloatArray) -> tuple[npt.NDArray[np.generic], bool]:
    """Counts as the smallest unsigned integers that hold them, or as they are.

    Parameters
    ----------
    data
        float32.

    Returns
    -------
    tuple
        uint8, uint16 or uint32 and True; float32 and False if one is negative, fractional, missing or infinite.
    """
    low, high = (float(data.min()), float(data.max())) if len(data) else (0.0, 0.0)
    if not (low >= 0 and high < 2**32):  # NaN compares false
        return data, False
    kind = np.uint8 if high < 2**8 else np.uint16 if high < 2**16 else np.uint32
    whole = data.astype(kind)
    return (whole, True) if np.array_equal(whole, data) else (data, False)


def write_counts(folder: Path, counts: Rows, n_genes: int, genes: str) -> CountsRecord:
    """Write the counts of a piece; the folder appears whole, or was there already.

    Parameters
    ----------
    folder
        Where they go.
    counts
        In the source's own genes, all of them.
    n_genes
        Number of genes of the source.
    genes
        Address of its gene table.

    Returns
    -------
    CountsRecord
        Of what lies there now.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        data, integer = narrowed(counts.data)
        cells = len(counts.indptr) - 1
        try:
            _write_arrays(temporary, {"indptr": counts.indptr, "steps": _steps(counts.indices), "data": data})
        except RuntimeError as error:  # so zarrs says that a disk is full
            raise OSError(str(error)) from error
        size = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file())
        record = CountsRecord(cells, n_genes, len(data), genes, integer, seal(temporary), size)
        (temporary / RECORD).write_text(json.dumps(asdict(record)))
        _flush(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            # Another attempt was first: the same address is the same content.
            if not (folder / RECORD).is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return read_record(folder)


def _steps(genes: IntArray) -> npt.NDArray[np.unsignedinteger[Any]]:
    """Genes as the smallest unsigned integers that hold them, each less the one before it in its inner chunk."""
    kind = np.uint16 if genes.max(initial=0) < 2**16 else np.uint32
    steps: npt.NDArray[Any] = genes.astype(kind)
    steps[1:] -= genes[:-1].astype(kind)
    steps[::CHUNK] = genes[::CHUNK]
    return steps


def _write_arrays(folder: Path, arrays: dict[str, npt.NDArray[Any]]) -> None:
    with pipeline():
        group = zarr.create_group(str(folder))
        for name, values in arrays.items():
            chunk = min(CHUNK, max(1, len(values)))
            # What is not there is damage, never a value. zarrs 0.2.3 leaves a shard of nothing but the fill value out,
            # whatever write_empty_chunks says: the fill value is one that the first value is not.
            array = group.create_array(
                name,
                shape=values.shape,
                dtype=values.dtype,
                chunks=(chunk,),
                shards=(max(1, -(-len(values) // chunk)) * chunk,),
                compressors=[_compressor(values.dtype.itemsize, chunk), Crc32cCodec()],
                fill_value=int(len(values) > 0 and values[0] == 0),
                config={"write_empty_chunks": True},
            )
            array[:] = values


def _compressor(size: int, chunk: int) -> BloscCodec:
    # Of lz4 and zstd with either shuffle: bytes a cell and cells a CPU-second of steps, then of data, 2,300 values a
    # cell: lz4 with bits 1,615 at 203k, 811 at 220k; lz4 with bytes 2,310 at 313k, 1,163 at 193k; zstd with bytes 1,339
    # at 157k, 541 at 112k. Genes instead of steps: 2,714 at 154k. Single bytes are shuffled two by two, because blosc
    # has no vectors for an odd number: 1,650 values a cell take 562 bytes instead of 557, at 623k instead of 497k.
    paired = 2 if size == 1 and chunk % 2 == 0 else size
    return BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle", typesize=paired)


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def read_record(folder: Path) -> CountsRecord:
    """What is known of the counts in a folder."""
    return CountsRecord(**json.loads((folder / RECORD).read_text()))


class StoredCounts:
    """The counts of a piece, open.

    Parameters
    ----------
    folder
        Where they lie.
    sealed
        Their seal, as the landing's manifest has it.

    Raises
    ------
    UnreadableError
        If a file is missing, or one is not what was landed.
    """

    def __init__(self, folder: Path, sealed: str) -> None:
        self._folder, self._remedy = folder, damaged(folder, folder.parents[2])
        try:
            found = seal(folder)
        except FileNotFoundError as error:
            raise UnreadableError(f"{error.filename} is gone.", self._remedy) from error
        except (OSError, ValueError, KeyError) as error:
            raise UnreadableError(f"{folder} cannot be read ({told(error)}).", self._remedy) from error
        if found != sealed:
            problem = f"{folder} does not hold what was landed: its seal is {found}, not {sealed}."
            raise UnreadableError(problem, self._remedy)
        with pipeline():
            opened = [zarr.open_array(str(folder / name), mode="r") for name in ARRAYS]
        self._indptr, self._steps, self._data = opened

    def read(self, positions: LongArray, target: GeneTarget) -> Iterator[Rows]:
        """Selected cells in order, a slab at a time.

        Parameters
        ----------
        positions
            int64, ascending; which cells of the piece.
        target
            Where the genes go that the counts are numbered by.

        Raises
        ------
        UnreadableError
            If a chunk does not agree with its checksum.
        """
        wanted = (target.columns >= 0).astype(np.uint8)
        few = wanted.mean() < _FEW if len(wanted) else False
        same = np.array_equal(target.columns, np.arange(target.n_genes))
        for start, stop, chosen in runs(positions):
            indptr = self._stored(self._indptr, start, stop + 1)
            for first, last in _slabs(indptr):
                low, high = int(indptr[first]), int(indptr[last])
                inside = chosen[(chosen >= first) & (chosen < last)] - first
                rows = indptr[first : last + 1] - low
                held = self._few(rows, low, high, wanted) if few else self._all(rows, low, high)
                held = held if len(inside) == last - first else _rows(inside, *held)
                # Genes that stay where they are stand in order already, and no zero is stored.
                yield Rows(held[0], held[1].astype(np.int32), _real(held[2])) if same else target.align(*held)

    def _all(self, indptr: LongArray, low: int, high: int) -> _Csr:
        """Rows of some values, with all genes."""
        begin = low // CHUNK * CHUNK
        genes = self._stored(self._steps, begin, high)
        add_up(genes, CHUNK)
        return indptr, genes[low - begin :], self._stored(self._data, low, high)

    def _few(self, indptr: LongArray, low: int, high: int, wanted: npt.NDArray[np.uint8]) -> _Csr:
        """Rows of some values, with the wanted genes alone."""
        steps = self._stored(self._steps, low // CHUNK * CHUNK, high)
        try:
            return add_up_wanted(steps, self._stored(self._data, low, high), indptr, wanted, CHUNK)
        except ValueError as error:
            raise UnreadableError(f"{self._folder} holds {error}.", self._remedy) from error

    def _stored(self, array: Any, start: int, stop: int) -> npt.NDArray[Any]:
        try:
            return np.asarray(array[start:stop])
        except (RuntimeError, OSError, ValueError) as error:
            problem = f"{self._folder}/{array.basename}, values {start} to {stop}, cannot be read ({told(error)})."
            raise UnreadableError(problem, self._remedy) from error


def _real(data: npt.NDArray[Any]) -> FloatArray:
    return data.astype(np.float32, copy=False)


def _rows(chosen: LongArray, indptr: LongArray, genes: npt.NDArray[Any], data: npt.NDArray[Any]) -> _Csr:
    """Some rows of CSR, by position, ascending."""
    lengths = np.diff(indptr)
    wanted = np.zeros(len(lengths), np.bool_)
    wanted[chosen] = True
    values = np.repeat(wanted, lengths)
    return np.concatenate(([0], np.cumsum(lengths[chosen]))), genes[values], data[values]


def _slabs(indptr: LongArray) -> Iterator[tuple[int, int]]:
    """Ranges of rows whose values fit a slab; a row that alone does not is a slab of its own."""
    limit, first, rows = SLAB_BYTES // _VALUE_BYTES, 0, len(indptr) - 1
    while first < rows:
        last = int(np.searchsorted(indptr, indptr[first] + limit, side="right")) - 1
        last = min(max(last, first + 1), rows)
        yield first, last
        first = last
