"""The deriving actor: holds one model, decodes blocks, stages what an analysis makes of them; and its reader."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import faiss
import numpy as np
import ray
import torch

from scviaduct import faults
from scviaduct.analysis import Comparison, Output, Part, analysis
from scviaduct.errors import DataError
from scviaduct.mapping.decoding import Decoder, Wanted, source_column
from scviaduct.mapping.mapper import Mapper
from scviaduct.mapping.picking import Picked, pick
from scviaduct.references.package import Reference
from scviaduct.values import digest

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from scviaduct.analysis import Finished
    from scviaduct.mapping.fleet import Fleet
    from scviaduct.store import DerivedCompletion, DerivedStager
    from scviaduct.values import CellBlock, Settings, Unit

_REFERENCES: dict[str, Reference] = {}


@dataclass(frozen=True, slots=True)
class Deriving:
    """What a worker is told of an analysis; picklable, without tensors.

    Attributes
    ----------
    reference
        Path of the package.
    family
        Of the reference.
    settings
        With which the cells were mapped.
    fleet
        Adapters of all their query batches.
    what, options
        The analysis, and what it was told.
    told
        What :meth:`Output.prepare` gave.
    seed
        Text that everything random depends on, besides the unit.
    """

    reference: str
    family: str
    settings: Settings
    fleet: Fleet | None
    what: str
    options: Any
    told: Mapping[str, npt.NDArray[Any]]
    seed: str = ""

    def seed_of(self, unit: str) -> int:
        """Seed of a unit: what is drawn for a cell does not depend on who computes it."""
        return int(digest(self.what, self.seed, unit)[:12], 16)

    def load(self) -> Reference:
        """The package, read once per process."""
        if self.reference not in _REFERENCES:
            _REFERENCES[self.reference] = Reference.load(self.reference)
        return _REFERENCES[self.reference]

    def wanted(self, obs: tuple[str, ...]) -> Wanted:
        """obs columns to read."""
        return Wanted.of(self.load(), self.settings, self.fleet, obs)


class DerivingWorker:
    """Decodes blocks with a model that it loads once.

    Parameters
    ----------
    deriving
        What is derived.
    stager
        Where values go.
    device
        ``"cpu"`` or ``"cuda"``; None for the GPU that Ray assigned to this process, if any.

    Notes
    -----
    The process computes on one thread from then on, as a mapping worker does.
    """

    def __init__(self, deriving: Deriving, stager: DerivedStager | None, device: str | None = None) -> None:
        torch.set_num_threads(1)
        faiss.omp_set_num_threads(1)
        self.device = device or ("cuda" if ray.get_gpu_ids() and torch.cuda.is_available() else "cpu")
        self._deriving, self._stager = deriving, stager
        self._analysis = analysis(deriving.what, deriving.family)
        self._decoder = Decoder(deriving.load(), deriving.settings, deriving.fleet, self.device)

    @property
    def decoder(self) -> Decoder:
        """What decodes."""
        return self._decoder

    def describe(self) -> dict[str, Any]:
        """Where this worker runs; answers once the model is loaded."""
        return {"pid": os.getpid(), "device": self.device}

    def run(self, unit: Unit, block: CellBlock, slot: int) -> DerivedCompletion:
        """Derive one unit and stage its values.

        Raises
        ------
        DataError
            If the block cannot be decoded, however often it is tried.
        """
        if self._stager is None or not isinstance(self._analysis, Output):
            raise TypeError(f"{self._deriving.what} is not computed a unit at a time")
        faults.point("decode")
        deriving = self._deriving
        obs = self._analysis.obs(self._decoder.facts, deriving.options)
        cells, mapped = self._decoder.cells(block, obs, deriving.seed_of(unit.id))
        if cells is None:
            shape = self._analysis.shape(self._decoder.facts, deriving.options)
            empty = {name: np.zeros((0, len(names)), np.float32) for name, names in shape.matrices.items()}
            part = Part(matrices=empty)
        else:
            part = self._analysis.unit(cells, deriving.told, deriving.options)
        return self._stager.stage(unit.id, slot, mapped, part)


DerivingActor = ray.remote(DerivingWorker)
"""Restarts and retries are the dispatcher's."""


