"""A cohort whose effects are planted: donors of two genotypes, unstimulated or stimulated, and cell types that differ.

The expected counts of a cell are its size times ``softmax(base + type + donor + effect)``, every term but the first a
vector of natural log fold changes, and its counts are negative binomial draws. A donor's own vector is drawn anew for
each cell type, so that donors differ as much within a condition as between conditions wherever nothing is planted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    import numpy.typing as npt
    from anndata import AnnData

GENOTYPES, STIMULATIONS = ("reference", "variant"), ("control", "stimulated")


@dataclass(frozen=True, slots=True)
class Cohort:
    """Cells of a cohort; the same arguments give the same cells.

    Four cell types: ``genotype`` has its marked genes changed in donors of the variant, ``interaction`` in those of
    them that are stimulated, ``null`` in none; ``abundance`` changes no gene, and there is more of it in stimulated
    donors.

    Attributes
    ----------
    donors
        Number of donors, a multiple of four; the four conditions have as many each.
    cells
        Of each donor.
    genes
        Measured.
    marked
        Genes that a planted effect changes, from the first gene on.
    effect
        Natural log fold change of the marked genes; every other one of them goes down by as much.
    donor_effect
        Standard deviation of a donor's log fold changes within a cell type.
    expansion
        Factor on the share of ``abundance`` in stimulated donors.
    counts
        Median number of counts of a cell.
    dispersion
        Of the negative binomial: variance ``mean + dispersion * mean**2``.
    seed
        Of everything random.
    """

    TYPES = ("genotype", "interaction", "null", "abundance")

    donors: int = 12
    cells: int = 200
    genes: int = 100
    marked: int = 10
    effect: float = 1.0
    donor_effect: float = 0.1
    expansion: float = 3.0
    counts: float = 1000.0
    dispersion: float = 0.1
    seed: int = 0

    def obs(self) -> pd.DataFrame:
        """One row a cell: ``donor``, ``genotype``, ``stimulation``, ``batch`` and ``cell_type``.

        From eight donors on, either of the two batches has every condition.
        """
        rng = np.random.default_rng([self.seed, 0])
        donor = np.repeat(np.arange(self.donors), self.cells)
        stimulated = donor // 2 % 2
        shares = np.ones((self.donors, len(self.TYPES)))
        shares[stimulated[:: self.cells] == 1, self.TYPES.index("abundance")] = self.expansion
        kinds = [rng.choice(len(self.TYPES), self.cells, p=share / share.sum()) for share in shares]
        columns = {
            "donor": np.array([f"D{number:02d}" for number in range(self.donors)])[donor],
            "genotype": np.array(GENOTYPES)[donor % 2],
            "stimulation": np.array(STIMULATIONS)[stimulated],
            "batch": np.array(["run 1", "run 2"])[donor // 4 % 2],
            "cell_type": np.array(self.TYPES)[np.concatenate(kinds)],
        }
        index = pd.Index([f"cell{number}" for number in range(len(donor))])
        return pd.DataFrame({name: pd.Categorical(values) for name, values in columns.items()}, index=index)

    def fold_changes(self) -> npt.NDArray[np.float64]:
        """What a planted effect adds to the logarithm of each gene, float64 of shape ``(genes,)``."""
        signs = np.where(np.arange(self.genes) % 2, -1.0, 1.0)
        return np.where(np.arange(self.genes) < self.marked, self.effect * signs, 0.0)

    def cohort(self) -> AnnData:
        """The cells: float32 CSR counts, :meth:`obs`, and genes ``G0``, ``G1`` and so on."""
        from anndata import AnnData
        from scipy import sparse

        obs, rng = self.obs(), np.random.default_rng([self.seed, 1])
        kind, donor = (obs[name].cat.codes.to_numpy() for name in ("cell_type", "donor"))
        types = obs["cell_type"].cat.categories
        base = rng.normal(0, 1, self.genes)
        programs = rng.normal(0, 1, (len(types), self.genes))
        donors = rng.normal(0, self.donor_effect, (len(types), self.donors, self.genes))
        logits = base + programs[kind] + donors[kind, donor]
        variant, stimulated = donor % 2 == 1, donor // 2 % 2 == 1
        changed = (types[kind] == "genotype") & variant | (types[kind] == "interaction") & variant & stimulated
        logits[changed] += self.fold_changes()
        rates = np.exp(logits)
        sizes = rng.lognormal(np.log(self.counts), 0.3, len(obs))
        mean = rates / rates.sum(axis=1, keepdims=True) * sizes[:, None]
        shape = 1 / self.dispersion
        counts = rng.poisson(rng.gamma(shape, mean / shape)).astype(np.float32)
        var = pd.DataFrame(index=[f"G{number}" for number in range(self.genes)])
        return AnnData(sparse.csr_matrix(counts), obs=obs, var=var)
