"""The version of a file is its content; the cache must never say otherwise."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from scviaduct.sources import content
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
