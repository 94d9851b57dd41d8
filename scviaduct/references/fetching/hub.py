"""Fetching a model from the Hugging Face hub, pinned to a commit.

Everything is asked through ``huggingface_hub``'s own client, so that its proxies, certificates and token apply. Files
come by plain HTTP also where the hub stores them as Xet: its client keeps nothing of a killed download.
``HF_HUB_DISABLE_XET`` is neither read nor set. An error of the client carries its request, and that the token: none is
chained to ours, which are made of words and raised after the handler has ended.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import HfApi, constants, get_session, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # exported lazily

from scviaduct import __version__
from scviaduct.errors import PackageError
from scviaduct.references.fetching.cached import holds_model, model_folders, needed, no_model, offline, room_for
from scviaduct.references.fetching.download import Expected, RefusedTransferError, download
from scviaduct.references.fetching.web import TIMEOUT, over_http

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from scviaduct.references.fetching.cached import Fetched, Shelf
    from scviaduct.references.fetching.download import Progress, Received

COMMIT = re.compile(r"[0-9a-f]{40}")
_ENTRIES = 20_000
"""Most files of a repository that are looked at."""
_SHOWN = re.compile(r"[^\x20-\x7e]")


@dataclass(frozen=True, slots=True)
class Repository:
    """A model's repository at a revision.

    Attributes
    ----------
    name
        ``OWNER/NAME``.
    revision
        Branch, tag or commit, which may be short.
    folder
        Folder of the repository; empty for its top.
    """

    name: str
    revision: str = constants.DEFAULT_REVISION
    folder: str = ""

    def __str__(self) -> str:
        revision = "" if self.revision == constants.DEFAULT_REVISION else f"@{self.revision}"
        return f"hf://{self.name}{revision}{f'#{self.folder}' if self.folder else ''}"

    @property
    def key(self) -> tuple[str, ...]:
        """Names the repository among what this machine has fetched; a mirror's is another."""
        host = urlsplit(endpoint()).netloc.rpartition("@")[2].replace(":", "_")
        return ("hub", host, self.name.replace("/", "--"))


def endpoint() -> str:
    """The hub: ``HF_ENDPOINT`` as it is now, or the public one."""
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def client() -> HfApi:
    """The hub's client; the token comes from ``HF_TOKEN``, or from ``hf auth login``."""
    return HfApi(endpoint=endpoint(), library_name="scviaduct", library_version=__version__)


def pull(
    repository: Repository,
    shelf: Shelf,
    *,
    data: bool = True,
    limit: int,
    on_progress: Callable[[Progress], None] | None = None,
) -> Fetched:
    """Fetch a model's files at one commit, or take them from this machine.

    A full commit that is here needs no request, another name one (what it stands for now), unless ``HF_HUB_OFFLINE``
    is set: then it stands for what it stood for when this machine last asked.

    Parameters
    ----------
    repository
        Where.
    shelf
        What this machine has of it.
    data
        Whether the training data (``adata.h5ad``, ``mdata.h5mu``) are wanted.
    limit
        Most bytes of all files.
    on_progress
        Told how far each file is.

    Raises
    ------
    PackageError
        If there is no such repository, revision or model, the token may not read it, or the network or disk fails.
    """
    kind = "" if data else "-lean"
    part = f"-{repository.folder.replace('/', '--')}" if repository.folder else ""
    if COMMIT.fullmatch(repository.revision):
        kept = shelf.load(f"{repository.revision}{part}{kind}")
        if kept is not None:
            return kept
    name = f"{repository.revision}{part}{kind}"
    if offline():
        return shelf.without_asking(name, str(repository))
    told = _resolve(repository)
    version = f"{told['commit']}{part}{kind}"
    kept = shelf.load(version)
    if kept is None:
        pinned = Repository(repository.name, told["commit"], repository.folder)
        files = _files(pinned, data=data)
        work = shelf.work(version)
        _check_room(pinned, files, work, limit)
        kept = shelf.keep(version, {**told, "files": _receive(pinned, files, work, on_progress)})
    shelf.remember(name, version)
    return kept


def _resolve(repository: Repository) -> dict[str, Any]:
    """What a revision is: asked once, so that a branch that moves meanwhile does not mix two commits."""

    def ask() -> dict[str, Any]:
        # Without a timeout the client waits for ever behind a firewall that drops what it does not let through.
        info = client().model_info(repository.name, revision=repository.revision, timeout=TIMEOUT)
        commit = str(info.sha)
        if not COMMIT.fullmatch(commit):
            raise ValueError
        licence = next((tag.removeprefix("license:") for tag in info.tags or () if tag.startswith("license:")), "")
        changed = "" if info.last_modified is None else info.last_modified.isoformat()
        return {
            "kind": "hub",
            "endpoint": endpoint(),
            "repository": repository.name,
            "commit": commit,
            "licence": licence,
            "last_modified": changed,
            "private": bool(info.private),
            "gated": bool(info.gated),
        }

    return asked(ask, repository)


def _check_room(pinned: Repository, files: Mapping[str, Expected], work: Path, limit: int) -> None:
    total = sum(known.size or 0 for known in files.values())
    if total > limit:
        raise PackageError(
            f"{pinned} has {total:,} bytes, more than the {limit:,} that are taken.",
            "Leave the training data out, or fetch it by other means and name the folder.",
        )
    room_for(work, total - sum(path.stat().st_size for path in work.iterdir()))


