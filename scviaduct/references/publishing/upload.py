"""Uploading a repository in one commit, and fetching it back.

Everything is asked through ``huggingface_hub``'s own client, whose token comes from the environment. Files are stored
first and become visible with the commit: a reader sees the repository before it or after it, never between.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # exported lazily
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from scviaduct.errors import InputError, PackageError
from scviaduct.references.exporting import SAVED
from scviaduct.references.fetching.cached import CELLS, DATA, offline
from scviaduct.references.fetching.fetch import fetch
from scviaduct.references.fetching.hub import Repository, asked, client
from scviaduct.references.publishing.repository import CARD, METADATA, METRICS

if TYPE_CHECKING:
    from collections.abc import Callable

    from huggingface_hub import CommitOperation

    from scviaduct.references.publishing.repository import Contents

_TARGET = re.compile(r"hf://([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)/?")
_OURS = (SAVED, METADATA, CARD, METRICS, *DATA, *CELLS)
_ANYONES = (".gitattributes", ".gitignore", "LICENSE", "LICENSE.md", CARD)
"""Files that do not say what a repository is for."""
_WHOLE = "No reader sees half of it: the commit comes last."
_REFUSED = (401, 403)
_MOVED = (409, 412)


@dataclass(frozen=True, slots=True)
class _There:
    """A repository as it is: its commit, and its files with what pins their content."""

    private: bool
    commit: str
    files: dict[str, RepoFile]


def target_of(uri: str) -> Repository:
    """The repository of ``hf://OWNER/NAME``.

    Raises
    ------
    InputError
        If it is no such address, or names a revision: what is published is the main branch's next commit.
    """
    found = _TARGET.fullmatch(uri)
    if found is None:
        told = f"'{uri.partition('?')[0]}' is no repository to publish to"
        raise InputError(f"{told}.", "Write hf://OWNER/NAME, without @REVISION, e.g. hf://lab/lung-scvi.")
    return Repository(found[1])


def upload(contents: Contents, target: Repository, *, private: bool = False, replace: bool = False) -> str:
    """Upload a repository's files in one commit and check what the hub has of them.

    Parameters
    ----------
    contents
        What :func:`~scviaduct.references.publishing.repository.write_repository` gave.
    target
        Where to; made if it is not there.
    private
        Make it private.
    replace
        Take the place of another model.

    Returns
    -------
    str
        The full commit; that which is there, if it holds these files already.

    Raises
    ------
    InputError
        If the repository is public and should not be, or holds another model.
    PackageError
        If there is no token, the hub refuses it or cannot be reached, or what it gives back is not what was sent.
    """
    if offline():
        raise PackageError("Publishing needs the hub, and HF_HUB_OFFLINE forbids requests.", "Unset HF_HUB_OFFLINE.")
    if not get_token():
        raise PackageError(
            "Publishing needs a token, and there is none.",
            "Set HF_TOKEN to one that may write (Settings, Access Tokens on the hub), or run `hf auth login`.",
        )
    there = _state(target)
    if there is not None:
        _require_ours(there, contents, target, private=private, replace=replace)
    else:
        _write(lambda: client().create_repo(target.name, private=private, exist_ok=True), target)
        there = _state(target)
    changes = _changes(contents, there)
    if there is not None and not changes:
        return there.commit
    told = f"Publish {contents.family} with scviaduct"
    parent = there.commit if there else None
    with warnings.catch_warnings():  # the client takes every table for a data set
        warnings.filterwarnings("ignore", "It seems that you are about to commit a data file", UserWarning)
        made = _write(
            lambda: client().create_commit(target.name, changes, commit_message=told, parent_commit=parent), target
        )
    commit = str(made.oid)
    _verify(contents, target, commit)
    return commit


def _state(target: Repository) -> _There | None:
    """What the repository holds; None if there is none."""

    def ask() -> _There | None:
        try:
            info = client().model_info(target.name)
        except RepositoryNotFoundError as error:
            if error.response.status_code in _REFUSED:  # the token is refused, whatever there is
                raise
            return None
        tree = client().list_repo_tree(target.name, revision=info.sha, recursive=True)
        files = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
        return _There(bool(info.private), str(info.sha), files)

    return asked(ask, target)


def _require_ours(there: _There, contents: Contents, target: Repository, *, private: bool, replace: bool) -> None:
    if private and not there.private:
        raise InputError(
            f"Repository {target} is public, and --private was asked for; nothing was published.",
            "Make it private on the hub first, name another repository, or leave --private out.",
        )
    others = sorted(name for name in there.files if name not in _ANYONES)
    if replace or not others:
        return
    if SAVED not in there.files:
        shown = ", ".join(ascii(name[:80])[1:-1] for name in others[:5])
        raise InputError(
            f"Repository {target} holds something else: {shown}; nothing was published.",
            "Name another repository, or add --replace to put the model beside it.",
        )
    if not _same(there.files[SAVED], contents.folder / SAVED):
        raise InputError(
            f"Repository {target} holds another model (its {SAVED} differs); nothing was published.",
            "Name another repository, or add --replace: users who pinned its commits keep what they have.",
        )


def _same(entry: RepoFile, path: Path) -> bool:
    """Whether the hub's file has a file's content, by the hub's own digests."""
    if entry.size != path.stat().st_size:
        return False
    if entry.lfs is not None:
        return entry.lfs.sha256 == _sha256(path)
    content = path.read_bytes()
    return bool(entry.blob_id == _git_sha1(content))


