"""Identity of a file: the digest of its content, remembered by size and time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import platformdirs

from scviaduct.errors import SourceError
from scviaduct.sources.uri import local_path, quoted_url

if TYPE_CHECKING:
    from collections.abc import Sequence

_CHUNK = 8 << 20
_RACY_NS = 2_000_000_000
"""A file changed this shortly before is not remembered: a second change may leave the same size and time."""


@dataclass(frozen=True, slots=True)
class Place:
    """A file or a zarr store behind its URL.

    Attributes
    ----------
    url
        Decoded, absolute.
    fs
        Its fsspec file system.
    path
        Its path there.
    is_folder
        True for a zarr store.
    """

    url: str
    fs: Any
    path: str
    is_folder: bool

    @classmethod
    def of(cls, url: str) -> Place:
        """Look a URL up.

        Raises
        ------
        SourceError
            If nothing is there, or its protocol is unknown.
        """
        fs, path = filesystem(url)
        if not fs.exists(path):
            raise nothing_at(url)
        return cls(url, fs, path, bool(fs.isdir(path)))

    def files(self) -> list[str]:
        """Paths of the files it consists of, sorted."""
        return sorted(self.fs.find(self.path)) if self.is_folder else [self.path]

    def stamp(self) -> tuple[str, int] | None:
        """Size and time of last change as text, and that time in ns; None where the file system tells no time."""
        sizes, newest, parts = 0, 0, []
        for path in self.files():
            told = self._time(path)
            if told is None:
                return None
            size, when, mark = told
            sizes, newest = sizes + size, max(newest, when)
            parts.append(f"{path}:{size}:{mark}")
        joined = hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest() if self.is_folder else parts[0]
        return f"{sizes}:{joined}", newest

    def _time(self, path: str) -> tuple[int, int, str] | None:
        if local_path(self.url) is not None:
            status = Path(path).stat()
            return status.st_size, status.st_mtime_ns, str(status.st_mtime_ns)
        info = self.fs.info(path)
        when = info.get("LastModified") or info.get("last_modified") or info.get("mtime") or info.get("created")
        if when is None:
            return None
        seconds = when.timestamp() if hasattr(when, "timestamp") else float(when)
        mark = f"{when}:{info.get('ETag', '')}"
        return int(info["size"]), int(seconds * 1e9), mark

    def digest(self) -> str:
        """BLAKE2b of the content; for a folder, of the sorted relative paths with the digest of each."""
        if not self.is_folder:
            return self._digest(self.path)
        whole = hashlib.blake2b(digest_size=16)
        for path in self.files():
            whole.update(f"{path.removeprefix(self.path).lstrip('/')}\0{self._digest(path)}\n".encode())
        return whole.hexdigest()

    def _digest(self, path: str) -> str:
        hasher = hashlib.blake2b(digest_size=16)
        with self.fs.open(path, "rb", cache_type="readahead", block_size=_CHUNK) as file:
            while chunk := file.read(_CHUNK):
                hasher.update(chunk)
        return hasher.hexdigest()


def nothing_at(url: str) -> SourceError:
    """The error for a place that is empty, or became so."""
    return SourceError(f"There is nothing at {quoted_url(url)}.", "Check the path; was it moved or deleted?")


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system and path of a decoded URL.

    Raises
    ------
    SourceError
        If the protocol is unknown or its package is not installed.
    """
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise SourceError(
            f"Source {quoted_url(url)} cannot be reached: {error}.", "Write a path or an fsspec URL."
        ) from error
    return fs, str(path)


def cache_file() -> Path:
    """Where digests are remembered: ``cache/digests.json`` under ``SCVIADUCT_HOME`` or the user's data folder."""
    home = os.environ.get("SCVIADUCT_HOME")
    return (Path(home) if home else platformdirs.user_data_path("scviaduct")) / "cache" / "digests.json"


@dataclass(frozen=True, slots=True)
class Content:
    """What a file held when it was looked at.

    Attributes
    ----------
    version
        Digest of the content, 32 hexadecimal characters.
    stamp
        Size and time before it was read, so that a later change shows; None where no time is told.
    """

    version: str
    stamp: tuple[str, int] | None


def contents(places: Sequence[Place]) -> list[Content]:
    """Identify files, from the cache where size and time are as remembered.

    Parameters
    ----------
    places
        What to identify. Content that is not remembered is read whole.

    Returns
    -------
    list of Content
        In the order of ``places``.
    """
    known, fresh, found = _remembered(), {}, []
    try:
        for place in places:
            stamp, now = place.stamp(), time.time_ns()
            entry = known.get(place.url)
            if stamp and entry and entry[0] == stamp[0]:
                found.append(Content(entry[1], stamp))
                continue
            found.append(Content(place.digest(), stamp))
            if stamp and stamp == place.stamp() and now - stamp[1] > _RACY_NS:
                fresh[place.url] = [stamp[0], found[-1].version]
    finally:
        # An interrupted plan over many large files keeps what it has paid for.
        if fresh:
            _remember(fresh)
    return found


def _remembered() -> dict[str, list[str]]:
    # A cache that cannot be read costs a second reading of the files, nothing else: it is replaced.
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        held = json.loads(cache_file().read_text())
        if isinstance(held, dict):
            return held
    return {}


def _remember(fresh: dict[str, list[str]]) -> None:
    file = cache_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=file.name, delete=False) as staged:
        json.dump({**_remembered(), **fresh}, staged)
    Path(staged.name).replace(file)
