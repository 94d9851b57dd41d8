"""A space as a reader sees it: its columns and their types, its versions, its files."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from scviaduct.errors import FilterError, InputError, StoreError
from scviaduct.store import Store
from scviaduct.store.schema import LATENTS, cells_schema
from tests.scviaduct.store.synthetic import DIGEST, DIMENSIONS, KEPT, SOURCE, Lab

OBS = {
    "text": ["a", None, "c", "a"],
    "truth": [True, False, None, True],
    "whole": [1, None, -3, 2**60],
    "real": [0.5, -1.5, None, 1e300],
}
CODED = pa.dictionary(pa.int32(), pa.string())
TYPES = {
    "source": CODED,
    "dataset_id": CODED,
    "observation_id": pa.string(),
    "source_row": pa.int64(),
    "soma_joinid": pa.int64(),
    "latent": pa.list_(pa.float32()),
    "label": CODED,
    "probability": pa.float32(),
    "margin": pa.float32(),
    "entropy": pa.float32(),
    "ambiguous": pa.bool_(),
    "reference": pa.string(),
    "adapter": CODED,
    "text": CODED,
    "truth": pa.bool_(),
    "whole": pa.int64(),
    "real": pa.float64(),
    "unit": pa.string(),
    "unit_row": pa.int32(),
    "run": pa.string(),
}


def all_of(space, **how):
    return pa.concat_tables(space.read(**how)).unify_dictionaries()


def test_every_column_is_read_back(lab):
    completion = lab.stage([2, 3, 5, 8], unmapped=[3], kept=KEPT, obs=OBS, run="r1")
    assert list(lab.space.read()) == []
    assert lab.commit(completion, run="r1", kept=KEPT) == lab.space.head()
    (table,) = lab.space.read()
    assert {field.name: field.type for field in table.schema} == TYPES
    assert table.schema.names == list(TYPES)
    assert table.to_pydict() == {
        "source": [SOURCE] * 4,
        "dataset_id": ["d"] * 4,
        "observation_id": ["c2", "c3", "c5", "c8"],
        "source_row": [2, 3, 5, 8],
        "soma_joinid": [None] * 4,
        "latent": [[2, 0, 0.5, -2], None, [5, 0, 0.5, -5], [8, 0, 0.5, -8]],
        "label": ["type 0", None, "type 0", "type 0"],
        "probability": [0.75, None, 0.75, 0.75],
        "margin": [0.5, None, 0.5, 0.5],
        "entropy": [1.25, None, 0.25, 1.25],
        "ambiguous": [True, None, False, True],
        "reference": ["pbmc@0123456789ab"] * 4,
        "adapter": [None] * 4,
        **OBS,
        "unit": [completion.unit] * 4,
        "unit_row": [0, 1, 2, 3],
        "run": ["r1"] * 4,
    }
    assert completion.mapped == 3


@pytest.mark.parametrize(
    ("source", "expected"), [("census:homo_sapiens", [4, 7]), ("soma:/x#RNA", [4, 7]), (SOURCE, [None] * 2)]
)
@pytest.mark.parametrize("uri", [None, "landing:/there"])
def test_join_ids_come_from_soma_alone(lab, source, uri, expected):
    """Wherever the cells were read: a landing of a Census has the Census's."""
    lab.put([4, 7], source=source, uri=uri)
    assert all_of(lab.space)["soma_joinid"].to_pylist() == expected


def test_kept_columns_may_come_as_dictionaries(lab):
    texts = pa.array(["a", None, "a"]).dictionary_encode()
    lab.put(range(3), kept={"text": "string"}, obs={"text": texts})
    assert all_of(lab.space)["text"].to_pylist() == ["a", None, "a"]


@pytest.mark.parametrize("name", ["cell type (x)", "a.b", "größe", "in", 'a"b', "x,y;z={}", "e\tf"])
def test_kept_columns_have_any_name(lab, name):
    kept = {name: "string", "a": "int64"}
    lab.put(range(2), kept=kept, obs={name: ["x", None], "a": [1, 2]})
    assert all_of(lab.space, columns=[name, "a"]).to_pydict() == {name: ["x", None], "a": [1, 2]}


