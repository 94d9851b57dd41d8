"""The sample of a query batch is the same cells whatever the shards, their order and the version of the source."""

from __future__ import annotations

from dataclasses import replace

import anndata
import numpy as np
import pytest
from scipy import sparse
from scipy.stats import kstest

from scviaduct.errors import DataError, InputError, SourceError
from scviaduct.mapping import sampling
from scviaduct.mapping.batches import QueryBatch, group_columns, query_batches
from scviaduct.mapping.sampling import merge_samples, sample_batches
from scviaduct.references.package import Reference
from scviaduct.sources import open_source
from scviaduct.values import GeneTable, Settings

B1, B2 = QueryBatch((("batch", "B1"),)), QueryBatch((("batch", "B2"),))
X1 = QueryBatch((("batch", "B1"), ("covariate:sex", "x")))


@pytest.fixture
def reference(make_cells, tmp_path):
    """Facts of an encoder that reads a batch, sexes and ages, of every second gene; the model is not touched."""
    return Reference(
        path=tmp_path,
        name="odd",
        digest="d" * 32,
        family="SCVI",
        genes=GeneTable({"index": tuple(make_cells().var_names[::2])}),
        n_latent=10,
        encode_covariates=True,
        scvi_version="1.5.1",
        batch_key="batch",
        batch_categories=("b0", "b1"),
        categorical_covariates={"sex": ("f", "m")},
        continuous_covariates=("age",),
    )


@pytest.fixture
def query(make_cells):
    """400 cells: half of a new batch, a sixteenth of it of a new sex, an eighth of another batch."""
    batches = [["B1", "b0", "B1", "B2", "B1", "b1", "B1", "b0"][i % 8] for i in range(400)]
    return make_cells(400, batch=batches, sex=["x" if i % 16 == 0 else "fm"[i % 2] for i in range(400)])


@pytest.fixture
def sampled(write):
    """Samples of the query batches of an AnnData, or of a source that is there."""

    def sampled(adata, reference, cells=30, seed=0, wanted=None, shard_cells=1000, turn=1, columns=(), **options):
        told = Settings()
        uri = write(adata) if hasattr(adata, "obs") else adata
        with open_source(str(uri)) as source:
            scan = source.scan(shard_cells, groups=group_columns(reference, told, **options))
        batches = tuple(query_batches(reference, told, scan, **options).cells) if wanted is None else wanted
        return sample_batches(scan.shards[::turn], reference, told, batches, cells, seed, columns=columns, **options)

    return sampled


def matrix(sample):
    return sparse.csr_matrix((sample.data, sample.indices, sample.indptr), shape=(sample.n_cells, sample.n_genes))


def test_a_sample_holds_its_cells(sampled, query, reference):
    samples = sampled(query, reference)
    assert list(samples) == [B1, X1, B2]
    assert {batch: sample.seen for batch, sample in samples.items()} == {B1: 175, X1: 25, B2: 50}
    assert {batch: sample.n_cells for batch, sample in samples.items()} == {B1: 30, X1: 25, B2: 30}
    for batch, sample in samples.items():
        cells = query[list(sample.observation_ids)]
        np.testing.assert_array_equal(matrix(sample).toarray(), cells.X.toarray()[:, ::2])
        assert (sample.indptr.dtype, sample.indices.dtype, sample.data.dtype) == (np.int64, np.int32, np.float32)
        assert sample.obs.column_names == ["batch", "sex", "age"]
        for column in sample.obs.column_names:
            assert sample.obs[column].to_pylist() == cells.obs[column].tolist()
        assert {str(sample.obs[name].type) for name in ("batch", "sex")} == {"string"}
        assert set(cells.obs["batch"]) == {batch.values[0][1]}
        assert (cells.obs["sex"] == "x").all() == (len(batch.values) == 2)
        assert set(sample.datasets) == {"query"}
        assert (np.diff(sample.hashes.astype(object)) > 0).all()


@pytest.mark.parametrize(("shard_cells", "turn"), [(7, 1), (7, -1), (50, -1), (399, 1)])
def test_shards_and_their_order_change_nothing(sampled, query, reference, shard_cells, turn):
    whole = sampled(query, reference)
    cut = sampled(query, reference, shard_cells=shard_cells, turn=turn)
    assert cut.keys() == whole.keys()
    for batch, sample in whole.items():
        assert cut[batch].digest == sample.digest
        assert cut[batch].observation_ids == sample.observation_ids
        assert cut[batch].seen == sample.seen


