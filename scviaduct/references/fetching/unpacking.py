"""Unpacking a stranger's zip archive: everything it says is checked before a byte is written."""

from __future__ import annotations

import re
import secrets
import shutil
import stat
import struct
import unicodedata
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from scviaduct.errors import PackageError
from scviaduct.references.fetching.cached import model_folders, needed, no_model, room_for

if TYPE_CHECKING:
    from pathlib import Path
    from zipfile import ZipInfo

_AGAIN = "Zip the model's folder again, with an ordinary zip program, or ask its publisher to."
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
SIGNATURE = b"PK\x03\x04"
"""How an archive begins."""
_END = b"PK\x05\x06"
_END64 = b"PK\x06\x06"
_END_SIZE, _LOCATOR_SIZE, _COMMENT = 22, 20, 65535
_ENTRY = 46
_CHUNK = 1 << 20
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".7z")
_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What an archive may be.

    Attributes
    ----------
    members
        Most files and folders.
    total
        Most bytes that come out.
    ratio
        Most bytes out of one, where more than ``small`` come out. Weights and counts shrink to a half or a tenth.
    small
        See ``ratio``.
    """

    members: int = 10_000
    total: int = 64 << 30
    ratio: int = 100
    small: int = 64 << 20


def unpack(
    archive: Path, out: Path, *, place: str, choose: str = "", data: bool = True, limits: Limits | None = None
) -> Path:
    """Unpack the one model that an archive holds.

    Parameters
    ----------
    archive
        The file.
    out
        Folder to make; the model's files come directly into it. Nothing is left of it after an error.
    place
        What the archive is called in messages.
    choose
        Folder inside the archive that holds the model; empty if there is only one.
    data
        Whether to unpack the training data.
    limits
        What it may be.

    Raises
    ------
    PackageError
        If it is no zip archive, a member's path leads out of its folder, is absolute or ambiguous, a member is no
        regular file, encrypted, damaged, given twice or far too large, or there is no model or more than one.
    """
    limits = limits or Limits()
    members = _members(archive, place, limits)
    folder = _model_folder({str(path) for path in members}, place, choose)
    there = {path.name: info for path, info in members.items() if path.parent == folder}
    chosen = {name: there[name] for name in needed(there, data=data, place=place)}
    room_for(out.parent, sum(info.file_size for info in chosen.values()))
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        _extract(archive, chosen, temporary, place)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _refused(place: str, problem: str) -> PackageError:
    return PackageError(f"The archive {place} is refused: {problem}.", _AGAIN)


def _members(archive: Path, place: str, limits: Limits) -> dict[PurePosixPath, ZipInfo]:
    """Regular files by their path, each checked."""
    _check_directory(archive, place, limits)
    try:
        with zipfile.ZipFile(archive) as opened:
            infos = opened.infolist()
            start = opened.start_dir
    # zipfile parses by hand: a broken directory ends in any of these.
    except (zipfile.BadZipFile, NotImplementedError, ValueError, LookupError, struct.error, OverflowError) as error:
        raise _refused(place, f"it is damaged, or no zip archive ({error})") from error
    if len(infos) > limits.members:
        raise _refused(place, f"it has {len(infos):,} members, more than {limits.members:,}")
    _check_sizes(infos, archive.stat().st_size, start, place, limits)
    files: dict[PurePosixPath, ZipInfo] = {}
    seen: dict[str, str] = {}
    for info in infos:
        path = _checked_path(info, place)
        # One name on a Mac or on Windows may be two here.
        key = unicodedata.normalize("NFC", str(path)).casefold()
        if key in seen:
            raise _refused(place, f"{_shown(info.filename)} is there twice")
        seen[key] = info.filename
        if not info.is_dir():
            files[path] = info
    folders = {str(parent) for path in files for parent in path.parents}
    both = next((path for path in files if str(path) in folders), None)
    if both is not None:
        raise _refused(place, f"{_shown(str(both))} is a file and a folder")
    return files


def _check_directory(archive: Path, place: str, limits: Limits) -> None:
    """The size of the list of members, before :mod:`zipfile` makes an object of each."""
    size = archive.stat().st_size
    with archive.open("rb") as file:
        if file.read(4) != SIGNATURE:
            raise _refused(place, "it is no zip archive (it does not begin with one's signature)")
        tail_start = max(0, size - _END_SIZE - _COMMENT - _LOCATOR_SIZE)
        file.seek(tail_start)
        tail = file.read()
        at = tail.rfind(_END)
        if at < 0 or at + _END_SIZE > len(tail):
            raise _refused(place, "it is cut off (its list of members is missing)")
        length = struct.unpack_from("<L", tail, at + 12)[0]
        if length == 0xFFFFFFFF and at >= _LOCATOR_SIZE:
            file.seek(struct.unpack_from("<Q", tail, at - _LOCATOR_SIZE + 8)[0])
            end = file.read(56)
            if len(end) < 56 or not end.startswith(_END64):
                raise _refused(place, "its list of members is damaged")
            length = struct.unpack_from("<Q", end, 40)[0]
    if length > limits.members * (_ENTRY + 1024):
        raise _refused(place, f"its list of members has {length:,} bytes, too many for {limits.members:,} members")


def _check_sizes(infos: list[ZipInfo], size: int, start: int, place: str, limits: Limits) -> None:
    total = sum(info.file_size for info in infos)
    if total > limits.total:
        raise _refused(place, f"it would unpack to {total:,} bytes, more than {limits.total:,}")
    packed = sum(info.compress_size for info in infos)
    ends = sorted((info.header_offset, info.header_offset + info.compress_size) for info in infos)
    if packed > size or any(end > after for (_, end), (after, _) in zip(ends, [*ends[1:], (start, 0)], strict=True)):
        raise _refused(place, "its members overlap")
    for name, packed_size, unpacked in [
        *((info.filename, info.compress_size, info.file_size) for info in infos),
        ("it", size, total),
    ]:
        if unpacked > limits.small and unpacked > limits.ratio * packed_size:
            raise _refused(place, f"{_shown(name)} would grow from {packed_size:,} to {unpacked:,} bytes")


def _checked_path(info: ZipInfo, place: str) -> PurePosixPath:
    # zipfile cuts a name at its first NUL; orig_filename is what the archive holds.
    name = info.orig_filename
    shown = _shown(name)
    parts = name.removesuffix("/").split("/")
    if name.startswith("/") or re.match("[A-Za-z]:", name):
        raise _refused(place, f"{shown} is an absolute path")
    if ".." in parts:
        raise _refused(place, f"{shown} leads out of the folder")
    if "\\" in name or not name.isprintable() or any(part in ("", ".") or len(part.encode()) > 255 for part in parts):
        raise _refused(place, f"{shown} is no plain path")
    mode = stat.S_IFMT(info.external_attr >> 16)
    if mode not in (0, stat.S_IFDIR if info.is_dir() else stat.S_IFREG):
        raise _refused(place, f"{shown} is {_KINDS.get(mode, 'neither a file nor a folder')}")
    if info.is_dir() and info.file_size:
        raise _refused(place, f"{shown} is a folder with content")
    if info.flag_bits & 0x2041:  # encrypted, strongly encrypted, masked headers
        raise _refused(place, f"{shown} is encrypted")
    if info.compress_type not in _METHODS:
        raise _refused(place, f"{shown} is compressed by method {info.compress_type}, and only 0 and 8 are read")
    return PurePosixPath(name)


def _shown(name: str) -> str:
    """A stranger's name, for a message: without control characters, and not endless."""
    return ascii(name[:80])


