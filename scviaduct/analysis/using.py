"""What analyses share: a model of scvi-tools on some cells, its random numbers, and refusing what it does not know."""

from __future__ import annotations

import contextlib
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import numpy as np

from scviaduct.errors import InputError
from scviaduct.families.registered import text_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from scviaduct.analysis.base import Cells
    from scviaduct.families.base import Facts

BATCH = 128
"""Cells that scvi-tools decodes at once: its own default, told each time because a process can set another, which would
draw other samples."""
_VALUES = 1 << 23
"""Values that one call may hold: scvi-tools keeps those of every posterior sample until it takes their mean."""
_CORRECTED_OVER = 200
"""Batches that a comparison corrects for, at most, without being told which: it decodes each cell as every one."""
_MODES = ("change", "vanilla")


@contextlib.contextmanager
def registered(model: Any, data: Any) -> Iterator[Any]:
    """Register cells with a model, quietly, and leave both as they were.

    scvi-tools keeps every data set that a model has seen, for as long as the process lives, and its
    ``deregister_manager(data)`` refuses cells whose setup was transferred from the model's own, as it is here.

    Parameters
    ----------
    model
        Of scvi-tools.
    data
        AnnData or MuData in the layout that the model was set up with.

    Yields
    ------
    The data.
    """
    from scviaduct.families.vae import quiet

    store = model._per_instance_manager_store.setdefault(model.id, {})  # noqa: SLF001 - no other way, see above
    before, parts = set(store), _parts(data)
    kept = [[set(keys) for keys in part] for part in parts]
    with quiet():
        try:
            model._validate_anndata(data)  # noqa: SLF001 - what each of its methods begins with
            yield data
        finally:
            for uuid in set(store) - before:
                del store[uuid]
            for part, known in zip(_parts(data), kept, strict=True):
                for keys, old in zip(part, known, strict=True):
                    for key in [key for key in keys if key not in old]:
                        del keys[key]


