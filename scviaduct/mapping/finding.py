"""One answer of preflight."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

Level = Literal["ok", "warn", "stop", "unknown", "accepted"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One answer of preflight.

    Attributes
    ----------
    name
        Of the check; what ``--accept`` takes.
    level
        ``ok``, ``warn``, ``stop``, ``unknown`` (could not be decided) or ``accepted`` (a stop that the user overrode).
    message
        What was seen, with figures and an example.
    remedy
        What to do about it; empty if nothing needs doing.
    overridable
        False where mapping would be impossible.
    figures
        The numbers behind the message.
    """

    name: str
    level: Level
    message: str
    remedy: str = ""
    overridable: bool = True
    figures: Mapping[str, float | int | str] = field(default_factory=dict)
