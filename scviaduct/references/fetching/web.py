"""Opening a URL from a byte on, by HTTP."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx2

from scviaduct.references.fetching.download import InterruptedTransferError, RefusedTransferError, Stream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager

TIMEOUT = 60.0
"""Seconds for a connection, or for the next bytes."""
_CHUNK = 1 << 20
_AGAIN = (408, 425, 429, 500, 502, 503, 504)


def over_http(
    client: httpx2.Client, url: str, headers: Mapping[str, str] | None = None
) -> Callable[[int, str], AbstractContextManager[Stream]]:
    """Opens a URL from a byte on, as :func:`scviaduct.references.fetching.download.download` asks.

    Raises
    ------
    InterruptedTransferError
        If the network fails, or the server for now.
    RefusedTransferError
        If the server answers with another error, or 304 where ``headers`` ask for it.
    """

    @contextmanager
    def open_at(start: int, validator: str) -> Iterator[Stream]:
        asked = {"Accept-Encoding": "identity", **(headers or {})}
        if start:
            asked["Range"] = f"bytes={start}-"
            if validator.startswith('"'):  # a weak ETag (W/"...") is not allowed here; the answer's is compared below
                asked["If-Range"] = validator
        try:
            with client.stream("GET", url, headers=asked, timeout=TIMEOUT) as response:
                yield _stream(response, start, validator)
        except httpx2.RequestError as error:
            reason = f"{type(error).__name__}: {error}"
        else:
            return
        raise InterruptedTransferError(reason)

    return open_at


def _stream(response: Any, start: int, validator: str) -> Stream:
    status, headers = response.status_code, response.headers
    encoded = headers.get("content-encoding", "identity").lower() != "identity"
    # An encoded answer cannot be resumed: ranges count the bytes of the encoding.
    named = "" if encoded else headers.get("etag", "")
    if status == 206 and start:  # Partial Content
        span, _, whole = headers.get("content-range", "").removeprefix("bytes ").partition("/")
        if span.partition("-")[0] == str(start) and not encoded and (not validator or named in ("", validator)):
            size = int(whole) if whole.isdigit() else None
            return Stream(start, named or validator, size, response.iter_bytes(_CHUNK))
        status = 416  # the rest of something else
    if status == 200:  # OK, all of it
        length = headers.get("content-length", "")
        size = int(length) if length.isdigit() and not encoded else None
        return Stream(0, named, size, response.iter_bytes(_CHUNK))
    if status in _AGAIN:
        raise InterruptedTransferError(f"the server answered {status}")
    raise RefusedTransferError(status, headers.get("x-error-code", ""))
