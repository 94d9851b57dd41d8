"""Names and the packages behind them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from scviaduct.errors import PackageError
from scviaduct.references.package import Reference
from scviaduct.references.registry import Registry, home


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "home")


@pytest.fixture(scope="module")
def two(scvi_folder, scanvi_folder, tmp_path_factory):
    """Packages of two models, built once."""
    made = Registry(tmp_path_factory.mktemp("made"))
    return made.add(scvi_folder, "scvi"), made.add(scanvi_folder, "scanvi")


def test_add_get_list_remove(registry, two, tmp_path):
    scvi, scanvi = two
    assert registry.list() == []
    added = registry.add(scvi.path, "pbmc-v1.0_a")
    assert added.path == tmp_path / "home" / "references" / "pbmc-v1.0_a"
    assert (added.name, added.digest) == ("pbmc-v1.0_a", scvi.digest)
    registry.add(str(scanvi.path), "9lives")
    assert [reference.name for reference in registry.list()] == ["9lives", "pbmc-v1.0_a"]
    assert registry.get("pbmc-v1.0_a") == added
    registry.remove("pbmc-v1.0_a")
    assert not added.path.exists()
    assert [reference.name for reference in registry.list()] == ["9lives"]
    assert [path.name for path in (tmp_path / "home" / "references").iterdir()] == ["9lives"]


def test_a_folder_of_scvi_tools_is_packaged(registry, scvi_folder, two):
    assert registry.add(scvi_folder, "fresh").digest == two[0].digest


def test_the_same_digest_again_changes_nothing(registry, two):
    added = registry.add(two[0].path, "one")
    before = (added.path / "manifest.json").stat()
    assert registry.add(two[0].path, "one") == added
    assert (added.path / "manifest.json").stat().st_mtime_ns == before.st_mtime_ns
    assert len(list(added.path.parent.iterdir())) == 1


def test_a_name_is_taken(registry, two):
    scvi, scanvi = two
    registry.add(scvi.path, "one")
    told = f"Name 'one' is taken by SCVI {scvi.digest[:12]}; this is {scanvi.digest[:12]}."
    with pytest.raises(PackageError) as caught:
        registry.add(scanvi.path, "one")
    assert str(caught.value) == f"{told} Choose another name, or --replace."
    assert registry.get("one").digest == scvi.digest
    assert registry.add(scanvi.path, "one", replace=True).digest == scanvi.digest
    assert len(list(registry.get("one").path.parent.iterdir())) == 1


def test_what_is_refused_leaves_nothing(registry, two, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(PackageError, match=r"holds no model.pt"):
        registry.add(tmp_path / "empty", "one")
    registry.add(two[0].path, "one")
    with pytest.raises(PackageError, match=r"holds no model.pt"):
        registry.add(tmp_path / "empty", "one", replace=True)
    assert registry.get("one").digest == two[0].digest
    assert len(list(registry.get("one").path.parent.iterdir())) == 1


def test_replacing_mends_a_damaged_package(registry, two):
    added = registry.add(two[0].path, "one")
    (added.path / "manifest.json").write_text("{")
    with pytest.raises(PackageError, match=r"cannot be read .*It has the name 'one': --replace puts the new one there"):
        registry.add(two[0].path, "one")
    assert registry.add(two[0].path, "one", replace=True).verify().ok


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_adding_again_mends_a_damaged_file(registry, two, damage):
    added = registry.add(two[0].path, "one")
    path = added.path / "encoder.safetensors"
    path.write_bytes(b"x") if damage == "changed" else path.unlink()
    assert not registry.get("one").verify().ok
    assert registry.add(two[0].path, "one") == added
    assert registry.get("one").verify().ok
    assert [path.name for path in added.path.parent.iterdir()] == ["one"]


def test_broken_packages_hide_no_others(registry, two):
    assert registry.broken() == {}
    for name in ("a", "b", "c", "d"):
        registry.add(two[0].path, name)
    (registry.get("a").path / "manifest.json").write_text('{"format":2}')
    (registry.get("c").path / "manifest.json").unlink()
    assert [reference.name for reference in registry.list()] == ["b", "d"]
    broken = registry.broken()
    assert list(broken) == ["a", "c"]
    assert "cannot be read ('digest'). Add the reference again" in broken["a"]
    assert "it has no manifest.json" in broken["c"]


@pytest.mark.parametrize(
    "name", ["x" * 101, "", "UPPER", ".hidden", "-dash", "a/b", "../up", "a b", "ä", "x\n", "_x", "/abs"]
)
def test_names(registry, two, name):
    with pytest.raises(PackageError, match=r"is not a name for a reference\. Lower-case letters, digits"):
        registry.add(two[0].path, name)
    with pytest.raises(PackageError, match=r"(?s)There is no registered reference '.*reference list shows them"):
        registry.remove(name)
    assert registry.list() == []


def test_unknown_names(registry, two, tmp_path):
    with pytest.raises(
        PackageError, match=r"There is no reference 'pbmc'\. None is registered yet\. Add one: scviaduct"
    ):
        registry.get("pbmc")
    registry.add(two[0].path, "pbmc-10k")
    registry.add(two[0].path, "lung")
    with pytest.raises(PackageError, match=r"Registered: pbmc-10k\."):
        registry.get("pbmc-1k")
    with pytest.raises(PackageError, match=r"Registered: lung, pbmc-10k\."):
        registry.get("xyz")
    with pytest.raises(PackageError, match=r"no registered reference 'xyz'"):
        registry.remove("xyz")
    (registry.get("lung").path / "manifest.json").write_text("{")  # another one's damage is not this one's
    with pytest.raises(PackageError, match=r"There is no reference 'xyz'"):
        registry.get("xyz")


def test_a_path_will_do(registry, two, tmp_path, monkeypatch):
    assert registry.get(str(two[0].path)) == two[0]
    monkeypatch.chdir(two[0].path.parent)
    found = registry.get("./scvi")
    assert found.path.is_absolute()
    assert found.digest == two[0].digest
    registry.add(two[1].path, "scvi")
    assert registry.get("scvi").digest == two[1].digest  # a registered name goes before a folder of that name


def test_the_home(monkeypatch, tmp_path, two):
    monkeypatch.setenv("SCVIADUCT_HOME", str(tmp_path / "elsewhere"))
    assert home() == tmp_path / "elsewhere"
    added = Registry().add(two[0].path, "one")
    assert added.path == tmp_path / "elsewhere" / "references" / "one"
    assert Reference.load(added.path) == Registry().get("one")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for unset in (lambda: monkeypatch.setenv("SCVIADUCT_HOME", ""), lambda: monkeypatch.delenv("SCVIADUCT_HOME")):
        unset()
        assert home().is_relative_to(tmp_path)
        assert home().name == "scviaduct"
    assert "SCVIADUCT_HOME" not in os.environ
    assert not Path(home()).exists()


def test_a_kill_between_the_two_steps_of_replacing_loses_nothing(registry, two):
    """The old package was put aside, and nothing took its place."""
    made = registry.add(two[0].path, "a.old.b")
    registry._put_aside(made.path)
    assert not made.path.exists()
    assert registry.get("a.old.b").digest == two[0].digest
    replaced = registry.add(two[1].path, "a.old.b", replace=True)
    assert replaced.digest == two[1].digest != two[0].digest
    assert [path.name for path in made.path.parent.iterdir()] == ["a.old.b"]


def test_a_package_given_by_its_path_needs_no_home(two, monkeypatch):
    def without(*_):
        raise RuntimeError("could not determine the home directory")

    monkeypatch.delenv("SCVIADUCT_HOME", raising=False)
    monkeypatch.setattr("scviaduct.references.registry.user_data_path", without)
    assert Registry().get(str(two[0].path)).digest == two[0].digest
    with pytest.raises(PackageError, match=r"no place to be kept in .*Set SCVIADUCT_HOME"):
        Registry().get("pbmc")
