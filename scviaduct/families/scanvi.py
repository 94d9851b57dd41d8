"""SCANVI (Xu et al., Molecular Systems Biology 2021): a latent, and a classifier on it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from scviaduct.errors import UnsupportedModelError
from scviaduct.families.network import Network
from scviaduct.families.scvi import ScviFamily
from scviaduct.families.vae import VaeEncoder, fold, instantiate, read_facts

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from anndata import AnnData

    from scviaduct.families.base import Encoder, Facts
    from scviaduct.references.archive import SavedModel


class ScanviFamily:
    """The family of ``scvi.model.SCANVI``."""

    name = "SCANVI"

    def facts(self, saved: SavedModel) -> Facts:
        """What a saved SCANVI is. Its labels are those of the classifier, without the unlabelled category.

        Raises
        ------
        UnsupportedModelError
            If the classifier gives another number of labels than the registry names.
        """
        facts = read_facts(saved, self.name)
        fields = saved.attr_dict["registry_"]["field_registries"]
        mapping = [str(label) for label in fields["labels"]["state_registry"]["categorical_mapping"]]
        labels = tuple(label for label in mapping if label != facts.unlabeled_category)
        biases = [key for key in saved.state_dict if key.startswith("classifier.") and key.endswith(".bias")]
        width = len(saved.state_dict[biases[-1]]) if biases else 0
        # scvi-tools puts the unlabelled category last, and names the classifier's outputs by position.
        if width != len(labels) or tuple(mapping[:width]) != labels:
            raise UnsupportedModelError(
                f"The classifier gives {width} labels, the registry names {len(labels)} ({', '.join(mapping[:8])}).",
                "Train it again with a current scvi-tools.",
            )
        return replace(facts, labels=labels)

    def load(self, saved: SavedModel, template: AnnData, device: str) -> Encoder:
        """Instantiate a saved SCANVI; one of before 1.1 gives probabilities instead of logits, and is read as such."""
        import scvi

        model = instantiate(scvi.model.SCANVI, saved, template)
        return VaeEncoder(fold(model.module, len(saved.var_names), self.facts(saved).labels), device)

    def open(self, path: Path, device: str) -> Encoder:
        """Read an encoder that :meth:`~scviaduct.families.vae.VaeEncoder.save` wrote; needs no scvi-tools."""
        return VaeEncoder(Network.load(path, device), device)

    def arguments(self) -> Mapping[str, Any]:
        """Model arguments that training takes, with their defaults: those of the SCVI that it starts from."""
        return ScviFamily().arguments()
