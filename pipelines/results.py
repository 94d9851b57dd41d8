"""What the main job comes to, for one reference and for several."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from scviaduct.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster.work import Quarantined
    from pipelines.landed import LandResult
    from pipelines.running import Run
    from pipelines.surgery import BatchAdapter
    from scviaduct.mapping.preflight import Report
    from scviaduct.values import Plan

QUARANTINE_STATUS = 4
"""Exit status of a run that committed, but left units in quarantine."""

State = Literal["planned", "nothing to do", "committed", "failed"]


@dataclass(frozen=True, slots=True)
class MapResult:
    """What a ``map`` run came to.

    Attributes
    ----------
    run
        Run id; the same command has the same.
    state
        ``planned`` (a dry run), ``nothing to do``, ``committed``, or ``failed`` if every unit is in quarantine.
    version
        Version of the space that holds the run's cells; None if there is none.
    cells, units
        Of the plan.
    cells_done
        Cells of the plan that the version holds.
    mapped_units
        Units mapped by this call; the others were completed before.
    quarantined
        Units that could not be mapped, with their reasons.
    report
        Of the preflight.
    seconds
        Of each stage: scan, preflight, surgery, map, commit. Runs on one reading share all but the last.
    adapters
        What became of each new batch that needs an adapter.
    reference
        Name of the reference.
    landing
        What landing the source came to, where that was asked; of several references, the result of all has it.
    """

    run: str
    state: State
    version: int | None
    cells: int
    cells_done: int
    units: int
    mapped_units: int
    quarantined: tuple[Quarantined, ...]
    report: Report
    seconds: dict[str, float]
    adapters: tuple[BatchAdapter, ...] = ()
    reference: str = ""
    landing: LandResult | None = None

    @property
    def exit_status(self) -> int:
        """0, or 4 if units are in quarantine, or pieces of the landing cannot be read."""
        return QUARANTINE_STATUS if self.quarantined or (self.landing and self.landing.unreadable) else 0


@dataclass(frozen=True, slots=True)
class MapResults:
    """What a ``map`` with several references came to.

    Attributes
    ----------
    runs
        One for each reference, in the order in which they were named.
    landing
        What landing the source came to, where that was asked.
    """

    runs: tuple[MapResult, ...]
    landing: LandResult | None = None

    @property
    def exit_status(self) -> int:
        """The worst of the runs, and that of the landing."""
        landed = QUARANTINE_STATUS if self.landing and self.landing.unreadable else 0
        return max(landed, *(run.exit_status for run in self.runs))

    @property
    def seconds(self) -> float:
        """Of the whole: what the runs shared, and the commits of each."""
        shared = {name: spent for run in self.runs for name, spent in run.seconds.items() if name != "commit"}
        return sum(shared.values()) + sum(run.seconds.get("commit", 0.0) for run in self.runs)

    def of(self, reference: str) -> MapResult:
        """The run of a reference, by its name.

        Raises
        ------
        InputError
            If there is none.
        """
        for run in self.runs:
            if run.reference == reference:
                return run
        there = ", ".join(run.reference for run in self.runs)
        raise InputError(f"Reference '{reference}' was not mapped with.", f"There are: {there}.")


@dataclass(frozen=True, slots=True)
class Told:
    """What every result of a run says."""

    plan: Plan
    report: Report
    clock: Clock
    adapters: tuple[BatchAdapter, ...] = ()

    def result(self, state: State, cells_done: int, version: int | None = None, run: Run | None = None) -> MapResult:
        """The result of a run that came so far."""
        plan = self.plan
        return MapResult(
            run=plan.run,
            state=state,
            version=version,
            cells=plan.cells,
            cells_done=cells_done,
            units=len(plan.units),
            mapped_units=run.mapped if run else 0,
            quarantined=tuple(run.quarantined) if run else (),
            report=self.report,
            seconds=dict(self.clock.seconds),
            adapters=self.adapters,
            reference=plan.reference,
        )


@dataclass(slots=True)
class Clock:
    """Seconds that each stage took."""

    seconds: dict[str, float] = field(default_factory=dict)

    def copy(self) -> Clock:
        """One that goes on from here by itself."""
        return Clock(dict(self.seconds))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what happens within."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(time.monotonic() - began, 3)
