"""What MRVI says of samples cell by cell: their counterfactual representations, and how far apart they lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, override

import numpy as np

from scviaduct.analysis.base import Finished, Output, Part, Shape
from scviaduct.analysis.counterfactual import Counterfactual, groups_of, pieces, require_samples, summed
from scviaduct.analysis.using import require_at_least
from scviaduct.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt
    import pandas as pd
    import torch

    from scviaduct.analysis.base import Analysis, Cells
    from scviaduct.families.base import Facts
    from scviaduct.values import FloatArray

_MODES = ("mean", "normalised")


@dataclass(frozen=True, slots=True)
class RepresentationOptions:
    """Nothing is to be told."""


class SampleRepresentations(Output):
    """Where each cell would lie in ``z`` if it were of each sample: ``get_local_sample_representation`` of scvi-tools.

    Takes ``4 * samples * n_latent`` bytes a cell: 12 kB for 100 samples and 30 dimensions.
    """

    name = "sample-representations"
    families = ("MRVI",)
    about = "each cell's z as every sample would have it"
    options: ClassVar[type] = RepresentationOptions

    @override
    def check(self, facts: Facts, options: RepresentationOptions) -> None:
        require_samples(facts)

    @override
    def shape(self, facts: Facts, options: RepresentationOptions) -> Shape:
        size = range(facts.latent_sizes["z"])
        features = tuple(f"{sample}:{dim}" for sample in facts.sample_categories for dim in size)
        return Shape(matrices={"sample_representations": features})

    @override
    def unit(self, cells: Cells, told: Mapping[str, npt.NDArray[Any]], options: RepresentationOptions) -> Part:
        of, size = Counterfactual(cells), cells.facts.latent_sizes["z"]
        count = len(of.location)
        out = np.empty((count, len(of.samples) * size), np.float32)
        for rows in pieces(count, out.shape[1]):
            base, residual = of.shifts(of.mean(rows))
            out[rows] = (base[:, None] + residual).flatten(1).cpu().numpy()
        return Part(matrices={"sample_representations": out})


@dataclass(frozen=True, slots=True)
class DistanceOptions:
    """What distances of samples are told.

    Attributes
    ----------
    group_by
        obs column of the groups of cells; empty for all cells as one.
    mode
        ``mean``: Euclidean distance of the posterior's means. ``normalised``: of draws, less the distance that two
        draws of the cell's own sample have, in standard deviations of that; 0 is what the posterior's width gives.
    samples
        Posterior draws of ``normalised``.
    """

    group_by: str = ""
    mode: Literal["mean", "normalised"] = "mean"
    samples: int = 50


class SampleDistances(Output):
    """Mean distance between samples over each group of cells: ``get_local_sample_distances`` of scvi-tools.

    Table ``sample_distances``: ``group``, ``sample_1``, ``sample_2`` (each pair once), ``distance`` and the number of
    ``cells`` that the mean is over. Cells without a value in ``group_by`` are in no group.
    """

    name = "sample-distances"
    families = ("MRVI",)
    about = "distances between samples, over groups of cells"
    options: ClassVar[type] = DistanceOptions

    @override
    def check(self, facts: Facts, options: DistanceOptions) -> None:
        require_samples(facts)
        if options.mode not in _MODES:
            raise InputError(f"--mode '{options.mode}' is no kind of distance.", f"There are: {', '.join(_MODES)}.")
        require_at_least("samples", options.samples, 2)

    @override
    def obs(self, facts: Facts, options: DistanceOptions) -> tuple[str, ...]:
        return (options.group_by,) if options.group_by else ()

    @override
    def shape(self, facts: Facts, options: DistanceOptions) -> Shape:
        return Shape()

    @override
    def unit(self, cells: Cells, told: Mapping[str, npt.NDArray[Any]], options: DistanceOptions) -> Part:
        of = Counterfactual(cells)
        names, codes = groups_of(cells, options.group_by)
        size, count = cells.facts.latent_sizes["z"], len(of.samples)
        sums = np.zeros((len(names), count, count))
        draws = 1 if options.mode == "mean" else options.samples
        own = None if options.mode == "mean" else _own(cells, of)
        for rows in pieces(len(codes), count * size * draws):
            found = _mean(of, rows) if own is None else _normalised(of, rows, own[rows], draws)
            sums += summed(found, codes[rows], len(names))
        counted = np.bincount(codes[codes >= 0], minlength=len(names))
        return Part(sums={"groups": names, "distances": sums, "cells": counted})

    @override
    def finish(
        self, sums: Sequence[Mapping[str, npt.NDArray[Any]]], facts: Facts, options: DistanceOptions
    ) -> Finished:
        total = together(sums, ("distances", "cells"))
        first, second = np.triu_indices(len(facts.sample_categories), k=1)
        names = np.array(facts.sample_categories, np.str_)
        return Finished(tables={"sample_distances": _table(total, names, first, second)})


def _own(cells: Cells, of: Counterfactual) -> torch.Tensor:
    """Each cell's own sample, as the model's embedding has it."""
    import torch

    from scviaduct.analysis.counterfactual import own_samples

    return of.samples[torch.as_tensor(own_samples(cells), device=of.samples.device)]


def _between(z: torch.Tensor) -> torch.Tensor:
    """Euclidean distances between samples, ``(..., n_samples, n_latent)`` to ``(..., n_samples, n_samples)``."""
    import torch

    # The shortcut by inner products loses what close samples differ by.
    return torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")


def _mean(of: Counterfactual, rows: slice) -> FloatArray:
    _, residual = of.shifts(of.mean(rows))
    found: FloatArray = _between(residual).cpu().numpy()
    return found


def _normalised(of: Counterfactual, rows: slice, own: torch.Tensor, draws: int) -> FloatArray:
    """Distances of draws, less those of two draws of the own sample, by their standard deviation.

    As in scvi-tools, each sample has draws of ``u`` of its own: the distance of two samples then has the width of the
    posterior in it that the baseline has.
    """
    cells, count = len(own), len(of.samples)
    baseline = of.draw(rows, 2 * draws)
    base, residual = of.residual(baseline, own[:, None].expand(cells, 2 * draws), drawn=True)
    z = base + residual
    apart = (z[:, :draws] - z[:, draws:]).norm(dim=-1)
    u = of.draw(rows, draws * count).reshape(cells, draws, count, -1)
    base, residual = of.residual(u, of.samples.expand(cells, draws, count), drawn=True)
    between = _between(base + residual).mean(dim=1)
    found = (between - apart.mean(dim=1)[:, None, None]) / apart.std(dim=1)[:, None, None]
    numbers: FloatArray = found.cpu().numpy()
    return numbers


def together(
    sums: Sequence[Mapping[str, npt.NDArray[Any]]], keys: Sequence[str]
) -> dict[str, dict[str, npt.NDArray[Any]]]:
    """Add what units summed by group, in the order of the units.

    Parameters
    ----------
    sums
        Of each unit: ``groups``, the names, and arrays whose first axis they are.
    keys
        Names of those arrays.

    Returns
    -------
    dict
        Group, in the order of the names, to key to sum.
    """
    found: dict[str, dict[str, npt.NDArray[Any]]] = {}
    for part in sums:
        for position, name in enumerate(map(str, part["groups"])):
            before = found.get(name)
            found[name] = {key: part[key][position] + (before[key] if before else 0) for key in keys}
    return {name: found[name] for name in sorted(found)}


def _table(
    total: Mapping[str, Mapping[str, npt.NDArray[Any]]],
    names: npt.NDArray[np.str_],
    first: npt.NDArray[Any],
    second: npt.NDArray[Any],
) -> pd.DataFrame:
    import pandas as pd

    pairs = len(first)
    columns: dict[str, Any] = {
        "group": np.repeat(list(total), pairs).astype(object),
        "sample_1": np.tile(names[first], len(total)).astype(object),
        "sample_2": np.tile(names[second], len(total)).astype(object),
        "distance": np.array(
            [value for one in total.values() for value in one["distances"][first, second] / one["cells"]], np.float64
        ),
        "cells": np.array([int(one["cells"]) for one in total.values() for _ in range(pairs)], np.int64),
    }
    return pd.DataFrame(columns)


ANALYSES: tuple[Analysis, ...] = (SampleRepresentations(), SampleDistances())
