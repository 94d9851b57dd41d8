"""Reading a model's folder, or an archive, from S3 or what speaks its protocol."""

from __future__ import annotations

import os
import re
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import botocore.session
import s3fs
from aiohttp import ClientError
from botocore.exceptions import BotoCoreError
from fsspec.config import conf

from scviaduct.errors import PackageError
from scviaduct.references.fetching.cached import holds_model, needed, no_model, offline, room_for
from scviaduct.references.fetching.download import (
    Expected,
    InterruptedTransferError,
    RefusedTransferError,
    Stream,
    download,
)
from scviaduct.values import digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from scviaduct.references.fetching.cached import Fetched, Shelf
    from scviaduct.references.fetching.download import Progress

_BLOCK = 16 << 20
"""Bytes of one request."""
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_MD5 = re.compile(r"[0-9a-f]{32}")
_PLAIN = (None, "", "AES256")
"""Encryptions under which an object's ETag is the MD5 of its content, if it was not sent in parts."""


class Bucket:
    """A bucket, opened as the environment says.

    Credentials come from where AWS's own tools take them (``AWS_PROFILE``, ``AWS_ACCESS_KEY_ID``, ...), the server
    from ``AWS_ENDPOINT_URL``. Where there are no credentials at all, requests are anonymous, which is what public
    buckets such as CZI's ask for. ``FSSPEC_S3={"anon": true}`` makes them anonymous in any case.

    Parameters
    ----------
    url
        ``s3://BUCKET/KEY``.
    """

    def __init__(self, url: str) -> None:
        bucket, _, key = url.removeprefix("s3://").partition("/")
        if not _BUCKET.fullmatch(bucket):
            raise PackageError(
                "The address names no bucket.", "Write s3://BUCKET/FOLDER/, e.g. s3://my-lab/models/heart/."
            )
        self.url = url
        self.path = f"{bucket}/{key}".rstrip("/")
        told = conf.get("s3", {}).get("anon")
        self.anonymous = botocore.session.Session().get_credentials() is None if told is None else bool(told)
        self._files = s3fs.S3FileSystem(anon=self.anonymous, skip_instance_cache=True)

    @property
    def key(self) -> tuple[str, ...]:
        """Names the place among what this machine has fetched."""
        server = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
        return ("s3", digest(server, self.path))

    def list(self) -> dict[str, dict[str, Any]]:
        """What lies directly in the folder, by name; of each its size, ETag and date."""
        entries = self._asked(lambda: self._files.ls(self.path, detail=True, refresh=True))
        return {PurePosixPath(entry["name"]).name: entry for entry in entries if entry["name"] != self.path}

    def info(self, name: str = "") -> dict[str, Any]:
        """Size, ETag, date and encryption of an object."""
        path = f"{self.path}/{name}" if name else self.path
        return dict(self._asked(lambda: self._files.info(path, refresh=True)))

    def opener(self, name: str = "") -> Callable[[int, str], AbstractContextManager[Stream]]:
        """Opens an object from a byte on, as :func:`scviaduct.references.fetching.download.download` asks."""
        path = f"{self.path}/{name}" if name else self.path

        @contextmanager
        def open_at(start: int, validator: str) -> Iterator[Stream]:
            info = self.info(name)
            etag, size = str(info["ETag"]), int(info["size"])
            start = start if validator == etag and start <= size else 0
            try:
                # Reads carry If-Match, so that an object that is replaced meanwhile is an error and not a mixture.
                with self._files.open(path, "rb", block_size=_BLOCK, cache_type="readahead") as file:
                    file.seek(start)
                    yield Stream(start, etag, size, iter(lambda: file.read(_BLOCK), b""))
            except s3fs.utils.FileExpired:
                reason = "it was replaced meanwhile"
            except (BotoCoreError, ClientError, ConnectionError, TimeoutError) as error:
                reason = type(error).__name__
            else:
                return
            raise InterruptedTransferError(reason)

        return open_at

    def _asked(self, call: Callable[[], Any]) -> Any:
        """What a request brings, or its error in our words."""
        try:
            return call()
        except PermissionError:
            how = "without credentials" if self.anonymous else "with the credentials that the environment gives"
            failure = PackageError(
                f"{self.url} may not be read {how}.",
                "Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, to ones that may"
                + ("." if self.anonymous else "; for a public bucket set FSSPEC_S3='{\"anon\": true}'."),
            )
        except FileNotFoundError:
            failure = PackageError(
                f"There is nothing at {self.url}.", f"Look with: aws s3 ls {self.url.rpartition('/')[0]}/"
            )
        except (BotoCoreError, OSError) as error:
            failure = PackageError(
                f"{self.url} cannot be reached ({type(error).__name__}).",
                "Check the network, the region and AWS_ENDPOINT_URL.",
            )
        raise failure


def expected(info: Mapping[str, Any], begins: bytes = b"") -> Expected:
    """What an object must be: its size, and the MD5 that its ETag is where it is one."""
    etag = str(info.get("ETag", "")).strip('"')
    plain = info.get("ServerSideEncryption") in _PLAIN and not info.get("SSEKMSKeyId")
    return Expected(int(info["size"]), md5=etag if plain and _MD5.fullmatch(etag) else "", begins=begins)


def fetch_folder(
    bucket: Bucket, shelf: Shelf, *, data: bool, limit: int, on_progress: Callable[[Progress], None] | None
) -> Fetched:
    """Fetch the model that lies directly in a bucket's folder.

    Raises
    ------
    PackageError
        If there is none, it may not be read, or the network or the disk fails.
    """
    name = "all" if data else "lean"
    if offline():
        return shelf.without_asking(name, bucket.url)
    entries = bucket.list()
    names = sorted(found for found, entry in entries.items() if entry["type"] == "file")
    if not holds_model(names):
        raise _elsewhere(bucket, entries)
    wanted = needed(names, data=data, place=bucket.url)
    infos = {found: bucket.info(found) for found in wanted}
    version = f"{digest({found: [info['ETag'], info['size']] for found, info in infos.items()})}-{name}"
    kept = shelf.load(version)
    if kept is None:
        work = shelf.work(version)
        room_for(work, sum(int(info["size"]) for info in infos.values()))
        files = {}
        for found, info in infos.items():
            try:
                came = download(
                    bucket.opener(found), work / found, expected(info), limit=limit, on_progress=on_progress
                )
            except RefusedTransferError as error:
                raise PackageError(f"{bucket.url}/{found} is refused ({error}).", "Repeat the command.") from None
            files[found] = {"size": came.size, "sha256": came.sha256, "etag": str(info["ETag"]).strip('"')}
        dates = [str(info["LastModified"]) for info in infos.values() if info.get("LastModified")]
        told = {"kind": "s3", "anonymous": bucket.anonymous, "last_modified": max(dates, default=""), "files": files}
        kept = shelf.keep(version, told)
    shelf.remember(name, version)
    return kept


def _elsewhere(bucket: Bucket, entries: Mapping[str, Mapping[str, Any]]) -> PackageError:
    """The error for a folder without a model, which names some of the folders in it."""
    inner = [found for found, entry in entries.items() if entry["type"] == "directory"]
    if not inner:
        return no_model(bucket.url, [])
    listed = ", ".join(ascii(found[:80])[1:-1] for found in inner[:8])
    return PackageError(
        f"{bucket.url} holds no model, but the folders {listed}.",
        f"Name the one that has a model.pt, e.g. {bucket.url.rstrip('/')}/{inner[0]}/",
    )
