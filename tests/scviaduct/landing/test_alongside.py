"""A shard that is landed while it is read gives the block that it gives anyway, and the piece that landing gives."""

from __future__ import annotations

import contextlib
import resource
from dataclasses import replace

import anndata
import h5py
import numpy as np
import pytest

from scviaduct.errors import DataError
from scviaduct.landing import Landing, land_piece, plan_landing
from scviaduct.landing.alongside import Alongside
from scviaduct.sources import open_shard, open_source


@pytest.mark.parametrize("source", ["file", "census"])
def test_reads_and_lands(source, symphony, census_collection, land, parity, scrambled, tmp_path):
    census = f"census:2026-01-01?uri={census_collection}&var_filter=nnz > 20"
    uri = str(symphony) if source == "file" else census
    landing = Landing.at(tmp_path / "landing")
    with open_source(uri) as opened:
        scan = opened.scan(400)
        plan = plan_landing(opened, 400, scan)
    plan.begin(landing)
    gene_map, n_genes = scrambled(plan.manifest.parts[0].n_genes)
    columns = list(plan.manifest.parts[0].columns)[3:1:-1]
    for _ in range(2):  # while it lands, and when it is landed
        for job in plan.jobs[0]:
            block = Alongside(landing, job).read(job.shard, gene_map, n_genes, columns)
            plain = open_shard(job.shard).read(job.shard, gene_map, n_genes, columns)
            for name in ("indptr", "indices", "data", "rows"):
                np.testing.assert_array_equal(getattr(block, name), getattr(plain, name), strict=True)
            assert block.obs.equals(plain.obs)
            assert (block.shard, block.n_genes) == (plain.shard, plain.n_genes)
    landing.publish(plan.finished(plan.recalled(landing)))
    other, _ = land(uri, tmp_path / "other", 400)
    assert landing.manifest() == other.manifest()
    parity(uri, landing.path, 333)


def test_a_column_that_is_damaged_takes_no_cell_from_the_mapping(symphony, tmp_path):
    path = tmp_path / "damaged.h5ad"
    adata = anndata.read_h5ad(symphony)
    adata.obs["score"] = np.arange(adata.n_obs, dtype=np.float64)
    adata.write_h5ad(path, compression="gzip")
    with h5py.File(path) as file:
        info = file["obs/score"].id.get_chunk_info(0)
    with path.open("r+b") as file:
        file.seek(info.byte_offset)
        file.write(b"\xff" * info.size)
    landing = Landing.at(tmp_path / "landing")
    with open_source(str(path)) as opened:
        plan = plan_landing(opened, 400)
    assert "score" in plan.manifest.parts[0].left_out["score"]
    assert list(plan.manifest.parts[0].columns) == [name for name in adata.obs.columns if name != "score"]
    # Damage that shows only amid the file: the column is to be kept, and the shard is landed later, or not.
    job = plan.jobs[0][0]
    job = replace(job, columns=(*job.columns, "score"))
    block = Alongside(landing, job).read(job.shard, None, None, job.columns[:1])
    plain = open_shard(job.shard).read(job.shard, columns=job.columns[:1])
    np.testing.assert_array_equal(block.data, plain.data, strict=True)
    assert block.obs.equals(plain.obs)
    with pytest.raises(DataError, match="score"):
        land_piece(landing, job)


@contextlib.contextmanager
def files_of_at_most(size):
    """No file of this process grows beyond so many bytes, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_takes_no_cell_from_the_mapping(symphony, tmp_path):
    landing = Landing.at(tmp_path / "landing")
    with open_source(str(symphony)) as opened:
        plan = plan_landing(opened, 400)
    plan.begin(landing)
    job = plan.jobs[0][0]
    with files_of_at_most(1 << 14):
        block = Alongside(landing, job).read(job.shard, None, None, job.columns[:1])
        with pytest.raises(OSError, match="File too large"):
            land_piece(landing, job)
    plain = open_shard(job.shard).read(job.shard, columns=job.columns[:1])
    np.testing.assert_array_equal(block.data, plain.data, strict=True)
    assert block.obs.equals(plain.obs)
    assert [path for path in landing.path.rglob("*") if path.name.startswith(".") and path.is_dir()] == []
    assert land_piece(landing, job).piece.cells == job.shard.cells
