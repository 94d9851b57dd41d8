"""A small model of each family, untrained: what is saved of it has the names and shapes that a trained one has."""

from __future__ import annotations

from functools import cache

import anndata
import mudata
import numpy as np
import pandas as pd
import scvi
from scvi.external import MRVI, ContrastiveVI

from scviaduct.families.vae import quiet

N_CELLS, N_GENES = 24, 12
CLASSES = {
    **{name: getattr(scvi.model, name) for name in ("SCVI", "SCANVI", "TOTALVI", "MULTIVI", "PEAKVI")},
    "MRVI": MRVI,
    "ContrastiveVI": ContrastiveVI,
}


def small_cells():
    """Counts, proteins, and a column of each kind."""
    rng = np.random.default_rng(0)

    def in_turn(*values):
        return pd.Categorical((values * N_CELLS)[:N_CELLS])

    obs = {"batch": in_turn("b1", "b2"), "label": in_turn("T", "B", "unknown"), "donor": in_turn(4, 3, 2, 1)}
    frame = pd.DataFrame(obs | {"age": rng.normal(size=N_CELLS)}, index=[f"cell-{i}" for i in range(N_CELLS)])
    counts = rng.poisson(1.0, (N_CELLS, N_GENES)).astype(np.float32)
    cells = anndata.AnnData(counts, obs=frame, var=pd.DataFrame(index=[f"G{i}" for i in range(N_GENES)]))
    proteins = rng.poisson(3.0, (N_CELLS, 4)).astype(np.float32)
    cells.obsm["proteins"] = pd.DataFrame(proteins, index=frame.index, columns=[f"P{i}" for i in range(4)])
    return cells


def small_multiome():
    """Genes and peaks of the same cells."""
    cells = small_cells()
    peaks = pd.DataFrame(index=[f"chr1:{i}-{i + 5}" for i in range(10)])
    open_ = (np.random.default_rng(1).random((N_CELLS, 10)) < 0.4).astype(np.float32)
    atac = anndata.AnnData(open_, obs=pd.DataFrame(index=cells.obs_names), var=peaks)
    with quiet():
        both = mudata.MuData({"rna": cells, "atac": atac})
    both.obs["batch"] = cells.obs["batch"]
    return both


SETUPS = {
    "SCVI": {"batch_key": "batch", "categorical_covariate_keys": ["donor"], "continuous_covariate_keys": ["age"]},
    "SCANVI": {"batch_key": "batch", "labels_key": "label", "unlabeled_category": "unknown"},
    "TOTALVI": {"batch_key": "batch", "protein_expression_obsm_key": "proteins"},
    "MULTIVI": {"batch_key": "batch", "modalities": {"rna_layer": "rna", "atac_layer": "atac"}},
    "PEAKVI": {"batch_key": "batch"},
    "MRVI": {"sample_key": "donor", "batch_key": "batch"},
    "ContrastiveVI": {"batch_key": "batch"},
}
ARGUMENTS = {
    "SCVI": {"n_hidden": 8, "n_latent": 3, "use_observed_lib_size": False, "encode_covariates": True},
    "SCANVI": {"n_hidden": 8, "n_latent": 3},
    "TOTALVI": {"n_hidden": 8, "n_latent": 3, "empirical_protein_background_prior": False},
    "MULTIVI": {"n_hidden": 8, "n_latent": 3, "n_genes": N_GENES, "n_regions": 10},
    "PEAKVI": {"n_hidden": 8, "n_latent": 3},
    "MRVI": {"n_latent": 4, "n_latent_u": 3, "encoder_n_hidden": 8},
    "ContrastiveVI": {"n_hidden": 8, "n_background_latent": 3, "n_salient_latent": 2},
}


def cells_of(name):
    """Cells that a class can be set up from."""
    return small_multiome() if name == "MULTIVI" else small_cells()


@cache
def model_of(name):
    """The model; callers leave it as it is."""
    made, cells = CLASSES[name], cells_of(name)
    with quiet():
        (made.setup_mudata if name == "MULTIVI" else made.setup_anndata)(cells, **SETUPS[name])
        scvi.settings.seed = 0
        model = made(cells, **ARGUMENTS[name])
    model.module.eval()
    model.is_trained_ = True
    model.train_indices_ = np.arange(N_CELLS - 4)
    model.history_ = {"elbo_train": pd.DataFrame({"elbo_train": [3.0, 2.0]}, index=pd.Index([0, 1], name="epoch"))}
    return model


def save_small(name, folder):
    """Save the model of a class as scvi-tools does."""
    with quiet():
        model_of(name).save(str(folder))
    return folder


def set_up(name, saved):
    """A model of scvi-tools made from parts that were read, as its ``load`` makes it."""
    from scvi.model.base._save_load import _initialize_model

    made, cells, registry = CLASSES[name], cells_of(name), saved.attr_dict["registry_"]
    with quiet():
        getattr(made, registry["setup_method_name"])(cells, source_registry=registry, **registry["setup_args"])
        model = _initialize_model(made, cells, registry, {"init_params_": dict(saved.attr_dict["init_params_"])}, None)
        model.module.on_load(model, pyro_param_store=None)
        model.module.load_state_dict(saved.state_dict)
    model.module.eval()
    model.is_trained_ = True
    return model


def latent_of(model):
    """Latent of the model's own cells."""
    keys = {"representation_kind": "salient"} if type(model) is ContrastiveVI else {}
    keys |= {"use_mean": True} if type(model) is MRVI else {}
    with quiet():
        return model.get_latent_representation(**keys)
