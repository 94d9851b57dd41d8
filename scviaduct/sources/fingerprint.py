"""Identity of a SOMA experiment: a fingerprint of the fragments that its arrays consist of.

A TileDB array is a set of immutable fragments. Their names carry a time and a random id, and survive a copy, so the
names that are visible at the time of opening pin the content: https://docs.tiledb.com/main/background/internal-mechanics.
Consolidation and vacuuming rename fragments, so they count as a change though they change no value.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from scviaduct.errors import SourceError
from scviaduct.sources.content import filesystem
from scviaduct.sources.uri import quoted_url
from scviaduct.values import digest

if TYPE_CHECKING:
    from collections.abc import Mapping

_TIMED = re.compile(r"__(\d+)_(\d+)_")
_FOLDERS = ("__commits", "__schema")
"""Writes and deletions, and changes of the schema such as added columns."""


def fingerprint(arrays: Mapping[str, str], opened_ms: int) -> str:
    """Pin the content of some arrays.

    Parameters
    ----------
    arrays
        Role of each array (the same wherever the experiment lies) to its URL.
    opened_ms
        When the arrays were opened, ms since 1970; what was written later is not seen through them and does not count.

    Returns
    -------
    str
        32 hexadecimal characters.

    Raises
    ------
    SourceError
        If the fragments cannot be listed.
    """
    return digest({role: _fragments(url, opened_ms) for role, url in arrays.items()})


def _fragments(url: str, opened_ms: int) -> list[str]:
    fs, path = filesystem(url)
    names: list[str] = []
    try:
        for folder in _FOLDERS:
            # Arrays of TileDB before 2.6 hold fragments and their '.ok' marks at their root instead.
            at = f"{path}/{folder}" if fs.isdir(f"{path}/{folder}") else path
            names += (str(entry).rstrip("/").rpartition("/")[2] for entry in fs.ls(at, detail=False))
    except OSError as error:
        raise unlistable(url, str(error)) from error
    kept = {name for name in names if (timed := _TIMED.match(name)) and int(timed[1]) <= opened_ms}
    if not kept:
        raise unlistable(url, "it lists no fragment")
    return sorted(kept)


def unlistable(url: str, why: str) -> SourceError:
    """The error for arrays that cannot be pinned."""
    return SourceError(
        f"The fragments of {quoted_url(url)} cannot be listed to pin its version ({why}).",
        "If nobody writes to it, say so by naming the version yourself: version=2025-11-08.",
    )
