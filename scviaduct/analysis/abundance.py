"""Which samples have cells where: admissible cells and differential abundance of MRVI (Boyeau et al., 2025).

Both ask how likely a cell's ``u`` is among the cells of each sample: under the mixture of the posteriors of its cells,
the sample's aggregated posterior. scvi-tools builds the mixtures of the cells that it is given, which are a unit's
here; so they are built once, of a bounded sample of the cells of every sample, and every unit is told them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, override

import numpy as np

from scviaduct.analysis.base import Finished, Output, Part, Shape, Strata
from scviaduct.analysis.counterfactual import groups_of, own_samples, require_samples, summed
from scviaduct.analysis.donors import (
    Design,
    Permuted,
    adjusted,
    columns_of,
    design,
    require_rank,
    require_same,
    require_terms,
    slug,
)
from scviaduct.analysis.samples import together
from scviaduct.analysis.using import require_at_least
from scviaduct.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy.typing as npt
    import torch

    from scviaduct.analysis.base import Analysis, Cells
    from scviaduct.families.base import Facts
    from scviaduct.values import FloatArray, LongArray

    Matrix = npt.NDArray[np.float64]

_VALUES = 1 << 24
"""Differences of a cell and a component that are held at once (64 MB)."""
_QUANTILE = 0.05
"""As in scvi-tools: a state less likely than those of all but this share of the samples' own cells is out."""


def _posteriors(cells: Cells) -> dict[str, npt.NDArray[Any]]:
    """Mean, scale and sample of each cell's posterior of ``u``: the components of the mixtures."""
    scale = np.sqrt(cells.encoded.variance)
    return {"component_mean": cells.encoded.location, "component_scale": scale, "component_of": own_samples(cells)}


