"""The grammar of source URIs: ``SCHEME:LOCATION?NAME=VALUE&NAME=VALUE``.

Four schemes: ``census:RELEASE``, ``soma:PATH_OR_URL``, ``landing:PATH`` for what ``scviaduct land`` wrote, and none at
all for files (a path or an fsspec URL). Everything
is percent-decoded once, the location too: write ``%3F`` for a question mark and ``%25`` for a percent sign in a path,
and ``%26`` for an ampersand in a value (or ``and`` in a filter). An :class:`Address` turns into canonical text:
parameters sorted, values quoted, local paths absolute.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from scviaduct.errors import SourceError
from scviaduct.values import digest

if TYPE_CHECKING:
    from collections.abc import Mapping

_COMMON = {
    "filter": "value filter on obs",
    "var_filter": "value filter on var; genes outside are treated as absent",
    "layer": "where the counts are",
    "duplicates": "'keep' also takes cells whose is_primary_data is false",
    "version": "what pins the content; filled in when the source is opened",
}
PARAMETERS: dict[str, dict[str, str]] = {
    "census": {
        **_COMMON,
        "organism": "as the Census names it, homo_sapiens by default",
        "measurement": "RNA by default",
        "uri": "a mirror or a local collection of the Census schema",
    },
    "soma": {
        **_COMMON,
        "measurement": "RNA or the only one by default; several by commas, RNA,ATAC",
        "key": "obs column that names a cell within its dataset",
        "dataset": "obs column that names the dataset",
    },
    "landing": {
        **{name: told for name, told in _COMMON.items() if name != "layer"},
        "part": "of several files that were landed, the one to read, by its URL",
    },
    "file": {
        **_COMMON,
        "modality": "of several, those to read: rna,protein; NAME:atac says what NAME is",
        "proteins": "element of obsm that holds the counts of proteins",
        "key": "obs column that names a cell within its dataset; obs_names by default",
        "dataset": "obs column that names the dataset; the file's stem by default",
    },
}
"""What each scheme's query may hold, and what it means."""

_AUTHORITY = re.compile(r"([A-Za-z][\w+.-]*)://([^/?#]*)")
_NAME = re.compile(r"[?&]([\w.~-]+)=(?!=)")
_REVISIONS = ("github",)
"""Protocols whose ``name:name@revision`` is no password."""
_SECRET = re.compile(
    r"token|secret|passw|pwd|credential|signature|api_?-?key|access_?-?key|^x-(amz|goog)|^sig$|^auth", re.IGNORECASE
)
_ASIDE = "Give credentials through the environment (AWS_PROFILE) or fsspec's configuration (FSSPEC_HTTP=JSON)."
_PLACE = ("version", "filter", "uri", "duplicates")
"""Parameters that enter a shard's address through its version and its rows, not through the selection."""


@dataclass(frozen=True, slots=True)
class Address:
    """A parsed source URI.

    Attributes
    ----------
    scheme
        ``census``, ``soma``, ``landing`` or ``file``.
    location
        Decoded: a release name, or an absolute URL (``file:///...`` for local paths).
    parameters
        Decoded values by name.
    """

    scheme: str
    location: str
    parameters: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        head = "" if self.scheme == "file" else f"{self.scheme}:"
        query = _query(self.parameters)
        return f"{head}{quoted_url(self.location)}{'?' if query else ''}{query}"

    @property
    def selection(self) -> str:
        """Canonical text of the parameters that decide which values are read, wherever the cells lie."""
        return _query({name: value for name, value in self.parameters.items() if name not in _PLACE})

    @property
    def keeps_duplicates(self) -> bool:
        """Whether cells that are not primary data are selected too."""
        return self.parameters.get("duplicates") == "keep"

    def pinned(self, **parameters: str | None) -> Address:
        """The same address with parameters set, or taken out where None."""
        merged = {**self.parameters, **parameters}
        kept = {name: value for name, value in merged.items() if value is not None}
        return Address(self.scheme, self.location, kept)

    def at(self, location: str) -> Address:
        """The same parameters at another location."""
        return Address(self.scheme, location, self.parameters)