def _receive(
    pinned: Repository, files: Mapping[str, Expected], work: Path, on_progress: Callable[[Progress], None] | None
) -> dict[str, dict[str, Any]]:
    """Download what is missing of the files; size and checksum of each."""
    came = {}
    for name, known in files.items():
        path = f"{pinned.folder}/{name}" if pinned.folder else name
        url = hf_hub_url(pinned.name, path, revision=pinned.revision, endpoint=endpoint())

        got = _receive_one(pinned, url, work / name, known, on_progress)
        came[name] = {"size": got.size, "sha256": got.sha256}
    return came


def _receive_one(
    pinned: Repository, url: str, target: Path, known: Expected, on_progress: Callable[[Progress], None] | None
) -> Received:
    # The token goes to the hub alone: the client drops it where the hub sends us on to its store.
    headers = build_hf_headers(library_name="scviaduct", library_version=__version__)
    opener = over_http(get_session(), url, headers)
    try:
        return download(opener, target, known, on_progress=on_progress)
    except RefusedTransferError as error:
        failure = _refusal(error.status, error.code, pinned)
    raise failure


def _files(pinned: Repository, *, data: bool) -> dict[str, Expected]:
    """The files to fetch and what the hub says they are."""

    def ask() -> list[RepoFile]:
        tree = client().list_repo_tree(pinned.name, revision=pinned.revision, recursive=True)
        return [entry for entry, _ in zip(tree, range(_ENTRIES), strict=False) if isinstance(entry, RepoFile)]

    entries = {entry.path: entry for entry in asked(ask, pinned)}
    top = f"{pinned.folder}/" if pinned.folder else ""
    here = {
        path.removeprefix(top): entry
        for path, entry in entries.items()
        if path.startswith(top) and "/" not in path.removeprefix(top)
    }
    if not holds_model(here):
        below = [folder for folder in model_folders(entries) if folder]
        raise no_model(f"hf://{pinned.name}", below, pinned.folder)
    known = {}
    for name in needed(here, data=data, place=str(pinned)):
        entry = here[name]
        if entry.lfs is None:
            known[name] = Expected(entry.size, git_sha1=entry.blob_id)
        else:
            known[name] = Expected(entry.lfs.size, sha256=entry.lfs.sha256)
    return known


def asked[T](call: Callable[[], T], repository: Repository | None = None) -> T:
    """What a request to the hub brings, or its error in our words.

    Parameters
    ----------
    call
        Makes the request.
    repository
        What it is about, if it is about one.

    Raises
    ------
    PackageError
        If the hub refuses, cannot be reached, or answers with what is no answer.
    """
    try:
        return call()
    except HfHubHTTPError as error:
        failure = _refusal(error.response.status_code, error.response.headers.get("x-error-code", ""), repository)
    except HFValidationError:
        failure = PackageError(f"{repository} is no name that the hub allows.", "Write hf://OWNER/NAME@REVISION.")
    except OfflineModeIsEnabled:
        failure = PackageError(
            f"{repository or 'A search'} needs the hub, and HF_HUB_OFFLINE forbids requests.", "Unset HF_HUB_OFFLINE."
        )
    except httpx2.RequestError as error:
        failure = PackageError(
            f"The hub at {endpoint()} cannot be reached ({type(error).__name__}).",
            "Check the network, proxy and HF_ENDPOINT. What was fetched before is there with HF_HUB_OFFLINE=1.",
        )
    # A login page of a hotel, or another server: the client takes apart whatever comes.
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        failure = PackageError(
            f"What answers at {endpoint()} is no Hugging Face hub ({type(error).__name__}).",
            "Check the network, proxy and HF_ENDPOINT.",
        )
    raise failure


def _refusal(status: int, code: str, repository: Repository | None) -> PackageError:
    """The error for a refusal; the hub hides from strangers whether a private repository is there."""
    name = repository.name if repository else "asked for"
    has_token = "authorization" in build_hf_headers()
    if code == "RevisionNotFound" and repository:
        return PackageError(
            f"Repository {name} has no revision '{_SHOWN.sub('?', repository.revision)}'.",
            f"Leave @REVISION out for its main branch; {endpoint()}/{name}/tree/main lists branches and tags.",
        )
    if code == "GatedRepo":
        return PackageError(
            f"Repository {name} is open only to those who accepted its conditions.",
            f"Accept them at {endpoint()}/{name} and set HF_TOKEN to a token of the same account.",
        )
    if status in (401, 403) and has_token:
        return PackageError(
            f"The hub refuses the token for {name} ({status}): it is not valid, or may not read it.",
            "Set HF_TOKEN to a token that may, or unset it if the repository is public.",
        )
    if status in (401, 403):
        return PackageError(
            f"Repository {name} is private or does not exist: the hub wants a token ({status}).",
            "Check the name (scviaduct reference search TEXT); if it is private, set HF_TOKEN to one that may read it.",
        )
    if status == 404:
        seen = "does not exist, or the token may not see it" if has_token else "does not exist"
        return PackageError(
            f"Repository {name} {seen}.", "Check the name: scviaduct reference search TEXT finds what there is."
        )
    if status == 429:
        return PackageError(
            "The hub takes no more requests from here for now (429).", "Wait some minutes, or set HF_TOKEN."
        )
    return PackageError(f"The hub answered {status} for {name}.", "Try again later; https://status.huggingface.co.")
