"""Ways that are compared do the same to the same cells."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest

from benchmarks import encode, endtoend, files, reading, workers
from benchmarks.data import Design, census, csr
from benchmarks.models import Size, reference

DESIGN = Design(600, 300, 60)
SIZE = Size(80, 16, 1, 5, 128)


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    return census(tmp_path_factory.mktemp("collection"), DESIGN)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return reference(tmp_path_factory.mktemp("model"), DESIGN, SIZE)


def test_readers_see_the_same_counts(collection):
    told = {"collection": str(collection), "cells": 500}
    expected = {"cells": 500, "nonzeros": csr(DESIGN)[:500].nnz}
    ways = [reading.ours, reading.blockwise, reading.tables]
    if find_spec("tiledbsoma_ml"):  # the peers are an extra
        ways.append(reading.sequential)
    assert [way(**told)() for way in ways] == [expected] * len(ways)


def test_files_hold_the_same_counts(collection, tmp_path):
    expected = {"cells": 200, "nonzeros": csr(DESIGN)[:200].nnz}
    for kind, path in files.write_files(tmp_path, collection, 200).items():
        bare = files.bare_zarr if path.suffix == ".zarr" else files.bare_h5
        assert (bare(str(path))(), reading.ours_of_file(str(path))()) == (expected, expected), kind


def test_the_script_and_the_command_map_the_same_cells(collection, model, tmp_path):
    saved, package = map(str, model)
    told = {"collection": str(collection), "cells": 500}
    mine = endtoend.ours(**told, package=package, folder=str(tmp_path))()
    theirs = endtoend.plain(**told, saved=saved, batch=128)()
    assert mine["cells"] == theirs["cells"] == endtoend.read_only(**told, package=package)()["cells"] == 500
    from scviaduct.store import Store

    table = next(iter(Store.open(tmp_path / "store-endtoend").space().read(["label", "cell_type"])))
    assert len(set(table["label"].to_pylist())) == theirs["labels"]
    assert set(table["cell_type"].to_pylist()) == {f"type {number}" for number in range(20)}


def test_encoders_agree(tmp_path):
    design = Design(300, 80, 12)
    saved, package = map(str, reference(tmp_path, design, SIZE))
    out = {who: str(tmp_path / f"{who}.npy") for who in ("ours", "plain")}
    told = {"cells": 300, "genes": 80, "nonzeros": 12, "device": "cpu"}
    assert encode.ours(**told, package=package, out=out["ours"], times=2)() == {"cells": 600}
    assert encode.plain(**told, saved=saved, out=out["plain"])()["cells"] == 300
    assert encode._difference(out) < 1e-5
    assert np.load(out["ours"]).shape == (300, SIZE.latent)


def test_a_run_in_one_process_is_listened_to(collection, model, tmp_path):
    told = {"collection": str(collection), "cells": 600, "package": str(model[1]), "folder": str(tmp_path)}
    found = workers.mapped(**told, shard=50, workers=0)()
    assert [done for done, _, _ in found["marks"]] == list(range(50, 601, 50))
    assert found["cpu"] > 0
    assert found["wall"] > 0
