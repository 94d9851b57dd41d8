"""The suite's output: flat figures with reasons, tables, plots, the page; and the data that it makes."""

from __future__ import annotations

import importlib
import json
import sys

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks.context import Context
from benchmarks.data import TILE, Design, census, csr, source_of
from benchmarks.machine import machine
from benchmarks.output import LATEST, PAGE, REASONS, REPORT, failed, flat, load, section, write
from benchmarks.page import ROOT, rendered
from benchmarks.plots import draw
from benchmarks.searchdata import FILTERS, NEIGHBORS, Latents, nearest, recall, store_of
from benchmarks.suite import BENCHMARKS
from benchmarks.values import BARS, Figure, Measurement, Report, Sample
from benchmarks.workers import Listener, ray_overhead, slope, two_workers
from scviaduct.sources import open_source


@pytest.fixture(scope="module")
def header():
    return {
        "command": "python -m benchmarks",
        "when": "2026-01-02T03:04",
        "quick": False,
        "seconds": 1.0,
        "machine": machine(),
    }


@pytest.fixture
def report():
    samples = (Sample(0, 1.0, 2.0, {"cells": 10}), Sample(1, 1.0, 4.0, {"cells": 10}))
    ours, slow = Measurement("ours", 1200, "cells", samples), Measurement("theirs", 1200, "cells", samples[1:])
    gone = Measurement("gone", 1200, "cells", missing="there is no wheel")
    figures = [Figure("read_vs_blockwise", 4 / 3, "", 2.0), Figure("read_vs_tables", None, "there is no wheel")]
    return Report("Reading", "CPU-seconds.", figures, {"SOMA": [ours, slow, gone]}, {"more": 1})


def test_every_figure_has_a_bar_and_one_benchmark():
    owned = [figure for entry in BENCHMARKS.values() for figure in entry.figures]
    assert sorted(owned) == sorted(BARS)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_says_what_it_counts(name):
    module = importlib.import_module(f"benchmarks.{BENCHMARKS[name].module}")
    assert module.TITLE
    assert module.COUNTS.endswith(".")
    assert callable(module.run)


def test_figures_are_flat_and_each_null_has_its_reason(tmp_path, report, header):
    write(tmp_path, {"reading": section(report, header)})
    values, reasons = (json.loads((tmp_path / name).read_text()) for name in (LATEST, REASONS))
    assert list(values) == list(BARS)
    assert values["read_vs_blockwise"] == 1.333
    assert reasons["read_vs_tables"] == "there is no wheel"
    assert reasons["e2e_2000"] == "not run: python -m benchmarks --only endtoend"
    assert set(reasons) == {name for name, value in values.items() if value is None}
    kept = json.loads((tmp_path / REPORT).read_text())["reading"]["measurements"]["SOMA"]
    assert [sample["cpu"] for sample in kept[0]["samples"]] == [2.0, 4.0]
    assert kept[1]["ratio"] == pytest.approx(4 / 3)
    assert load(tmp_path)["reading"]["facts"] == {"more": 1}


def test_a_failure_is_told_and_leaves_its_figures_null(header):
    told = {"reading": failed("reading", "Traceback\nValueError: no such cells\n", ("read_vs_tables",), header)}
    values, reasons = flat(told)
    assert values["read_vs_tables"] is None
    assert reasons["read_vs_tables"] == "the benchmark failed: ValueError: no such cells"


def test_tables_plots_and_page(tmp_path, report, header):
    sections = {"reading": section(report, header)}
    write(tmp_path, sections)
    text = (tmp_path / PAGE).read_text()
    assert "| `read_vs_blockwise` | 1.33 |  | at least 4 | **missed** |  |" in text
    assert "| ours | 1.00 | 400 | 600 | 3 | 1 |" in text
    assert "| gone |  | there is no wheel |" in text
    assert "- more: 1" in text
    draw(tmp_path, sections)
    assert (tmp_path / "plots" / "reading.svg").read_text().startswith("<?xml")
    page = "before\n<!-- results: reading -->\nold\n<!-- end -->\nafter <!-- results: many -->\n<!-- end -->\n"
    once = rendered(page, sections)
    assert once.startswith("before\n<!-- results: reading -->\n\nCPU-seconds.\n")
    assert "old" not in once
    assert "Not measured yet: `python -m benchmarks --only many`." in once
    assert rendered(once, sections) == once


def test_the_docs_have_a_place_for_every_benchmark():
    text = (ROOT / "docs" / "performance.md").read_text()
    for name in ("figures", "machine", *BENCHMARKS):
        assert f"<!-- results: {name} -->" in text


