"""The mapping actor: holds one reference, maps blocks, stages what comes out."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import faiss
import ray
import torch

from scviaduct import faults
from scviaduct.mapping.mapper import Mapper
from scviaduct.references.package import Reference

if TYPE_CHECKING:
    from scviaduct.mapping.fleet import Fleet
    from scviaduct.store import Completion, Stager
    from scviaduct.values import CellBlock, Settings, Unit


class MappingWorker:
    """Maps blocks with a reference that it loads once.

    Parameters
    ----------
    reference
        Path of the package. The weights never travel: a restarted actor reads them again.
    settings
        What decides the rows.
    stager
        Where the rows go.
    device
        ``"cpu"`` or ``"cuda"``; None for the GPU that Ray assigned to this actor, if any.
    fleet
        Adapters of the query's new batches; each is read when the first block needs it.

    Notes
    -----
    The process computes on one thread from then on: threads wait for each other by spinning, and where cores are shared
    two of them take several times as long as one.
    """

    def __init__(
        self,
        reference: str,
        settings: Settings,
        stager: Stager,
        device: str | None = None,
        fleet: Fleet | None = None,
    ) -> None:
        torch.set_num_threads(1)
        faiss.omp_set_num_threads(1)
        self.device = device or ("cuda" if ray.get_gpu_ids() and torch.cuda.is_available() else "cpu")
        device = self.device
        self._mapper = Mapper(Reference.load(reference), settings, device, fleet)
        self._settings = settings
        self._stager = stager

    def describe(self) -> dict[str, Any]:
        """Where this worker runs; answers once the reference is loaded."""
        return {"pid": os.getpid(), "device": self.device, "labels": len(self._mapper.labels)}

    def run(self, unit: Unit, block: CellBlock) -> Completion:
        """Map one unit and stage its rows.

        Raises
        ------
        DataError
            If the block cannot be mapped, however often it is tried.
        """
        faults.point("encode")
        return self._stager.stage(unit, block, self._mapper.map(block), self._settings)


MappingActor = ray.remote(MappingWorker)
"""Restarts and retries are the dispatcher's: ``max_restarts`` and ``max_task_retries`` stay 0."""
