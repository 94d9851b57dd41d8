"""Searching the hub, and showing a stranger's card."""

from __future__ import annotations

import json

import pytest

from scviaduct.errors import PackageError
from scviaduct.references.fetching.searching import card, safe, search
from tests.support.hub_server import TOKEN

pytest_plugins = ["tests.support.fixtures"]


def tagged(family: str, *tags: str) -> list[str]:
    return ["scvi-tools", f"model_cls_name:{family}", "scvi_version:1.4.2", "anndata_version:0.12.1", *tags]


@pytest.fixture
def filled(hub):
    """Models of three publishers, of which one names no library."""
    heart = tagged("SCVI", "tissue:heart", "modality:rna", "annotated:True", "license:cc-by-4.0")
    lung = tagged("SCANVI", "tissue:Lung", "tissue:upper lobe of left lung", "modality:rna", "annotated:False")
    both = tagged("TOTALVI", "modality:rna", "modality:protein")
    hub.add("scvi-tools/sapiens-heart-scvi", {"README.md": b""}, tags=heart, downloads=5)
    hub.add("scvi-tools/sapiens-lung-scanvi", {"README.md": b""}, tags=lung, downloads=9)
    hub.add("lab/stereo", {"README.md": b""}, tags=tagged("RNAStereoscope", "tissue:heart"), downloads=50)
    hub.add("scvi-tools/citeseq", {"README.md": b""}, tags=both, downloads=1)
    hub.add("czi/census-model", {"README.md": b""}, tags=["model_cls_name:SCVI", "tissue:heart"], downloads=2)
    hub.add("lab/unrelated", {"README.md": b""}, tags=["transformers"])
    hub.add("lab/secret", {"README.md": b""}, tags=heart, private=True)
    return hub


def names(found):
    return [model.repository for model in found]


def test_what_is_known_of_a_model(filled):
    [model] = search("sapiens heart")
    assert model.repository == "scvi-tools/sapiens-heart-scvi"
    assert (model.family, model.tissues, model.modalities) == ("SCVI", ("heart",), ("rna",))
    assert (model.annotated, model.scvi_version, model.licence) == (True, "1.4.2", "cc-by-4.0")
    assert (model.downloads, model.mapped_here) == (5, True)
    assert model.last_modified.startswith("2026-01-02")


def test_models_that_map_here_come_first(filled):
    found = search()
    assert names(found)[0] == "scvi-tools/sapiens-lung-scanvi"
    assert names(found)[-1] == "lab/stereo"
    assert found[-1].mapped_here is False
    assert found[-1].annotated is None
    assert not {"lab/unrelated", "lab/secret", "czi/census-model"} & {*names(found)}
    assert names(search(limit=1)) == names(found)[:1]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"text": "HEART"}, ["scvi-tools/sapiens-heart-scvi", "lab/stereo"]),
        ({"text": "heart scvi-tools/"}, ["scvi-tools/sapiens-heart-scvi"]),
        ({"text": "protein"}, ["scvi-tools/citeseq"]),
        ({"family": "scanvi"}, ["scvi-tools/sapiens-lung-scanvi"]),
        ({"family": "SCVI"}, ["scvi-tools/sapiens-heart-scvi"]),
        ({"tissue": "lung"}, ["scvi-tools/sapiens-lung-scanvi"]),
        ({"tissue": "left LUNG"}, ["scvi-tools/sapiens-lung-scanvi"]),
        ({"tissue": "heart", "family": "SCVI"}, ["scvi-tools/sapiens-heart-scvi"]),
        ({"text": "kidney"}, []),
    ],
)
def test_filters(filled, asked, expected):
    assert names(search(**asked)) == expected


def test_pages_are_all_read(filled):
    filled.page = 2
    assert len(search()) == 4
    assert len(filled.asked(part="/api/models")) >= 2


