"""The mapping actor: holds one or several references, maps blocks, stages what comes out."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, override

import faiss
import ray
import torch

from scviaduct import faults
from scviaduct.allocator import keep_memory
from scviaduct.errors import DataError
from scviaduct.mapping.mapper import Mapper
from scviaduct.references.package import Reference
from scviaduct.sources.unreadable import told

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scviaduct.mapping.fleet import Fleet
    from scviaduct.mapping.planning import Bundle
    from scviaduct.mapping.reading import SharedBlock
    from scviaduct.store import Completion, Stager
    from scviaduct.values import CellBlock, Settings, Unit


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a worker is told of a reference; picklable, without tensors.

    Attributes
    ----------
    reference
        Path of the package. The weights never travel: a restarted actor reads them again.
    settings
        What decides the rows.
    stager
        Where the rows go.
    columns
        obs columns that mapping and staging take.
    fleet
        Adapters of the query's new batches; each is read when the first block needs it.
    fractional
        Whether counts that are not whole are mapped, too.
    """

    reference: str
    settings: Settings
    stager: Stager
    columns: tuple[str, ...]
    fleet: Fleet | None = None
    fractional: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """A unit that was not mapped.

    Attributes
    ----------
    unit
        Unit id.
    reason
        Why, in one line.
    final
        Whether it would fail again, however often it is tried.
    """

    unit: str
    reason: str
    final: bool

    @classmethod
    def of(cls, unit: str, error: Exception) -> Failure:
        """What an error says of a unit."""
        return cls(unit, told(error), isinstance(error, DataError))


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of the units of a bundle: each is done or failed, whatever became of the others."""

    done: tuple[Completion, ...] = ()
    failed: tuple[Failure, ...] = ()


class MappingWorker:
    """Maps blocks with references that it loads once.

    Parameters
    ----------
    assignments
        The references.
    device
        ``"cpu"`` or ``"cuda"``; None for the GPU that Ray assigned to this actor, if any.

    Notes
    -----
    The process computes on one thread from then on: threads wait for each other by spinning, and where cores are shared
    two of them take several times as long as one.
    """

    def __init__(self, assignments: Sequence[Assignment], device: str | None = None) -> None:
        keep_memory()
        torch.set_num_threads(1)
        faiss.omp_set_num_threads(1)
        self.device = device or ("cuda" if ray.get_gpu_ids() and torch.cuda.is_available() else "cpu")
        self._assignments = tuple(assignments)
        self._mappers = [
            Mapper(Reference.load(one.reference), one.settings, self.device, one.fleet, fractional=one.fractional)
            for one in assignments
        ]

    def describe(self) -> dict[str, Any]:
        """Where this worker runs, and how it encodes; answers once the references are loaded."""
        told = {"device": self.device, "arithmetic": [mapper.arithmetic for mapper in self._mappers]}
        return {"pid": os.getpid(), **told, "labels": [len(mapper.labels) for mapper in self._mappers]}

    def run(self, bundle: Bundle, shared: SharedBlock) -> Ended:
        """Map the units of a bundle, one reference after the other, and stage the rows of each.

        Parameters
        ----------
        bundle
            What to do.
        shared
            Its shard, read for ``bundle.references``.
        """
        done: list[Completion] = []
        failed: list[Failure] = []
        blocks: list[CellBlock] = []
        for at, (position, unit) in enumerate(bundle.units):
            faults.point("encode")
            mine = self._assignments[position]
            try:
                blocks = blocks or shared.together(at)
                block = blocks.pop(0)
                mapping = self._mappers[position].map(block)
                done.append(mine.stager.stage(unit, block, mapping, mine.settings))
            except Exception as error:  # noqa: BLE001 - the other references go on; the dispatcher decides about this one
                failed.append(self.failure(unit, error))
        return Ended(tuple(done), tuple(failed))

    def failure(self, unit: Unit, error: Exception) -> Failure:
        """What an error says of a unit."""
        return Failure.of(unit.id, error)


class _Actor(MappingWorker):
    """A worker with a process of its own, which ends where its GPU has given up."""

    @override
    def failure(self, unit: Unit, error: Exception) -> Failure:
        if lost(error, self.device):
            # It would fail every unit from now on. The dispatcher replaces an actor that died, and tries alone what was
            # in it; an orderly exit would call CUDA again, and may hang.
            sys.stderr.write(f"{told(error)}: the GPU does nothing more for this process, which ends\n")
            sys.stderr.flush()
            os._exit(1)
        return super().failure(unit, error)


def lost(error: Exception, device: str) -> bool:
    """Whether an error left the process without its GPU.

    After a fault of a kernel (an illegal address), CUDA fails all that a process asks for, until it ends. The device is
    asked, because errors do not tell: PyTorch's AcceleratorError, which it has since 2.8, can pass, too, and Triton
    raises a plain RuntimeError. A lack of memory passes.
    """
    if device == "cpu" or not isinstance(error, RuntimeError):
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


MappingActor = ray.remote(_Actor)
"""Restarts and retries are the dispatcher's: ``max_restarts`` and ``max_task_retries`` stay 0."""
