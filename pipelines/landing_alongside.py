"""Landing a source while it is mapped: ``map --land``."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pipelines.landing import LandingRun, require_same
from scviaduct.errors import InputError
from scviaduct.landing import Landing, plan_landing
from scviaduct.landing.alongside import Alongside

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pipelines.landed import LandResult
    from pipelines.progress import Reporter
    from scviaduct.landing import LandingPlan
    from scviaduct.sources import Source
    from scviaduct.values import Scan, Shard


class Beside:
    """A landing that is written by whoever reads the shards of a run.

    Parameters
    ----------
    landing
        Where pieces go.
    plan
        A piece for each shard of the run.
    progress
        Told of what is landed at the end.

    Attributes
    ----------
    shards
        Each shard that is not landed yet, with what reads and lands it.
    """

    def __init__(self, landing: Landing, plan: LandingPlan, progress: Reporter) -> None:
        self._landing, self._plan, self._progress = landing, plan, progress
        self._before = {piece.counts for piece in landing.manifest().pieces} if landing.is_there else set()
        plan.begin(landing)
        there = plan.recalled(landing)
        jobs = [job for own in plan.jobs for job in own if job not in there]
        self.shards: Mapping[Shard, Alongside] = {job.shard: Alongside(landing, job) for job in jobs}

    def finish(self, engine: Literal["ray", "inline"], address: str | None, readers: int | None) -> LandResult:
        """Land the shards that the run did not have to read, or could not; then publish."""
        run = LandingRun(self._landing, self._plan, self._progress)
        there = self._plan.recalled(self._landing)
        new = sum(piece.counts not in self._before for job, piece in there.items() if job.shard in self.shards)
        run.inline() if engine == "inline" else run.on_ray(address, readers)
        result = run.publish()
        # What the readers wrote was found here, and is not reused.
        return replace(result, written=result.written + new, reused=result.reused - new)


def require_place(out: str | None, source: Source, piece_cells: int) -> None:
    """Refuse a folder that a run cannot land its source into; None is none to look at.

    Raises
    ------
    InputError
        If it holds another source, other pieces, or something else.
    """
    if out is None:
        return
    landing = Landing.at(out)
    there = landing.manifest() if landing.is_there else None
    require_same(landing, there, source.uri)
    if there and there.piece_cells != piece_cells:
        raise InputError(
            f"{landing.path} has pieces of {there.piece_cells} cells, and the run has shards of {piece_cells}.",
            f"Cut them alike, --shard-cells {there.piece_cells}, or land into another folder.",
        )


@contextmanager
def landing_beside(
    out: str | None, source: Source, scan: Scan, piece_cells: int, progress: Reporter
) -> Iterator[Beside | None]:
    """Land a run's source while the block lasts; None where no landing is asked for.

    Raises
    ------
    InputError
        If the folder holds another source, other pieces, or something else.
    """
    if out is None:
        yield None
        return
    landing = Landing.at(out)
    with landing.writing():
        require_place(out, source, piece_cells)  # inside, so that nobody lands between the look and the lock
        yield Beside(landing, plan_landing(source, piece_cells, scan), progress)
