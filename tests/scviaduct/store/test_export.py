"""Exports read back by the libraries of their formats."""

from __future__ import annotations

import re

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scviaduct.errors import FilterError, InputError, StoreError
from scviaduct.store import export as export_module
from scviaduct.store import reading as reading_module
from scviaduct.store.export import FORMATS, export
from tests.scviaduct.store.synthetic import KEPT, SOURCE

READERS = {"h5ad": anndata.read_h5ad, "zarr": anndata.read_zarr, "parquet": pq.read_table}
OBS = {
    "text": ["a", None, "c", "a"],
    "truth": [True, False, None, True],
    "whole": [1, None, -3, 2**60 + 1],
    "real": [0.5, -1.5, None, 1e300],
}
NAMES = ["source", "dataset_id", "source_row", "label", "probability", "margin", "entropy", "ambiguous", "reference"]
TAIL = ["unit", "unit_row", "run"]


def ids_of(path):
    to = path.suffix.removeprefix(".")
    read = READERS[to](path)
    return read["observation_id"].to_pylist() if to == "parquet" else list(read.obs_names)


def listed(path):
    return {entry.name for entry in path.iterdir()}


@pytest.mark.parametrize("to", ["h5ad", "zarr"])
def test_an_anndata_carries_every_column(lab, tmp_path, to):
    lab.put([2, 3, 5, 8], kept=KEPT, obs=OBS, unmapped=[3], run="a1")
    out = tmp_path / "deep" / f"out.{to}"
    told = []
    assert export(lab.space, to, out, advance=told.append) == out
    assert told == [4]
    assert listed(out.parent) == {out.name}
    adata = READERS[to](out)
    assert adata.shape == (4, 0)
    assert list(adata.obs_names) == ["c2", "c3", "c5", "c8"]
    assert adata.obs.index.name == "observation_id"
    assert list(adata.obs.columns) == [*NAMES, *KEPT, *TAIL]
    latent = adata.obsm["X_pbmc"]
    assert latent.dtype == np.float32
    expected = [[2, 0, 0.5, -2], [np.nan] * 4, [5, 0, 0.5, -5], [8, 0, 0.5, -8]]
    np.testing.assert_array_equal(latent, expected)
    obs = adata.obs.astype(object).where(adata.obs.notna(), None)
    for name, values in OBS.items():
        assert obs[name].tolist() == values, name
    assert obs["label"].tolist() == ["type 0", None, "type 0", "type 0"]
    assert obs["probability"].tolist() == [0.75, None, 0.75, 0.75]
    assert obs["ambiguous"].tolist() == [True, None, False, True]
    assert obs["source_row"].tolist() == [2, 3, 5, 8]
    assert obs["source"].tolist() == [SOURCE] * 4
    kinds = {name: str(kind) for name, kind in adata.obs.dtypes.items()}
    assert {name for name, kind in kinds.items() if kind == "category"} == {
        *("source", "dataset_id", "label", "reference", "text", "unit", "run")
    }
    assert {name: kinds[name] for name in ("source_row", "whole", "truth", "ambiguous", "real", "margin")} == {
        "source_row": "int64",
        "whole": "Int64",
        "truth": "boolean",
        "ambiguous": "boolean",
        "real": "float64",
        "margin": "float32",
    }
    assert dict(adata.uns["scviaduct"]) == {
        "reference": "pbmc@0123456789ab",
        "version": lab.space.head(),
        "run": "a1",
    }


def test_parquet_holds_what_a_reader_sees(lab, tmp_path):
    lab.commit(
        lab.stage([2, 3, 5, 8], kept=KEPT, obs=OBS, unmapped=[3]), lab.stage([9, 11], stamp=1), kept=KEPT, run="a1"
    )
    out = export(lab.space, "parquet", tmp_path / "out.parquet")
    assert pq.ParquetFile(out).metadata.row_group(0).column(0).compression == "ZSTD"
    expected = pa.concat_tables(lab.space.read())
    read = pq.read_table(out)
    assert read.schema.equals(lab.space.schema(lab.space.snapshot()))
    assert read.to_pylist() == expected.to_pylist()
    assert len(read) == 6