def _log_probabilities(
    u: FloatArray, told: Mapping[str, npt.NDArray[Any]], code: int, device: Any
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Log density of cells under each component of a sample, some cells at a time, ``(n_cells, n_components)``."""
    import torch

    of = told["component_of"] == code
    components = [torch.as_tensor(told[f"component_{part}"][of], device=device) for part in ("mean", "scale")]
    normal = torch.distributions.Independent(torch.distributions.Normal(*components), 1)
    step = max(_VALUES // max(int(of.sum()) * u.shape[1], 1), 1)
    for start in range(0, len(u), step):
        rows = slice(start, min(start + step, len(u)))
        yield rows, normal.log_prob(torch.as_tensor(np.ascontiguousarray(u[rows]), device=device)[:, None])


def _device(cells: Cells) -> Any:
    return next(cells.model.module.parameters()).device


@dataclass(frozen=True, slots=True)
class AdmissibleOptions:
    """What admissible cells are told.

    Attributes
    ----------
    cells
        Of each sample whose posteriors are looked at, at most.
    """

    cells: int = 1000


class Admissible(Output):
    """Whether each sample has cells like a cell: ``get_outlier_cell_sample_pairs`` of scvi-tools.

    Matrix ``admissible``: 1 where the best component of a sample gives the cell's ``u`` a density above the 5 %
    quantile of those that the samples' own cells have, each without its own component; NaN for samples without a cell.
    Column ``admissible_samples``: how many are 1. Where a sample is not admissible, what
    :mod:`~scviaduct.analysis.sample_effects` says of the cell is extrapolated to it.
    """

    name = "admissible"
    families = ("MRVI",)
    about = "which samples have cells like each cell"
    options: ClassVar[type] = AdmissibleOptions

    @override
    def check(self, facts: Facts, options: AdmissibleOptions) -> None:
        require_samples(facts)
        require_at_least("cells", options.cells, 2)

    @override
    def shape(self, facts: Facts, options: AdmissibleOptions) -> Shape:
        return Shape({"admissible_samples": "int64"}, {"admissible": facts.sample_categories})

    @override
    def strata(self, facts: Facts, options: AdmissibleOptions) -> Strata:
        return Strata(facts.sample_key, options.cells)

    @override
    def prepare(self, cells: Cells, options: AdmissibleOptions) -> Mapping[str, npt.NDArray[Any]]:
        told = _posteriors(cells)
        own: list[FloatArray] = []
        for code in np.unique(told["component_of"]):
            rows = np.flatnonzero(told["component_of"] == code)
            if len(rows) < 2:
                continue  # a single cell has no other to be like
            u = cells.encoded.mean[rows]
            for some, found in _log_probabilities(u, told, int(code), _device(cells)):
                found[range(found.shape[0]), range(some.start, some.stop)] = -np.inf
                own.append(found.max(dim=1).values.cpu().numpy())
        if not own:
            raise InputError(
                "No sample has two cells, which a threshold of admissible cells takes.", "Derive this of more cells."
            )
        return told | {"threshold": np.array(np.quantile(np.concatenate(own), _QUANTILE))}

    @override
    def unit(self, cells: Cells, told: Mapping[str, npt.NDArray[Any]], options: AdmissibleOptions) -> Part:
        u = cells.encoded.mean
        out = np.full((len(u), len(cells.facts.sample_categories)), np.nan, np.float32)
        for code in np.unique(told["component_of"]):
            for rows, found in _log_probabilities(u, told, int(code), _device(cells)):
                out[rows, code] = found.max(dim=1).values.cpu().numpy() > told["threshold"]
        return Part({"admissible_samples": np.nansum(out, axis=1).astype(np.int64)}, {"admissible": out})


@dataclass(frozen=True, slots=True)
class AbundanceOptions:
    """What differential abundance is told.

    Attributes
    ----------
    sample_covariates
        obs columns of two values, constant within a sample, or ``COLUMN=VALUE``: one value against all others.
    group_by
        obs column of the groups that are tested; empty for all cells as one.
    cells
        Of each sample whose posteriors are looked at, at most.
    permutations
        Of the samples, for the groups' p-values; none is smaller than ``1 / (1 + permutations)``.
    """

    sample_covariates: tuple[str, ...] = ()
    group_by: str = ""
    cells: int = 1000
    permutations: int = 999


class DifferentialAbundance(Output):
    """Where samples of one condition have more cells: ``differential_abundance`` of scvi-tools.

    Matrix ``sample_log_density``: log density of each sample's aggregated posterior at the cell's ``u``; NaN for
    samples without a cell. Column ``abundance_TERM``: log of the ratio of the mean densities of the samples with and
    without the term's value, the cell's own sample left out (scvi-tools' log enrichment). Table
    ``differential_abundance``, with samples as the units: the difference of the samples' mean log densities over each
    group, of cells of other samples, its permutation p-value, and the false discovery rate over groups and terms.
    """

    name = "differential-abundance"
    families = ("MRVI",)
    about = "log ratio of the densities that samples of two conditions have at each cell"
    options: ClassVar[type] = AbundanceOptions

    @override
    def check(self, facts: Facts, options: AbundanceOptions) -> None:
        require_samples(facts)
        require_terms(options.sample_covariates, products=False)
        require_at_least("cells", options.cells, 1)
        require_at_least("permutations", options.permutations, 19)

    @override
    def obs(self, facts: Facts, options: AbundanceOptions) -> tuple[str, ...]:
        group = (options.group_by,) if options.group_by else ()
        return tuple(dict.fromkeys((*columns_of(options.sample_covariates), *group)))

    @override
    def shape(self, facts: Facts, options: AbundanceOptions) -> Shape:
        columns = {f"abundance_{slug(term)}": "double" for term in options.sample_covariates}
        return Shape(columns, {"sample_log_density": facts.sample_categories})

    @override
    def strata(self, facts: Facts, options: AbundanceOptions) -> Strata:
        return Strata(facts.sample_key, options.cells)

    @override
    def prepare(self, cells: Cells, options: AbundanceOptions) -> Mapping[str, npt.NDArray[Any]]:
        told = _posteriors(cells)
        made = design(cells, told["component_of"], options.sample_covariates)
        for term, values in zip(options.sample_covariates, made.values.T, strict=True):
            if not set(np.unique(values)) <= {0.0, 1.0}:
                raise InputError(
                    f"--sample-covariates: '{term}' has other values than two, and abundance is compared between two.",
                    "Name a column of two values, or one value of it: stage=III.",
                )
            require_rank(Design(made.samples, values[:, None], ()), (term,))
        return told | made.told()

    @override
    def unit(self, cells: Cells, told: Mapping[str, npt.NDArray[Any]], options: AbundanceOptions) -> Part:
        own, made = own_samples(cells), Design.of(told)
        require_same(cells, own, made, options.sample_covariates)
        density = _densities(cells, told)
        columns = {
            f"abundance_{slug(term)}": _log_ratio(density[:, made.samples], own, made.samples, values > 0)
            for term, values in zip(options.sample_covariates, made.values.T, strict=True)
        }
        names, codes = groups_of(cells, options.group_by)
        others = made.samples[None] != own[:, None]
        sums = {
            "groups": names,
            "density": summed(np.where(others, density[:, made.samples], 0.0), codes, len(names)),
            "cells": summed(others, codes, len(names)),
        }
        return Part(columns, {"sample_log_density": density.astype(np.float32)}, sums | made.told())

    @override
    def finish(
        self, sums: Sequence[Mapping[str, npt.NDArray[Any]]], facts: Facts, options: AbundanceOptions
    ) -> Finished:
        import pandas as pd

        rows: list[dict[str, Any]] = []
        if not sums:
            return Finished()
        made = Design.of(sums[0])
        for name, one in together(sums, ("density", "cells")).items():
            there = one["cells"] > 0
            mean = one["density"][there] / one["cells"][there]
            for position, term in enumerate(options.sample_covariates):
                kept = Design(made.samples[there], made.values[there, position : position + 1], ())
                rows.append(
                    {"group": name, "term": term, "of": made.raised[position], **_compared(mean, kept, options)}
                )
        table = pd.DataFrame(rows, columns=["group", "term", "of", "difference", "samples", "p"])
        table["fdr"] = adjusted(table["p"].to_numpy(np.float64))
        return Finished(tables={"differential_abundance": table})


def _densities(cells: Cells, told: Mapping[str, npt.NDArray[Any]]) -> Matrix:
    """Log density of each sample's aggregated posterior at each cell, float64; NaN for samples without components."""
    u = cells.encoded.mean
    out = np.full((len(u), len(cells.facts.sample_categories)), np.nan)
    for code in np.unique(told["component_of"]):
        components = np.log((told["component_of"] == code).sum())
        for rows, found in _log_probabilities(u, told, int(code), _device(cells)):
            out[rows, code] = found.logsumexp(dim=1).cpu().numpy() - components
    return out


def _log_ratio(density: Matrix, own: LongArray, samples: LongArray, raised: npt.NDArray[np.bool_]) -> Matrix:
    """Log ratio of mean densities, without each cell's own sample; NaN where nothing is left on a side."""
    from scipy.special import logsumexp

    others = samples[None] != own[:, None]
    sides = []
    for chosen in (others & raised, others & ~raised):
        count = chosen.sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            found = logsumexp(np.where(chosen, density, -np.inf), axis=1) - np.log(count)
        sides.append(np.where(count > 0, found, np.nan))
    ratio: Matrix = sides[0] - sides[1]
    return ratio


def _compared(mean: Matrix, made: Design, options: AbundanceOptions) -> dict[str, Any]:
    """Difference of the samples' mean log densities, and its p-value by permutation of the samples."""
    raised = made.values[:, 0] > 0
    if len(raised) < 3 or raised.all() or not raised.any():
        return {"difference": np.nan, "samples": len(raised), "p": np.nan}
    inner = (mean[:, None] - mean.mean()) @ (mean[None] - mean.mean())
    _, p = Permuted.of(made, 0, options.permutations).test(inner[None])
    return {"difference": mean[raised].mean() - mean[~raised].mean(), "samples": len(raised), "p": p[0]}


ANALYSES: tuple[Analysis, ...] = (Admissible(), DifferentialAbundance())
