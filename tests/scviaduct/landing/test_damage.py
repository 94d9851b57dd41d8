"""What is cut, swapped, changed or lost is an error that names the file and the remedy; it is never read as zeros."""

from __future__ import annotations

import json
import shutil

import pytest

from scviaduct.errors import DataError, InputError, SourceError
from scviaduct.landing import Landing
from scviaduct.landing import cells as landing_cells
from scviaduct.landing.cells import read_cells
from scviaduct.landing.pruning import prune
from scviaduct.sources import open_source


@pytest.fixture
def landed(land, symphony, tmp_path):
    """A landing of three pieces; its folder, and the folders of their counts."""
    landing, _ = land(symphony, tmp_path / "landing", 500)
    return landing, [landing.counts_folder(piece.counts) for piece in landing.manifest().pieces]


def read_first(landing):
    with open_source(str(landing.path)) as source:
        return source.read(source.scan(500).shards[0])


def flip(path, at):
    held = bytearray(path.read_bytes())
    held[at] ^= 1
    path.write_bytes(bytes(held))


@pytest.mark.parametrize("array", ["indptr", "steps", "data"])
@pytest.mark.parametrize(
    "damage",
    {
        "lost": lambda path, _: path.unlink(),
        "cut": lambda path, _: path.write_bytes(path.read_bytes()[:-40]),
        "emptied": lambda path, _: path.write_bytes(b""),
        "swapped": lambda path, other: shutil.copy(other, path),
        "index": lambda path, _: flip(path, -10),
        "chunk": lambda path, _: flip(path, 20),
    }.items(),
    ids=lambda item: item[0],
)
def test_counts(array, damage, landed):
    landing, folders = landed
    damage[1](folders[0] / array / "c" / "0", folders[1] / array / "c" / "0")
    with pytest.raises(DataError, match=rf"pieces/.*{folders[0].name}.*scviaduct land SOURCE --out {landing.path}"):
        read_first(landing)


def test_metadata_of_counts(landed):
    landing, folders = landed
    file = folders[0] / "data" / "zarr.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps({**told, "fill_value": 3}))
    with pytest.raises(DataError, match="does not hold what was landed"):
        read_first(landing)
    shutil.rmtree(folders[0])
    with pytest.raises(DataError, match="is gone"):
        read_first(landing)


def test_cells(landed):
    landing, _ = landed
    one, other = landing.manifest().pieces[:2]
    file = landing.obs_file(one.obs)
    assert len(read_cells(file, one.obs_digest, ()).rows) == 500
    shutil.copy(landing.obs_file(other.obs), file)
    with open_source(str(landing.path)) as source, pytest.raises(SourceError, match=r"obs/.*does not hold what was"):
        source.scan(500)
    file.unlink()
    with open_source(str(landing.path)) as source, pytest.raises(SourceError, match=r"obs/.*is gone.*Delete .*obs/"):
        source.scan(500)


def test_genes(landed, land, symphony):
    landing, _ = landed
    file = landing.genes_file(landing.manifest().parts[0].genes)
    flip(file, len(file.read_bytes()) // 3)
    remedy = rf"Delete {file} and land again"
    with open_source(str(landing.path)) as source, pytest.raises(SourceError, match=remedy):
        source.genes()
    file.write_bytes(b"x")
    with open_source(str(landing.path)) as source, pytest.raises(SourceError, match=remedy):
        source.genes()


def test_landing_again_mends_what_was_taken_away(landed, land, parity, symphony):
    landing, folders = landed
    shutil.rmtree(folders[1])
    assert land(symphony, landing.path, 500)[1] == 1
    parity(symphony, landing.path, 500)
    landing.obs_file(landing.manifest().pieces[2].obs).unlink()
    landing.genes_file(landing.manifest().parts[0].genes).unlink()
    assert land(symphony, landing.path, 500)[1] == 0
    parity(symphony, landing.path, 500)


def test_cells_that_are_written_anew_have_the_digest_of_what_was_written(landed, land, parity, symphony, monkeypatch):
    landing, _ = landed
    landing.obs_file(landing.manifest().pieces[0].obs).unlink()
    write = landing_cells.write_parquet

    def by_another_version(table, file):
        write(table, file)
        flip(file, file.read_bytes().rindex(b"parquet-cpp-arrow version ") + 26)

    monkeypatch.setattr(landing_cells, "write_parquet", by_another_version)
    for _ in range(2):
        assert land(symphony, landing.path, 500)[1] == 0
        parity(symphony, landing.path, 500)


def test_a_folder_that_was_half_removed_is_replaced(landed, land, parity, symphony):
    landing, folders = landed
    (folders[0] / "piece.json").unlink()
    assert land(symphony, landing.path, 500)[1] == 1
    parity(symphony, landing.path, 500)


def test_pruning_that_was_interrupted_leaves_nothing_that_is_taken_for_a_piece(landed, land, symphony, monkeypatch):
    landing, folders = landed
    land(symphony, landing.path, 600)  # names none of the pieces that were there

    def interrupted(folder):
        (folder / "data" / "c" / "0").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("scviaduct.landing.folder.shutil.rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prune(landing)
    assert sum(folder.exists() for folder in folders) == len(folders) - 1
    assert prune(landing).removed > 0
    assert not list(landing.path.glob("*/*/.*"))


def test_a_folder_of_something_else_is_refused(tmp_path, symphony):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("It was a dark night.")
    with pytest.raises(InputError, match=r"chapter1\.tex.*new or empty folder"):
        Landing.at(tmp_path / "thesis")
    with pytest.raises(InputError, match="is a file"):
        Landing.at(symphony)


def test_one_process_at_a_time(tmp_path):
    landing = Landing.at(tmp_path / "landing")
    with landing.writing(), pytest.raises(InputError, match="Another process"), landing.writing():
        pass
    with landing.writing():
        pass