@pytest.mark.parametrize("to", ["h5ad", "parquet"])
@pytest.mark.parametrize(
    ("where", "as_of", "expected"),
    [
        (None, None, ["c0", "c1", "c2", "c3", "c4"]),
        ("label = 'type 1'", None, ["c2", "c3", "c4"]),
        (None, 1, ["c0", "c1", "c2"]),
        ("source_row > 1", 1, ["c2"]),
        ("source_row > 99", None, []),
        (None, 0, []),
    ],
)
def test_a_part_or_the_past(lab, tmp_path, to, where, as_of, expected):
    lab.put(range(3))
    lab.put(range(2, 5), stamp=1, unmapped=[])
    out = export(lab.space, to, tmp_path / f"out.{to}", where, as_of)
    assert ids_of(out) == expected
    if to != "parquet":
        adata = READERS[to](out)
        assert adata.obsm["X_pbmc"].shape == (len(expected), 4)
        assert set(adata.obs["label"].cat.categories) == set(adata.obs["label"])
        assert adata.uns["scviaduct"]["version"] == (2 if as_of is None else as_of)


def test_rows_are_in_the_order_of_the_source(lab, tmp_path):
    """Datasets interleave in the source, and units in time."""
    lab.commit(lab.stage([1, 4, 6], dataset="e"), lab.stage([7, 8]), lab.stage([0, 3, 5], stamp=1))
    lab.put([4], dataset="e", stamp=1)
    adata = READERS["h5ad"](export(lab.space, "h5ad", tmp_path / "out.h5ad"))
    assert adata.obs["source_row"].tolist() == [0, 1, 3, 4, 5, 6, 7, 8]
    assert list(adata.obs_names) == [f"c{row}" for row in (0, 1, 3, 4, 5, 6, 7, 8)]
    assert adata.obsm["X_pbmc"][:, :2].tolist() == [
        [r, s] for r, s in zip([0, 1, 3, 4, 5, 6, 7, 8], [1, 0] + [1] * 3 + [0] * 3, strict=True)
    ]
    assert list(adata.obs["dataset_id"]) == list("dedededd")


def rows_of(path):
    read = pq.read_table(path)
    return list(zip(read["source"].to_pylist(), read["source_row"].to_pylist(), strict=True))


@pytest.mark.parametrize("where", [None, "dataset_id != 'd2'", "source_row != 30 and not label = 'type 3'"])
def test_parquet_has_the_order_of_the_source_too(lab, tmp_path, monkeypatch, where):
    """Three datasets interleave over many units, some of which were cut; another source comes after them."""
    monkeypatch.setattr(reading_module, "_BLOCK", 7)
    rng = np.random.default_rng(0)
    of = rng.integers(0, 3, 200)
    units = []
    for dataset in range(3):
        rows = np.flatnonzero(of == dataset)
        texts = [f"{dataset}-{row % 5}" for row in rows]
        units += [
            lab.stage(rows[at : at + 12], f"d{dataset}", kept={"text": "string"}, obs={"text": texts[at : at + 12]})
            for at in range(0, len(rows), 12)
        ]
    later = "file:///data/second.h5ad"
    lab.commit(*units, lab.stage(range(5), "e", source=later), kept={"text": "string"})
    lab.put(np.flatnonzero(of == 1)[5:40:3], "d1", stamp=3)
    read = pq.read_table(export(lab.space, "parquet", tmp_path / "out.parquet", where))
    order = rows_of(tmp_path / "out.parquet")
    assert order == sorted(order)
    expected = {
        (row["source"], row["source_row"]): row for table in lab.space.read(where=where) for row in table.to_pylist()
    }
    assert read.to_pylist() == [expected[key] for key in sorted(expected)]
    assert len(read) == (205 if where is None else len(expected))
    assert pq.ParquetFile(tmp_path / "out.parquet").metadata.num_row_groups > 5


