"""Training from disk gives what training in memory gives, to the bit, in less memory; what cannot be is refused."""

from __future__ import annotations

import json

import anndata
import numpy as np
import pytest
from scipy import sparse

from scviaduct.errors import InputError
from scviaduct.families import Recipe, family
from scviaduct.references import outofcore
from scviaduct.references.cells import read_cells
from scviaduct.references.latents import ReferenceLatents, Statistics
from scviaduct.references.outofcore import Estimate, Place, Spool
from scviaduct.references.saved.portable import read_model
from scviaduct.references.summing import LatentWriter
from scviaduct.references.training import Options, train
from scviaduct.simulation.cells import Dataset, Simulation
from scviaduct.simulation.census import write_census

SMALL = {"n_latent": "3", "n_hidden": "8"}


@pytest.fixture(scope="module")
def source(cells, tmp_path_factory):
    """Two files with the same cell names, so that datasets and names matter."""
    folder = tmp_path_factory.mktemp("source")
    cells[:50].copy().write_h5ad(folder / "one.h5ad")
    cells[40:].copy().write_h5ad(folder / "two.h5ad")
    return str(folder)


@pytest.fixture(scope="module")
def census(tmp_path_factory):
    """A collection of the Census schema, of which some cells are no primary data."""
    dataset = Dataset("Small", "10x 3' v3", "EFO:0009922", "blood", "UBERON:0000178", donors=3, cells=300)
    return write_census(Simulation((dataset,), genes=60), tmp_path_factory.mktemp("census") / "collection")


def recipe(name="scvi", **told):
    told = {"batch_key": "batch", "genes": 20, "epochs": 2, "device": "cpu", "settings": SMALL} | told
    if name in ("scanvi", "scvi"):
        told |= {"labels_key": "cell_type"}
    if name == "mrvi":
        told |= {"sample_key": "donor", "settings": {}, "batch_size": 31}
    if name == "contrastivevi":
        told |= {"background": ("donor=d1",), "settings": {}}
    if name == "scanvi":
        told |= {"scanvi_epochs": 2}
    return Recipe(family=name, **told)


def both(source, told, folder, **options):
    """The same training in memory and from disk, and what the latter said."""
    said = []
    held = train(source, told, folder / "held", options=Options(out_of_core="no"))
    left = train(source, told, folder / "left", options=Options(out_of_core="yes", say=said.append, **options))
    return held, left, said


@pytest.mark.parametrize("name", ["scvi", "scanvi", pytest.param("mrvi", marks=pytest.mark.slow), "contrastivevi"])
def test_training_from_disk_is_training_in_memory(source, tmp_path, name):
    held, left, said = both(source, recipe(name), tmp_path)
    a, b = (read_model(one.path).state_dict for one in (held, left))
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key].numpy(), b[key].numpy(), err_msg=key)
    first, second = held.latents(), left.latents()
    np.testing.assert_array_equal(first.latent, second.latent)
    np.testing.assert_array_equal(first.variance, second.variance)
    assert first.labels == second.labels
    told = [json.loads((one.path / "manifest.json").read_text()) for one in (held, left)]
    assert told[0]["facts"] == told[1]["facts"]
    assert told[0]["provenance"]["calibration"] == told[1]["provenance"]["calibration"]
    assert left.verify().ok
    assert "left on disk" in said[0]
    assert "100 cells" in said[0]
    assert not list(tmp_path.glob(".*"))  # the counts are gone


def test_counts_are_kept_where_that_is_asked_for(source, tmp_path):
    held, left, _ = both(source, recipe(with_counts=True), tmp_path)
    ours, theirs = (anndata.read_h5ad(one.path / "minified.h5ad") for one in (left, held))
    assert ours.X.nnz > 0
    np.testing.assert_array_equal(ours.X.toarray(), theirs.X.toarray())


