"""POISSONVI (Martens et al., Nature Methods 2024): a latent of fragment counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, override

import numpy as np

from scviaduct.errors import InputError
from scviaduct.families.base import Family, Needs
from scviaduct.families.scvi import model_arguments
from scviaduct.families.vae import VaeEncoder, fold, read_facts

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from anndata import AnnData

    from scviaduct.families.base import Encoder, Facts
    from scviaduct.families.recipe import Recipe
    from scviaduct.references.saved.archive import SavedModel

_FIXED = ("dispersion", "gene_likelihood", "use_batch_norm", "use_layer_norm")
_REGISTERED = ("n_continuous_cov", "n_cats_per_cov", "use_size_factor_key", "library_log_means", "library_log_vars")
"""Arguments of the module that the class sets itself, or takes from the data."""

_LEAST_CELLS = 100
"""scvi-tools looks at as many to see whether counts are of fragments, and fails on fewer."""


class PoissonviFamily(Family):
    """The family of ``scvi.external.POISSONVI``: the module of SCVI, on peaks."""

    name = "POISSONVI"
    module = "scvi.external"
    about = "A latent of fragment counts in peaks, depth and batch effects removed."
    needs = Needs(modalities=("atac",))

    @override
    def facts(self, saved: SavedModel) -> Facts:
        return read_facts(saved, self.name, "atac")

    @override
    def model_class(self) -> Any:
        import scvi.external

        return scvi.external.POISSONVI

    @override
    def fold(self, model: Any, facts: Facts, device: str) -> Encoder:
        return VaeEncoder({"latent": fold(model.module, len(facts.genes), ())}, device)

    @override
    def open(self, path: Path, device: str) -> Encoder:
        return VaeEncoder.open(path, device)

    @override
    def arguments(self) -> Mapping[str, Any]:
        from scvi.module import VAE

        taken = (*_FIXED, *_REGISTERED, "extra_encoder_kwargs", "extra_decoder_kwargs")
        return model_arguments(VAE.__init__, self.model_class().__init__, without=taken)

    @override
    def layout(self, saved: SavedModel, cells: AnnData) -> AnnData:
        from anndata import AnnData

        if cells.n_obs < _LEAST_CELLS:  # a template has 16
            rows = np.resize(np.arange(cells.n_obs), _LEAST_CELLS)
            obs = cells.obs.iloc[rows].set_axis([f"cell-{i}" for i in range(_LEAST_CELLS)], axis=0)
            cells = AnnData(cells.X[rows], obs=obs, var=cells.var)
        laid: AnnData = super().layout(saved, cells)
        return laid

    @override
    def setup(self, cells: AnnData, recipe: Recipe) -> AnnData:
        if cells.n_obs < _LEAST_CELLS:
            raise InputError(f"A POISSONVI needs {_LEAST_CELLS} cells, and there are {cells.n_obs}.", "Add cells.")
        data: AnnData = super().setup(cells, recipe)
        return data


FAMILY = PoissonviFamily()
