"""ContrastiveVI (Weinberger et al., Nature Methods 2023): what perturbed cells share with controls, and what not.

Two encoders read the same counts. ``background`` is the variation that target cells share with background cells
(controls); ``salient`` is what only target cells have. Cells are placed by ``background``: it is fitted to every cell,
so that neighbours in it are cells of the same state whatever was done to them, and labels can be carried along it.
In training the decoder is given zero for a background cell's ``salient``; the encoder is not told to give it, unless
there is a ``wasserstein_penalty``, and controls lie in one heap, not at zero.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, override

import numpy as np

from scviaduct.errors import InputError
from scviaduct.families.base import Family, Needs
from scviaduct.families.columns import alike, fill, obs_column, require_read
from scviaduct.families.folding import fold_encoder
from scviaduct.families.registered import state_of
from scviaduct.families.scvi import LIBRARY, model_arguments
from scviaduct.families.shapes import require_shape
from scviaduct.families.vae import VaeEncoder, read_facts

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy.typing as npt
    from anndata import AnnData

    from scviaduct.families.base import Encoder, Facts
    from scviaduct.families.recipe import Recipe
    from scviaduct.references.saved.archive import SavedModel

_ENCODERS = {"background": "z_encoder", "salient": "s_encoder"}
"""Latent to what gives it, the main one first."""


def background_pairs(recipe: Recipe) -> tuple[tuple[str, str], ...]:
    """The obs columns and values that make a cell one of the background.

    Raises
    ------
    InputError
        If the recipe names none, or something else than ``column=value``.
    """
    if not recipe.background:
        raise InputError(
            "A ContrastiveVI needs background cells (controls), and none are named.",
            "Name their column and value: --background perturbation=control.",
        )
    pairs = []
    for told in recipe.background:
        column, equals, value = told.partition("=")
        if not (column and equals and value):
            raise InputError(
                f"--background {told}: it is not a column and a value.", "E.g. --background perturbation=control."
            )
        pairs.append((column, value))
    return tuple(pairs)


def background_cells(cells: AnnData, recipe: Recipe) -> npt.NDArray[np.bool_]:
    """Which cells are of the background: those that any of the recipe's pairs fits.

    Returns
    -------
    numpy.ndarray
        bool, shape ``(n_cells,)``.

    Raises
    ------
    InputError
        If a column or a value is not there, or if all cells are of the background.
    """
    chosen = np.zeros(cells.n_obs, bool)
    for name, value in background_pairs(recipe):
        column = obs_column(cells, name, f"--background {name}={value}")
        # A missing value would be the text "nan".
        fits = ((column.astype(str) == value) & column.notna()).to_numpy()
        if not fits.any():
            remedy = f"There are: {alike(value, column.dropna().unique())}."
            raise InputError(f"--background {name}={value}: no cell has '{value}' in '{name}'.", remedy)
        chosen |= fits
    if chosen.all():
        raise InputError(
            f"--background {' '.join(recipe.background)}: all {cells.n_obs:,} cells are of the background, and none is"
            " left as the target.",
            "Name the controls only, e.g. --background perturbation=control.",
        )
    return chosen


class ContrastiveViFamily(Family):
    """The family of ``scvi.external.ContrastiveVI``."""

    name = "ContrastiveVI"
    module = "scvi.external"
    about = "What target cells, e.g. perturbed ones, share with background cells, and what they alone have."
    needs = Needs(background=True, size_factor=False, covariates=False)
    parts = ("z_encoder s_encoder decoder", LIBRARY)
    surgery = "of scviaduct alone: scvi-tools has none for a ContrastiveVI"

    @override
    def facts(self, saved: SavedModel) -> Facts:
        """What a saved ContrastiveVI is: its covariates are left out, because it registers and never reads them.

        Raises
        ------
        UnsupportedModelError
            If an encoder is missing, or of another width than the genes and batches that were registered.
        """
        facts = read_facts(saved, self.name)
        batches = len(state_of(saved.attr_dict["registry_"], "batch").get("categorical_mapping", ()))
        width = len(facts.genes) + (batches if batches > 1 else 0)
        sizes = {}
        for latent, encoder in _ENCODERS.items():
            first = f"{encoder}.encoder.fc_layers.Layer 0.0.weight"
            require_shape(saved, self.name, first, None, width)
            sizes[latent], _ = require_shape(saved, self.name, f"{encoder}.mean_encoder.weight", None, None)
        return replace(facts, latent_sizes=sizes, categorical_covariates={}, continuous_covariates=())

    @override
    def model_class(self) -> Any:
        from scvi.external import ContrastiveVI

        return ContrastiveVI

    @override
    def layout(self, saved: SavedModel, cells: AnnData) -> Any:
        """Cells with the covariates that were registered, if any: scvi-tools asks for them, and nothing reads them."""
        registry = saved.attr_dict["registry_"]
        mappings = state_of(registry, "extra_categorical_covs").get("mappings", {})
        fill(cells, {key: values[0] for key, values in mappings.items()})
        fill(cells, dict.fromkeys(state_of(registry, "extra_continuous_covs").get("columns", ()), 0.0))
        return super().layout(saved, cells)

    @override
    def setup(self, cells: AnnData, recipe: Recipe) -> Any:
        """Register training cells.

        Raises
        ------
        InputError
            If the recipe names no background, one that is not there, or what a ContrastiveVI does not read.
        """
        require_read(self, recipe)
        background_cells(cells, recipe)
        return super().setup(cells, recipe)

    @override
    def training(self, data: AnnData, recipe: Recipe) -> dict[str, Any]:
        chosen = background_cells(data, recipe)
        return {
            "background_indices": np.flatnonzero(chosen).tolist(),
            "target_indices": np.flatnonzero(~chosen).tolist(),
        }

    @override
    def fold(self, model: Any, facts: Facts, device: str) -> Encoder:
        networks = {
            latent: fold_encoder(getattr(model.module, encoder), len(facts.genes), log_variational=True)
            for latent, encoder in _ENCODERS.items()
        }
        return VaeEncoder(networks, device)

    @override
    def open(self, path: Path, device: str) -> Encoder:
        return VaeEncoder.open(path, device)

    @override
    def loss(self, module: Any, tensors: Mapping[str, Any], kl_weight: float = 1.0) -> Any:
        """The loss of scvi-tools for cells of which each says whether it is one of the background.

        scvi-tools takes the mean over background cells plus that over as many target cells. So it is here for any
        numbers of both, and for none of one: a query may have no controls.
        """
        import torch

        background, batch = tensors["background"], tensors["batch"]
        inferred = module._generic_inference(x=tensors["X"], batch_index=batch)  # noqa: SLF001 - what its loss is made of
        inferred["s"] = torch.where(background[:, None], torch.zeros_like(inferred["s"]), inferred["s"])
        latents = {name: inferred[name] for name in ("z", "s", "library")}
        decoded = module._generic_generative(**latents, batch_index=batch)  # noqa: SLF001
        terms = module._generic_loss(tensors, inferred, decoded)  # noqa: SLF001
        # A control's salient posterior is pulled to a point at zero: squared mean and variance are its distance.
        pulled = torch.linalg.vector_norm(inferred["qs_m"], dim=-1) ** 2 + inferred["qs_v"].sum(dim=-1)
        salient = torch.where(background, module.wasserstein_penalty * pulled, terms["kl_s"])
        cells = terms["recon_loss"] + kl_weight * (terms["kl_z"] + salient) + terms["kl_library"]
        return torch.stack([cells[kind].mean() for kind in (background, ~background) if bool(kind.any())]).sum()

    @override
    def arguments(self) -> Mapping[str, Any]:
        return model_arguments(self.model_class().__init__)


FAMILY = ContrastiveViFamily()
