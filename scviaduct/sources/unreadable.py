"""What h5py, zarr and TileDB-SOMA raise over content that they cannot read: named where it happens, judged by who asks.

Where a library is called, :func:`reading` names the piece. While a source is opened or scanned that is a SourceError
(:func:`refused`); while a shard is read it is a DataError, unless a second try may help (:func:`quarantined`).
"""

from __future__ import annotations

import contextlib
import errno
import lzma
import re
import zlib
from typing import TYPE_CHECKING

from scviaduct.errors import DataError, ScviaductError, SourceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

# zarr's own errors and Arrow's are ValueErrors; the last three are of codecs.
FILE_ERRORS = (OSError, RuntimeError, KeyError, ValueError, EOFError, zlib.error, lzma.LZMAError)
"""What h5py, zarr, their codecs and fsspec raise."""
MEND = "Is it whole? Copy or write it again, then run the same command."
RETRY = "Check the network and the credentials, then run the same command."

_NETWORK = frozenset({"aiohttp", "aiobotocore", "azure", "botocore", "gcsfs", "google", "requests", "urllib3"})
_RETRIED_STATUS = frozenset({408, 425, 429})
_RETRIED_ERRNO = frozenset(
    getattr(errno, name)
    for name in (
        *("EAGAIN", "EBUSY", "EHOSTDOWN", "EHOSTUNREACH", "EINTR", "EIO", "EMFILE", "ENETDOWN", "ENETUNREACH"),
        *("ENFILE", "ENOMEM", "EREMOTEIO", "ESTALE", "ETIMEDOUT"),
    )
    if hasattr(errno, name)
)
_RETRIED_TEXT = re.compile(
    r"curlCode: [1-9]|HTTP Response Code: (-1|408|429|5\d\d)|SlowDown|timed? ?out|connection (reset|refused)",
    re.IGNORECASE,
)
"""What TileDB says of a network; its errors have no codes."""


class UnreadableError(ScviaductError):
    """A library could not read a piece; :func:`refused` or :func:`quarantined` say what that means."""


class NothingThereError(SourceError):
    """A place is empty, or became so."""


def told(error: BaseException) -> str:
    """An error's type and the first line of its text."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".removesuffix(": ")


def is_network(error: BaseException) -> bool:
    """Whether an error is of a library that speaks to servers."""
    return type(error).__module__.partition(".")[0] in _NETWORK


def is_transient(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, may be gone at the next try: of a network or a busy machine."""
    while error is not None:
        if _may_pass(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _may_pass(error: BaseException) -> bool:
    if is_network(error):
        status = getattr(error, "status", None)
        return not isinstance(status, int) or status >= 500 or status in _RETRIED_STATUS
    if isinstance(error, OSError):
        return isinstance(error, ConnectionError | TimeoutError) or error.errno in _RETRIED_ERRNO
    # A ValueError or KeyError of zarr speaks of content, whatever its words.
    return not isinstance(error, ValueError | KeyError) and bool(_RETRIED_TEXT.search(str(error)))


@contextlib.contextmanager
def reading(what: str, errors: tuple[type[BaseException], ...] = FILE_ERRORS) -> Iterator[None]:
    """Name what a library reads; only its calls belong in here.

    Parameters
    ----------
    what
        File, element and rows.
    errors
        What the library raises.

    Raises
    ------
    UnreadableError
        Caused by the library's error.
    """
    try:
        yield
    except (NotImplementedError, RecursionError):
        raise
    except errors as error:
        raise UnreadableError(f"{what} cannot be read ({told(error)}).", MEND) from error
    except Exception as error:
        if not is_network(error):
            raise
        raise UnreadableError(f"{what} cannot be read ({told(error)}).", RETRY) from error


def each[T](read: Callable[[], Iterable[T]], what: str, errors: tuple[type[BaseException], ...]) -> Iterator[T]:
    """Items of a library's stream, whose errors are named as in :func:`reading`."""
    with reading(what, errors):
        items = iter(read())
    while True:
        with reading(what, errors):
            item = next(items, None)
        if item is None:
            return
        yield item


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """What is unreadable while a source is opened, described or scanned is a SourceError."""
    try:
        yield
    except UnreadableError as error:
        raise SourceError(error.problem, RETRY if is_transient(error.__cause__) else error.remedy) from error.__cause__


@contextlib.contextmanager
def quarantined(what: str) -> Iterator[None]:
    """What is unreadable while a shard is read is a DataError; what may pass is raised as it came, to be retried."""
    try:
        yield
    except UnreadableError as error:
        if error.__cause__ is not None and is_transient(error.__cause__):
            raise error.__cause__ from None
        raise DataError(f"{what}: {error.problem}", error.remedy) from error.__cause__
