"""A package that was changed is found out, by whoever reads the changed part."""

from __future__ import annotations

import json
import pickle
import shutil

import anndata
import numpy as np
import pyarrow.parquet as pq
import pytest

from scviaduct.errors import PackageError
from scviaduct.references.building import build_package
from scviaduct.references.manifest import file_digest, manifest_digest, read_manifest
from scviaduct.references.package import Reference

FILES = [
    "model.safetensors",
    "model.json",
    "encoder.safetensors",
    "template.h5ad",
    "latents.parquet",
    "statistics.safetensors",
]


@pytest.fixture(scope="module")
def package(scanvi_folder, tmp_path_factory):
    return build_package(scanvi_folder, tmp_path_factory.mktemp("packages") / "p", "small")


@pytest.fixture
def copy(package, tmp_path):
    shutil.copytree(package.path, tmp_path / "copy")
    return tmp_path / "copy"


def rewrite(folder, *, sign=True, **told):
    """Change a manifest's entries, with a digest that holds."""
    manifest = json.loads((folder / "manifest.json").read_text()) | told
    if sign:
        manifest["digest"] = manifest_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_whole_package_verifies(package):
    verification = package.verify()
    assert verification.ok
    names = [check.name for check in verification.checks]
    assert names[: len(FILES)] == [f"digest of {name}" for name in sorted(FILES)]
    assert len(names) > len(FILES)  # and what it encodes
    assert all("sd over 16 template cells" in check.detail for check in verification.checks[len(FILES) :])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", ["one bit", "one byte more", "missing"])
def test_verify_finds_a_changed_file(copy, name, change):
    path = copy / name
    if change == "missing":
        path.unlink()
    elif change == "one bit":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        with path.open("ab") as file:
            file.write(b"\0")
    verification = Reference.load(copy).verify()
    assert not verification.ok
    assert [check.name for check in verification.checks if not check.ok] == [f"digest of {name}"]
    assert len(verification.checks) == len(FILES)  # a changed model is not loaded


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("encoder.safetensors", Reference.encoder),
        ("latents.parquet", Reference.latents),
        ("statistics.safetensors", Reference.statistics),
    ],
)
def test_readers_find_a_changed_file(copy, name, read):
    with (copy / name).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(PackageError, match=rf"{name} has digest \w+, and the manifest says .*add the reference again"):
        read(Reference.load(copy))
    (copy / name).unlink()
    with pytest.raises(PackageError, match=rf"{name} is missing\. Add the reference again"):
        read(Reference.load(copy))


def test_a_package_without_an_encoder(copy):
    files = read_manifest(copy)["files"]
    del files["encoder.safetensors"]
    rewrite(copy, files=files)
    with pytest.raises(PackageError, match=r"encoder.safetensors is missing"):
        Reference.load(copy).encoder()


@pytest.mark.parametrize(
    "told",
    [
        {"family": "SCVI"},
        {"facts": {}},
        {"files": {}},
        {"template_latent": []},
        {"digest": "0" * 32},
    ],
    ids=lambda told: next(iter(told)),
)
def test_a_changed_manifest_is_found_by_load(copy, told):
    rewrite(copy, sign=False, **told)
    with pytest.raises(PackageError, match=r"manifest.json has digest \w+, and says .*add the reference again"):
        Reference.load(copy)


@pytest.mark.parametrize("name", FILES)
def test_a_changed_size_or_digest_is_found_by_load(copy, name):
    files = read_manifest(copy)["files"]
    files[name]["size"] += 1
    rewrite(copy, sign=False, files=files)
    with pytest.raises(PackageError, match=r"It was changed or damaged"):
        Reference.load(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"format": 2}', "\udcff"])
def test_a_manifest_that_cannot_be_read(copy, text):
    (copy / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(PackageError, match=r"manifest.json cannot be read .*Add the reference again"):
        Reference.load(copy)


@pytest.mark.parametrize("key", ["name", "notes", "repairs", "provenance"])
def test_a_manifest_that_is_not_whole(copy, key):
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest[key]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PackageError, match=rf"cannot be read \('{key}'\)"):
        Reference.load(copy)


ABSENT = object()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n_latent", ABSENT),
        ("n_latent", "4"),
        ("n_latent", 0),
        ("n_latent", True),
        ("genes", ABSENT),
        ("genes", ["G0"]),
        ("genes", {"symbol": ["S0"]}),
        ("genes", {"index": ["G0"], "symbol": []}),
        ("labels", ABSENT),
        ("labels", "B"),
        ("labels", [1]),
        ("batch_key", None),
        ("encode_covariates", 0),
        ("modalities", [["rna", 39]]),
        ("modalities", [["rna", "40"]]),
        ("modalities", ABSENT),
        ("latent_sizes", {"latent": 5}),
        ("latent_sizes", {}),
        ("sample_categories", None),
        ("categorical_covariates", {"donor": "d1"}),
    ],
)
def test_facts_that_are_not_whole(copy, key, value):
    """Every digest holds: whoever made it said so."""
    facts = {name: told for name, told in (read_manifest(copy)["facts"] | {key: value}).items() if told is not ABSENT}
    rewrite(copy, facts=facts)
    with pytest.raises(PackageError, match=rf"cannot be read: '{key}' of the facts is missing .*Add the reference"):
        Reference.load(copy)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("facts", []),
        ("facts", None),
        ("family", 1),
        ("files", ["model.json"]),
        ("files", {"model.json": "00"}),
        ("files", {"model.json": {"digest": "00"}}),
        ("template_latent", []),
        ("template_latent", [[0.5]]),
        ("template_latent", [["a", "b", "c", "d"]]),
        ("notes", "none"),
        ("provenance", []),
    ],
)
def test_entries_of_another_kind(copy, key, value):
    rewrite(copy, **{key: value})
    with pytest.raises(PackageError, match=rf"cannot be read: '{key}' is missing .*Add the reference again"):
        Reference.load(copy)


