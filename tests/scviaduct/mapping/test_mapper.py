"""Mapping against scvi-tools itself on the same cells, and what a cell's figures mean."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scvi
from scipy import sparse
from scipy.stats import entropy
from sklearn.neighbors import NearestNeighbors

from scviaduct.errors import DataError, SourceError
from scviaduct.families.vae import quiet
from scviaduct.mapping.mapper import Mapper, model_columns
from scviaduct.mapping.reading import read_block
from scviaduct.references.building import build_package
from scviaduct.references.training import Recipe, train
from scviaduct.values import Settings


@pytest.fixture
def blocks(scan):
    """Every shard of a source in a reference's genes."""

    def blocks(uri, reference, shard_cells=10_000, settings=None):
        columns = model_columns(reference, settings or Settings())
        return [read_block(shard, reference, columns) for shard in scan(uri, shard_cells).shards]

    return blocks


def joined(mappings):
    fields = ("latent", "mapped", "label", "probability", "margin", "entropy")
    return {field: np.concatenate([getattr(mapping, field) for mapping in mappings]) for field in fields}


def exported(reference):
    """The model as scvi-tools loads it."""
    return str(reference.export(Path(tempfile.mkdtemp()) / "model"))


def surgery(reference, query):
    """scvi-tools' own way: load the query into the reference; nothing is trained, since no weight can move a latent."""
    with quiet():
        query = query.copy()
        query.obs["cell_type"] = "unknown"
        model_class = getattr(scvi.model, reference.family)
        folder = exported(reference)
        model_class.prepare_query_anndata(query, folder)
        model = model_class.load_query_data(query, folder, accelerator="cpu")
        model.is_trained = True
        latent = model.get_latent_representation()
        if reference.family != "SCANVI":
            return latent, None, None
        return latent, model.predict(), model.predict(soft=True)


@pytest.fixture(scope="module")
def five_prime(symphony):
    """Real cells of a chemistry that the reference has not seen."""
    cells = anndata.read_h5ad(symphony)
    return cells[cells.obs["batch"] == "5p"].copy()


@pytest.fixture(scope="module")
def by_scvi_tools(pbmc, five_prime):
    return surgery(pbmc, five_prime)


def test_latents_and_labels_are_those_of_scvi_tools(blocks, symphony, pbmc, five_prime, by_scvi_tools):
    (block,) = blocks(f"{symphony}?filter=batch == '5p'", pbmc)
    assert block.obs["observation_id"].to_pylist() == five_prime.obs_names.tolist()
    mapping = Mapper(pbmc, Settings()).map(block)
    latent, labels, soft = by_scvi_tools
    assert mapping.latent.dtype == np.float32
    assert mapping.mapped.all()
    # The first layer is summed over a cell's expressed genes alone, and scvi-tools sums over all in another order:
    # float32 sums of a thousand terms differ in the sixth digit, and no more.
    assert np.abs(mapping.latent - latent).max() / latent.std() <= 1e-5
    assert [mapping.labels[code] for code in mapping.label] == list(labels)
    assert np.mean(five_prime.obs["cell_type"].to_numpy() == labels) > 0.7  # they mean something
    np.testing.assert_allclose(mapping.probability, soft.max(axis=1), atol=1e-5)


def test_a_query_s_labels_are_not_looked_at(blocks, write, pbmc, five_prime):
    query = five_prime[:50].copy()
    (with_labels,) = blocks(write(query, "with"), pbmc)
    query.obs = query.obs[[]]
    (without,) = blocks(write(query, "without"), pbmc)
    mapper = Mapper(pbmc, Settings())
    np.testing.assert_array_equal(mapper.map(with_labels).label, mapper.map(without).label)
    np.testing.assert_array_equal(mapper.map(with_labels).latent, mapper.map(without).latent)


