"""Fetching from folders, archives, web servers and S3."""

from __future__ import annotations

import hashlib
import json
import os

import pytest

from scviaduct.errors import PackageError
from scviaduct.references.fetching.fetch import fetch
from tests.support.s3_server import zipped

pytest_plugins = ["tests.support.fixtures"]

MODEL = os.urandom(3 << 20)
FILES = {"heart/model.pt": MODEL, "heart/README.md": b"# Heart", "heart/adata.h5ad": b"data" * 1000}


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_local_folder_is_returned_as_it_is(tmp_path, cache):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.pt").write_bytes(MODEL)
    for uri in (folder, str(folder), f"file://{folder}"):
        got = fetch(uri, cache=cache)
        assert got.folder == folder
        assert got.provenance == {"uri": str(folder), "kind": "folder"}
    assert not cache.exists()


def test_local_places_without_a_model(tmp_path, cache):
    (tmp_path / "sub").mkdir()
    with pytest.raises(PackageError, match=r"holds no model: there is no model\.pt"):
        fetch(tmp_path, cache=cache)
    (tmp_path / "sub" / "model.pt").write_bytes(MODEL)
    with pytest.raises(PackageError, match=f"its folders sub do. Name {tmp_path / 'sub'}"):
        fetch(tmp_path, cache=cache)
    with pytest.raises(PackageError, match=r"no folder or file 'lab/heart'. For the hub, write hf://lab/heart"):
        fetch("lab/heart", cache=cache)


