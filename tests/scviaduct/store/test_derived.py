"""Derived sets: columns, matrices and tables beside a version's cells, as that version has them and no other."""

from __future__ import annotations

import json
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr

from scviaduct.analysis.base import Part, Shape
from scviaduct.errors import FilterError, InputError, StoreError
from scviaduct.store import Space, Stager, Store, derivedstaging
from scviaduct.store.derivedstaging import record_path
from scviaduct.store.export import export
from scviaduct.store.index import ensure_index
from scviaduct.store.search import search, stored_queries
from scviaduct.values import Settings
from tests.scviaduct.store.deriving import COLUMNS, GENES, SHAPE, Deriver, check, part_of
from tests.scviaduct.store.synthetic import DIGEST, Lab, block_of, mapping_of, process


@pytest.fixture
def deriver(lab):
    """Three units, one of which takes three slots; two cells were not mapped."""
    made = Deriver(lab)
    made.put([0, 1, 2])
    made.put(range(3, 13), unmapped=[4, 12])
    made.put([0, 1], dataset="e", stamp=1)
    return made


CELLS = {(0, row) for row in range(13)} | {(1, 0), (1, 1)}


def files_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_values_are_read_back(deriver, lab):
    before = lab.space.head()
    assert deriver.derive() == (3, before + 1)
    assert check(lab.space, covered=CELLS) == CELLS - {(0, 4), (0, 12)} | {(-1, 4), (-1, 12)}
    assert lab.space.snapshot().cells == 15
    assert (lab.space.snapshot().run, lab.space.snapshot(before).derived) == ("d1", {})
    kinds = {name: lab.space.schema(lab.space.snapshot()).field(name).type for name in COLUMNS}
    coded = pa.dictionary(pa.int32(), pa.string())
    assert list(kinds.values()) == [pa.float64(), pa.bool_(), pa.int64(), coded, pa.float64()]
    names = lab.space.snapshot().names
    assert names[-8:] == (*COLUMNS, "unit", "unit_row", "run")
    assert names[:-8] == lab.space.snapshot(before).names[:-3]
    told = lab.space.derived_set("values")
    assert (told.what, told.family, told.reference, told.adapters) == ("values", "SCVI", DIGEST, ("a1", "b2"))
    assert told.options == {"genes": ["g0"], "samples": 3}
    derived = lab.space.snapshot().named("values")
    assert (derived.units, derived.cells, derived.matrices, derived.tables) == (3, 15, ("expr", "wide"), ())
    with pytest.raises(StoreError, match="no version"):
        lab.space.snapshot(before + 2)


def test_the_same_again_does_nothing(deriver, lab):
    calls = []
    _, version = deriver.derive()
    assert deriver.derive(before=lambda: calls.append(1)) == (0, version)
    assert (lab.space.head(), calls) == (version, [1])


def test_units_that_come_later_join_the_set(deriver, lab):
    _, first = deriver.derive()
    folder = deriver.folder()
    deriver.put(range(20, 27), dataset="f", stamp=2)
    mapped = lab.space.head()
    more = {(2, row) for row in range(20, 27)}
    # the run that mapped them carried the set forward, and says nothing of their values
    check(lab.space, covered=CELLS)
    staged, second = deriver.derive()
    assert staged == 1
    assert deriver.folder().made == folder.made
    assert check(lab.space, covered=CELLS | more) > more
    check(lab.space, as_of=mapped, covered=CELLS)
    check(lab.space, as_of=first, covered=CELLS)
    slots = {unit: known.slot for unit, known in lab.space.derived_state("values").units.items()}
    assert sorted(slots.values()) == [0, 1, 4, 5]
    array = zarr.open_array(folder.path / "expr.zarr", mode="r")
    assert (array.shape, array.chunks, array.shards) == ((28, 5), (4, 5), (4, 5))
    assert (lab.space.snapshot(second).named("values").units, lab.space.snapshot(first).named("values").units) == (4, 3)


def test_a_part_of_the_units_can_be_derived(deriver, lab):
    first, *rest = deriver.units
    deriver.derive(units=[first])
    check(lab.space, covered={(0, 0), (0, 1), (0, 2)})
    assert lab.space.count('"values.score" is null') == 12
    deriver.derive(units=rest)  # what the version has of the set stays in it
    check(lab.space, covered=CELLS)