def test_a_fact_that_is_none(copy):
    rewrite(copy, facts=read_manifest(copy)["facts"] | {"path": "/etc"})
    with pytest.raises(PackageError, match=r"cannot be read: 'facts' is missing or not what it should be"):
        Reference.load(copy)


def test_brackets_in_brackets(copy):
    (copy / "manifest.json").write_text("[" * 200_000)
    with pytest.raises(PackageError, match=r"manifest.json cannot be read"):
        Reference.load(copy)


@pytest.mark.parametrize(
    "name",
    [
        "../../../x/evil",
        "a/b",
        "/abs",
        "a\\b",
        "a%2F..%2Fx",
        "..",
        ".",
        ".x",
        "",
        "a\nb",
        "a\0b",
        "\ud800",
        "a" * 201,
        7,
        None,
    ],
)
def test_a_name_is_that_of_one_folder(copy, name):
    """It becomes part of a folder's name in a store, and no digest covers it."""
    rewrite(copy, name=name)
    with pytest.raises(PackageError, match=r"has the name .*, which cannot be that of a folder\. .*at most 200 bytes"):
        Reference.load(copy)


@pytest.mark.parametrize("name", ["Lung v1.0 (mine)", "größe", "a" * 200, "-x", "a..b", "a#b?"])
def test_names_of_any_folder(copy, name):
    rewrite(copy, name=name)
    assert Reference.load(copy).name == name


def test_a_later_format(copy):
    (copy / "manifest.json").write_text('{"format": 3}')
    with pytest.raises(PackageError, match=r"has format 3, this version reads 2\."):
        Reference.load(copy)


def test_no_package(tmp_path):
    with pytest.raises(PackageError, match=r"is not a reference package: it has no manifest.json"):
        Reference.load(tmp_path)


@pytest.mark.parametrize("name", ["../outside", "..", "/etc/hostname", "inner/../../outside", ""])
def test_files_of_a_manifest_lie_in_its_folder(copy, tmp_path, name):
    """Copying such a package would read or write elsewhere."""
    (tmp_path / "outside").write_text("x")
    files = read_manifest(copy)["files"]
    rewrite(copy, files=files | {name: files["model.json"]})
    with pytest.raises(PackageError, match=r"which is not in its folder\. Do not use this package"):
        build_package(copy, tmp_path / "other" / "out", "out")
    assert not (tmp_path / "other").exists()


def test_verify_finds_a_model_that_encodes_otherwise(copy):
    """Every digest holds, and the latents that were recorded are not those of the model."""
    latent = np.array(read_manifest(copy)["template_latent"])
    rewrite(copy, template_latent=(latent + latent.std() * 1e-3).tolist())
    verification = Reference.load(copy).verify()
    wrong = [check for check in verification.checks if not check.ok]
    assert wrong
    assert all("1.0e-03 sd" in check.detail for check in wrong)


def test_verify_finds_a_template_of_another_model(copy):
    template = anndata.read_h5ad(copy / "template.h5ad")
    template.X.data += 1
    template.write_h5ad(copy / "template.h5ad")
    files = read_manifest(copy)["files"]
    path = copy / "template.h5ad"
    files["template.h5ad"] = {"digest": file_digest(path), "size": path.stat().st_size}
    rewrite(copy, files=files)
    verification = Reference.load(copy).verify()
    assert [check.ok for check in verification.checks[: len(FILES)]] == [True] * len(FILES)
    assert not verification.ok


def test_what_a_name_and_notes_say_does_not_enter_the_digest(copy, package):
    rewrite(copy, name="other", notes=["a note"], provenance={"source": "x"})
    assert Reference.load(copy).digest == package.digest
    assert Reference.load(copy).provenance == {"source": "x"}


def test_references_are_pickled(package):
    assert pickle.loads(pickle.dumps(package)) == package


def test_latents_are_read_as_they_were_written(package, scanvi_folder):
    data = anndata.read_h5ad(scanvi_folder / "adata.h5ad")
    found = package.latents()
    assert found.latent.dtype == np.float32
    assert found.latent.shape == (data.n_obs, 4)
    table = pq.read_table(package.path / "latents.parquet")
    assert table["observation_id"].to_pylist() == list(data.obs_names)
    assert table["latent"].to_pylist()[7] == pytest.approx(found.latent[7].tolist())
    assert set(found.labels) == {"B", "NK", "T", None}
