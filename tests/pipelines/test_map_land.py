"""A run can land its source while it maps: the cells are read once, rows and pieces are those of two commands."""

from __future__ import annotations

import json
import signal

import pytest

import pipelines as sv
from scviaduct.errors import InputError
from scviaduct.landing import Landing

KEPT = ["assay", "donor_id"]


@pytest.fixture
def census(census_collection):
    return f"census:2026-01-01?uri={census_collection}&filter=sex != 'other'"


@pytest.fixture
def options():
    return {"reference": "pbmc", "keep_obs": KEPT, "shard_cells": 600, "quiet": True}


@pytest.mark.parametrize("engine", ["inline", "ray"])
def test_rows_and_pieces_are_those_of_two_commands(engine, census, options, pbmc, rows, same, request, tmp_path):
    if engine == "ray":
        request.getfixturevalue("local_ray")
    plain = sv.map(census, store=str(tmp_path / "plain"), engine="inline", **options)
    sv.land(census, out=str(tmp_path / "alone"), piece_cells=600, engine="inline", quiet=True)
    out = str(tmp_path / "landing")
    both = sv.map(census, store=str(tmp_path / "both"), engine=engine, land=out, **options)
    assert (both.run, both.state, both.mapped_units) == (plain.run, "committed", plain.units)
    assert (both.landing.state, both.landing.written, both.landing.cells) == ("landed", both.units, both.cells)
    assert same(rows(tmp_path / "plain"), rows(tmp_path / "both"))
    assert Landing.at(out).manifest() == Landing.at(tmp_path / "alone").manifest()
    again = sv.map(census, store=str(tmp_path / "both"), engine=engine, land=out, **options)
    assert (again.state, again.landing.state) == ("nothing to do", "nothing to do")


def test_what_was_mapped_before_is_landed_at_the_end(census, options, pbmc, tmp_path):
    store, out = str(tmp_path / "store"), str(tmp_path / "landing")
    first = sv.map(census, store=store, engine="inline", **options)
    second = sv.map(census, store=store, engine="inline", land=out, **options)
    assert (second.state, second.mapped_units) == ("nothing to do", 0)
    assert (second.landing.state, second.landing.written) == ("landed", first.units)
    for dry_run in (False, True):
        with pytest.raises(InputError, match="--shard-cells 600"):
            sv.map(census, store=store, engine="inline", land=out, dry_run=dry_run, **{**options, "shard_cells": 500})


def test_killed_amid_the_run_and_resumed(census, options, pbmc, cli, tmp_path):
    out = tmp_path / "landing"
    command = ("map", census, "--reference", pbmc.path, "--store", tmp_path / "store", "--shard-cells", 600)
    command += ("--engine", "inline", "--land", out, "--quiet", "--json")
    killed = cli(*command, SCVIADUCT_FAULT=f"recorded@{tmp_path / 'mark'}")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (out / "landing.json").exists()
    finished = cli(*command)
    assert finished.returncode == 0, finished.stderr
    told = json.loads(finished.stdout)
    left = told["units"] - 1
    assert (told["mapped_units"], told["landing"]["written"], told["landing"]["reused"]) == (left, left, 1)


def test_several_references_land_on_the_same_reading(census, options, pbmc, tmp_path):
    out = str(tmp_path / "landing")
    both = sv.map(
        census, store=str(tmp_path / "store"), engine="inline", land=out, **{**options, "reference": ["pbmc"]}
    )
    assert both.landing is not None
    assert (both.landing.state, both.landing.cells, both.runs[0].landing) == ("landed", both.runs[0].cells, None)
