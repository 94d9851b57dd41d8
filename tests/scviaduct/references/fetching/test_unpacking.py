"""Zip archives, each with one thing wrong."""

from __future__ import annotations

import io
import os
import stat
import struct
import zipfile

import pytest

from scviaduct.errors import PackageError
from scviaduct.references.fetching.unpacking import Limits, unpack

MODEL = os.urandom(2000)


def member(name: str, *, mode: int = 0, method: int = zipfile.ZIP_STORED, system: int = 3) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr, info.compress_type, info.create_system = mode << 16, method, system
    return info


def archive(*members: tuple[str | zipfile.ZipInfo, bytes], prefix: bytes = b"") -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as file:
        for info, content in members:
            file.writestr(info, content)
    return prefix + made.getvalue()


GOOD = ("model.pt", MODEL)


@pytest.fixture
def tried(tmp_path):
    """Unpacks bytes; whatever happens, nothing but the result lies beside the archive."""

    def unpacked(content: bytes, **options):
        box = tmp_path / "box"
        box.mkdir(exist_ok=True)
        (tmp_path / "a.zip").write_bytes(content)
        try:
            return unpack(tmp_path / "a.zip", box / "out", place="a.zip", **options)
        except PackageError:
            assert list(box.iterdir()) == []
            assert {path.name for path in tmp_path.iterdir()} == {"box", "a.zip"}
            raise

    return unpacked


@pytest.mark.parametrize("top", ["", "model/", "a/b/c/"])
def test_the_model_is_found_and_only_what_is_needed_comes(tried, top):
    rest = [(top + name, name.encode()) for name in ("README.md", "adata.h5ad", "extra.py", ".hidden", "sub/x.csv")]
    out = tried(archive((top + "model.pt", MODEL), *rest, ("__MACOSX/model/._model.pt", b"x")))
    assert {path.name for path in out.iterdir()} == {"model.pt", "README.md", "adata.h5ad"}
    assert (out / "model.pt").read_bytes() == MODEL


def test_without_data_the_data_stay_packed(tried):
    out = tried(archive(GOOD, ("adata.h5ad", b"data")), data=False)
    assert [path.name for path in out.iterdir()] == ["model.pt"]


def test_folders_and_permissions_are_ordinary(tried):
    script = member("m/model.pt", mode=stat.S_IFREG | 0o4777)
    out = tried(archive((member("m/", mode=stat.S_IFDIR | 0o755), b""), (script, MODEL)))
    assert stat.S_IMODE((out / "model.pt").stat().st_mode) & 0o7111 == 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../model.pt", "leads out of the folder"),
        ("a/../../model.pt", "leads out of the folder"),
        ("a/..", "leads out of the folder"),
        ("/etc/model.pt", "absolute path"),
        ("C:/model.pt", "absolute path"),
        ("c:model.pt", "absolute path"),
        ("..\\model.pt", "no plain path"),
        ("a\\model.pt", "no plain path"),
        ("a//model.pt", "no plain path"),
        ("./model.pt", "no plain path"),
        ("a\x1b[2J/model.pt", "no plain path"),
        ("a\u202egnp.model.pt", "no plain path"),
        ("a" * 300 + "/x", "no plain path"),
    ],
)
def test_paths_that_lead_elsewhere_are_refused(tried, name, words):
    with pytest.raises(PackageError, match=words) as failure:
        tried(archive(GOOD, (member(name), b"x")))
    assert failure.value.remedy.startswith("Zip the model's folder again")
    assert str(failure.value).isprintable()


def test_a_name_that_goes_on_behind_a_nul_is_refused(tried):
    content = archive(GOOD, ("evil.ptX../x", b"x")).replace(b"evil.ptX../x", b"evil.pt\0../x")
    with pytest.raises(PackageError, match="no plain path"):
        tried(content)


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        (stat.S_IFLNK | 0o777, "a link"),
        (stat.S_IFCHR | 0o666, "a device"),
        (stat.S_IFBLK | 0o666, "a device"),
        (stat.S_IFIFO | 0o666, "a pipe"),
        (stat.S_IFSOCK | 0o666, "a socket"),
        (0o170000, "neither a file nor a folder"),
        (stat.S_IFDIR | 0o755, "neither a file nor a folder"),
    ],
)
@pytest.mark.parametrize("system", [0, 3])
def test_links_and_devices_are_refused(tried, mode, words, system):
    with pytest.raises(PackageError, match=f"'adata.h5ad' is {words}"):
        tried(archive(GOOD, (member("adata.h5ad", mode=mode, system=system), b"/etc/passwd")))


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ("model.pt", "model.pt", "is there twice"),
        ("model.pt", "MODEL.PT", "is there twice"),
        ("m\u00e9/model.pt", "me\u0301/model.pt", "is there twice"),
        ("a/model.pt", "a", "is a file and a folder"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_refused(tried, first, second, words):
    with pytest.raises(PackageError, match=words):
        tried(archive((first, MODEL), (second, b"x")))


def test_encrypted_members_are_refused(tried):
    content = bytearray(archive((member("model.pt"), MODEL)))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.rindex(signature) + offset] |= 1
    with pytest.raises(PackageError, match=r"'model\.pt' is encrypted"):
        tried(bytes(content))


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_are_refused(tried, method):
    with pytest.raises(PackageError, match=f"compressed by method {method}"):
        tried(archive((member("model.pt", method=method), MODEL)))


