"""Small trained references, and query files of every kind against them."""

from __future__ import annotations

from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scviaduct.references.training import Recipe, train
from scviaduct.sources import open_source
from scviaduct.sources.opening import close_shards

GENES = 40
SYMBOLS = ["TWIN", "TWIN", *[f"SYM{i}" for i in range(2, GENES)]]


@pytest.fixture(scope="session")
def make_cells():
    """AnnData of Poisson counts over all genes of the references, none of its cells empty."""

    def make(cells=60, seed=1, **obs):
        rng = np.random.default_rng(seed)
        means = np.exp(rng.normal(size=(4, GENES)))[np.arange(cells) % 4]
        counts = rng.poisson(means).astype(np.float32)
        counts[:, 0] += 1
        columns = {
            "batch": [f"b{i % 3}" for i in range(cells)],
            "cell_type": [f"type {i % 4}" for i in range(cells)],
            "sex": ["f" if i % 2 else "m" for i in range(cells)],
            "age": np.linspace(20, 80, cells),
            "fresh": [i % 5 == 0 for i in range(cells)],
            "lane": [i % 2 + 1 for i in range(cells)],
        }
        return anndata.AnnData(
            sparse.csr_matrix(counts),
            obs=pd.DataFrame({**columns, **obs}, index=[f"cell{i}" for i in range(cells)]),
            var=pd.DataFrame({"symbol": SYMBOLS}, index=[f"ENSG{i:011d}" for i in range(GENES)]),
        )

    return make


@pytest.fixture(scope="session")
def trained(make_cells, tmp_path_factory):
    """Train a reference of 240 cells and 40 genes by a recipe, in under a second."""
    folder = tmp_path_factory.mktemp("trained")
    make_cells(240, 0).write_h5ad(folder / "reference.h5ad")

    def make(name, family, **recipe):
        wanted = Recipe(family=family, genes=0, epochs=1, scanvi_epochs=1 if family == "scanvi" else None, device="cpu")
        return train(str(folder / "reference.h5ad"), replace(wanted, **recipe), folder / name)

    return make


@pytest.fixture(scope="session")
def scanvi(trained):
    """A SCANVI whose latent does not depend on batches."""
    return trained("scanvi", "scanvi", labels_key="cell_type", batch_key="batch")


@pytest.fixture(scope="session")
def conditional(trained):
    """An SCVI whose encoder reads the batch, a categorical and a continuous covariate."""
    return trained(
        "conditional",
        "scvi",
        batch_key="batch",
        categorical_covariates=("sex",),
        continuous_covariates=("age",),
        settings={"encode_covariates": "True"},
    )


@pytest.fixture(scope="session")
def pbmc(symphony, tmp_path_factory):
    """A SCANVI of real cells of two chemistries; those of the third are its query."""
    uri = f"{symphony}?filter=batch in ['3pv1', '3pv2']"
    recipe = Recipe(family="scanvi", labels_key="cell_type", batch_key="batch", genes=0, epochs=8, scanvi_epochs=6)
    return train(uri, replace(recipe, device="cpu"), tmp_path_factory.mktemp("pbmc") / "pbmc")


@pytest.fixture
def write(tmp_path):
    """Write or replace an AnnData file in the test's folder; its path."""

    def write(adata, name="query"):
        path, whole = tmp_path / f"{name}.h5ad", tmp_path / f"{name}.whole"
        adata.write_h5ad(whole)
        return whole.rename(path)

    return write


@pytest.fixture
def scan():
    """The shards of a source, which is closed again."""

    def scan(uri, shard_cells=1000, columns=()):
        with open_source(str(uri)) as source:
            return source.scan(shard_cells, columns)

    return scan


@pytest.fixture(autouse=True)
def closed():
    """Files that a test opened through its shards are closed when it ends."""
    yield
    close_shards()