def read_decodable(unit: Unit, deriving: Deriving, obs: tuple[str, ...]) -> tuple[int, CellBlock]:
    """Read a unit's cells with what decoding takes; the block's size in bytes, and the block."""
    block = deriving.wanted(obs).read(unit.shard, deriving.load())
    return block.nbytes, block


def pick_cells(
    unit: Unit, deriving: Deriving, obs: tuple[str, ...], rows: npt.NDArray[np.int64] | None, by: tuple[str, int, int]
) -> Picked | None:
    """Cells of a unit for a sample.

    Parameters
    ----------
    unit, deriving, obs
        What is read.
    rows
        Rows of the unit that may be picked; None for all.
    by
        obs column of the strata, cells of each at most, and the seed.

    Returns
    -------
    Picked or None
        None if none has a count.
    """
    column, cells, seed = by
    _, block = read_decodable(unit, deriving, tuple(dict.fromkeys([*obs, *([column] if column else [])])))
    column = source_column(deriving.load(), deriving.settings, column)
    counted = np.flatnonzero(Mapper.counted(block))
    candidates = counted if rows is None else np.intersect1d(rows, counted)
    return pick(unit.id, block, candidates, column, cells, seed) if len(candidates) else None


def study(
    deriving: Deriving,
    picked: Picked,
    obs: tuple[str, ...],
    first: npt.NDArray[np.bool_] | None,
    device: str | None = None,
) -> Mapping[str, npt.NDArray[Any]] | Finished:
    """What an analysis makes of a sample: a comparison its result, an output what its units are told.

    Parameters
    ----------
    deriving, obs
        What is derived, and the columns that it asked for.
    picked
        The cells.
    first
        Which of them are of a comparison's first selection; None for an output.
    device
        As :class:`DerivingWorker` takes it. Outside of Ray it must be named: asking for GPUs would start one.
    """
    worker = DerivingWorker(deriving, None, device)
    cells, mapped = worker.decoder.cells(picked.block, obs, deriving.seed_of(""))
    if cells is None:
        raise DataError("None of the cells has a count in the reference's genes.", "Choose other cells.")
    one = analysis(deriving.what, deriving.family)
    if isinstance(one, Comparison) and first is not None:
        return one.compare(cells, first[mapped], deriving.options)
    if isinstance(one, Output):
        return one.prepare(cells, deriving.options)
    raise TypeError(f"{deriving.what} looks at no sample")


study_task = ray.remote(max_retries=0)(study)
read_task = ray.remote(num_returns=2, max_retries=0)(read_decodable)
"""Retries are the dispatcher's."""
pick_task = ray.remote(max_retries=0)(pick_cells)


@dataclass(frozen=True, slots=True)
class DerivingPool:
    """Starts the readers and actors of one derivation, as the dispatcher asks.

    Attributes
    ----------
    deriving, stager
        What is derived, and where values go.
    obs
        Columns that the analysis asked for.
    slots
        Unit id to its first slot.
    cpus, gpus
        That an actor reserves; a reader reserves as many CPUs.
    """

    deriving: Deriving
    stager: DerivedStager
    obs: tuple[str, ...]
    slots: Mapping[str, int]
    cpus: float
    gpus: float

    def read(self, unit: Unit) -> tuple[ray.ObjectRef[Any], ray.ObjectRef[Any]]:
        """Start reading a unit; references to its size in bytes and to its block."""
        size, block = read_task.options(num_cpus=self.cpus).remote(unit, self.deriving, self.obs)
        return size, block

    def start(self) -> Any:
        """Start an actor; it loads the model at once."""
        return DerivingActor.options(num_cpus=self.cpus, num_gpus=self.gpus).remote(self.deriving, self.stager)

    def ready(self, actor: Any) -> ray.ObjectRef[Any]:
        """Reference that resolves once the actor has loaded the model."""
        return actor.describe.remote()

    def map(self, actor: Any, unit: Unit, block: ray.ObjectRef[Any]) -> ray.ObjectRef[Any]:
        """Start deriving a block; reference to its completion."""
        return actor.run.remote(unit, block, self.slots[unit.id])
