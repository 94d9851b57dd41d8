"""A store: its folder, its spaces, and what it keeps of every run."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest

from scviaduct.errors import InputError
from scviaduct.store import Store
from scviaduct.values import Settings
from tests.scviaduct.store.synthetic import DIGEST, SOURCE, Lab

# The folder


def test_a_store_is_made_and_opened(tmp_path, monkeypatch):
    made = Store.create(tmp_path / "a" / "b")
    assert made.path == tmp_path / "a" / "b"
    assert (made.spaces(), made.records(), made.runs()) == ([], [], [])
    for name in (made.path, str(made.path), f"file://{made.path}"):
        assert Store.open(name).path == Store.create(name).path == made.path
    monkeypatch.chdir(tmp_path)
    assert Store.open("a/b").path == made.path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Store.open("~/a/b").path == made.path


def folder_with(path, **files):
    path.mkdir()
    for name, text in files.items():
        (path / name.replace("_", ".")).write_text(text)
    return path


@pytest.mark.parametrize(
    ("files", "opening", "making"),
    [
        (None, "is not a store", None),
        ({}, "is not a store", None),
        ({"notes_txt": "mine"}, "is not a store", "holds something that is not a store"),
        ({"store_json": '{"format": 2}'}, "has format 2, this version reads 1", "has format 2, this version reads 1"),
    ],
    ids=["absent", "empty", "something else", "a newer format"],
)
def test_what_is_not_a_store_is_refused(tmp_path, files, opening, making):
    folder = tmp_path / "x" if files is None else folder_with(tmp_path / "x", **files)
    with pytest.raises(InputError, match=opening) as error:
        Store.open(folder)
    assert error.value.remedy
    if making is None:
        assert Store.create(folder).spaces() == []
    else:
        with pytest.raises(InputError, match=making):
            Store.create(folder)
        assert {path.name for path in folder.iterdir()} == {name.replace("_", ".") for name in files}


def test_a_file_is_not_a_store(tmp_path):
    (tmp_path / "x").write_text("cells")
    for way in (Store.open, Store.create):
        with pytest.raises(InputError, match="not a store"):
            way(tmp_path / "x")
    assert (tmp_path / "x").read_text() == "cells"


def test_a_store_below_a_file(tmp_path):
    (tmp_path / "x").write_text("cells")
    for below in ("z", "y/z"):
        with pytest.raises(InputError, match=r"x/.*' cannot be made \(Not a directory\)") as error:
            Store.create(tmp_path / "x" / below)
        assert "--store STORE" in error.value.remedy
        with pytest.raises(InputError, match="is not a store"):
            Store.open(tmp_path / "x" / below)
    assert (tmp_path / "x").read_text() == "cells"


@pytest.mark.parametrize("uri", ["s3://bucket/store", "gs://bucket/store", "https://host/store"])
def test_object_storage_is_refused(uri):
    for way in (Store.open, Store.create):
        with pytest.raises(InputError, match="on object storage") as error:
            way(uri)
        assert "a file system that every node shares" in error.value.remedy


@pytest.mark.parametrize("name", ["a%20b", "lung%2Fx", "a[1]", "a^b", "a|b", "a\\b"])
def test_a_folder_that_delta_rs_takes_for_another_is_refused(tmp_path, name):
    with pytest.raises(InputError, match="in its path"):
        Store.create(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a b", "ü", "a#c", "a?b", "90%", "{a}", "a+b&c=d'e"])
def test_a_folder_of_any_other_name_is_a_store(tmp_path, name):
    lab = Lab.make(tmp_path / name / "store")
    lab.put(range(5))
    assert (tmp_path / name / "store").is_dir()
    assert len(lab.stamps()) == 5


def test_a_store_of_which_the_maker_was_killed(tmp_path):
    folder_with(tmp_path / "x")
    (tmp_path / "x" / ".store.json.0a1b2c3d").write_text("{")
    assert Store.create(tmp_path / "x").spaces() == []


@pytest.mark.parametrize("moment", ["exists", "iterdir"])
def test_a_store_that_another_one_makes_meanwhile(tmp_path, monkeypatch, moment):
    """It comes to its end after this one looked for the marker, and before or while it looks at the rest."""
    folder = folder_with(tmp_path / "x")
    original, done = getattr(type(folder), moment), []

    def look(path):
        found = original(path)
        if path.parent == folder or path == folder:
            found = found if moment == "exists" else list(found)
            if not done:
                done.append(1)
                (folder / "store.json").write_text('{"format": 1}')
                (folder / "spaces").mkdir()
        return found

    monkeypatch.setattr(type(folder), moment, look)
    assert Store.create(folder).spaces() == []
    assert done


def test_makers_at_once_share_one(tmp_path):
    start = threading.Barrier(6)

    def make(number):
        start.wait()
        lab = Lab.make(tmp_path / "store")
        return lab.put([number], run=f"{number}")

    with ThreadPoolExecutor(6) as pool:
        versions = list(pool.map(make, range(6)))
    assert sorted(versions) == [1, 2, 3, 4, 5, 6]
    store = Store.open(tmp_path / "store")
    assert Lab(store, store.space()).stamps() == {("d", f"c{row}"): 0 for row in range(6)}


# Spaces


@pytest.fixture
def three(tmp_path):
    """A store with spaces of pbmc (two packages of that name) and of hlca."""
    store = Store.create(tmp_path / "three")
    for reference, digest in (("pbmc", "a" * 32), ("pbmc", "ab" * 16), ("hlca", "c" * 32)):
        store.create_space(reference, digest, 4, ("type 0",))
    return store


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("hlca", "hlca-cccccccccccc"),
        ("c" * 32, "hlca-cccccccccccc"),
        ("ccc", "hlca-cccccccccccc"),
        ("pbmc-aaaaaaaaaaaa", "pbmc-aaaaaaaaaaaa"),
        ("aba", "pbmc-abababababab"),
    ],
)
def test_a_space_goes_by_name_or_digest(three, asked, found):
    assert three.space(asked).name == found


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (None, "several spaces that fit: hlca-cccccccccccc, pbmc-aaaaaaaaaaaa, pbmc-abababababab"),
        ("pbmc", "several spaces that fit: hlca-cccccccccccc, pbmc-aaaaaaaaaaaa, pbmc-abababababab"),
        ("a", "several spaces"),
        ("hcla", r"no space of reference 'hcla' \(do you mean 'hlca'\?\)"),
        ("xyz", "no space of reference 'xyz'"),
    ],
)
def test_a_space_that_is_not_clear(three, asked, told):
    with pytest.raises(InputError, match=told) as error:
        three.space(asked)
    assert "Name one" in error.value.remedy or "There are: hlca-cccccccccccc" in error.value.remedy


def test_the_only_space_need_not_be_named(lab, tmp_path):
    assert lab.store.space().name == "pbmc-0123456789ab"
    with pytest.raises(InputError, match="has no space yet"):
        Store.create(tmp_path / "empty").space()


def test_a_space_remembers_its_reference(lab):
    again = lab.store.create_space("pbmc", DIGEST, 4, ("other",))
    assert (again.reference, again.digest, again.n_latent, again.labels) == ("pbmc", DIGEST, 4, ("type 0", "type 1"))


@pytest.mark.parametrize(
    "name", ["../../../x/evil", "../evil", "a/b", "/abs/evil", "./a", "a/../b", "x\0", "a%2F..%2F..%2Fevil", "%20"]
)
def test_a_space_lies_among_the_spaces(tmp_path, name):
    store = Store.create(tmp_path / "deep" / "deeper" / "store")
    with pytest.raises(InputError, match=r"(?s)A space cannot be called '.*': that is not one folder in") as error:
        store.create_space(name, DIGEST, 4, ())
    assert "under another name" in error.value.remedy
    assert {path.name for path in tmp_path.rglob("*")} == {"deep", "deeper", "store", "store.json"}


@pytest.mark.parametrize("name", ["Lung v1.0 (mine)", "größe", "a#b?c=d&e", "-x"])
def test_a_space_of_any_folder_name(tmp_path, name):
    lab = Lab.make(tmp_path / "store", name)
    lab.put(range(3))
    again = Lab(lab.store, lab.store.space(name))
    assert again.stamps() == {("d", f"c{row}"): 0 for row in range(3)}
    assert [path.name for path in (tmp_path / "store" / "spaces").iterdir()] == [f"{name}-{DIGEST[:12]}"]


def test_a_name_that_another_reference_has_is_refused(lab):
    lab.put(range(3))
    other = DIGEST[:12] + "f" * 20
    with pytest.raises(InputError, match=f"is of the reference with digest {DIGEST}, not {other}") as error:
        lab.store.create_space("pbmc", other, 7, ("type 0",))
    assert "another name" in error.value.remedy
    assert lab.store.space().digest == DIGEST
    assert len(lab.stamps()) == 3


def test_a_space_is_seen_when_it_can_be_read(lab):
    """Its maker died before the marker: nobody sees it, and it is made when it is asked for again."""
    (lab.space.path / "space.json").unlink()
    assert lab.store.spaces() == []
    assert lab.store.runs() == []
    again = lab.store.create_space("pbmc", DIGEST, 4, ("type 0",))
    assert again.snapshot().cells == 0


# Plans and records


def test_a_plan_is_read_back(lab):
    settings = Settings(keep_obs={"tissue": "string"}, ambiguous_entropy=0.5, batch_key="donor", neighbors=7)
    units = [lab.unit(range(4), settings), lab.unit(range(4, 6), settings, dataset="e")]
    plan = lab.plan(units, run="ab12", settings=settings, accepted=("genes",))
    lab.store.begin_run(plan, lab.space.name)
    told = lab.store.plan("ab12")
    assert told == json.loads(json.dumps(asdict(plan))) | {"space": "pbmc-0123456789ab", "cells": 6}
    assert [unit["id"] for unit in told["units"]] == [unit.id for unit in units]
    lab.store.begin_run(lab.plan([], run="ab12"), "another")
    assert lab.store.plan("ab12") == told


@pytest.mark.parametrize("run", ["ff", "", "ab1", "../_plans/ab12", "ab12.json", "*"])
def test_a_run_that_never_began(lab, run):
    lab.store.begin_run(lab.plan([], run="ab12"), lab.space.name)
    with pytest.raises(InputError, match="has begun here") as error:
        lab.store.plan(run)
    assert error.value.remedy == "Runs: ab12."


def test_a_record_is_read_back(lab):
    settings = Settings(keep_obs={"tissue": "string"}, neighbors=7)
    plan = lab.plan([lab.unit(range(4)), lab.unit(range(4, 6))], settings=settings, accepted=("genes", "labels"))
    quarantined = [{"unit": "u", "dataset_id": "d", "start": 4, "stop": 6, "cells": 2, "attempts": 3, "reason": "NaN"}]
    told = {"quarantined": quarantined, "software": {"torch": "2"}, "seconds": {"map": 1.5}}
    lab.store.record(lab.record(plan, "first", 5_000, done=1, **told))
    lab.store.record(lab.record(lab.plan([], run="cd34"), "second", 9_000))
    newest, found = lab.store.records()
    assert (newest["run"], newest["quarantined"], newest["units"]) == ("cd34", [], 0)
    assert found == {
        "run": "ab12",
        "attempt": "first",
        "space": "pbmc-0123456789ab",
        "reference": "pbmc@0123456789ab",
        "source": SOURCE,
        "source_version": "v0",
        "started": 5_000,
        "ended": 5_005,
        "units": 2,
        "units_done": 1,
        "cells": 6,
        "cells_done": 4,
        "settings": asdict(settings),
        "accepted": ["genes", "labels"],
        **told,
    }


def test_records_at_once_are_all_kept(lab):
    start = threading.Barrier(6)

    def write(number):
        start.wait()
        Store(lab.store.path).record(lab.record(lab.plan([]), f"{number}", number))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(write, range(6)))
    assert [row["attempt"] for row in lab.store.records()] == ["5", "4", "3", "2", "1", "0"]


# The state of a run


def state_of(lab, run="ab12"):
    (found,) = (row for row in lab.store.runs() if row["run"] == run)
    return found["state"], found["version"], found["units_done"], found["cells_done"]


def test_a_run_from_its_beginning_to_its_end(lab):
    cuts = [range(4), range(4, 6), range(6, 9)]
    plan = lab.plan([lab.unit(cut) for cut in cuts])
    lab.store.begin_run(plan, lab.space.name)
    assert state_of(lab) == ("open", None, 0, 0)
    first = lab.stage(cuts[0])
    assert state_of(lab) == ("open", None, 1, 4)
    (row,) = lab.store.runs()
    assert {name: row[name] for name in ("units", "cells", "ended", "quarantined", "reference", "space")} == {
        "units": 3,
        "cells": 9,
        "ended": None,
        "quarantined": [],
        "reference": "pbmc@0123456789ab",
        "space": "pbmc-0123456789ab",
    }
    # a driver that died after its record and before its commit
    rest = [lab.stage(cut) for cut in cuts[1:]]
    lab.store.record(lab.record(plan, done=2))
    assert state_of(lab) == ("open", None, 2, 6)
    version = lab.commit(first, *rest, run="ab12", before=lambda: lab.store.record(lab.record(plan, "2", 2_000)))
    assert state_of(lab) == ("committed", version, 3, 9)
    # it stays so when another run replaces its cells, and finds nothing to do after that
    lab.put(range(9), stamp=1)
    assert state_of(lab) == ("committed", version, 3, 9)


def test_a_run_that_failed_and_was_mended(lab):
    plan = lab.plan([lab.unit(range(4))])
    lab.store.begin_run(plan, lab.space.name)
    lab.store.record(lab.record(plan, "1", 1_000, done=0))
    assert state_of(lab) == ("failed", None, 0, 0)
    done = lab.stage(range(4))
    version = lab.commit(done, run="ab12", before=lambda: lab.store.record(lab.record(plan, "2", 2_000)))
    assert state_of(lab) == ("committed", version, 1, 4)
    assert len(lab.store.records()) == 2


def test_runs_come_newest_first_with_the_version_of_each(lab):
    other = Lab.make(lab.store.path, "hlca", "c" * 32)
    for started, (each, run) in enumerate([(lab, "a1"), (other, "b2"), (lab, "c3")]):
        plan = each.plan([each.unit([started])], run=run)
        each.store.begin_run(plan, each.space.name)
        record = each.record(plan, started=started)
        each.commit(each.stage([started]), run=run, before=lambda record=record: lab.store.record(record))
    found = [(row["run"], row["space"], row["version"]) for row in lab.store.runs()]
    assert found == [("c3", lab.space.name, 2), ("b2", other.space.name, 1), ("a1", lab.space.name, 1)]


def test_a_plan_of_a_space_that_was_removed_does_not_hide_the_others(lab):
    other = Lab.make(lab.store.path, "hlca", "c" * 32)
    lab.store.begin_run(lab.plan([lab.unit([1])]), lab.space.name)
    other.store.begin_run(other.plan([other.unit([1])], run="cd34"), other.space.name)
    lab.stage([1])
    shutil.rmtree(other.space.path)
    assert state_of(lab) == ("open", None, 1, 1)
    assert state_of(lab, "cd34") == ("open", None, 0, 0)
