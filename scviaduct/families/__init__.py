"""One module per model family, behind one small interface.

A module of this package that ends in ``FAMILY = …`` is found by itself: a further family touches nothing else. They are
imported when a family is first asked for, because torch takes seconds and the facts of a package need none of it.
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
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    found = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
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
