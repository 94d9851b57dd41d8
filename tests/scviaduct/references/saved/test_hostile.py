"""A corpus of hostile references: all of it is refused, nothing of it runs, and what should run plainly does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest
from scipy import sparse

from scviaduct.errors import PackageError, UnsafeModelError
from scviaduct.references.saved.contained import check_contained
from tests.scviaduct.references.saved import hostile


def run(*arguments):
    command = [sys.executable, str(Path(__file__).with_name("hostile.py")), *arguments]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads(found.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "corpus"
    folder.mkdir()
    return folder, *hostile.write_corpus(folder)


@pytest.fixture(scope="module")
def results(corpus):
    return run(str(corpus[0]))


def test_the_corpus_is_whole(corpus, results):
    assert len(corpus[1]) >= 100
    assert set(results) == set(corpus[1])


def test_all_of_it_is_refused(results):
    kinds = {"UnsafeModelError", "PackageError", "UnsupportedModelError"}
    assert not {name: told[:2] for name, told in results.items() if told[0] not in kinds}


def test_nothing_of_it_runs(results):
    assert not [name for name, told in results.items() if told[3]]
    assert not {name: told[2] for name, told in results.items() if told[2]}


def test_every_refusal_says_what_to_do(results):
    for name, (_, text, *_) in results.items():
        assert len(text) > 60, name
        assert text.rstrip().endswith((".", "train")) or len(text) == 300, (name, text)


def test_the_canaries_sing(corpus, results):
    """The same files, opened plainly, run what they hold: the corpus is no collection of harmless files."""
    folder, _, singing = corpus
    assert results
    found = run(str(folder), "--plainly", json.dumps(singing))
    assert set(found) == set(singing)
    assert not {name: told for name, told in found.items() if told is not True}


# --- data that is not its own ----------------------------------------------------------------------------------------


@pytest.fixture
def cells(tmp_path):
    made = anndata.AnnData(sparse.random(50, 20, 0.2, "csr", np.float32, random_state=0))
    made.obsm["X_latent"], made.uns["tree"] = np.zeros((50, 2)), {"a": {"b": [1, 2]}}
    made.write_h5ad(tmp_path / "adata.h5ad", compression="gzip")
    return tmp_path / "adata.h5ad"


def test_honest_data_is_taken(cells, shared_data):
    check_contained(cells)
    for path in [*shared_data.glob("*.h5ad"), *shared_data.glob("*.h5mu")]:
        check_contained(path)


def test_a_link_is_followed_by_whoever_does_not_look(tmp_path, cells):
    """What makes the check necessary: anndata reads the other file as if it were this one."""
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["x"] = np.full((50, 20), 42.0)
        file["x"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    with h5py.File(cells, "a") as file:
        del file["X"]
        file["X"] = h5py.ExternalLink("secret.h5", "x")
    assert anndata.read_h5ad(cells).X[0, 0] == 42
    with pytest.raises(UnsafeModelError, match=r"'/X' is a link \(ExternalLink\)"):
        check_contained(cells)


@pytest.mark.parametrize("content", [b"", b"\x89HDF\r\n\x1a\n", b"\x80\x02N."], ids=["empty", "cut", "pickle"])
def test_what_is_no_hdf5_is_told(tmp_path, content):
    (tmp_path / "adata.h5ad").write_bytes(content)
    with pytest.raises(PackageError, match="cannot be read"):
        check_contained(tmp_path / "adata.h5ad")
