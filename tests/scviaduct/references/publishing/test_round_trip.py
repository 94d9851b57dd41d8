"""All seven families: published to a hub, loaded from there by plain scvi-tools, and fetched back as a package."""

from __future__ import annotations

import json

import anndata
import numpy as np
import pytest
from scvi.hub import HubModel

from scviaduct.families.vae import quiet
from scviaduct.references.building import build_package
from scviaduct.references.fetching.fetch import fetch
from scviaduct.references.fetching.searching import search
from scviaduct.references.package import TEMPLATE
from scviaduct.references.publishing.repository import Options, write_repository
from scviaduct.references.publishing.upload import target_of, upload
from scviaduct.references.template import encode_cells, encode_template
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
    ours = made(name).reference
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
    if name in MINIFIED:
        np.testing.assert_allclose(again.latents().latent, ours.latents().latent, atol=1e-5)
        if name == "SCANVI":
            assert again.latents().labels == ours.latents().labels


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
