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
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
"""Names that ``malloc.h`` has for them."""
_TOLD = ("GLIBC_TUNABLES", "MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


@cache
def keep_memory() -> bool:
    """Have this process keep freed memory, and take it from one arena; once, for the rest of its life.

    Mapping 98,304 cells of SOMA in one process took 7,600 page faults instead of 106,000, and held 1.3 GB at most
    instead of 2.3.

    Returns
    -------
    bool
        Whether it does: not without glibc (macOS, musl), and not where one of glibc's own variables says how its user
        wants it (``MALLOC_ARENA_MAX``, ``GLIBC_TUNABLES``, …).
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _TOLD):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        return False
    told = (_ARENA_MAX, 1), (_MMAP_THRESHOLD, KEPT_BYTES), (_TRIM_THRESHOLD, KEPT_BYTES)
    done = [bool(mallopt(option, value)) for option, value in told]
    return all(done)
