"""The version of a file is its content; the cache must never say otherwise."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from scviaduct.errors import DataError, SourceChangedError, SourceError
from scviaduct.sources import close_shards, content, open_shard, open_source
from scviaduct.sources.content import Place, cache_file, contents


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A file of ten minutes ago, and a cache of its own."""
    monkeypatch.setenv("SCVIADUCT_HOME", str(tmp_path / "home"))
    path = tmp_path / "a.h5ad"
    path.write_bytes(b"content")
    age(path)
    return Place.of(f"file://{path}")


def age(path, seconds=600):
    then = time.time_ns() - seconds * 1_000_000_000
    os.utime(path, ns=(then, then))


@pytest.fixture
def hashed(monkeypatch):
    """Paths whose content was read."""
    read = []
    digest = Place._digest
    monkeypatch.setattr(Place, "_digest", lambda self, path: read.append(path) or digest(self, path))
    return read


def test_content_is_read_once_while_size_and_time_stand(place, hashed):
    first = contents([place])
    assert contents([place]) == first
    assert hashed == [place.path]
    assert json.loads(cache_file().read_text())[place.url][1] == first[0].version


def test_changed_content_is_read_again(place, hashed):
    (before,) = contents([place])
    with Path(place.path).open("wb") as file:
        file.write(b"CONTENT")
    age(place.path, 300)
    (after,) = contents([place])
    assert before.version != after.version
    assert before.stamp != after.stamp


def test_file_of_just_now_is_not_remembered(place, hashed):
    """A second write within the clock's grain could leave size and time as they are."""
    age(place.path, 0)
    contents([place])
    contents([place])
    assert len(hashed) == 2


@pytest.mark.parametrize("damage", ["", "{", "[1]", "\x00"])
def test_damaged_cache_is_replaced(place, damage):
    cache_file().parent.mkdir(parents=True)
    cache_file().write_text(damage)
    (found,) = contents([place])
    assert json.loads(cache_file().read_text())[place.url][1] == found.version


