"""Receiving a file over a network: bounded, resumed after a kill, and checked before it gets its name.

``huggingface_hub`` 2.4 gives every download a name of its own and deletes it when it fails, so that a killed one starts
again from nothing. Here a file grows as ``NAME.part`` and the next call asks for the rest of it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scviaduct.errors import PackageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

LIMIT = 64 << 30
"""Most bytes of one file or archive; the largest reference on the hub has under 10 GB with its data."""
_CHUNK = 1 << 20
_TRIES = 4
_WAIT = 0.25
"""Seconds before the second try; doubled for each that brought nothing."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a file is.

    Attributes
    ----------
    file
        Its name.
    received
        Bytes on this machine, those of an earlier call included.
    size
        Bytes in all, None where the server does not say.
    """

    file: str
    received: int
    size: int | None


@dataclass(frozen=True, slots=True)
class Expected:
    """What is known of a file before it comes; what is None or empty is not checked.

    Attributes
    ----------
    size
        Bytes.
    sha256, git_sha1, md5
        Hexadecimal; git's is that of the blob.
    begins
        Its first bytes: what begins otherwise is not received to its end.
    """

    size: int | None = None
    sha256: str = ""
    git_sha1: str = ""
    md5: str = ""
    begins: bytes = b""

    @property
    def summed(self) -> bool:
        """Whether a checksum is known."""
        return bool(self.sha256 or self.git_sha1 or self.md5)


@dataclass(frozen=True, slots=True)
class Received:
    """What came: bytes, checksum (hexadecimal), and the server's name for this content (ETag), if any."""

    size: int
    sha256: str
    validator: str = ""


@dataclass(frozen=True, slots=True)
class Stream:
    """The bytes of a file from ``start`` on, of ``size`` in all, as the content ``validator`` names."""

    start: int
    validator: str
    size: int | None
    chunks: Iterator[bytes]


class InterruptedTransferError(Exception):
    """The connection broke, or the server is out of order for now: worth another try."""


class RefusedTransferError(Exception):
    """The server refuses; no use in asking again.

    Parameters
    ----------
    status
        Of HTTP.
    code
        The hub's own (``X-Error-Code``), or empty.
    """

    def __init__(self, status: int, code: str = "") -> None:
        super().__init__(status, code)
        self.status = status
        self.code = code


def download(
    open_at: Callable[[int, str], AbstractContextManager[Stream]],
    target: Path,
    expected: Expected,
    *,
    limit: int = LIMIT,
    on_progress: Callable[[Progress], None] | None = None,
) -> Received:
    """Receive a file, or the rest of it; one that is there and is what is expected, by its size at least, stays.

    Parameters
    ----------
    open_at
        Opens the content from a byte on, given what named it last time (or an empty text).
    target
        Where it goes once it is whole; the part lies beside it as ``NAME.part`` until then.
    expected
        What it must be.
    limit
        Most bytes to take.
    on_progress
        Called after each MiB or so.

    Raises
    ------
    PackageError
        If the network, the disk or the checksum fails, or there are more bytes than the limit.
    RefusedTransferError
        If the server refuses.
    """
    if target.exists() and expected.size is not None:
        there, wrong = check(target, expected)
        if not wrong:
            return there
    part = target.with_name(f"{target.name}.part")
    note = target.with_name(f"{target.name}.part.json")
    tries, furthest, resumed = 0, _size(part), _size(part) > 0
    while True:
        failure = _try(open_at, part, note, expected, limit, on_progress)
        if failure:
            # Only what was never here before is progress: a file that is too short would be fetched for ever.
            tries = 1 if _size(part) > furthest else tries + 1
            furthest = max(furthest, _size(part))
            if tries >= _TRIES:
                raise PackageError(
                    f"{target.name} did not come whole: {failure}.",
                    "Check the network and repeat the command; it goes on where it stopped.",
                )
            time.sleep(_WAIT * 2**tries)
            resumed = _size(part) > 0
            continue
        received, wrong = check(part, expected)
        if not wrong:
            break
        part.unlink()
        if not resumed:
            raise PackageError(
                f"{target.name} is not what was announced: {wrong}.",
                "Repeat the command; if it happens again, something between here and the publisher changes the file.",
            )
        resumed = False  # the part was of other content, or damaged: once more from the first byte
    validator = _validator(note)
    part.replace(target)
    note.unlink(missing_ok=True)
    return Received(received.size, received.sha256, validator)