def test_the_figures_are_those_of_all_labels_probabilities(blocks, symphony, pbmc, by_scvi_tools):
    (block,) = blocks(f"{symphony}?filter=batch == '5p'", pbmc)
    mapping = Mapper(pbmc, Settings()).map(block)
    soft = by_scvi_tools[2]
    assert mapping.labels == tuple(soft.columns)
    ordered = np.sort(soft.to_numpy(), axis=1)
    np.testing.assert_allclose(mapping.margin, ordered[:, -1] - ordered[:, -2], atol=1e-5)
    np.testing.assert_allclose(mapping.entropy, entropy(soft.to_numpy(), axis=1), atol=1e-4)
    assert mapping.entropy.max() > 2 * mapping.entropy.min()


@pytest.mark.parametrize("shard_cells", [100, 7])
def test_how_cells_are_cut_into_blocks_changes_nothing(blocks, symphony, pbmc, shard_cells):
    uri = f"{symphony}?filter=batch == '5p' and cell_type in ['B', 'NK', 'DC']"
    mapper = Mapper(pbmc, Settings())
    (block,) = blocks(uri, pbmc)
    whole = mapper.map(block)
    parts = blocks(uri, pbmc, shard_cells)
    assert len(parts) > 1
    cut = joined([mapper.map(part) for part in parts])
    np.testing.assert_array_equal(cut["label"], whole.label)
    for field in ("latent", "probability", "margin", "entropy"):
        np.testing.assert_allclose(cut[field], getattr(whole, field), rtol=0, atol=1e-6)


def test_a_mapper_loaded_again_gives_the_same_bits(blocks, write, make_cells, scanvi):
    (block,) = blocks(write(make_cells()), scanvi)
    one, other = Mapper(scanvi, Settings()).map(block), Mapper(scanvi, Settings()).map(block)
    np.testing.assert_array_equal(one.latent, other.latent)
    np.testing.assert_array_equal(one.entropy, other.entropy)


# Labels by neighbours


@pytest.fixture(scope="module")
def labelled_scvi(symphony, tmp_path_factory):
    """An SCVI of real cells, every tenth without a label, and scvi-tools' own latents of its cells."""
    folder = tmp_path_factory.mktemp("labelled")
    cells = anndata.read_h5ad(symphony)
    cells = cells[cells.obs["batch"] != "5p"].copy()
    with quiet():
        scvi.settings.seed = 0
        scvi.model.SCVI.setup_anndata(cells, batch_key="batch", labels_key="cell_type")
        model = scvi.model.SCVI(cells, n_latent=5)
        model.train(max_epochs=3, accelerator="cpu", enable_progress_bar=False, logger=False)
        model.save(str(folder / "saved"))
        latent = model.get_latent_representation()
    cells.obs["cell_type"] = cells.obs["cell_type"].astype(object)
    cells.obs.iloc[::10, cells.obs.columns.get_loc("cell_type")] = None
    return build_package(folder / "saved", folder / "package", "labelled", cells), latent, cells.obs["cell_type"]


@pytest.mark.parametrize("neighbors", [1, 15])
def test_labels_by_neighbours_are_those_of_scarches(blocks, symphony, five_prime, labelled_scvi, neighbors):
    reference, reference_latent, reference_labels = labelled_scvi
    (block,) = blocks(f"{symphony}?filter=batch == '5p'", reference)
    mapping = Mapper(reference, Settings(neighbors=neighbors)).map(block)
    latent, *_ = surgery(reference, five_prime)
    assert np.abs(mapping.latent - latent).max() / latent.std() <= 1e-5
    # scArches' weighted_knn_trainer and weighted_knn_transfer, on scvi-tools' latents.
    labelled = reference_labels.notna().to_numpy()
    labels = reference_labels[labelled].to_numpy()
    knn = NearestNeighbors(n_neighbors=neighbors, algorithm="brute").fit(reference_latent[labelled])
    distances, indices = knn.kneighbors(latent)
    with np.errstate(divide="ignore"):
        stds = ((2.0 / np.std(distances, axis=1)) ** 2).reshape(-1, 1)
    weights = np.exp(-np.true_divide(distances, stds))
    weights /= weights.sum(axis=1, keepdims=True)
    votes = np.array(
        [[w[labels[i] == name].sum() for name in mapping.labels] for w, i in zip(weights, indices, strict=True)]
    )
    assert mapping.labels == tuple(sorted(set(labels)))
    np.testing.assert_allclose(mapping.probability, votes.max(axis=1), atol=1e-4)
    ordered = np.sort(votes, axis=1)
    np.testing.assert_allclose(mapping.margin, ordered[:, -1] - ordered[:, -2], atol=2e-4)
    np.testing.assert_allclose(mapping.entropy, entropy(votes, axis=1), atol=1e-3)
    sure = ordered[:, -1] - ordered[:, -2] > 1e-3
    assert sure.mean() > 0.9
    assert (mapping.label[sure] == votes.argmax(axis=1)[sure]).all()
    assert len(set(mapping.label[sure].tolist())) > 2


