"""Several references on one reading: the very runs, units and rows that one after the other makes."""

from __future__ import annotations

import json

import anndata
import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

import pipelines as sv
from pipelines import cli as command_line
from pipelines import together
from scviaduct.errors import InputError, NotFitError
from scviaduct.store import Store

NAMES = ["pbmc", "few"]
SHARDS = 3


@pytest.fixture(scope="module")
def few(symphony, home):
    """A registered SCVI of 300 genes whose encoder reads the batch: the query's needs an adapter."""
    known = f"{symphony}?filter=batch in ['3pv1', '3pv2']"
    told = {"genes": 300, "epochs": 1, "batch_key": "batch", "settings": {"encode_covariates": "True"}}
    sv.train(known, family="scvi", out=home / "few-model", device="cpu", calibrate_by="none", quiet=True, **told)
    return sv.reference.add(home / "few-model", name="few")


@pytest.fixture(scope="module")
def options(pbmc, few):
    surgery = {"surgery_cells": 40, "surgery_epochs": 1}
    return {"keep_obs": ["cell_type"], "shard_cells": 200, "engine": "inline", "quiet": True, **surgery}


@pytest.fixture(scope="module")
def apart(five_prime, options, tmp_path_factory):
    """One run after the other, in a store."""
    store = tmp_path_factory.mktemp("apart") / "store"
    return store, [sv.map(five_prime, reference=name, store=str(store), **options) for name in NAMES]


@pytest.fixture(scope="module")
def at_once(five_prime, options, tmp_path_factory):
    """Both on one reading, in another."""
    store = tmp_path_factory.mktemp("at-once") / "store"
    return store, sv.map(five_prime, reference=NAMES, store=str(store), **options)


def table(store, name):
    """All rows of a reference's space, by cell key."""
    parts = [part.combine_chunks() for part in Store.open(store).space(name).read()]
    plain = [part.cast(pa.schema([(f.name, _plain(f.type)) for f in part.schema])) for part in parts]
    return pa.concat_tables(plain).sort_by("observation_id")


def _plain(kind):
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def told(result):
    """What two runs of the same have in common."""
    return result.run, result.state, result.cells, result.cells_done, result.units, result.mapped_units


def test_two_references_on_one_reading_equal_two_runs(apart, at_once, same):
    (store, runs), (other, result) = apart, at_once
    assert [told(run) for run in result.runs] == [told(run) for run in runs]
    assert [(run.reference, run.units, run.exit_status) for run in result.runs] == [(n, SHARDS, 0) for n in NAMES]
    assert result.of("few").adapters[0].state == "fitted"
    assert result.of("few").adapters[0].adapter == runs[1].adapters[0].adapter
    for name in NAMES:
        assert same(table(store, name), table(other, name))
    for run, alone in zip(result.runs, runs, strict=True):
        assert run.report == alone.report


def test_on_ray_as_well(apart, five_prime, options, local_ray, same, tmp_path):
    store, runs = apart
    on_ray = options | {"engine": "ray", "actors": 2, "readers": 1}
    result = sv.map(five_prime, reference=NAMES, store=str(tmp_path / "s"), **on_ray)
    assert [told(run) for run in result.runs] == [told(run) for run in runs]
    for name in NAMES:
        assert same(table(store, name), table(tmp_path / "s", name))


def test_after_a_run_of_each_there_is_nothing_to_do(apart, five_prime, options, monkeypatch):
    store, runs = apart
    monkeypatch.setattr(together, "read_shared", None)
    result = sv.map(five_prime, reference=NAMES[::-1], store=str(store), **options)
    assert [run.state for run in result.runs] == ["nothing to do"] * 2
    assert [(run.reference, run.run, run.version) for run in result.runs] == [
        (run.reference, run.run, run.version) for run in runs[::-1]
    ]


def test_a_shard_is_read_once_and_only_for_those_that_are_not_done_with_it(
    at_once, five_prime, options, monkeypatch, same, tmp_path
):
    """One reference is done; of the other one unit was lost."""
    seen, read = [], together.read_shared

    def watched(shard, references, *rest, **more):
        seen.append((shard.start, [reference.name for reference in references]))
        return read(shard, references, *rest, **more)

    monkeypatch.setattr(together, "read_shared", watched)
    store = str(tmp_path / "s")
    sv.map(five_prime, reference="pbmc", store=store, **options)
    assert [names for _, names in seen] == [["pbmc"]] * SHARDS
    seen.clear()
    result = sv.map(five_prime, reference=NAMES, store=store, **options)
    assert [names for _, names in seen] == [["few"]] * SHARDS
    assert [(run.state, run.mapped_units) for run in result.runs] == [("nothing to do", 0), ("committed", SHARDS)]

    seen.clear()
    next((tmp_path / "s").glob("spaces/pbmc-*/units/*/*.json")).unlink()
    again = sv.map(five_prime, reference=NAMES, store=store, **options)
    assert [names for _, names in seen] == [["pbmc"]]
    assert [(run.state, run.mapped_units) for run in again.runs] == [("committed", 1), ("nothing to do", 0)]
    for name in NAMES:
        assert same(table(store, name), table(at_once[0], name))


