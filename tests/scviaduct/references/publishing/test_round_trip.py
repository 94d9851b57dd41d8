"""All seven families: published to a hub, loaded from there by plain scvi-tools, and fetched back as a package."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import anndata
import numpy as np
import pyarrow.parquet as pq
import pytest
from scvi.hub import HubModel

from scviaduct.families.vae import quiet
from scviaduct.mapping.mapper import Mapper, model_columns
from scviaduct.mapping.reading import read_block
from scviaduct.references.building import build_package
from scviaduct.references.calibration import Calibration
from scviaduct.references.fetching.fetch import fetch
from scviaduct.references.fetching.searching import search
from scviaduct.references.latents import Statistics
from scviaduct.references.manifest import MANIFEST, file_digest, manifest_digest, read_manifest
from scviaduct.references.package import CALIBRATION, LATENTS, STATISTICS, TEMPLATE, Reference
from scviaduct.references.publishing.repository import Options, write_repository
from scviaduct.references.publishing.upload import target_of, upload
from scviaduct.references.registry import Registry
from scviaduct.references.summing import LatentWriter
from scviaduct.references.template import encode_cells, encode_template
from scviaduct.sources import open_source
from scviaduct.sources.opening import close_shards
from scviaduct.values import Settings
from tests.scviaduct.references.publishing.conftest import SOURCES

pytest_plugins = ["tests.support.fixtures"]
# The client itself uploads in a way that its HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
MINIFIED = ("SCVI", "SCANVI", "TOTALVI")
KEYS = {"ContrastiveVI": {"representation_kind": "background"}, "MRVI": {"use_mean": True}}


def latent_of(model, data=None):
    with quiet():
        return model.get_latent_representation(data, **KEYS.get(type(model).__name__, {}))


@pytest.fixture
def publish(lab, tmp_path):
    """Publish a package; its commit."""

    def run(reference, **options):
        name = f"lab/{reference.name}"
        contents = write_repository(reference, name, tmp_path / "repository", Options(**options))
        return name, upload(contents, target_of(f"hf://{name}")), contents

    return run


@pytest.mark.parametrize("name", SOURCES)
def test_scvi_tools_loads_what_is_published(name, made, publish, tmp_path):
    ours = made(name)

    repository, commit, contents = publish(ours.reference, tissues=("blood",))

    with quiet():
        pulled = HubModel.pull_from_huggingface_hub(repository, cache_dir=str(tmp_path / "hf"), revision=commit)
        model = pulled.model
    assert type(model).__name__ == name == pulled.metadata.model_cls_name
    assert f"model_cls_name:{name}" in pulled.model_card.data.tags
    assert contents.data == ("minified" if name in MINIFIED else "template")
    assert model.is_trained

    if name in MINIFIED:  # the model comes with the latents of its own cells
        assert model.minified_data_type == "latent_posterior_parameters"
        np.testing.assert_allclose(latent_of(model), ours.reference.latents().latent, atol=1e-4)
    with quiet():
        pulled.load_model(adata=ours.own, accelerator="cpu")
    expected = encode_cells(ours.reference.encoder(), ours.flat.X, ours.flat.obs, ours.reference).mean
    np.testing.assert_allclose(latent_of(pulled.model), expected, atol=1e-4)


@pytest.mark.parametrize("name", SOURCES)
def test_it_comes_back_as_the_same_reference(name, made, publish, tmp_path):
    ours = partly_labelled(made(name).reference, tmp_path / "labelled")
    repository, commit, _ = publish(ours)

    fetched = fetch(f"hf://{repository}@{commit}", cache=tmp_path / "cache")
    again = build_package(fetched.folder, tmp_path / "again", "again", provenance=fetched.provenance)

    template = anndata.read_h5ad(ours.path / TEMPLATE)
    before = encode_template(ours.encoder(), template, ours)
    np.testing.assert_array_equal(encode_template(again.encoder(), template, again), before)
    assert (again.family, again.names, again.genes.modality) == (ours.family, ours.names, ours.genes.modality)
    assert (again.batch_categories, again.labels, again.known_labels) == (
        ours.batch_categories,
        ours.labels,
        ours.known_labels,
    )
    assert again.genes.columns == ours.genes.columns
    assert again.verify().ok
    assert_same_cells(again, ours)
    assert not any("no labels" in note or LATENTS in note for note in again.notes)
    told = pq.read_table(again.path / CALIBRATION).to_pydict()
    assert (told["observation_id"], told["group"], told["label"]) == (["1", "5"], ["0", "1"], ["T cell", "B cell"])


def partly_labelled(reference, folder):
    """The package, as if a third of its cells had no label; its groups may be donors."""
    shutil.copytree(reference.path, folder)
    latents = reference.latents()
    labels = [(None, "T cell", "B cell")[i % 3] for i in range(len(latents.labels))]
    names = [f"cell-{i}" for i in range(len(labels))]
    with LatentWriter(folder / LATENTS) as writer:
        writer.add(replace(latents, labels=labels), names)
    influence = Statistics.read(folder / STATISTICS).influence
    writer.statistics(influence).write(folder / STATISTICS)
    sure = np.array([0.5, 0.75], np.float32)
    told = ["P12", "P7"], ["T cell", "B cell"], ["T cell", "T cell"]
    Calibration(["cell-1", "cell-5"], *told, sure, "neighbors").write(folder / CALIBRATION)
    manifest = read_manifest(folder)
    for name in (LATENTS, STATISTICS, CALIBRATION):
        manifest["files"][name] = {"digest": file_digest(folder / name), "size": (folder / name).stat().st_size}
    manifest["digest"] = manifest_digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return Reference.load(folder)


def assert_same_cells(again, ours):
    """Latents, further latents, variances, labels and what they sum up to."""
    got, expected = again.latents(), ours.latents()
    np.testing.assert_array_equal(got.latent, expected.latent)
    np.testing.assert_array_equal(got.variance, expected.variance)
    assert list(got.others) == list(expected.others)
    for other, values in expected.others.items():
        np.testing.assert_array_equal(got.others[other], values)
    assert got.labels == expected.labels
    sums, known = (Statistics.read(one.path / STATISTICS) for one in (again, ours))
    assert sums.labels == known.labels
    np.testing.assert_array_equal(sums.covariance, known.covariance)
    np.testing.assert_array_equal(sums.influence, known.influence)


@pytest.mark.parametrize("name", SOURCES)
def test_a_published_reference_maps_as_it_was_trained(name, made, publish, shared_data, tmp_path):
    """Trained, published, fetched, added and verified: a block of its own cells gets the latents of the package."""
    ours = made(name).reference
    repository, commit, _ = publish(ours)
    place = f"{shared_data / SOURCES[name][0]}"

    fetched = fetch(f"hf://{repository}@{commit}", cache=tmp_path / "cache")
    added = Registry(tmp_path / "home").add(fetched.folder, name.lower(), provenance=fetched.provenance)

    assert added.verify().ok
    settings = Settings()
    with open_source(place) as source:
        shard = source.scan(100_000).shards[0]
    block = read_block(shard, added, model_columns(added, settings), 100)
    mapped = Mapper(added, settings).map(block)
    close_shards()
    there = mapped.mapped  # a few cells have no count in 50 peaks
    assert there.mean() > 0.9
    expected = ours.latents().latent[: block.n_cells]
    np.testing.assert_allclose(mapped.latent[there], expected[there], atol=1e-4)
    assert (mapped.label[there] >= 0).all() == any(label is not None for label in ours.latents().labels)


def test_the_hub_and_our_search_find_it(made, publish):
    ours = made("PEAKVI").reference
    repository, _, _ = publish(ours, tissues=("bone marrow",), licence="cc-by-4.0")

    (found,) = search("peakvi", family="peakvi", tissue="marrow")

    assert found.repository == repository
    assert found.modalities == ("atac",)
    assert (found.licence, found.annotated, found.scvi_version) == ("cc-by-4.0", False, ours.scvi_version)


def test_the_metadata_is_that_of_scvi_hub(made, tmp_path):
    write_repository(made("MRVI").reference, "lab/x", tmp_path / "out", Options(data_url="https://example.org/cells"))

    told = json.loads((tmp_path / "out" / "_scvi_required_metadata.json").read_text())

    assert told == {
        "scvi_version": made("MRVI").reference.scvi_version,
        "anndata_version": told["anndata_version"],
        "model_cls_name": "MRVI",
        "training_data_url": "https://example.org/cells",
        "model_parent_module": "scvi.external",
    }