def parse(uri: str) -> Address:
    """Parse a source URI.

    Raises
    ------
    SourceError
        If there is no location, a parameter is unknown, empty, given twice or not ``name=value``, or a URL carries
        credentials; they would end in messages and in the store.
    """
    refuse_secrets(uri)
    scheme, rest = "file", uri
    for prefix in ("census", "soma", "landing"):
        if uri.startswith(f"{prefix}:"):
            scheme, rest = prefix, uri.removeprefix(f"{prefix}:")
    location, _, query = rest.partition("?")
    # Messages name what stands before the query: an unknown parameter may hold a token.
    head = uri.partition("?")[0]
    if not location.strip():
        raise SourceError(
            f"Source '{head}' names no place.",
            "Write census:2025-11-08?organism=homo_sapiens, soma:PATH, or the path of a .h5ad, a .zarr or a folder.",
        )
    location = unquote(location)
    location = location if scheme == "census" else absolute_url(location)
    return Address(scheme, location, _parameters(head, scheme, query))


def _parameters(head: str, scheme: str, query: str) -> dict[str, str]:
    known = PARAMETERS[scheme]
    parameters: dict[str, str] = {}
    for part in query.split("&") if query else ():
        name, equals, value = part.partition("=")
        if name not in known:
            close = get_close_matches(name, known, n=1)
            raise SourceError(
                f"Source '{head}' has an unknown parameter '{name}'{f' (did you mean {close[0]}?)' if close else ''}.",
                f"A {scheme} source takes {', '.join(sorted(known))}; an '&' inside a value is written %26.",
            )
        if not equals or not value:
            raise SourceError(f"Parameter '{name}' of source '{head}' has no value.", f"Write {name}=VALUE.")
        if name in parameters:
            raise SourceError(f"Parameter '{name}' of source '{head}' is given twice.", "Give it once.")
        parameters[name] = unquote(value)
    if parameters.get("duplicates", "keep") != "keep":
        raise SourceError(
            f"Source '{head}' has duplicates={parameters['duplicates']}.",
            "Write duplicates=keep, or leave it out to select primary cells only.",
        )
    if "uri" in parameters:
        parameters["uri"] = absolute_url(parameters["uri"])
    elif scheme == "census" and "version" in parameters:
        raise SourceError(
            f"Source '{head}' gives version= without uri=.", "A release pins itself: write census:2025-11-08."
        )
    return parameters


def refuse_secrets(uri: str) -> None:
    """Refuse passwords and tokens in any URL, however often it is quoted, without repeating them."""
    text, before = uri, ""
    while text != before:
        for protocol, authority in (found for link in text.split("::") for found in _AUTHORITY.findall(link)):
            user, at, _ = authority.rpartition("@")
            port = "" if at or authority.endswith("]") else authority.rpartition(":")[2] if ":" in authority else ""
            web = protocol.lower() in ("http", "https")
            # A password may hold a slash: what stands where a port would is then no number.
            odd = ":" in user or (web and at) or not (port or "0").isdigit()
            if odd and protocol.lower() not in _REVISIONS:
                raise SourceError(f"The {protocol} URL of a source carries credentials, which would be stored.", _ASIDE)
        # The first question mark begins the source's own parameters; a later, or a quoted one, the URL's.
        for name in _NAME.findall(text):
            if _SECRET.search(name):
                raise SourceError(f"The URL of a source carries the token '{name}', which would be stored.", _ASIDE)
        text, before = unquote(text), text


def extended(selection: str, **parameters: str) -> str:
    """An address's ``selection`` with further parameters."""
    held = dict(part.split("=", 1) for part in selection.split("&") if part)
    return _query({name: unquote(value) for name, value in held.items()} | parameters)


def _query(parameters: Mapping[str, str]) -> str:
    return "&".join(f"{name}={quote(value, safe='/:,')}" for name, value in sorted(parameters.items()))


def absolute_url(place: str) -> str:
    """Absolute, decoded URL of a place; a path becomes ``file:///...`` without resolving links."""
    if "://" in place and not place.startswith("file://"):
        return place.rstrip("/")
    path = Path(place.removeprefix("file://")).expanduser()
    # normpath takes '..' and a trailing slash out; resolve() would replace a link by where it points today.
    return f"file://{'' if os.sep == '/' else '/'}{Path(os.path.normpath(path.absolute())).as_posix()}"


def quoted_url(url: str) -> str:
    """Percent-encoded form of a decoded URL; what a URI, a message or a cell's ``source`` holds."""
    return quote(url, safe="/:,*@+=~")


def local_path(url: str) -> Path | None:
    """Path of a decoded ``file://`` URL, None for another protocol."""
    return Path(url.removeprefix("file://")) if url.startswith("file://") else None


def combined_version(parts: Mapping[str, str]) -> str:
    """Version of a source of several files: the digest of every file's name and version."""
    return digest(dict(parts))