def test_what_is_left_of_a_unit_keeps_its_values(deriver, lab):
    _, version = deriver.derive()
    deriver.put([1, 5, 6, 40], stamp=3)
    left = {(stamp, row) for stamp, row in CELLS if stamp or row not in (1, 5, 6)}
    assert lab.space.snapshot().cells == 16
    check(lab.space, covered=left)
    check(lab.space, as_of=version, covered=CELLS)
    deriver.derive()
    fresh = {(3, row) for row in (1, 5, 6, 40)}
    assert check(lab.space, covered=left | fresh) >= fresh
    # a unit that was cut can still be derived whole, and one that comes back has its values
    other = Deriver(lab, options={"samples": 9}, units=deriver.units)
    other.derive("again")
    check(lab.space, "again", covered=left | fresh)
    deriver.put(range(3, 13), unmapped=[4, 12])
    check(lab.space, covered=left | fresh | {(0, 5), (0, 6)})


def test_cells_that_were_mapped_with_adapters_say_so(lab):
    unit = lab.unit(range(4))
    told = replace(mapping_of(range(4)), adapter=np.array([1, -1, 0, 1], np.int32), adapters=("ad-a", "ad-b"))
    stager = Stager(str(lab.space.path), "pbmc@0", "r")
    lab.commit(stager.stage(unit, block_of(unit.shard, range(4)), told, Settings()))
    (table,) = lab.space.read(["adapter", "observation_id"])
    assert table["adapter"].to_pylist() == ["ad-b", None, "ad-a", "ad-b"]
    names = lab.space.snapshot().names
    assert names[names.index("reference") + 1] == "adapter"
    assert lab.space.count("adapter = 'ad-b'") == 2
    assert lab.space.count("adapter is null") == 1


# Conditions and exports


CONDITIONS = {
    "values.score >= 5": 8,
    "values.odd and values.text = 't1'": 2,
    "values.whole > 1152921504606847000 and source_row < 2": 2,
    '"values.score" is null': 3,
    "not values.odd or dataset_id = 'e'": 7,
    "values.share is not null": 0,
}


@pytest.mark.parametrize("where", CONDITIONS)
def test_a_condition_may_name_derived_columns(deriver, lab, where):
    deriver.derive()
    rows = pa.concat_tables(lab.space.read()).to_pandas()
    by_hand = {
        "values.score >= 5": rows["values.score"] >= 5,
        "values.odd and values.text = 't1'": (rows["values.odd"] == True) & (rows["values.text"] == "t1"),  # noqa: E712
        "values.whole > 1152921504606847000 and source_row < 2": (rows["values.whole"] > 1152921504606847000)
        & (rows["source_row"] < 2),
        '"values.score" is null': rows["values.score"].isna(),
        "not values.odd or dataset_id = 'e'": (rows["values.odd"] == False) | (rows["dataset_id"] == "e"),  # noqa: E712
        "values.share is not null": rows["values.share"].notna(),
    }[where]
    assert lab.space.count(where) == by_hand.sum() == CONDITIONS[where]
    blocks = [block for _, block in lab.space.matrix("values", "expr", where)]
    found = np.concatenate(blocks) if blocks else np.empty((0, 5))
    whole = np.concatenate([block for _, block in lab.space.matrix("values", "expr")])
    np.testing.assert_array_equal(found, whole[by_hand.to_numpy()])


def test_a_condition_of_the_past_knows_the_past(deriver, lab):
    before = lab.space.head()
    deriver.derive()
    with pytest.raises(FilterError, match=r"no column 'values\.score'"):
        lab.space.count("values.score > 1", before)