def test_truths_of_a_text_column_read_alike_in_every_file(lab):
    """A column that is bool in one file and text in another is text; so is a whole number."""
    kept = {"text": "string"}
    texts = pa.array(["True", "False", None]).dictionary_encode()
    lab.commit(
        lab.stage(range(3), kept=kept, obs={"text": [True, False, None]}),
        lab.stage(range(3), dataset="e", kept=kept, obs={"text": texts}),
        lab.stage(range(3), dataset="f", kept=kept, obs={"text": [1, 2, None]}),
        kept=kept,
    )
    rows = all_of(lab.space).to_pylist()
    found = {name: [row["text"] for row in rows if row["dataset_id"] == name] for name in "def"}
    assert found == {"d": ["True", "False", None], "e": ["True", "False", None], "f": ["1", "2", None]}
    assert lab.space.count("text = 'True'") == 2


def test_staged_files_are_small(lab):
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(5_000, DIMENSIONS))
    completion = lab.stage(range(5_000), latent=latent, kept=KEPT, obs={n: [v[0]] * 5_000 for n, v in OBS.items()})
    split = {"latent.list.element", "probability", "margin", "entropy", "real"}
    coded = {"source", "dataset_id", "label", "reference", "adapter", "unit", "run", "text"}
    differences = {"unit_row", "source_row", "soma_joinid", "whole"}
    unranged = {"observation_id", "latent.list.element"}
    seen = set()
    for table, file in (("latents", completion.latents), ("cells", completion.cells)):
        path = lab.space.path / table / file.path
        assert path.stat().st_size == file.size
        group = pq.read_metadata(path).row_group(0)
        for i in range(group.num_columns):
            column = group.column(i)
            assert column.compression == "ZSTD", column.path_in_schema
            assert ("BYTE_STREAM_SPLIT" in column.encodings) == (column.path_in_schema in split), column.path_in_schema
            assert ("RLE_DICTIONARY" in column.encodings) == (column.path_in_schema in coded), column.path_in_schema
            delta = "DELTA_BINARY_PACKED" in column.encodings
            assert delta == (column.path_in_schema in differences), column.path_in_schema
            assert (column.statistics is None) == (column.path_in_schema in unranged), column.path_in_schema
            seen.add(column.path_in_schema)
    assert split | coded | differences <= seen


@pytest.mark.parametrize("words", [["a", None, "b"], ["b", "b", "b"], [None, None, None], ["", "a", None]])
def test_files_have_categories_as_plain_strings(lab, words):
    for text in (pa.array(words, pa.string()), pa.array(words, pa.string()).dictionary_encode()):
        completion = lab.stage(range(3), kept={"text": "string"}, obs={"text": text})
        files = [pq.ParquetFile(lab.space.path / "latents" / completion.latents.path)]
        files.append(pq.ParquetFile(lab.space.path / "cells" / completion.cells.path))
        for file, schema in zip(files, (LATENTS, cells_schema({"text": "string"})), strict=True):
            there = file.schema_arrow
            assert there.names == schema.names
            assert [str(kind).replace("element", "item") for kind in there.types] == list(map(str, schema.types))
        assert files[1].read()["text"].to_pylist() == words


def test_only_what_is_asked_for_is_read(lab):
    lab.put(range(6), kept={"whole": "int64"}, obs={"whole": range(6)})
    table = all_of(lab.space, columns=["whole", "observation_id"], where="whole >= 4 and label = 'type 0'")
    assert table.to_pydict() == {"whole": [4, 5], "observation_id": ["c4", "c5"]}
    assert all_of(lab.space, columns=["latent"])["latent"].to_pylist()[5] == [5, 0, 0.5, -5]
    assert list(lab.space.read(where="whole > 9")) == []
    assert (lab.space.count(), lab.space.count("whole < 2")) == (6, 2)
    with pytest.raises(FilterError):
        lab.space.count("")  # such as of a variable that is not set: no condition is None


