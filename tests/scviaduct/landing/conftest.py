"""Landing in this process, and a landing held against what was landed."""

from __future__ import annotations

import numpy as np
import pytest

from scviaduct.landing import Landing, land_piece, plan_landing
from scviaduct.landing.planning import LandingPlan
from scviaduct.sources import close_shards, open_source


@pytest.fixture(autouse=True)
def _nothing_open():
    close_shards()
    yield
    close_shards()


@pytest.fixture(scope="session")
def land():
    """Land a source; the landing, and how many pieces' counts were written."""

    def run(uri, path, piece_cells=300):
        landing = Landing.at(path)
        with open_source(str(uri)) as source:
            plan: LandingPlan = plan_landing(source, piece_cells)
            plan.begin(landing)
            landed = {job: land_piece(landing, job) for jobs in plan.jobs for job in jobs}
        landing.publish(plan.finished({job: done.piece for job, done in landed.items()}))
        return landing, sum(done.counts_written for done in landed.values())

    return run


@pytest.fixture(scope="session")
def parity():
    """Whether a landing gives what a source gives, to the bit: scan, genes, shards' addresses, counts and obs."""

    def compare(uri, landed, shard_cells=170, columns=None, gene_map=None, n_genes=None):
        with open_source(str(uri)) as source, open_source(str(landed)) as landing:
            columns = landing.obs_columns() if columns is None else columns
            one, other = (held.scan(shard_cells, columns, columns[:1]) for held in (source, landing))
            assert (one.cells, one.columns, one.groups, one.missing) == (
                other.cells,
                other.columns,
                other.groups,
                other.missing,
            )
            for left, right in zip(one.shards, other.shards, strict=True):
                assert (left.address, left.source, left.start, left.stop) == (
                    right.address,
                    right.source,
                    right.start,
                    right.stop,
                )
                assert right.uri.startswith("landing:file:///")
                assert source.genes(left) == landing.genes(right)
                a, b = (held.read(at, gene_map, n_genes, columns) for held, at in ((source, left), (landing, right)))
                for name in ("indptr", "indices", "data", "rows"):
                    mine, its = getattr(a, name), getattr(b, name)
                    assert mine.dtype == its.dtype
                    assert mine.tobytes() == its.tobytes()
                assert a.n_genes == b.n_genes
                assert a.obs.equals(b.obs)
            return one

    return compare


@pytest.fixture
def scrambled():
    """A map of genes onto fewer columns: out of order, some dropped, some shared."""

    def make(n_genes):
        random = np.random.default_rng(0)
        return random.integers(-1, n_genes // 3, n_genes).astype(np.int32), n_genes // 3

    return make
