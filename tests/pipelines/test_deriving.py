"""``derive`` from end to end: whoever computes it, in one go or in several, and what wrong input is answered."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import anndata
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import pipelines as sv
from pipelines import cli as command_line
from pipelines.deriving import derive
from pipelines.selecting import choose
from scviaduct.analysis import analyses
from scviaduct.errors import DataError, InputError, StoreError
from scviaduct.store import Store

if TYPE_CHECKING:
    from tests.support.references import Tiny

pytest_plugins = ["tests.support.tiny"]

INLINE = {"engine": "inline", "quiet": True}
ONE = {"actors": 1, "readers": 1, "quiet": True}
EXPRESSION = ("normalised-expression", {"samples": 2})
SCREEN = {"perturbation": "sex", "controls": "f", "permutations": 50}
COMPARED = {"select": "batch = 'c' AND sex = 'f'", "against": "batch = 'a'", "samples": 64, "cells": 30}
RUNNER = CliRunner()


@dataclass(frozen=True)
class Mapped:
    """A store of one query."""

    tiny: Tiny
    store: Path

    @property
    def space(self):
        return Store.open(self.store).space()

    def derive(self, what, options=None, where=INLINE, name=None):
        told = {"package": str(self.tiny.reference.path), **(options or {}), **where}
        return derive(str(self.store), what, name=name, **told)

    def map(self, source):
        told = {"surgery_epochs": 2, "keep_obs": ["batch", "sex"], "shard_cells": 25} | INLINE
        return sv.map(source, reference=str(self.tiny.reference.path), store=str(self.store), **told)

    def matrix(self, name, matrix="expression"):
        """Values by unit."""
        parts = self.space.matrix(name, matrix, columns=["unit"])
        return {table["unit"][0].as_py(): values for table, values in parts}


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A store of a family's query, which no test writes into."""
    folder, there = tmp_path_factory.mktemp("whole"), {}

    def get(family="SCVI"):
        if family not in there:
            there[family] = Mapped(tiny(family), folder / family)
            assert there[family].map(there[family].tiny.query).state == "committed"
        return there[family]

    return get


@pytest.fixture
def mapped(whole, tmp_path):
    """A store of its own."""

    def get(family="SCVI", name="store"):
        at = Mapped(whole(family).tiny, tmp_path / name)
        shutil.copytree(whole(family).store, at.store)
        return at

    return get


@pytest.fixture
def unread(monkeypatch):
    """Counts are not to be read, and Ray is not to be started."""

    def read(*_, **__):
        raise AssertionError("work was begun")

    monkeypatch.setattr("scviaduct.mapping.decoding.open_shard", read)
    monkeypatch.setattr("pipelines.derivation.connect", read)


