"""Where a reference's cells come from, as far as strangers may know."""

from __future__ import annotations

from ipaddress import ip_address
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from scviaduct.references.fetching.searching import safe

if TYPE_CHECKING:
    from collections.abc import Mapping

_WEB = ("http", "https")
_INSIDE = ("local", "localhost", "internal", "intranet", "lan", "corp", "home")
_STORES = {"s3": "S3", "gs": "Google Cloud Storage", "gcs": "Google Cloud Storage", "az": "Azure", "abfs": "Azure"}


def origin_of(provenance: Mapping[str, Any]) -> str:
    """A reference's source in words that name no path, no private host and no secret.

    Parameters
    ----------
    provenance
        Of a package: what it was trained on, or where it was fetched.

    Returns
    -------
    str
        The URI of a Census release, a public web page or a hub's commit; else what kind of place it is.
    """
    source = safe(str(provenance.get("source") or provenance.get("uri") or ""), lines=False)
    if provenance.get("kind") == "hub" and provenance.get("repository"):
        if provenance.get("private"):
            return "a model on the hub that is not public"
        commit = str(provenance.get("commit", ""))
        return safe(f"the model hf://{provenance['repository']}{'@' + commit if commit else ''}", lines=False)
    if source.startswith("census:") and "uri=" not in source:
        return f"CELLxGENE Census, `{source}`"
    plain = source.removeprefix("soma:").removeprefix("census:").partition("?")[0]
    parts = urlsplit(plain)
    pinned = _pin(provenance)
    if parts.scheme in _WEB and is_public(parts.hostname or ""):
        return f"<{parts.scheme}://{parts.hostname}{parts.path}>{pinned}"
    if parts.scheme in _STORES:
        return f"an object store ({_STORES[parts.scheme]}){pinned}"
    if parts.scheme in _WEB:
        return f"a web server that is not public{pinned}"
    if source or "folder" in provenance:
        return f"files that are not public{pinned}"
    return "not recorded"


def _pin(provenance: Mapping[str, Any]) -> str:
    version = safe(str(provenance.get("source_version") or ""), lines=False)
    # A version may be a list of files with their paths; a digest has neither slash nor dot.
    return f", version `{version}`" if version.replace("-", "").isalnum() and len(version) <= 128 else ""


def is_public(host: str) -> bool:
    """Whether a host's name is one of the public net: no number, no name of a private network."""
    try:
        return ip_address(host).is_global
    except ValueError:
        return "." in host and host.rpartition(".")[2].lower() not in _INSIDE
