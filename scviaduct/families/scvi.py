"""SCVI (Lopez et al., Nature Methods 2018): a latent, and labels by neighbours in it."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from scviaduct.families.network import Network
from scviaduct.families.vae import VaeEncoder, fold, instantiate, read_facts

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from anndata import AnnData

    from scviaduct.families.base import Encoder, Facts
    from scviaduct.references.archive import SavedModel


class ScviFamily:
    """The family of ``scvi.model.SCVI``."""

    name = "SCVI"

    def facts(self, saved: SavedModel) -> Facts:
        """What a saved SCVI is; it gives no labels itself."""
        return read_facts(saved, self.name)

    def load(self, saved: SavedModel, template: AnnData, device: str) -> Encoder:
        """Instantiate a saved SCVI."""
        import scvi

        model = instantiate(scvi.model.SCVI, saved, template)
        return VaeEncoder(fold(model.module, len(saved.var_names), ()), device)

    def open(self, path: Path, device: str) -> Encoder:
        """Read an encoder that :meth:`~scviaduct.families.vae.VaeEncoder.save` wrote; needs no scvi-tools."""
        return VaeEncoder(Network.load(path, device), device)

    def arguments(self) -> Mapping[str, Any]:
        """Model arguments that training takes, with their defaults."""
        import scvi
        from scvi.module import VAE

        taken = ("self", "adata", "registry", "datamodule", "kwargs", "n_input", "n_batch", "n_labels")
        found: dict[str, Any] = {}
        for signature in (inspect.signature(VAE.__init__), inspect.signature(scvi.model.SCVI.__init__)):
            found |= {key: p.default for key, p in signature.parameters.items() if key not in taken}
        return {key: value for key, value in found.items() if value is None or isinstance(value, str | int | float)}
