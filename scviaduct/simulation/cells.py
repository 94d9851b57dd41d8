"""A small generative model of single-cell counts: cell types with gene programs, donors, and assays as batches.

The expected counts of a cell are its size times ``softmax(base + lineage + type + assay + donor + state)``, every term
but the first a vector of log fold changes, and its counts are Poisson draws. Cells of one type differ along a few
continuous axes (``state``), which makes counts overdispersed across cells, as real ones are. Lineages share most of
their program, so that a T cell is harder to tell from another T cell than from a B cell.
"""

from __future__ import annotations

import hashlib
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    Rates = npt.NDArray[np.float32]

BLOCK_CELLS = 4096
"""Cells that are simulated at a time; the expected counts of a block are dense (4,096 x 3,000 are 49 MB)."""
_STATES = 4


@dataclass(frozen=True, slots=True)
class CellType:
    """A cell type by its Cell Ontology name and id, the lineage whose program it shares, and its share of the cells."""

    name: str
    ontology: str
    lineage: str
    share: float


CELL_TYPES = (
    CellType("CD4-positive, alpha-beta T cell", "CL:0000624", "lymphoid", 0.28),
    CellType("CD8-positive, alpha-beta T cell", "CL:0000625", "lymphoid", 0.18),
    CellType("natural killer cell", "CL:0000623", "lymphoid", 0.12),
    CellType("B cell", "CL:0000236", "humoral", 0.14),
    CellType("plasma cell", "CL:0000786", "humoral", 0.04),
    CellType("classical monocyte", "CL:0000860", "myeloid", 0.16),
    CellType("non-classical monocyte", "CL:0000875", "myeloid", 0.05),
    CellType("dendritic cell", "CL:0000451", "myeloid", 0.03),
)
"""Cell types of every dataset; the shares sum to one."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """One simulated study.

    Attributes
    ----------
    title
        Its name; ``dataset_id`` is the UUID of it.
    assay, assay_ontology
        Technology, the batch of its cells, and its id in the Experimental Factor Ontology.
    tissue, tissue_ontology
        Where the cells come from, and its id in UBERON.
    diseases
        Of its donors, in turn: pairs of name and ontology id.
    donors
        Number of donors.
    counts
        Median number of counts of a cell.
    cells
        Number of cells.
    """

    title: str
    assay: str
    assay_ontology: str
    tissue: str
    tissue_ontology: str
    diseases: tuple[tuple[str, str], ...] = (("normal", "PATO:0000461"),)
    donors: int = 4
    counts: float = 2500.0
    cells: int = 3000

    @property
    def id(self) -> str:
        """``dataset_id``, as a Census names its datasets."""
        return str(uuid.uuid5(uuid.NAMESPACE_URL, f"scviaduct:{self.title}"))


_COVID = ("COVID-19", "MONDO:0100096")
DATASETS = (
    Dataset("Blood of eight donors, 3' v2", "10x 3' v2", "EFO:0009899", "blood", "UBERON:0000178", donors=8),
    Dataset("Lung of six donors, 3' v3", "10x 3' v3", "EFO:0009922", "lung", "UBERON:0002048", donors=6, counts=4000.0),
    Dataset(
        "Blood of patients, 5' v1",
        "10x 5' v1",
        "EFO:0011025",
        "blood",
        "UBERON:0000178",
        diseases=(("normal", "PATO:0000461"), _COVID),
        donors=6,
        counts=2000.0,
    ),
)
"""Three studies of three assays: two to train a reference on, one to be mapped."""


@dataclass(frozen=True, slots=True)
class Simulation:
    """Cells of several studies; the same arguments give the same cells, block by block.

    Attributes
    ----------
    datasets
        The studies.
    genes
        Measured in all of them.
    seed
        Of everything random.
    """

    datasets: tuple[Dataset, ...] = DATASETS
    genes: int = 3000
    seed: int = 0

    @property
    def cells(self) -> int:
        """Number of cells, over all datasets."""
        return sum(dataset.cells for dataset in self.datasets)

    def var(self) -> pd.DataFrame:
        """Ensembl-like ids (``feature_id``) and symbols (``feature_name``) of the genes."""
        names = [f"ENSG9{number:010d}" for number in range(self.genes)]
        return pd.DataFrame({"feature_id": names, "feature_name": [f"SIM{number}" for number in range(self.genes)]})

    def blocks(self, number: int) -> Iterator[tuple[sparse.csr_matrix, pd.DataFrame]]:
        """Counts and obs of a dataset, at most ``BLOCK_CELLS`` cells at a time.

        Parameters
        ----------
        number
            Position in ``datasets``.

        Yields
        ------
        tuple of csr_matrix and DataFrame
            float32 integer counts of shape ``(cells, genes)``, and ``cell_type``, ``donor_id`` and the other columns
            that a Census keeps of a cell.
        """
        programs = _Programs.of(self)
        dataset = self.datasets[number]
        assay = _random(self.seed, "assay", dataset.assay).normal(0, 0.25, self.genes)
        donors = _random(self.seed, "donors", dataset.id).normal(0, 0.1, (dataset.donors, self.genes))
        for start in range(0, dataset.cells, BLOCK_CELLS):
            cells = min(BLOCK_CELLS, dataset.cells - start)
            random = _random(self.seed, "block", dataset.id, start)
            types = random.choice(len(CELL_TYPES), cells, p=[kind.share for kind in CELL_TYPES])
            donor = random.integers(dataset.donors, size=cells)
            state = random.normal(0, 1, (cells, _STATES)).astype(np.float32)
            rates: Rates = state @ programs.states
            rates += programs.types[types]
            rates += (assay + donors).astype(np.float32)[donor]
            np.exp(rates, out=rates)
            size = dataset.counts * np.exp(random.normal(0, 0.4, cells))
            rates *= (size / rates.sum(1))[:, None].astype(np.float32)
            counts = sparse.csr_matrix(random.poisson(rates).astype(np.float32))
            yield counts, self._obs(dataset, start, types, donor)

    @staticmethod
    def _obs(dataset: Dataset, start: int, types: npt.NDArray[np.int64], donor: npt.NDArray[np.int64]) -> pd.DataFrame:
        cells = len(types)
        disease = [dataset.diseases[number % len(dataset.diseases)] for number in donor]
        own = dataset.id
        keys = [hashlib.blake2b(f"{own}/{start + i}".encode(), digest_size=5).hexdigest() for i in range(cells)]
        return pd.DataFrame(
            {
                "dataset_id": own,
                "assay": dataset.assay,
                "assay_ontology_term_id": dataset.assay_ontology,
                "cell_type": [CELL_TYPES[number].name for number in types],
                "cell_type_ontology_term_id": [CELL_TYPES[number].ontology for number in types],
                "disease": [name for name, _ in disease],
                "disease_ontology_term_id": [ontology for _, ontology in disease],
                "donor_id": [f"{own[:4]}-{number}" for number in donor],
                "tissue": dataset.tissue,
                "tissue_ontology_term_id": dataset.tissue_ontology,
                "tissue_general": dataset.tissue,
                "tissue_general_ontology_term_id": dataset.tissue_ontology,
                "tissue_type": "tissue",
                "suspension_type": "cell",
                "is_primary_data": True,
                "observation_joinid": keys,
            }
        )


@dataclass(frozen=True, slots=True)
class _Programs:
    """Log expression of every cell type, float32 ``(types, genes)``, and of the axes along which cells differ."""

    types: Rates
    states: Rates

    @classmethod
    def of(cls, simulation: Simulation) -> _Programs:
        genes = simulation.genes
        base = _random(simulation.seed, "base").normal(0, 1.2, genes)
        types = np.empty((len(CELL_TYPES), genes), np.float32)
        for number, kind in enumerate(CELL_TYPES):
            lineage = _program(_random(simulation.seed, "lineage", kind.lineage), genes, share=0.06, strength=1.2)
            own = _program(_random(simulation.seed, "type", kind.name), genes, share=0.03, strength=0.7)
            types[number] = base + lineage + own
        states = _random(simulation.seed, "states").normal(0, 0.15, (_STATES, genes)).astype(np.float32)
        return cls(types, states)


def _program(random: np.random.Generator, genes: int, *, share: float, strength: float) -> npt.NDArray[np.float64]:
    """Log fold changes: ``share`` of the genes go up by about ``strength``, the others stay."""
    change = np.zeros(genes)
    chosen = random.random(genes) < share
    change[chosen] = np.abs(random.normal(strength, 0.5, int(chosen.sum())))
    return change


def _random(*key: object) -> np.random.Generator:
    """A generator of its own for each part, so that more datasets or cells do not change those that are there."""
    told = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(told, "little"))
