"""Where the slices of an index are: what a search asks, whoever holds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from scviaduct.store.search.slices import Slice
    from scviaduct.values import LongArray


class Slices(Protocol):
    """The slices of an index, wherever they are."""

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Ask the same of every slice; the answers in their order."""

    def at(self, slots: LongArray, method: str) -> list[tuple[LongArray, Any]]:
        """Ask each slice for its share of slots: which of them they are, and the answer."""


@dataclass(frozen=True, slots=True)
class Here:
    """One slice, in this process.

    Attributes
    ----------
    slice
        All segments of an index.
    """

    slice: Slice

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Ask it."""
        return [getattr(self.slice, method)(*arguments)]

    def at(self, slots: LongArray, method: str) -> list[tuple[LongArray, Any]]:
        """Ask it for all slots."""
        return [(np.arange(len(slots)), getattr(self.slice, method)(slots))]
