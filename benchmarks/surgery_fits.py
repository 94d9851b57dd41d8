"""Both ways of surgery, metered in CPU-seconds, and how what comes out of two of them agrees."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import warnings
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self
from unittest import mock

import numpy as np
import pyarrow as pa
import scvi
from sklearn.metrics import accuracy_score, f1_score
from sklearn.neighbors import NearestNeighbors

import pipelines as sv
from pipelines import mapping
from pipelines.query import told_surgery
from pipelines.surgery import Fitting
from scviaduct.references.exporting import export_model
from scviaduct.references.package import Reference
from scviaduct.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from benchmarks.surgery_data import Case
    from scviaduct.mapping.surgery import Surgery

PLAIN_EPOCHS = 200
NEIGHBORS = 15


@dataclass(frozen=True, slots=True)
class Outcome:
    """What surgery and mapping of some cells came to.

    Attributes
    ----------
    cells
        Names, str of shape ``(n,)``.
    latent
        float32, shape ``(n, d)``.
    labels
        str of shape ``(n,)``; all empty for a model without a classifier.
    cpu
        Stage to CPU-seconds of this process and of what it started.
    cell_epochs
        Cells that were trained on, times epochs, over all batches.
    epochs
        Of each batch.
    """

    cells: npt.NDArray[np.str_]
    latent: npt.NDArray[np.float32]
    labels: npt.NDArray[np.str_]
    cpu: dict[str, float]
    cell_epochs: int
    epochs: dict[str, int] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """CPU-seconds of all stages."""
        return sum(self.cpu.values())

    def of(self, cells: npt.NDArray[np.str_]) -> Outcome:
        """The same for some of the cells, in their order."""
        position = {name: row for row, name in enumerate(self.cells)}
        rows = np.array([position[name] for name in cells])
        return replace(self, cells=self.cells[rows], latent=self.latent[rows], labels=self.labels[rows])


class Cpu:
    """CPU-seconds of this process and its children in a ``with`` block."""

    seconds = 0.0

    def __enter__(self) -> Self:
        self._began = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += self._now() - self._began

    @staticmethod
    def _now() -> float:
        return sum(os.times()[:4])


def ours(case: Case, batches: Sequence[str], cells: int | None = None, **training: Any) -> Outcome:
    """``pipelines.map`` of some batches in this process, in a store of its own.

    Parameters
    ----------
    case
        What is mapped.
    batches
        Of the query.
    cells
        Of each batch that its adapter is fitted on; None for the default.
    **training
        What is changed of :class:`~scviaduct.mapping.fitting.Training`.
    """
    told = {"reference": str(case.package), "batch_key": case.batch_key, "engine": "inline", "quiet": True}
    source = f"{case.query}?filter={case.batch_key} in {list(batches)}"
    with tempfile.TemporaryDirectory() as store:
        with _metered(training) as fitting, Cpu() as whole:
            result = sv.map(source, store=store, surgery_cells=cells, **told)
        if result.state != "committed" or {item.state for item in result.adapters} != {"fitted"}:
            raise SystemExit(f"the run over {source} did not fit and map it all: {result}")
        space = Store.open(store).space()
        facts = [manifest["facts"] for manifest in space.adapters.manifests()]
        names = [dict(map(tuple, manifest["batch"]))["batch"] for manifest in space.adapters.manifests()]
        table = pa.concat_tables(list(space.read(["observation_id", "latent", "label"])))
        latent = np.stack(table["latent"].to_numpy()).astype(np.float32)
        labels = [label or "" for label in table["label"].to_pylist()]
        ids = np.array(table["observation_id"].to_pylist(), str)
    cpu = {"surgery": fitting.seconds, "mapping": whole.seconds - fitting.seconds}
    epochs = {name: fact["epochs"] for name, fact in zip(names, facts, strict=True)}
    return Outcome(ids, latent, np.array(labels, str), cpu, sum(fact["cell_epochs"] for fact in facts), epochs)


@contextlib.contextmanager
def _metered(training: dict[str, Any]) -> Iterator[Cpu]:
    """What the stage of surgery takes, with a training that the command line does not offer."""
    spent, run = Cpu(), Fitting.run

    def metered(*args: Any) -> None:
        with spent:
            run(*args)

    def told(*args: Any) -> Surgery:
        surgery = told_surgery(*args)
        return replace(surgery, training=replace(surgery.training, **training))

    with mock.patch.object(Fitting, "run", metered), mock.patch.object(mapping, "told_surgery", told):
        yield spent


def plain(case: Case, batches: Sequence[str], seed: int = 0, epochs: int = PLAIN_EPOCHS) -> Outcome:
    """scvi-tools' own surgery, one per batch: load, train, latents, labels.

    Parameters
    ----------
    case
        What is mapped.
    batches
        Of the query.
    seed
        Of scvi-tools.
    epochs
        Of each surgery.
    """
    reference = Reference.load(case.package)
    saved = case.package.with_name("model")
    if not saved.exists():
        export_model(reference, saved)
    cells, latents, labels, steps = [], [], [], 0
    with Cpu() as spent, _quiet():
        for batch in batches:
            query = case.read([batch])
            if case.labels_key:
                query.obs[case.labels_key] = reference.unlabeled_category
            scvi.settings.seed = seed
            model = getattr(scvi.model, case.family).load_query_data(query, str(saved), accelerator="cpu")
            model.train(
                max_epochs=epochs, plan_kwargs={"weight_decay": 0.0}, accelerator="cpu", enable_progress_bar=False
            )
            cells.append(query.obs_names.to_numpy(str))
            latents.append(model.get_latent_representation())
            labels.append(model.predict() if case.labels_key else np.full(query.n_obs, ""))
            steps += epochs * len(model.train_indices)
    found = np.concatenate(cells), np.concatenate(latents), np.concatenate(labels).astype(str)
    return Outcome(*found, {"surgery and mapping": spent.seconds}, steps, dict.fromkeys(batches, epochs))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    for name in ("scvi", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        yield


def scores(case: Case, outcome: Outcome) -> dict[str, float]:
    """Accuracy and macro F1 of the labels; nothing for a case without labels."""
    if not case.labels_key:
        return {}
    truth = case.read().obs[case.labels_key].loc[outcome.cells].to_numpy(str)
    f1 = f1_score(truth, outcome.labels, average="macro", labels=sorted(set(truth)), zero_division=0.0)
    return {"accuracy": round(float(accuracy_score(truth, outcome.labels)), 4), "macro_f1": round(float(f1), 4)}


def agreement(case: Case, one: Outcome, other: Outcome) -> dict[str, float]:
    """How two sets of latents of the same cells agree; the other's cells may be more.

    ``reference_overlap`` is the share of a cell's 15 nearest reference cells (Euclidean) that are the same by both,
    ``overlap`` that of its 15 nearest query cells of its batch; ``rms`` the root mean square difference in standard
    deviations of the other's latent dimensions; ``labels`` the share of cells of equal label.
    """
    other = other.of(one.cells)
    known = Reference.load(case.package).latents().latent
    batch = case.read().obs[case.batch_key].loc[one.cells].to_numpy(str)
    own = [np.flatnonzero(batch == name) for name in sorted(set(batch))]
    same = [_shared(_nearest(one.latent[rows]), _nearest(other.latent[rows])) * len(rows) for rows in own]
    difference = (one.latent - other.latent) / other.latent.std(axis=0)
    found = {
        "reference_overlap": _shared(_nearest(known, one.latent), _nearest(known, other.latent)),
        "overlap": round(sum(same) / len(batch), 4),
        "rms": round(float(np.sqrt((difference**2).mean())), 4),
    }
    return found | ({"labels": round(float((one.labels == other.labels).mean()), 4)} if case.labels_key else {})


def _nearest(known: npt.NDArray[np.float32], cells: npt.NDArray[np.float32] | None = None) -> npt.NDArray[np.int64]:
    """The 15 nearest of the known cells, which no cell is to itself."""
    near: npt.NDArray[np.int64] = (
        NearestNeighbors(n_neighbors=NEIGHBORS).fit(known).kneighbors(cells, return_distance=False)
    )
    return near


def _shared(one: npt.NDArray[np.int64], other: npt.NDArray[np.int64]) -> float:
    return round(float(np.mean([len(set(a) & set(b)) for a, b in zip(one, other, strict=True)])) / NEIGHBORS, 4)
