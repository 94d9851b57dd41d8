"""Lengths of the salient latent of a ContrastiveVI, of all units together: by perturbation, guide and batch."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from scviaduct.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt
    import pandas as pd

    from scviaduct.analysis.base import Cells

type Key = tuple[str | None, ...]
"""What cells are grouped by; None where the source has no value."""
type Groups = dict[Key, npt.NDArray[np.float64]]
"""Key without the perturbation to the sorted norms of its cells."""


def salient_norms(cells: Cells) -> npt.NDArray[np.float32]:
    """Length of each cell's salient latent, float32 of shape ``(n_cells,)``."""
    salient = cells.encoded.others["salient"].astype(np.float64)
    return np.sqrt(np.square(salient).sum(axis=1)).astype(np.float32)


def sums_of(cells: Cells, columns: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
    """Norm and group of each cell: eight bytes a cell, and the groups' keys as JSON.

    The key is the values of the columns as text and, behind them, the batch: the model's own if it knows batches.
    """
    values = [_texts(cells.obs, name) for name in columns]
    batch = cells.facts.batch_key
    values.append(_texts(cells.data.obs, batch) if batch else [""] * len(cells.obs))
    known: dict[Key, int] = {}
    codes = [known.setdefault(key, len(known)) for key in zip(*values, strict=True)]
    told = json.dumps(list(known)).encode()
    return {
        "norm": salient_norms(cells),
        "group": np.array(codes, np.int32),
        "groups": np.frombuffer(told, np.uint8),
    }


def _texts(obs: pd.DataFrame, name: str) -> list[str | None]:
    if name not in obs:
        from scviaduct.families.columns import alike

        raise InputError(f"There is no obs column '{name}'.", f"There are: {alike(name, obs.columns)}.")
    return [None if missing else str(value) for value, missing in zip(obs[name], obs[name].isna(), strict=True)]


def gathered(sums: Sequence[Mapping[str, npt.NDArray[Any]]]) -> dict[str, Groups]:
    """Norms of all units by perturbation and group; cells without a perturbation are left out.

    Both the groups and the norms within one are sorted, so that what is made of them does not depend on how cells were
    cut into units, or on their order.
    """
    known: dict[Key, int] = {}
    norms, codes = [np.empty(0, np.float32)], [np.empty(0, np.int64)]
    for unit in sums:
        keys = [tuple(key) for key in json.loads(unit["groups"].tobytes())]
        places = np.array([known.setdefault(key, len(known)) for key in keys], np.int64)
        norms.append(unit["norm"])
        codes.append(places[unit["group"]])
    norm, code = np.concatenate(norms).astype(np.float64), np.concatenate(codes)
    order = np.lexsort((norm, code))
    starts = np.searchsorted(code[order], np.arange(len(known) + 1))
    found: dict[str, Groups] = {}
    for key in sorted(known, key=lambda key: tuple((text is None, text or "") for text in key)):
        if key[0] is not None:
            own = order[starts[known[key]] : starts[known[key] + 1]]
            found.setdefault(key[0], {})[key[1:]] = norm[own]
    return found


def control_norms(groups: Mapping[str, Groups], options: Any) -> npt.NDArray[np.float64]:
    """Norms of all controls.

    Raises
    ------
    InputError
        If there are fewer than two, or all have one norm.
    """
    norms = np.concatenate([np.empty(0), *groups.get(options.controls, {}).values()])
    if len(norms) == 0:
        from scviaduct.families.columns import alike

        raise InputError(
            f"No cell has '{options.controls}' in '{options.perturbation}', the controls' value.",
            f"There are: {alike(options.controls, groups)}.",
        )
    if len(norms) < 2 or norms.min() == norms.max():
        raise InputError(
            f"The controls '{options.controls}' are {len(norms):,} cells with one length of the salient latent, and"
            " scores cannot be standardised against them.",
            "Name the value that most controls have, e.g. controls=non-targeting.",
        )
    return norms


def require(name: str, options: Any, columns: Sequence[str]) -> None:
    """Refuse options of which one of these is empty.

    Raises
    ------
    InputError
        Naming the option.
    """
    for option in columns:
        if not getattr(options, option):
            example = "non-targeting" if option == "controls" else option
            raise InputError(f"{name} needs '{option}', and it is empty.", f"Give it, e.g. {option}={example}.")


def adjusted(p_values: npt.NDArray[np.float64], tested: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Benjamini's and Hochberg's q-values over what was tested; NaN elsewhere."""
    from scipy.stats import false_discovery_control

    found = np.full(len(p_values), np.nan)
    tested &= ~np.isnan(p_values)
    if tested.any():
        found[tested] = false_discovery_control(p_values[tested])
    return found
