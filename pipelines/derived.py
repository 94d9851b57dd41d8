"""What a derivation came to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd

    from cluster.dispatch import Quarantined


@dataclass(frozen=True, slots=True)
class DeriveResult:
    """What a ``derive`` run came to.

    Attributes
    ----------
    name
        Of the derived set.
    what
        The analysis.
    state
        ``committed``, ``nothing to do``, or ``failed`` if every unit is in quarantine.
    version
        Version of the space that names the set; None if there is none.
    units, cells
        That the set covers now.
    derived_units
        Units derived by this call.
    columns, matrices
        Columns as the store has them, and names of the matrices.
    tables
        Name to table.
    quarantined
        Units that could not be derived, with their reasons.
    seconds
        Of the whole call.
    """

    name: str
    what: str
    state: Literal["committed", "nothing to do", "failed"]
    version: int | None
    units: int
    cells: int
    derived_units: int
    columns: tuple[str, ...]
    matrices: tuple[str, ...]
    tables: Mapping[str, pd.DataFrame]
    quarantined: tuple[Quarantined, ...]
    seconds: float

    @property
    def exit_status(self) -> int:
        """0, or 4 if units are in quarantine."""
        return 4 if self.quarantined else 0