def test_one_neighbour_is_certain(blocks, symphony, labelled_scvi):
    reference = labelled_scvi[0]
    (block,) = blocks(f"{symphony}?filter=batch == '5p' and cell_type == 'NK'", reference)
    mapping = Mapper(reference, Settings(neighbors=1)).map(block)
    assert (mapping.probability == 1).all()
    assert (mapping.margin == 1).all()
    assert (mapping.entropy == 0).all()


def assert_no_label(mapping):
    assert mapping.labels == ()
    assert (mapping.label == -1).all()
    for figure in (mapping.probability, mapping.margin, mapping.entropy):
        assert np.isnan(figure).all()


def test_a_package_without_latents_gives_null_labels(blocks, symphony, labelled_scvi, tmp_path):
    bare = build_package(labelled_scvi[0].path.parent / "saved", tmp_path / "bare", "bare")
    assert not bare.has_latents
    (block,) = blocks(f"{symphony}?filter=batch == '5p'", bare)
    mapping = Mapper(bare, Settings()).map(block)
    assert_no_label(mapping)
    np.testing.assert_array_equal(mapping.latent, Mapper(labelled_scvi[0], Settings()).map(block).latent)


def test_a_reference_whose_cells_have_no_labels_gives_null_labels(blocks, write, make_cells, conditional):
    assert conditional.has_latents
    (block,) = blocks(write(make_cells()), conditional)
    mapping = Mapper(conditional, Settings()).map(block)
    assert_no_label(mapping)
    assert mapping.mapped.all()


# Cells without evidence, and cells that cannot be mapped


