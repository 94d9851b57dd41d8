"""Cells and references that surgery is measured on: a simulation whose parameters are stated here, and two real sets.

Every reference reads its batch in all layers of the encoder (``encode_covariates``, the recipe ``scarches``), so that
surgery can move a latent. All are trained by ``pipelines.train`` and kept in the benchmark's folder for another run.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

import pipelines as sv
from scviaduct.simulation import Simulation
from scviaduct.simulation.cells import Dataset
from scviaduct.values import digest

SHARED = Path(os.environ.get("SCVIADUCT_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
SYMPHONY = "pbmc_10x_3tech_symphony.h5ad"
THP1 = "perturb_thp1_eccite_sceptre.h5ad"
SYMPHONY_QUERY = "5p"


@dataclass(frozen=True, slots=True)
class Design:
    """What is simulated; `scviaduct.simulation` says how counts arise from it.

    Attributes
    ----------
    known_batches, known_cells
        Batches of the reference, and cells of each.
    new_batches, cells
        Batches of the query, and its cells over all of them.
    genes
        Of all.
    capture_mean, capture_sd
        A batch captures a share ``min(1, exp(N(mean, sd)))`` of a gene's counts: a binomial draw of them is kept.
    composition_sd
        Cell types are kept in a batch with odds ``exp(N(0, sd))``, half of what was simulated in all.
    counts
        Median number of counts of a cell before capture, of the batches in turn.
    epochs, scanvi_epochs
        Of the reference.
    seed
        Of everything.
    """

    known_batches: int = 6
    known_cells: int = 1000
    new_batches: int = 12
    cells: int = 20_000
    genes: int = 1000
    capture_mean: float = -0.5
    capture_sd: float = 0.6
    composition_sd: float = 0.8
    counts: tuple[float, ...] = (1500.0, 1700.0, 1900.0, 2100.0)
    epochs: int = 40
    scanvi_epochs: int = 15
    seed: int = 3


@dataclass(frozen=True, slots=True)
class Case:
    """A query and the reference it is carried to.

    Attributes
    ----------
    name
        ``simulation``, ``pbmc``, ``thp1-rep_3``.
    family
        Of the reference, as scvi-tools calls it.
    package
        Folder of the reference.
    query
        h5ad of the query's raw counts.
    batch_key
        obs column of batches.
    labels_key
        obs column of labels; empty where there are none.
    batches
        Of the query, with their cells.
    about
        What the output says of it.
    """

    name: str
    family: str
    package: Path
    query: Path
    batch_key: str
    labels_key: str
    batches: dict[str, int]
    about: dict[str, Any]

    def read(self, batches: list[str] | None = None) -> anndata.AnnData:
        """The query's cells, or those of some batches."""
        cells = anndata.read_h5ad(self.query)
        return cells[cells.obs[self.batch_key].isin(batches)].copy() if batches else cells


def simulated(folder: Path, design: Design) -> Case:
    """The simulated query, and a SCANVI of the simulated reference; in a folder of its own for each design."""
    folder = folder / digest(asdict(design))[:12]
    folder.mkdir(parents=True, exist_ok=True)
    cells = [design.known_cells] * design.known_batches
    share, more = divmod(design.cells, design.new_batches)
    cells += [share + (number < more) for number in range(design.new_batches)]
    names = [f"known {i}" for i in range(design.known_batches)] + [f"new {i:02}" for i in range(design.new_batches)]
    studies = [
        # Twice the cells, half of which are kept.
        Dataset(name, name, "EFO:0", "blood", "UBERON:0", donors=2, counts=design.counts[i % 4], cells=2 * n)
        for i, (name, n) in enumerate(zip(names, cells, strict=True))
    ]
    simulation = Simulation(tuple(studies), design.genes, design.seed)
    batches = [_captured(simulation, number, design) for number in range(len(studies))]
    known, new = folder / "known.h5ad", folder / "query.h5ad"
    if not new.exists():
        anndata.concat(batches[: design.known_batches]).write_h5ad(known)
        anndata.concat(batches[design.known_batches :]).write_h5ad(new)
    package = folder / "scanvi"
    keys = {"batch_key": "batch", "labels_key": "cell_type"}
    _trained(known, package, "scanvi", design.epochs, design.scanvi_epochs, **keys)
    sizes = dict(zip(names[design.known_batches :], cells[design.known_batches :], strict=True))
    return Case("simulation", "SCANVI", package, new, "batch", "cell_type", sizes, asdict(design))