def test_another_version_of_the_source_gives_the_same_cells(sampled, query, reference):
    whole = sampled(query, reference, cells=1000)
    rows = np.random.default_rng(0).permutation(400)
    dense = anndata.AnnData(query.X.toarray(), obs=query.obs, var=query.var)[rows, ::-1].copy()
    again = sampled(dense, reference, cells=1000)
    assert {batch: sample.digest for batch, sample in again.items()} == {b: s.digest for b, s in whole.items()}
    more = anndata.concat([query, query[:40]], index_unique="-", merge="same")
    more.obs_names = [name.removesuffix("-0") for name in more.obs_names]
    grown = sampled(more, reference, cells=1000)[B1]
    kept = [name for name in grown.observation_ids if not name.endswith("-1")]
    assert kept == list(whole[B1].observation_ids)


def test_a_smaller_sample_is_the_start_of_a_larger(sampled, query, reference):
    few, many = sampled(query, reference, cells=5), sampled(query, reference, cells=25)
    for batch in many:
        assert few[batch].observation_ids == many[batch].observation_ids[:5]


def test_the_seed_and_the_dataset_decide(sampled, query, reference, write):
    zero, one = sampled(query, reference)[B1], sampled(query, reference, seed=1)[B1]
    assert set(zero.observation_ids) != set(one.observation_ids)
    assert zero.digest != one.digest
    other = sampled(write(query, "other"), reference)[B1]
    assert set(other.observation_ids) != set(zero.observation_ids)


def test_hashes_are_uniform_and_of_seed_dataset_and_id():
    ids = [f"cell{i}" for i in range(5000)]
    hashes = sampling.hashes_of("d", ids, 0)
    assert kstest(hashes.astype(np.float64) / 2**64, "uniform").pvalue > 0.01
    assert len(set(hashes.tolist())) == 5000
    assert abs(np.corrcoef(hashes.astype(float), sampling.hashes_of("d", ids, 1).astype(float))[0, 1]) < 0.05


def test_parts_merge_into_the_whole(sampled, query, reference, scan, write):
    whole = sampled(query, reference)
    shards = scan(write(query), 60).shards
    wanted = tuple(whole)
    parts = [sample_batches([shard], reference, Settings(), wanted, 30, 0) for shard in shards]
    for order in (parts, parts[::-1], [merge_samples(parts[:3], 30), merge_samples(parts[3:], 30)]):
        merged = merge_samples(order, 30)
        assert {batch: (s.digest, s.seen) for batch, s in merged.items()} == {
            batch: (s.digest, s.seen) for batch, s in whole.items()
        }
    assert merge_samples(parts[:1], 2)[B1].n_cells == 2
    assert merge_samples([], 5) == {}


def test_each_shard_is_read_once(sampled, query, reference, monkeypatch):
    seen, read = [], sampling.read_block
    monkeypatch.setattr(sampling, "read_block", lambda shard, *rest: seen.append(shard.start) or read(shard, *rest))
    sampled(query, reference, shard_cells=100)
    assert seen == [0, 100, 200, 300]


def test_cells_without_a_count_are_not_taken(sampled, query, reference):
    dense = query.X.toarray()
    dense[:200, ::2] = 0  # their counts are of genes that the reference does not know
    query.X = sparse.csr_matrix(dense)
    sample = sampled(query, reference, cells=1000)[B1]
    assert (sample.n_cells, sample.seen) == (88, 88)
    assert all(int(name.removeprefix("cell")) >= 200 for name in sample.observation_ids)
    query.X = sparse.csr_matrix((400, 40), dtype=np.float32)
    empty = sampled(query, reference)[B1]
    assert (empty.n_cells, empty.seen, empty.obs.num_rows) == (0, 0, 0)