def test_features_are_chosen_by_name(deriver, lab):
    deriver.derive()
    for features in (["g3"], ["g4", "g0"], list(GENES)):
        found = np.concatenate([block for _, block in lab.space.matrix("values", "expr", features=features)])
        whole = np.concatenate([block for _, block in lab.space.matrix("values", "expr")])
        np.testing.assert_array_equal(found, whole[:, [GENES.index(name) for name in features]])
    wide = np.concatenate([block for _, block in lab.space.matrix("values", "wide", features=["p599", "p256", "p255"])])
    wide = wide[np.argsort(wide[:, 0])]
    np.testing.assert_array_equal(wide - wide[:, 2:], [[344, 1, 0]] * 13 + [[np.nan] * 3] * 2)
    ((keys, block),) = lab.space.matrix("values", "expr", "dataset_id = 'e' and source_row = 1", features=["g1"])
    assert (keys.column_names, keys["observation_id"].to_pylist()) == (
        ["source", "dataset_id", "observation_id"],
        ["c1"],
    )
    assert block.tolist() == [[1011]]


@pytest.mark.parametrize("to", ["h5ad", "zarr", "parquet"])
def test_an_export_has_the_columns(deriver, lab, tmp_path, to):
    deriver.derive()
    out = export(lab.space, to, tmp_path / f"out.{to}", "values.score >= 0 and dataset_id = 'd'")
    reader = {"h5ad": anndata.read_h5ad, "zarr": anndata.read_zarr}.get(to)
    obs = reader(out).obs if reader else pq.read_table(out).to_pandas()
    assert set(COLUMNS) <= set(obs.columns)
    chosen = obs[["values.score", "values.odd", "values.whole", "values.text"]].to_numpy().tolist()
    assert chosen[:3] == [[0.0, False, 2**60, "t0"], [1.0, True, 2**60 + 10, "t1"], [2.0, False, 2**60 + 20, "t2"]]


def test_a_search_may_be_narrowed_by_them(deriver, lab):
    ensure_index(lab.space)
    deriver.derive()
    hits = search(lab.space, stored_queries(lab.space, "values.whole >= 0 and source_row = 0"), 2, where="values.odd")
    assert set(hits.table["values.odd"].to_pylist()) == {True}
    assert {"values.score", "values.text", "adapter"} <= set(hits.table.column_names)


# What all units come to


def test_sums_columns_and_tables(deriver, lab):
    _, version = deriver.derive(settle=True)
    total = sum(row * 10 + stamp * 1_000 for stamp, row in CELLS - {(0, 4), (0, 12)})
    check(lab.space, covered=CELLS, totals=dict.fromkeys(CELLS, total))
    table = lab.space.table("values", "totals")
    assert table.to_pydict() == {"group": ["all", "one"], "total": [total, 1]}
    assert lab.space.derived_state("values").facts == {"total": total}
    stager = deriver.folder().stager()
    first, second, _ = deriver.units
    sums = stager.sums(first)
    assert (int(sums["file"]), sums["text"].tolist()) == (30, ["a", "ß"])
    np.testing.assert_array_equal(sums["a/b"], part_of([0, 1, 2]).sums["a/b"])
    np.testing.assert_array_equal(stager.columns(second)["whole"], part_of([3, *range(5, 12)]).columns["whole"])

    # more cells: another total, for all of them, and the past keeps its own
    deriver.put([30], dataset="g")
    deriver.derive(settle=True)
    check(lab.space, covered=CELLS | {(0, 30)}, totals=dict.fromkeys(CELLS | {(0, 30)}, total + 300))
    check(lab.space, as_of=version, covered=CELLS, totals=dict.fromkeys(CELLS, total))
    assert lab.space.table("values", "totals")["total"][0].as_py() == total + 300
    assert lab.space.table("values", "totals", version)["total"][0].as_py() == total


def test_units_that_another_driver_added_are_not_settled_with_ours(deriver, lab):
    """Their own columns stay, and the shares of a total that does not hold any more go."""
    first, second, third = deriver.units
    deriver.derive(units=[first, second], settle=True)
    deriver.derive(units=[third], settle=True)
    rest = {(0, row) for row in range(13)}
    check(lab.space, covered=CELLS, totals={(1, 0): 2010, (1, 1): 2010} | dict.fromkeys(rest))


# Names


def test_sets_of_the_same_output_need_two_names(deriver, lab):
    other = Deriver(lab, options={"samples": 4}, units=deriver.units)
    deriver.derive("few-genes")
    other.derive("few-samples")
    assert deriver.folder().made.id != other.folder().made.id
    assert {"few_genes.score", "few_samples.score"} <= set(lab.space.snapshot().names)
    for name in ("few-genes", "few-samples"):
        assert set(lab.space.derived_state(name).units) == set(deriver.units)
    assert lab.space.count("few_genes.score = 2 and few_samples.score = 2") == 1


