"""Where a module of scvi-tools keeps what it knows of each category: a column of a layer, a row of an embedding.

scArches surgery (Lotfollahi et al., Nature Biotechnology 2022) adds such slots for new categories and trains them
alone. Everything that is done with them here (fitting, folding into an encoder, widening a model) goes by this list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scviaduct.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from scviaduct.families.base import Facts

BATCH, SAMPLE = "batch", "sample"
"""Names of two covariates; a categorical covariate is named by :func:`covariate`."""


def covariate(column: str) -> str:
    """Name of a categorical covariate: apart from batch and sample, whatever its column is called."""
    return f"covariate:{column}"


@dataclass(frozen=True, slots=True)
class Slot:
    """The categories of one covariate in one tensor of a module.

    Attributes
    ----------
    name
        Of the parameter or buffer, as in the state dict.
    dim
        Dimension along which categories lie.
    start
        Position of the first category.
    count
        Categories that it has. None (0) for a covariate of a single one in a layer of scvi-tools, which gives it no
        column: as if it were zero.
    covariate
        ``batch``, ``sample``, or what :func:`covariate` gives.
    fitted
        Whether surgery trains it. Others hold what is counted from data: cells of a sample, mean and variance of a
        batch's log library size.
    """

    name: str
    dim: int
    start: int
    count: int
    covariate: str
    fitted: bool = True


def slots_of(module: Any, facts: Facts, skip: Sequence[str] = ()) -> tuple[Slot, ...]:
    """Slots of a module of scvi-tools' VAE.

    Parameters
    ----------
    module
        Of a loaded model.
    facts
        Of the same model.
    skip
        Parts of the module whose categories are not covariates: labels, as a rule.

    Raises
    ------
    UnsupportedModelError
        If a layer reads other covariates than the facts name.
    """
    from scvi.nn import FCLayers

    names = (BATCH, *map(covariate, facts.categorical_covariates))
    found: list[Slot] = []
    for path, part in module.named_modules():
        if isinstance(part, FCLayers) and not path.startswith(tuple(skip)):
            found += _of_layers(path, part, names)
    if facts.batch_key:
        found += _of_batch(module, len(facts.batch_categories))
    # A model without a batch key has one batch, which cannot be told from another.
    return tuple(slot for slot in found if facts.batch_key or slot.covariate != BATCH)


def _of_layers(path: str, layers: Any, names: Sequence[str]) -> Iterator[Slot]:
    sizes = layers.n_cat_list
    if not sizes:
        return
    # With an embedding of batches, layers read it among the numbers, and the batch is no category to them.
    own = names[len(names) - len(sizes) :]
    if len(own) != len(sizes):
        raise UnsupportedModelError(
            f"Layer '{path}' reads {len(sizes)} categorical covariates, and the model was set up with {len(names)}.",
            "Train it again with a current scvi-tools.",
        )
    for i, parts in enumerate(layers.fc_layers):
        if layers.inject_into_layer(i):
            start = parts[0].in_features - sum(sizes)
            for name, size in zip(own, sizes, strict=True):
                yield Slot(f"{path}.fc_layers.Layer {i}.0.weight", 1, start, size, name)
                start += size


def _of_batch(module: Any, n_batch: int) -> Iterator[Slot]:
    """Tensors that have a column or a row a batch."""
    per_batch = {
        "px_r": getattr(module, "gene_dispersion", getattr(module, "dispersion", "")) == "gene-batch",
        "py_r": getattr(module, "protein_dispersion", "") == "protein-batch",
    }
    for name in ("px_r", "py_r", *_PER_BATCH):
        tensor = getattr(module, name, None)
        if tensor is not None and tensor.ndim == 2 and per_batch.get(name, True):
            yield Slot(name, 1, 0, n_batch, BATCH, fitted=name not in _COUNTED)
    if getattr(module, "batch_representation", "") == "embedding":
        embedding = module.get_embedding(BATCH)
        path = next(path for path, part in module.named_modules() if part is embedding)
        yield Slot(f"{path}.weight", 0, 0, n_batch, BATCH)


_COUNTED = ("library_log_means", "library_log_vars")
_PER_BATCH = ("background_pro_alpha", "background_pro_log_beta", "log_per_batch_efficiency", *_COUNTED)
