"""Identity of a file: the digest of its content, remembered by size and time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import platformdirs

from scviaduct.errors import SourceError
from scviaduct.sources.unreadable import (
    RETRY,
    NothingThereError,
    UnreadableError,
    is_network,
    is_transient,
    reading,
    told,
)
from scviaduct.sources.uri import local_path, quoted_url

if TYPE_CHECKING:
    from collections.abc import Sequence

_CHUNK = 8 << 20
_TIMES = ("LastModified", "last_modified", "Last-Modified", "mtime", "created")
"""What fsspec's file systems call the time of the last change."""
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
        if not is_there(url, fs, path):
            raise nothing_at(url)
        return cls(url, fs, path, bool(fs.isdir(path)))

    def files(self) -> list[str]:
        """Paths of the files it consists of, sorted."""
        return sorted(self.fs.find(self.path)) if self.is_folder else [self.path]

    def stamp(self) -> tuple[str, int] | None:
        """Size and time of last change as text, and that time in ns; None where the file system tells nothing.

        Over HTTP the validators stand for the time: ``ETag``, ``Last-Modified``. Without a time the second value is 0.
        """
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
        when = next((info[name] for name in _TIMES if info.get(name)), None)
        if info.get("size") is None or not (when or info.get("ETag")):
            return None
        if isinstance(when, str):
            with contextlib.suppress(ValueError):
                when = parsedate_to_datetime(when)
        seconds = when.timestamp() if isinstance(when, datetime) else when if isinstance(when, int | float) else 0
        return int(info["size"]), int(seconds * 1e9), f"{when or ''}:{info.get('ETag', '')}"

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


def is_there(url: str, fs: Any, path: str) -> bool:
    """Whether anything lies at a place.

    Raises
    ------
    SourceError
        If the server does not say.
    """
    try:
        if fs.exists(path):
            return True
        # Over HTTP that is also the answer where no server answers; asking again tells why.
        return local_path(url) is None and bool(fs.info(path))
    except Exception as error:
        if is_transient(error):
            raise _unreachable(url, error) from error
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return False
        if isinstance(error, OSError) or is_network(error):
            raise _unreachable(url, error) from error
        raise


def _unreachable(url: str, error: BaseException) -> SourceError:
    return SourceError(f"{quoted_url(url)} cannot be reached ({told(error.__cause__ or error)}).", RETRY)


def nothing_at(url: str, error: BaseException | None = None) -> SourceError:
    """The error for a place that is empty, or became so; or that a network hides, if that is the cause."""
    if error is not None and is_transient(error):
        return _unreachable(url, error)
    return NothingThereError(f"There is nothing at {quoted_url(url)}.", "Check the path; was it moved or deleted?")


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
    """Where digests are remembered: ``cache/digests.json`` under ``SCVIADUCT_HOME`` or the user's data folder.

    Raises
    ------
    RuntimeError
        If this user has no home.
    """
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


_SEEN: dict[str, list[str]] = {}
"""What this process remembers: URL to stamp (empty where none is told) and version."""


def contents(places: Sequence[Place], planned: str | None = None) -> list[Content]:
    """Identify files, from the cache where size and time are as remembered.

    Parameters
    ----------
    places
        What to identify. Content that is not remembered is read whole.
    planned
        Version that is expected, if one is; this process does not read content of it twice where no stamp is told.

    Returns
    -------
    list of Content
        In the order of ``places``.

    Raises
    ------
    SourceError
        If one of them is gone.
    UnreadableError
        If one of them cannot be read.
    """
    known, fresh, found = {**_remembered(), **_SEEN}, {}, []
    try:
        for place in places:
            try:
                with reading(quoted_url(place.url), (OSError, RuntimeError, ValueError)):
                    content, is_news = _identified(place, known.get(place.url), planned)
            except UnreadableError as error:
                if isinstance(error.__cause__, FileNotFoundError):
                    raise nothing_at(place.url, error.__cause__) from error.__cause__
                raise
            found.append(content)
            if is_news:
                fresh[place.url] = [content.stamp[0] if content.stamp else "", content.version]
    finally:
        _SEEN.update(fresh)
        # An interrupted plan over many large files keeps what it has paid for.
        if fresh:
            _remember({url: entry for url, entry in fresh.items() if entry[0]})
    return found


def _identified(place: Place, known: list[str] | None, planned: str | None) -> tuple[Content, bool]:
    """What a place holds, and whether that is to be remembered."""
    stamp, now = place.stamp(), time.time_ns()
    if known and (known[0] == stamp[0] if stamp else known == ["", planned]):
        return Content(known[1], stamp), False
    content = Content(place.digest(), stamp)
    return content, stamp is None or (stamp == place.stamp() and now - stamp[1] > _RACY_NS)


def _remembered() -> dict[str, list[str]]:
    # The cache spares a second reading of the files, no more: one that cannot be read is replaced, or done without.
    with contextlib.suppress(OSError, RuntimeError, json.JSONDecodeError, UnicodeDecodeError):
        held = json.loads(cache_file().read_text())
        if isinstance(held, dict):
            return held
    return {}


def _remember(fresh: dict[str, list[str]]) -> None:
    # The same holds for one that cannot be written: a home that is read-only, full or not there stops nothing.
    with contextlib.suppress(OSError, RuntimeError):
        file = cache_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=file.name, delete=False) as staged:
            json.dump({**_remembered(), **fresh}, staged)
        Path(staged.name).replace(file)
