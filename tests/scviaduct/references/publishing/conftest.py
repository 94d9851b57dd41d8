"""References of every family, trained for one epoch on real cells, and what publishing does with small ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import anndata
import pytest

from scviaduct.families import Recipe, family
from scviaduct.references.building import build_package
from scviaduct.references.cells import read_cells
from scviaduct.references.features import Features
from scviaduct.references.saved.portable import read_model
from scviaduct.references.training import train
from tests.support.hub_server import TOKEN

SMALL = {"n_latent": "3", "n_hidden": "8"}
SOURCES = {
    "SCVI": (
        "pbmc_10x_3tech_symphony.h5ad?filter=batch == '3pv1'",
        {"labels_key": "cell_type", "calibrate_by": "none"},
    ),
    "SCANVI": (
        "pbmc_10x_3tech_symphony.h5ad?filter=batch == '3pv1'",
        {"labels_key": "cell_type", "scanvi_epochs": 1, "calibrate_by": "none"},
    ),
    "TOTALVI": ("citeseq_pbmc5k_scvitests.h5ad?proteins=protein_expression", {}),
    "MULTIVI": ("multiome_rna_atac_muon.h5mu", {"batch_key": None}),
    "PEAKVI": ("multiome_rna_atac_muon.h5mu?modality=atac:atac", {"batch_key": None}),
    "MRVI": (
        "perturb_thp1_eccite_sceptre.h5ad?filter=perturbation == 'IRF1'",
        {"batch_key": None, "sample_key": "batch", "settings": {"n_latent": "4", "n_latent_u": "3"}},
    ),
    "ContrastiveVI": (
        "perturb_thp1_eccite_sceptre.h5ad?filter=perturbation in ['IRF1', 'STAT1']",
        {
            "background": ("perturbation=STAT1",),
            "settings": {"n_background_latent": "3", "n_salient_latent": "2", "n_hidden": "8"},
        },
    ),
}
"""File of the shared data, and what its recipe says besides the common."""


@dataclass(frozen=True)
class Made:
    """A package, and some of its training cells as its model of scvi-tools wants them and as ours does."""

    reference: Any
    flat: Any
    own: Any


@pytest.fixture(scope="session")
def made(shared_data, tmp_path_factory):
    """Train a family's reference, once a session."""
    known = {}

    def make(name):
        if name not in known:
            known[name] = _make(name, shared_data, tmp_path_factory.mktemp("trained"))
        return known[name]

    return make


def _make(name, shared, folder):
    file, own = SOURCES[name]
    told = {"batch_key": "batch", "genes": 50, "epochs": 1, "device": "cpu", "settings": SMALL} | own
    recipe = Recipe(family=name, **told)
    reference = train(f"{shared / file}", recipe, folder / f"real-{name.lower()}")
    features = Features(reference.names, reference.genes.modality, {})
    flat = read_cells(f"{shared / file}", recipe, features).cells[:40].copy()
    if reference.unlabeled_category:  # scvi-tools counts the labels of the cells that it is given
        flat.obs[reference.labels_key] = reference.unlabeled_category
    return Made(reference, flat, family(name).layout(read_model(reference.path), flat.copy()))


@pytest.fixture
def lab(hub, monkeypatch):
    """The hub, with a token that may write."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


@pytest.fixture
def minified(train_and_save, cells, tmp_path):
    """Make a package whose minified cells have more columns than the model needs, with or without counts."""
    train_scvi, save = train_and_save

    def make(*, counts=False, setup=None, name="mini", **columns):
        own = cells.copy()
        for column, values in columns.items():
            own.obs[column] = values
        model = train_scvi(own, setup=setup)
        save(model, tmp_path / f"{name}-saved", data=False)
        mean, variance = model.get_latent_representation(return_dist=True)
        model.adata.obsm["X_latent_qzm"], model.adata.obsm["X_latent_qzv"] = mean, variance
        model.minify_adata("latent_posterior_parameters" + ("_with_counts" if counts else ""))
        file = tmp_path / f"{name}.h5ad"
        model.adata.write_h5ad(file)
        out = tmp_path / name
        extras = {"minified.h5ad": file}
        return build_package(tmp_path / f"{name}-saved", out, name, anndata.read_h5ad(file), {"cells": 90}, extras)

    return make
