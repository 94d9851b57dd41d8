"""Memory that is kept for the next shard: how glibc is told not to give it back.

A shard takes and frees some hundred megabytes: what TileDB decodes, slabs, the block. By default glibc returns much of
that to the kernel each time, which clears every page and faults it in again when the next shard asks for it; and each
thread (TileDB starts one for every table it hands over) fills an arena of its own. On a virtual machine, where a fault
takes 2 us, that was a fifth of a shard's read.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

KEPT_BYTES = 512 << 20
"""Free memory that a process keeps at most, and the largest piece that is kept: two arrays of a block of all genes."""
HEAP_BYTES = 64 << 20
"""An arena of a thread grows by heaps of this size, and gives an empty one back whatever the thresholds say, unless the
heap before it would then have less room than the padding."""
_SETTINGS = {
    "MALLOC_ARENA_MAX": (-8, 1),
    "MALLOC_MMAP_THRESHOLD_": (-3, KEPT_BYTES),
    "MALLOC_TRIM_THRESHOLD_": (-1, KEPT_BYTES),
    "MALLOC_TOP_PAD_": (-2, HEAP_BYTES),
}
"""glibc's variable for each: its number in ``malloc.h``, and what is asked for."""


def environment() -> dict[str, str]:
    """The same for processes that are yet to be started, without what is said already.

    Ray's workers have threads, and an arena for each, before any of our code runs in them: TileDB's threads then share
    those, and fill each of them.
    """
    return {name: str(value) for name, (_, value) in _SETTINGS.items() if not _is_told(name)}


@cache
def keep_memory() -> bool:
    """Have this process keep freed memory, and take it from one arena; once, for the rest of its life.

    Mapping 98,304 cells of SOMA in one process took 7,600 page faults instead of 106,000, and held 1.3 GB at most
    instead of 2.3.

    Returns
    -------
    bool
        Whether it does: not without glibc (macOS, musl). What glibc's own variables say (``MALLOC_ARENA_MAX``,
        ``MALLOC_TRIM_THRESHOLD_``, ``GLIBC_TUNABLES``, …) stays as it is.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not (hasattr(libc, "mallopt") and hasattr(libc, "gnu_get_libc_version")):
        return False
    asked = [setting for name, setting in _SETTINGS.items() if not _is_told(name)]
    done = [bool(libc.mallopt(option, value)) for option, value in asked]
    return all(done)


def _is_told(name: str) -> bool:
    """Whether whoever started the process said how they want it, by the variable or by the tunable of the name."""
    tunable = f"glibc.malloc.{name.removeprefix('MALLOC_').strip('_').lower()}="
    return name in os.environ or tunable in os.environ.get("GLIBC_TUNABLES", "")
