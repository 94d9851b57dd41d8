"""Getting a pretrained model from wherever it lies, pinned and checked, into a folder of this machine."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scviaduct.errors import PackageError, SourceError
from scviaduct.references.fetching.cached import Fetched, Shelf, holds_model, is_package, no_model, offline, prefix_of
from scviaduct.references.fetching.download import (
    LIMIT,
    Expected,
    Progress,
    Received,
    RefusedTransferError,
    check,
    download,
)
from scviaduct.references.fetching.unpacking import SIGNATURE, unpack
from scviaduct.references.registry import home
from scviaduct.sources.uri import refuse_secrets
from scviaduct.values import digest

if TYPE_CHECKING:
    from collections.abc import Callable

    from scviaduct.references.fetching.hub import Repository

    OnProgress = Callable[[Progress], None] | None

_SCHEME = re.compile(r"([A-Za-z][\w+.-]*)://")
_HUB = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([^#?@\s]+?))?/?(?:#([^#?\s]+))?", re.ASCII)
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{16,}")
_NOT_MODIFIED = 304
_SCHEMES = (
    "Write a folder or .zip file, hf://OWNER/NAME@REVISION, s3://BUCKET/FOLDER/, s3://BUCKET/MODEL.zip or"
    " https://HOST/MODEL.zip, e.g. hf://scvi-tools/tabula-sapiens-heart-scvi."
)


def fetch(
    uri: str | Path,
    *,
    cache: Path | None = None,
    data: bool = True,
    limit: int = LIMIT,
    on_progress: Callable[[Progress], None] | None = None,
) -> Fetched:
    """Bring a model's files to this machine; what is here already is checked and not fetched again.

    Parameters
    ----------
    uri
        ``hf://OWNER/NAME[@REVISION]``, ``s3://BUCKET/FOLDER/``, ``s3://`` or ``https://`` of a ``.zip``, or a local
        folder or ``.zip``. ``#SUB/FOLDER`` chooses among several models of an archive or repository.
    cache
        Where downloads are kept; None for ``downloads`` in :func:`scviaduct.references.registry.home`.
    data
        Whether to fetch the data that the model was trained on, too. Of a local folder nothing is fetched: who reads
        it leaves the data out (``Registry.add(data=False)``).
    limit
        Most bytes of one file.
    on_progress
        Called as bytes come in.

    Returns
    -------
    Fetched
        The folder, and where its files come from. A local folder is returned as it is.

    Raises
    ------
    PackageError
        If the address names no model, may not be read, or carries credentials, or if network, checksum or disk fail.
    """
    text = str(uri)
    scheme = found[1].lower() if (found := _SCHEME.match(text)) else ""
    if scheme in ("", "file"):
        return _local(text.removeprefix("file://"), cache or home() / "downloads", data=data)
    _refuse(text)
    shelves = cache or home() / "downloads"
    if scheme == "hf":
        return _from_hub(text, shelves, data=data, limit=limit, on_progress=on_progress)
    if scheme == "s3":
        return _from_bucket(text, shelves, data=data, limit=limit, on_progress=on_progress)
    if scheme in ("http", "https"):
        return _from_web(text, shelves, data=data, limit=limit, on_progress=on_progress)
    raise PackageError(f"References are not fetched by '{scheme}://'.", _SCHEMES)


def _refuse(text: str) -> None:
    """Refuse an address with credentials, which would end in the provenance, without repeating them."""
    try:
        refuse_secrets(text)
        found = "" if not _TOKEN.search(text) else "a token of the hub"
    except SourceError:
        found = "credentials"
    if found:
        raise PackageError(
            f"The address of the reference carries {found}, which would be stored.",
            "Give them through the environment: HF_TOKEN for the hub, AWS_PROFILE for S3.",
        )


def _named(kept: Fetched, **told: Any) -> Fetched:
    """With what was asked for, which may be another name of the same content."""
    return Fetched(kept.folder, {**told, **kept.provenance})


def _local(text: str, cache: Path, *, data: bool) -> Fetched:
    path, choose = Path(text).expanduser(), ""
    if not path.exists() and ".zip#" in text:
        name, _, choose = text.rpartition("#")
        path = Path(name).expanduser()
    if path.is_dir():
        names = _names(path)
        if not holds_model(names):
            below = sorted(found.name for found in path.glob("*/") if holds_model(_names(found)))
            raise _no_local_model(path, below)
        if not is_package(names):
            prefix_of(names, f"'{path}'")
        return Fetched(path, {"uri": str(path.absolute()), "kind": "folder"})
    if not path.is_file():
        hub = re.fullmatch(r"[\w.-]+/[\w.-]+(@.+)?", text)
        hint = f" For the hub, write hf://{text}." if hub else ""
        raise PackageError(f"There is no folder or file '{_TOKEN.sub('hf_…', text)}'.{hint}", _SCHEMES)
    received, _ = check(path, Expected())
    shelf = Shelf(cache, "zip", received.sha256)
    with shelf.locked():
        kept = _unpacked(path, received, shelf, str(path), choose, {"kind": "zip"}, data=data)
    return _named(kept, uri=f"{path.absolute()}{f'#{choose}' if choose else ''}")


def _names(folder: Path) -> list[str]:
    """Files directly in a folder; none if it may not be read."""
    return [path.name for path in folder.glob("*") if path.is_file()]


def _no_local_model(path: Path, below: list[str]) -> PackageError:
    if below:
        listed = ", ".join(below[:8])
        return PackageError(f"'{path}' holds no model, but its folders {listed} do.", f"Name {path / below[0]}.")
    return no_model(f"'{path}'", [])


def _unpacked(
    archive: Path, received: Received, shelf: Shelf, place: str, choose: str, told: dict[str, Any], *, data: bool
) -> Fetched:
    """The model of an archive, unpacked or found unpacked."""
    version = _version(received.sha256, choose, data=data)
    kept = shelf.load(version)
    if kept is not None:
        return kept
    work = shelf.work(version)
    shutil.rmtree(work)
    unpack(archive, work, place=place, choose=choose, data=data)
    files = {}
    for path in sorted(work.iterdir()):
        got, _ = check(path, Expected())
        files[path.name] = {"size": got.size, "sha256": got.sha256}
    packed = {"size": received.size, "sha256": received.sha256}
    return shelf.keep(version, {**told, "archive": packed, "files": files})


def _version(sha256: str, choose: str, *, data: bool) -> str:
    return f"{sha256[:40]}{f'-{digest(choose)[:8]}' if choose else ''}{'' if data else '-lean'}"


def _from_hub(text: str, cache: Path, *, data: bool, limit: int, on_progress: OnProgress) -> Fetched:
    found = _HUB.fullmatch(text)
    if not found:
        # What stands before an at sign may be a password.
        shown = "The address" if re.match("hf://[^/]*@", text) else f"'{text}'"
        raise PackageError(
            f"{shown} names no repository of the hub.",
            "Write hf://OWNER/NAME or hf://OWNER/NAME@REVISION, e.g. hf://scvi-tools/tabula-sapiens-heart-scvi@main.",
        )
    from scviaduct.references.fetching.hub import Repository, pull  # the hub's client takes a second to import

    name, revision, folder = found.groups()
    repository: Repository = Repository(name, revision or "main", (folder or "").strip("/"))
    shelf = Shelf(cache, *repository.key)
    with shelf.locked():
        kept = pull(repository, shelf, data=data, limit=limit, on_progress=on_progress)
    at = f"#{repository.folder}" if repository.folder else ""
    pinned = f"hf://{name}@{kept.provenance['commit']}{at}"
    return _named(kept, uri=text, revision=repository.revision, pinned=pinned)


def _from_bucket(text: str, cache: Path, *, data: bool, limit: int, on_progress: OnProgress) -> Fetched:
    from scviaduct.references.fetching.buckets import (  # s3fs takes half a second to import
        Bucket,
        expected,
        fetch_folder,
    )

    url, _, choose = text.partition("#")
    bucket = Bucket(url)
    shelf = Shelf(cache, *bucket.key)
    with shelf.locked():
        if not url.lower().endswith(".zip"):
            return _named(fetch_folder(bucket, shelf, data=data, limit=limit, on_progress=on_progress), uri=text)
        name = _asked_as(choose, data=data)
        if offline():
            return _named(shelf.without_asking(name, url), uri=text)
        info = bucket.info()
        before = shelf.load(shelf.recall(name))
        if before is not None and before.provenance.get("etag") == info["ETag"]:
            return _named(before, uri=text)
        archive = _place_for_archive(shelf)
        known = expected(info, SIGNATURE)
        came = download(bucket.opener(), archive, known, limit=limit, on_progress=on_progress)
        told = {"kind": "s3", "anonymous": bucket.anonymous, "last_modified": str(info.get("LastModified", ""))}
        return _named(_keep_archive(shelf, archive, came, url, choose, told, data=data), uri=text)


def _from_web(text: str, cache: Path, *, data: bool, limit: int, on_progress: OnProgress) -> Fetched:
    url, _, choose = text.partition("#")
    if re.match(r"https?://(www\.)?(huggingface\.co|hf\.co)/[\w.-]+/[\w.-]+/?$", url):
        raise PackageError(
            f"{url} is the page of a repository, not an archive.", f"Write hf://{'/'.join(url.split('/')[3:5])}."
        )
    import httpx2

    from scviaduct.references.fetching.web import over_http

    shelf, name = Shelf(cache, "web", digest(url)), _asked_as(choose, data=data)
    with shelf.locked():
        if offline():
            return _named(shelf.without_asking(name, url), uri=text)
        before = shelf.load(shelf.recall(name))
        archive = _place_for_archive(shelf)
        etag = before.provenance.get("etag") if before else ""
        # A part of a newer content is gone on with, so that the server is not asked whether the older one still holds.
        known = {"If-None-Match": etag} if etag and not archive.with_name("archive.zip.part").exists() else {}
        failure: PackageError | None = None
        came: Received | None = None
        with httpx2.Client(follow_redirects=True) as client:
            try:
                opener = over_http(client, url, known)
                came = download(opener, archive, Expected(begins=SIGNATURE), limit=limit, on_progress=on_progress)
            except RefusedTransferError as error:
                failure = _web_refusal(url, error.status)
                if before is not None and error.status == _NOT_MODIFIED:
                    return _named(before, uri=text)
        if came is None:
            raise failure or _web_refusal(url, 0)
        return _named(_keep_archive(shelf, archive, came, url, choose, {"kind": "web"}, data=data), uri=text)


def _place_for_archive(shelf: Shelf) -> Path:
    """Where an archive goes; one that a killed call left whole may be of an older content, and is taken away."""
    archive = shelf.folder / "archive.zip"
    archive.unlink(missing_ok=True)
    return archive


def _asked_as(choose: str, *, data: bool) -> str:
    return f"{choose}{'' if data else ' without data'}"


def _keep_archive(
    shelf: Shelf, archive: Path, came: Received, url: str, choose: str, told: dict[str, Any], *, data: bool
) -> Fetched:
    """Unpack what was downloaded; the archive goes either way, since a refused one does not get better."""
    try:
        kept = _unpacked(archive, came, shelf, url, choose, {**told, "etag": came.validator}, data=data)
    finally:
        archive.unlink()
    shelf.remember(_asked_as(choose, data=data), kept.folder.name)
    return kept


def _web_refusal(url: str, status: int) -> PackageError:
    if status in (401, 403):
        return PackageError(
            f"{url} is not open to everyone ({status}).", "Download it by other means and name the .zip file."
        )
    if status in (404, 410):
        return PackageError(f"There is nothing at {url} ({status}).", "Check the address in a browser.")
    return PackageError(f"The server answered {status} for {url}.", "Try again later, or check it in a browser.")