@pytest.fixture
def call(monkeypatch):
    """Run a command in this process."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        return RUNNER.invoke(command_line.app, [str(argument) for argument in arguments])

    return run


def assert_same(one, other, name, rows):
    """The same set in two stores, to the bit."""
    left, right = one.space, other.space
    told = left.snapshot().derived[name], right.snapshot().derived[name]
    assert told[0].id == told[1].id
    first, second = rows(one.store), rows(other.store)
    for column in told[0].seen:
        a, b = (table[column].combine_chunks() for table in (first, second))
        assert a.null_count == 0
        np.testing.assert_array_equal(a.to_numpy(zero_copy_only=False), b.to_numpy(zero_copy_only=False))
    for matrix in told[0].matrices:
        a, b = one.matrix(name, matrix), other.matrix(name, matrix)
        assert a.keys() == b.keys()
        for unit, values in a.items():
            assert np.isfinite(values).all()
            np.testing.assert_array_equal(values, b[unit])
    for table in told[0].tables:
        pd.testing.assert_frame_equal(
            left.table(name, table).to_pandas(), right.table(name, table).to_pandas(), check_exact=True
        )
    assert told[0].seen or told[0].matrices or told[0].tables
    assert left.derived_state(name).facts == right.derived_state(name).facts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "what", "options"),
    [
        ("SCVI", "differential-expression", COMPARED),
        ("SCVI", "posterior-predictive", {"samples": 2}),
        ("ContrastiveVI", "perturbation-score", SCREEN),
        ("MRVI", "differential-abundance", {"sample_covariates": ("condition",), "permutations": 19}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_on_ray_it_comes_to_the_same_as_in_this_process(family, what, options, mapped, local_ray, rows):
    here, there = mapped(family, "here"), mapped(family, "there")
    inline, ray = here.derive(what, options), there.derive(what, options, ONE)
    assert (inline.state, ray.state) == ("committed", "committed")
    assert (inline.units, inline.derived_units) == (ray.units, ray.derived_units)
    assert_same(here, there, what, rows)


@pytest.mark.slow
def test_an_actor_that_is_killed_amid_its_units_loses_nothing(mapped, local_ray, rows, monkeypatch, tmp_path):
    import actors.deriving as shells

    here, there, mark = mapped(name="here"), mapped(name="there"), tmp_path / "killed"
    here.derive(*EXPRESSION)
    fault = {"env_vars": {"SCVIADUCT_FAULT": f"decode@{mark}"}}
    monkeypatch.setattr(shells, "DerivingActor", local_ray.remote(runtime_env=fault)(shells.DerivingWorker))
    result = there.derive(*EXPRESSION, ONE)
    assert mark.exists()
    assert (result.state, result.exit_status, result.quarantined) == ("committed", 0, ())
    assert result.derived_units == result.units == len(here.matrix(EXPRESSION[0]))
    assert_same(here, there, EXPRESSION[0], rows)


def test_the_same_again_does_nothing(mapped):
    at = mapped("ContrastiveVI")
    first = at.derive("perturbation-score", SCREEN)
    version, columns = at.space.head(), ("perturbation_score.salient_norm", "perturbation_score.perturbation_score")
    again = at.derive("perturbation-score", SCREEN)
    assert (first.state, first.version, first.derived_units) == ("committed", version, first.units)
    assert (again.state, again.version, again.derived_units) == ("nothing to do", version, 0)
    assert (again.columns, again.units, again.cells) == (columns, first.units, first.cells)
    pd.testing.assert_frame_equal(again.tables["perturbation-score"], first.tables["perturbation-score"])
    assert at.space.head() == version
    # Another option is another set: the name goes to it, and the older version keeps the older one.
    other = at.derive("perturbation-score", SCREEN | {"controls": "m"})
    assert (other.state, other.version, other.derived_units) == ("committed", version + 1, other.units)
    told = [at.space.snapshot(as_of).derived["perturbation-score"].id for as_of in (version, None)]
    assert len({*told}) == 2
    # Under a name of its own it is there beside the other.
    named = at.derive("perturbation-score", SCREEN, name="against-f")
    assert (named.state, named.derived_units) == ("committed", 0)
    assert {*at.space.snapshot().derived} == {"perturbation-score", "against-f"}


def test_after_a_further_map_only_the_new_units_are_derived(mapped, rows):
    at = mapped("ContrastiveVI")
    first = at.derive("perturbation-score", SCREEN)
    at.derive("latents")
    before, facts = at.matrix("latents", "salient"), at.space.derived_state("perturbation-score").facts
    more = at.map(at.tiny.known)
    assert (more.state, more.units) == ("committed", 1)
    column = "perturbation_score.perturbation_score"
    assert sum(value is None for value in rows(at.store)[column].to_pylist()) == 20
    result = at.derive("perturbation-score", SCREEN)
    assert (result.state, result.derived_units, result.units) == ("committed", 1, first.units + 1)
    assert result.cells == first.cells + 20
    # What is standardised against the controls is so against all of them, in every unit.
    table = rows(at.store)
    norm, score = (table[f"perturbation_score.{name}"].to_numpy() for name in ("salient_norm", "perturbation_score"))
    told = at.space.derived_state("perturbation-score").facts
    assert told["control_cells"] > facts["control_cells"]
    controls = norm[np.array(table["sex"].to_pylist()) == "f"]
    np.testing.assert_allclose(score, (norm - controls.mean()) / controls.std(ddof=1), rtol=1e-6)
    # The units that were there keep their values.
    assert at.derive("latents").derived_units == 1
    after = at.matrix("latents", "salient")
    assert len(after) == len(before) + 1
    for unit, values in before.items():
        np.testing.assert_array_equal(after[unit], values)


def test_units_whose_source_is_gone_are_quarantined_and_said(mapped, call, tmp_path):
    at, copy = mapped(), tmp_path / "gone.h5ad"
    shutil.copy(at.tiny.known, copy)
    at.map(str(copy))
    copy.unlink()
    told = ("--package", at.tiny.reference.path, "--engine", "inline", "--samples", "2", "--quiet")
    done = call("derive", at.store, "--what", EXPRESSION[0], *told)
    assert done.exit_code == 4, done.output
    assert "gone rows 0-20 (20 cells)" in done.stderr
    assert "gone.h5ad" in done.stderr
    held = at.matrix(EXPRESSION[0])
    assert sum(np.isnan(values).all() for values in held.values()) == 1
    assert sum(len(values) for values in held.values() if np.isfinite(values).all()) == at.space.snapshot().cells - 20
    # It comes back, and nothing else is derived again.
    shutil.copy(at.tiny.known, copy)
    result = at.derive(*EXPRESSION)
    assert (result.state, result.derived_units, result.exit_status) == ("committed", 1, 0)


def test_where_nothing_can_be_read_nothing_is_committed(tiny, mapped, tmp_path):
    at, copy = Mapped(tiny("SCVI"), tmp_path / "store"), tmp_path / "gone.h5ad"
    shutil.copy(at.tiny.known, copy)
    version = at.map(str(copy)).version
    copy.unlink()
    result = at.derive(*EXPRESSION)
    assert (result.state, result.version, result.exit_status, len(result.quarantined)) == ("failed", None, 4, 1)
    assert at.space.head() == version
    with pytest.raises((DataError, InputError), match=r"gone\.h5ad"):
        at.derive("differential-expression", {"select": "sex = 'f'", "samples": 8})


@pytest.mark.parametrize(
    ("what", "options", "told"),
    [
        ("accessibility", {}, "'accessibility' is for references of .*PEAKVI.* this one is of SCVI"),
        ("normalized-expression", {}, "Did you mean 'normalised-expression'"),
        (EXPRESSION[0], {"delta": 1.0}, "takes no --delta. It takes: --genes, --library-size"),
        (EXPRESSION[0], {"genes": ("NOSUCH",)}, "--genes: 'NOSUCH' is not a gene of the reference"),
        (EXPRESSION[0], {"samples": 0}, "--samples 0 is not 1 or more"),
        (EXPRESSION[0], {"transform_batch": ("c",)}, "--transform-batch: 'c' is not a batch of the reference"),
        ("differential-expression", {}, "No cells to compare are named"),
        ("differential-expression", {"select": "batch = 'q'"}, "--select \"batch = 'q'\" holds for no cell"),
        ("differential-expression", {"select": "sex = 'f'", "against": "sex = 'q'"}, '--against "sex = .* no cell'),
        ("differential-expression", {"select": "sex IN ('f', 'm')"}, r'--against "NOT \(sex .* holds for no cell'),
        ("differential-expression", {"select": "sex = 'f'", "against": "batch = 'c'"}, r"both hold for \d+ cells"),
        ("differential-expression", {"select": "nosuch = 1"}, "nosuch"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(what, options, told, whole, unread):
    at = whole()
    version = at.space.head()
    with pytest.raises(InputError, match=told):
        at.derive(what, options, ONE)
    assert at.space.head() == version
    assert not (at.space.path / "derived").exists()


def test_a_column_that_the_source_lacks_is_named_before_any_cell_is_read(mapped):
    at = mapped("ContrastiveVI")
    version = at.space.head()
    with pytest.raises(InputError, match=r"has no obs column 'sexes'.*There are: sex"):
        at.derive("perturbation-score", SCREEN | {"perturbation": "sexes"})
    assert at.space.head() == version


def test_a_comparison_is_of_the_cells_that_were_chosen(mapped):
    at = mapped()
    result = at.derive("differential-expression", COMPARED | {"cells": 1000}, name="new-against-known")
    assert (result.state, result.units, result.columns, result.matrices) == ("committed", 0, (), ())
    cells = anndata.read_h5ad(at.tiny.query)
    first = ((cells.obs["batch"] == "c") & (cells.obs["sex"] == "f")).to_numpy()
    second = (cells.obs["batch"] == "a").to_numpy()
    state = at.space.derived_state("new-against-known")
    assert state.facts["cells"] == {"first": first.sum(), "against": second.sum()}
    table = result.tables["genes"].set_index("gene")
    for side, mask in (("raw_mean1", first), ("raw_mean2", second)):
        expected = pd.Series(np.asarray(cells.X[mask].mean(axis=0)).ravel(), cells.var_names)
        np.testing.assert_allclose(table[side], expected[table.index], rtol=1e-5)
    again = at.derive("differential-expression", COMPARED | {"cells": 1000}, name="new-against-known")
    assert (again.state, again.version) == ("nothing to do", result.version)
    pd.testing.assert_frame_equal(again.tables["genes"], result.tables["genes"])


def test_cells_are_chosen_evenly_over_datasets_and_batches(mapped):
    """Whoever is left out of the first selection is of the second where none is named."""
    at = mapped()
    at.map(at.tiny.known)
    cells = {}
    for part in at.space.read(["unit", "unit_row", "dataset_id", "batch", "sex"]):
        for row in part.to_pylist():
            cells[row["unit"], row["unit_row"]] = row
    chosen = choose(at.space, "sex = 'f'", "", 12)
    flags = {(unit, row): flag for unit, told in chosen.items() for row, flag in told.tolist()}
    assert {flag: list(flags.values()).count(flag) for flag in (0, 1)} == {0: 12, 1: 12}
    for flag, sex in ((1, "f"), (0, "m")):
        drawn = [cells[key] for key, told in flags.items() if told == flag]
        assert {row["sex"] for row in drawn} == {sex}
        strata = [(row["dataset_id"], row["batch"] == "c") for row in drawn]
        assert {stratum: strata.count(stratum) for stratum in {*strata}} == {
            ("query", True): 4,
            ("query", False): 4,
            ("known", False): 4,
        }
    same = choose(at.space, "sex = 'f'", "sex = 'm'", 12)
    assert same.keys() == chosen.keys()
    assert all((same[unit] == chosen[unit]).all() for unit in same)


def test_a_dropped_adapter_is_named(mapped, call):
    at = mapped()
    (told,) = at.space.adapters.manifests()
    listed = json.loads(call("adapter", "list", at.store, "--json").stdout)
    (row,) = listed
    assert (row["adapter"], row["batch"], row["epochs"]) == (told["digest"], "batch=c", 2)
    assert row["cells"] == row["used"] == at.space.count("batch = 'c'")
    assert told["digest"][:12] in call("adapter", "list", at.store).stdout
    shown = call("adapter", "show", at.store, told["digest"][:10])
    assert "loss before" in shown.stdout
    parts = json.loads(call("adapter", "show", at.store, told["digest"][:10], "--json").stdout)
    assert parts["tensors"]["encoder"]["batch"]
    unknown = call("adapter", "show", at.store, "zzz")
    assert (unknown.exit_code, "No adapters begin with 'zzz'" in unknown.stderr) == (2, True)

    refused = call("adapter", "drop", at.store, told["digest"][:10])
    assert refused.exit_code == 2
    assert f"{row['used']} cells" in refused.stderr
    assert "--force" in refused.stderr
    assert at.space.adapters.has(told["digest"])
    before = at.space.count()
    dropped = call("adapter", "drop", at.store, told["digest"][:10], "--force")
    assert (dropped.exit_code, dropped.stdout) == (0, f"Dropped {told['digest']}.\n")
    assert json.loads(call("adapter", "list", at.store, "--json").stdout) == []
    assert "no adapter" in call("adapter", "list", at.store).stdout
    assert at.space.count() == before
    with pytest.raises(StoreError, match=rf"adapter of batch=c \({told['digest'][:12]}\) is no longer"):
        at.derive(*EXPRESSION)
    # The remedy that it names: mapping again fits it anew.
    assert [item.state for item in at.map(at.tiny.query).adapters] == ["fitted"]
    assert at.derive(*EXPRESSION).state == "committed"


def test_without_what_it_lists_what_there_is(whole, call):
    at = whole()
    told = ("derive", at.store, "--package", at.tiny.reference.path)
    listed = {item["what"]: item["options"] for item in json.loads(call(*told, "--json").stdout)}
    expected = {one.name: one for found in analyses().values() for one in found if "SCVI" in one.families}
    assert {*listed} == {*expected}
    for name, one in expected.items():
        assert {*listed[name]} == {field.name for field in fields(one.options)}
    shown = call(*told).stdout
    assert EXPRESSION[0] in shown
    assert "--library-size" in shown


def test_tables_are_printed_and_written_as_csv(mapped, call, tmp_path):
    at = mapped("ContrastiveVI")
    told = ["derive", at.store, "--package", at.tiny.reference.path, "--engine", "inline", "--quiet"]
    told += ["--what", "perturbation-score", "--name", "screen", "--perturbation", "sex", "--controls", "f"]
    done = call(*told, "--permutations", "50", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "columns screen.salient_norm, screen.perturbation_score" in done.stdout
    written = pd.read_csv(tmp_path / "out" / "screen.perturbation-score.csv")
    stored = at.space.table("screen", "perturbation-score").to_pandas()
    pd.testing.assert_frame_equal(written, stored, rtol=1e-12)
    again = json.loads(call(*told, "--permutations", "50", "--json").stdout)
    assert (again["state"], again["exit_status"], again["derived_units"]) == ("nothing to do", 0, 0)
    assert [row["perturbation"] for row in again["tables"]["perturbation-score"]] == list(stored["perturbation"])
    refused = call(*told, "--delta", "1")
    assert (refused.exit_code, "takes no --delta" in refused.stderr) == (2, True)
