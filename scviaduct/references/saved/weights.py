"""Which class a model's weights are of, judged by the names of their parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scviaduct.errors import UnsupportedModelError
from scviaduct.families import families

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from scviaduct.references.saved.archive import SavedModel

AGAIN = "Load it with the scvi-tools that made it and save it again, or train it again: scviaduct train."
RENAMED = {"TorchMRVI": "MRVI", "PeakVI": "PEAKVI"}
"""Names that classes had in their time."""
_SMALL = 128
"""What a number may be in any model."""


def class_of(saved: SavedModel, told: Mapping[str, Any]) -> str:
    """Class of a model that does not say it: scvi-hub's word, else the one class whose parts the weights have.

    Parameters
    ----------
    saved
        The model.
    told
        What scvi-hub says of it.

    Raises
    ------
    UnsupportedModelError
        If the weights are of no class that is known, or could be of several.
    """
    named = told.get("model_cls_name")
    if isinstance(named, str):
        return RENAMED.get(named, named)
    tops = _tops(saved)
    parts = {name: _parts(name) for name in families()}
    found = [name for name, (needed, others) in parts.items() if needed and needed <= tops <= needed | others]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"The model does not say its class, and its weights are of none known: {', '.join(sorted(tops)[:6])}.",
            AGAIN,
        )
    return found[0]


def _parts(name: str) -> tuple[frozenset[str], frozenset[str]]:
    needed, others = families()[name].parts
    return frozenset(needed.split()), frozenset(others.split())


def _tops(saved: SavedModel) -> set[str]:
    return {name.partition(".")[0] for name in saved.state_dict}


def check_weights(saved: SavedModel, name: str) -> None:
    """Refuse weights that are not those of the class that a model says it is, by the names of their parts.

    Whether every name and shape fits is known when the class is instantiated; this comes before anything of it is.

    Raises
    ------
    UnsupportedModelError
        If a part is missing, or there is one that the class does not have. A class that is not known passes: that it
        is not mapped here is told elsewhere.
    """
    if name not in families() or not families()[name].parts[0]:
        return
    needed, others = _parts(name)
    tops = _tops(saved)
    wrong = sorted(needed - tops) or sorted(tops - needed - others)
    if wrong:
        what = "lack" if needed - tops else "have"
        raise UnsupportedModelError(
            f"The model says it is a {name}, and its weights {what} '{wrong[0][:80]}'.",
            "The folder claims one class and holds another's weights; take the model from its publisher again.",
        )


def check_arguments(saved: SavedModel, arguments: Any) -> None:
    """Refuse arguments that ask for a larger network than the weights are of, before it is made.

    Parameters
    ----------
    saved
        The model.
    arguments
        Its ``init_params_``.

    Raises
    ------
    UnsupportedModelError
        If a number among them is larger than every dimension and the number of the weights.
    """
    largest = max((*(n for value in saved.state_dict.values() for n in value.shape), len(saved.state_dict), _SMALL))
    pending = [arguments]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list | tuple):
            pending += value
        elif isinstance(value, int) and abs(value) > largest:
            raise UnsupportedModelError(
                f"The model was made with {value:,} of something; its weights have at most {largest:,} of anything.",
                "The folder claims another network than its weights are of; take the model from its publisher again.",
            )


def check_shapes(made: Mapping[str, torch.Tensor], saved: SavedModel) -> None:
    """Refuse weights that do not fit the network which a model describes, before that network takes any memory.

    Parameters
    ----------
    made
        ``state_dict`` of the described network, made on PyTorch's ``meta`` device.
    saved
        The model.

    Raises
    ------
    UnsupportedModelError
        If a name is missing on either side, or a shape differs.
    """
    told, known = ({name: tuple(value.shape) for name, value in of.items()} for of in (saved.state_dict, made))
    wrong = sorted(name for name in told.keys() | known.keys() if told.get(name) != known.get(name))
    if wrong:
        raise UnsupportedModelError(
            f"The weights do not fit the network that the model describes: '{wrong[0][:80]}' is"
            f" {told.get(wrong[0], 'missing')} instead of {known.get(wrong[0], 'absent')}.",
            AGAIN,
        )
