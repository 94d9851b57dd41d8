"""What each sample would make of a cell: MRVI's counterfactual ``z`` (Boyeau et al., Nature Methods 2025).

A cell's state ``u`` knows no sample; the attention network makes ``z = base(u) + residual(u, sample)`` of it for any
sample. scvi-tools' own methods encode each cell's counts again for every sample; here they start from the ``u`` that
the reference's encoder gave with the adapters of the cell's batch, so that the counts are read once and new samples
count like old ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from scviaduct.errors import DataError, InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt
    import torch

    from scviaduct.analysis.base import Cells
    from scviaduct.families.base import Facts
    from scviaduct.values import FloatArray, LongArray

_VALUES = 1 << 20
"""Values of ``z`` that are held at once (4 MB); the attention holds some twenty times as many."""
_EPS = 1e-3
"""What scvi-tools adds to the scale of the residual, in a model with ``use_map=False``."""


def require_samples(facts: Facts) -> None:
    """Refuse a reference that has no samples to compare.

    Raises
    ------
    InputError
        If it has fewer than two.
    """
    if len(facts.sample_categories) < 2:
        told = f"the reference knows {len(facts.sample_categories)} samples"
        raise InputError(
            f"Samples cannot be compared: {told}.", "Train it with a column of them: --sample-key donor, say."
        )


def codes_in_model(cells: Cells) -> LongArray:
    """Where each sample of the facts lies in the model's embedding, int64 of shape ``(n_samples,)``.

    Raises
    ------
    InputError
        If the model does not know a sample.
    """
    known = {str(name): position for position, name in enumerate(cells.model.sample_order)}
    missing = [name for name in cells.facts.sample_categories if name not in known]
    if missing:
        raise InputError(f"The model does not know the sample '{missing[0]}'.", "Fit an adapter for it first.")
    return np.array([known[name] for name in cells.facts.sample_categories], np.int64)


def own_samples(cells: Cells) -> LongArray:
    """Position of each cell's sample among those of the facts, int64 of shape ``(n_cells,)``.

    Raises
    ------
    DataError
        If a cell is of a sample that is not among them.
    """
    known = {name: position for position, name in enumerate(cells.facts.sample_categories)}
    values = cells.data.obs[cells.facts.sample_key].astype(str).to_numpy()
    unknown = next((value for value in values if value not in known), None)
    if unknown is not None:
        raise DataError(
            f"{cells.facts.sample_key}: the sample '{unknown}' is not one of the reference's {len(known)}.",
            "Derive this of cells of its samples, or fit an adapter for the new one first.",
        )
    return np.array([known[value] for value in values], np.int64)


def pieces(n_cells: int, values: int) -> Iterator[slice]:
    """The cells, so many at a time that of ``values`` a cell a bounded number is held."""
    step = max(_VALUES // max(values, 1), 1)
    for start in range(0, n_cells, step):
        yield slice(start, min(start + step, n_cells))


class Counterfactual:
    """A cell's ``z``, sample by sample.

    Parameters
    ----------
    cells
        Of an MRVI.
    """

    def __init__(self, cells: Cells) -> None:
        import torch

        self._qz: Any = cells.model.module.qz
        self._device = next(cells.model.module.parameters()).device
        self.samples = torch.as_tensor(codes_in_model(cells), device=self._device)
        self.location: FloatArray = cells.encoded.location
        self._scale: FloatArray = np.sqrt(cells.encoded.variance)
        # Noise is drawn on the CPU, so that a GPU gives the values that a CPU gives.
        self._generator = torch.Generator().manual_seed(cells.seed % 2**63)

    def mean(self, rows: slice) -> torch.Tensor:
        """``u`` of some cells at the posterior's mean, float32 of shape ``(n_cells, n_latent_u)``."""
        import torch

        return torch.as_tensor(np.ascontiguousarray(self.location[rows]), device=self._device)

    def noise(self, *shape: int) -> torch.Tensor:
        """Standard normal draws, from the seed of the cells."""
        import torch

        return torch.randn(shape, generator=self._generator).to(self._device)

    def draw(self, rows: slice, copies: int) -> torch.Tensor:
        """``u`` drawn from the posterior, float32 of shape ``(n_cells, copies, n_latent_u)``."""
        import torch

        mean = self.mean(rows)[:, None]
        scale = torch.as_tensor(np.ascontiguousarray(self._scale[rows]), device=self._device)[:, None]
        return mean + scale * self.noise(len(mean), copies, mean.shape[-1])

    def residual(self, u: torch.Tensor, samples: torch.Tensor, *, drawn: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """What ``u`` alone gives, and what samples add to it.

        Parameters
        ----------
        u
            float32, shape ``(..., n_latent_u)``.
        samples
            Positions in the model's embedding, int64 of the shape of ``u`` without its last dimension.
        drawn
            Whether the residual of a model that has a posterior of it (``use_map=False``) is drawn, and not its mean.

        Returns
        -------
        base, residual : torch.Tensor
            float32, shape ``(..., n_latent)`` each; ``z`` is their sum.
        """
        import torch

        with torch.inference_mode():
            base, found = self._qz(u.reshape(-1, u.shape[-1]), samples.reshape(-1, 1))
            size = base.shape[-1]
            residual = found[..., :size]
            if found.shape[-1] != size and drawn:
                scale = torch.nn.functional.softplus(found[..., size:]) + _EPS
                residual = residual + scale * self.noise(*residual.shape)
            return base.reshape(*u.shape[:-1], size), residual.reshape(*u.shape[:-1], size)

    def shifts(self, u: torch.Tensor, *, drawn: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """What every sample makes of the same ``u``.

        Parameters
        ----------
        u
            float32, shape ``(n_cells, n_latent_u)``.
        drawn
            See :meth:`residual`.

        Returns
        -------
        base, residual : torch.Tensor
            float32, shapes ``(n_cells, n_latent)`` and ``(n_cells, n_samples, n_latent)``.
        """
        count = len(self.samples)
        base, residual = self.residual(
            u[:, None].expand(-1, count, -1), self.samples.expand(len(u), count), drawn=drawn
        )
        return base[:, 0], residual


def groups_of(cells: Cells, column: str) -> tuple[npt.NDArray[np.str_], LongArray]:
    """Groups of cells by an obs column, in the order of their names.

    Parameters
    ----------
    cells
        With the column in ``obs``.
    column
        Empty for one group of all cells, whose name is empty.

    Returns
    -------
    names : ndarray of str
        Those that occur.
    codes : ndarray of int64
        Position of each cell's; -1 for a cell without a value, which is in no group.
    """
    if not column:
        return np.array([""]), np.zeros(len(cells.obs), np.int64)
    values = cells.obs[column]
    there = values.notna().to_numpy()
    names, found = np.unique(values[there].astype(str).to_numpy(np.str_), return_inverse=True)
    codes = np.full(len(values), -1, np.int64)
    codes[there] = found
    return names, codes


def summed(values: npt.NDArray[Any], codes: LongArray, groups: int) -> npt.NDArray[np.float64]:
    """Sums over the cells of each group, float64 of shape ``(groups, ...)``; cells of no group are left out."""
    out = np.zeros((groups, *values.shape[1:]))
    np.add.at(out, codes[codes >= 0], values[codes >= 0].astype(np.float64))
    return out
