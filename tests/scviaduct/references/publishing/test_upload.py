"""Uploading with the real client: one commit or none, and nothing of others is overwritten."""

from __future__ import annotations

import socket
import threading

import httpx2
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from scviaduct.errors import InputError, PackageError
from scviaduct.references.publishing.repository import Options, write_repository
from scviaduct.references.publishing.upload import target_of, upload
from tests.support.hub_server import TOKEN

pytest_plugins = ["tests.support.fixtures"]
# The client itself uploads in a way that its HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
NAME = "lab/mini"
TARGET = target_of(f"hf://{NAME}")
FILES = [
    "README.md",
    "_scvi_required_metadata.json",
    "adata.h5ad",
    "latents.parquet",
    "model.pt",
    "statistics.safetensors",
]


@pytest.fixture
def contents(minified, tmp_path):
    return write_repository(minified(), NAME, tmp_path / "repository", Options(licence="mit"))


def files(hub, commit):
    return sorted(name for name in hub.repos[NAME].commits[commit] if name != ".gitattributes")


def test_all_files_come_in_one_commit(lab, contents):
    commit = upload(contents, TARGET, private=True)

    repo = lab.repos[NAME]
    assert (repo.private, len(repo.commits), repo.refs["main"]) == (True, 2, commit)
    assert files(lab, commit) == FILES == sorted(contents.files)
    assert all(repo.commits[commit][name] == (contents.folder / name).read_bytes() for name in FILES)
    assert {"scvi-tools", "license:mit", "model_cls_name:SCVI"} <= {*repo.tags}
    assert not lab.asked(part="collections")


def test_publishing_again_changes_nothing(lab, minified, tmp_path):
    reference = minified()
    first, again = (write_repository(reference, NAME, tmp_path / name, Options()) for name in ("first", "again"))
    commit = upload(first, TARGET)

    assert upload(again, TARGET) == commit
    assert len(lab.repos[NAME].commits) == 2


def test_another_card_of_the_same_model_is_a_new_commit(lab, contents, tmp_path):
    first = upload(contents, TARGET)
    (contents.folder / "README.md").write_text("---\nlibrary_name: scvi-tools\n---\nBetter\n")

    second = upload(contents, TARGET)

    assert second != first
    assert lab.repos[NAME].commits[second]["README.md"].endswith(b"Better\n")


def test_another_model_is_not_overwritten(lab, contents, minified, tmp_path):
    first = upload(contents, TARGET)
    setup = {"categorical_covariate_keys": ["cell_type"]}
    other = write_repository(minified(name="other", setup=setup), NAME, tmp_path / "changed", Options())
    (other.folder / "adata.h5ad").rename(other.folder / "mdata.h5mu")
    del other.files["adata.h5ad"]
    other.files["mdata.h5mu"] = 1

    with pytest.raises(InputError, match=r"hf://lab/mini holds another model.*--replace"):
        upload(other, TARGET)
    assert lab.repos[NAME].refs["main"] == first

    second = upload(other, TARGET, replace=True)
    assert files(lab, second) == sorted({*FILES, "mdata.h5mu"} - {"adata.h5ad"})
    assert files(lab, first) == FILES


def test_a_repository_of_something_else_is_left_alone(lab, contents):
    lab.add(NAME, {"config.json": b"{}", "README.md": b"# A language model"})

    with pytest.raises(InputError, match=r"holds something else: config\.json.*--replace"):
        upload(contents, TARGET)

    assert files(lab, upload(contents, TARGET, replace=True)) == sorted([*FILES, "config.json"])


def test_a_public_repository_is_not_taken_for_private(lab, contents):
    lab.add(NAME, {"README.md": b"# To come"})

    with pytest.raises(InputError, match=r"is public, and --private was asked for"):
        upload(contents, TARGET, private=True)
    assert files(lab, lab.repos[NAME].refs["main"]) == ["README.md"]


def test_it_needs_a_token(hub, contents):
    with pytest.raises(PackageError, match=r"needs a token.*HF_TOKEN"):
        upload(contents, TARGET)
    assert not hub.requests


def test_a_refused_token_is_not_repeated(hub, contents, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN + "x")
    with pytest.raises(PackageError, match=r"refuses the token.*HF_TOKEN") as caught:
        upload(contents, TARGET)
    assert TOKEN not in str(caught.value)
    assert caught.value.__cause__ is None


def test_offline_is_obeyed(lab, contents, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(PackageError, match="HF_HUB_OFFLINE"):
        upload(contents, TARGET)
    assert not lab.requests


def test_a_store_that_refuses_a_file_leaves_the_repository_as_it_was(lab, contents, monkeypatch):
    first = lab.add(NAME, {"README.md": b"# To come"})
    monkeypatch.setattr(lab, "_href", lambda _: f"{lab.url}/store/{'0' * 64}", raising=True)

    with pytest.raises(PackageError, match=r"The hub answered 400.*No reader sees half of it"):
        upload(contents, TARGET)

    assert list(lab.repos[NAME].commits) == [first]
    monkeypatch.undo()


@pytest.fixture
def deaf():
    """A server that hangs up on whoever connects."""
    listening = socket.create_server(("127.0.0.1", 0))

    def hang_up():
        while True:
            try:
                listening.accept()[0].close()
            except OSError:
                return

    thread = threading.Thread(target=hang_up, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/store"
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()
    thread.join(10)


def test_a_network_that_fails_midway_leaves_the_repository_as_it_was(lab, contents, monkeypatch, deaf):
    first = lab.add(NAME, {"README.md": b"# To come"})
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # it tries for half a minute
    with monkeypatch.context() as patched:
        patched.setattr(lab, "_href", lambda _: deaf)
        with pytest.raises(PackageError, match=r"cannot be reached.*No reader sees half of it"):
            upload(contents, TARGET)
    assert list(lab.repos[NAME].commits) == [first]

    commit = upload(contents, TARGET)  # the same call, once the network is back

    assert files(lab, commit) == FILES


def test_what_came_back_is_compared(lab, contents, monkeypatch):
    lab.damage.add("model.pt")
    with pytest.raises(PackageError, match=r"model\.pt"):
        upload(contents, TARGET)


def test_a_commit_names_the_one_that_it_was_made_for(lab, contents, monkeypatch):
    first = lab.add(NAME, {"README.md": b"# To come"})
    told = []
    real = HfApi.create_commit

    def commit(self, *arguments, **options):
        told.append(options["parent_commit"])
        return real(self, *arguments, **options)

    monkeypatch.setattr(HfApi, "create_commit", commit)
    upload(contents, TARGET)

    assert told == [first]


@pytest.mark.parametrize("status", [409, 412])
def test_a_repository_that_moved_meanwhile_is_left_alone(lab, contents, monkeypatch, status):
    monkeypatch.setattr(HfApi, "create_commit", _answered(status))

    with pytest.raises(PackageError, match=rf"changed while it was written to \({status}\)"):
        upload(contents, TARGET)


def _answered(status):
    response = httpx2.Response(status, request=httpx2.Request("POST", "http://hub"))

    def refuse(*_, **__):
        raise HfHubHTTPError("no", response=response)

    return refuse


@pytest.mark.parametrize("uri", ["lab/mini", "hf://mini", "hf://lab/mini@main", "https://huggingface.co/lab/mini"])
def test_a_target_is_a_repository(uri):
    with pytest.raises(InputError, match=r"hf://OWNER/NAME"):
        target_of(uri)