def test_a_local_archive(tmp_path, cache):
    path = tmp_path / "heart.zip"
    path.write_bytes(zipped(FILES))
    got = fetch(path, cache=cache)
    assert names(got.folder) == ["README.md", "adata.h5ad", "model.pt"]
    assert got.provenance["kind"] == "zip"
    assert got.provenance["archive"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert got.provenance["files"]["model.pt"] == {"size": len(MODEL), "sha256": hashlib.sha256(MODEL).hexdigest()}
    assert fetch(path, cache=cache) == got
    two = tmp_path / "two.zip"
    two.write_bytes(zipped({"a/model.pt": b"a", "b/model.pt": b"b"}))
    assert (fetch(f"{two}#b", cache=cache).folder / "model.pt").read_bytes() == b"b"
    assert (fetch(f"{two}#a", cache=cache).folder / "model.pt").read_bytes() == b"a"


PREFIXED = {"lung_model.pt": MODEL, "lung_adata.h5ad": b"data", "README.md": b"# Lung", "notes.txt": b"x"}
OLD = {f"lung_{name}": b"x" for name in ("model_params.pt", "attr.pkl", "var_names.csv")}


def laid(folder, files):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_models_saved_with_a_prefix(tmp_path, cache):
    folder = laid(tmp_path / "lung", PREFIXED)
    assert fetch(folder, cache=cache).folder == folder
    assert fetch(laid(tmp_path / "old", OLD), cache=cache).folder == tmp_path / "old"
    archive = tmp_path / "lung.zip"
    archive.write_bytes(zipped({f"lung/{name}": content for name, content in PREFIXED.items()}))
    assert names(fetch(archive, cache=cache).folder) == ["README.md", "lung_adata.h5ad", "lung_model.pt"]
    assert names(fetch(archive, cache=cache, data=False).folder) == ["README.md", "lung_model.pt"]
    archive.write_bytes(zipped({**OLD, "attr.pkl": b"another's", ".lung_model.pt": b"hidden"}))
    assert names(fetch(archive, cache=cache).folder) == sorted(OLD)
    with pytest.raises(PackageError, match=r"holds no model, but its folders lung, old do"):
        fetch(tmp_path, cache=cache)


def test_several_models_in_one_folder_are_named(tmp_path, cache):
    two = {"lung_model.pt": MODEL, "heart_model.pt": MODEL}
    told = r"holds several models in one folder: heart_model\.pt, lung_model\.pt\. Give each a folder of its own"
    with pytest.raises(PackageError, match=told):
        fetch(laid(tmp_path / "two", two), cache=cache)
    archive = tmp_path / "two.zip"
    archive.write_bytes(zipped(two))
    with pytest.raises(PackageError, match=told):
        fetch(archive, cache=cache)
    archive.write_bytes(zipped({**two, "model.pt": b"the one"}))
    assert names(fetch(archive, cache=cache).folder) == ["model.pt"]


def test_a_manifest_of_another_program_hides_no_model(tmp_path, cache):
    foreign = {"manifest.json": b'{"name": "web app"}', "index.html": b"<p>"}
    with pytest.raises(PackageError, match="holds no model"):
        fetch(laid(tmp_path / "app", foreign), cache=cache)
    archive = tmp_path / "both.zip"
    archive.write_bytes(zipped({**foreign, "model.pt": MODEL, "app/manifest.json": b"{}"}))
    assert names(fetch(archive, cache=cache).folder) == ["model.pt"]


def test_an_archive_of_a_web_server_is_asked_for_once(hub, cache, monkeypatch):
    hub.served["files/heart.zip"] = content = zipped(FILES)
    uri = f"{hub.url}/served/files/heart.zip"
    got = fetch(uri, cache=cache)
    assert (got.folder / "model.pt").read_bytes() == MODEL
    told = got.provenance
    assert json.loads(json.dumps(told)) == told
    assert (told["uri"], told["kind"], told["archive"]["size"]) == (uri, "web", len(content))
    assert fetch(uri, cache=cache) == got
    assert [one.status for one in hub.requests] == [200, 304]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch(uri, cache=cache) == got
    assert len(hub.requests) == 2
    with pytest.raises(PackageError, match="was not fetched before"):
        fetch(uri + "?other=1", cache=cache)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    hub.served["files/heart.zip"] = zipped({"model.pt": b"new"})
    newer = fetch(uri, cache=cache)
    assert (newer.folder / "model.pt").read_bytes() == b"new"
    assert (got.folder / "model.pt").read_bytes() == MODEL  # who works with the older one keeps it


def interrupted(uri, cache, after):
    def stop(progress):
        if progress.received >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(uri, cache=cache, on_progress=stop)


def test_an_aborted_archive_goes_on_by_range(hub, cache):
    hub.served["heart.zip"] = zipped(FILES)
    uri = f"{hub.url}/served/heart.zip"
    interrupted(uri, cache, 1 << 20)
    hub.requests.clear()
    got = fetch(uri, cache=cache)
    assert (got.folder / "model.pt").read_bytes() == MODEL
    [asked] = hub.requests
    assert asked.status == 206
    assert asked.headers["range"] == "bytes=1048576-"
    assert asked.headers["if-range"].startswith('"')
    assert got.provenance["archive"]["sha256"] == hashlib.sha256(hub.served["heart.zip"]).hexdigest()


@pytest.mark.parametrize("careless", [False, True])
def test_an_archive_that_changed_meanwhile_is_not_patched_together(hub, cache, careless):
    hub.careless = careless
    hub.served["heart.zip"] = zipped(FILES)
    uri = f"{hub.url}/served/heart.zip"
    interrupted(uri, cache, 2 << 20)
    hub.served["heart.zip"] = zipped({"model.pt": MODEL[::-1]})
    assert (fetch(uri, cache=cache).folder / "model.pt").read_bytes() == MODEL[::-1]
    interrupted(uri + "?again", cache, 2 << 20)
    hub.served["heart.zip"] = zipped({"model.pt": b"short"})
    assert (fetch(uri + "?again", cache=cache).folder / "model.pt").read_bytes() == b"short"


@pytest.mark.parametrize(
    ("path", "problem", "remedy"),
    [
        ("served/nothing.zip", "There is nothing at", "in a browser"),
        ("served/page.zip", "archive.zip begins with '<html>Please', not with 'PK", "Check the address in a browser"),
    ],
)
def test_web_servers_that_have_no_model(hub, cache, path, problem, remedy):
    hub.served["page.zip"] = b"<html>Please log in</html>"
    with pytest.raises(PackageError) as failure:
        fetch(f"{hub.url}/{path}", cache=cache)
    assert problem in failure.value.problem
    assert remedy in failure.value.remedy
    assert not list(cache.rglob("archive.zip*"))


def test_web_refusals_and_bounds(hub, cache, monkeypatch):
    monkeypatch.setattr("scviaduct.references.fetching.download._WAIT", 0.01)
    hub.served["heart.zip"] = zipped(FILES)
    uri = f"{hub.url}/served/heart.zip"
    with pytest.raises(PackageError, match="more than the 1,000 bytes"):
        fetch(uri, cache=cache, limit=1000)
    hub.answer = 403
    with pytest.raises(PackageError, match="not open to everyone"):
        fetch(uri, cache=cache)
    hub.answer = 503
    with pytest.raises(PackageError, match="the server answered 503"):
        fetch(uri, cache=cache)
    with pytest.raises(PackageError, match=r"ConnectError.*Check the network"):
        fetch("http://127.0.0.1:9/heart.zip", cache=cache)


@pytest.mark.parametrize(
    "uri",
    [
        "https://me:secretword@host/x.zip",
        "https://secretword@host/x.zip",
        "https://host/x.zip?X-Amz-Signature=secretword",
        "s3://key:secretword@bucket/x/",
        "https://host/x.zip?token=secretword#a",
    ],
)
def test_credentials_in_the_address_are_refused(cache, uri):
    with pytest.raises(PackageError, match="credentials") as failure:
        fetch(uri, cache=cache)
    assert "secretword" not in str(failure.value) + repr(failure.value.__cause__) + repr(failure.value.__context__)


def test_the_page_of_a_repository_is_no_archive(cache):
    with pytest.raises(PackageError, match=r"Write hf://scvi-tools/heart"):
        fetch("https://huggingface.co/scvi-tools/heart", cache=cache)


def test_a_folder_of_a_bucket(s3, cache, monkeypatch):
    s3.put("atlas-one", {**FILES, "heart/notes.txt": b"x", "heart/old/model.pt": b"older"})
    got = fetch("s3://atlas-one/heart/", cache=cache)
    assert names(got.folder) == ["README.md", "adata.h5ad", "model.pt"]
    assert (got.folder / "model.pt").read_bytes() == MODEL
    told = got.provenance
    assert json.loads(json.dumps(told)) == told
    assert (told["uri"], told["kind"], told["anonymous"]) == ("s3://atlas-one/heart/", "s3", False)
    assert told["files"]["model.pt"]["sha256"] == hashlib.sha256(MODEL).hexdigest()
    assert fetch("s3://atlas-one/heart", cache=cache).folder == got.folder
    assert names(fetch("s3://atlas-one/heart", cache=cache, data=False).folder) == ["README.md", "model.pt"]
    s3.client.put_object(Bucket="atlas-one", Key="heart/model.pt", Body=b"replaced")
    assert (fetch("s3://atlas-one/heart/", cache=cache).folder / "model.pt").read_bytes() == b"replaced"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
    assert (fetch("s3://atlas-one/heart", cache=cache).folder / "model.pt").read_bytes() == b"replaced"


def test_a_public_bucket_without_credentials(s3, cache, monkeypatch, tmp_path):
    """As CZI's bucket of Census models: a folder that holds a model.pt alone."""
    path = "models/scvi/2025-11-08/homo_sapiens"
    s3.put("contrib-public", {f"{path}/model.pt": MODEL}, public=True)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    got = fetch(f"s3://contrib-public/{path}", cache=cache)
    assert names(got.folder) == ["model.pt"]
    assert got.provenance["anonymous"] is True


def test_an_archive_in_a_bucket_is_resumed(s3, cache):
    content = zipped({"model.pt": os.urandom(20 << 20)})
    s3.put("atlas-zip", {"x/heart.zip": content})
    interrupted("s3://atlas-zip/x/heart.zip", cache, 16 << 20)
    [part] = cache.rglob("archive.zip.part")
    assert part.stat().st_size == 16 << 20
    seen = []
    got = fetch("s3://atlas-zip/x/heart.zip", cache=cache, on_progress=seen.append)
    assert [one.received for one in seen] == [len(content)]
    assert got.provenance["archive"]["sha256"] == hashlib.sha256(content).hexdigest()
    assert fetch("s3://atlas-zip/x/heart.zip", cache=cache, on_progress=seen.append) == got
    assert len(seen) == 1  # the same ETag: nothing came


def test_a_bucket_with_a_prefixed_model(s3, cache):
    s3.put("atlas-prefix", {f"lung/{name}": content for name, content in PREFIXED.items()})
    assert names(fetch("s3://atlas-prefix/lung", cache=cache, data=False).folder) == ["README.md", "lung_model.pt"]


def test_buckets_that_have_no_model(s3, cache, monkeypatch):
    s3.put("atlas-none", {"a/README.md": b"x", "b/heart/model.pt": MODEL})
    for uri, words in [
        ("s3://atlas-none/a/", "holds no model: there is no model.pt"),
        ("s3://atlas-none/b/", r"but the folders heart\. .*e\.g\. s3://atlas-none/b/heart/"),
        ("s3://atlas-none/c/", "There is nothing at s3://atlas-none/c/"),
        ("s3://atlas-none/c.zip", "There is nothing at"),
        ("s3://no-such-bucket/a/", "There is nothing at"),
        ("s3:///a/", "names no bucket"),
    ]:
        with pytest.raises(PackageError, match=words):
            fetch(uri, cache=cache)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(PackageError, match=r"cannot be reached .*AWS_ENDPOINT_URL"):
        fetch("s3://atlas-none/a/", cache=cache)