def test_interleaving_units_are_held_no_longer_than_needed(lab, monkeypatch):
    """Two datasets take turns cell by cell; the rows of one unit at a time are handed on."""
    monkeypatch.setattr(reading_module, "_BLOCK", 1)
    rows = np.arange(400)
    cuts = [rows[at % 2 + at // 2 * 40 : at // 2 * 40 + 40 : 2] for at in range(20)]
    lab.commit(*(lab.stage(cut, f"d{cut[0] % 2}") for cut in cuts))
    tables = list(lab.space.read_sorted())
    assert [row for table in tables for row in table["source_row"].to_pylist()] == list(range(400))
    assert max(map(len, tables)) <= 40


def test_join_ids_are_kept_where_there_are_some(lab, tmp_path):
    lab.put([3, 4], uri="census:homo_sapiens", source="census:homo_sapiens")
    adata = READERS["h5ad"](export(lab.space, "h5ad", tmp_path / "a.h5ad"))
    assert adata.obs["soma_joinid"].tolist() == [3, 4]
    lab.put([7], dataset="e")
    adata = READERS["h5ad"](export(lab.space, "h5ad", tmp_path / "b.h5ad"))
    assert adata.obs["soma_joinid"].isna().tolist() == [False, False, True]
    assert adata.obs["soma_joinid"].tolist()[:2] == [3, 4]


def test_cells_of_one_name_keep_it(lab, tmp_path):
    lab.commit(lab.stage([0]), lab.stage([0], dataset="e", stamp=1, source="file:///other.h5ad"))
    with pytest.warns(UserWarning, match="names are not unique"):
        export(lab.space, "h5ad", tmp_path / "out.h5ad")
    with pytest.warns(UserWarning, match="names are not unique"):
        adata = READERS["h5ad"](tmp_path / "out.h5ad")
    assert list(adata.obs_names) == ["c0", "c0"]
    assert adata.obs["source"].tolist() == [SOURCE, "file:///other.h5ad"]


def test_columns_without_a_value(lab, tmp_path):
    kinds = {"cell type (x)": "string", **KEPT}
    lab.put(range(2), kept=kinds, obs={name: [None] * 2 for name in kinds}, unmapped=range(2))
    adata = READERS["h5ad"](export(lab.space, "h5ad", tmp_path / "out.h5ad"))
    assert adata.obs[list(kinds)].isna().all(axis=None)
    assert adata.obs["label"].isna().all()
    assert np.isnan(adata.obsm["X_pbmc"]).all()
    full = {name: [values[0]] * 2 for name, values in OBS.items()}
    lab.put(range(2), stamp=1, kept=KEPT, obs=full)
    adata = READERS["h5ad"](export(lab.space, "h5ad", tmp_path / "full.h5ad"))
    assert {name: str(adata.obs[name].dtype) for name in KEPT} == {
        "text": "category",
        "truth": "bool",
        "whole": "int64",
        "real": "float64",
    }
    pd.testing.assert_frame_equal(
        adata.obs[list(KEPT)].astype(object).reset_index(drop=True), pd.DataFrame(full, dtype=object), check_names=False
    )


# What is there


@pytest.mark.parametrize("to", FORMATS)
def test_what_is_there_is_replaced_only_when_told_to(lab, tmp_path, to):
    lab.put(range(3))
    out = tmp_path / "here" / f"out.{to}"
    export(lab.space, to, out)
    lab.put(range(3, 5), stamp=1)
    with pytest.raises(InputError, match="is there") as error:
        export(lab.space, to, out)
    assert "--overwrite" in error.value.remedy
    assert ids_of(out) == ["c0", "c1", "c2"]
    export(lab.space, to, out, overwrite=True)
    assert ids_of(out) == ["c0", "c1", "c2", "c3", "c4"]
    assert listed(out.parent) == {out.name}


@pytest.mark.parametrize(("to", "other"), [("h5ad", "zarr"), ("zarr", "h5ad")])
def test_a_file_of_another_format_is_replaced_too(lab, tmp_path, to, other):
    lab.put(range(3))
    out = tmp_path / "here" / "out"
    export(lab.space, other, out)
    export(lab.space, to, out, overwrite=True)
    assert list(READERS[to](out).obs_names) == ["c0", "c1", "c2"]
    assert listed(out.parent) == {"out"}


@pytest.mark.parametrize("to", FORMATS)
def test_a_folder_of_something_else_is_never_replaced(lab, tmp_path, to):
    lab.put(range(3))
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is a folder, and not one of zarr"):
        export(lab.space, to, folder, overwrite=True)
    assert (folder / "thesis.txt").read_text() == "years of work"
    assert listed(tmp_path) == {"store", "results"}


@pytest.mark.parametrize(
    ("to", "fault"),
    [("h5ad", "missing file"), ("parquet", "missing file"), ("h5ad", "at the end"), ("zarr", "at the end")],
)
def test_an_export_that_fails_leaves_what_was_there(lab, tmp_path, monkeypatch, to, fault):
    lab.put(range(3))
    out = tmp_path / "here" / f"out.{to}"
    export(lab.space, to, out)
    late = lab.stage(range(3, 5), stamp=1)
    lab.commit(late)
    if fault == "missing file":
        (lab.space.path / "cells" / late.cells.path).unlink()
    else:

        def fail(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(export_module, "_put", fail)
    names = re.escape(f"{late.cells.path} cannot be read" if fault == "missing file" else f"'{out}' cannot be written")
    with pytest.raises(StoreError if fault == "missing file" else InputError, match=names) as error:
        export(lab.space, to, out, overwrite=True)
    assert error.value.remedy
    assert ids_of(out) == ["c0", "c1", "c2"]
    assert listed(out.parent) == {out.name}


def test_a_folder_that_cannot_be_replaced_comes_back(lab, tmp_path, monkeypatch):
    lab.put(range(3))
    out = export(lab.space, "zarr", tmp_path / "here" / "out.zarr")
    replace = type(out).replace

    def fail(path, target):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(type(out), "replace", fail)
        with pytest.raises(InputError, match="Input/output"):
            export(lab.space, "zarr", out, overwrite=True)
    assert type(out).replace is replace
    assert ids_of(out) == ["c0", "c1", "c2"]
    assert listed(out.parent) == {"out.zarr"}


@pytest.mark.parametrize("to", FORMATS)
def test_a_parent_that_is_a_file(lab, tmp_path, to):
    lab.put(range(3))
    (tmp_path / "here").write_text("thesis")
    out = tmp_path / "here" / f"out.{to}"
    with pytest.raises(InputError, match=re.escape(f"'{out}' cannot be written")) as error:
        export(lab.space, to, out)
    assert "--out FILE" in error.value.remedy
    assert (tmp_path / "here").read_text() == "thesis"


@pytest.mark.parametrize("call", ["mkdir", "exists"])
def test_a_parent_without_permission(lab, tmp_path, monkeypatch, call):
    lab.put(range(3))
    out = tmp_path / "here" / "out.h5ad"

    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(type(out), call, refuse)
        with pytest.raises(InputError, match=re.escape(f"'{out}' cannot be written") + ".*Permission denied"):
            export(lab.space, "h5ad", out)
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize(
    ("to", "how", "error", "told"),
    [
        ("csv", {}, InputError, "--to csv is no format"),
        ("h5ad", {"where": "tisue = 'lung'"}, FilterError, "no column 'tisue'"),
        ("parquet", {"where": "label ="}, FilterError, "'text'"),
        ("parquet", {"as_of": 9}, StoreError, "no version 9"),
        ("zarr", {"as_of": -1}, StoreError, "no version -1"),
    ],
)
def test_an_export_that_cannot_be(lab, tmp_path, to, how, error, told):
    lab.put(range(3))
    with pytest.raises(error, match=told):
        export(lab.space, to, tmp_path / "here" / "out", **how)
    assert not (tmp_path / "here").exists() or listed(tmp_path / "here") == set()
