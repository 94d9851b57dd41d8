"""Checking the weights of a model against what its registry says of it; either may be a stranger's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scviaduct.errors import UnsupportedModelError
from scviaduct.families.registered import OTHERS_WEIGHTS

if TYPE_CHECKING:
    from scviaduct.references.saved.archive import SavedModel


def require_shape(saved: SavedModel, name: str, parameter: str, *sizes: int | None) -> tuple[int, ...]:
    """Shape of a parameter, which has the given sizes.

    Parameters
    ----------
    saved
        As it was read.
    name
        Of the model's class.
    parameter
        Its name among the weights.
    sizes
        Size of each dimension; None for any.

    Raises
    ------
    UnsupportedModelError
        If the weights have no such parameter, or one of another shape.
    """
    found = saved.state_dict.get(parameter)
    shape = None if found is None else tuple(found.shape)
    fits = shape is not None and len(shape) == len(sizes)
    if shape is None or not fits or any(size not in (None, own) for size, own in zip(sizes, shape, strict=True)):
        wanted = " x ".join("any" if size is None else f"{size:,}" for size in sizes)
        raise UnsupportedModelError(
            f"The weights are not those of the {name} that its registry describes: '{parameter}' is"
            f" {'missing' if shape is None else ' x '.join(f'{size:,}' for size in shape)}, and should be {wanted}.",
            OTHERS_WEIGHTS,
        )
    return shape
