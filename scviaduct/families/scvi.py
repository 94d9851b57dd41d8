"""SCVI (Lopez et al., Nature Methods 2018): a latent, and labels by neighbours in it."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, override

from scviaduct.families.base import Family
from scviaduct.families.vae import VaeEncoder, fold, read_facts

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from scviaduct.families.base import Encoder, Facts
    from scviaduct.references.saved.archive import SavedModel

LIBRARY = "px_r l_encoder library_log_means library_log_vars"
"""Parts that modules with a library size may have."""
_TAKEN = (
    *("self", "adata", "registry", "datamodule", "kwargs", "model_kwargs"),
    *("n_input", "n_batch", "n_labels", "n_continuous_cov", "n_cats_per_cov"),
    *("use_size_factor_key", "library_log_means", "library_log_vars"),
)
"""Arguments that scvi-tools or the data set, never a user."""


def model_arguments(*functions: Any, without: Iterable[str] = ()) -> dict[str, Any]:
    """Arguments of constructors that a user may set, with their defaults; a later constructor's default wins."""
    found: dict[str, Any] = {}
    for function in functions:
        found |= {key: p.default for key, p in inspect.signature(function).parameters.items()}
    plain = {key: value for key, value in found.items() if value is None or isinstance(value, str | int | float)}
    return {key: value for key, value in plain.items() if key not in (*_TAKEN, *without)}


class ScviFamily(Family):
    """The family of ``scvi.model.SCVI``."""

    name = "SCVI"
    about = "A latent of gene expression, batch effects removed."
    parts = ("z_encoder decoder", f"{LIBRARY} _embeddings_dict")

    @override
    def facts(self, saved: SavedModel) -> Facts:
        """What a saved SCVI is; it gives no labels itself."""
        return read_facts(saved, self.name)

    @override
    def model_class(self) -> Any:
        import scvi

        return scvi.model.SCVI

    @override
    def fold(self, model: Any, facts: Facts, device: str) -> Encoder:
        return VaeEncoder({"latent": fold(model.module, len(facts.genes), facts.labels)}, device)

    @override
    def open(self, path: Path, device: str) -> Encoder:
        return VaeEncoder.open(path, device)

    @override
    def arguments(self) -> Mapping[str, Any]:
        from scvi.module import VAE

        return model_arguments(VAE.__init__, self.model_class().__init__)


FAMILY = ScviFamily()
