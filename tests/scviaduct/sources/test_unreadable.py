"""Content that a library cannot read: refused before a run, quarantined within one, retried if a network failed."""

from __future__ import annotations

import errno
import pickle
import shutil
from pathlib import Path

import aiohttp
import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import tiledbsoma
import zarr
from scipy import sparse

from scviaduct.errors import DataError, SourceChangedError, SourceError
from scviaduct.sources import close_shards, open_shard, open_source, unreadable
from scviaduct.sources.counts import GeneTarget
from scviaduct.sources.ondisk import SparseMatrix
from scviaduct.sources.somacounts import read_counts


@pytest.fixture(autouse=True)
def _nothing_open():
    close_shards()
    yield
    close_shards()


@pytest.fixture
def adata():
    """Cells of a matrix whose counts are not looked at when it is opened: X comes first and holds integers."""
    counts = np.random.default_rng(0).poisson(0.6, (2000, 50)).astype(np.float32)
    names = [f"cell{i}" for i in range(len(counts))]
    return anndata.AnnData(
        sparse.csr_matrix(counts),
        obs=pd.DataFrame({"donor": pd.Categorical(["a", "b"] * 1000)}, index=names),
        var=pd.DataFrame(index=[f"g{i}" for i in range(50)]),
    )


def spoil(path, dataset):
    """Overwrite every chunk of a dataset."""
    if path.suffix == ".zarr":
        for file in (path / dataset).rglob("*"):
            if file.is_file() and not file.name.startswith((".z", "zarr")):
                file.write_bytes(b"garbage" * 5)
        return
    with h5py.File(path) as file:
        chunks = [file[dataset].id.get_chunk_info(i) for i in range(file[dataset].id.get_num_chunks())]
    with path.open("r+b") as file:
        for chunk in chunks:
            file.seek(chunk.byte_offset)
            file.write(b"\xff" * chunk.size)


@pytest.fixture(params=["a.h5ad", "2.zarr", "3.zarr"])
def path(request, adata, tmp_path):
    """The cells in every format."""
    path = tmp_path / request.param
    if path.suffix == ".h5ad":
        adata.write_h5ad(path, compression="gzip")
    else:
        root = zarr.open_group(path, mode="w", zarr_format=int(path.stem))
        anndata.io.write_elem(root, "/", adata)
    return path


@pytest.mark.parametrize(
    ("dataset", "columns", "what"),
    [
        ("X/indices", (), "X of"),
        ("X/indptr", (), "X of"),
        ("obs/donor/codes", ("donor",), "Column 'donor', rows 0 to 500, of obs of"),
    ],
)
def test_spoilt_chunk_is_an_error_of_its_shard(path, dataset, columns, what):
    spoil(path, dataset)
    with open_source(str(path)) as source:
        shard = source.scan(500).shards[0]
    with pytest.raises(DataError) as error:
        open_shard(shard).read(shard, columns=columns)
    assert error.value.problem.startswith(f"Rows 0 to 500 of dataset '{path.stem}' in file://{path}: {what} file://")
    assert "rows 0 to 500" in error.value.problem
    assert error.value.remedy == unreadable.MEND
    assert isinstance(pickle.loads(pickle.dumps(error.value)), DataError)


def test_spoilt_names_of_genes(path):
    with open_source(str(path)) as source:
        index = source.var_index
    spoil(path, f"var/{index}")
    with open_source(str(path)) as source:
        with pytest.raises(SourceError, match=rf"of var of file://{path} cannot be read \("):
            source.genes()
        (shard,) = source.scan(5000).shards
        with pytest.raises(DataError, match=rf"of var of file://{path} cannot be read \("):
            source.genes(shard)


@pytest.mark.parametrize("dataset", ["obs/_index", "obs/donor/codes"])
def test_spoilt_column_stops_the_scan(path, dataset):
    spoil(path, dataset)
    with (
        open_source(str(path)) as source,
        pytest.raises(SourceError, match=rf"of obs of file://{path} cannot be read \(.*Copy or write it again"),
    ):
        source.scan(500, ["donor"])