def test_what_is_mapped_is_never_copied(source, tmp_path):
    """scvi-tools copies the data to minify it; slices are arrays of their own, and are."""
    counts = read_cells(source, recipe(), place=Place(tmp_path / "counts", "yes")).cells.X
    assert counts.copy() is counts
    some = counts[:5]
    again = some.copy()
    assert again is not some
    assert not np.shares_memory(again.data, some.data)
    assert type(counts.plain()) is sparse.csr_matrix
    assert np.shares_memory(counts.plain().data, counts.data)


def test_cells_of_a_census_with_its_filter_and_version(census, tmp_path):
    """The reader is the source's own: the filter, primary data alone, the pinned version."""
    told = Recipe(family="scvi", batch_key="donor_id", genes=20)
    uri = f"census:2025-11-08?uri={census}&filter=cell_type != 'B cell'"
    held, left = read_cells(uri, told), read_cells(uri, told, place=Place(tmp_path / "counts", "yes"))
    assert (held.uri, held.version, held.features) == (left.uri, left.version, left.features)
    assert 0 < held.cells.n_obs < 300
    np.testing.assert_array_equal(held.cells.X.toarray(), left.cells.X.toarray())
    assert held.cells.obs.equals(left.cells.obs)
    assert not left.cells.X.data.flags.writeable  # it is the file


def test_what_is_whole_is_not_written_again(source, tmp_path, monkeypatch):
    place = Place(tmp_path / "counts", "yes")
    first = read_cells(source, recipe(), place=place)
    monkeypatch.setattr(Spool, "write", lambda *_: pytest.fail("written again"))
    again = read_cells(source, recipe(), first.features, place=place)
    np.testing.assert_array_equal(first.cells.X.toarray(), again.cells.X.toarray())
    assert first.cells.obs.equals(again.cells.obs)
    with pytest.raises(pytest.fail.Exception):  # other obs columns are other cells
        read_cells(source, recipe(categorical_covariates=("donor",)), first.features, place=place)


def test_more_counts_than_32_bits_number(source, tmp_path):
    """Beyond 2**31 counts the columns are numbered with 64 bits, as scipy would; here from 100 counts on."""
    held = read_cells(source, recipe())
    counts = held.cells.X
    plain = read_cells(source, recipe(), place=Place(tmp_path / "counts", "yes"))
    spool = Spool(tmp_path / "wide", "k", counts.shape[1], wide=100)
    with_blocks = Spool(tmp_path / "counts", "k", counts.shape[1])
    spool.folder.mkdir()
    for name in ("indptr", "indices", "data"):
        (spool.folder / name).write_bytes((with_blocks.folder / name).read_bytes())
    outofcore._widen(spool.folder / "indices")
    (spool.folder / "cells.json").write_text(json.dumps({"key": "k", "counts": counts.nnz, "columns": "int64"}))
    assert spool.counts().nnz == counts.nnz
    np.testing.assert_array_equal(spool.counts().toarray(), plain.cells.X.toarray())


