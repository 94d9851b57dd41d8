"""PEAKVI (Ashuach et al., Cell Reports Methods 2022): a latent of chromatin accessibility."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, override

from scviaduct.families.base import Family, Needs
from scviaduct.families.folding import fold_encoder, reads_covariates
from scviaduct.families.registered import require_weights
from scviaduct.families.scvi import model_arguments
from scviaduct.families.vae import VaeEncoder, read_facts

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from scviaduct.families.base import Encoder, Facts
    from scviaduct.references.saved.archive import SavedModel

_FIRST_LAYER = "z_encoder.encoder.fc_layers.Layer 0.0.weight"
_REGISTERED = ("n_input_regions", "n_continuous_cov", "n_cats_per_cov")
"""Arguments of the module that scvi-tools takes from the data."""


class PeakviFamily(Family):
    """The family of ``scvi.model.PEAKVI``. Its encoder reads counts as they are, without a logarithm."""

    name = "PEAKVI"
    about = "A latent of chromatin accessibility, depth and batch effects removed."
    needs = Needs(modalities=("atac",), size_factor=False)
    monitor = "reconstruction_loss_validation"
    warmup = 50
    parts = ("z_encoder z_decoder", "d_encoder region_factors")

    @override
    def facts(self, saved: SavedModel) -> Facts:
        facts = read_facts(saved, self.name, "atac")
        width = require_weights(saved, self.name, _FIRST_LAYER, len(facts.genes))
        sizes = [len(facts.batch_categories), *map(len, facts.categorical_covariates.values())]
        reads = reads_covariates(self.name, width, len(facts.genes), len(facts.continuous_covariates), sizes)
        return replace(facts, encode_covariates=reads)

    @override
    def model_class(self) -> Any:
        import scvi

        return scvi.model.PEAKVI

    @override
    def fold(self, model: Any, facts: Facts, device: str) -> Encoder:
        network = fold_encoder(model.module.z_encoder, len(facts.genes), log_variational=False)
        return VaeEncoder({"latent": network}, device)

    @override
    def open(self, path: Path, device: str) -> Encoder:
        return VaeEncoder.open(path, device)

    @override
    def arguments(self) -> Mapping[str, Any]:
        from scvi.module import PEAKVAE

        return model_arguments(PEAKVAE.__init__, self.model_class().__init__, without=_REGISTERED)


FAMILY = PeakviFamily()
