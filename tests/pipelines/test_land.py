"""The command: land, resume, refresh, prune; and runs from a landing that equal runs from what was landed."""

from __future__ import annotations

import json
import signal

import anndata
import h5py
import numpy as np
import pytest

import pipelines as sv
import pipelines.landing as landing_pipeline
from scviaduct.errors import InputError
from scviaduct.landing import Landing
from scviaduct.sources import close_shards, open_source

KEPT = ["cell_type", "assay", "donor_id"]


@pytest.fixture
def census(census_collection):
    return f"census:2026-01-01?organism=homo_sapiens&uri={census_collection}"


@pytest.fixture
def landed(census, tmp_path):
    """The local Census in pieces of 700."""
    out = tmp_path / "landing"
    result = sv.land(census, out=str(out), piece_cells=700, engine="inline", quiet=True)
    assert (result.state, result.cells, result.written, result.exit_status) == ("landed", 3360, 7, 0)
    return out


def test_mapping_from_a_landing_equals_mapping_from_the_source(landed, census, pbmc, rows, same, tmp_path):
    options = {"reference": "pbmc", "keep_obs": KEPT, "shard_cells": 500, "engine": "inline", "quiet": True}
    one = sv.map(census, store=str(tmp_path / "one"), **options)
    other = sv.map(f"landing:{landed}", store=str(tmp_path / "other"), **options)
    assert (one.cells, one.units) == (other.cells, other.units)
    left, right = rows(tmp_path / "one"), rows(tmp_path / "other")
    assert same(left, right, but=("run",))
    assert sorted(right["soma_joinid"].to_pylist()) == list(range(3360))
    # The cells, the rows and the units are those of the source: whichever comes second finds nothing to do.
    for source, store in ((str(landed), "one"), (census, "other")):
        again = sv.map(source, store=str(tmp_path / store), **options)
        assert (again.state, again.mapped_units) == ("nothing to do", 0)
    hits = sv.search(str(tmp_path / "one"), cells=f"{landed}?filter=nnz < 500", k=3, quiet=True)
    assert set(hits["rank"].to_pylist()) == {1, 2, 3}


def test_check_and_choose_take_a_landing(landed, census, pbmc):
    one, other = (sv.check(source, reference="pbmc") for source in (census, str(landed)))
    told = [[(item.name, item.level, item.figures) for item in report.findings] for report in (one, other)]
    assert told[0] == told[1]
    one, other = (sv.choose(source) for source in (census, str(landed)))
    assert (one.kind, one.name, one.version) == (other.kind, other.name, other.version)


def test_a_file_has_no_joinid(symphony, pbmc, rows, tmp_path):
    sv.land(f"{symphony}", out=str(tmp_path / "landing"), engine="inline", quiet=True)
    asked = "filter=batch == '5p'"
    options = {"reference": "pbmc", "store": str(tmp_path / "store"), "engine": "inline", "quiet": True}
    sv.map(f"{tmp_path / 'landing'}?{asked}", **options)
    table = rows(tmp_path / "store")
    assert table["soma_joinid"].null_count == len(table)
    assert set(table["source"].to_pylist()) == {f"file://{symphony}"}
    assert sv.map(f"{symphony}?{asked}", **options).state == "nothing to do"


def test_ray_writes_what_one_process_writes(landed, census, local_ray, tmp_path):
    result = sv.land(census, out=str(tmp_path / "ray"), piece_cells=700, readers=2, quiet=True)
    assert (result.state, result.written) == ("landed", 7)
    one, other = (Landing(path).manifest() for path in (landed, tmp_path / "ray"))
    assert one == other


@pytest.mark.parametrize("point", ["piece-written", "landing-written"])
def test_killed_and_resumed(point, census, cli, tmp_path):
    out = tmp_path / "landing"
    command = ("land", census, "--out", out, "--piece-cells", 700, "--engine", "inline", "--json", "--quiet")
    killed = cli(*command, SCVIADUCT_FAULT=f"{point}@{tmp_path / 'mark'}")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (out / "landing.json").exists()
    finished = cli(*command)
    assert finished.returncode == 0, finished.stderr
    told = json.loads(finished.stdout)
    # The counts of the piece at which it was killed are there, whole, and are not written again.
    assert told["state"] == "landed"
    assert (told["written"], told["reused"]) == ((6, 1) if point == "piece-written" else (0, 7))
    with open_source(str(out)) as landing, open_source(census) as source:
        one, other = landing.scan(3360).shards, source.scan(3360).shards
        for left, right in zip(one, other, strict=True):
            np.testing.assert_array_equal(landing.read(left).data, source.read(right).data)


def test_nothing_to_do_dry_run_and_prune(landed, census):
    before = (landed / "landing.json").stat().st_mtime_ns
    again = sv.land(census, out=str(landed), engine="inline", quiet=True)
    assert (again.state, again.written, again.reused, again.pieces) == ("nothing to do", 0, 7, 7)
    assert (landed / "landing.json").stat().st_mtime_ns == before
    other = sv.land(census, out=str(landed), piece_cells=1000, engine="inline", dry_run=True, quiet=True)
    assert (other.state, other.written, other.reused) == ("planned", 4, 0)
    assert 0.5 < other.nbytes / again.nbytes < 2
    asked = {"piece_cells": 1000, "prune": True, "dry_run": True, "quiet": True}
    would_go = sv.land(census, out=str(landed), engine="inline", **asked).pruned
    close_shards()
    sv.land(census, out=str(landed), piece_cells=1000, engine="inline", quiet=True)
    foreseen = sv.land(out=str(landed), prune=True, dry_run=True).pruned
    assert would_go == foreseen
    assert sv.land(out=str(landed), prune=True).pruned == foreseen
    assert foreseen.removed > 6
    with open_source(str(landed)) as source:
        assert sum(source.read(shard).n_cells for shard in source.scan(900).shards) == 3360


