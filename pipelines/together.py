"""Several runs on one reading: shards are read once, and mapped with every reference that is not done with them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import faiss
import torch

from actors.mapping import Ended, Failure, MappingWorker
from actors.pool import Bundles, MappingPool, asked
from cluster.connect import connect
from cluster.dispatch import Dispatcher
from cluster.work import ATTEMPTS, Quarantined
from pipelines.running import place
from scviaduct.families.base import KERNELS
from scviaduct.mapping.planning import bundled
from scviaduct.mapping.reading import read_shared
from scviaduct.references.package import Reference

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pipelines.progress import Reporter
    from pipelines.running import Run
    from scviaduct.landing.alongside import Alongside
    from scviaduct.mapping.planning import Bundle
    from scviaduct.values import Shard


class Together:
    """The runs of one command, one for each reference, over one source.

    Parameters
    ----------
    runs
        Made from the same scan.
    progress
        Told of every shard.
    alongside
        Shards that are landed while they are read.
    """

    def __init__(
        self, runs: Sequence[Run], progress: Reporter, alongside: Mapping[Shard, Alongside] | None = None
    ) -> None:
        self._runs, self._progress, self._alongside = runs, progress, alongside or {}
        self._assignments = tuple(run.assignment for run in runs)
        self._shards = [unit.shard for unit in runs[0].plan.units]
        self._bundles = bundled(self._shards, [run.left for run in runs])
        self._of = {unit.id: run for run in runs for unit in run.left}
        self._counted: set[Shard] = set()

    def inline(self) -> None:
        """Read and map one shard after the other in this process."""
        if not self._begin():
            return
        device = "cuda" if torch.cuda.is_available() else "cpu"
        threads = torch.get_num_threads(), faiss.omp_get_max_threads()
        try:
            worker = MappingWorker(self._assignments, device)
            self._note_arithmetic(worker.describe())
            packages = {one.reference: Reference.load(one.reference) for one in self._assignments}
            self._start_progress()
            for bundle in self._bundles:
                self._attempt(bundle, worker, packages)
        finally:  # the caller's process goes on
            torch.set_num_threads(threads[0])
            faiss.omp_set_num_threads(threads[1])

    def _attempt(self, bundle: Bundle, worker: MappingWorker, packages: Mapping[str, Reference]) -> None:
        """Read and map a shard as often as the dispatcher would, then quarantine what is left."""
        for attempt in range(1, ATTEMPTS + 1):
            paths, columns = asked(self._assignments, bundle)
            try:
                beside = self._alongside.get(bundle.shard)
                shared = read_shared(bundle.shard, [packages[path] for path in paths], columns, alongside=beside)
            except Exception as error:  # noqa: BLE001 - Ray hands every error of a reader to the dispatcher, too
                ended = Ended(failed=tuple(Failure.of(unit.id, error) for _, unit in bundle.units))
            else:
                ended = worker.run(bundle, shared)
            self._note_done(bundle, ended)
            again = []
            for failure in ended.failed:
                if failure.final or attempt == ATTEMPTS:
                    ((_, unit),) = bundle.only({failure.unit}).units
                    self._note_quarantine(Quarantined(unit, attempt, failure.reason))
                else:
                    again.append(failure.unit)
            if not again:
                return
            bundle = bundle.only(again)

    def on_ray(
        self, address: str | None, actors: int | None, readers: int | None, gpus_per_actor: float | None
    ) -> None:
        """Read in tasks and map in actors.

        Raises
        ------
        InputError
            If GPUs are asked for where there are none.
        EngineError
            If actors cannot be started.
        """
        if not self._begin():
            return
        with connect(address) as resources:
            limits, placement = place(resources, actors, readers, gpus_per_actor)
            device = f"{placement.actor_gpus:g} GPU" if placement.actor_gpus else "CPU"
            line = f"{_counted(limits.actors, 'mapping actor')} ({device} each), {_counted(limits.readers, 'reader')}"
            self._progress.say(line)
            pool = MappingPool(self._assignments, placement, self._alongside)
            dispatcher = Dispatcher(pool, limits, self._note_done, self._note_quarantine, Bundles())

            def ready(described: Mapping[str, object]) -> None:
                if placement.actor_gpus and described["device"] == "cpu":
                    self._progress.say("Ray gave the actors GPUs, and PyTorch sees none there: they map on CPUs")
                self._note_arithmetic(described)
                self._start_progress()

            dispatcher.run(self._bundles, ready)

    def _note_arithmetic(self, described: Mapping[str, Any]) -> None:
        """Say what encodes, where it is not the compiled kernels of a CPU."""
        for assignment, how in zip(self._assignments, described["arithmetic"], strict=True):
            if how != KERNELS:
                name = f"{Path(assignment.reference).name}: " if len(self._assignments) > 1 else ""
                self._progress.say(f"{name}encoding with {how}")

    def _begin(self) -> bool:
        """Note that the runs have begun; whether there is anything to map."""
        for run in self._runs:
            if not run.is_complete:
                run.begin()
        return bool(self._bundles)

    def _start_progress(self) -> None:
        """Begin to count once something can map, so that rate and time left are those of mapping.

        A cell counts once, however many references it is mapped with.
        """
        cells = sum(shard.cells for shard in self._shards)
        self._progress.start("mapping", cells, cells - sum(bundle.shard.cells for bundle in self._bundles))

    def _note_done(self, bundle: Bundle, ended: Ended) -> None:
        for completion in ended.done:
            self._of[completion.unit].note(completion)
        if ended.done and bundle.shard not in self._counted:
            self._counted.add(bundle.shard)
            self._progress.advance(bundle.shard.cells)

    def _note_quarantine(self, item: Quarantined) -> None:
        run, shard = self._of[item.unit.id], item.unit.shard
        run.quarantined.append(item)
        of = f" of {run.plan.reference}" if len(self._runs) > 1 else ""
        self._progress.say(f"quarantined{of}: {shard.dataset_id} rows {shard.start:,}-{shard.stop:,}")


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"