def test_bombs_are_refused_before_anything_is_written(tried):
    zeros = bytes(1 << 20)
    with pytest.raises(PackageError, match=r"'adata\.h5ad' would grow from"):
        tried(archive(GOOD, ("adata.h5ad", zeros)), limits=Limits(small=1000))
    with pytest.raises(PackageError, match=r"'it' would grow|'f0' would grow"):
        tried(archive(GOOD, *((f"f{i}", bytes(900)) for i in range(500))), limits=Limits(small=1000, ratio=4))
    with pytest.raises(PackageError, match="more than 1,000,000"):
        tried(archive(GOOD, ("adata.h5ad", os.urandom(1 << 20))), limits=Limits(total=1_000_000))
    with pytest.raises(PackageError, match="has 21 members, more than 20"):
        tried(archive(GOOD, *((f"f{i}", b"") for i in range(20))), limits=Limits(members=20))
    with pytest.raises(PackageError, match="too many for 2 members"):
        tried(archive(GOOD, *((f"f{i}", b"") for i in range(60))), limits=Limits(members=2))


def test_a_real_bomb_of_the_default_limits(tried):
    with pytest.raises(PackageError, match="would grow from"):
        tried(archive(GOOD, ("adata.h5ad", bytes(65 << 20))))


def test_members_that_share_their_bytes_are_refused(tried):
    """One compressed block under many names is how a few kilobytes become petabytes."""
    content = bytearray(archive(GOOD, ("adata.h5ad", os.urandom(3000)), ("README.md", os.urandom(3000))))
    entries = [at for at in range(len(content)) if content[at : at + 4] == b"PK\x01\x02"]
    content[entries[2] + 42 : entries[2] + 46] = content[entries[1] + 42 : entries[1] + 46]
    with pytest.raises(PackageError, match=r"overlap|damaged"):
        tried(bytes(content))


def test_a_size_that_lies_is_noticed(tried):
    content = bytearray(archive((member("model.pt"), MODEL), (member("README.md"), b"y" * 500)))
    entry = content.index(b"PK\x01\x02")
    struct.pack_into("<L", content, entry + 24, 10)  # the directory claims ten bytes of two thousand
    with pytest.raises(PackageError, match="is damaged"):
        tried(bytes(content))


@pytest.mark.parametrize("at", [0.3, 0.6, 0.9, 0.999])
def test_cut_archives_are_refused(tried, at):
    content = archive(GOOD, ("adata.h5ad", os.urandom(5000)))
    with pytest.raises(PackageError, match=r"cut off|damaged"):
        tried(content[: int(len(content) * at)])


def test_a_changed_byte_is_noticed_and_leaves_nothing(tried):
    content = bytearray(archive(("README.md", b"# first"), GOOD))
    content[content.index(MODEL[:50]) + 60] ^= 1
    with pytest.raises(PackageError, match=r"'model\.pt' is damaged"):
        tried(bytes(content))


@pytest.mark.parametrize("content", [b"", b"<html>login</html>", b"\x1f\x8b" + bytes(100), b"PK\x05\x06" + bytes(18)])
def test_what_is_no_archive_is_refused(tried, content):
    with pytest.raises(PackageError, match="no zip archive"):
        tried(content)


def test_something_before_the_archive_is_refused(tried):
    with pytest.raises(PackageError, match="does not begin"):
        tried(archive(GOOD, prefix=b"#!/bin/sh\n"))


def test_several_models_are_named_and_one_is_chosen(tried):
    content = archive(("a/model.pt", b"a"), ("b/manifest.json", b"{}"), ("b/encoder.safetensors", b"e"), ("c/x", b""))
    with pytest.raises(PackageError, match=r"folders: a, b\. Name one: a\.zip#a"):
        tried(content)
    with pytest.raises(PackageError, match=r"no model in 'c', but in a, b\."):
        tried(content, choose="c")
    out = tried(content, choose="/b/")
    assert sorted(path.name for path in out.iterdir()) == ["encoder.safetensors", "manifest.json"]


def test_no_model_and_an_archive_in_an_archive(tried):
    with pytest.raises(PackageError, match=r"holds no model: there is no model\.pt"):
        tried(archive(("README.md", b"# hello")))
    with pytest.raises(PackageError, match=r"another archive 'inner\.zip'\. Unpack the outer"):
        tried(archive(("inner.zip", archive(GOOD))))


def test_a_large_archive_of_64_bits_is_read(tried):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file, file.open("model.pt", "w", force_zip64=True) as model:
        model.write(MODEL)
    assert (tried(made.getvalue()) / "model.pt").read_bytes() == MODEL


def test_a_full_disk_says_so(tried, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(PackageError, match="no space left"):
        tried(archive(GOOD))
