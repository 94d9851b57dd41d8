"""Tiny trained references of every family on real cells, each with a query of a batch or sample that it never saw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mudata
import numpy as np

from scviaduct.families.vae import quiet
from scviaduct.references.training import Recipe, train
from tests.support.families import cells_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import anndata

    from scviaduct.references.package import Reference

SMALL = {"n_hidden": "16", "n_latent": "4"}
ENCODED = SMALL | {"encode_covariates": "True"}
CONDITIONS = {"v": "well", "w": "sick", "x": "sick", "y": "well", "z": "sick"}
"""Of donors."""
UNPAIRED = 8
"""Cells of MULTIVI's query without peaks."""

# Family: what its recipe says besides one epoch and all features.
RECIPES: dict[str, dict[str, Any]] = {
    "SCVI": {"batch_key": "batch", "categorical_covariates": ("sex",), "settings": ENCODED},
    "SCANVI": {
        "batch_key": "batch",
        "labels_key": "label",
        "unlabeled_category": "u",
        "scanvi_epochs": 1,
        "settings": ENCODED,
    },
    "TOTALVI": {"batch_key": "batch", "settings": ENCODED | {"empirical_protein_background_prior": "False"}},
    "PEAKVI": {"batch_key": "batch", "min_cells_per_peak": 0.0, "settings": ENCODED},
    "MULTIVI": {"batch_key": "batch", "min_cells_per_peak": 0.0, "settings": ENCODED},
    "MRVI": {
        "batch_key": "batch",
        "sample_key": "donor",
        "settings": {"encoder_n_hidden": "32", "encoder_n_layers": "1", "n_latent": "8", "n_latent_u": "4"},
    },
    "ContrastiveVI": {
        "batch_key": "batch",
        "background": ("sex=f",),
        "settings": {"n_hidden": "16", "n_background_latent": "4", "n_salient_latent": "3"},
    },
}


@dataclass(frozen=True, slots=True)
class Tiny:
    """A reference and its query.

    Attributes
    ----------
    reference
        Trained for an epoch on all cells but those of one batch, of MRVI one donor.
    column, held
        That column, and the value.
    query
        File of all cells with the value, and of 20 with another, in an order that mixes them.
    known
        File of those 20 alone, in the same order.
    """

    reference: Reference
    column: str
    held: str
    query: str
    known: str


def make(family: str, settings: Mapping[str, str], shared: Path, folder: Path) -> Tiny:
    """Train the reference of a family into a folder; ``settings`` are further arguments of the model."""
    cells, column, held = _cells(family, shared), *(("donor", "z") if family == "MRVI" else ("batch", "c"))
    new = (cells.obs[column] == held).to_numpy()
    recipe = {**RECIPES[family], "settings": RECIPES[family]["settings"] | settings}
    told = {"genes": 0, "epochs": 1, "device": "cpu", "calibrate_by": "none"}
    with quiet():
        source = write(cells[~new].copy(), folder / "reference")
        reference = train(source, Recipe(family=family, **told, **recipe), folder / "package")
        rows = np.sort(np.concatenate([np.flatnonzero(new), np.flatnonzero(~new)[:20]]))
        query = cells[rows].copy()
        if family == "MULTIVI":
            query.X[:UNPAIRED, (query.var["modality"] == "atac").to_numpy()] = 0
            query.X.eliminate_zeros()
        known = query[(query.obs[column] != held).to_numpy()].copy()
        return Tiny(reference, column, held, write(query, folder / "query"), write(known, folder / "known"))


def _cells(family: str, shared: Path) -> anndata.AnnData:
    """Cells whose donors have a condition, two or more each, as comparisons of samples take it."""
    cells = cells_of(family, shared)
    cells.obs["donor"] = np.random.default_rng(1).choice([*CONDITIONS], cells.n_obs)
    cells.obs["condition"] = cells.obs["donor"].map(CONDITIONS)
    return cells


def write(cells: anndata.AnnData, path: Path) -> str:
    """Write cells as h5ad, or as h5mu if they are of several modalities; the file."""
    modalities = list(dict.fromkeys(cells.var["modality"]))
    if len(modalities) == 1:
        path = path.with_suffix(".h5ad")
        cells.write_h5ad(path)
        return str(path)
    path = path.with_suffix(".h5mu")
    whole = mudata.MuData({name: cells[:, cells.var["modality"] == name].copy() for name in modalities})
    whole.obs = cells.obs.copy()
    whole.write_h5mu(path)
    return str(path)
