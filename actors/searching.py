"""Searching and indexing beyond one process: actors that hold a slice of an index, tasks that write segments."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import faiss
import numpy as np
import ray
import torch

from scviaduct.store.index import Index
from scviaduct.store.index.scanning import SLOT
from scviaduct.store.search import Slice
from scviaduct.store.search.device import DeviceVectors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scviaduct.store.index import Manifest
    from scviaduct.store.index.segments import Task
    from scviaduct.values import LongArray


class SearchWorker:
    """Holds some segments of an index and compares queries with their cells, on one thread.

    Parameters
    ----------
    manifest
        Of the index that is searched, as the driver opened it: another may lie in the folder since.
    folder
        Of the index.
    segments
        Numbers of the segments that it holds.
    device
        ``"cpu"`` or ``"cuda"``; None for the GPU that Ray assigned to this actor, if any. A GPU holds all vectors of
        the slice, and answers exact searches of all cells.
    """

    def __init__(self, manifest: Manifest, folder: str, segments: Sequence[int], device: str | None = None) -> None:
        torch.set_num_threads(1)
        faiss.omp_set_num_threads(1)
        self.device = device or ("cuda" if ray.get_gpu_ids() and torch.cuda.is_available() else "cpu")
        self._index = manifest, Path(folder), segments

    @cached_property
    def _slice(self) -> Slice:
        """Opened when it is first asked, so that what is missing is told by the answer and does not end the actor."""
        index = Index.of(*self._index)
        held = None if self.device == "cpu" else DeviceVectors(index.segments, self.device)
        return Slice(index, 1, held)

    def describe(self) -> dict[str, Any]:
        """Where this worker runs; answers once the slice is open.

        Raises
        ------
        FileNotFoundError
            If the index is not there any more.
        """
        return {"pid": os.getpid(), "device": self.device, "segments": sorted(self._slice.index.segments)}

    def call(self, method: str, *arguments: Any) -> Any:
        """What :class:`scviaduct.store.search.Slice` answers."""
        return getattr(self._slice, method)(*arguments)


SearchActor = ray.remote(SearchWorker)
"""It changes nothing, so that Ray may restart it and ask again."""


class Fan:
    """The slices of an index in actors: a question goes to all of them at a time.

    Parameters
    ----------
    manifest, folder
        Of the index.
    actors
        At most; one segment is never cut.
    cpus, gpus
        That an actor reserves.

    Raises
    ------
    FileNotFoundError
        If the folder does not hold that index any more.
    """

    def __init__(self, manifest: Manifest, folder: str, actors: int, cpus: float, gpus: float) -> None:
        cells = [part.cells for part in manifest.parts]
        shares = spread(cells, actors)
        self._owner = np.array([next(i for i, share in enumerate(shares) if n in share) for n in range(len(cells))])
        options = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": 1, "max_task_retries": 2}
        self._actors = [SearchActor.options(**options).remote(manifest, folder, share) for share in shares]
        try:
            self.described: list[dict[str, Any]] = ray.get([actor.describe.remote() for actor in self._actors])
        except BaseException:
            self.close()
            raise

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Ask the same of every slice; the answers in their order."""
        held = [ray.put(argument) if isinstance(argument, np.ndarray) else argument for argument in arguments]
        return list(ray.get([actor.call.remote(method, *held) for actor in self._actors]))

    def at(self, slots: LongArray, method: str) -> list[tuple[LongArray, Any]]:
        """Ask each slice for its share of slots: which of them they are, and the answer."""
        owners = self._owner[slots >> SLOT]
        shares = [np.flatnonzero(owners == i) for i in range(len(self._actors))]
        asked = [
            (at, actor.call.remote(method, slots[at]))
            for i, (at, actor) in enumerate(zip(shares, self._actors, strict=True))
            if len(at) or i == 0
        ]
        return [(at, ray.get(ref)) for at, ref in asked]

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors:
            ray.kill(actor)


def spread(cells: Sequence[int], shares: int) -> list[list[int]]:
    """Segments over so many shares at most, about as many cells each; none of them empty."""
    found: list[list[int]] = [[] for _ in range(max(1, min(shares, len(cells))))]
    for number in sorted(range(len(cells)), key=lambda n: -cells[n]):
        min(found, key=lambda share: sum(cells[n] for n in share)).append(number)
    return [sorted(share) for share in found if share]


def write_segment(task: Task) -> str:
    """Write a segment, on one thread; its id."""
    faiss.omp_set_num_threads(1)
    return task.run()


segment_task = ray.remote(max_retries=0)(write_segment)
"""Retries are the driver's."""