def test_values_that_are_sampled_stop_the_opening(path):
    spoil(path, "X/data")
    with pytest.raises(SourceError, match=rf"data of X of file://{path} cannot be read \("):
        open_source(str(path))


@pytest.mark.parametrize(
    ("old", "new"), [("float32", "floatie"), ("zstd", "nope"), ("{", "{{")], ids=["dtype", "codec", "json"]
)
def test_unknown_dtype_and_codec_of_zarr(adata, tmp_path, old, new):
    path = tmp_path / "a.zarr"
    anndata.io.write_elem(zarr.open_group(path, mode="w", zarr_format=3), "/", adata)
    meta = path / "X" / "data" / "zarr.json"
    meta.write_text(meta.read_text().replace(old, new))
    with pytest.raises(SourceError, match=rf"file://{path} cannot be read \("):
        open_source(str(path))


def test_element_that_is_not_there(adata, tmp_path):
    adata.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "a") as file:
        del file["X/indices"]
    with pytest.raises(SourceError, match=r"a.h5ad cannot be read \(KeyError"):
        open_source(f"{tmp_path}/a.h5ad")


@pytest.mark.parametrize(
    ("dataset", "value", "why"),
    [
        ("indices", 50, "genes 0 to 50 of 50"),
        ("indices", -1, "genes -1 to 49 of 50"),
        ("indptr", -1, "does not ascend"),
    ],
)
def test_numbers_that_point_nowhere(adata, tmp_path, dataset, value, why):
    adata.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "a") as file:
        file[f"X/{dataset}"][3] = value
    with open_source(f"{tmp_path}/a.h5ad") as source, pytest.raises(DataError, match=why):
        source.read(source.scan(5000).shards[0])


def test_dense_rows(adata, tmp_path):
    adata.X = adata.X.toarray()
    adata.write_h5ad(tmp_path / "a.h5ad", compression="gzip")
    spoil(tmp_path / "a.h5ad", "X")
    with pytest.raises(SourceError, match=r"X of file://.* cannot be read"):
        open_source(f"{tmp_path}/a.h5ad")
    with open_source(f"{tmp_path}/a.h5ad?layer=X") as source, pytest.raises(DataError, match=r"X of .* rows 0 to 2000"):
        source.read(source.scan(5000).shards[0])


def test_deleted_sources_changed(path, census_collection, tmp_path):
    shutil.copytree(census_collection, tmp_path / "copy")
    gone = [
        (str(path), path),
        (f"soma:{tmp_path}/copy/census_data/homo_sapiens", tmp_path / "copy"),
        (f"census:sim?uri={tmp_path}/copy", tmp_path / "copy"),
    ]
    shards = []
    for uri, _ in gone:
        with open_source(uri) as source:
            shards.append(source.scan(500).shards[0])
    for place in {place for _, place in gone}:
        place.unlink() if place.is_file() else shutil.rmtree(place)
    for shard in shards:
        with pytest.raises(SourceChangedError, match=r"was planned and is gone: .*Plan again"):
            open_shard(shard)


TRANSIENT = [
    ConnectionResetError("reset"),
    TimeoutError("slow"),
    OSError(errno.ETIMEDOUT, "slow"),
    OSError(errno.EIO, "busy"),
    aiohttp.ClientPayloadError("cut off"),
    RuntimeError("S3: Error [HTTP Response Code: -1] : curlCode: 7, Could not connect"),
]


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
def test_what_may_pass_is_raised_as_it_came(adata, tmp_path, monkeypatch, error):
    adata.write_h5ad(tmp_path / "a.h5ad")

    def fail(*_):
        raise error

    with open_source(f"{tmp_path}/a.h5ad") as source:
        (shard,) = source.scan(5000).shards
        monkeypatch.setattr(SparseMatrix, "_values", fail)
        with pytest.raises(type(error)) as raised:
            source.read(shard)
    assert raised.value is error


def test_errors_of_the_program_are_left_alone(adata, tmp_path, monkeypatch):
    adata.write_h5ad(tmp_path / "a.h5ad")
    with open_source(f"{tmp_path}/a.h5ad") as source:
        (shard,) = source.scan(5000).shards
        monkeypatch.setattr(SparseMatrix, "_values", lambda *_: None)
        with pytest.raises(TypeError, match="unpack"):
            source.read(shard)


