"""Small models of every family on a few real cells, as scvi-tools saves them: what surgery's tests widen and extend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pandas as pd
import torch
from scipy import sparse

from scviaduct.families import Recipe, family
from scviaduct.families.vae import quiet
from scviaduct.references.saved.archive import SavedModel, read_model_file

if TYPE_CHECKING:
    from pathlib import Path

CELLS = 200
ENCODED = {"encode_covariates": True}
DEEP = {"encode_covariates": True, "n_layers": 2, "deeply_inject_covariates": True}
BATCH = {"batch_key": "batch"}
COVARIATES = BATCH | {"categorical_covariates": ("donor", "sex")}
BY_BATCH = {"gene_dispersion": "gene-batch", "protein_dispersion": "protein-batch"}
DEEP_PEAKS = {"encode_covariates": True, "deeply_inject_covariates": True, "n_layers_encoder": 2, "n_layers_decoder": 2}

# Name: family, recipe, arguments of the model.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "scvi": ("SCVI", COVARIATES, DEEP | {"dispersion": "gene-batch", "use_observed_lib_size": False}),
    "scvi of one batch": ("SCVI", {"batch_key": "same", "categorical_covariates": ("donor",)}, ENCODED),
    "scvi, one category in the middle": ("SCVI", BATCH | {"categorical_covariates": ("same", "sex")}, DEEP),
    "scvi, embedded": ("SCVI", COVARIATES, ENCODED | {"batch_representation": "embedding"}),
    "scvi, not encoded": ("SCVI", BATCH, {}),
    "scanvi": ("SCANVI", COVARIATES | {"labels_key": "label"}, DEEP),
    "totalvi": ("TOTALVI", COVARIATES, ENCODED | BY_BATCH),
    "totalvi of one batch": ("TOTALVI", {"batch_key": "same"}, ENCODED),
    "multivi": ("MULTIVI", COVARIATES, DEEP_PEAKS),  # scvi-tools 1.5.1 fails on its dispersion by batch
    "peakvi": ("PEAKVI", COVARIATES, DEEP_PEAKS),
    "poissonvi": ("POISSONVI", COVARIATES, DEEP),
    "mrvi": ("MRVI", BATCH | {"sample_key": "donor"}, {"encoder_n_hidden": 32, "encoder_n_layers": 1}),
    "contrastivevi": ("ContrastiveVI", BATCH | {"background": ("sex=f",)}, {"n_layers": 2}),
}  # fmt: skip
SIZES = {"SCVI": 16, "SCANVI": 16, "TOTALVI": 16, "MULTIVI": 12, "PEAKVI": 12, "POISSONVI": 16, "ContrastiveVI": 16}


@dataclass(frozen=True, slots=True)
class Made:
    """A model, as it was read from its file, and the flat cells that it was set up with."""

    family: Any
    saved: SavedModel
    cells: anndata.AnnData

    def model(self, saved: SavedModel | None = None, cells: anndata.AnnData | None = None) -> Any:
        """The model of scvi-tools, which holds the cells."""
        with quiet():
            return self.family.instantiate(saved or self.saved, self.cells if cells is None else cells)

    def renamed(self, column: str, old: str, new: str) -> anndata.AnnData:
        """The cells, those of a category under another name."""
        cells = self.cells.copy()
        cells.obs[column] = cells.obs[column].astype(str).replace({old: new})
        return cells


def flat(parts: dict[str, Any], names: dict[str, list[str]]) -> anndata.AnnData:
    """Flat cells of modalities, with covariates made up."""
    rng = np.random.default_rng(0)
    n_cells = next(iter(parts.values())).shape[0]
    obs = {name: rng.choice(values, n_cells) for name, values in CATEGORIES.items()} | {"same": "one"}
    var = pd.DataFrame(
        {"modality": [part for part in parts for _ in names[part]]},
        index=[name for part in parts for name in names[part]],
    )
    counts = sparse.hstack([sparse.csr_matrix(part) for part in parts.values()], format="csr", dtype=np.float32)
    return anndata.AnnData(counts, obs=pd.DataFrame(obs, index=[f"c{i}" for i in range(n_cells)]), var=var)


CATEGORIES = {"batch": ["a", "b", "c"], "donor": ["x", "y", "z"], "sex": ["f", "m"], "label": list("123456789u")}


def cells_of(name: str, shared: Path) -> anndata.AnnData:
    """Real cells of the modalities that a family reads: the most expressed features of 200 cells."""

    def features(data: anndata.AnnData, n: int, prefix: str = "") -> tuple[Any, list[str]]:
        data = data[:CELLS]
        chosen = np.sort(np.argsort(-np.asarray(data.X.sum(0)).ravel())[:n])
        return data.X[:, chosen], [f"{prefix}{gene}" for gene in data.var_names[chosen]]

    if name == "TOTALVI":
        cite = anndata.read_h5ad(shared / "citeseq_pbmc5k_scvitests.h5ad")
        counts, genes = features(cite, 80)
        proteins = np.asarray(cite.obsm["protein_expression"], np.float32)[:CELLS]
        names = {"rna": genes, "protein": [f"p{i}" for i in range(proteins.shape[1])]}
        return flat({"rna": counts, "protein": proteins}, names)
    parts, names = {}, {}
    if name in ("MULTIVI", "SCVI", "SCANVI", "MRVI", "ContrastiveVI"):
        rna = anndata.read_h5ad(shared / "multiome_a549_scicar_rna.h5ad")
        parts["rna"], names["rna"] = features(rna, 100)
    if name in ("MULTIVI", "PEAKVI", "POISSONVI"):
        peaks = anndata.read_h5ad(shared / "multiome_a549_scicar_atac_binary.h5ad")
        parts["atac"], names["atac"] = features(peaks, 120, "peak-")
    return flat(parts, names)


def made(name: str, shared: Path, folder: Path) -> Made:
    """A model of the table, untrained, whose norms and embeddings tell cells and categories apart."""
    family_name, recipe, arguments = MODELS[name]
    found, cells = family(family_name), cells_of(family_name, shared)
    told = Recipe(family=family_name, **recipe)
    torch.manual_seed(0)
    with quiet():
        if family_name == "SCANVI":
            model = _scanvi(cells, arguments)
        else:
            size = {"n_hidden": SIZES[family_name]} if family_name in SIZES else {}
            data = found.setup(cells.copy(), told)
            prior = {"empirical_protein_background_prior": False} if family_name == "TOTALVI" else {}
            model = found.create(data, size | prior | arguments, told)
        _stir(model.module)
        model.is_trained_ = True
        model.save(str(folder), save_anndata=False)
    return Made(found, read_model_file(folder / "model.pt"), cells)


def _scanvi(cells: anndata.AnnData, arguments: dict[str, Any]) -> Any:
    import scvi

    data = cells.copy()
    keys = {"batch_key": "batch", "labels_key": "label", "categorical_covariate_keys": ["donor", "sex"]}
    scvi.model.SCANVI.setup_anndata(data, unlabeled_category="u", **keys)
    return scvi.model.SCANVI(data, n_hidden=16, **arguments)


def _stir(module: Any) -> None:
    for part in module.eval().modules():
        if isinstance(part, torch.nn.BatchNorm1d):
            part.running_mean.normal_(0, 0.2)
            part.running_var.uniform_(0.1, 1)
    for name, tensor in module.named_parameters():
        if (
            name.split(".")[0] in ("px_r", "py_r", "background_pro_alpha", "log_per_batch_efficiency")
            or "embed" in name
        ):
            tensor.data += torch.randn_like(tensor) * 0.3