def test_a_cell_without_counts_has_neither_latent_nor_label(blocks, write, make_cells, scanvi):
    adata = make_cells()
    whole = Mapper(scanvi, Settings()).map(blocks(write(adata, "whole"), scanvi)[0])
    dense = adata.X.toarray()
    empty = [0, 1, 30, 59]
    dense[empty] = 0
    adata.X = sparse.csr_matrix(dense)
    mapping = Mapper(scanvi, Settings()).map(blocks(write(adata), scanvi)[0])
    assert np.flatnonzero(~mapping.mapped).tolist() == empty
    assert (mapping.label[empty] == -1).all()
    for field in ("latent", "probability", "margin", "entropy"):
        values = getattr(mapping, field)
        assert np.isnan(values[empty]).all()
        rest = np.setdiff1d(np.arange(60), empty)
        np.testing.assert_allclose(values[rest], getattr(whole, field)[rest], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(mapping.label[mapping.mapped], whole.label[mapping.mapped])


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_stored_zeros_are_no_counts(blocks, write, make_cells, scanvi, zero):
    (block,) = blocks(write(make_cells()), scanvi)
    data = block.data.copy()
    data[: block.indptr[1]] = zero
    data.flags.writeable = False
    assert np.flatnonzero(~Mapper(scanvi, Settings()).map(replace(block, data=data)).mapped).tolist() == [0]


def test_a_block_without_cells(write, scan, make_cells, scanvi):
    (shard,) = scan(write(make_cells())).shards
    mapping = Mapper(scanvi, Settings()).map(read_block(shard, scanvi, (), 0))
    assert mapping.latent.shape == (0, scanvi.n_latent)
    assert len(mapping.label) == len(mapping.mapped) == len(mapping.entropy) == 0


def test_a_latent_that_is_not_finite_names_its_cell(blocks, write, make_cells, scanvi, monkeypatch):
    (block,) = blocks(write(make_cells()), scanvi)
    mapper = Mapper(scanvi, Settings())
    encode = mapper._encoder.encode

    def broken(*arguments):
        encoded = encode(*arguments)
        encoded.mean[17, 0] = np.nan
        return encoded

    monkeypatch.setattr(mapper._encoder, "encode", broken)
    with pytest.raises(DataError) as error:
        mapper.map(block)
    assert error.value.problem == "Cell 'cell17' of dataset 'query' encodes to a latent that is not finite."
    assert error.value.remedy


# Covariates that the encoder reads


def by_loading(reference, query):
    """scvi-tools' latents of cells whose batches and covariates the model knows."""
    with quiet():
        model = scvi.model.SCVI.load(exported(reference), query.copy(), accelerator="cpu")
        return model.get_latent_representation()


def test_known_batches_and_covariates_are_read_as_scvi_tools_does(blocks, write, make_cells, conditional):
    query = make_cells(90, 7)
    query = query[query.obs["batch"] != "b1"].copy()  # positions among the query's batches are not the reference's
    latent = by_loading(conditional, query)
    settings = Settings(batch_key="donor")
    query.obs = query.obs.rename(columns={"batch": "donor"})
    (block,) = blocks(write(query), conditional, settings=settings)
    mapper = Mapper(conditional, settings)
    mapping = mapper.map(block)
    assert np.abs(mapping.latent - latent).max() / latent.std() <= 1e-5
    for column, values in {
        "donor": pa.array(["b1"] * 60),
        "sex": pa.array(["f"] * 60),
        "age": pa.array(np.full(60, 99.0)),
    }.items():
        obs = block.obs.set_column(block.obs.column_names.index(column), column, values)
        moved = np.abs(mapper.map(replace(block, obs=obs)).latent - mapping.latent).max()
        assert moved > 1e-2 * latent.std(), f"{column} moves nothing"


@pytest.mark.parametrize("column", ["fresh", "lane"])
def test_batches_that_are_not_text(blocks, write, make_cells, trained, column):
    reference = trained(f"by_{column}", "scvi", batch_key=column, settings={"encode_covariates": "True"})
    query = make_cells(30, 7)
    (block,) = blocks(write(query), reference)
    query.obs[column] = query.obs[column].astype(str).astype("category")
    latent = by_loading(reference, query)
    assert np.abs(Mapper(reference, Settings()).map(block).latent - latent).max() / latent.std() <= 1e-5


def test_categories_that_are_real_numbers(blocks, write, make_cells, tmp_path):
    """Whole numbers become them in pandas where one is missing; sources spell 1.0 as 1."""
    cells = make_cells(120, 7, pool=pd.Categorical([(1.0, 2.0, 0.5)[i % 3] for i in range(120)]))
    told = cells.copy()
    with quiet():
        scvi.model.SCVI.setup_anndata(told, batch_key="pool")
        model = scvi.model.SCVI(told, encode_covariates=True, n_hidden=8, n_latent=3)
        model.train(1, accelerator="cpu")
        model.save(str(tmp_path / "model"), save_anndata=True)
        latent = model.get_latent_representation()
    reference = build_package(tmp_path / "model", tmp_path / "package", "pools", labels_key="pool")
    assert reference.batch_categories == ("0.5", "1", "2")
    assert set(reference.latents().labels) == {"0.5", "1", "2"}
    (block,) = blocks(write(cells), reference)
    assert np.abs(Mapper(reference, Settings()).map(block).latent - latent).max() / latent.std() <= 1e-5


def test_a_reference_trained_on_categories_that_are_real_numbers(blocks, write, make_cells, tmp_path):
    cells = make_cells(120, 7, pool=pd.Categorical([(1.0, 2.0, 0.5)[i % 3] for i in range(120)]))
    recipe = Recipe(family="scvi", genes=0, epochs=1, batch_key="pool", settings={"encode_covariates": "True"})
    reference = train(str(write(cells)), replace(recipe, device="cpu"), tmp_path / "out")
    assert reference.batch_categories == ("0.5", "1", "2")
    (block,) = blocks(write(cells), reference)
    cells.obs["pool"] = cells.obs["pool"].map({1.0: "1", 2.0: "2", 0.5: "0.5"})
    latent = by_loading(reference, cells)
    assert np.abs(Mapper(reference, Settings()).map(block).latent - latent).max() / latent.std() <= 1e-5


@pytest.mark.parametrize("least", [2**24 + 1, 2**53 + 1])  # float32, and float64, hold every second from there on
def test_a_continuous_covariate_of_large_integers(blocks, write, make_cells, conditional, least):
    large = np.arange(60) + least
    (block,) = blocks(write(make_cells(age=large), "integers"), conditional)
    assert block.obs["age"].type == pa.int64()
    (real,) = blocks(write(make_cells(age=large.astype(float)), "reals"), conditional)
    mapper = Mapper(conditional, Settings())
    np.testing.assert_array_equal(mapper.map(block).latent, mapper.map(real).latent)


def test_a_continuous_covariate_of_yes_and_no(blocks, write, make_cells, conditional):
    told = np.arange(60) % 2 == 0
    (block,) = blocks(write(make_cells(age=told), "booleans"), conditional)
    assert block.obs["age"].type == pa.bool_()
    (real,) = blocks(write(make_cells(age=told.astype(float)), "reals"), conditional)
    mapper = Mapper(conditional, Settings())
    np.testing.assert_array_equal(mapper.map(block).latent, mapper.map(real).latent)


KNOWN_ONLY = "A new value needs an adapter, which surgery fits: --surgery auto. A missing one must be filled."
FINITE_ONLY = "Give every cell a finite value."


@pytest.mark.parametrize(
    ("column", "value", "problem", "remedy"),
    [
        ("batch", "b9", "Batch 'batch' of {} is 'b9', not one that the reference was trained on ({}).", KNOWN_ONLY),
        (
            "batch",
            None,
            "Batch 'batch' of {} has no value, not one that the reference was trained on ({}).",
            KNOWN_ONLY,
        ),
        ("sex", "x", "Covariate 'sex' of {} is 'x', not one that the reference was trained on ({}).", KNOWN_ONLY),
        ("age", np.inf, "Covariate 'age' of {} is inf.", FINITE_ONLY),
        ("age", np.nan, "Covariate 'age' of {} is nan.", FINITE_ONLY),
        ("age", 1e300, "Covariate 'age' of {} is inf.", FINITE_ONLY),  # beyond float32
    ],
)
def test_covariates_that_cannot_be_mapped(blocks, write, make_cells, conditional, column, value, problem, remedy):
    values = make_cells().obs[column].tolist()
    values[3] = value
    (block,) = blocks(write(make_cells(**{column: values})), conditional)
    with pytest.raises(DataError) as error:
        Mapper(conditional, Settings()).map(block)
    known = {"batch": "b0, b1, b2", "sex": "f, m"}.get(column)
    assert error.value.problem == problem.format("cell 'cell3' in dataset 'query'", known)
    assert error.value.remedy == remedy


def test_a_covariate_that_the_source_lacks(blocks, write, make_cells, conditional):
    query = make_cells()
    query.obs = query.obs.drop(columns="age")
    with pytest.raises(SourceError, match=r"has no obs column 'age'\. There are: batch, cell_type"):
        blocks(write(query), conditional)


@pytest.mark.parametrize(
    ("encodes", "batch_key", "columns"),
    [(True, "", ("batch", "sex", "age")), (True, "donor", ("donor", "sex", "age")), (False, "donor", ())],
)
def test_the_columns_that_a_model_reads(conditional, encodes, batch_key, columns):
    reference = replace(conditional, encode_covariates=encodes)
    assert model_columns(reference, Settings(batch_key=batch_key)) == columns
