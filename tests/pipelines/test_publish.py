"""``scviaduct publish``, as a person runs it, against a hub on this machine."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from pipelines import reference
from pipelines.cli import app
from pipelines.publishing import publish
from scviaduct.errors import InputError
from scviaduct.families.vae import quiet
from tests.scviaduct.references.saved.seven import save_small
from tests.support.hub_server import TOKEN

pytest_plugins = ["tests.support.fixtures"]
# The client itself uploads in a way that its HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
FILES = ["README.md", "_scvi_required_metadata.json", "adata.h5ad", "model.pt"]


@pytest.fixture(scope="module")
def published_name(home, tmp_path_factory):
    """A registered PEAKVI."""
    folder = save_small("PEAKVI", tmp_path_factory.mktemp("saved") / "peakvi")
    reference.add(folder, name="to-publish", replace=True)
    yield "to-publish"
    reference.remove("to-publish")


@pytest.fixture
def lab(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def run(*arguments):
    with quiet():
        return CliRunner().invoke(app, ["publish", *arguments], catch_exceptions=False)


def test_a_dry_run_shows_and_keeps_the_files_and_asks_no_one(lab, published_name, tmp_path):
    done = run(published_name, "hf://lab/peaks", "--dry-run", "--out", str(tmp_path / "out"), "--quiet")

    assert done.exit_code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    for name in FILES:
        assert f"{(tmp_path / 'out' / name).stat().st_size:,}" in done.stdout
    assert "PEAKVI; data: template, 16 cells." in done.stdout
    assert "Nothing was uploaded." in done.stdout
    assert not lab.requests


def test_a_dry_run_leaves_nothing_unless_it_is_told_where(lab, published_name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = publish(published_name, "hf://lab/peaks", dry_run=True, quiet=True)

    assert made.dry_run
    assert not made.contents.folder.exists()
    assert not list(tmp_path.iterdir())


def test_what_is_published_is_named_by_its_commit_and_can_be_added(lab, published_name, tmp_path):
    text = tmp_path / "about.md"
    text.write_text("Peaks of **PBMC**.")
    options = ["--private", "--licence", "mit", "--tissue", "blood,lung", "--description", f"@{text}"]

    done = run(published_name, "hf://lab/peaks", *options, "--json", "--quiet")

    told = json.loads(done.stdout)
    repo = lab.repos["lab/peaks"]
    assert told["uri"] == f"hf://lab/peaks@{repo.refs['main']}"
    assert sorted(told["contents"]["files"]) == FILES
    assert told["contents"]["folder"] is None
    assert repo.private
    assert {"tissue:blood", "tissue:lung", "license:mit", "modality:atac"} <= {*repo.tags}
    assert "Peaks of **PBMC**." in repo.commits[repo.refs["main"]]["README.md"].decode()
    again = reference.add(told["uri"], name="from-the-hub", quiet=True)
    assert again.family == "PEAKVI"
    reference.remove("from-the-hub")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--with-counts",), "has no counts"),
        (("--allow-column", "donor"), "--allow-column donor: neither"),
        (("--description", "@/no/such/file"), "the file cannot be read"),
    ],
)
def test_wrong_options_end_in_a_message(lab, published_name, options, told):
    done = run(published_name, "hf://lab/peaks", *options, "--quiet")

    assert done.exit_code == 2
    assert told in done.stderr
    assert not lab.repos


def test_a_target_is_refused_before_any_work(lab):
    with pytest.raises(InputError, match="hf://OWNER/NAME"):
        publish("no-such-reference", "lab/peaks")