def test_a_name_goes_to_what_was_derived_last(deriver, lab):
    first, *_ = deriver.units
    _, old = deriver.derive()
    other = Deriver(lab, options={"samples": 4}, units=deriver.units)
    _, new = other.derive(units=[first])
    assert lab.space.derived_set("values").options == {"samples": 4}
    assert lab.space.derived_set("values", old).options["samples"] == 3
    check(lab.space, covered={(0, 0), (0, 1), (0, 2)})  # of the other set nothing is left
    check(lab.space, as_of=old, covered=CELLS)
    assert lab.space.drop_derived("values", run="x9") == new + 1
    assert (lab.space.snapshot().derived, lab.space.snapshot().run) == ({}, "x9")
    with pytest.raises(InputError, match=r"no column 'values\.score'"):
        list(lab.space.read(["values.score"]))
    check(lab.space, as_of=new, covered={(0, 0), (0, 1), (0, 2)})
    lab.put([50], dataset="h")
    assert lab.space.snapshot().derived == {}
    with pytest.raises(InputError, match="no derived set 'values'"):
        lab.space.drop_derived("values")
    assert deriver.derive()[0] == 0  # what is staged is there still
    check(lab.space, covered=CELLS)


def test_what_decides_the_values_decides_the_folder(deriver):
    told = [
        deriver.folder(),
        deriver.folder("other"),
        deriver.folder(options={"samples": 4}),
        deriver.folder(adapters=["a1"]),
        deriver.folder(basis="sample"),
        Deriver(deriver.lab, replace(SHAPE, matrices={"expr": GENES[::-1]})).folder(),
    ]
    assert len({folder.made.id for folder in told}) == len(told)
    assert deriver.folder(adapters=("a1", "b2"), rows=999).made == told[0].made  # its sizes stay as they were made


CLASHES = {
    "kept column": ({"values.score": "int64"}, "values", "values.score"),
    "in other letters": ({"Values.SCORE": "int64"}, "values", "Values.SCORE"),
}


@pytest.mark.parametrize("case", CLASHES)
def test_columns_of_one_name_are_refused(deriver, lab, case):
    kept, name, told = CLASHES[case]
    lab.put([60], kept=kept, obs={next(iter(kept)): [1]})
    head = lab.space.head()
    with pytest.raises(InputError, match=f"and the space has '{told}'") as error:
        deriver.derive(name)
    assert "another name" in error.value.remedy
    assert (lab.space.head(), lab.space.snapshot().derived) == (head, {})


def test_a_kept_column_that_comes_later_is_refused(deriver, lab):
    deriver.derive()
    head = lab.space.head()
    kept = {"values.Text": "string"}
    with pytest.raises(InputError, match=r"'values.Text' is called as the column 'values.text' of a derived set"):
        lab.put([60], kept=kept, obs={"values.Text": ["a"]})
    assert lab.space.head() == head


def test_names_that_differ_in_a_hyphen_meet(deriver, lab):
    deriver.derive("a-b")
    with pytest.raises(InputError, match=r"and the space has 'a_b\.score'"):
        deriver.derive("a_b")


@pytest.mark.parametrize("name", ["", "a b", "a.b", "../x", "-a", "a/b"])
def test_a_name_that_cannot_be(deriver, lab, name):
    with pytest.raises(InputError, match="A derived set cannot be called") as error:
        deriver.derive(name)
    assert "Letters, digits" in error.value.remedy


SHAPES = {
    "taken": (Shape({"unit_row": "int64"}), "cannot be called 'unit_row'"),
    "type": (Shape({"a": "float32"}), "'a' cannot be 'float32'"),
    "twice": (Shape(matrices={"m": ("g", "h", "g")}), "has feature 'g' 2 times"),
    "empty": (Shape(matrices={"m": ()}), "has no features"),
    "folder": (Shape(matrices={"m/n": ("g",)}), "cannot be called 'm/n'"),
}