def _captured(simulation: Simulation, number: int, design: Design) -> anndata.AnnData:
    """Cells of a batch: of each type more or fewer, of each gene's counts a share."""
    parts = list(simulation.blocks(number))
    counts = sparse.vstack([matrix for matrix, _ in parts], format="csr")
    obs = pd.concat([frame for _, frame in parts], ignore_index=True)
    random = np.random.default_rng([design.seed, number])
    types = sorted(set(obs["cell_type"]))
    odds = dict(zip(types, np.exp(random.normal(0, design.composition_sd, len(types))), strict=True))
    weight = obs["cell_type"].map(odds).to_numpy(float)
    rows = np.sort(random.choice(len(obs), len(obs) // 2, replace=False, p=weight / weight.sum()))
    counts, obs = counts[rows], obs.iloc[rows]
    capture = np.minimum(1.0, np.exp(random.normal(design.capture_mean, design.capture_sd, design.genes)))
    counts.data = random.binomial(counts.data.astype(np.int64), capture[counts.indices]).astype(np.float32)
    counts.eliminate_zeros()
    name = simulation.datasets[number].assay
    frame = pd.DataFrame({"batch": name, "cell_type": obs["cell_type"].to_numpy(str)})
    frame.index = [f"{name}/{i}" for i in range(len(frame))]
    return anndata.AnnData(counts, obs=frame, var=pd.DataFrame(index=simulation.var()["feature_id"].to_numpy(str)))


def pbmc(folder: Path, epochs: int = 100, scanvi_epochs: int = 40) -> Case:
    """PBMC of 10x 3' v1 and v2 as a SCANVI, and those of 5' as the query."""
    cells = anndata.read_h5ad(SHARED / SYMPHONY)
    return _split(folder, cells, [SYMPHONY_QUERY], "scanvi", "cell_type", epochs, scanvi_epochs)


def thp1(folder: Path, query: str, epochs: int = 20) -> Case:
    """Two replicates of the THP-1 screen as an SCVI, and the third as the query."""
    cells = anndata.read_h5ad(SHARED / THP1)
    return _split(folder, cells, [query], "scvi", "", epochs, 0)


def _split(
    folder: Path,
    cells: anndata.AnnData,
    query: list[str],
    family: str,
    labels_key: str,
    epochs: int,
    scanvi_epochs: int,
) -> Case:
    """Some batches of real data as the query, the others as the reference."""
    new = cells.obs["batch"].isin(query).to_numpy()
    parts = {"known": cells[~new], "query": cells[new]}
    for name, part in parts.items():
        if not (folder / f"{name}.h5ad").exists():
            obs = part.obs[["batch", labels_key] if labels_key else ["batch"]].astype(str)
            anndata.AnnData(part.X, obs=obs, var=part.var[[]]).write_h5ad(folder / f"{name}.h5ad")
    keys = {"batch_key": "batch"} | ({"labels_key": labels_key} if labels_key else {})
    _trained(folder / "known.h5ad", folder / family, family, epochs, scanvi_epochs, **keys)
    told = {"reference_cells": int((~new).sum()), "genes": cells.n_vars, "epochs": epochs}
    if scanvi_epochs:
        told["scanvi_epochs"] = scanvi_epochs
    sizes = {name: int((cells.obs["batch"] == name).sum()) for name in query}
    package, path = folder / family, folder / "query.h5ad"
    return Case(folder.name, family.upper(), package, path, "batch", labels_key, sizes, told)


def _trained(cells: Path, package: Path, family: str, epochs: int, scanvi_epochs: int, **keys: str) -> None:
    """Train a reference that surgery can move, unless it is there."""
    if package.exists():
        return
    print(f"training {package}", flush=True)
    more = {"scanvi_epochs": scanvi_epochs} if scanvi_epochs else {}
    told = {"epochs": epochs, "calibrate_by": "none", "device": "cpu", "seed": 0, "engine": "inline", "quiet": True}
    sv.train(str(cells), family=family, out=package, recipe="scarches", genes=0, **keys, **told, **more)
