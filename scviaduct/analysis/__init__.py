"""What people ask of a joint embedding: one module per kind of question, behind one small interface.

A module of this package that ends in ``ANALYSES = (…)`` is found by itself: a further analysis touches nothing else.
The same name may stand in several modules, each for other families: what is asked is the same, how it is computed is
not.
"""

from difflib import get_close_matches
from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from scviaduct.analysis.base import Analysis, Cells, Comparison, Finished, Output, Part, Shape, Strata
from scviaduct.errors import InputError


@cache
def analyses() -> dict[str, list[Analysis]]:
    """Name of every analysis to what does it, one for each group of families."""
    found: dict[str, list[Analysis]] = {}
    for module in iter_modules(__path__):
        for one in getattr(import_module(f"{__name__}.{module.name}"), "ANALYSES", ()):
            found.setdefault(one.name, []).append(one)
    return dict(sorted(found.items()))


def analysis(name: str, family: str) -> Analysis:
    """The analysis of a name for a family.

    Parameters
    ----------
    name
        As ``scviaduct derive --what`` takes it.
    family
        Name of the reference's model class, in any case.

    Raises
    ------
    InputError
        If there is none, naming what there is for the family.
    """
    for one in analyses().get(name, ()):
        if family.lower() in (known.lower() for known in one.families):
            return one
    there = [known for known in analyses() if _families(known, family)]
    if name in analyses():
        of = ", ".join(sorted({known for one in analyses()[name] for known in one.families}))
        problem = f"'{name}' is for references of {of}, and this one is of {family}."
    else:
        close = get_close_matches(name, there or analyses(), n=1)
        problem = f"There is no analysis '{name}'." + (f" Did you mean '{close[0]}'?" if close else "")
    remedy = f"Of a {family}, there are: {', '.join(there)}." if there else f"There is none of a {family}."
    raise InputError(problem, remedy)


def _families(name: str, family: str) -> bool:
    return any(family.lower() == known.lower() for one in analyses()[name] for known in one.families)


__all__ = [
    "Analysis",
    "Cells",
    "Comparison",
    "Finished",
    "Output",
    "Part",
    "Shape",
    "Strata",
    "analyses",
    "analysis",
]
