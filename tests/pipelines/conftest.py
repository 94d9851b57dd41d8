"""What the tests of whole runs share: a store read as a table, and the command line in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pyarrow as pa
import pytest

from scviaduct.store import Store

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def rows():
    """All rows of a store's only space, sorted by cell key."""

    def read(store, **options):
        parts = [table.cast(_plain(table.schema)) for table in Store.open(store).space().read(**options)]
        return pa.concat_tables(parts).sort_by([("dataset_id", "ascending"), ("observation_id", "ascending")])

    return read


def _plain(schema):
    kinds = [field.type.value_type if pa.types.is_dictionary(field.type) else field.type for field in schema]
    return pa.schema(list(zip(schema.names, kinds, strict=True)))


@pytest.fixture(scope="session")
def cli():
    """Run the command line in a process of its own, without a terminal."""

    def run(*arguments, background=False, **environment):
        command = [sys.executable, "-m", "pipelines", *map(str, arguments)]
        env = {**os.environ, **environment, "PYTHONPATH": str(ROOT)}
        env.pop("RAY_ADDRESS", None)
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
        started = subprocess.Popen(command, **streams)
        if background:
            return started
        out, err = started.communicate(timeout=300)
        return subprocess.CompletedProcess(command, started.returncode, out, err)

    return run


@pytest.fixture
def spoil(symphony, tmp_path):
    """Write the 5' cells with a value that no count has, at a cell that the preflight's sample does not meet."""

    def make(value, cell=599, copies=12):
        cells = anndata.read_h5ad(symphony)
        cells = cells[(cells.obs["batch"] == "5p").to_numpy()].copy()
        whole = anndata.concat({str(i): cells for i in range(copies)}, index_unique="-")
        whole.obs_names = [f"cell{i}" for i in range(whole.n_obs)]
        start = whole.X.indptr[cell]
        whole.X.data[start] = value
        path = tmp_path / "spoilt.h5ad"
        whole.write_h5ad(path)
        return path, whole

    return make


@pytest.fixture(scope="session")
def same():
    """Whether two tables hold the same rows; floats to the bit, NaN and null included."""

    def compare(left, right, but=()):
        names = [name for name in left.column_names if name not in but]
        assert names == [name for name in right.column_names if name not in but]
        for name in names:
            a, b = left[name].combine_chunks(), right[name].combine_chunks()
            if pa.types.is_list(a.type):
                assert a.is_valid().equals(b.is_valid())
                np.testing.assert_array_equal(a.flatten().to_numpy(), b.flatten().to_numpy(), err_msg=name)
            else:
                assert a.equals(b), name
        return True

    return compare