def test_explicit_zeros_change_neither_cells_nor_digest(sampled, query, reference):
    told = sampled(query, reference)[B1]
    cells, genes = query.shape
    every = np.tile(np.arange(genes), cells), np.arange(cells + 1) * genes
    query.X = sparse.csr_matrix((query.X.toarray().ravel(), *every), shape=query.shape)
    assert query.X.nnz == cells * genes
    assert sampled(query, reference)[B1].digest == told.digest


def test_the_digest_is_of_counts_obs_and_ids(sampled, query, reference):
    told = sampled(query, reference)[X1]
    counts, aged, named = query.copy(), query.copy(), query.copy()
    cell = told.observation_ids[0]
    counts.X = sparse.csr_matrix(counts.X.toarray() + 2 * (counts.obs_names == cell)[:, None])
    aged.obs.loc[cell, "age"] += 1e-9
    named.obs_names = [f"{name}!" if name == cell else name for name in named.obs_names]
    digests = {sampled(adata, reference)[X1].digest for adata in (query, counts, aged, named)}
    assert len(digests) == 4


def test_batches_that_are_not_wanted_or_not_there(sampled, query, reference):
    absent = QueryBatch((("batch", "nowhere"),))
    samples = sampled(query, reference, wanted=[B2, absent])
    assert list(samples) == [B2, absent]
    assert (samples[absent].n_cells, samples[absent].seen) == (0, 0)
    with pytest.raises(InputError, match="A sample cannot hold 0 cells"):
        sampled(query, reference, cells=0)


def test_what_the_decoder_reads_comes_along_where_the_source_has_it(sampled, query, reference):
    samples = replace(reference, sample_key="fresh", sample_categories=("True",), batch_encoded=False)
    (by_sample,) = [item for item in sampled(query, samples) if item.values == (("sample", "False"),)]
    sample = sampled(query, samples)[by_sample]
    assert set(sample.obs["batch"].to_pylist()) <= {"b0", "b1", "B1", "B2"}
    without = query.copy()
    without.obs = without.obs.drop(columns="batch")
    assert "batch" not in sampled(without, samples)[by_sample].obs.column_names
    deaf = replace(reference, encode_covariates=False)
    assert sampled(query, deaf) == {}
    decoded = sampled(query, deaf, decoder=True)
    assert list(decoded) == [B1, B2]
    assert decoded[B1].obs.column_names == ["batch", "sex", "age"]
    without.obs["batch"] = query.obs["batch"]
    without.obs = without.obs.drop(columns=["age", "sex"])
    assert sampled(without, deaf, decoder=True)[B1].obs.column_names == ["batch"]


def test_files_of_which_one_lacks_what_the_encoder_does_not_read(sampled, query, reference, write):
    samples = replace(reference, sample_key="fresh", sample_categories=("True",), batch_encoded=False)
    without = query[200:].copy()
    without.obs = without.obs.drop(columns="batch")
    write(query[:200].copy(), "a")
    folder = write(without, "b").parent
    told = sampled(folder, samples, cells=1000)[QueryBatch((("sample", "False"),))]
    assert told.n_cells == 300
    lacking = [value is None for value in told.obs["batch"].to_pylist()]
    assert lacking == [dataset == "b" for dataset in told.datasets]
    turned = sampled(folder, samples, cells=1000, turn=-1, shard_cells=30)[QueryBatch((("sample", "False"),))]
    assert turned.digest == told.digest


def test_a_column_of_cells_that_are_cut_is_left_out(sampled, query, reference, write, scan):
    deaf = replace(reference, encode_covariates=False)
    query.obs["batch"] = "B1"
    without = query[:390].copy()
    without.obs = without.obs.drop(columns="age")
    write(without, "a")
    folder = write(query[390:].copy(), "b").parent
    shards = scan(folder, 50).shards
    columns = set()
    for cells in (1, 2, 3, 1000):
        told = sampled(folder, deaf, cells=cells, decoder=True)[B1]
        parts = [sample_batches([shard], deaf, Settings(), [B1], cells, 0, decoder=True) for shard in shards]
        assert merge_samples(parts, cells)[B1].digest == told.digest
        assert merge_samples(parts[::-1], cells)[B1].digest == told.digest
        assert ("age" in told.obs.column_names) == ("b" in told.datasets)
        columns.add("age" in told.obs.column_names)
    assert columns == {True, False}


