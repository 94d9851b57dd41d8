"""Progress of long work: a live bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Protocol, Self, override

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from types import TracebackType

_LINE_EVERY = 10.0  # seconds between two lines of a log


class Reporter(Protocol):
    """Told of the work as it goes; a context manager around it."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def start(self, what: str, total: int, done: int = 0) -> None:
        """Work on ``total`` cells begins; ``done`` of them are already there."""

    def advance(self, cells: int) -> None:
        """So many more cells are done."""

    def say(self, line: str) -> None:
        """Something worth a line happened."""


class _Base:
    def __init__(self) -> None:
        self._began = time.monotonic()
        self._done = self._new = self._total = 0
        self._what = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def start(self, what: str, total: int, done: int = 0) -> None:
        self._what, self._total, self._done, self._new = what, total, done, 0
        self._began = time.monotonic()

    def advance(self, cells: int) -> None:
        self._done += cells
        self._new += cells

    def say(self, line: str) -> None:
        """Ignored here; the children print it."""

    @property
    def _rate(self) -> float:
        return self._new / max(time.monotonic() - self._began, 1e-9)


class Silent(_Base):
    """Says nothing."""


class Lines(_Base):
    """Plain lines on standard error, at most one every ten seconds, and one at the end."""

    def __init__(self) -> None:
        super().__init__()
        self._last = 0.0

    @override
    def advance(self, cells: int) -> None:
        super().advance(cells)
        now = time.monotonic()
        if now - self._last < _LINE_EVERY and self._done < self._total:
            return
        self._last = now
        left = (self._total - self._done) / self._rate if self._rate else 0.0
        self.say(
            f"{self._what}: {self._done:,} of {self._total:,} cells ({self._done / max(self._total, 1):.0%}), "
            f"{self._rate:,.0f} cells/s, {left:,.0f} s left"
        )

    @override
    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)  # noqa: T201 - a log line is this class's work


class Bar(_Base):
    """A live bar with rate and time left."""

    def __init__(self) -> None:
        super().__init__()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("cells  {task.fields[rate]:,.0f}/s"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("", total=None, rate=0.0, start=False, visible=False)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    @override
    def start(self, what: str, total: int, done: int = 0) -> None:
        super().start(what, total, done)
        self._bar.reset(self._task, description=what, total=total, completed=done, rate=0.0, visible=True)

    @override
    def advance(self, cells: int) -> None:
        super().advance(cells)
        self._bar.update(self._task, advance=cells, rate=self._rate)

    @override
    def say(self, line: str) -> None:
        self._bar.console.print(line, highlight=False, markup=False)


def reporter(*, quiet: bool = False) -> Reporter:
    """The reporter that suits where standard error goes."""
    if quiet:
        return Silent()
    return Bar() if sys.stderr.isatty() else Lines()