@pytest.mark.parametrize(
    ("how", "error", "told"),
    [
        ({"columns": ["unit", "wole"]}, InputError, "no column 'wole'"),
        ({"where": "wole = 1"}, FilterError, "no column 'wole'"),
        ({"where": "whole ="}, FilterError, "a number"),
        ({"as_of": 3}, StoreError, "no version 3"),
        ({"as_of": -1}, StoreError, "no version -1"),
        ({"as_of": 2**64}, StoreError, f"no version {2**64}"),
    ],
)
def test_a_read_that_cannot_be(lab, how, error, told):
    lab.put(range(2), kept={"whole": "int64"}, obs={"whole": [1, 2]})
    assert lab.space.head() == 2
    with pytest.raises(error, match=told):
        list(lab.space.read(**how))


def test_units_come_in_the_order_of_source_and_row(lab):
    completions = [
        lab.stage([30, 31]),
        lab.stage([4], source="file:///b.h5ad"),
        lab.stage([10, 12], dataset="e"),
        lab.stage([1, 2]),
        lab.stage([9], source="file:///a.h5ad"),
    ]
    lab.commit(*completions)
    table = all_of(lab.space, columns=["source", "source_row"])
    rows = list(zip(*table.to_pydict().values(), strict=True))
    expected = [("file:///a.h5ad", 9), ("file:///b.h5ad", 4), *((SOURCE, row) for row in (1, 2, 10, 12, 30, 31))]
    assert rows == expected


def test_kept_columns_come_and_go(lab):
    first = {"text": "string", "whole": "int64"}
    lab.put([0, 1], kept=first, obs={"text": ["a", "b"], "whole": [1, 2]})
    lab.put([2, 3], stamp=1, kept={"truth": "bool"}, obs={"truth": [True, None]})
    assert lab.space.snapshot().kept == ("text", "whole", "truth")
    table = all_of(lab.space, columns=["text", "whole", "truth"])
    assert table.to_pydict() == {"text": ["a", "b", None, None], "whole": [1, 2, None, None], "truth": [None] * 4} | {
        "truth": [None, None, True, None]
    }
    assert table.schema.field("text").type == CODED
    assert lab.space.count("truth") == 1
    assert lab.space.count("truth is null") == 3
    # cells that are written anew without a column have none in it, whatever an older run said of them
    lab.put([0, 1], stamp=2)
    assert all_of(lab.space, columns=["text"])["text"].to_pylist() == [None] * 4
    # the past has the columns that it had
    assert lab.space.snapshot(0).kept == ()
    before = max(entry["version"] for entry in lab.space.versions() if entry["run"] == "0000")
    assert lab.space.snapshot(before).kept == ("text", "whole")
    assert all_of(lab.space, as_of=before, columns=["text"])["text"].to_pylist() == ["a", "b"]


@pytest.mark.parametrize(
    ("kept", "told"),
    [
        ({"tissue": "int64"}, "'tissue' is int64 here and string in the store"),
        ({"new": "bool", "tissue": "double"}, "'tissue' is double here and string in the store"),
        ({"Tissue": "string"}, "'Tissue' is 'tissue' in the store"),
        ({"label": "string"}, "there is a column 'label'"),
        ({"Unit": "string"}, "there is a column 'unit'"),
        ({"new": "string", "NEW": "string"}, "there is a column 'new'"),
    ],
)
def test_a_kept_column_that_conflicts_is_refused(lab, kept, told):
    lab.put([0, 1], kept={"tissue": "string"}, obs={"tissue": ["a", "b"]})
    head = lab.space.head()
    with pytest.raises(InputError, match=told) as error:
        lab.commit(lab.stage([1, 2], stamp=1), run="2", kept=kept)
    assert "Rename" in error.value.remedy
    assert lab.space.head() == head
    assert lab.stamps() == {("d", "c0"): 0, ("d", "c1"): 0}