@pytest.mark.parametrize("case", SHAPES)
def test_a_shape_that_cannot_be_stored(lab, case):
    shape, told = SHAPES[case]
    with pytest.raises(InputError, match=told):
        lab.space.create_derived("x", shape, family="SCVI", options={}, rows=4)
    assert not (lab.space.path / "derived").exists()


PARTS = {
    "column": (lambda part: replace(part, columns={"scores": np.zeros(3)}), "no column 'scores'"),
    "length": (lambda part: replace(part, columns={"score": np.zeros(4)}), r"'score' .* has the shape \(4,\)"),
    "type": (lambda part: replace(part, columns={"whole": np.array([1.5, 2, 3])}), "'whole' .* is not int64"),
    "matrix": (lambda part: replace(part, matrices={}), r"is given the matrices \[\]"),
    "features": (
        lambda part: replace(part, matrices=part.matrices | {"expr": np.zeros((3, 4), np.float32)}),
        r"'expr' .* has the shape \(3, 4\)",
    ),
    "objects": (lambda part: replace(part, sums={"s": np.array([None])}), "'s' .* holds Python objects"),
}


@pytest.mark.parametrize("case", PARTS)
def test_values_that_are_not_the_sets(deriver, case):
    change, told = PARTS[case]
    folder = deriver.folder()
    unit = next(iter(deriver.units))
    slots = folder.assign({unit: 3})
    before = files_of(folder.path)
    with pytest.raises(StoreError, match=told):
        folder.stager().stage(unit, slots[unit], np.ones(3, bool), change(part_of([0, 1, 2])))
    assert files_of(folder.path) == before


READS = {
    "set": (lambda space: next(space.matrix("value", "expr")), "no derived set 'value'", "values"),
    "matrix": (lambda space: next(space.matrix("values", "exp")), "no matrix 'exp'", "expr, wide"),
    "feature": (lambda space: next(space.matrix("values", "expr", features=["g9"])), "no feature 'g9'", "g"),
    "table": (lambda space: space.table("values", "totals"), "no table 'totals'", "none"),
    "column": (lambda space: list(space.read(["values.sco"])), r"no column 'values\.sco'", "values.score"),
}


@pytest.mark.parametrize("case", READS)
def test_what_is_not_there_is_named(deriver, lab, case):
    read, told, remedy = READS[case]
    deriver.derive()
    with pytest.raises(InputError, match=told) as error:
        read(lab.space)
    assert remedy in error.value.remedy


# Staging


def test_a_stager_crosses_processes(deriver):
    stager = deriver.folder().stager()
    assert pickle.loads(pickle.dumps(stager)) == stager


def test_of_many_attempts_at_once_one_wins_whole(deriver, lab):
    """Attempts with different values: nothing of a loser is read, and nothing of it stays."""
    folder = deriver.folder()
    unit = list(deriver.units)[1]
    slots = folder.assign({unit: 10})
    start = threading.Barrier(6)

    def attempt(stamp):
        start.wait()
        return deriver.stage(folder, unit, slots[unit], stamp=stamp)

    with ThreadPoolExecutor(6) as pool:
        (winner,) = set(map(repr, pool.map(attempt, range(6))))
    (completion,) = folder.completions([unit]).values()
    assert repr(completion) == winner
    lab.space.commit_derived("values", folder, [unit], {"run": "x"})
    rows = next(table for table in lab.space.read(["values.score", "values.whole"], where="values.whole >= 0"))
    stamp = (rows["values.whole"][0].as_py() - 2**60 - 30) // 1_000
    ((_, block),) = lab.space.matrix("values", "expr", where="values.whole >= 0")
    expected = part_of([3, *range(5, 12)], stamp)
    np.testing.assert_array_equal(block, expected.matrices["expr"])
    assert rows["values.whole"].to_pylist() == expected.columns["whole"].tolist()
    assert int(folder.stager().sums(unit)["file"]) == expected.sums["file"]
    assert list((folder.path / ".attempts").iterdir()) == []
    shards = {path.name for path in (folder.path / "expr.zarr" / "c").iterdir()}
    assert shards == {f"{slots[unit] + more}" for more in range(3)}


