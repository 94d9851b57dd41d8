"""Behind :mod:`~scviaduct.analysis.sample_effects`: log fold changes of a slope, and scvi-tools' own test."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scviaduct.analysis.using import BATCH, own_batches, registered, seeded

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    import torch

    from scviaduct.analysis.base import Cells
    from scviaduct.analysis.donors import Design
    from scviaduct.analysis.sample_effects import EffectOptions
    from scviaduct.values import LongArray

    Matrix = npt.NDArray[np.float64]

_EPS = 1e-4
"""Added to expression before its logarithm, as scvi-tools does."""


def positions(cells: Cells, genes: Sequence[str]) -> LongArray:
    """Where genes lie among the reference's, int64."""
    known = {name: position for position, name in enumerate(cells.facts.names)}
    return np.array([known[name] for name in genes], np.int64)


def decoded_batches(cells: Cells, names: Sequence[str]) -> list[int]:
    """Codes of the batches to decode as; every one of the reference where none is named.

    Those of new batches are left out then: their rows in the decoder may not have been fitted.
    """
    known = list(cells.model.adata_manager.get_state_registry("batch")["categorical_mapping"])
    chosen = own_batches(cells.model, names or cells.facts.batch_categories)
    return [known.index(value) for value in chosen] if chosen != [None] else [0]


def fold_changes(
    cells: Cells, middle: torch.Tensor, values: torch.Tensor, weights: Matrix, batches: Sequence[int], genes: LongArray
) -> npt.NDArray[np.float32]:
    """Log2 fold changes of genes by the slope of each term, off the mean of the samples.

    Both sides are decoded of the same draw of ``u``; scvi-tools draws it for each, which adds noise to their ratio.

    Parameters
    ----------
    cells
        Whose model decodes.
    middle
        Mean ``z`` over samples, float32 of shape ``(n_cells, n_latent)``.
    values
        What each sample adds to it, float64 of shape ``(n_cells, n_samples, n_latent)``.
    weights
        Of :func:`~scviaduct.analysis.donors.slopes`.
    batches
        Codes of batches that the mean is taken over.
    genes
        Positions.

    Returns
    -------
    ndarray
        float32, shape ``(n_cells, n_terms, n_genes)``.
    """
    import torch

    module = cells.model.module
    slope = torch.einsum("ts,nsd->tnd", torch.as_tensor(weights, device=values.device), values).to(middle.dtype)
    chosen = torch.as_tensor(genes, device=middle.device)

    def decoded(z: torch.Tensor, batch: int) -> torch.Tensor:
        ones = torch.ones((len(z), 1), device=z.device)
        codes = torch.full((len(z), 1), batch, device=z.device)
        return torch.log2(module.px(z, codes, size_factor=ones).mean[:, chosen] + _EPS)

    with torch.inference_mode():
        total = torch.zeros((len(weights), len(middle), len(genes)), device=middle.device)
        for batch in batches:
            before = decoded(middle, batch)
            for term, moved in enumerate(slope):
                total[term] += decoded(middle + moved, batch) - before
    out: npt.NDArray[np.float32] = (total / len(batches)).transpose(0, 1).cpu().numpy()
    return out


def scvi_effects(cells: Cells, made: Design, options: EffectOptions) -> tuple[Matrix, Matrix, npt.NDArray[np.float32]]:
    """Effect sizes, p-values and log fold changes as scvi-tools' ``differential_expression`` gives them.

    Its table of samples is made of the design, since a model in a worker has seen other cells than those it was trained
    on; it is put back afterwards. The terms go in as numbers, which scvi-tools scales to between 0 and 1.
    """
    import pandas as pd

    model, terms = cells.model, [f"term {position}" for position in range(made.values.shape[1])]
    code = {str(name): position for position, name in enumerate(model.sample_order)}
    names = [cells.facts.sample_categories[position] for position in made.samples]
    info = pd.DataFrame(0.0, index=range(len(model.sample_order)), columns=terms)
    info.loc[[code[name] for name in names]] = made.values
    genes = positions(cells, options.genes)
    before = model.sample_info
    with registered(model, cells.data) as data, seeded(cells.seed):
        model.sample_info = info
        try:
            told = model.differential_expression(
                data,
                sample_cov_keys=terms,
                sample_subset=[name for name in model.sample_order if str(name) in names],
                batch_size=BATCH,
                mc_samples=options.samples,
                store_lfc=len(genes) > 0,
                delta=None,
            )
        finally:
            model.sample_info = before
    changes = told["lfc"].values[:, :, genes] if len(genes) else np.zeros((len(cells.data), len(terms), 0))
    effect, p = (told[name].values.astype(np.float64) for name in ("effect_size", "pvalue"))
    return effect, p, changes.astype(np.float32)
