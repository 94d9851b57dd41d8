"""What a stranger's package or repository may say, as the terminal shows it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pipelines import printing
from scviaduct.references.fetching.searching import Found
from scviaduct.references.package import Check, Verification

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x1b[31mred\x9b1A\u202egnp"


@pytest.fixture
def strangers(pbmc):
    """A package whose provenance is called as facts are."""
    told = {
        "digest": "0" * 64,
        "family": "SCVI",
        "notes": 5,
        "repairs": None,
        "genes": {"many": ESCAPES, "none": ""},
        f"key{ESCAPES}": "x",
        "files": {"model.pt": {"size": 1, "sha256": "ab"}},
    }
    return replace(pbmc, provenance=told)


def rows(text):
    """First column to the second, as the table has them."""
    return [tuple(part.strip() for part in line.split("  ", 1)) for line in text.splitlines()]


def test_provenance_stands_for_no_fact(strangers, capsys):
    printing.reference(strangers, as_json=False)
    shown = rows(capsys.readouterr().out)
    assert ("digest", strangers.digest) in shown
    assert ("family", "SCANVI") in shown
    assert ("from: digest", "0" * 64) in shown
    assert ("from: family", "SCVI") in shown
    assert ("from: notes", "5") in shown
    assert ("from: genes", "many redgnp") in shown
    assert [name for name, *_ in shown].count("digest") == 1
    assert not any("files" in name or "sha256" in " ".join(rest) for name, *rest in shown)


def test_as_json_provenance_is_whole(strangers, capsys):
    printing.reference(strangers, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["digest"] == strangers.digest
    assert told["provenance"] == strangers.provenance


def test_no_table_obeys_a_stranger(strangers, capsys):
    named = replace(strangers, name=f"n{ESCAPES}", labels=(f"T{ESCAPES}", "two\nlines"))
    printing.reference(named, as_json=False)
    printing.references([named], as_json=False)
    hit = Found(f"lab/{ESCAPES}", ESCAPES, (ESCAPES,), (ESCAPES,), None, ESCAPES, ESCAPES, 3, "", False)
    printing.found_references([hit], as_json=False)
    printing.verification(Verification((Check(f"digest of {ESCAPES}", False, ESCAPES),)), as_json=False)
    printing.table([f"column{ESCAPES}"], [[[ESCAPES, ESCAPES]]], title=ESCAPES)
    shown = capsys.readouterr().out
    assert not {char for char in shown if not char.isprintable() and char != "\n"}
    assert "redgnp" in shown
    assert "owned" not in shown
    assert "two lines" in shown