def test_further_columns_come_along_as_text(sampled, query, reference):
    query.obs["guide"] = [None if i % 4 else f"g{i % 3}" for i in range(400)]
    sample = sampled(query, reference, columns=["guide", "lane", "batch"])[B1]
    told = query.obs.loc[list(sample.observation_ids)]
    assert sample.obs["guide"].to_pylist() == [value if isinstance(value, str) else "" for value in told["guide"]]
    assert sample.obs["lane"].to_pylist() == told["lane"].astype(str).tolist()
    assert sample.obs["batch"].to_pylist() == told["batch"].tolist()
    query.obs["guide"] = [None, *["g"] * 399]
    assert sampled(query, reference, columns=["guide"])[B1].digest != sampled(query, reference)[B1].digest
    with pytest.raises(SourceError, match="no obs column 'nowhere'"):
        sampled(query, reference, columns=["nowhere"])


def test_a_size_factor_comes_along_and_must_be_positive(sampled, query, reference):
    sized = replace(reference, size_factor_key="depth")
    with pytest.raises(SourceError, match="no obs column 'depth'"):
        sampled(query, sized)
    query.obs["depth"] = np.arange(400) + 1
    sample = sampled(query, sized)[B1]
    assert sample.obs["depth"].to_pylist() == query.obs.loc[list(sample.observation_ids), "depth"].tolist()
    query.obs["depth"] = 0
    with pytest.raises(DataError, match=r"Cell 'cell\d+' of dataset 'query' has 0 in obs column 'depth'"):
        sampled(query, sized)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"age": [np.inf] * 400}, r"has inf in obs column 'age'. Give every cell a finite number"),
        ({"age": [np.nan] * 400}, r"has no value in obs column 'age'"),
        ({"age": ["old"] * 400}, r"obs column 'age' holds text, such as 'old'"),
        ({"sex": [None, *["f"] * 399]}, r"Cell 'cell0' of dataset 'query' has no value in obs column 'sex'"),
    ],
)
def test_a_covariate_that_is_none_is_an_error(sampled, query, reference, change, told):
    query.obs = query.obs.assign(**change)
    with pytest.raises(DataError, match=told):
        sampled(query, reference, wanted=[B1])


@pytest.mark.parametrize("value", [np.nan, np.inf, -1])
def test_what_is_not_a_count_is_an_error(sampled, query, reference, value):
    dense = query.X.toarray()
    dense[:, 4] = value
    query.X = sparse.csr_matrix(dense)
    with pytest.raises(DataError, match=rf"Cell 'cell\d+' of dataset 'query' has {value:g} of a gene"):
        sampled(query, reference)


def test_real_batches_of_a_screen(shared_data, scan):
    path = shared_data / "perturb_thp1_eccite_sceptre.h5ad"
    cells = anndata.read_h5ad(path, backed="r")
    facts = {"genes": GeneTable({"index": tuple(cells.var_names)}), "n_latent": 10, "scvi_version": "1.5.1"}
    reference = Reference(
        path=shared_data, name="thp1", digest="d" * 32, family="SCVI", encode_covariates=True, batch_key="batch",
        batch_categories=("rep_1", "other"), **facts,
    )  # fmt: skip
    with open_source(str(path)) as source:
        whole, cut = (source.scan(size, groups=["batch"]) for size in (30_000, 3000))
    batches = query_batches(reference, Settings(), cut)
    assert {batch.name: n for batch, n in batches.cells.items()} == {"batch=rep_2": 6001, "batch=rep_3": 5300}
    wanted = tuple(batches.cells)
    first = sample_batches(whole.shards, reference, Settings(), wanted, 500, 0)
    second = sample_batches(batches.shards_of(*wanted), reference, Settings(), wanted, 500, 0)
    for batch in wanted:
        assert first[batch].digest == second[batch].digest
        chosen = cells.obs.index.get_indexer(list(first[batch].observation_ids))
        assert set(cells.obs["batch"].iloc[chosen]) == {batch.values[0][1]}
        # Uniform over the file: the mean place is that of all cells of the batch, within 4 standard errors.
        places = np.flatnonzero(cells.obs["batch"] == batch.values[0][1])
        assert abs(chosen.mean() - places.mean()) < 4 * places.std() / np.sqrt(500)