def test_versions_say_who_made_them(lab):
    assert (lab.space.versions(), lab.space.runs(), lab.space.head()) == ([], {}, 0)
    assert lab.space.snapshot().cells == 0
    lab.put(range(4), run="a1")
    lab.put(range(2, 6), stamp=1, run="b2", kept={"whole": "int64"}, obs={"whole": range(4)})
    lab.put(range(4), stamp=2, run="a1")
    told = [(entry["run"], entry["cells"]) for entry in lab.space.versions()]
    assert told == [("a1", 6), ("b2", 6), ("a1", 4)]
    numbers = [entry["version"] for entry in lab.space.versions()]
    assert numbers == sorted(numbers, reverse=True)
    assert lab.space.runs() == {"a1": numbers[0], "b2": numbers[1]}
    assert numbers[0] == lab.space.head()
    for entry in lab.space.versions():
        snapshot = lab.space.snapshot(entry["version"])
        assert (snapshot.run, snapshot.cells, snapshot.version) == (entry["run"], entry["cells"], entry["version"])
        assert snapshot.timestamp == entry["timestamp"]
        assert len(lab.stamps(entry["version"])) == entry["cells"]


def test_a_checkpoint_changes_nothing(lab):
    source = "file:///" + "ä b%20/" * 60 + "q.h5ad"
    for stamp in range(3):
        lab.put(range(stamp, stamp + 4), stamp=stamp, source=source)
    before = all_of(lab.space)
    for table in ("cells", "latents"):
        DeltaTable(str(lab.space.path / table)).create_checkpoint()
        assert list((lab.space.path / table / "_delta_log").glob("*.checkpoint.parquet"))
    assert all_of(lab.space).equals(before)
    lab.put([5], stamp=3, source=source)
    expected = {("d", f"c{row}"): min(row, 2) for row in range(6)} | {("d", "c5"): 3}
    assert lab.stamps() == expected
    assert lab.stamps(1) == {("d", f"c{row}"): 0 for row in range(4)}
    lab.put(range(6), stamp=4, source=source)
    assert lab.stamps() == dict.fromkeys(expected, 4)


def test_spaces_do_not_meet(lab):
    other = Lab.make(lab.store.path, "hlca", DIGEST[::-1])
    newer = Lab.make(lab.store.path, "pbmc", "f" * 32)
    for stamp, each in enumerate((lab, other, newer)):
        each.put(range(stamp + 1), stamp=stamp, run=f"a{stamp}")
    for stamp, each in enumerate((lab, other, newer)):
        assert each.stamps() == {("d", f"c{row}"): stamp for row in range(stamp + 1)}
        assert each.space.runs() == {f"a{stamp}": 1}
    opened = Store.open(lab.store.path)
    assert [space.name for space in opened.spaces()] == [
        "hlca-fedcba987654",
        "pbmc-0123456789ab",
        "pbmc-ffffffffffff",
    ]


@pytest.mark.parametrize("full", [False, True])
def test_vacuum_leaves_what_a_version_or_a_commit_needs(lab, full):
    lab.put(range(10))
    lab.put(range(5, 15), stamp=1)
    staged = lab.stage(range(100, 110), stamp=2)
    now = lab.stamps(), lab.stamps(1)
    for table in ("cells", "latents"):
        stray = lab.space.path / table / "stray.parquet"
        stray.write_bytes(b"nobody names this")
        DeltaTable(str(lab.space.path / table)).vacuum(
            retention_hours=0, enforce_retention_duration=False, dry_run=False, full=full
        )
        assert stray.exists() != full
    assert (lab.stamps(), lab.stamps(1)) == now
    assert lab.space.snapshot().run == "0001"
    assert lab.commit(staged) == lab.space.head()
    assert len(lab.stamps()) == 25


def test_a_table_that_something_else_rewrote_is_refused(lab):
    lab.put(range(4))
    lab.put(range(4, 8), stamp=1)
    DeltaTable(str(lab.space.path / "cells")).optimize.compact()
    with pytest.raises(StoreError, match="which no latents go with") as error:
        lab.space.snapshot()
    assert "--as-of" in error.value.remedy
    assert len(lab.stamps(2)) == 8


def test_a_stock_reader_sees_the_newest_rows(lab):
    lab.put(range(4))
    lab.put(range(2, 6), stamp=1)
    for table in ("cells", "latents"):
        rows = DeltaTable(str(lab.space.path / table)).to_pyarrow_table()
        assert sorted(rows["observation_id"].to_pylist()) == [f"c{row}" for row in range(6)]
