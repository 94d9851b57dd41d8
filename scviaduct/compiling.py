"""Compiling a function for the processor at hand, once for all processes where what comes out can be kept.

numba compiles, because it is installed already (scanpy and umap-learn need it) and needs no compiler where scviaduct
is installed. Nothing is ``parallel``: a process computes on one thread, and numba's own would raise PyTorch's number.
Nothing has ``fastmath``, which would let an order of sums change.

Import what is compiled where it is used first, not before: numba takes a quarter of a second.
"""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numba import njit

if TYPE_CHECKING:
    from collections.abc import Callable

SHARED = ("lanes.py", "elementary.py", "sources/registers.py", "store/index/comparing.py")
"""Files whose functions are compiled into those of other files. numba goes by a function's own file when it looks for
what it kept, and would take code of an older one of these."""
_SHARED = blake2b(b"".join((Path(__file__).parent / name).read_bytes() for name in SHARED), digest_size=4).hexdigest()
unkept: list[str] = []
"""Why compiled functions cannot be kept for other processes; empty if they are."""


def compiled(*signatures: Any, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function, for these types of arguments when its module is imported, or else when it is called first.

    What comes out is kept beside the module, or in the user's cache folder, or where ``NUMBA_CACHE_DIR`` says. It runs
    without Python's lock.

    Parameters
    ----------
    signatures
        Types of the arguments. Arrays that may be read-only are declared so: numba tells the two apart, and would
        compile for each.
    options
        Of ``numba.njit``.
    """
    types: list[Any] = [list(signatures)] if signatures else []
    decorate: Any = njit  # whose stubs name no list of options

    def compiled(function: Callable[..., Any]) -> Any:
        # What is kept is called so.
        function.__qualname__ = f"{function.__qualname__}_{_SHARED}"
        try:
            return decorate(*types, cache=True, nogil=True, **options)(function)
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
            # A package on a read-only disk, and a user without a home: every process compiles for itself, 1 to 9 s.
            unkept.append(str(error))
            return decorate(*types, nogil=True, **options)(function)

    return compiled