def test_a_run_that_died_between_two_commits_commits_the_rest(
    at_once, five_prime, options, monkeypatch, same, tmp_path
):
    from scviaduct.store.space import Space

    commit = Space.commit

    def dies(self, *arguments):
        if self.reference == "few":
            raise KeyboardInterrupt
        return commit(self, *arguments)

    store = str(tmp_path / "s")
    with monkeypatch.context() as patched:
        patched.setattr(Space, "commit", dies)
        with pytest.raises(KeyboardInterrupt):
            sv.map(five_prime, reference=NAMES, store=store, **options)
    assert {run["reference"].partition("@")[0]: run["state"] for run in sv.status(store).runs} == {
        "pbmc": "committed",
        "few": "open",
    }
    monkeypatch.setattr(together, "read_shared", None)  # everything is staged
    result = sv.map(five_prime, reference=NAMES, store=store, **options)
    assert [(run.state, run.mapped_units) for run in result.runs] == [("nothing to do", 0), ("committed", 0)]
    assert same(table(store, "few"), table(at_once[0], "few"))


@pytest.mark.parametrize("engine", ["inline", "ray"])
def test_what_one_cannot_map_is_quarantined_for_it_alone(engine, few, options, symphony, local_ray, tmp_path):
    cells = anndata.read_h5ad(symphony)
    cells = cells[(cells.obs["batch"] == "5p").to_numpy()].copy()
    whole = anndata.concat({str(i): cells for i in range(12)}, index_unique="-")
    row = whole.X[599]  # a cell that the preflight's sample does not meet
    foreign = [at for at, gene in enumerate(row.indices) if whole.var_names[gene] not in few.names]
    whole.X.data[whole.X.indptr[599] + foreign[0]] = np.nan
    whole.obs["batch"] = "5p"
    whole.write_h5ad(tmp_path / "spoilt.h5ad")
    told_ = options | {"engine": engine, "shard_cells": 300}
    result = sv.map(str(tmp_path / "spoilt.h5ad"), reference=NAMES, store=str(tmp_path / "s"), **told_)
    pbmc, other = result.runs
    assert (result.exit_status, pbmc.exit_status, other.exit_status) == (4, 4, 0)
    assert (pbmc.cells_done, other.cells_done) == (whole.n_obs - 300, whole.n_obs)
    (item,) = pbmc.quarantined
    assert (item.attempts, item.unit.shard.start) == (1, 300)
    assert "nan of gene" in item.reason


def test_one_that_does_not_fit_is_named_before_anything_is_mapped(five_prime, options, tmp_path):
    with pytest.raises(NotFitError, match=r"(?s)reference 'few'; nothing was mapped.*batch: .*out: --reference pbmc$"):
        sv.map(five_prime, reference=NAMES, store=str(tmp_path / "s"), **options, surgery="off")
    assert not (tmp_path / "s").exists()


def test_a_reference_is_named_once_and_at_least_one(pbmc, five_prime, options, tmp_path):
    store = str(tmp_path / "s")
    with pytest.raises(InputError, match=r"is the same package as 'pbmc'"):
        sv.map(five_prime, reference=["pbmc", str(pbmc.path)], store=store, **options)
    with pytest.raises(InputError, match=r"No reference is named"):
        sv.map(five_prime, reference=[], store=store, **options)


def test_cells_count_once(five_prime, options, monkeypatch, capfd, tmp_path):
    sv.map(five_prime, reference=NAMES, store=str(tmp_path / "s"), **options | {"quiet": False})
    assert "mapping: 543 of 543 cells (100%)" in capfd.readouterr().err


@pytest.fixture
def call():
    return lambda *arguments: CliRunner().invoke(command_line.app, [str(argument) for argument in arguments])


def test_the_command_line_and_a_job_file_name_several(call, apart, five_prime, tmp_path):
    store, runs = apart
    named = [part for name in NAMES for part in ("--reference", name)]
    more = ["--keep-obs", "cell_type", "--shard-cells", 200, "--engine", "inline", "--quiet"]
    more += ["--surgery-cells", 40, "--surgery-epochs", 1]
    done = call("map", five_prime, *named, "--store", store, *more, "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["exit_status"] == 0
    assert [(run["reference"], run["run"], run["state"]) for run in found["runs"]] == [
        (run.reference, run.run, "nothing to do") for run in runs
    ]
    job = tmp_path / "job.toml"
    job.write_text(f'source = "{five_prime}"\nreference = {json.dumps(NAMES)}\nstore = "{store}"\n')
    shown = call("map", "--job", job, *more)
    assert shown.exit_code == 0, shown.stderr
    assert f"pbmc: Run {runs[0].run}: nothing to do" in shown.stdout
    assert f"few: Run {runs[1].run}: nothing to do" in shown.stdout
    assert "2 references on one reading" in shown.stdout
    job.write_text(job.read_text().replace(json.dumps(NAMES), "[]"))
    wrong = call("map", "--job", job, *more)
    assert (wrong.exit_code, "reference" in wrong.stderr) == (2, True)


def test_a_dry_run_plans_each(five_prime, options, tmp_path):
    result = sv.map(five_prime, reference=NAMES, store=str(tmp_path / "s"), dry_run=True, **options)
    assert [(run.state, run.cells) for run in result.runs] == [("planned", 543)] * 2
    assert (result.of("few").run, result.of("few").adapters[0].state) == ("", "to fit")
    assert not (tmp_path / "s").exists()