def test_a_private_model_is_found_by_who_may_see_it(filled, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "lab/secret" in names(search("secret"))


def test_collections(filled):
    slug = filled.collect(
        "scvi-tools",
        "CELLxGENE Census",
        ["czi/census-model", "lab/secret", "lab/gone", "scvi-tools/sapiens-heart-scvi"],
    )
    filled.collect("scvi-tools", "Tabula Sapiens", ["scvi-tools/sapiens-heart-scvi", "scvi-tools/sapiens-lung-scanvi"])
    filled.collect("lab", "Ours", ["lab/stereo"])
    both = ["scvi-tools/sapiens-heart-scvi", "czi/census-model"]
    for name in (slug, "census", "Cellxgene census", "scvi-tools/census"):
        assert names(search(collection=name)) == both
    assert names(search("sapiens", collection="census")) == both[:1]
    assert names(search(collection="lab/ours")) == ["lab/stereo"]
    with pytest.raises(PackageError, match=r"no collection that fits 'kidney'.*'CELLxGENE Census', 'Tabula Sapiens'"):
        search(collection="kidney")
    with pytest.raises(PackageError, match="2 collections of scvi-tools fit 'e'"):
        search(collection="e")
    with pytest.raises(PackageError, match="does not exist"):
        search(collection="scvi-tools/gone-0123456789abcdef01234567")


def test_offline_and_without_a_hub(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(PackageError, match=r"A search needs the hub.*Unset HF_HUB_OFFLINE"):
        search("heart")
    assert hub.requests == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PackageError, match="cannot be reached"):
        search("heart")


def test_tags_of_a_stranger_carry_no_control_sequences(hub):
    hub.add("lab/evil", {"README.md": b""}, tags=[*tagged("SC\x1b[31mVI"), "tissue:he\x1b]0;x\x07art\n\rX"])
    [model] = search()
    assert (model.family, model.tissues) == ("SCVI", ("heartX",))


def test_real_tags(hub, shared_data):
    """The 121 repositories of the real hub, as they were."""
    index = json.loads((shared_data / "models" / "hf_hub_scvi_tools_index.json").read_text())
    for model in index["models"]:
        tags = tagged(str(model["model_class"]), *(f"tissue:{tissue}" for tissue in model["tissues"]))
        hub.add(model["model_id"], {"README.md": b""}, tags=tags, downloads=model["downloads"])
    found = search(limit=200)
    assert len(found) == len(index["models"])
    assert {model.mapped_here for model in found} == {True, False}
    assert all(model.family == "SCANVI" for model in search(family="scanvi"))


def test_a_card_without_its_header(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags: [a]\n---\n\n# Heart\n\nA *model*.\r\n---\nmore\n")
    assert card(tmp_path) == "# Heart\n\nA *model*.\n---\nmore"
    (tmp_path / "README.md").write_text("# No header\n---\nx\n---\n")
    assert card(tmp_path).startswith("# No header\n---\nx")
    (tmp_path / "README.md").unlink()
    assert card(tmp_path) == ""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b[1;1Hgone", "gone"),
        ("\x1b]52;c;ZXZpbA==\x07copied", "copied"),
        ("\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x9b31mred\x9d0;title\x9c!", "red!"),
        ("\x1bPdevice\x1b\\ok", "ok"),
        ("a\rb\x08c\x00d\x7f", "abcd"),
        ("\x1b]never ends\nnext line", "\nnext line"),
        ("left\u202eright\u2066\u200b", "leftright"),
        ("Müller, 细胞, β-cells\t1\n", "Müller, 细胞, β-cells\t1\n"),
    ],
)
def test_what_a_terminal_would_obey_is_taken_out(text, shown):
    assert safe(text) == shown
    assert "\x1b" not in safe(text)
    assert "\n" not in safe(text, lines=False)


def test_a_card_is_bounded_and_may_hold_anything(tmp_path):
    (tmp_path / "README.md").write_bytes(b"\xff\xfe" + b"x" * (1 << 20))
    shown = card(tmp_path)
    assert len(shown) < (256 << 10) + 100
    assert shown.endswith("(cut after 256 KiB)")
