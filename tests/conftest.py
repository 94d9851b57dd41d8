"""Fixtures shared by all tests: a home of their own, the shared real data, one local Ray for the session."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest
import torch

# As the sources set it for themselves (scviaduct.sources.somacounts.buffers): tests compare with plain TileDB-SOMA,
# whose small reads would otherwise end a test process now and then.
os.environ["TILEDB_SM_QUERY_SPARSE_GLOBAL_ORDER_PREPROCESS_TILE_MERGE"] = "0"

SHARED = Path(os.environ.get("SCVIADUCT_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory):
    """Keep registered references and caches of tests away from the user's."""
    path = tmp_path_factory.mktemp("home")
    before = {name: os.environ.get(name) for name in ("HOME", "SCVIADUCT_HOME")}
    os.environ.update(HOME=str(path), SCVIADUCT_HOME=str(path / "scviaduct"))
    yield path
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Torch's threads wait for each other by spinning: where cores are shared, two take ten times as long as one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real count data; a machine without it skips what needs it."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared real data, and {SHARED} is absent")
    return SHARED


@pytest.fixture(scope="session")
def pbmc(symphony, home):
    """A registered SCANVI of real cells: trained on 3' v1 and v2, never on 5', which stay for queries."""
    import pipelines as sv

    out = home / "pbmc-model"
    known = f"{symphony}?filter=batch in ['3pv1', '3pv2']"
    keys = {"labels_key": "cell_type", "batch_key": "batch"}
    sv.train(known, family="scanvi", out=out, genes=0, epochs=15, scanvi_epochs=6, device="cpu", quiet=True, **keys)
    return sv.reference.add(out, name="pbmc")


@pytest.fixture(scope="session")
def five_prime(symphony):
    """URI of the cells that no test reference was trained on."""
    return f"{symphony}?filter=batch == '5p'"


def _unpack(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="session")
def census_collection(shared_data, tmp_path_factory) -> Path:
    """A local collection of the Census schema: 3,360 real cells, 13,084 genes, 3 datasets."""
    folder = _unpack(shared_data / "census_like_pbmc_3datasets.tar.gz", tmp_path_factory.mktemp("census"))
    return folder / "census_like_shared"


@pytest.fixture(scope="session")
def soma_from_r(shared_data, tmp_path_factory) -> Path:
    """A SOMA experiment of 80 x 230 written by R."""
    return _unpack(shared_data / "soma-exp-pbmc-small.tar.gz", tmp_path_factory.mktemp("soma-r"))


@pytest.fixture(scope="session")
def old_soma_from_r(shared_data, tmp_path_factory) -> Path:
    """The same, in the encoding before tiledbsoma 1.15."""
    return _unpack(shared_data / "soma-exp-pbmc-small-pre-1.15.tar.gz", tmp_path_factory.mktemp("soma-r-old"))


@pytest.fixture(scope="session")
def symphony(shared_data) -> Path:
    """1,500 PBMC of three 10x chemistries with labels (h5ad)."""
    return shared_data / "pbmc_10x_3tech_symphony.h5ad"


@pytest.fixture(scope="session")
def local_ray(home):
    """One Ray on this machine for the whole session."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=0,
        object_store_memory=512 << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )
    yield ray
    ray.shutdown()