def test_a_unit_that_is_just_put_in_its_place_is_done(deriver, monkeypatch):
    """Another process moves each file between two looks of this one."""
    folder, unit = deriver.folder(), next(iter(deriver.units))
    slots = folder.assign({unit: 3})
    with monkeypatch.context() as held:
        held.setattr(derivedstaging, "publish", lambda *_: None)
        completion = deriver.stage(folder, unit, slots[unit])
    real = derivedstaging.size

    def size(path):
        found = real(path)
        derivedstaging.publish(folder.path, completion)
        return found

    monkeypatch.setattr(derivedstaging, "size", lambda path: size(path) if ".attempts" not in str(path) else real(path))
    assert not (folder.path / "columns").exists()
    assert derivedstaging.is_whole(folder.path, completion)


def test_slots_are_given_once(deriver):
    """Drivers at once, over overlapping units: a slot is one unit's, and the arrays reach the last."""
    folder, start = deriver.folder(), threading.Barrier(6)

    def assign(number):
        start.wait()
        return folder.assign({f"u{unit}": 1 + unit for unit in range(number, number + 8)})

    with ThreadPoolExecutor(6) as pool:
        told = list(pool.map(assign, range(6)))
    slots = {}
    for one in told:
        for unit, slot in one.items():
            assert slots.setdefault(unit, slot) == slot
    taken = [slot + more for unit, slot in slots.items() for more in range(folder.made.span(1 + int(unit[1:])))]
    assert sorted(taken) == list(range(len(taken)))
    assert zarr.open_array(folder.path / "expr.zarr").shape[0] == 4 * len(taken)
    assert folder.assign({"u3": 4}) == {"u3": slots["u3"]}