def group(folder, names, limit, used, files):
    """A control group's limit, and what it takes, of which so much is files that the kernel keeps."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, told in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{told}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {files}\ntotal_inactive_file {files}\n")


GIB = 1 << 30
VERSIONS = {
    1: ("9:pids:/\n4:cpu,memory:/job/step\n0::/\n", "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
    2: ("0::/job/step\n", "", ("memory.max", "memory.current")),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_free_memory_is_what_every_control_group_leaves(version, tmp_path):
    mine, top, names = VERSIONS[version]
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 1 kB\nMemAvailable:   67108864 kB\n")
    assert outofcore.free_memory(tmp_path) == 64 * GIB
    (tmp_path / "proc/self/cgroup").write_text(mine)
    assert outofcore.free_memory(tmp_path) == 64 * GIB
    root = tmp_path / "sys/fs/cgroup" / top
    group(root, names, "max" if version == 2 else 2**63 - 4096, 40 * GIB, 0)
    assert outofcore.free_memory(tmp_path) == 64 * GIB
    group(root / "job", names, 32 * GIB, 31 * GIB, 20 * GIB)  # most of it is a file that was read
    assert outofcore.free_memory(tmp_path) == 21 * GIB
    group(root / "job/step", names, 8 * GIB, 3 * GIB, GIB)
    assert outofcore.free_memory(tmp_path) == 6 * GIB
    group(root / "job/step", names, 2 * GIB, 3 * GIB, 0)
    assert outofcore.free_memory(tmp_path) == 0


def test_what_the_estimate_decides(source, tmp_path, monkeypatch):
    """Automatic: by a sample of the cells against the memory that is free."""
    said = []
    place = Place(tmp_path / "counts", "auto", said.append)
    read_cells(source, recipe(), place=place)
    assert not said  # not even dense would these cells be many
    assert not place.folder.exists()
    true = read_cells(source, recipe()).cells.X.nnz
    monkeypatch.setattr(outofcore, "free_memory", lambda: true * 12)
    read_cells(source, recipe(), place=place)
    assert "left on disk" in said.pop()
    assert place.folder.is_dir()
    monkeypatch.setattr(outofcore, "free_memory", lambda: true * 25)
    read_cells(source, recipe(), place=Place(tmp_path / "no", "auto", said.append))
    assert "held in memory" in said.pop()
    assert not (tmp_path / "no").exists()


def test_the_estimate_counts():
    told = Estimate(cells=1000, counts=500_000, memory=10_000_000)
    assert (told.held, told.file, told.beyond) == (6_000_000, 4_000_000, True)
    assert str(told) == "1,000 cells of about 500 counts would take 6.0 MB of 10 MB of free memory"
    assert not Estimate(1000, 500_000, 12_000_000).beyond


def test_what_cannot_be(source, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"--out-of-core maybe is not known\. One of auto, yes, no"):
        Place(tmp_path, "maybe").check(family("scvi"))
    for name in ("totalvi", "multivi"):
        with pytest.raises(InputError, match=r"a (TOTALVI|MULTIVI) is set up from a MuData .* twice the counts"):
            Place(tmp_path, "yes").check(family(name))
        Place(tmp_path, "auto").check(family(name))
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(outofcore.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"10 bytes that are free at .* --genes 2000"):
        read_cells(source, recipe(), place=Place(tmp_path / "counts", "yes"))


def test_a_refused_training_leaves_nothing(source, tmp_path):
    told = recipe(settings={"n_latent": "3", "dispersion": "odd"})
    with pytest.raises(InputError, match="refuses"):
        train(source, told, tmp_path / "out", options=Options(out_of_core="yes"))
    assert not list(tmp_path.iterdir())


def test_sums_of_blocks_are_sums_of_all(tmp_path):
    """Running sums of blocks against numpy's of the whole, far from zero, where plain sums of squares would cancel."""
    rng = np.random.default_rng(0)
    latent = (rng.normal(size=(1000, 4)) + 3e3).astype(np.float32)
    labels = [*rng.choice(["a", "b", None], 999), "once"]
    whole = ReferenceLatents(latent, labels, latent**2, {"z": latent[:, :2]})
    names = [str(i) for i in range(1000)]
    with LatentWriter(tmp_path / "blocks.parquet") as writer:
        for low in (0, 10, 11, 600):
            high = {0: 10, 10: 11, 11: 600, 600: 1000}[low]
            part = slice(low, high)
            some = ReferenceLatents(latent[part], labels[part], latent[part] ** 2, {"z": latent[part, :2]})
            writer.add(some, names[part])
    found, true = writer.statistics(latent[0]), Statistics.of(whole, latent[0])
    assert found.labels == true.labels == ("a", "b", "once")
    np.testing.assert_array_equal(found.count, true.count)
    for name in ("mean", "all_mean"):
        np.testing.assert_allclose(getattr(found, name), getattr(true, name), rtol=1e-7)
    for name in ("covariance", "all_covariance"):
        np.testing.assert_allclose(getattr(found, name), getattr(true, name), rtol=1e-5, atol=1e-9)
    back = ReferenceLatents.read(tmp_path / "blocks.parquet")
    np.testing.assert_array_equal(back.latent, latent)
    np.testing.assert_array_equal(back.others["z"], latent[:, :2])
    assert back.labels == labels
