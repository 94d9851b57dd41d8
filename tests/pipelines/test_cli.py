"""The command line as a user meets it: help, tables and JSON, exit statuses, and what wrong input is answered."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import anndata
import numpy as np
import pytest
from typer.testing import CliRunner

from pipelines import cli as command_line

RUNNER = CliRunner()


@pytest.fixture
def call(monkeypatch):
    """Run a command in this process; its exit status, output and error output."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        return RUNNER.invoke(command_line.app, [str(argument) for argument in arguments])

    return run


@pytest.fixture(scope="module")
def mapped(pbmc, symphony, tmp_path_factory):
    """A store of the whole file, in three units."""
    store = tmp_path_factory.mktemp("cli") / "store"
    arguments = ["map", str(symphony), "--reference", "pbmc", "--store", str(store), "--shard-cells", "500"]
    done = RUNNER.invoke(
        command_line.app, [*arguments, "--engine", "inline", "--keep-obs", "assay, cell_type", "--json"]
    )
    assert done.exit_code == 0, done.stderr
    return store, json.loads(done.stdout)


def test_help_names_every_command(call):
    told = call("--help").stdout
    named = ("train", "reference", "choose", "publish", "check", "map", "status", "search", "export", "demo")
    for name in (*named, "derive", "adapter", "index"):
        assert name in told
        assert call(name, "--help").exit_code == 0
    assert "census:2025-11-08?organism=homo_sapiens" in call("map", "--help").stdout


def test_the_same_is_reachable_as_a_module(cli):
    done = cli("--version")
    assert (done.returncode, done.stdout) == (0, "scviaduct 0.1.0\n")


def test_reference_list_show_and_verify(call, pbmc):
    listed = json.loads(call("reference", "list", "--json").stdout)
    (found,) = [item for item in listed if item["name"] == "pbmc"]
    assert (found["family"], found["genes"], found["digest"]) == ("SCANVI", 1764, pbmc.digest)
    assert "pbmc" in call("reference", "list").stdout
    assert json.loads(call("reference", "show", "pbmc", "--json").stdout)["labels"] == list(pbmc.labels)
    verified = call("reference", "verify", "pbmc", "--json")
    assert verified.exit_code == 0
    assert json.loads(verified.stdout)["ok"] is True


@pytest.mark.parametrize(("flags", "told"), [((), "are synthetic cells"), (("--no-data",), "was left out")])
def test_the_data_of_a_local_folder_are_left_out_if_asked(call, pbmc, tmp_path, flags, told):
    pbmc.export(tmp_path / "saved")
    done = call("reference", "add", tmp_path / "saved", "--name", "left", "--json", *flags)
    call("reference", "remove", "left")
    assert done.exit_code == 0, done.stderr
    assert told in json.loads(done.stdout)["notes"][0]


def test_a_broken_package_is_named_and_hides_no_other(call, pbmc):
    import shutil

    folder = pbmc.path.parent / "torn"
    folder.mkdir()
    (folder / "manifest.json").write_text('{"format": 1}')
    try:
        done = call("reference", "list", "--json")
    finally:
        shutil.rmtree(folder)
    assert done.exit_code == 0
    assert "pbmc" in [item["name"] for item in json.loads(done.stdout)]
    assert "Reference 'torn' cannot be used: " in done.stderr


@pytest.mark.parametrize(
    ("spoilt", "verdict", "status"),
    [("fit", "fit", 0), ("normalised", "not fit", 1), ("empty", "cannot tell", 3)],
)
def test_check_says_so_and_exits_so(spoilt, verdict, status, call, five_prime, symphony, tmp_path):
    source = five_prime
    if spoilt == "normalised":
        cells = anndata.read_h5ad(symphony)
        cells.X.data = np.log1p(cells.X.data)
        cells.write_h5ad(tmp_path / "log.h5ad")
        source = tmp_path / "log.h5ad"
    if spoilt == "empty":
        source = f"{symphony}?filter=batch == 'none such'"
    done = call("check", source, "--reference", "pbmc", "--json")
    assert (json.loads(done.stdout)["verdict"], done.exit_code) == (verdict, status)
    assert f"Verdict: {verdict}" in call("check", source, "--reference", "pbmc").stdout


def test_status_tells_spaces_versions_and_runs(call, mapped):
    store, result = mapped
    told = json.loads(call("status", store, "--json").stdout)
    assert told["spaces"][0]["cells"] == 1500
    assert (told["runs"][0]["run"], told["runs"][0]["state"], told["runs"][0]["units"]) == (
        result["run"],
        "committed",
        3,
    )
    details = json.loads(call("status", store, "--run", result["run"][:6], "--json").stdout)["details"]
    assert details["settings"]["keep_obs"] == {"assay": "string", "cell_type": "string"}
    assert details["software"]["scvi-tools"]
    assert result["run"] in call("status", store).stdout


