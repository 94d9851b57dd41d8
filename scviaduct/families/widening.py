"""A saved model of scvi-tools with further categories behind the reference's own.

scArches surgery (Lotfollahi et al., Nature Biotechnology 2022) makes such a model and trains it. Here it is made of
what was fitted before, so that all that scvi-tools does with a model knows the query's batches, samples and covariates.

scvi-tools' own ``load_query_data`` (1.5.1) puts all new columns of a layer at its end. With several covariates they
belong in the middle: a layer reads the batch's columns first, and behind them each covariate's, so that there the new
batch would read a donor's column, and a donor another's. :func:`widen` puts each covariate's behind its own.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from scviaduct.errors import InputError
from scviaduct.families.registered import texts
from scviaduct.families.slots import BATCH, SAMPLE, covariate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from scviaduct.families.base import Facts
    from scviaduct.families.slots import Slot
    from scviaduct.references.saved.archive import SavedModel

_PANEL = "panel"
_MASK = "protein_batch_mask"


@dataclass(frozen=True, slots=True)
class Added:
    """A further category of a covariate.

    Attributes
    ----------
    name
        As the query's cells have it.
    vectors
        Name of a slot to what is there for the category: the shape of the tensor without the slot's dimension. A slot
        that is left out gets the mean of the reference's categories.
    """

    name: str
    vectors: Mapping[str, torch.Tensor]


def widen(saved: SavedModel, facts: Facts, slots: Sequence[Slot], added: Mapping[str, Sequence[Added]]) -> SavedModel:
    """A saved model that knows further categories; the given one stays as it is.

    Tensors without a slot are shared. Cells of the reference's categories are encoded and decoded as before.

    Parameters
    ----------
    saved
        The reference's model.
    facts
        Of the reference.
    slots
        All of the reference's, as :meth:`~scviaduct.families.base.Family.slots` gives them.
    added
        Covariate (``batch``, ``sample`` or ``covariate:COLUMN``) to its further categories, whose codes follow those of
        the reference.

    Raises
    ------
    InputError
        If the reference has no such covariate, knows a category, gets one twice, or a vector does not fit its slot.
    """
    added = {name: tuple(more) for name, more in added.items() if more}
    known = known_categories(facts)
    for name, more in added.items():
        _check_names(name, known, more)
        places = {slot.name for slot in slots if slot.covariate == name}
        strange = sorted({vector for category in more for vector in category.vectors} - places)
        if strange:
            raise InputError(
                f"There is a vector of '{more[0].name}' for '{strange[0]}', where the model keeps nothing of the"
                f" covariate '{name}'.",
                "It was fitted on another reference: fit it on this one.",
            )
    state = dict(saved.state_dict)
    # From the last column on, so that the positions before it stay; where slots without a column begin alike, the
    # later one comes first.
    for slot in sorted(slots, key=lambda slot: slot.start)[::-1]:
        if slot.covariate in added:
            state[slot.name] = _inserted(state[slot.name], saved.state_dict[slot.name], slot, added[slot.covariate])
    attributes = {**saved.attr_dict, "registry_": _registry(saved.attr_dict["registry_"], added)}
    return replace(saved, state_dict=state, attr_dict=attributes)


def known_categories(facts: Facts) -> dict[str, tuple[str, ...]]:
    """Covariate, by its name among the slots, to the categories that a model was trained on."""
    known = {covariate(column): values for column, values in facts.categorical_covariates.items()}
    if facts.batch_key:
        known[BATCH] = facts.batch_categories
    if facts.sample_key:
        known[SAMPLE] = facts.sample_categories
    return known


def _check_names(name: str, known: Mapping[str, tuple[str, ...]], more: Sequence[Added]) -> None:
    if name not in known:
        raise InputError(
            f"'{more[0].name}' is to be a category of the covariate '{name}', which the model was not set up with.",
            f"It has: {', '.join(sorted(known)) or 'none'}.",
        )
    seen = set(known[name])
    for category in more:
        if category.name in seen:
            raise InputError(
                f"'{category.name}' is to be a further category of the covariate '{name}', and there is one of that"
                " name.",
                "Cells of a known category need no surgery; rename it in the query if it is another one.",
            )
        seen.add(category.name)


def _inserted(tensor: torch.Tensor, own: torch.Tensor, slot: Slot, more: Sequence[Added]) -> torch.Tensor:
    """A tensor with the vectors of further categories behind those of its slot; ``own`` is the reference's."""
    known = own.narrow(slot.dim, slot.start, slot.count)
    shape = own.select(slot.dim, 0).shape
    # A covariate of one category has no column, which is as if it were zero; among several it needs one.
    mean = known.to(torch.float64).mean(slot.dim).to(own.dtype) if slot.count else own.new_zeros(shape)
    columns = [] if slot.count else [own.new_zeros(shape)]
    for category in more:
        vector = category.vectors.get(slot.name, mean)
        if vector.shape != shape:
            raise InputError(
                f"The vector of '{category.name}' for '{slot.name}' has the shape {tuple(vector.shape)} instead of"
                f" {tuple(shape)}.",
                "It was fitted on another reference: fit it on this one.",
            )
        columns.append(vector.detach().to(own))
    end = slot.start + slot.count
    before, after = tensor.narrow(slot.dim, 0, end), tensor.narrow(slot.dim, end, tensor.shape[slot.dim] - end)
    return torch.cat([before, torch.stack(columns, slot.dim), after], slot.dim)