def _sha256(path: Path) -> str:
    found = sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            found.update(chunk)
    return found.hexdigest()


def _git_sha1(content: bytes) -> str:
    from hashlib import sha1

    return sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _changes(contents: Contents, there: _There | None) -> list[CommitOperation]:
    """Files that are new or changed, and those of an earlier model that the new one does not have."""
    known = there.files if there else {}
    changed = [name for name in contents.files if name not in known or not _same(known[name], contents.folder / name)]
    stale = [name for name in _OURS if name in known and name not in contents.files]
    return [
        *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=contents.folder / name) for name in changed),
        *(CommitOperationDelete(path_in_repo=name) for name in stale),
    ]


def _write[T](call: Callable[[], T], target: Repository) -> T:
    """What a request that changes the hub brings, or its error in our words."""

    def guarded() -> T:
        try:
            return _unwrapped(call)
        except HfHubHTTPError as error:
            failure = _refusal(error.response.status_code, target)
            if failure is None:
                raise
        raise failure

    shown = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        return asked(guarded, target)
    except PackageError as error:
        failure = PackageError(f"{error.problem} {_WHOLE}", error.remedy)
    finally:
        if not shown:
            enable_progress_bars()
    raise failure


def _unwrapped[T](call: Callable[[], T]) -> T:
    """Call the client, which wraps the error of a file that it could not store."""
    try:
        return call()
    except RuntimeError as error:
        cause = error.__cause__
        failure = (
            cause
            if isinstance(cause, HfHubHTTPError | httpx2.RequestError)
            else PackageError(f"A file could not be stored on the hub ({type(cause or error).__name__}).", "Try again.")
        )
    raise failure


def _refusal(status: int, target: Repository) -> PackageError | None:
    if status in _REFUSED:
        return PackageError(
            f"The hub refuses the token for writing to {target} ({status}).",
            f"Set HF_TOKEN to a token that may write for '{target.name.partition('/')[0]}'.",
        )
    if status in _MOVED:
        return PackageError(
            f"Repository {target} changed while it was written to ({status}).",
            "Look at what is there now, and run the same command again.",
        )
    return None


def _verify(contents: Contents, target: Repository, commit: str) -> None:
    """Fetch what was published, at its commit, and compare every file."""
    # Beside the folder, where there was room for the same files a moment ago.
    with tempfile.TemporaryDirectory(dir=contents.folder.parent, prefix=".published-") as temporary:
        got: dict[str, Any] = fetch(f"hf://{target.name}@{commit}", cache=Path(temporary)).provenance["files"]
    for name in contents.files:
        if name not in got or got[name]["sha256"] != _sha256(contents.folder / name):
            raise PackageError(
                f"hf://{target.name}@{commit} gives another {name} than was sent.",
                "Publish again; do not announce this commit.",
            )
