"""A model of the Census's architecture: added from a folder that holds model.pt alone, mapped from a Census."""

from __future__ import annotations

import anndata
import cellxgene_census
import numpy as np
import pyarrow as pa
import pytest
import scvi
import torch

import pipelines as sv
from scviaduct.families.vae import quiet
from scviaduct.store import Store

GENES = 8_000


@pytest.fixture(scope="module")
def census_model(census_collection, tmp_path_factory):
    """As the Census trains it: 8,000 Ensembl ids, two layers of 512, latent 50, batches that no query has."""
    with cellxgene_census.open_soma(uri=str(census_collection)) as census:
        var = census["census_data"]["homo_sapiens"].ms["RNA"].var.read().concat().to_pandas()
    genes = var["feature_id"][:GENES].tolist()
    rng = np.random.default_rng(0)
    cells = anndata.AnnData(rng.poisson(0.2, (64, GENES)).astype(np.float32))
    cells.var_names = genes
    cells.obs["batch"] = [f"dataset_{i % 4}|10x 3' v3|cell|donor {i % 2}" for i in range(cells.n_obs)]
    folder = tmp_path_factory.mktemp("census-model")
    with quiet():
        scvi.settings.seed = 0
        scvi.model.SCVI.setup_anndata(cells, batch_key="batch")
        model = scvi.model.SCVI(cells, n_hidden=512, n_layers=2, n_latent=50)
        with torch.no_grad():
            for part in model.module.z_encoder.modules():  # running statistics of a trained model are not 0 and 1
                if isinstance(part, torch.nn.BatchNorm1d):
                    part.running_mean.normal_(0, 0.3)
                    part.running_var.uniform_(0.5, 2)
        model.is_trained = True
        model.save(str(folder / "model"))
    return folder / "model"


@pytest.mark.slow
def test_the_census_model_maps_a_census_out_of_the_box(census_model, census_collection, home, tmp_path):
    assert [path.name for path in census_model.iterdir()] == ["model.pt"]
    reference = sv.reference.add(census_model, name="census-like", quiet=True)
    assert (reference.family, len(reference.genes), reference.n_latent) == ("SCVI", GENES, 50)
    assert not reference.encode_covariates
    source = f"census:2026-01-01?organism=homo_sapiens&uri={census_collection}"
    store = str(tmp_path / "store")
    result = sv.map(source, reference="census-like", store=store, engine="inline", quiet=True)
    assert result.report.verdict == "fit"
    space = Store.open(store).space()
    table = pa.concat_tables(space.read(["dataset_id", "observation_id", "latent", "label"]))
    assert table.num_rows == 3_360
    assert table["label"].null_count == 3_360
    with cellxgene_census.open_soma(uri=str(census_collection)) as census, quiet():
        keys = ["dataset_id", "observation_joinid"]
        query = cellxgene_census.get_anndata(census, "homo_sapiens", obs_column_names=keys)
        query.var_names = query.var["feature_id"]
        query.obs["batch"] = "unassigned"
        scvi.model.SCVI.prepare_query_anndata(query, str(census_model))
        model = scvi.model.SCVI.load_query_data(query, str(census_model), accelerator="cpu")
        model.is_trained = True
        expected = model.get_latent_representation()
    rows = zip(*(table[name].to_pylist() for name in ("dataset_id", "observation_id", "latent")), strict=True)
    found = {(dataset, cell): latent for dataset, cell, latent in rows}
    named = zip(*(query.obs[key].astype(str) for key in keys), strict=True)
    ours = np.array([found[key] for key in named], np.float32)
    assert np.abs(ours - expected).max() / expected.std() <= 1e-5  # float32 sums of 8,000 products in another order
