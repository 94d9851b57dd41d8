"""What a recipe asks of the cells' obs columns, checked before training."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

import pandas as pd

from scviaduct.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from anndata import AnnData

    from scviaduct.families.base import Family
    from scviaduct.families.recipe import Recipe

_NEEDED = {
    "categorical_covariates": "covariates",
    "continuous_covariates": "covariates",
    "size_factor_key": "size_factor",
    "sample_key": "sample",
    "panel_key": "panel",
    "background": "background",
}
"""Option of a recipe to what says, in :class:`~scviaduct.families.Needs`, whether a family reads it."""


def require_read(family: Family, recipe: Recipe) -> None:
    """Refuse a recipe that names what the family would pass over.

    Raises
    ------
    InputError
        If it does.
    """
    for option, need in _NEEDED.items():
        value = getattr(recipe, option)
        if value and not getattr(family.needs, need):
            told = value if isinstance(value, str) else ", ".join(value)
            raise InputError(
                f"--{option.replace('_', '-')} {told}: a {family.name} does not read it.", "Leave the option out."
            )


def obs_column(cells: AnnData, name: str, option: str) -> pd.Series:
    """A column of obs.

    Parameters
    ----------
    cells
        Flat cells.
    name
        Of the column.
    option
        What names it on the command line.

    Raises
    ------
    InputError
        If there is none of that name; close matches are listed.
    """
    if name not in cells.obs:
        raise InputError(f"{option}: there is no obs column '{name}'.", f"There are: {alike(name, cells.obs.columns)}.")
    found: pd.Series = cells.obs[name]
    return found


def alike(name: str, known: Iterable[object]) -> str:
    """Known names that a mistyped one may mean, or the first few of them."""
    texts = sorted({str(one) for one in known})
    return ", ".join(get_close_matches(name, texts, n=3) or texts[:8])


def fill(cells: AnnData, values: Mapping[str, object]) -> None:
    """Give every cell a value in those obs columns that are not there."""
    for key, value in values.items():
        if key not in cells.obs:
            cells.obs[key] = pd.Categorical([value] * cells.n_obs) if not isinstance(value, float) else value
