"""One tree of errors: each names the offending value and ends in the remedy.

Exceptions take positional arguments only, so that they cross process boundaries through pickle.

``ScviaductError`` says what is wrong and how to mend it. Its children are grouped by what a handler does:

- :class:`InputError`: the caller must change something; nothing was started. Exit status 2.
- :class:`NotFitError`: a preflight gate closed before any work. Exit status 1.
- :class:`DataError`: a piece of the source cannot be mapped, however often it is tried: quarantine it.
- :class:`StoreError`: the store refuses; nothing was made visible.
- :class:`EngineError`: the machines gave way more often than the run allows; what is done is kept. Exit status 5.
"""

from __future__ import annotations


class ScviaductError(Exception):
    """Base of every error raised on purpose.

    Parameters
    ----------
    problem
        What is wrong, naming the value and showing an example.
    remedy
        What to do about it, as a sentence; the last thing that the reader sees.
    """

    exit_status = 2

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem} {self.remedy}".strip()


class InputError(ScviaductError):
    """Something the caller gave is wrong; nothing was started."""


class SourceError(InputError):
    """A source cannot be opened, parsed or planned."""


class FilterError(InputError):
    """A ``--where`` or ``filter=`` expression does not parse or names an unknown column."""


class PackageError(InputError):
    """A reference package is missing, incomplete or changed, or its name is taken."""


class UnsafeModelError(PackageError):
    """A model file holds something that is not on the allow-list; nothing of it was executed."""


class UnsupportedModelError(PackageError):
    """A model is of a family or a configuration that cannot be mapped here."""


class NotFitError(ScviaductError):
    """The query does not fit the reference; nothing was mapped."""

    exit_status = 1


class DataError(ScviaductError):
    """A shard's data cannot be mapped, however often it is tried; its unit is quarantined."""


class SourceChangedError(DataError):
    """A shard no longer holds the cells that were planned."""


class StoreError(ScviaductError):
    """The store refuses a read or a commit; readers still see the version before."""


class EngineError(ScviaductError):
    """Actors or tasks died more often than the run allows; completed units are kept."""

    exit_status = 5