def _model_folder(names: set[str], place: str, choose: str) -> PurePosixPath:
    folders = [folder or "." for folder in model_folders(names) if "__MACOSX" not in folder]
    if choose:
        wanted = str(PurePosixPath(choose.strip("/")))
        if wanted in folders:
            return PurePosixPath(wanted)
        raise no_model(place, folders, choose)
    if len(folders) != 1:
        nested = next((name for name in sorted(names) if name.lower().endswith(_ARCHIVES)), "")
        if nested and not folders:
            raise PackageError(
                f"The archive {place} holds no model, but another archive {_shown(nested)}.",
                "Unpack the outer one and name the inner one.",
            )
        raise no_model(place, folders)
    return PurePosixPath(folders[0])


def _extract(archive: Path, chosen: dict[str, ZipInfo], out: Path, place: str) -> None:
    with zipfile.ZipFile(archive) as opened:
        for name, info in chosen.items():
            written = 0
            try:
                with opened.open(info) as source, (out / name).open("xb") as file:
                    while chunk := source.read(_CHUNK):
                        written += len(chunk)
                        file.write(chunk)
            except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, struct.error, RuntimeError) as error:
                raise _refused(place, f"{_shown(info.filename)} is damaged ({error})") from error
            if written != info.file_size:
                raise _refused(place, f"{_shown(info.filename)} has {written:,} bytes and claims {info.file_size:,}")
