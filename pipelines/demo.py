"""The main job end to end on simulated cells: a reference is trained, a study is mapped, committed and searched.

A local collection of the Census schema takes the place of the Census. The reference is trained on two of its studies;
the third, of another assay and with patients among its donors, is the query. Its cell types are kept beside the labels,
to score them, and are used for nothing else.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipelines import reference
from pipelines.mapping import map as run_map
from pipelines.progress import reporter
from pipelines.searching import search
from pipelines.training import train
from scviaduct.errors import EngineError, InputError
from scviaduct.simulation import DATASETS, Simulation, write_census
from scviaduct.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipelines.progress import Reporter

_MARKER = ".scviaduct-demo"
_EPOCHS, _SCANVI_EPOCHS = 15, 6
_SHARD_CELLS = 2000
_ACTORS = 2
_K = 30


@dataclass(frozen=True, slots=True)
class DemoSummary:
    """What the demo came to.

    Attributes
    ----------
    folder
        Where everything lies.
    trained_on, cells, datasets
        Cells of the reference, query cells, and studies simulated.
    version
        Of the store.
    accuracy
        Share of query cells whose label is the simulation's cell type.
    ambiguous, accuracy_ambiguous
        Share of cells that are flagged, and the accuracy among them.
    purity
        Share of neighbours that are of the query cell's type.
    queries
        Cells searched with.
    seconds
        Of each stage: simulate, train, map (of which in actors: ``mapping``), search.
    """

    folder: str
    trained_on: int
    cells: int
    datasets: int
    version: int
    accuracy: float
    ambiguous: float
    accuracy_ambiguous: float
    purity: float
    queries: int
    seconds: dict[str, float]

    def facts(self) -> dict[str, str]:
        """As a person reads it."""
        spent = self.seconds
        folder = Path(self.folder)
        return {
            "simulated": f"{self.datasets} studies of the Census schema ({spent['simulate']:.0f} s)",
            "reference": f"scANVI on {self.trained_on:,} cells of two studies ({spent['train']:.0f} s)",
            "mapped": f"{self.cells:,} cells of the third, by {_ACTORS} Ray actors ({spent['map']:.0f} s; "
            f"{self.cells / spent['mapping']:,.0f} cells/s with the start of Ray and its actors)",
            "committed": f"version {self.version}",
            "accuracy": f"{self.accuracy:.1%} of the labels are the simulation's cell type",
            "ambiguous": f"{self.ambiguous:.1%} of the cells are flagged; accuracy among them "
            f"{self.accuracy_ambiguous:.1%}",
            "neighbours": f"{self.purity:.1%} of {_K} neighbours are of the query's type ({self.queries:,} queries, "
            f"{spent['search']:.1f} s with building the index)",
            "census": str(folder / "census"),
            "package": str(folder / "model"),
            "store": str(folder / "store"),
            "go on": f"scviaduct status {folder / 'store'}",
            "": f"scviaduct search {folder / 'store'} --label 'B cell' -k 5 --where \"disease = 'COVID-19'\"",
        }


def demo(folder: str | Path = "demo", *, cells: int = 24_000, quiet: bool = False) -> DemoSummary:
    """Run the main job end to end on simulated cells.

    Parameters
    ----------
    folder
        Where everything goes: the collection, the package, the store and the registry. What an earlier demo left there
        is replaced.
    cells
        Query cells to simulate.
    quiet
        Without progress.

    Raises
    ------
    InputError
        If the folder holds something else.
    """
    place = _prepare(Path(folder).absolute())
    query = replace(DATASETS[-1], cells=cells)
    simulation = Simulation((*DATASETS[:-1], query))
    seconds: dict[str, float] = {}
    with _home(place / "home"), reporter(quiet=quiet) as progress:
        with _stage("simulate", seconds):
            progress.say(f"simulating {simulation.cells:,} cells of {len(simulation.datasets)} studies")
            progress.start("simulating", simulation.cells)
            write_census(simulation, place / "census", progress.advance)
        census = f"census:simulated?organism=homo_sapiens&uri={place / 'census'}&filter=dataset_id"
        with _stage("train", seconds):
            known = ", ".join(f"'{dataset.id}'" for dataset in DATASETS[:-1])
            train(
                f"{census} in [{known}]",
                family="scanvi",
                labels_key="cell_type",
                batch_key="assay",
                epochs=_EPOCHS,
                scanvi_epochs=_SCANVI_EPOCHS,
                out=place / "model",
                quiet=quiet,
            )
            reference.add(place / "model", name="simulated", replace=True)
        with _stage("map", seconds):
            mapped = run_map(
                f"{census} == '{query.id}'",
                reference="simulated",
                store=str(place / "store"),
                keep_obs=["cell_type", "donor_id", "disease", "tissue_general"],
                shard_cells=_SHARD_CELLS,
                address="local",
                actors=_ACTORS,
                quiet=quiet,
            )
        if mapped.version is None or mapped.quarantined:
            raise EngineError(f"The demo's run {mapped.run} did not map every cell.", f"scviaduct status {place}/store")
        seconds["mapping"] = mapped.seconds["map"]
        trained_on = sum(dataset.cells for dataset in DATASETS[:-1])
        sizes = {"trained_on": trained_on, "cells": mapped.cells, "datasets": len(simulation.datasets)}
        scores = _score(place / "store", seconds, progress)
    return DemoSummary(str(place), **sizes, version=mapped.version, **scores, seconds=seconds)


def _score(store: Path, seconds: dict[str, float], progress: Reporter) -> dict[str, Any]:
    """Search, and compare labels and neighbours with the simulation's truth."""
    told = pa.concat_tables(Store.open(store).space().read(["label", "cell_type", "ambiguous", "observation_id"]))
    rows = told.unify_dictionaries().to_pandas()
    right = (rows["label"].astype(str) == rows["cell_type"].astype(str)).to_numpy()
    ambiguous = rows["ambiguous"].fillna(value=False).to_numpy(bool)
    with _stage("search", seconds):
        progress.say("building the index and searching it")
        hits = search(store, label="B cell", k=_K, out=store.parent / "hits.parquet", quiet=True)
    truth = dict(zip(rows["observation_id"], rows["cell_type"].astype(str), strict=True))
    same = [truth[query] == found for query, found in zip(*_columns(hits, "query", "cell_type"), strict=True)]
    return {
        "accuracy": float(right.mean()),
        "ambiguous": float(ambiguous.mean()),
        "accuracy_ambiguous": float(right[ambiguous].mean()) if ambiguous.any() else float("nan"),
        "purity": float(np.mean(same)),
        "queries": len(hits) // _K,
    }


def _columns(table: pa.Table, *names: str) -> list[list[str]]:
    return [table[name].to_pylist() for name in names]


def _prepare(folder: Path) -> Path:
    """An empty folder; only what an earlier demo left is removed."""
    marker = folder / _MARKER
    if folder.exists() and not marker.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"'{folder}' holds something that no demo made.", "Name another folder: --folder DIR.")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    marker.touch()
    return folder


@contextmanager
def _home(path: Path) -> Iterator[None]:
    """Register references in the demo's own folder."""
    before = os.environ.get("SCVIADUCT_HOME")
    os.environ["SCVIADUCT_HOME"] = str(path)
    try:
        yield
    finally:
        if before is None:
            del os.environ["SCVIADUCT_HOME"]
        else:
            os.environ["SCVIADUCT_HOME"] = before


@contextmanager
def _stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    began = time.monotonic()
    yield
    seconds[name] = time.monotonic() - began
