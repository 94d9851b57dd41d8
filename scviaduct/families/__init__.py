"""One module per model family, behind one small interface.

A module of this package whose name ends in ``vi``, as those of model classes do, holds a family as ``FAMILY`` and is
found by itself: a further one touches nothing else. They are imported when a family is first asked for, because torch
takes seconds and the facts of a package need none of it. The other modules are what families are made of, and one of
them needs Triton, which a PyTorch without CUDA does not bring.
"""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from scviaduct.errors import UnsupportedModelError
from scviaduct.families.base import MODALITY, Covariates, Encoded, Encoder, Facts, Family, Needs
from scviaduct.families.recipe import Recipe


@cache
def families() -> dict[str, Family]:
    """Name of every model class that is mapped here, as scvi-tools saves it, to its family."""
    names = [module.name for module in iter_modules(__path__) if module.name.endswith("vi")]
    found = [import_module(f"{__name__}.{name}").FAMILY for name in names]
    return {one.name: one for one in found}


def family(name: str) -> Family:
    """The family of a model class, its name in any case.

    Raises
    ------
    UnsupportedModelError
        If it is not one that is mapped here.
    """
    for known, found in families().items():
        if known.lower() == name.lower():
            return found
    raise UnsupportedModelError(f"Models of class '{name}' are not mapped here.", f"Known: {', '.join(families())}.")


__all__ = [
    "MODALITY",
    "Covariates",
    "Encoded",
    "Encoder",
    "Facts",
    "Family",
    "Needs",
    "Recipe",
    "families",
    "family",
]
