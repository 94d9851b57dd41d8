"""A Census gives the cells that cellxgene_census gives; its moving names are resolved once."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import cellxgene_census
import pyarrow as pa
import pytest
import tiledbsoma
from cellxgene_census import _release_directory

from scviaduct.errors import FilterError, SourceError
from scviaduct.sources import open_source


@pytest.mark.filterwarnings("ignore:Transforming to str index")  # of what cellxgene_census makes
@pytest.mark.parametrize("value_filter", ["", "tissue_general == 'blood' and assay == \"10x 3' v2\""])
def test_equals_cellxgene_census(value_filter, census_collection, read_all, equal):
    with cellxgene_census.open_soma(uri=str(census_collection)) as census:
        adata = cellxgene_census.get_anndata(
            census, "homo_sapiens", obs_value_filter=value_filter or None, obs_column_names=["observation_joinid"]
        )
    query = f"&filter={value_filter}" if value_filter else ""
    with open_source(f"census:2026-01-01?uri={census_collection}{query}") as source:
        matrix, keys = read_all(source, 500)
        genes = source.genes()
        assert len(source.scan(500).shards) > 3
    order = {key: row for row, key in enumerate(adata.obs["observation_joinid"])}
    assert len(order) == adata.n_obs
    assert equal(matrix, adata.X[[order[key] for key in keys]])
    assert list(genes.columns["index"]) == adata.var["feature_id"].tolist()
    assert list(genes.columns["feature_name"]) == adata.var["feature_name"].tolist()


def test_shards_are_cut_on_datasets(census_collection):
    with cellxgene_census.open_soma(uri=str(census_collection)) as census:
        obs = cellxgene_census.get_obs(census, "homo_sapiens", column_names=["dataset_id"])
    with open_source(f"census:2026-01-01?uri={census_collection}") as source:
        scan = source.scan(500, ["cell_type", "raw_sum", "is_primary_data"])
    cells = {}
    for shard in scan.shards:
        cells[shard.dataset_id] = cells.get(shard.dataset_id, 0) + shard.cells
        assert shard.source == "census:homo_sapiens"
        assert shard.selection == "layer=raw&measurement=RNA&organism=homo_sapiens"
    assert cells == obs["dataset_id"].value_counts().loc[list(cells)].to_dict()
    assert scan.cells == 3360
    assert [scan.columns[name].type for name in ("cell_type", "raw_sum", "is_primary_data")] == [
        "string",
        "double",
        "bool",
    ]
    assert scan.columns["is_primary_data"].counts == {"True": 3360}


def test_version_is_the_release_and_the_fingerprint(census_collection):
    with open_source(f"census:sim?uri={census_collection}") as source:
        release, _, fingerprint = source.version.partition("+")
        assert release == "sim"
        assert source.uri == (
            f"census:sim?layer=raw&measurement=RNA&organism=homo_sapiens&uri=file://{census_collection}&version={fingerprint}"
        )
        with open_source(source.uri) as again:
            assert (again.uri, again.version) == (source.uri, source.version)
        block = source.read(source.scan(100).shards[0], columns=["donor_id", "raw_sum"], limit=3)
    assert block.obs.schema.types == [pa.string(), pa.dictionary(pa.int32(), pa.string()), pa.float64()]


@pytest.mark.parametrize("name", ["latest", "stable"])
def test_moving_name_of_a_collection_is_what_it_says_of_itself(name, census_collection):
    with open_source(f"census:{name}?uri={census_collection}") as source:
        assert source.uri.startswith("census:2026-01-01?")
        assert source.version.startswith("2026-01-01+")


@pytest.fixture
def directory(census_collection, monkeypatch):
    """Census's release directory over HTTP, with the local collection as its only release."""
    release = {"release_build": "2026-01-01", "soma": {"uri": str(census_collection), "s3_region": None}}
    retracted = {**release, "release_build": "2025-01-01", "flags": {"retracted": True}}
    pages = {
        "/release.json": {"latest": "2026-01-01", "2026-01-01": release, "2025-01-01": retracted},
        "/mirrors.json": {"default": "here", "here": {"provider": "unknown", "base_uri": "", "region": None}},
    }

    class Directory(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(pages[self.path]).encode())

        def log_message(self, *_):
            """Say nothing."""

    monkeypatch.setattr(_release_directory, "Provider", str)
    monkeypatch.setattr("cellxgene_census._open._assert_mirror_supported", lambda mirror: None)
    with ThreadingHTTPServer(("127.0.0.1", 0), Directory) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(_release_directory, "CELL_CENSUS_RELEASE_DIRECTORY_URL", f"{url}/release.json")
        monkeypatch.setattr(_release_directory, "CELL_CENSUS_MIRRORS_DIRECTORY_URL", f"{url}/mirrors.json")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield
        server.shutdown()
        thread.join()


def test_live_release_is_resolved_once_and_pinned_by_its_date(directory):
    with open_source('census:latest?filter=assay == "10x 3\' v2"') as source:
        assert source.version == "2026-01-01"
        assert source.uri.startswith("census:2026-01-01?filter=")
        assert "version=" not in source.uri
        assert source.describe()["release"] == "2026-01-01"
        with open_source(source.uri) as again:
            assert again.scan(500).shards == source.scan(500).shards


def test_unknown_and_retracted_releases(directory):
    for release in ("2020-01-01", "2025-01-01"):
        with pytest.raises(SourceError, match=f"no Census release '{release}', or it was retracted .*directory"):
            open_source(f"census:{release}")


def test_directory_out_of_reach(monkeypatch):
    monkeypatch.setattr(_release_directory, "CELL_CENSUS_RELEASE_DIRECTORY_URL", "http://127.0.0.1:9/release.json")
    with pytest.raises(SourceError, match=r"'stable' cannot be reached .*or a local copy: census:RELEASE\?uri=PATH"):
        open_source("census:stable")


def test_errors(census_collection, tmp_path):
    tiledbsoma.Collection.create(str(tmp_path / "bare")).close()
    for uri, error, message in [
        (f"census:x?uri={tmp_path}", SourceError, r"No Census collection opens at .* Check uri="),
        (f"census:x?uri={tmp_path}/bare", SourceError, "is not a Census: it has no census_data. Write soma:PATH"),
        (f"census:x?uri={census_collection}&organism=mus", SourceError, "no organism 'mus'. There are: homo_sapiens"),
        (f"census:x?uri={census_collection}&layer=tpm", SourceError, "no layer 'tpm'. Name one: layer="),
        (f"census:x?uri={census_collection}&filter=tissu == 'a'", FilterError, "'tissu', which obs of census:homo_sap"),
    ]:
        with pytest.raises(error, match=message):
            open_source(uri)
