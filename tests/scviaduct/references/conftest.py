"""Small models, trained once for all tests of references, as scvi-tools leaves them in a folder."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scvi
from scipy import sparse

from scviaduct.families.vae import quiet

LABELS = ["B", "NK", "T"]


def make_cells(n=90, genes=40, seed=0):
    """Three cell types of which each has its own genes, in two batches; a tenth has no label."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 3, n)
    rate = np.full((n, genes), 0.3)
    for i in range(3):
        rate[np.ix_(kind == i, range(i * 10, i * 10 + 10))] = 4
    label = np.array(LABELS, object)[kind]
    label[:: n // 9] = "unknown"
    obs = pd.DataFrame(
        {
            "batch": pd.Categorical(np.where(rng.random(n) < 0.5, "b1", "b2")),
            "cell_type": pd.Categorical(label),
            "donor": pd.Categorical(rng.choice(["d1", "d2", "d3"], n)),
            "age": rng.normal(40, 10, n),
        },
        index=[f"cell-{i}" for i in range(n)],
    )
    names = [f"G{i}" for i in range(genes)]
    var = pd.DataFrame({"symbol": [f"S{i}" for i in range(genes)], "length": np.arange(genes)}, index=names)
    counts = sparse.csr_matrix(rng.poisson(rate).astype(np.float32))
    return anndata.AnnData(counts, obs=obs, var=var, layers={"counts": counts.copy()})


def train_scvi(cells, *, labels=False, setup=None, **arguments):
    scvi.settings.seed = 0
    with quiet():
        scvi.model.SCVI.setup_anndata(
            cells, **({"batch_key": "batch", "labels_key": "cell_type" if labels else None} | (setup or {}))
        )
        model = scvi.model.SCVI(cells, n_hidden=16, n_latent=4, **arguments)
        model.train(max_epochs=2, accelerator="cpu", enable_progress_bar=False, logger=False)
    return model


def train_scanvi(cells, **arguments):
    pretrained = train_scvi(cells, labels=True, **arguments)
    with quiet():
        model = scvi.model.SCANVI.from_scvi_model(pretrained, unlabeled_category="unknown")
        model.train(max_epochs=2, accelerator="cpu", enable_progress_bar=False, logger=False)
    return model


def save(model, folder, *, data=True):
    with quiet():
        model.save(str(folder), save_anndata=data)
    return folder


@pytest.fixture(scope="session")
def cells():
    return make_cells()


@pytest.fixture(scope="session")
def scvi_model(cells):
    return train_scvi(cells.copy())


@pytest.fixture(scope="session")
def scanvi_model(cells):
    return train_scanvi(cells.copy())


@pytest.fixture(scope="session")
def scvi_folder(scvi_model, tmp_path_factory):
    return save(scvi_model, tmp_path_factory.mktemp("saved") / "scvi")


@pytest.fixture(scope="session")
def scanvi_folder(scanvi_model, tmp_path_factory):
    return save(scanvi_model, tmp_path_factory.mktemp("saved") / "scanvi")


@pytest.fixture(scope="session")
def train_and_save():
    """For a model that a test changes."""
    return train_scvi, save
