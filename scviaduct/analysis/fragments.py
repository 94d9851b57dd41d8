"""What POISSONVI is asked of peaks, by scvi-tools' own methods but for what of them is wrong: where, is said."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, override

import numpy as np

from scviaduct.analysis.accessibility import AccessibilityDifferenceOptions, PeakviAccessibility, PeakviDifference
from scviaduct.analysis.base import Analysis, Part
from scviaduct.analysis.using import (
    BATCH,
    correcting,
    in_order,
    own_batches,
    pieces,
    registered,
    require_at_least,
    seeded,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy.typing as npt
    import pandas as pd

    from scviaduct.analysis.base import Cells
    from scviaduct.families.base import Facts

_LEAST_CELLS = 100
"""scvi-tools looks at as many to see whether a POISSONVI gets counts of fragments, and fails on fewer."""


@dataclass(frozen=True, slots=True)
class PoissonAccessibilityOptions:
    """What POISSONVI's accessibility is told.

    Attributes
    ----------
    peaks, transform_batch
        As of PEAKVI.
    library_size
        Fragments that a cell's accessibility adds up to over all peaks; 0 for the cell's own.
    samples
        Posterior samples of a cell that the mean is taken over.
    """

    peaks: tuple[str, ...] = ()
    transform_batch: tuple[str, ...] = ()
    library_size: float = 10_000.0
    samples: int = 10


class PoissonviAccessibility(PeakviAccessibility):
    """The fragments that POISSONVI decodes (Martens et al. 2024), by ``get_normalized_accessibility``.

    With the bias of the region taken out, as scvi-tools does it unless told otherwise.
    """

    families = ("POISSONVI",)
    about = "Decoded fragments of chosen peaks, at one depth, region factors taken out."
    options: ClassVar[type] = PoissonAccessibilityOptions

    @override
    def check(self, facts: Facts, options: Any) -> None:
        super().check(facts, options)
        require_at_least("library_size", options.library_size, 0)
        require_at_least("samples", options.samples, 1)

    @override
    def unit(self, cells: Cells, told: Mapping[str, npt.NDArray[Any]], options: Any) -> Part:
        """Matrix ``accessibility``, float32 of shape ``(n_cells, n_peaks)``, in fragments per ``library_size``."""
        names = options.peaks or cells.facts.names
        batches = own_batches(cells.model, options.transform_batch)
        out = np.empty((cells.data.n_obs, len(names)), np.float32)
        order = in_order(names, cells.facts.names)
        with seeded(cells.seed), _enough(cells) as data, _regions_kept(cells.model):
            for rows in pieces(len(out), len(names) * options.samples):
                found = cells.model.get_normalized_accessibility(
                    data,
                    indices=rows,
                    transform_batch=batches,
                    region_list=list(options.peaks) or None,
                    library_size=options.library_size or "latent",
                    n_samples=options.samples,
                    batch_size=BATCH,
                    return_numpy=True,
                )
                out[rows] = found[:, order]
        return Part(matrices={"accessibility": out})


@contextlib.contextmanager
def _enough(cells: Cells) -> Iterator[Any]:
    """The cells, registered with a POISSONVI; a unit may have fewer than it takes: then they stand there repeatedly.

    The first are the cells, once each.
    """
    from scviaduct.families.vae import quiet

    data = cells.data
    if data.n_obs < _LEAST_CELLS:
        with quiet():  # of names that stand there repeatedly
            data = data[np.resize(np.arange(data.n_obs), _LEAST_CELLS)].copy()
        data.obs_names = [f"cell-{i}" for i in range(_LEAST_CELLS)]
    with registered(cells.model, data):
        yield data


@contextlib.contextmanager
def _regions_kept(model: Any) -> Iterator[None]:
    """Put back the region factors of a POISSONVI.

    scvi-tools sets them to zero for as long as it decodes: it leaves them so if it fails, and another parameter, which
    requires a gradient, in their place if it does not.
    """
    layer = model.module.decoder.px_scale_decoder[-2]
    kept = layer.bias
    try:
        yield
    finally:
        layer.bias = kept


class PoissonviDifference(PeakviDifference):
    """Bayesian differential accessibility of POISSONVI (Martens et al. 2024), on scvi-tools' own computation.

    Not by its ``differential_accessibility``: that tells the computation "no change" where it asks for "lower", and
    takes the larger of the two probabilities, so that a peak that surely does not change is called different.
    """

    families = ("POISSONVI",)

    @override
    def _table(
        self, cells: Cells, first: npt.NDArray[np.bool_], options: AccessibilityDifferenceOptions
    ) -> pd.DataFrame:
        import pandas as pd
        from scvi.model.base import DifferentialComputation

        with _enough(cells) as data, _regions_kept(cells.model):
            model, masks = cells.model, [np.zeros(data.n_obs, bool) for _ in range(2)]
            masks[0][: len(first)], masks[1][: len(first)] = first, ~first

            def decode(adata: Any, **told: Any) -> Any:
                return model.get_normalized_accessibility(adata, return_numpy=True, batch_size=BATCH, **told)

            batches = correcting(cells, options)
            found = DifferentialComputation(decode, None, model.get_anndata_manager(data)).get_bayes_factors(
                *masks,
                mode=options.mode,
                delta=options.delta,
                batchid1=batches,
                batchid2=batches,
                use_observed_batches=not options.batch_correction,
                n_samples_overall=options.samples,
            )
            counts = data.layers[cells.facts.layer] if cells.facts.layer else data.X
            detected = [np.asarray((counts[mask] > 0).mean(axis=0)).ravel() for mask in masks]
        table = pd.DataFrame(index=list(cells.facts.names))
        if options.mode == "change":
            table["proba_da"] = found["proba_de"]
            table["is_da"] = called(table["proba_da"].to_numpy(), options.fdr)
        else:
            table["proba_higher"] = found["proba_m1"]
        table["bayes_factor"] = found["bayes_factor"]
        for name in ("lfc_mean", "lfc_median") if options.mode == "change" else ():
            table[name] = found[name]
        for side, shown in enumerate(detected, 1):
            table[f"estimated{side}"], table[f"detected{side}"] = found[f"scale{side}"], shown
        return table


def called(probability: npt.NDArray[Any], fdr: float) -> npt.NDArray[np.bool_]:
    """The most probable features whose posterior expected share of false ones is at most ``fdr``.

    Parameters
    ----------
    probability
        Of being different, shape ``(n_features,)``.
    fdr
        Between 0 and 1.
    """
    order = np.argsort(-probability, kind="stable")
    expected = np.cumsum(1 - probability[order]) / np.arange(1, len(order) + 1)
    found = np.zeros(len(order), bool)
    found[order[: int((expected <= fdr).sum())]] = True
    return found


ANALYSES: tuple[Analysis, ...] = (PoissonviAccessibility(), PoissonviDifference())