def test_search_by_cells_by_label_and_by_condition(call, mapped, five_prime, tmp_path):
    store, _ = mapped
    out = tmp_path / "hits.parquet"
    done = call("search", store, "--cells", five_prime, "-k", 3, "--where", "assay = '10x 3'' v2'", "--out", out)
    assert done.exit_code == 0, done.stderr
    import pyarrow.parquet as pq

    hits = pq.read_table(out)
    assert len(hits) == 543 * 3
    assert set(hits["assay"].to_pylist()) == {"10x 3' v2"}
    assert set(hits["rank"].to_pylist()) == {1, 2, 3}
    same = np.mean(np.array(hits["cell_type"].to_pylist()) == np.array(hits["label"].to_pylist()))
    assert same > 0.8
    by_label = json.loads(call("search", store, "--label", "B", "-k", 2, "--json").stdout)
    assert all(hit["query"] != hit["observation_id"] for hit in by_label)
    by_condition = call("search", store, "--from", "label = 'NK' and probability > 0.5", "-k", 2)
    assert by_condition.exit_code == 0


def test_export_and_reading_the_past(call, mapped, tmp_path):
    store, result = mapped
    done = call("export", store, "--to", "h5ad", "--out", tmp_path / "x.h5ad", "--as-of", result["version"])
    assert done.exit_code == 0, done.stderr
    cells = anndata.read_h5ad(tmp_path / "x.h5ad")
    assert cells.obsm["X_pbmc"].shape == (1500, 10)
    assert {"label", "probability", "margin", "entropy", "assay", "unit", "run"} <= set(cells.obs)
    again = call("export", store, "--to", "h5ad", "--out", tmp_path / "x.h5ad")
    assert again.exit_code == 2
    assert "--overwrite" in again.stderr


