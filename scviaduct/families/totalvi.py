"""TOTALVI (Gayoso et al., Nature Methods 2021): a latent of genes and surface proteins of the same cells."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, override

import numpy as np

from scviaduct.errors import InputError, UnsupportedModelError
from scviaduct.families.base import Encoded, Facts, Family, Needs
from scviaduct.families.folding import fold_layers, fold_linear, reads_covariates
from scviaduct.families.layouts import (
    BACKGROUND,
    METHODS,
    flat_of,
    lay_out,
    places_of,
    require_modality,
    set_up,
)
from scviaduct.families.network import Bundle, Network
from scviaduct.families.registered import (
    OTHERS_WEIGHTS,
    common_facts,
    registry_of,
    require_weights,
    state_of,
)
from scviaduct.families.scvi import model_arguments
from scviaduct.families.shapes import require_shape
from scviaduct.families.sparse import CELLS
from scviaduct.families.vae import VaeEncoder, quiet
from scviaduct.values import GeneTable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from anndata import AnnData

    from scviaduct.families.base import Covariates, Encoder
    from scviaduct.families.recipe import Recipe
    from scviaduct.references.saved.archive import SavedModel
    from scviaduct.values import FloatArray, IntArray, LongArray

_FIRST_LAYER = "encoder.encoder.fc_layers.Layer 0.0.weight"
_MEAN = "encoder.z_mean_encoder.weight"
_FIELDS = {"rna": "X", "protein": "proteins"}
_REGISTERED = (
    *("n_input_genes", "n_input_proteins", "n_continuous_cov", "n_cats_per_cov", "protein_batch_mask", "n_panel"),
    *("panel_key", "protein_background_prior_mean", "protein_background_prior_scale", "use_size_factor_key"),
    *("library_log_means", "library_log_vars", "extra_payload_autotune"),
)
"""Arguments of the module that scvi-tools takes from the data."""


class TotalviEncoder(VaeEncoder):
    """Divides each modality's counts by one more than their mean in the cell, as the model does, and encodes them.

    Parameters
    ----------
    network
        Reads genes, then proteins.
    n_genes
        How many are genes.
    device
        ``"cpu"`` or a CUDA device.
    """

    def __init__(self, network: Network, n_genes: int, device: str = "cpu") -> None:
        super().__init__({"latent": network}, device)
        self._n_genes = n_genes

    @classmethod
    @override
    def open(cls, path: Path, device: str) -> TotalviEncoder:
        bundle = Bundle.load(path, device)
        return cls(bundle.networks["latent"], int(bundle.facts["n_genes"]), device)

    @override
    def save(self, path: Path) -> None:
        Bundle({"latent": self._network.to("cpu")}, facts={"n_genes": self._n_genes}).save(path)

    @override
    def encode(self, indptr: LongArray, indices: IntArray, data: FloatArray, covariates: Covariates) -> Encoded:
        scaled = np.empty(len(data), np.float32)
        for start in range(0, len(indptr) - 1, CELLS):  # what scaling needs besides is 30 bytes a count
            pointers = indptr[start : start + CELLS + 1]
            part = slice(int(pointers[0]), int(pointers[-1]))
            scaled[part] = self._scaled(pointers - pointers[0], indices[part], data[part])
        encoded: Encoded = super().encode(indptr, indices, scaled, covariates)
        return encoded

    def _scaled(self, indptr: LongArray, indices: IntArray, data: FloatArray) -> FloatArray:
        n_cells = len(indptr) - 1
        group = 2 * np.repeat(np.arange(n_cells), np.diff(indptr)) + (indices >= self._n_genes)
        sums = np.bincount(group, weights=data, minlength=2 * n_cells).reshape(n_cells, 2)
        means = sums / np.maximum((self._n_genes, self._network.n_genes - self._n_genes), 1)
        scaled: FloatArray = (data / (1 + means).ravel()[group]).astype(np.float32)
        return scaled


class TotalviFamily(Family):
    """The family of ``scvi.model.TOTALVI``. Cells without proteins are encoded as cells of no protein count."""

    name = "TOTALVI"
    about = "A latent of genes and surface proteins measured together (CITE-seq), with denoised proteins."
    needs = Needs(modalities=("rna", "protein"), optional=("protein",), panel=True)
    warmup = 192  # scvi-tools counts steps: three quarters of the cells, in mini-batches of 256
    parts = (
        f"encoder decoder {BACKGROUND}",
        "px_r py_r library_log_means library_log_vars log_per_batch_efficiency",
    )

    @override
    def facts(self, saved: SavedModel) -> Facts:
        registry = registry_of(saved, self.name, *METHODS)
        places = places_of(saved, _FIELDS)
        if tuple(place.modality for place in places) != tuple(_FIELDS):
            raise UnsupportedModelError(f"The {self.name} was not set up with genes and proteins.", OTHERS_WEIGHTS)
        names = tuple(name for place in places for name in place.names)
        modality = tuple(place.modality for place in places for _ in place.names)
        width = require_weights(saved, self.name, _FIRST_LAYER, len(names))
        common = common_facts(registry)
        sizes = [len(common["batch_categories"]), *map(len, common["categorical_covariates"].values())]
        n_latent = require_shape(saved, self.name, _MEAN, None, None)[0]
        return Facts(
            genes=GeneTable({"index": names}, modality),
            n_latent=n_latent,
            latent_sizes={"latent": n_latent},
            encode_covariates=reads_covariates(
                self.name, width, len(names), len(common["continuous_covariates"]), sizes
            ),
            **common | {"layer": places[0].key},
        )

    @override
    def model_class(self) -> Any:
        import scvi

        return scvi.model.TOTALVI

    @override
    def instantiate(self, saved: SavedModel, template: AnnData) -> Any:
        # The prior that training starts from is fitted to the data, 100 mixtures a batch; the weights replace it.
        init = saved.attr_dict["init_params_"]
        told = {**init["non_kwargs"], "empirical_protein_background_prior": False}
        attributes = {**saved.attr_dict, "init_params_": {**init, "non_kwargs": told}}
        with quiet():  # a protein may be called like its gene
            model = super().instantiate(replace(saved, attr_dict=attributes), template)
        if not told.get("override_missing_proteins"):
            # scvi-tools finds which batch measured which protein in the template's counts, which are made up.
            model.module.protein_batch_mask = state_of(saved.attr_dict["registry_"], "proteins").get(
                "protein_batch_mask"
            )
        return model

    @override
    def layout(self, saved: SavedModel, cells: AnnData) -> Any:
        registry = saved.attr_dict["registry_"]
        panel = registry["setup_args"].get("panel_key")
        if panel and panel not in cells.obs:  # decodes proteins, and is not encoded: any known one will do
            known = state_of(registry, "panel")["categorical_mapping"]
            cells = cells.copy()
            cells.obs[panel] = [known[i % len(known)] for i in range(cells.n_obs)]
        return lay_out(cells, places_of(saved, _FIELDS))

    @override
    def flatten(self, saved: SavedModel, data: Any) -> AnnData | None:
        return flat_of(saved, data, places_of(saved, _FIELDS))

    @override
    def fold(self, model: Any, facts: Facts, device: str) -> Encoder:
        module, encoder = model.module, model.module.encoder
        network = Network(
            tuple(fold_layers(encoder.encoder)),
            fold_linear(encoder.z_mean_encoder),
            fold_linear(encoder.z_var_encoder),
            len(facts.genes),
            log_variational=module.log_variational,
            logistic_normal=module.latent_distribution == "ln",
        )
        return TotalviEncoder(network, facts.span("rna").stop, device)

    @override
    def open(self, path: Path, device: str) -> Encoder:
        return TotalviEncoder.open(path, device)

    @override
    @contextmanager
    def fitting(self, model: Any, data: Any) -> Iterator[None]:
        """Count the proteins alone that the query batch has a count of: scvi-tools goes by the reference's batches."""
        module = model.module
        counts = np.asarray(model.get_anndata_manager(data, required=True).get_from_registry("proteins"))
        measured, held = (counts > 0).any(axis=0), module.protein_batch_mask
        module.protein_batch_mask = {str(i): measured for i in range(max(module.n_panel, 1))}
        try:
            yield
        finally:
            module.protein_batch_mask = held

    @override
    def arguments(self) -> Mapping[str, Any]:
        from scvi.module import TOTALVAE

        return model_arguments(TOTALVAE.__init__, self.model_class().__init__, without=_REGISTERED)

    @override
    def setup(self, cells: AnnData, recipe: Recipe) -> Any:
        require_modality(cells, self.name, "protein")
        require_modality(cells, self.name, "rna")
        if recipe.panel_key:
            panels = cells.obs[recipe.panel_key].nunique()
            batches = cells.obs[recipe.batch_key].nunique() if recipe.batch_key else 1
            if panels != batches:  # scvi-tools 1.5.1 multiplies one-hot batches with a column a panel
                raise InputError(
                    f"'{recipe.panel_key}' has {panels} panels and there are {batches} batches: scvi-tools fails unless"
                    " they are as many.",
                    "Name a --batch-key of as many, or leave --panel-key out: each batch is then a panel of its own.",
                )
        own = {"size_factor_key": recipe.size_factor_key, "panel_key": recipe.panel_key}
        return set_up(self.model_class(), cells, recipe, self.needs.modalities, **own)


FAMILY = TotalviFamily()
