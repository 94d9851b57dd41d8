"""A folder is its files, each with its version, its genes and its cells."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from scviaduct.errors import SourceChangedError, SourceError
from scviaduct.sources import open_shard, open_source
from scviaduct.store.schema import TYPES


@pytest.fixture
def folder(make_adata, tmp_path):
    """Two h5ad and a zarr, one of them of no cells, with columns that differ."""
    path = tmp_path / "folder"
    path.mkdir()
    make_adata(10, 5, obs={"n": range(10), "donor": ["a"] * 10}).write_h5ad(path / "b.h5ad")
    make_adata(0, 5, obs={"n": [], "donor": []}).write_h5ad(path / "c.h5ad")
    make_adata(6, 9, seed=1, obs={"n": np.array(["x"] * 6, dtype=object)}).write_zarr(path / "a.zarr")
    (path / "notes.txt").write_text("not a file of cells")
    return path


def test_folder_scans_its_files_in_order(folder, as_csr):
    with open_source(str(folder)) as source:
        scan = source.scan(4, ["n", "donor"])
        assert [(s.dataset_id, s.cells) for s in scan.shards] == [("a", 4), ("a", 2), ("b", 4), ("b", 4), ("b", 2)]
        assert scan.empty == (f"file://{folder}/c.h5ad",)
        assert scan.columns["n"].type == "string", "text in one file and integers in another are text"
        assert scan.columns["n"].counts["x"] == 6
        assert scan.missing == {"donor": f"file://{folder}/a.zarr"}
        for shard in scan.shards:
            assert as_csr(source.read(shard)).shape == (shard.cells, len(source.genes(shard)))
            assert open_shard(shard).uri == shard.uri
            assert shard.source == f"file://{folder}/{shard.dataset_id}.{'zarr' if shard.dataset_id == 'a' else 'h5ad'}"
        with pytest.raises(SourceError, match=r"has 3 files, each with its genes. Ask genes\(shard\)"):
            source.genes()
        assert source.describe()["kind"] == "3 files"


def test_glob_takes_what_matches(folder):
    with open_source(f"{folder}/*.h5ad") as source:
        assert {shard.dataset_id for shard in source.scan(100).shards} == {"b"}
        assert source.genes(source.scan(100).shards[0]).columns["index"]
    with pytest.raises(SourceError, match=r"No .h5ad file or .zarr store at file://.*/\*.txt"):
        open_source(f"{folder}/*.txt")


def test_version_of_a_folder_is_that_of_its_content(folder, tmp_path, make_adata):
    with open_source(str(folder)) as source:
        pinned, version = source.uri, source.version
        shards = source.scan(100).shards
    shutil.copytree(folder, tmp_path / "copy")
    with open_source(str(tmp_path / "copy")) as source:
        assert source.version == version
    with open_source(pinned) as source:
        assert source.scan(100).shards == shards
    make_adata(3).write_h5ad(folder / "d.h5ad")
    with pytest.raises(SourceChangedError, match=f"was planned as version {version}"):
        open_source(pinned)
    with open_source(str(folder)) as source:
        (folder / "d.h5ad").unlink()
        with pytest.raises(SourceError, match=r"There is nothing at file://.*d.h5ad. Check the path"):
            source.scan(100)


def test_file_that_changes_after_it_was_identified_is_refused(folder, make_adata):
    with open_source(str(folder)) as source:
        make_adata(10, 5, seed=3).write_h5ad(folder / "b.h5ad")
        with pytest.raises(SourceChangedError, match=r"b.h5ad changed while it was being identified"):
            source.scan(100)


def test_same_stem_twice_is_refused_without_a_dataset_column(folder, make_adata):
    make_adata(3, obs={"donor": ["x"] * 3, "n": range(3)}).write_h5ad(folder / "a.h5ad")
    with pytest.raises(
        SourceError, match=r"a.h5ad and .*a.zarr would both be dataset 'a'. Rename one, .*dataset=COLUMN"
    ):
        open_source(str(folder))
    with open_source(f"{folder}/*.h5ad?dataset=donor") as source:
        assert [shard.dataset_id for shard in source.scan(100).shards] == ["x", "a"]


def test_folder_of_nothing(tmp_path):
    with pytest.raises(SourceError, match=r"No .h5ad file or .zarr store at"):
        open_source(str(tmp_path))


def test_filters_apply_to_every_file(folder, make_adata):
    with open_source(f"{folder}/*.h5ad?filter=n >= 7") as source:
        assert source.scan(100).cells == 3
        assert "filter=n%20%3E%3D%207" in source.scan(100).shards[0].uri


@pytest.mark.parametrize(
    ("values", "kind", "counts"),
    [
        (([1, 2], [0.5, 1.5]), "double", {}),
        (([0.5, 1.5], [1, 2], [1, 2]), "double", {}),
        (([1, 2], [], [0.5, 1.5]), "double", {}),
        (([1, 2], [1, 3]), "int64", {"1": 2, "2": 1, "3": 1}),
        (([True, False], ["x", "y"]), "string", {"True": 1, "False": 1, "x": 1, "y": 1}),
        (([True, False], [1, 2]), "string", {"True": 1, "False": 1, "1": 1, "2": 1}),
        (([1, 2], [0.5, 1.5], ["x", "y"]), "string", {"1": 1, "2": 1, "x": 1, "y": 1}),
    ],
)
def test_types_of_a_column_over_files(values, kind, counts, make_adata, tmp_path):
    for i, held in enumerate(values):
        column = np.array(held, dtype=object if "x" in held else None)
        make_adata(len(held), obs={"n": column}).write_h5ad(tmp_path / f"{i}.h5ad")
    with open_source(f"{tmp_path}/*.h5ad") as source:
        scan = source.scan(100, ["n"])
        assert scan.columns["n"].type == kind
        assert scan.columns["n"].counts == counts
        for shard in scan.shards:
            read = source.read(shard, columns=["n"]).obs["n"].cast(TYPES[kind])
            assert read.type == TYPES[kind]