def _try(
    open_at: Callable[[int, str], AbstractContextManager[Stream]],
    part: Path,
    note: Path,
    expected: Expected,
    limit: int,
    on_progress: Callable[[Progress], None] | None,
) -> str:
    """Receive what is missing; why it broke, or nothing. What broke may hold a token, so that it is not passed on."""
    validator = _validator(note)
    start = _size(part) if validator or expected.summed else 0
    if expected.size is not None and start == expected.size and part.exists():
        return ""
    try:
        with open_at(start, validator) as stream:
            _write(stream, part, note, expected, limit, on_progress)
    except InterruptedTransferError as error:
        return str(error)
    except RefusedTransferError as error:
        if error.status != 416 or not start:
            raise
        part.unlink()
        return "the file has changed since its first part came"
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        full = str(error.strerror)
    else:
        return ""
    raise no_space(part.parent, full)


def _write(
    stream: Stream,
    part: Path,
    note: Path,
    expected: Expected,
    limit: int,
    on_progress: Callable[[Progress], None] | None,
) -> None:
    size = stream.size if expected.size is None else expected.size
    name, received = part.name.removesuffix(".part"), stream.start
    _bound(name, max(stream.size or 0, size or 0), limit)
    note.write_text(json.dumps({"validator": stream.validator}))
    # Unbuffered: what was received survives a kill.
    with part.open("ab" if stream.start else "wb", buffering=0) as file:
        for chunk in stream.chunks:
            if received == 0 and not chunk.startswith(expected.begins):
                part.unlink()
                note.unlink()
                raise PackageError(
                    f"What comes as {name} begins with {ascii(chunk[:12])[1:]}, not with {ascii(expected.begins)[1:]}.",
                    "Check the address in a browser: it may be that of a page, or ask for a login.",
                )
            received += len(chunk)
            _bound(name, received, limit if expected.size is None else min(limit, expected.size))
            view = memoryview(chunk)
            while view:
                view = view[file.write(view) :]
            if on_progress is not None:
                on_progress(Progress(name, received, size))
    if size is not None and received < size:
        raise InterruptedTransferError(f"it ended after {received:,} of {size:,} bytes")


def _bound(name: str, size: int, limit: int) -> None:
    if size > limit:
        raise PackageError(
            f"{name} has more than the {limit:,} bytes that are taken.",
            "Check the address; a larger reference is fetched by other means and named as a folder.",
        )


def no_space(folder: Path, reason: str = "") -> PackageError:
    """The error for a full disk."""
    told = f" ({reason})" if reason else ""
    return PackageError(
        f"There is no space left for the download in {folder}{told}.",
        "Free some, or set SCVIADUCT_HOME to a folder on a larger disk; the download goes on where it stopped.",
    )


def check(path: Path, expected: Expected) -> tuple[Received, str]:
    """Size and SHA-256 of a file, and what of it is not as expected, in words (empty if all is)."""
    size = path.stat().st_size
    # git names a blob by the SHA-1 of a header and the content; the MD5 is S3's. Both find damage, neither malice.
    git = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    wanted = [sha256, *([git] if expected.git_sha1 else []), *([md5] if expected.md5 else [])]
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            for sum_ in wanted:
                sum_.update(chunk)
    received = Received(size, sha256.hexdigest())
    if expected.size is not None and size != expected.size:
        return received, f"{size:,} bytes instead of {expected.size:,}"
    for told, sum_ in ((expected.sha256, sha256), (expected.git_sha1, git), (expected.md5, md5)):
        if told and sum_.hexdigest() != told.lower():
            return received, f"its {sum_.name} is {sum_.hexdigest()[:16]}… and not {told[:16]}…"
    return received, ""


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _validator(note: Path) -> str:
    if not note.exists():
        return ""
    try:
        return str(json.loads(note.read_text())["validator"])
    except (ValueError, KeyError, TypeError):  # a kill cut the note: what it was about is not known
        return ""