def _registry(registry: dict[str, Any], added: Mapping[str, Sequence[Added]]) -> dict[str, Any]:
    """What scvi-tools registered, with the further categories."""
    told = copy.deepcopy(registry)
    fields = told["field_registries"]
    for name, more in added.items():
        names = [category.name for category in more]
        if name in (BATCH, SAMPLE):
            _extend(fields[name], name, names)
        else:
            _extend_covariate(fields["extra_categorical_covs"]["state_registry"], name, names)
    if BATCH in added:
        names = [category.name for category in added[BATCH]]
        _extend_masks(fields.get("proteins", {}).get("state_registry", {}), len(names))
        if fields.get(_PANEL, {}).get("state_registry"):
            # scvi-tools 1.5.1 has a background a panel and reads it by batch: they must stay as many.
            _extend_panels(fields[_PANEL], names)
    return told


def _extend(field: dict[str, Any], name: str, names: Sequence[str]) -> None:
    state = field["state_registry"]
    state["categorical_mapping"] = _categories(state["categorical_mapping"], names)
    field["summary_stats"][f"n_{name}"] = len(state["categorical_mapping"])


def _extend_panels(field: dict[str, Any], names: Sequence[str]) -> None:
    """A panel a further batch; cells name their panel as it was registered, so numbers stay numbers."""
    known = np.asarray(field["state_registry"]["categorical_mapping"])
    numbers = np.issubdtype(known.dtype, np.number)
    more = known.max() + 1 + np.arange(len(names)) if numbers else [f"panel of {name}" for name in names]
    field["state_registry"]["categorical_mapping"] = np.concatenate([known, np.array(more, dtype=known.dtype)])
    field["summary_stats"]["n_panel"] = len(known) + len(names)


def _extend_covariate(state: dict[str, Any], name: str, names: Sequence[str]) -> None:
    columns = list(state["field_keys"])
    i = [covariate(column) for column in columns].index(name)
    state["mappings"][columns[i]] = _categories(state["mappings"][columns[i]], names)
    sizes = list(state["n_cats_per_key"])
    sizes[i] = len(state["mappings"][columns[i]])
    state["n_cats_per_key"] = sizes


def _categories(known: Any, names: Sequence[str]) -> npt.NDArray[np.object_]:
    """Categories with further ones; as text, because scvi-tools sorts them and cannot sort 1 and ``"two"``."""
    return np.array([*texts(known), *names], dtype=object)


def _extend_masks(state: dict[str, Any], n_more: int) -> None:
    """Which proteins a batch has; a further one is taken to have those that any has."""
    masks = state.get(_MASK)
    if masks:
        measured = np.any(list(masks.values()), axis=0)
        first = 1 + max(int(code) for code in masks)
        state[_MASK] = {**masks, **{str(first + i): measured.copy() for i in range(n_more)}}
