"""Building the index of a store's version, in this process or on Ray."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cluster.connect import connect
from cluster.tasks import run_tasks
from pipelines.progress import reporter
from scviaduct.store import Store
from scviaduct.store.index import Builder, Manifest, ready_index
from scviaduct.store.index.manifest import is_built

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from scviaduct.store.index.segments import Task


@dataclass(frozen=True, slots=True)
class IndexResult:
    """What an index is, and what became of it.

    Attributes
    ----------
    state
        ``built``, or ``there already``.
    path
        Its folder.
    version, cells
        Of the space, and cells that can be found.
    segments, lists, probes
        Segments, lists of each, and lists that a query looks into on average; 0 lists for an exact index.
    recall
        Measured at 30 neighbours.
    seconds
        That it took.
    """

    state: str
    path: str
    version: int
    cells: int
    segments: int
    lists: int
    probes: int
    recall: float
    seconds: float


def index(
    store: str | Path,
    *,
    rebuild: bool = False,
    engine: Literal["ray", "inline"] = "inline",
    address: str | None = None,
    workers: int | None = None,
    reference: str | None = None,
    as_of: int | None = None,
    quiet: bool = False,
) -> IndexResult:
    """Build the index that searches of a version read; ``search`` does so itself where it is missing.

    Parameters
    ----------
    store
        Folder of the store.
    rebuild
        Train a new quantizer and write everything again from the tables, though the index is there.
    engine
        ``inline``: in this process, with a thread a core; ``ray``: segments as tasks.
    address
        Ray cluster: ``local``, ``auto`` or ``HOST:PORT``.
    workers
        Segments that are written at a time on Ray; None for one a CPU.
    reference
        Space of the store, by its reference; needed if the store has several.
    as_of
        Version; None for the newest.
    quiet
        Without notices.

    Raises
    ------
    InputError
        If the store has no such space.
    StoreError
        If the version has no cell with a latent.
    """
    began = time.monotonic()
    space = Store.open(store).space(reference)
    version = space.snapshot(as_of).version
    there = not rebuild and is_built(space.path / "index" / f"{version}")
    with reporter(quiet=quiet) as progress:
        if engine == "inline" or there:
            folder = ready_index(space, version, rebuild=rebuild)
        else:
            with on_ray(address, workers) as builder:
                folder = ready_index(space, version, builder, rebuild=rebuild)
        made = Manifest.load(folder)
        state = "there already" if there else "built"
        seconds = time.monotonic() - began
        progress.say(f"index of version {version}: {state}, {made.cells:,} cells, recall {made.recall:.4f}")
    told = made.version, made.cells, len(made.parts), made.lists, made.probes, made.recall, seconds
    return IndexResult(state, str(folder), *told)


@contextmanager
def on_ray(address: str | None, workers: int | None) -> Iterator[Builder]:
    """A builder whose segments are written by tasks of a cluster."""
    from actors.searching import segment_task

    def failed(_: Task, error: Exception) -> None:
        raise error

    with connect(address) as resources:
        at_once = workers or max(1, int(resources.cpus))

        def run(tasks: Sequence[Task]) -> None:
            task = segment_task.options(num_cpus=min(1.0, resources.cpus))
            run_tasks(tasks, task.remote, at_once, lambda *_: None, failed)

        yield Builder(run, at_once)
