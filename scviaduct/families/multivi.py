"""MULTIVI (Ashuach et al., Nature Methods 2023): one latent of genes, peaks and proteins, of cells with any of them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, override

import numpy as np
import torch

from scviaduct.errors import InputError, UnsupportedModelError
from scviaduct.families.base import MODALITY, Encoded, Facts, Family, Needs
from scviaduct.families.folding import fold_encoder, reads_covariates
from scviaduct.families.layouts import (
    BACKGROUND,
    METHODS,
    flat_of,
    lay_out,
    places_of,
    require_modality,
    set_up,
)
from scviaduct.families.network import Bundle
from scviaduct.families.precision import exactly
from scviaduct.families.registered import OTHERS_WEIGHTS, common_facts, registry_of, require_weights, state_of, texts
from scviaduct.families.rowwise import padded, rows_of
from scviaduct.families.scvi import model_arguments
from scviaduct.families.shapes import require_shape
from scviaduct.families.vae import VaeEncoder, quiet
from scviaduct.values import GeneTable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from anndata import AnnData

    from scviaduct.families.base import Covariates, Encoder
    from scviaduct.families.network import Network
    from scviaduct.families.recipe import Recipe
    from scviaduct.references.saved.archive import SavedModel
    from scviaduct.values import FloatArray, IntArray, LongArray

_FIELDS = {"rna": "X", "atac": "atac", "protein": "proteins"}
_LATENTS = {"rna": "expression", "atac": "accessibility", "protein": "protein"}
"""Modality to the name of its own latent, in the order of the weights that mix them."""
_SIZES = "l_encoder_expression l_encoder_accessibility"
_MISSING = 1e-30
"""What a modality that was not measured weighs instead, and what scvi-tools adds to the sum of the weights."""
_REGISTERED = (
    *("n_input_regions", "n_input_genes", "n_input_proteins", "n_obs", "n_genes", "n_regions", "n_continuous_cov"),
    *("n_cats_per_cov", "gene_dispersion", "use_size_factor_key", "extra_payload_autotune"),
    *("protein_background_prior_mean", "protein_background_prior_scale"),
)
"""Arguments of the module that the class sets itself, or takes from the data."""


class MultiviEncoder(VaeEncoder):
    """A network per modality, each on its own features; the latent is their mean, weighed over what was measured.

    Parameters
    ----------
    networks
        Name of each modality's latent to the network that gives it.
    weights
        float32, shape ``(3,)``: logits of the weights of genes, peaks and proteins.
    device
        ``"cpu"`` or a CUDA device.
    """

    def __init__(self, networks: Mapping[str, Network], weights: torch.Tensor, device: str = "cpu") -> None:
        super().__init__(networks, device)
        self._there = None  # each network reads features of its own, and is run here
        self._weights = weights.to(device)
        self._first = next(iter(networks))
        # What one modality gives alone is the latent itself.
        self.latents = ("latent", *(networks if len(networks) > 1 else ()))

    @classmethod
    @override
    def open(cls, path: Path, device: str) -> MultiviEncoder:
        bundle = Bundle.load(path, device)
        return cls(bundle.networks, bundle.tensors["weights"], device)

    @override
    def save(self, path: Path) -> None:
        networks = {name: network.to("cpu") for name, network in self._networks.items()}
        Bundle(networks, {"weights": self._weights.cpu()}).save(path)

    @override
    @torch.inference_mode()
    def encode(self, indptr: LongArray, indices: IntArray, data: FloatArray, covariates: Covariates) -> Encoded:
        n_cells = len(indptr) - 1
        shape = (n_cells, self.n_latent)
        mean, location, variance = (np.empty(shape, np.float32) for _ in range(3))
        others = {name: np.empty(shape, np.float32) for name in self.latents[1:]}
        for start in range(0, n_cells, self._step):
            stop = min(start + self._step, n_cells)
            low, high = int(indptr[start]), int(indptr[stop])
            n_rows = rows_of(stop - start, self._step, self._device)
            rows = (padded(indptr[start : stop + 1] - low, n_rows + 1), indices[low:high], data[low:high])
            with exactly(self._device):
                parts, measured = self._parts(rows, *self._read(covariates, slice(start, stop), n_rows))
            mixed, spread = (part[: stop - start] for part in self._mixed(parts, measured))
            location[start:stop], variance[start:stop] = mixed.cpu().numpy(), spread.cpu().numpy()
            mean[start:stop] = self._transformed(mixed).cpu().numpy()
            for name in others:
                others[name][start:stop] = self._transformed(parts[name][0][: stop - start]).cpu().numpy()
        return Encoded(mean, location, variance, others)

    def _parts(
        self, rows: tuple[LongArray, IntArray, FloatArray], codes: list[Any], numbers: Any
    ) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, torch.Tensor]]:
        """Mean and variance of each modality's latent, and in which cells it has a count."""
        indptr, indices, data = rows
        parts, measured = {}, {}
        for name, network in self._networks.items():
            end = network.offset + network.n_genes
            own = np.flatnonzero((indices >= network.offset) & (indices < end))
            pointers, counts = np.searchsorted(own, indptr), data[own]
            sums = np.diff(np.concatenate([[0.0], np.cumsum(counts, dtype=np.float64)])[pointers])
            features = self._given(indices[own] - network.offset)
            parts[name] = self._encoders[name](self._given(pointers), features, self._given(counts), codes, numbers)
            measured[name] = self._tensor(sums > 0)
        return parts, measured

    def _mixed(
        self, parts: Mapping[str, tuple[torch.Tensor, torch.Tensor]], measured: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``mix_modalities`` of scvi-tools, which takes the root of the weights for the variance."""
        none = torch.zeros_like(measured[self._first])
        there = torch.stack([measured.get(name, none) for name in _LATENTS.values()], dim=1)
        shares = torch.where(there, torch.exp(self._weights), _MISSING)
        shares = shares / (shares.sum(dim=1, keepdim=True) + _MISSING)
        mean, variance = torch.zeros_like(parts[self._first][0]), torch.zeros_like(parts[self._first][1])
        for i, name in enumerate(_LATENTS.values()):
            if name in parts:
                mean += shares[:, i, None] * parts[name][0]
                variance += shares[:, i, None].sqrt() * parts[name][1]
        return mean, variance

    def _transformed(self, location: torch.Tensor) -> torch.Tensor:
        return torch.softmax(location, dim=-1) if self._network.logistic_normal else location

    @override
    def gene_influence(self) -> FloatArray:
        """L2 norm of each feature's weights in the first layer that reads it, shape ``(n_features,)``."""
        norms = [part.layers[0].weight[:, : part.n_genes].norm(dim=0) for part in self._networks.values()]
        found: FloatArray = torch.cat(norms).cpu().numpy()
        return found


class MultiviFamily(Family):
    """The family of ``scvi.model.MULTIVI``; cells may have any of its modalities."""

    name = "MULTIVI"
    about = "One latent of genes, peaks and proteins (multiome), of cells that have all of them or one."
    needs = Needs(("rna", "atac", "protein"), optional=("rna", "atac", "protein"), size_factor=False)
    monitor = "reconstruction_loss_validation"
    warmup = 50
    parts = (
        "z_encoder_expression z_encoder_accessibility z_decoder_expression z_decoder_accessibility",
        f"px_r py_r region_factors mod_weights z_encoder_protein z_decoder_pro {BACKGROUND} {_SIZES}",
    )

    @override
    def facts(self, saved: SavedModel) -> Facts:
        common = common_facts(registry_of(saved, self.name, *METHODS))
        saved = current(saved)
        places = places_of(saved, _FIELDS)
        sizes = [len(common["batch_categories"]), *map(len, common["categorical_covariates"].values())]
        reads = []
        for modality, latent in _LATENTS.items():
            own = sum(len(place.names) for place in places if place.modality == modality)
            first = f"z_encoder_{latent}.encoder.fc_layers.Layer 0.0.weight"
            # Without features, scvi-tools makes an encoder of one, which is always zero and never counts.
            width = require_weights(saved, self.name, first, max(own, 1))
            reads.append(reads_covariates(self.name, width, max(own, 1), len(common["continuous_covariates"]), sizes))
        self._check_weights(saved)
        n_latent = require_shape(saved, self.name, "z_encoder_expression.mean_encoder.weight", None, None)[0]
        own_latents = [_LATENTS[place.modality] for place in places if len(places) > 1]
        return Facts(
            genes=GeneTable(
                {"index": tuple(name for place in places for name in place.names)},
                tuple(place.modality for place in places for _ in place.names),
            ),
            n_latent=n_latent,
            latent_sizes=dict.fromkeys(["latent", *own_latents], n_latent),
            encode_covariates=any(reads),
            **common | {"size_factor_key": "", "layer": common["layer"] or places[0].key},
        )

    def _check_weights(self, saved: SavedModel) -> None:
        weights = saved.state_dict.get("mod_weights")
        if weights is not None and weights.ndim == 2:
            raise UnsupportedModelError(
                f"The {self.name} has modality_weights='cell': it learnt how to weigh modalities for each of its"
                f" {len(weights):,} training cells, and for no other cell.",
                "Train it with modality_weights equal or universal.",
            )
        if weights is None or tuple(weights.shape) != (len(_LATENTS),):
            raise UnsupportedModelError(
                f"The weights are not those of a {self.name} of today: 'mod_weights' is"
                f" {'missing' if weights is None else tuple(weights.shape)}.",
                OTHERS_WEIGHTS,
            )

    @override
    def model_class(self) -> Any:
        import scvi

        return scvi.model.MULTIVI

    @override
    def instantiate(self, saved: SavedModel, template: AnnData) -> Any:
        with quiet():  # a protein may be called like its gene
            return super().instantiate(current(saved), template)

    @override
    def layout(self, saved: SavedModel, cells: AnnData) -> Any:
        """Flat cells as a MuData; one that was set up from an AnnData is one to scvi-tools 1.4 and later, too."""
        saved = current(saved)
        sizes = np.atleast_1d(saved.attr_dict["registry_"]["setup_args"].get("size_factor_key") or [])
        missing = [key for key in sizes if key not in cells.obs]
        if missing:  # facts name no column of them, and no encoder reads them
            cells = cells.copy()
            cells.obs[missing] = 1.0
        data = lay_out(cells, places_of(saved, _FIELDS))
        data.obs["_indices"] = np.arange(data.n_obs)  # scvi-tools numbers training cells, and asks others for it
        return data

    @override
    def flatten(self, saved: SavedModel, data: Any) -> AnnData | None:
        flat = flat_of(saved, data, places_of(saved, _FIELDS))
        modality = self.facts(saved).genes.modality
        if flat is not None and flat.n_vars == len(modality):  # an AnnData has genes and peaks in one X
            flat.var[MODALITY] = list(modality)
        return flat

    @override
    def fold(self, model: Any, facts: Facts, device: str) -> Encoder:
        networks = {}
        for modality, latent in _LATENTS.items():
            span = facts.span(modality)
            if modality in facts.genes.modality:
                encoder = getattr(model.module, f"z_encoder_{latent}")
                network = fold_encoder(encoder, span.stop - span.start, log_variational=False)
                networks[latent] = replace(network, offset=span.start)
        return MultiviEncoder(networks, model.module.mod_weights.detach().clone(), device)

    @override
    def open(self, path: Path, device: str) -> Encoder:
        return MultiviEncoder.open(path, device)

    @override
    def arguments(self) -> Mapping[str, Any]:
        from scvi.module import MULTIVAE

        return model_arguments(MULTIVAE.__init__, self.model_class().__init__, without=_REGISTERED)

    @override
    def setup(self, cells: AnnData, recipe: Recipe) -> Any:
        require_modality(cells, self.name, "rna", "atac")
        return set_up(self.model_class(), cells, recipe, self.needs.modalities)

    @override
    def create(self, data: Any, arguments: Mapping[str, Any], recipe: Recipe, start: Any = None) -> Any:
        if arguments.get("modality_weights") == "cell":
            raise InputError(
                "modality_weights=cell learns how to weigh modalities for each training cell, and for no other.",
                "--set modality_weights=universal learns it for all cells.",
            )
        return super().create(data, arguments, recipe, start)


def current(saved: SavedModel) -> SavedModel:
    """A model that was set up from an AnnData as if it were from a MuData; scvi-tools cannot do the former since 1.4.

    Its ``X`` holds genes, then peaks; how many of each are arguments of the model.

    Raises
    ------
    UnsupportedModelError
        If those numbers are not there, or not those of its features.
    """
    registry = registry_of(saved, "MULTIVI", *METHODS)
    if registry.get("setup_method_name") == "setup_mudata":
        return saved
    init = saved.attr_dict["init_params_"]
    told = init.get("non_kwargs", init)
    names, n_genes, n_regions = texts(saved.var_names), told.get("n_genes"), told.get("n_regions")
    if not isinstance(n_genes, int) or not isinstance(n_regions, int) or n_genes + n_regions != len(names):
        raise UnsupportedModelError(
            f"The MULTIVI names {len(names):,} features, of which {n_genes} are genes and {n_regions} are peaks.",
            "Load and save it with the scvi-tools that made it.",
        )
    own = {"rna": names[:n_genes], "atac": names[n_genes:]}
    own["protein"] = texts(state_of(registry, "proteins").get("column_names", ()))
    own = {modality: features for modality, features in own.items() if features}
    fields = {key: value for key, value in registry["field_registries"].items() if key not in _FIELDS.values()}
    for modality, features in own.items():
        fields[_FIELDS[modality]] = {
            "data_registry": {"attr_name": "X", "attr_key": None, "mod_key": modality},
            "state_registry": {"n_vars": len(features), "column_names": list(features)},
        }
    kept = ("batch_key", "size_factor_key", "categorical_covariate_keys", "continuous_covariate_keys")
    setup = {key: registry["setup_args"].get(key) for key in kept}
    setup["modalities"] = {f"{modality}_layer": modality for modality in own}
    changed = {**registry, "setup_method_name": "setup_mudata", "setup_args": setup, "field_registries": fields}
    return replace(saved, var_names=own, attr_dict={**saved.attr_dict, "registry_": changed})


FAMILY = MultiviFamily()