def _parts(data: Any) -> list[tuple[Any, Any, Any]]:
    """Where scvi-tools leaves columns and marks of its own: in the cells and, of a MuData, in each modality."""
    return [(one.obs, one.obsm, one.uns) for one in (data, *getattr(data, "mod", {}).values())]


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from a seed within the block, and go on outside as if nothing had been drawn.

    scvi-tools draws from the global generators of torch and, comparing cells, of numpy.

    Parameters
    ----------
    seed
        Any integer.
    """
    import torch

    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    state = np.random.get_state()  # noqa: NPY002 - the generator that scvi-tools draws from
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed % 2**63)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(state)  # noqa: NPY002


def pieces(n_cells: int, values: int) -> Iterator[npt.NDArray[np.int64]]:
    """Positions of the cells, so many at a time that scvi-tools holds a bounded number of values.

    Parameters
    ----------
    n_cells
        Cells.
    values
        Of each cell: features times posterior samples.
    """
    # A multiple of its batches, so that the cells that are decoded together do not depend on the bound.
    step = BATCH * max(_VALUES // (BATCH * max(values, 1)), 1)
    for start in range(0, n_cells, step):
        yield np.arange(start, min(start + step, n_cells))


def own_batches(model: Any, names: Sequence[str]) -> list[Any]:
    """Batch categories as the model has them, which may be numbers, of names as text; ``[None]`` for none.

    Parameters
    ----------
    model
        Of scvi-tools.
    names
        That :func:`require_batches` passed.
    """
    known = model.adata_manager.get_state_registry("batch")["categorical_mapping"]
    of_text = {text_of(value): value for value in known}
    return [of_text[name] for name in names] or [None]


def in_order(names: Sequence[str], known: Sequence[str]) -> npt.NDArray[np.int64]:
    """Where each name lies among those of ``names`` in the order of ``known``.

    scvi-tools gives chosen features in the order of the model, not in the one that they were asked in.
    """
    asked = set(names)
    position = {name: i for i, name in enumerate(name for name in known if name in asked)}
    return np.array([position[name] for name in names], np.int64)


def require_known(option: str, asked: Sequence[str], known: Sequence[str], what: str) -> None:
    """Refuse names that a reference does not have, and those that are told twice.

    Parameters
    ----------
    option
        Field that names them.
    asked
        The names.
    known
        What there is.
    what
        One of them in words, as ``gene``.

    Raises
    ------
    InputError
        Naming the first such name, and the nearest that there are.
    """
    there = set(known)
    told = f"--{option.replace('_', '-')}"
    for position, name in enumerate(asked):
        if name in asked[:position]:
            raise InputError(f"{told} names '{name}' twice.", "Name it once.")
        if name in there:
            continue
        close = get_close_matches(name, known, n=3)
        remedy = f"Did you mean {' or '.join(close)}?" if close else f"There are, e.g., {', '.join([*known][:5])}."
        raise InputError(f"{told}: '{name}' is not a {what} of the reference.", remedy)


def require_batches(facts: Facts, asked: Sequence[str]) -> None:
    """Refuse ``transform_batch`` of categories that a reference does not have.

    Raises
    ------
    InputError
        If one is unknown, or the reference was set up without a batch.
    """
    if asked and not facts.batch_categories:
        raise InputError(
            f"--transform-batch {', '.join(asked)}: the reference was set up without a batch.", "Leave the option out."
        )
    require_known("transform_batch", asked, facts.batch_categories, "batch")


def require_at_least(option: str, value: float, least: float) -> None:
    """Refuse a number below the least that makes sense, and one that is none.

    Raises
    ------
    InputError
        If it is.
    """
    if not least <= value < float("inf"):
        raise InputError(f"--{option.replace('_', '-')} {value:g} is not {least:g} or more.", f"Give {least:g}, say.")


def require_comparison(facts: Facts, options: Any) -> None:
    """Refuse options of a Bayesian comparison that cannot be.

    Parameters
    ----------
    facts
        Of the reference.
    options
        With ``cells``, ``samples``, ``mode``, ``delta``, ``fdr``, ``batch_correction`` and ``transform_batch``.

    Raises
    ------
    InputError
        Naming the value.
    """
    require_at_least("cells", options.cells, 1)
    require_at_least("samples", options.samples, 2)
    require_at_least("delta", options.delta, 0)
    if options.mode not in _MODES:
        raise InputError(f"--mode '{options.mode}' is not a mode of comparing.", f"There are: {', '.join(_MODES)}.")
    if not 0 < options.fdr < 1:
        raise InputError(f"--fdr {options.fdr:g} is not between 0 and 1.", "Give 0.05, say.")
    require_batches(facts, options.transform_batch)
    if not options.batch_correction:
        if options.transform_batch:
            told = f"--transform-batch {', '.join(options.transform_batch)}: without batch correction,"
            raise InputError(f"{told} each cell is decoded as its own batch.", "Add --batch-correction.")
        return
    count = len(facts.batch_categories)
    if not count:
        raise InputError("--batch-correction: the reference was set up without a batch.", "Leave the option out.")
    if not options.transform_batch and count > _CORRECTED_OVER:
        raise InputError(
            f"--batch-correction would decode each cell as every one of the reference's {count:,} batches.",
            f"Name at most {_CORRECTED_OVER}, e.g. --transform-batch '{facts.batch_categories[0]}'.",
        )


def correcting(cells: Cells, options: Any) -> list[Any] | None:
    """Batches that both selections are decoded as; None for each cell's own.

    Those of the reference alone: what a model has behind them are query batches, whose decoder may not be fitted.

    Parameters
    ----------
    cells
        Of both selections.
    options
        That :func:`require_comparison` passed.
    """
    if not options.batch_correction:
        return None
    return own_batches(cells.model, options.transform_batch or cells.facts.batch_categories)


def require_both(first: npt.NDArray[np.bool_]) -> None:
    """Refuse to compare with nothing.

    Raises
    ------
    InputError
        If one of the selections has no cell.
    """
    if first.all() or not first.any():
        empty = "second" if first.all() else "first"
        raise InputError(f"The {empty} selection has no cell to compare.", "Widen its condition: --select, --against.")
