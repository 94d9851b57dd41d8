"""Compiling a function for the processor at hand, once for all processes where what comes out can be kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numba import njit

if TYPE_CHECKING:
    from collections.abc import Callable

unkept: list[str] = []
"""Why compiled functions cannot be kept for other processes; empty if they are."""


def compiled[F: Callable[..., Any]](*signatures: Any) -> Callable[[F], F]:
    """Compile a function for these types of arguments when its module is imported.

    What comes out is kept beside the module, or in the user's cache folder, or where ``NUMBA_CACHE_DIR`` says. Types
    are declared, because otherwise arrays that are read-only would be compiled for anew.
    """

    def compiled(function: F) -> F:
        try:
            kernel: Any = njit(list(signatures), cache=True)(function)
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
            # A package on a read-only disk, and a user without a home: compiling takes 3 s in every process.
            unkept.append(str(error))
            kernel = njit(list(signatures))(function)
        found: F = kernel
        return found

    return compiled