@pytest.fixture
def torn(symphony, tmp_path):
    """A file in chunks of which one, of the counts of its last cells, cannot be decoded."""
    path = tmp_path / "torn.h5ad"
    adata = anndata.read_h5ad(symphony)
    adata.write_h5ad(path, compression="gzip")
    with h5py.File(path) as file:
        info = file["X/data"].id.get_chunk_info(file["X/data"].id.get_num_chunks() - 1)
    with path.open("r+b") as file:
        file.seek(info.byte_offset + 8)
        file.write(b"\0" * 64)
    return path


def test_counts_that_cannot_be_read_are_reported_and_quarantined_as_from_the_source(torn, pbmc, rows, tmp_path):
    out = tmp_path / "landing"
    result = sv.land(f"{torn}?layer=X", out=str(out), piece_cells=500, engine="inline", quiet=True)
    assert (result.state, result.exit_status) == ("landed", 4)
    assert "data of X" not in result.unreadable[0].reason
    assert sum(item.cells for item in result.unreadable) in (500, 1000)
    options = {"reference": "pbmc", "shard_cells": 500, "engine": "inline", "quiet": True}
    one = sv.map(f"{torn}?layer=X", store=str(tmp_path / "one"), **options)
    other = sv.map(str(out), store=str(tmp_path / "other"), **options)
    assert [item.unit.id for item in one.quarantined] == [item.unit.id for item in other.quarantined]
    assert "could not be read when they were landed" in other.quarantined[0].reason
    assert rows(tmp_path / "one").num_rows == rows(tmp_path / "other").num_rows
    foreseen = {"piece_cells": 500, "engine": "inline", "dry_run": True, "quiet": True}
    planned = sv.land(f"{torn}?layer=X", out=str(tmp_path / "new"), **foreseen)
    assert planned.state == "planned"
    assert planned.nbytes > 0  # by the samples that can be read
    again = sv.land(f"{torn}?layer=X", out=str(out), engine="inline", quiet=True)
    assert (again.state, again.exit_status, again.written) == ("nothing to do", 4, 0)


def test_counts_that_are_no_integers_are_kept_and_said(cli, symphony, tmp_path):
    adata = anndata.read_h5ad(symphony)[:50].copy()
    adata.X = adata.X * 0.7  # as after a correction of ambient counts
    adata.write_h5ad(tmp_path / "corrected.h5ad")
    done = cli("land", f"{tmp_path / 'corrected.h5ad'}?layer=X", "--out", tmp_path / "landing", "--engine", "inline")
    assert done.returncode == 0, done.stderr
    assert "1 piece has counts that are not whole numbers; they are kept as float32." in done.stdout


def test_wrong_input_is_refused_before_any_work(landed, symphony, census, cli):
    with pytest.raises(InputError, match="Name another folder"):
        sv.land(str(symphony), out=str(landed), engine="inline", quiet=True)
    with pytest.raises(InputError, match="Name another folder"):
        sv.land(f"{census}&filter=sex == 'male'", out=str(landed), engine="inline", quiet=True)
    with pytest.raises(InputError, match="no source to land"):
        sv.land(out=str(landed))
    with pytest.raises(InputError, match="--piece-cells 0"):
        sv.land(census, out=str(landed), piece_cells=0)
    told = cli("land", census)
    assert told.returncode == 2
    assert "--out" in told.stderr


def test_another_key_layer_or_part_is_another_source(symphony, tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    adata = anndata.read_h5ad(symphony)[:40].copy()
    adata.obs["barcode"] = [f"b{i}" for i in range(40)]
    adata.layers["corrected"] = adata.X * 2
    for name in ("one", "two"):
        adata.write_h5ad(files / f"{name}.h5ad")
    options = {"engine": "inline", "quiet": True}
    one, out = files / "one.h5ad", str(tmp_path / "one")
    sv.land(f"{one}?layer=X", out=out, **options)
    for asked in ("layer=layers/corrected", "layer=X&key=barcode", "layer=X&dataset=batch"):
        with pytest.raises(InputError, match="Name another folder"):
            sv.land(f"{one}?{asked}", out=out, **options)
    sv.land(f"{files}?layer=X", out=str(tmp_path / "both"), **options)
    first, second = (f"landing:{tmp_path / 'both'}?part=file://{files / name}" for name in ("one.h5ad", "two.h5ad"))
    sv.land(first, out=str(tmp_path / "part"), **options)
    with pytest.raises(InputError, match="Name another folder"):
        sv.land(second, out=str(tmp_path / "part"), **options)


def test_a_folder_that_is_landed_into_meanwhile_is_refused(symphony, census, tmp_path, monkeypatch):
    out, plan = str(tmp_path / "landing"), landing_pipeline.plan_landing
    options = {"out": out, "engine": "inline", "quiet": True}

    def planned_while(other):
        def run(opened, cells):
            monkeypatch.setattr(landing_pipeline, "plan_landing", plan)
            sv.land(other, **options, piece_cells=2000)
            return plan(opened, cells)

        monkeypatch.setattr(landing_pipeline, "plan_landing", run)

    planned_while(str(symphony))
    with pytest.raises(InputError, match="Name another folder"):
        sv.land(census, **options)
    planned_while(str(symphony))
    (tmp_path / "landing" / "landing.json").unlink()
    with pytest.raises(InputError, match=r"landed into meanwhile.*same command again"):
        sv.land(str(symphony), **options)