def test_what_was_read_before_an_interruption_is_kept(place, tmp_path, monkeypatch):
    second = tmp_path / "b.h5ad"
    second.write_bytes(b"b")
    age(second)
    digest = Place._digest

    def interrupted(self, path):
        if path.endswith("b.h5ad"):
            raise KeyboardInterrupt
        return digest(self, path)

    monkeypatch.setattr(Place, "_digest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        contents([place, Place.of(f"file://{second}")])
    assert list(json.loads(cache_file().read_text())) == [place.url]


def test_folder_is_the_paths_and_contents_of_its_files(tmp_path, monkeypatch):
    monkeypatch.setenv("SCVIADUCT_HOME", str(tmp_path / "home"))
    versions = []
    for name, inner in (("one", "x"), ("two", "x"), ("three", "y")):
        (tmp_path / name).mkdir()
        (tmp_path / name / inner).write_text("same")
        versions += [found.version for found in contents([Place.of(f"file://{tmp_path / name}")])]
    assert versions[0] == versions[1] != versions[2]


def test_default_home_is_the_users_data_folder(monkeypatch):
    monkeypatch.delenv("SCVIADUCT_HOME")
    assert content.cache_file().parts[-3:] == ("scviaduct", "cache", "digests.json")


@pytest.mark.parametrize("spoilt", ["home is a file", "cache is a folder", "home is read-only", "no home"])
def test_cache_that_cannot_be_used_is_done_without(place, tmp_path, monkeypatch, spoilt):
    if spoilt == "home is a file":
        (tmp_path / "home").write_text("")
    elif spoilt == "cache is a folder":
        cache_file().mkdir(parents=True)
    elif spoilt == "no home":

        def lacking(*_args):
            raise RuntimeError("could not determine the home directory")

        monkeypatch.delenv("SCVIADUCT_HOME")
        monkeypatch.setattr(content.platformdirs, "user_data_path", lacking)
    else:

        def refuse(*_args, **_kwargs):
            raise PermissionError("read-only")

        monkeypatch.setattr(Path, "mkdir", refuse)
    assert contents([place])[0].version == place.digest()


def test_a_process_remembers_without_the_cache(place, hashed, tmp_path):
    (tmp_path / "home").write_text("")
    contents([place])
    contents([place])
    assert hashed == [place.path]


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files with ranges, with the validators that the server has."""

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        body = path.read_bytes()
        first, last = 0, len(body) - 1
        if "Range" in self.headers:
            first, last = (int(edge) for edge in self.headers["Range"].removeprefix("bytes=").split("-"))
        self.answer(body, first, min(last, len(body) - 1), 206 if "Range" in self.headers else 200)
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body[first : last + 1])

    def do_HEAD(self):
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        body = path.read_bytes()
        self.answer(body, 0, len(body) - 1, 200)

    def answer(self, body, first, last, status):
        self.send_response(status)
        self.send_header("Content-Length", str(last - first + 1))
        self.send_header("Accept-Ranges", "bytes")
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(body)}")
        if "ETag" in self.server.validators:
            self.send_header("ETag", f'"{hash(body)}"')
        if "Last-Modified" in self.server.validators:
            self.send_header("Last-Modified", self.date_time_string(self.server.modified))
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    """A server of the folder ``www``."""
    (tmp_path / "www").mkdir()
    handler = functools.partial(Handler, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.validators, server.modified = ("ETag",), time.time() - 600
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        yield server
        server.shutdown()


@pytest.mark.parametrize("validators", [("ETag",), ("Last-Modified",), ("ETag", "Last-Modified"), ()])
def test_file_behind_http_is_hashed_once(server, validators, make_adata, tmp_path, hashed, monkeypatch):
    monkeypatch.setenv("SCVIADUCT_HOME", str(tmp_path / "home"))
    server.validators = validators
    make_adata(20).write_h5ad(tmp_path / "www" / "a.h5ad")
    with open_source(f"{server.url}/a.h5ad") as source:
        shards = source.scan(5).shards
    for shard in shards:
        assert open_shard(shard).read(shard).n_cells == 5
        close_shards()
    assert len(hashed) == 1
    # Another process of this home compares the validators, where there are any.
    content._SEEN.clear()
    open_shard(shards[0])
    close_shards()
    assert len(hashed) == (1 if validators else 2)


@pytest.mark.parametrize("validator", ["ETag", "Last-Modified"])
def test_file_behind_http_that_changed(server, validator, make_adata, tmp_path, monkeypatch):
    monkeypatch.setenv("SCVIADUCT_HOME", str(tmp_path / "home"))
    server.validators = (validator,)
    make_adata(20).write_h5ad(tmp_path / "www" / "a.h5ad")
    with open_source(f"{server.url}/a.h5ad") as source:
        (shard,) = source.scan(50).shards
        assert source.is_current()
        make_adata(20, seed=1).write_h5ad(tmp_path / "www" / "a.h5ad")
        server.modified += 100
        assert not source.is_current()
    with pytest.raises(SourceChangedError, match=f"planned as version {shard.version}"):
        open_shard(shard)
    (tmp_path / "www" / "a.h5ad").unlink()
    with pytest.raises(SourceChangedError, match="was planned and is gone"):
        open_shard(shard)


def test_server_that_does_not_answer_is_no_deleted_file(server, make_adata, tmp_path, monkeypatch):
    make_adata(20).write_h5ad(tmp_path / "www" / "a.h5ad")
    with open_source(f"{server.url}/a.h5ad") as source:
        (shard,) = source.scan(50).shards
    moved = replace(shard, uri=shard.uri.replace(server.url, "http://127.0.0.1:9"))
    with pytest.raises(SourceError, match=r"cannot be reached \(ClientConnectorError.*Check the network") as error:
        open_shard(moved)
    assert not isinstance(error.value, DataError)