def response(status):
    return aiohttp.ClientResponseError(None, (), status=status)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (response(503), True),
        (response(429), True),
        (response(403), False),
        (OSError("Can't synchronously read data (filter returned failure)"), False),
        (FileNotFoundError(errno.ENOENT, "gone"), False),
        (ValueError("connection reset"), False),
    ],
    ids=repr,
)
def test_transience(error, expected):
    outer = FileNotFoundError("url")
    outer.__cause__ = error
    assert unreadable.is_transient(error) is expected
    assert unreadable.is_transient(outer) is expected


@pytest.mark.parametrize("query", ["", "?filter=groups == 'g1'"])
def test_spoilt_experiment(soma_from_r, tmp_path, query):
    shutil.copytree(soma_from_r, tmp_path / "exp")
    with open_source(f"soma:{tmp_path}/exp{query}") as source:
        shard = source.scan(1000).shards[0]
        counts = source._arrays["RNA"].X[source.describe()["layer"]]
        x, obs = (Path(array.uri.removeprefix("file://")) for array in (counts, source._obs))
    for piece in x.rglob("__fragments/*/a0.tdb"):
        piece.write_bytes(b"\xff" * piece.stat().st_size)
    with pytest.raises(DataError, match=r"Rows .* of dataset 'exp' in soma:.*: X/.* of soma:file://.*, rows .* to "):
        open_shard(shard).read(shard)
    close_shards()
    for piece in obs.rglob("__fragments/*/*.tdb"):
        if piece.name[0] in "ad":
            piece.write_bytes(b"\xff" * piece.stat().st_size)
    with pytest.raises(SourceError, match=r"obs of soma:file://.* cannot be read"), open_source(shard.uri) as source:
        source.scan(1000)


@pytest.mark.parametrize("dataset", ["X/data", "obs/donor/categories", "obs/_index"])
def test_type_that_numpy_lacks(adata, tmp_path, dataset):
    adata.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "a") as file:
        held, attrs = file[dataset].shape, dict(file[dataset].attrs) | {"encoding-type": "array"}
        del file[dataset]
        h5py.h5d.create(file.id, dataset.encode(), h5py.h5t.UNIX_D32LE, h5py.h5s.create_simple(held))
        file[dataset].attrs.update(attrs)
    with (
        pytest.raises(SourceError, match=r"a.h5ad cannot be read \(ValueError: No NumPy equivalent for TypeTimeID"),
        open_source(f"{tmp_path}/a.h5ad") as source,
    ):
        source.scan(5000, ["donor"])


def test_file_whose_digest_cannot_be_read(adata, tmp_path, monkeypatch):
    adata.write_h5ad(tmp_path / "a.h5ad")

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("scviaduct.sources.content.Place._digest", refuse)
    with pytest.raises(SourceError, match=rf"file://{tmp_path}/a.h5ad cannot be read \(PermissionError"):
        open_source(f"{tmp_path}/a.h5ad")


def test_counts_of_a_gene_beyond_var_are_no_counts(tmp_path):
    """An experiment whose X is wider than its var says: the gene is named, and nothing is read past the end."""
    path = str(tmp_path / "x")
    table = {"soma_dim_0": [0, 1], "soma_dim_1": [1, 4], "soma_data": np.ones(2, np.float32)}
    with tiledbsoma.SparseNDArray.create(path, type=pa.float32(), shape=(2, 5)) as matrix:
        matrix.write(pa.table(table))
    target = GeneTarget(np.arange(3, dtype=np.int32), 3)
    with tiledbsoma.SparseNDArray.open(path) as matrix:
        (first,) = read_counts(matrix, np.array([0]), np.arange(3, dtype=np.int32), target, "X/raw of it")
        assert first.data.tolist() == [1.0]
        with pytest.raises(unreadable.UnreadableError, match="X/raw of it counts gene joinid 4, beyond those of var"):
            list(read_counts(matrix, np.array([0, 1]), np.arange(3, dtype=np.int32), target, "X/raw of it"))
