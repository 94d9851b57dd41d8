"""A file that cannot be mapped is refused before any work, with the way to mend it."""

from __future__ import annotations

import shutil
from dataclasses import replace

import h5py
import pandas as pd
import pytest

from scviaduct.errors import FilterError, SourceChangedError, SourceError
from scviaduct.sources import open_source


def test_changed_file_is_refused_under_its_pinned_uri(make_adata, tmp_path):
    path = tmp_path / "a.h5ad"
    make_adata(5).write_h5ad(path)
    with open_source(str(path)) as source:
        pinned, version = source.uri, source.version
        (shard,) = source.scan(5).shards
    make_adata(5, seed=1).write_h5ad(path)
    with pytest.raises(SourceChangedError, match=f"was planned as version {version} and is .* now. Plan again"):
        open_source(pinned)
    with open_source(str(path)) as source, pytest.raises(SourceChangedError, match="was planned as version"):
        source.read(shard)


def test_rows_that_are_not_those_planned_are_refused(make_adata, tmp_path):

    make_adata(5).write_h5ad(tmp_path / "a.h5ad")
    with open_source(f"{tmp_path}/a.h5ad") as source:
        (shard,) = source.scan(5).shards
        with pytest.raises(SourceChangedError, match=r"Rows 0 to 4 of dataset 'a' in .* select 4 cells, not the 5"):
            source.read(replace(shard, stop=4))


def test_repeated_keys_are_named(make_adata, tmp_path):
    with pytest.warns(UserWarning, match="Observation names are not unique"):
        adata = make_adata(4, names=["a", "b", "c", "b"], obs={"sample": ["x", "x", "y", "y"]})
    adata.write_h5ad(tmp_path / "a.h5ad")
    with (
        open_source(f"{tmp_path}/a.h5ad") as source,
        pytest.raises(SourceError, match=r"'b' occurs more than once in dataset 'a' .*obs_names_make_unique"),
    ):
        source.scan(10)
    with open_source(f"{tmp_path}/a.h5ad?dataset=sample") as source:
        assert source.scan(10).cells == 4


@pytest.mark.parametrize(
    ("query", "column", "message"),
    [
        ("key=id", "id", r"Row 1 of .* has no key \(obs column 'id'\). Every cell needs a name"),
        ("dataset=id", "id", r"Row 1 of .* has no dataset \(obs column 'id'\). Fill the column"),
    ],
)
@pytest.mark.parametrize("hole", [None, ""])
def test_missing_and_empty_names_are_refused(query, column, message, hole, make_adata, tmp_path):
    make_adata(3, obs={column: pd.Categorical(["a", hole, "c"])}).write_h5ad(tmp_path / "a.h5ad")
    with open_source(f"{tmp_path}/a.h5ad?{query}") as source, pytest.raises(SourceError, match=message):
        source.scan(10)


def test_the_name_of_the_cell_key_is_reserved(make_adata, tmp_path):
    make_adata(3, obs={"observation_id": ["a", "b", "c"]}).write_h5ad(tmp_path / "a.h5ad")
    with open_source(f"{tmp_path}/a.h5ad") as source, pytest.raises(SourceError, match="Rename it in obs"):
        source.read(source.scan(9).shards[0], columns=["observation_id"])


@pytest.mark.parametrize(
    ("query", "error", "message"),
    [
        ("key=nope", SourceError, r"key=nope: .* has no such obs column. There are: donor"),
        ("dataset=nope", SourceError, "dataset=nope"),
        ("layer=nope", SourceError, r"has no layer 'nope'. There are: X"),
        ("filter=donr == 'a'", FilterError, r"names column 'donr', which obs of .* There are: donor"),
        ("var_filter=donor == 'a'", FilterError, "names column 'donor', which var of"),
        ("filter=donor ==", FilterError, "does not parse"),
    ],
)
def test_bad_parameters_are_refused_when_opening(query, error, message, make_adata, tmp_path):
    make_adata(3, obs={"donor": ["a", "b", "c"]}).write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(error, match=message):
        open_source(f"{tmp_path}/a.h5ad?{query}")


def test_what_is_not_anndata_is_refused(tmp_path):
    (tmp_path / "text.h5ad").write_text("no HDF5")
    (tmp_path / "table.csv").write_text("a,b")
    with h5py.File(tmp_path / "bare.h5ad", "w"):
        pass
    for place, message in {
        "nothing.h5ad": r"No .h5ad file or .zarr store at file://.*nothing.h5ad. Check the path; a '\?' or '%'",
        "text.h5ad": "cannot be opened as HDF5",
        "table.csv": "is not a .h5ad file or a .zarr store. Write it as one",
        "bare.h5ad": "is not an AnnData file: it has no obs",
    }.items():
        with pytest.raises(SourceError, match=message):
            open_source(str(tmp_path / place))
    with pytest.raises(SourceError, match="cannot be reached: Protocol not known: nope"):
        open_source("nope://a/b.h5ad")


def test_encodings_of_old_are_refused(make_adata, tmp_path):
    make_adata(3).write_h5ad(tmp_path / "a.h5ad")
    shutil.copy(tmp_path / "a.h5ad", tmp_path / "b.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "a") as file:
        del file["obs"].attrs["encoding-type"]
    with h5py.File(tmp_path / "b.h5ad", "a") as file:
        del file["X"].attrs["encoding-type"]
    with pytest.raises(SourceError, match=r"obs of .* in an encoding of old \('no encoding-type'.*write_h5ad"):
        open_source(str(tmp_path / "a.h5ad"))
    with pytest.raises(SourceError, match=r"X of .* has encoding 'none', not csr_matrix or array. Write it again"):
        open_source(str(tmp_path / "b.h5ad"))
