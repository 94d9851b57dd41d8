"""SCANVI (Xu et al., Molecular Systems Biology 2021): a latent, and a classifier on it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, override

from scviaduct.errors import UnsupportedModelError
from scviaduct.families import scvi as base
from scviaduct.families.base import Needs
from scviaduct.families.registered import state_of, texts
from scviaduct.families.slots import slots_of
from scviaduct.families.vae import read_facts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from scviaduct.families.base import Facts
    from scviaduct.families.recipe import Recipe
    from scviaduct.families.slots import Slot
    from scviaduct.references.saved.archive import SavedModel


class ScanviFamily(base.ScviFamily):
    """The family of ``scvi.model.SCANVI``; one of before 1.1 gives probabilities instead of logits, and is read so."""

    name = "SCANVI"
    about = "The latent of SCVI, shaped by labels, and a classifier of them."
    needs = Needs(labels="required")
    starts_from = "SCVI"
    parts = (
        "z_encoder decoder classifier encoder_z2_z1 decoder_z1_z2",
        f"{base.LIBRARY} _embeddings_dict y_prior labels_groups",
    )

    @override
    def facts(self, saved: SavedModel) -> Facts:
        """What a saved SCANVI is. Its labels are those of the classifier, without the unlabelled category.

        Raises
        ------
        UnsupportedModelError
            If the classifier gives another number of labels than the registry names.
        """
        facts = read_facts(saved, self.name)
        mapping = texts(state_of(saved.attr_dict["registry_"], "labels")["categorical_mapping"])
        labels = tuple(label for label in mapping if label != facts.unlabeled_category)
        biases = [key for key in saved.state_dict if key.startswith("classifier.") and key.endswith(".bias")]
        width = len(saved.state_dict[biases[-1]]) if biases else 0
        # scvi-tools puts the unlabelled category last, and names the classifier's outputs by position.
        if width != len(labels) or mapping[:width] != labels:
            raise UnsupportedModelError(
                f"The classifier gives {width} labels, the registry names {len(labels)} ({', '.join(mapping[:8])}).",
                "Train it again with a current scvi-tools.",
            )
        return replace(facts, labels=labels)

    @override
    def model_class(self) -> Any:
        import scvi

        return scvi.model.SCANVI

    @override
    def slots(self, model: Any, facts: Facts) -> tuple[Slot, ...]:
        # What these read is the label.
        return slots_of(model.module, facts, skip=("encoder_z2_z1", "decoder_z1_z2", "classifier"))

    @override
    def arguments(self) -> Mapping[str, Any]:
        """Those of the SCVI that it starts from."""
        return base.FAMILY.arguments()

    @override
    def create(self, data: Any, arguments: Mapping[str, Any], recipe: Recipe, start: Any = None) -> Any:
        return self.model_class().from_scvi_model(start, unlabeled_category=recipe.unlabeled_category)

    @override
    def training(self, data: Any, recipe: Recipe) -> dict[str, Any]:
        from scvi.train._callbacks import SubSampleLabels

        # scvi-tools drops its own, which draws labelled cells anew each epoch, once it is given any callback.
        return {"n_samples_per_label": recipe.samples_per_label, "callbacks": [SubSampleLabels()]}


FAMILY = ScanviFamily()