def test_the_command_runs_writes_and_judges(tmp_path, monkeypatch, capsys, report):
    module = importlib.import_module("benchmarks.reading")
    monkeypatch.setattr(module, "run", lambda context: report)
    told = ["bench", "--only", "reading", "--folder", str(tmp_path / "scratch"), "--out", str(tmp_path)]
    for more, status in (([], 0), (["--strict"], 1)):
        monkeypatch.setattr(sys, "argv", [*told, *more])
        with pytest.raises(SystemExit) as end:
            command.main()
        assert end.value.code == status
    assert "read_vs_blockwise            1.33     bar: at least 4, MISSED" in capsys.readouterr().out
    monkeypatch.setattr(module, "run", lambda context: 1 / 0)
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == 1
    assert json.loads((tmp_path / LATEST).read_text())["read_vs_blockwise"] is None


@pytest.mark.parametrize("told", [["--only", "writing"], ["--peer-python", "lancedb"]])
def test_the_command_refuses_what_it_does_not_know(monkeypatch, capsys, told):
    monkeypatch.setattr(sys, "argv", ["bench", *told])
    with pytest.raises(SystemExit):
        command.main()
    assert told[1] in capsys.readouterr().err


def test_the_cells_are_those_of_the_design(tmp_path):
    design = Design(TILE + 500, 2 * TILE, 40)
    path = census(tmp_path, design)
    assert census(tmp_path, design) == path
    expected = csr(design)
    with open_source(source_of(path)) as source:
        scan = source.scan(16_384, ["cell_type", "tissue"])
        blocks = [source.read(shard) for shard in scan.shards]
    assert scan.cells == design.cells
    rows = np.concatenate([block.rows for block in blocks])
    assert np.array_equal(rows, np.arange(design.cells))
    assert np.array_equal(np.concatenate([block.data for block in blocks]), expected.data)
    assert np.array_equal(np.concatenate([block.indices for block in blocks]), expected.indices)
    assert expected.nnz / design.cells == pytest.approx(40, rel=0.1)
    with open_source(source_of(path, 100)) as source:
        assert source.scan(16_384).cells == 100


def test_the_latents_have_their_truth_and_their_filters(tmp_path):
    latents = Latents(5000, 20)
    data = latents.folder(tmp_path)
    vectors, queries, truth = (np.load(data / f"{name}.npy") for name in ("vectors", "queries", "truth"))
    distance = ((vectors[None] - queries[:, None]) ** 2).sum(axis=2)
    expected = np.argsort(distance, axis=1)[:, :NEIGHBORS]
    assert recall(truth, expected) > 0.999
    assert recall(nearest(vectors[:10], queries), np.argsort(distance[:, :10], axis=1)) == 1.0
    columns = np.load(data / "columns.npz")
    shares = []
    for _, where in FILTERS.values():
        column, _, value = where.partition(" = ")
        shares.append((columns[column] == value.strip("'")).mean())
    assert shares == pytest.approx([NEIGHBORS / 5000, 0.02, 0.1], rel=0.35)
    space = store_of(tmp_path, latents)
    table = next(iter(space.read(["observation_id", "latent", "tissue"])))
    rows = table["observation_id"].to_numpy().astype(int)
    assert np.array_equal(np.stack(table["latent"].to_numpy()), vectors[rows])
    assert np.array_equal(table["tissue"].to_numpy(), columns["tissue"][rows])


def test_the_steady_slope_leaves_start_and_end_out():
    marks = [(1000 * unit, 50.0 + unit, 70.0 + 2 * unit) for unit in range(12)]
    marks[0] = (0, 1.0, 1.0)  # before everything has started
    assert slope(marks, 1, 1) == pytest.approx(1e-3)
    assert slope(marks, 2, 1) == pytest.approx(2e-3)
    assert slope(marks[4:6], 2, 2) == pytest.approx(2e-3)


def test_ray_is_compared_turn_by_turn():
    speeds = [(10.0, 10.0), (90.0, 10.0), (90.0, 90.0)]  # of the machine: it slows down, in one turn between the two
    alone = tuple(Sample(turn, 1.0, 1.0, {"cpu": one, "wall": one}) for turn, (one, _) in enumerate(speeds))
    on_ray = tuple(
        Sample(turn, 1.0, 1.0, {"cpu": 1.05 * two, "wall": two / 2, "commit": 0.05 * two})
        for turn, (_, two) in enumerate(speeds)
    )
    one, ray = Measurement("one", 1.0, "cells", alone), Measurement("ray", 1.0, "cells", on_ray)
    assert ray_overhead(one, ray).value == pytest.approx(0.1)
    assert two_workers([one, ray]).value == pytest.approx(2.0)
    assert two_workers([one]).reason == "this process may use one core only"


def test_the_listener_notes_every_unit():
    listener = Listener()
    listener.start("mapping", 100)
    for cells in (10, 20):
        listener.advance(cells)
    assert [done for done, _, _ in Listener.marks] == [10, 30]
    assert Listener.marks[1][1] > Listener.marks[0][1]
    assert Listener.marks[1][2] > 0


def test_sizes_are_small_when_quick(tmp_path):
    quick = Context(tmp_path, tmp_path / "log", quick=True)
    full = Context(tmp_path, tmp_path / "log")
    assert quick.design.cells < full.design.cells
    assert (quick.pick(9, 1), full.pick(9, 1)) == (1, 9)
