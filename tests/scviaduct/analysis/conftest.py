"""Models of scvi-tools, and cells as a worker hands them to an analysis."""

from __future__ import annotations

import anndata
import numpy as np
import pytest
import scvi

from scviaduct.analysis.base import Cells
from scviaduct.families import family
from scviaduct.families.vae import quiet
from scviaduct.references.saved.archive import read_model_file
from scviaduct.references.template import encode_cells


@pytest.fixture(scope="session")
def as_cells(tmp_path_factory):
    """Makes the cells that an analysis is handed of a model and of data that it has not seen."""

    def make(model, data, seed=7):
        folder = tmp_path_factory.mktemp("model") / "saved"
        with quiet():
            model.save(str(folder))
        found = family(type(model).__name__)
        facts = found.facts(read_model_file(folder / "model.pt"))
        counts = data.layers[facts.layer] if facts.layer else data.X
        encoded = encode_cells(found.fold(model, facts, "cpu"), counts, data.obs, facts)
        return Cells(model, data, data.obs.copy(), encoded, facts, seed)

    return make


@pytest.fixture(scope="session")
def fitted():
    """Sets up an AnnData for a class of scvi-tools and trains a model of it, with one seed."""

    def fit(model_class, data, epochs, setup=None, lr=None, batch_size=128, **arguments):
        scvi.settings.seed = 0
        with quiet():
            model_class.setup_anndata(data, **({"batch_key": "batch"} if setup is None else setup))
            model = model_class(data, **arguments)
            told = {"batch_size": batch_size} | ({} if lr is None else {"lr": lr})
            model.train(epochs, accelerator="cpu", enable_progress_bar=False, logger=False, **told)
        model.module.eval()
        return model

    return fit


@pytest.fixture(scope="session")
def pbmc_scvi(symphony, fitted):
    """An SCVI of 1,500 real PBMC in three batches."""
    return fitted(scvi.model.SCVI, anndata.read_h5ad(symphony), 15, n_hidden=64, n_latent=10)


@pytest.fixture
def pbmc_cells(symphony, pbmc_scvi, as_cells):
    """200 of those cells, which scvi-tools has not seen as such."""
    data = anndata.read_h5ad(symphony)
    rows = np.sort(np.random.default_rng(0).permutation(data.n_obs)[:200])
    return as_cells(pbmc_scvi, data[rows].copy())
