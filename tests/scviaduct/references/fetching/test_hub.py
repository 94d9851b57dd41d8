"""Fetching from a hub: the real client against a hub on this machine."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from scviaduct.errors import PackageError
from scviaduct.references.fetching.download import Progress
from scviaduct.references.fetching.fetch import fetch
from tests.support.hub_server import TOKEN

pytest_plugins = ["tests.support.fixtures"]

NAME = "lab/heart-scvi"
MODEL = os.urandom(3 << 20)
FILES = {
    "model.pt": MODEL,
    "adata.h5ad": os.urandom(1 << 20),
    "_scvi_required_metadata.json": b'{"model_cls_name": "SCVI"}',
    "README.md": b"---\nlicense: mit\n---\n# Heart\n",
    "notes/draft.txt": b"not needed",
    ".gitattributes": b"*.pt filter=lfs\n",
}
NEEDED = ["README.md", "_scvi_required_metadata.json", "adata.h5ad", "model.pt"]


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_branch_is_fetched_and_pinned(hub, cache):
    commit = hub.add(NAME, FILES, tags=["scvi-tools", "license:mit"])

    got = fetch(f"hf://{NAME}", cache=cache)

    assert names(got.folder) == NEEDED
    assert all((got.folder / name).read_bytes() == FILES[name] for name in NEEDED)
    told = got.provenance
    assert json.loads(json.dumps(told)) == told
    assert (told["uri"], told["revision"], told["commit"]) == (f"hf://{NAME}", "main", commit)
    assert (told["kind"], told["repository"], told["licence"], told["private"]) == ("hub", NAME, "mit", False)
    assert told["pinned"] == f"hf://{NAME}@{commit}"
    assert told["last_modified"].startswith("2026-01-02T03:04:05")
    assert told["files"]["model.pt"] == {"size": len(MODEL), "sha256": hashlib.sha256(MODEL).hexdigest()}
    assert told["files"]["README.md"]["sha256"] == hashlib.sha256(FILES["README.md"]).hexdigest()


def test_a_branch_that_moves_while_it_is_fetched_does_not_mix_two_commits(hub, cache):
    first = hub.add(NAME, FILES)
    moved = {**FILES, "README.md": b"# other\n", "model.pt": os.urandom(1 << 20)}

    def move(progress: Progress) -> None:
        if len(hub.repos[NAME].commits) == 1:
            hub.add(NAME, moved)

    got = fetch(f"hf://{NAME}", cache=cache, on_progress=move)

    assert got.provenance["commit"] == first
    assert (got.folder / "model.pt").read_bytes() == MODEL
    assert (got.folder / "README.md").read_bytes() == FILES["README.md"]
    assert len(hub.asked(part="/revision/")) == 1
    # The pinned address stays what it was; the branch's name is asked again and is something else now.
    assert fetch(got.provenance["pinned"], cache=cache).folder == got.folder
    assert (fetch(f"hf://{NAME}@main", cache=cache).folder / "README.md").read_bytes() == b"# other\n"


@pytest.mark.parametrize("offline", [True, False])
def test_a_commit_that_is_here_needs_no_request(hub, cache, monkeypatch, offline):
    commit = hub.add(NAME, FILES)
    first = fetch(f"hf://{NAME}@{commit}", cache=cache)
    hub.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1" if offline else "0")

    assert fetch(f"hf://{NAME}@{commit}", cache=cache) == first
    assert hub.requests == []


@pytest.mark.parametrize("revision", ["", "@main", "@refs/pr/1", "@short"])
def test_a_name_that_was_resolved_here_loads_offline(hub, cache, monkeypatch, revision):
    commit = hub.add(NAME, FILES)
    hub.add(NAME, {**FILES, "README.md": b"pull request"}, branch="refs/pr/1")
    revision = revision.replace("short", commit[:8])
    first = fetch(f"hf://{NAME}{revision}", cache=cache)
    hub.add(NAME, {"README.md": b"moved"}, branch="main")
    hub.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    again = fetch(f"hf://{NAME}{revision}", cache=cache)

    assert again == first
    assert hub.requests == []
    with pytest.raises(PackageError, match=r"@other was not fetched before .*HF_HUB_OFFLINE=0"):
        fetch(f"hf://{NAME}@other", cache=cache)
    assert hub.requests == []


def test_a_name_that_is_asked_again_costs_one_request(hub, cache):
    hub.add(NAME, FILES)
    fetch(f"hf://{NAME}", cache=cache)
    hub.requests.clear()
    fetch(f"hf://{NAME}", cache=cache)
    assert [one.path for one in hub.requests] == [f"/api/models/{NAME}/revision/main"]


def test_without_data_the_data_stay_and_both_are_kept_apart(hub, cache):
    hub.add(NAME, FILES)
    lean = fetch(f"hf://{NAME}", cache=cache, data=False)
    full = fetch(f"hf://{NAME}", cache=cache)
    assert names(lean.folder) == [name for name in NEEDED if name != "adata.h5ad"]
    assert names(full.folder) == NEEDED
    assert "adata.h5ad" not in lean.provenance["files"]


def test_a_damaged_cache_is_noticed(hub, cache, monkeypatch):
    hub.add(NAME, FILES)
    got = fetch(f"hf://{NAME}", cache=cache)
    content = bytearray(MODEL)
    content[5] ^= 1
    (got.folder / "model.pt").write_bytes(content)
    with monkeypatch.context() as context:
        context.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(PackageError, match="is damaged on this machine"):
            fetch(f"hf://{NAME}", cache=cache)
    assert (fetch(f"hf://{NAME}", cache=cache).folder / "model.pt").read_bytes() == MODEL


@pytest.mark.parametrize("name", ["model.pt", "README.md"])
def test_what_comes_is_checked(hub, cache, name):
    hub.add(NAME, FILES)
    hub.damage = {name}
    with pytest.raises(PackageError, match=f"{name} is not what was announced: its sha") as failure:
        fetch(f"hf://{NAME}", cache=cache)
    assert failure.value.remedy.startswith("Repeat the command")
    hub.damage = set()
    assert (fetch(f"hf://{NAME}", cache=cache).folder / name).read_bytes() == FILES[name]


def test_a_file_that_is_shorter_than_announced_is_not_asked_for_for_ever(hub, cache, monkeypatch):
    monkeypatch.setattr("scviaduct.references.fetching.download._WAIT", 0.01)
    hub.add(NAME, FILES)
    hub.objects[hashlib.sha256(MODEL).hexdigest()] = MODEL[:-10]
    with pytest.raises(PackageError, match=r"model\.pt did not come whole: .*repeat the command"):
        fetch(f"hf://{NAME}", cache=cache)
    assert len(hub.asked(part="/store/")) < 10


def test_a_connection_that_breaks_is_taken_up_again(hub, cache):
    hub.add(NAME, FILES)
    hub.break_after = 1_500_000
    seen = []
    got = fetch(f"hf://{NAME}", cache=cache, data=False, on_progress=seen.append)
    assert (got.folder / "model.pt").read_bytes() == MODEL
    ranges = [one.headers["range"] for one in hub.asked(part="/store/") if "range" in one.headers]
    assert ranges
    assert 0 < int(ranges[0].removeprefix("bytes=").rstrip("-")) <= 1_500_000
    last = [one for one in seen if one.file == "model.pt"][-1]
    assert (last.received, last.size) == (len(MODEL), len(MODEL))


def test_a_killed_download_goes_on_where_it_stopped(hub, cache):
    hub.add(NAME, FILES)
    hub.stall_after = 2_000_000
    code = "import sys, pathlib; from scviaduct.references.fetching.fetch import fetch"
    code += "; fetch(sys.argv[1], cache=pathlib.Path(sys.argv[2]), data=False)"
    child = subprocess.Popen([sys.executable, "-c", code, f"hf://{NAME}", str(cache)])
    assert hub.stalled.wait(60)
    part = next(iter(wait_for(lambda: [p for p in cache.rglob("model.pt.part") if p.stat().st_size >= 1 << 20])))
    os.kill(child.pid, signal.SIGKILL)
    child.wait(30)
    size = part.stat().st_size
    hub.requests.clear()

    got = fetch(f"hf://{NAME}", cache=cache, data=False)

    assert (got.folder / "model.pt").read_bytes() == MODEL
    assert [one.headers.get("range") for one in hub.asked(part="/store/")] == [f"bytes={size}-"]
    assert not hub.asked(part="resolve/main")
    assert not list(cache.rglob("*.part"))


def wait_for(call, seconds=30.0):
    deadline = threading.Event()
    for _ in range(int(seconds / 0.05)):
        if found := call():
            return found
        deadline.wait(0.05)
    raise TimeoutError


def test_a_part_of_something_else_is_thrown_away(hub, cache):
    hub.add(NAME, FILES)
    with pytest.raises(KeyboardInterrupt):
        fetch(f"hf://{NAME}", cache=cache, on_progress=lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    [work] = [path for path in cache.rglob(".*.part") if path.is_dir()]
    (work / "model.pt.part").write_bytes(b"x" * 1000)
    assert (fetch(f"hf://{NAME}", cache=cache).folder / "model.pt").read_bytes() == MODEL


def test_two_calls_at_once_fetch_once(hub, cache):
    hub.add(NAME, FILES)
    got = []
    threads = [threading.Thread(target=lambda: got.append(fetch(f"hf://{NAME}", cache=cache))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len({one.folder for one in got}) == 1
    assert len(got) == 4
    assert len(hub.asked("GET", "/store/")) == 2  # model.pt and adata.h5ad


def everything_about(error: BaseException) -> str:
    """All that an error carries along, at any depth."""
    told, todo, seen = [], [error], set()
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        told.append(f"{one!s} {one!r} {getattr(one, '__dict__', '')}")
        told.extend(str(getattr(getattr(one, name, None), "headers", "")) for name in ("request", "response"))
        todo += [other for other in (one.__cause__, one.__context__) if other is not None]
    return "\n".join(told)


def test_a_private_repository_comes_with_the_token_which_is_nowhere_afterwards(hub, cache, monkeypatch, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    hub.add(NAME, FILES, private=True)
    with pytest.raises(PackageError, match=r"private or does not exist.*set HF_TOKEN"):
        fetch(f"hf://{NAME}", cache=cache)
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    got = fetch(f"hf://{NAME}", cache=cache)

    assert got.provenance["private"] is True
    asked = [one for one in hub.asked() if not one.path.startswith("/store/") and one.status < 400]
    assert {one.headers["authorization"] for one in asked} == {f"Bearer {TOKEN}"}
    assert all("authorization" not in one.headers for one in hub.asked(part="/store/"))  # not the hub's host
    hub.damage = {"README.md"}
    hub.add(NAME, {**FILES, "README.md": b"new"})
    with pytest.raises(PackageError) as failure:
        fetch(f"hf://{NAME}", cache=cache)
    hub.answer = 403
    with pytest.raises(PackageError, match="refuses the token") as refused:
        fetch(f"hf://{NAME}", cache=cache)
    kept = "".join(path.read_text(errors="replace") for path in cache.rglob("*") if path.suffix == ".json")
    printed = "".join(capfd.readouterr())
    places = [kept, printed, json.dumps(got.provenance), everything_about(failure.value)]
    places += [everything_about(refused.value)]
    assert all(TOKEN not in place for place in [*places, caplog.text])
    # The store's signed address: the HTTP client logs it, and nothing of ours keeps it.
    assert all("Signature" not in place for place in places)


def test_a_token_that_is_not_valid_is_told_apart(hub, cache, monkeypatch):
    hub.add(NAME, FILES, private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "wrong" * 5)
    with pytest.raises(PackageError, match=r"refuses the token .*unset it if the repository is public"):
        fetch(f"hf://{NAME}", cache=cache)


@pytest.mark.parametrize(
    ("uri", "problem", "remedy"),
    [
        ("hf://lab/nothing", "lab/nothing is private or does not exist", "reference search"),
        (f"hf://{NAME}@v9", "has no revision 'v9'", "Leave @REVISION out"),
        (f"hf://{NAME}@empty", "holds no model", "hf://scvi-tools/"),
        (f"hf://{NAME}@nested", "holds its models in folders: a, b/c", f"hf://{NAME}#a"),
        (f"hf://{NAME}@nested#d", "no model in 'd', but in a, b/c", f"hf://{NAME}#a"),
        ("hf://lab/gated", "only to those who accepted its conditions", "Accept them at"),
        ("hf://lab", "names no repository", "hf://OWNER/NAME@REVISION"),
        ("hf://a/b/c", "names no repository", "hf://OWNER/NAME@REVISION"),
        ("hf://a/b--c", "no name that the hub allows", "hf://OWNER/NAME@REVISION"),
        ("hf://secret@a/b", "The address names no repository", "hf://OWNER/NAME@REVISION"),
        ("gs://lab/model", "not fetched by 'gs://'", "s3://BUCKET/FOLDER/"),
    ],
)
def test_each_failure_has_words_of_its_own(hub, cache, uri, problem, remedy):
    hub.add(NAME, FILES)
    hub.add(NAME, {"README.md": b"no model"}, branch="empty")
    hub.add(NAME, {"a/model.pt": MODEL, "b/c/model.pt": MODEL}, branch="nested")
    hub.add("lab/gated", FILES, gated=True)
    with pytest.raises(PackageError) as failure:
        fetch(uri, cache=cache)
    assert problem in failure.value.problem
    assert remedy in failure.value.remedy


def test_a_folder_of_a_repository_is_chosen(hub, cache):
    hub.add(NAME, {"a/model.pt": b"a" * 100, "b/model.pt": b"b" * 100})
    got = fetch(f"hf://{NAME}#b", cache=cache)
    assert (got.folder / "model.pt").read_bytes() == b"b" * 100
    assert (fetch(got.provenance["pinned"], cache=cache).folder) == got.folder
    assert (fetch(f"hf://{NAME}#a", cache=cache).folder / "model.pt").read_bytes() == b"a" * 100


def test_no_network_and_no_hub(hub, cache, monkeypatch):
    hub.add(NAME, FILES)
    for status, words in [(500, "answered 500"), (429, "no more requests"), (204, "is no Hugging Face hub")]:
        hub.answer = status
        with pytest.raises(PackageError, match=words):
            fetch(f"hf://{NAME}", cache=cache)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PackageError, match=r"cannot be reached \(ConnectError\).*HF_HUB_OFFLINE=1"):
        fetch(f"hf://{NAME}", cache=cache)


@pytest.mark.parametrize(
    "uri", [f"hf://user:{TOKEN}@lab/heart", f"hf://{TOKEN}@lab/heart", f"hf://lab/heart@main?token={TOKEN}"]
)
def test_a_token_in_the_address_is_refused_and_not_repeated(hub, cache, uri):
    with pytest.raises(PackageError, match="HF_TOKEN") as failure:
        fetch(uri, cache=cache)
    assert TOKEN not in everything_about(failure.value)
    assert hub.requests == []


def test_a_full_disk_and_a_limit(hub, cache, monkeypatch):
    hub.add(NAME, FILES)
    with pytest.raises(PackageError, match="more than the 1,000,000 that are taken"):
        fetch(f"hf://{NAME}", cache=cache, limit=1_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1 << 20}))
    with pytest.raises(PackageError, match=r"no space left .* are needed and 1,048,576 are free.*SCVIADUCT_HOME"):
        fetch(f"hf://{NAME}", cache=cache)
    assert not hub.asked("GET", "/store/")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_fills_up_while_a_file_comes(hub, cache):
    commit = hub.add(NAME, FILES)
    fetch(f"hf://{NAME}", cache=cache, data=False)
    [shelf] = (cache / "hub").glob("*/*")
    work = shelf / f".{commit}.part"
    work.mkdir()
    (work / "model.pt.part").symlink_to("/dev/full")
    with pytest.raises(PackageError, match=r"no space left .*No space left on device.*goes on where it stopped"):
        fetch(f"hf://{NAME}", cache=cache)
    (work / "model.pt.part").unlink()
    assert (fetch(f"hf://{NAME}", cache=cache).folder / "model.pt").read_bytes() == MODEL


def test_a_cache_that_cannot_be_written(hub, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(PackageError, match=r"cannot be written .*SCVIADUCT_HOME"):
        fetch(f"hf://{NAME}", cache=tmp_path / "file")


def test_legacy_files_and_packages_come_whole(hub, cache):
    hub.add("lab/old", {"model_params.pt": b"p", "attr.pkl": b"a", "var_names.csv": b"v", "train.py": b"x"})
    assert names(fetch("hf://lab/old", cache=cache).folder) == ["attr.pkl", "model_params.pt", "var_names.csv"]
    hub.add("lab/new", {"manifest.json": b"{}", "encoder.safetensors": b"e", ".gitattributes": b"g", "sub/x": b"y"})
    assert names(fetch("hf://lab/new", cache=cache).folder) == ["encoder.safetensors", "manifest.json"]


def test_prefixed_models_and_manifests_of_other_programs(hub, cache):
    hub.add("lab/lung", {"manifest.json": b"{}", "lung_model.pt": MODEL, "lung_adata.h5ad": b"d", "train.py": b"x"})
    assert names(fetch("hf://lab/lung", cache=cache).folder) == ["lung_adata.h5ad", "lung_model.pt"]
    assert names(fetch("hf://lab/lung", cache=cache, data=False).folder) == ["lung_model.pt"]
    hub.add("lab/two", {"a_model.pt": MODEL, "b_model_params.pt": MODEL})
    with pytest.raises(PackageError, match=r"hf://lab/two.* several models .*: a_model\.pt, b_model_params\.pt\."):
        fetch("hf://lab/two", cache=cache)
    hub.add("lab/app", {"manifest.json": b"{}", "in/lung_model.pt": MODEL, "web/manifest.json": b"{}"})
    with pytest.raises(PackageError, match=r"holds its models in folders: in\. Name one: hf://lab/app#in"):
        fetch("hf://lab/app", cache=cache)


# The client's own upload without Xet; it sends a file as data.
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_commit_is_uploaded_and_fetched(hub, cache, monkeypatch, tmp_path):
    """The hub itself: what the client uploads is what comes back."""
    from huggingface_hub import HfApi

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folder = tmp_path / "made"
    folder.mkdir()
    card = b"---\nlibrary_name: scvi-tools\nlicense: mit\ntags: [model_cls_name:SCVI]\n---\n# Made\n"
    for name, content in {"model.pt": MODEL, "README.md": card}.items():
        (folder / name).write_bytes(content)
    api = HfApi(endpoint=hub.url)
    api.create_repo("lab/made", private=True)
    made = api.upload_folder(repo_id="lab/made", folder_path=folder)
    slug = api.create_collection("Ours", namespace="lab").slug
    api.add_collection_item(slug, "lab/made", "model")

    got = fetch("hf://lab/made", cache=cache)

    assert got.provenance["commit"] == made.oid
    assert (got.folder / "model.pt").read_bytes() == MODEL
    assert (got.provenance["licence"], got.provenance["private"]) == ("mit", True)
    assert [item.item_id for item in api.get_collection(slug).items] == ["lab/made"]
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PackageError, match="private or does not exist"):
        fetch("hf://lab/made@main", cache=tmp_path / "other")