WRONG = {
    "no such file": (["check", "absent.h5ad", "--reference", "pbmc"], "absent.h5ad"),
    "no such reference": (["check", "{symphony}", "--reference", "pbcm"], "pbmc"),
    "no such store": (["status", "nowhere"], "nowhere"),
    "no such run": (["status", "{store}", "--run", "ffff"], "Runs: "),
    "no such column to keep": (["{map}", "--keep-obs", "tisue"], "tisue"),
    "no such finding": (["{map}", "--accept", "gene"], "Checks: "),
    "no cells in a shard": (["{map}", "--shard-cells", "0"], "shard_cells"),
    "no such engine": (["{map}", "--engine", "dask"], "dask"),
    "GPUs where there are none": (["{map}", "--gpus-per-actor", "-1"], "gpus_per_actor"),
    "no source": (["map", "--reference", "pbmc", "--store", "s"], "'source' is missing"),
    "no such job file": (["map", "--job", "absent.toml"], "absent.toml"),
    "a filter that does not parse": (["check", "{symphony}?filter=batch ==", "--reference", "pbmc"], "batch =="),
    "a condition that does not parse": (["search", "{store}", "--label", "B", "--where", "assay = "], "assay = "),
    "a condition on no column": (["search", "{store}", "--label", "B", "--where", "asay = 'x'"], "asay"),
    "no query": (["search", "{store}"], "--cells QUERY.h5ad"),
    "two queries": (["search", "{store}", "--label", "B", "--from", "label = 'B'"], "label"),
    "a label of nobody": (["search", "{store}", "--label", "neuron"], "neuron"),
    "no neighbours": (["search", "{store}", "--label", "B", "-k", "0"], "-k 30"),
    "no such version": (["export", "{store}", "--to", "parquet", "--out", "x", "--as-of", "99"], "99"),
    "no such format": (["export", "{store}", "--to", "csv", "--out", "x"], "parquet"),
    "no such family": (["train", "{symphony}", "--family", "gpt", "--out", "m"], "SCANVI"),
    "a model argument without a value": (
        ["train", "{symphony}", "--family", "scvi", "--out", "m", "--set", "n"],
        "n_latent=20",
    ),
    "no model there": (["reference", "add", "{folder}", "--name", "x"], "model.pt"),
    "no name": (["reference", "add", "{folder}", "--name", "No Name"], "No Name"),
    "no such scheme": (["check", "gs2://b/x.h5ad", "--reference", "pbmc"], "gs2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_named_and_remedied_without_a_traceback(name, call, mapped, symphony, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, named = WRONG[name]
    store = mapped[0]
    whole = []
    for argument in arguments:
        if argument == "{map}":
            whole += ["map", str(symphony), "--reference", "pbmc", "--store", "s"]
        else:
            whole.append(argument.format(symphony=symphony, store=store, folder=tmp_path, map=""))
    done = call(*whole)
    assert done.exit_code == 2, done.stdout
    assert done.stderr.startswith("scviaduct: ")
    assert named in done.stderr
    assert done.stderr.rstrip().endswith((".", '"]', "parquet", "NAME"))
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []  # nothing was started


def test_a_job_file_is_taken_and_flags_win(call, pbmc, symphony, tmp_path):
    job = tmp_path / "job.toml"
    job.write_text(f'source = "{symphony}"\nreference = "pbmc"\nstore = "{tmp_path / "a"}"\nengine = "inline"\n')
    done = call("map", "--job", job, "--store", tmp_path / "b", "--dry-run")
    assert done.exit_code == 0, done.stderr
    assert "would map 1,500 cells in 1 unit" in done.stdout
    job.write_text(job.read_text() + "shard_cell = 5\n")
    wrong = call("map", "--job", job)
    assert wrong.exit_code == 2
    assert "unknown key 'shard_cell' (do you mean 'shard_cells'?)" in wrong.stderr


def test_progress_goes_to_the_log_and_results_to_the_output(cli, five_prime, pbmc, tmp_path):
    """Without a terminal progress is plain lines on standard error, so that --json can be piped."""
    done = cli("map", five_prime, "--reference", "pbmc", "--store", tmp_path / "s", "--engine", "inline", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["state"] == "committed"
    assert "mapping: 543 of 543 cells (100%)" in done.stderr
    assert "\x1b" not in done.stderr


def test_what_is_printed_is_data_and_not_markup(call, mapped, symphony, tmp_path):
    """A label may hold brackets; rich would take them for a style, or stumble over them."""
    cells = anndata.read_h5ad(symphony)[:40].copy()
    cells.obs["state"] = ["T [activated]", "rest [/x]"] * 20
    cells.write_h5ad(tmp_path / "cells.h5ad")
    arguments = ["map", tmp_path / "cells.h5ad", "--reference", "pbmc", "--store", tmp_path / "s", "--engine", "inline"]
    assert call(*arguments, "--keep-obs", "state").exit_code == 0
    shown = call("search", tmp_path / "s", "--from", "probability > 0", "-k", "3")
    assert shown.exit_code == 0, shown.stderr
    assert "T [activated]" in shown.stdout
    assert "rest [/x]" in shown.stdout


def test_an_error_of_the_system_is_one_line_and_a_status_of_its_own(call, mapped, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "/data/x.h5ad")

    monkeypatch.setattr("pipelines.exporting.export_space", full)
    done = call("export", mapped[0], "--to", "h5ad", "--out", tmp_path / "x.h5ad")
    assert done.exit_code == 5
    assert done.stderr == "scviaduct: /data/x.h5ad: No space left on device. Mend it and run the same command.\n"


def test_hits_are_not_written_over_a_folder(call, mapped, tmp_path):
    done = call("search", mapped[0], "--label", "B", "--out", tmp_path)
    assert (done.exit_code, "is a folder" in done.stderr) == (2, True)


def test_a_space_mapped_by_the_path_of_its_package_is_searched_by_it(call, pbmc, five_prime, tmp_path):
    import shutil

    package = shutil.copytree(pbmc.path, tmp_path / "mine")
    manifest = json.loads((package / "manifest.json").read_text()) | {"name": "mine"}
    (package / "manifest.json").write_text(json.dumps(manifest))
    store = tmp_path / "s"
    assert call("map", five_prime, "--reference", package, "--store", store, "--engine", "inline").exit_code == 0
    unnamed = call("search", store, "--cells", five_prime, "-k", 2)
    assert (unnamed.exit_code, "There is no reference 'mine'" in unnamed.stderr) == (2, True)
    named = call("search", store, "--cells", five_prime, "-k", 2, "--package", package, "--json")
    assert len(json.loads(named.stdout)) == 543 * 2


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_label_that_the_terminal_cannot_show_is_spelled(encoding):
    code = (
        "from pipelines import cli, printing; cli.app = lambda **_: printing.table(('label',), [('\u03b3\u03b4 T',)]);"
        " cli.main([])"
    )
    told = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, env=told)
    assert done.returncode == 0, done.stderr
    shown = "\u03b3\u03b4 T" if encoding == "utf-8" else r"\u03b3\u03b4 T"
    assert shown in done.stdout.decode(encoding)