DAMAGES = {
    "columns": lambda folder, unit: folder / "columns" / f"{unit}.parquet",
    "sums": lambda folder, unit: folder / "sums" / f"{unit}.npz",
    "shard": lambda folder, unit: folder / "expr.zarr" / "c" / "0" / "0",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_not_committed_but_staged_anew(deriver, lab, damage):
    folder = deriver.folder()
    unit = next(iter(deriver.units))
    slots = folder.assign({unit: 3})
    deriver.stage(folder, unit, slots[unit])
    DAMAGES[damage](folder.path, unit).unlink()
    head = lab.space.head()
    with pytest.raises(StoreError, match=f"unit {unit} of derived set .* is missing") as error:
        lab.space.commit_derived("values", folder, [unit], {"run": "x"})
    assert "Nothing was committed" in error.value.remedy
    assert (lab.space.head(), folder.completions([unit])) == (head, {})
    assert deriver.derive(units=[unit])[0] == 1
    check(lab.space, covered={(0, 0), (0, 1), (0, 2)})


def test_what_was_not_settled_is_not_committed(deriver, lab):
    folder = deriver.folder()
    deriver.derive()
    with pytest.raises(StoreError, match="Nothing was committed"):
        lab.space.commit_derived("values", folder, deriver.units, {"run": "x"}, settled="k")


@pytest.mark.parametrize("damage", ["columns", "shard"])
def test_a_file_that_is_gone_is_named_and_never_read_as_nothing(deriver, lab, damage):
    deriver.derive()
    folder, unit = deriver.folder(), next(iter(deriver.units))
    path = DAMAGES[damage](folder.path, unit)
    path.unlink()
    with pytest.raises(StoreError, match=str(path)) as error:
        list(lab.space.read(["values.score"]) if damage == "columns" else lab.space.matrix("values", "expr"))
    assert "derive it again" in error.value.remedy
    assert lab.space.count("probability > 0") == 13  # the cells themselves are read without it


def test_nothing_is_stored_of_cells_without_values(deriver, lab):
    """Rows of an unmapped unit are null and NaN, and it has no shard."""
    deriver.units.clear()
    unit = deriver.put([70, 71], dataset="z", unmapped=[70, 71])
    deriver.derive()
    assert lab.space.count("values.score is null and dataset_id = 'z'") == 2
    ((_, block),) = lab.space.matrix("values", "expr", where="dataset_id = 'z'")
    assert np.isnan(block).all()
    assert not any("zarr" in path for path in deriver.folder().completions([unit])[unit].files)


def test_a_wide_matrix_is_cut_into_shards(deriver, lab, monkeypatch):
    monkeypatch.setattr("scviaduct.store.derived.SHARD_BYTES", 4 * 4 * 256 * 2)
    deriver.derive()
    folder = deriver.folder()
    array = zarr.open_array(folder.path / "wide.zarr", mode="r")
    assert (array.chunks, array.shards) == ((4, 256), (4, 512))
    assert {path.name for path in (folder.path / "wide.zarr" / "c" / "0").iterdir()} == {"0", "1"}
    check(lab.space, covered=CELLS)


def test_other_tools_read_it(deriver, lab):
    """With plain zarr and pandas, as the documentation says."""
    deriver.derive(settle=True)
    derived = lab.space.snapshot().named("values")
    folder = lab.space.path / "derived" / derived.id
    files = sorted((folder / "columns").glob("*.parquet"))
    frame = pd.concat([pd.read_parquet(path, dtype_backend="numpy_nullable") for path in files])
    assert (len(frame), frame["mapped"].sum()) == (15, 13)
    assert frame["score"][~frame["mapped"]].isna().all()
    state = pd.read_json(folder / "states" / f"{derived.state}.json", typ="series")
    array = zarr.open_array(folder / "expr.zarr", mode="r")
    slots = {unit: known["slot"] for unit, known in state["units"].items()}
    rows = (frame["unit"].map(slots) * array.shards[0] + frame["unit_row"]).to_numpy(np.int64)
    values, mapped = array[:][rows], frame["mapped"].to_numpy(bool)
    np.testing.assert_array_equal(values[mapped][:, 0], (frame["whole"][mapped] - 2**60).to_numpy(np.float32))
    assert np.isnan(values[~mapped]).all()
    assert np.isnan(np.delete(array[:], rows, axis=0)).all()


# Commits at once


def test_a_version_between_reading_and_writing_is_not_lost(deriver, lab):
    """Another writer maps at the worst moment: after this one has read what the next version is to hold."""
    rival = Deriver(Lab(lab.store, Space(lab.space.path)))
    calls = []

    def interfere():
        calls.append(1)
        rival.put([0, 90], stamp=5)

    _, version = deriver.derive(before=interfere)
    assert (calls, version, lab.space.head()) == ([1], 5, 5)
    assert lab.space.snapshot().cells == 16
    check(lab.space, covered=CELLS)


def test_a_set_that_is_committed_meanwhile_is_carried_forward(deriver, lab):
    rival = Deriver(Lab(lab.store, Space(lab.space.path)), units=deriver.units)
    staged = lab.stage([0, 90], stamp=5)
    lab.commit(staged, before=rival.derive)
    assert lab.space.snapshot().cells == 16
    check(lab.space, covered=CELLS)


def test_writers_at_once_all_land(deriver, lab):
    start = threading.Barrier(4)

    def write(number):
        mine = Lab(lab.store, Space(lab.space.path))
        if number % 2:
            start.wait()
            return mine.put([100 + number], stamp=number)
        own = Deriver(mine, options={"samples": number}, units=dict(deriver.units))
        start.wait()
        return own.derive(f"set{number}")[1]

    with ThreadPoolExecutor(4) as pool:
        versions = list(pool.map(write, range(4)))
    assert len(set(versions)) == 4
    assert set(lab.space.snapshot().derived) == {"set0", "set2"}
    assert lab.space.snapshot().cells == 17
    for name in ("set0", "set2"):
        check(lab.space, name, covered=CELLS)


def derive_some(path, units, first):
    store = Store.open(path)
    deriver = Deriver(Lab(store, store.space()), units=units)
    chosen = list(units)[first:] + list(units)[:first]
    for unit in chosen:
        deriver.derive(units=[unit], run=f"p{first}")


def test_processes_at_once_derive_the_same_set(deriver, lab):
    """Two drivers over the same units, one by one, in other orders."""
    writers = [process(derive_some, lab.store.path, deriver.units, first) for first in (0, 2)]
    seen = set()
    while any(writer.is_alive() for writer in writers):
        snapshot = lab.space.snapshot()
        if snapshot.derived:
            list(lab.space.read(["values.score"], as_of=snapshot.version))
            list(lab.space.matrix("values", "expr", as_of=snapshot.version))
            seen.add(snapshot.named("values").units)
    assert [writer.exitcode for writer in writers] == [0, 0]
    check(lab.space, covered=CELLS)
    assert seen <= {1, 2, 3}
    assert list((deriver.folder().path / ".attempts").iterdir()) == []


# Stores from before


def old_store(folder, monkeypatch):
    """A store as it was written before ``latents`` had a column for adapters, with one unit."""
    from scviaduct.store import space as space_module
    from scviaduct.store.schema import LATENTS

    with monkeypatch.context() as patched:
        patched.setattr(space_module, "LATENTS", pa.schema([one for one in LATENTS if one.name != "adapter"]))
        lab = Lab.make(folder)
        completion = lab.stage(range(6))
        path = lab.space.path / "latents" / completion.latents.path
        pq.write_table(pq.read_table(path, partitioning=None).drop_columns("adapter"), path)
        told = replace(completion, latents=replace(completion.latents, size=path.stat().st_size))
        record = lab.space.path / "units" / told.unit[:2] / f"{told.unit}.json"
        record.write_text(json.dumps(asdict(told)))
        lab.commit(told, run="old")
    assert "adapter" not in lab.space._latents.load().columns.names
    return lab


def test_a_store_from_before_is_read_and_mapped_into(tmp_path, monkeypatch):
    lab = old_store(tmp_path / "store", monkeypatch)
    (table,) = lab.space.read(["adapter", "label"])
    assert table["adapter"].to_pylist() == [None] * 6
    deriver = Deriver(lab)
    deriver.put([4, 5, 6], stamp=1)  # cuts the old unit
    assert "adapter" in lab.space._latents.load().columns.names
    assert lab.stamps() == {("d", f"c{row}"): int(row > 3) for row in range(7)}
    assert lab.space.count("adapter is null") == 7
    deriver.derive()
    check(lab.space, covered={(1, row) for row in (4, 5, 6)})
    assert lab.stamps(1) == {("d", f"c{row}"): 0 for row in range(6)}
    assert pa.concat_tables(lab.space.read(["adapter"], as_of=1)).num_rows == 6


def test_old_records_stay_readable(deriver):
    """A record is what a later version reads: its fields are these."""
    deriver.derive()
    folder, unit = deriver.folder(), next(iter(deriver.units))
    told = pd.read_json(record_path(folder.path, unit), typ="series")
    assert list(told.index) == ["unit", "slot", "rows", "mapped", "attempt", "files"]


def test_a_part_may_have_columns_alone(lab):
    deriver = Deriver(lab, shape=Shape({"score": "double"}))
    unit = deriver.put([0, 1])
    folder = deriver.folder()
    slots = folder.assign({unit: 2})
    folder.stager().stage(unit, slots[unit], np.ones(2, bool), Part({"score": np.array([1, 2], np.float32)}))
    lab.space.commit_derived("alone", folder, [unit], {"run": "x"})
    (table,) = lab.space.read(["alone.score"])
    assert table["alone.score"].to_pylist() == [1, 2]
    assert folder.stager().sums(unit) == {}


def test_a_comparison_leaves_tables_alone(deriver, lab):
    """No unit, no column, no matrix; which cells it looked at is in what decides it."""
    made = Deriver(lab, shape=Shape())
    folder = made.folder("differential-expression", options={"select": "a", "against": "b"})
    genes = pd.DataFrame({"gene": ["g1", "g0"], "bayes_factor": [3.5, np.nan], "is_de": [True, False]})
    version = lab.space.commit_derived("de-a-b", folder, [], {"run": "x"}, tables={"genes": genes}, facts={"n": 2})
    assert lab.space.table("de-a-b", "genes").to_pydict() == {
        "gene": ["g1", "g0"],
        "bayes_factor": [3.5, None],
        "is_de": [True, False],
    }
    assert lab.space.derived_state("de-a-b").facts == {"n": 2}
    assert (
        lab.space.commit_derived("de-a-b", folder, [], {"run": "x"}, tables={"genes": genes}, facts={"n": 2}) == version
    )
    assert lab.space.snapshot().names == lab.space.snapshot(version - 1).names
    deriver.put([50], stamp=4)
    assert lab.space.table("de-a-b", "genes").num_rows == 2
