"""SOMA experiments, of Python and of R, give what tiledbsoma itself gives."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import tiledbsoma
from scipy import sparse

from scviaduct.errors import FilterError, SourceChangedError, SourceError
from scviaduct.sources import open_shard, open_source, soma, somacounts


@pytest.fixture(params=["soma_from_r", "old_soma_from_r"])
def from_r(request):
    """Experiments of either encoding that R wrote."""
    return request.getfixturevalue(request.param)


def whole(url, layer):
    with tiledbsoma.open(str(url)) as experiment:
        matrix = experiment.ms["RNA"].X[layer]
        coo = matrix.read().coos(shape=matrix.shape).concat().to_scipy()
        obs = experiment.obs.read().concat().to_pandas()
        var = experiment.ms["RNA"].var.read().concat().to_pandas()
    return coo.tocsr().astype(np.float32), obs, var


@pytest.fixture
def experiment(tmp_path):
    """Write a small experiment; the columns of obs are given."""

    def write(obs, counts, var=None, layers=("raw",), measurements=("RNA",), index=("soma_joinid",), name="exp"):
        url = str(tmp_path / name)
        joined = pa.table({"soma_joinid": pa.array(range(len(counts)), pa.int64()), **obs})
        genes = pa.table(
            var or {"soma_joinid": range(counts.shape[1]), "feature_id": [f"g{i}" for i in range(counts.shape[1])]}
        )
        domain = [(0, len(counts) - 1) if name == "soma_joinid" else None for name in index]
        with tiledbsoma.Experiment.create(url) as root:
            root.add_new_dataframe("obs", schema=joined.schema, index_column_names=index, domain=domain)
            ms = root.add_new_collection("ms")
            for name in measurements:
                measurement = ms.add_new_collection(name, tiledbsoma.Measurement)
                last = genes["soma_joinid"].to_pylist()[-1]
                measurement.add_new_dataframe("var", schema=genes.schema, domain=[(0, last)]).write(genes)
                x = measurement.add_new_collection("X")
                for layer in layers:
                    coo = sparse.coo_matrix(counts)
                    at_gene = genes["soma_joinid"].to_numpy()[coo.col]
                    values = pa.SparseCOOTensor.from_numpy(
                        coo.data.astype(np.float32), np.column_stack([coo.row, at_gene]), shape=(len(counts), last + 1)
                    )
                    x.add_new_sparse_ndarray(layer, type=pa.float32(), shape=(len(counts), last + 1)).write(values)
        # Through the handle that creates the collection, tiledbsoma 2.3 leaves enumerations empty.
        with tiledbsoma.open(f"{url}/obs", "w") as frame:
            frame.write(joined)
        return url

    return write


@pytest.fixture
def counts():
    """Counts of 30 cells and 5 genes."""
    return np.random.default_rng(0).poisson(0.8, (30, 5))


def test_experiment_from_r_equals_tiledbsoma(from_r, read_all, equal):
    matrix, obs, var = whole(from_r, "counts")
    with open_source(f"soma:{from_r}") as source:
        assert source.describe()["layer"] == "counts"
        assert source.describe()["why"] == "its name"
        read, keys = read_all(source, 33)
        assert source.genes().columns["index"] == tuple(var["var_id"])
        scan = source.scan(50, ["groups", "nCount_RNA", "orig.ident"])
        block = source.read(scan.shards[1], columns=["groups", "nCount_RNA"])
    assert equal(read, matrix)
    assert keys == obs["obs_id"].tolist()
    assert scan.columns["groups"].counts == obs["groups"].value_counts().to_dict()
    assert scan.columns["nCount_RNA"].type == "double"
    assert block.obs["groups"].type == pa.dictionary(pa.int32(), pa.string())
    assert block.obs["nCount_RNA"].to_pylist() == obs["nCount_RNA"][50:].tolist()
    assert {(s.source, s.dataset_id) for s in scan.shards} == {(f"soma:file://{from_r}#RNA", from_r.name)}


def test_names_with_dots_filter_through_attr(from_r):
    with open_source(f"soma:{from_r}?filter=attr(\"RNA_snn_res.1\") == '1' and groups == 'g1'") as source:
        _, obs, _ = whole(from_r, "counts")
        expected = obs[(obs["RNA_snn_res.1"] == "1") & (obs["groups"] == "g1")]
        (shard,) = source.scan(100).shards
        assert source.read(shard).rows.tolist() == expected["soma_joinid"].tolist()


def test_layer_key_and_dataset_by_name(from_r, read_all, equal):
    with open_source(f"soma:{from_r}?layer=data&key=soma_joinid&dataset=groups") as source:
        assert {shard.dataset_id for shard in source.scan(100).shards} == {"g1", "g2"}
        assert "layer=data" in source.uri
        blocks = [source.read(shard) for shard in source.scan(9).shards]
        matrix, _, _ = whole(from_r, "data")
        rows = np.concatenate([block.rows for block in blocks])
        read, keys = read_all(source, 9)
    assert sorted(rows) == list(range(80)), "datasets that interleave give each row to one shard"
    assert keys == [str(row) for row in rows]
    assert equal(read, matrix[rows])


def test_duplicates_and_var_filter(experiment, counts, as_csr):
    primary = np.arange(30) % 3 != 0
    url = experiment({"is_primary_data": primary, "dataset_id": ["a"] * 10 + ["b"] * 20}, counts)
    with open_source(f"soma:{url}?var_filter=feature_id in ['g1', 'g4']") as source:
        scan = source.scan(100)
        assert (scan.cells, scan.duplicates_skipped) == (20, 10)
        assert source.genes().columns["index"] == ("", "g1", "", "", "g4")
        read = np.vstack([as_csr(source.read(shard)).toarray() for shard in scan.shards])
    expected = counts[primary] * np.isin(range(5), [1, 4])
    np.testing.assert_array_equal(read, expected)
    with open_source(f"soma:{url}?duplicates=keep") as source:
        assert source.scan(100).cells == 30


def test_gene_joinids_with_gaps(experiment, counts, read_all):
    url = experiment({}, counts, {"soma_joinid": [0, 3, 4, 9, 12], "gene_id": ["a", "b", "c", "d", "e"]})
    with open_source(f"soma:{url}") as source:
        assert source.genes().columns == {"index": ("a", "b", "c", "d", "e")}
        np.testing.assert_array_equal(read_all(source)[0].toarray(), counts)
        gene_map = np.array([1, -1, 1, 0, -1], np.int32)
        read, _ = read_all(source, 30, gene_map=gene_map, n_genes=2)
    np.testing.assert_array_equal(read.toarray(), np.column_stack([counts[:, 3], counts[:, 0] + counts[:, 2]]))


def test_obs_indexed_on_something_else_is_read_in_the_order_of_joinids(experiment, counts, read_all):
    names = [f"cell{(7 * i) % 30:02d}" for i in range(30)]
    url = experiment({"obs_id": names}, counts, index=("obs_id",))
    with open_source(f"soma:{url}") as source:
        read, keys = read_all(source)
    assert keys == names
    np.testing.assert_array_equal(read.toarray(), counts)


@pytest.mark.parametrize("index", [("obs_id",), ("obs_id", "soma_joinid")])
@pytest.mark.parametrize("query", ["", "?filter=obs_id != 'c7' or obs_id == 'c99'  # a comment"])
@pytest.mark.parametrize("window", [1, 4, 100])
def test_reading_a_shard_never_holds_obs_whole(experiment, counts, monkeypatch, as_csr, index, query, window):
    monkeypatch.setattr(soma, "SORTED_ROWS", window)
    names = [f"c{i}" for i in np.random.default_rng(1).permutation(30)]
    url = experiment({"obs_id": names, "n": range(30)}, counts, index=index)
    selected = [i for i, name in enumerate(names) if not query or name != "c7"]
    held = []
    windowed = soma.SomaSource._filtered

    def noted(self, frame, chosen, columns, *args, **kwargs):
        tables = list(windowed(self, frame, chosen, columns, *args, **kwargs))
        if frame is self._obs and len(columns) > 1:
            held.append(sum(len(table) for table in tables))
        yield from tables

    monkeypatch.setattr(soma.SomaSource, "_filtered", noted)
    with open_source(f"soma:{url}{query}") as source:
        shards = source.scan(6, ["n"]).shards
        assert max(held) <= window
        held.clear()
        blocks = [source.read(shard, columns=["n"]) for shard in shards]
        assert max(held) <= min(window, 6)
    assert [row for block in blocks for row in block.rows] == selected
    assert [n for block in blocks for n in block.obs["n"].to_pylist()] == selected
    read = sparse.vstack([as_csr(block) for block in blocks])
    assert (read.toarray() == counts[selected]).all()


def test_slabs_of_rows_meet(experiment, monkeypatch, read_all):
    """Rows that a slab's edge cuts wrongly would be lost or read twice."""
    monkeypatch.setattr(somacounts, "TILE_ROWS", 8)
    monkeypatch.setattr(somacounts, "SLAB_BYTES", 24 * 40)
    counts = np.random.default_rng(1).poisson(0.8, (100, 5))
    counts[40:60] = 0
    url = experiment({"n": np.arange(100) % 7}, counts)
    for text, chosen in (("", np.arange(100) % 7 >= 0), ("?filter=n == 3", np.arange(100) % 7 == 3)):
        with open_source(f"soma:{url}{text}") as source:
            read, keys = read_all(source, 60)
        assert keys == [str(row) for row in np.flatnonzero(chosen)]
        np.testing.assert_array_equal(read.toarray(), counts[chosen])


def test_batches_of_obs_meet(experiment, counts, monkeypatch, read_all):
    monkeypatch.setattr("scviaduct.sources.soma.BATCH_ROWS", 4)
    with open_source(f"soma:{experiment({}, counts)}") as source:
        assert read_all(source)[1] == [str(row) for row in range(30)]


@pytest.mark.parametrize("window", [1, 7, 100])
def test_obs_that_was_written_in_pieces_is_read_in_order(experiment, counts, monkeypatch, read_all, window):
    """TileDB hands the rows of several fragments over in the order of the fragments."""
    monkeypatch.setattr(soma, "ORDERED_ROWS", window)
    url = experiment({"n": range(30)}, counts)
    with tiledbsoma.open(f"{url}/obs") as obs:
        held = obs.read().concat()
    with tiledbsoma.open(f"{url}/obs", "w") as obs:
        for rows in (slice(20, 30), slice(5, 12)):
            obs.write(held.slice(rows.start, rows.stop - rows.start))
    with open_source(f"soma:{url}") as source:
        read, keys = read_all(source, 8)
    assert keys == [str(row) for row in range(30)]
    np.testing.assert_array_equal(read.toarray(), counts)


def test_missing_values_and_categories(experiment, counts):
    label = pa.array(["x", None, "y"] * 10).dictionary_encode()
    url = experiment({"label": label, "n": pa.array([1, 2, None] * 10)}, counts)
    with open_source(f"soma:{url}") as source:
        scan = source.scan(100, ["label", "n"])
        block = source.read(scan.shards[0], columns=["label", "n"])
    assert scan.columns["label"].counts == {"x": 10, "y": 10}
    assert scan.columns["n"].nulls == 10
    assert block.obs["label"].to_pylist() == ["x", None, "y"] * 10
    assert block.obs["n"].to_pylist() == [1, 2, None] * 10


def test_category_without_a_name_is_refused(tmp_path):
    """tiledbsoma 2.3 leaves enumerations empty when it writes through the handle that creates a collection."""
    label = pa.table({"soma_joinid": range(3), "label": pa.array(["x", "y", "x"]).dictionary_encode()})
    genes = pa.table({"soma_joinid": range(2)})
    with tiledbsoma.Experiment.create(str(tmp_path / "exp")) as root:
        root.add_new_dataframe("obs", schema=label.schema, domain=[(0, 2)]).write(label)
        measurement = root.add_new_collection("ms").add_new_collection("RNA", tiledbsoma.Measurement)
        measurement.add_new_dataframe("var", schema=genes.schema, domain=[(0, 1)]).write(genes)
        measurement.add_new_collection("X").add_new_sparse_ndarray("raw", type=pa.float32(), shape=(3, 2)).write(
            pa.SparseCOOTensor.from_numpy(np.ones(1, np.float32), np.array([[0, 0]]), shape=(3, 2))
        )
    with open_source(f"soma:{tmp_path}/exp") as source:
        assert source.genes().columns == {"index": ("0", "1")}
        with pytest.raises(
            SourceError, match=r"obs column 'label' of soma:.* cannot be kept \(Index 0 out of bounds\)"
        ):
            source.scan(10, ["label"])


def test_write_changes_the_version_and_a_copy_does_not(experiment, counts, tmp_path):
    url = experiment({"n": range(30)}, counts)
    with open_source(f"soma:{url}") as source:
        (shard,), version, pinned = source.scan(100).shards, source.version, source.uri
    shutil.copytree(url, tmp_path / "copy")
    with open_source(f"soma:{tmp_path}/copy") as source:
        assert source.version == version
    assert open_shard(shard).read(shard).n_cells == 30
    with tiledbsoma.open(f"{url}/ms/RNA/X/raw", "w") as matrix:
        matrix.write(
            pa.Table.from_pydict({"soma_dim_0": [0], "soma_dim_1": [0], "soma_data": pa.array([99], pa.float32())})
        )
    with pytest.raises(SourceChangedError, match=f"was planned as version {version} and is .* now. Plan again"):
        open_source(pinned)


def test_tiles_are_not_put_in_order_by_a_task_that_outlives_its_read(experiment, counts, census_collection):
    """It is TileDB's default, and kills the process in a small read now and then."""
    urls = (f"soma:{experiment({'n': range(30)}, counts)}", f"census:sim?uri={census_collection}")
    for url in urls:
        with open_source(url) as source:
            told = source._obs.context.tiledb_config
        assert int(told["sm.query.sparse_global_order.preprocess_tile_merge"]) == 0


def test_filter_that_compares_unlike_things(experiment, counts):
    url = experiment({"n": range(30)}, counts)
    with (
        open_source(f"soma:{url}?filter=n > 'a'") as source,
        pytest.raises(FilterError, match=r'Filter "n > \'a\'" compares unlike things \(n is int64\)'),
    ):
        source.scan(10)


@pytest.mark.parametrize(
    "text",
    [
        "n > 3 and n < 20",
        "tissue == 'lung'",
        "tissue != 'lung'",
        "grade == 2",
        "grade in [1, 3]",
        "x > 0.25",
        "ok == True",
    ],
)
def test_filter_selects_what_tiledbsoma_selects(experiment, counts, text):
    columns = {
        "n": range(30),
        "tissue": pa.array(["lung", None, "skin"] * 10).dictionary_encode(),
        "grade": pa.array([1, 2, 3] * 10).dictionary_encode(),
        "x": pa.array(np.linspace(0, 1, 30, dtype=np.float32)),
        "ok": [True, False] * 15,
    }
    url = experiment(columns, counts)
    with tiledbsoma.open(f"{url}/obs") as obs:
        expected = obs.read(value_filter=text, column_names=["soma_joinid"]).concat()["soma_joinid"].to_pylist()
    with open_source(f"soma:{url}?filter={text}") as source:
        (shard,) = source.scan(30).shards
        assert source.read(shard).rows.tolist() == expected
        assert 0 < len(expected) < 30


@pytest.mark.parametrize("rows", [(10, 20), (12, 13)])
def test_a_piece_of_a_shard_without_a_cell_is_read_as_none(experiment, counts, rows):
    with open_source(f"soma:{experiment({'n': range(30)}, counts)}?filter=n < 10 or n >= 20") as source:
        (shard,) = source.scan(100).shards
        piece = source.read(replace(shard, start=rows[0], stop=rows[1]), columns=["n"], limit=5)
    assert (piece.n_cells, len(piece.data), piece.obs.column_names) == (0, 0, ["observation_id", "n"])


def test_no_shard_makes_a_query_condition(experiment, counts, monkeypatch):
    """Each would make a TileDB context, and give the process's free memory back."""
    url = experiment({"n": range(30)}, counts)
    monkeypatch.setattr(tiledbsoma._query_condition.QueryCondition, "init_query_condition", None)
    with open_source(f"soma:{url}?filter=n < 20&var_filter=soma_joinid < 4") as source:
        assert [source.read(shard).n_cells for shard in source.scan(10).shards] == [10, 10]


def test_repeated_key(experiment, counts):
    url = experiment({"obs_id": ["a", "b"] * 15}, counts)
    with open_source(f"soma:{url}") as source, pytest.raises(SourceError, match="'a' occurs more than once"):
        source.scan(10)


def test_choices_and_their_errors(experiment, counts, census_collection):
    url = experiment({}, counts, layers=("spliced", "unspliced"), measurements=("ATAC", "protein"))
    only = experiment({}, counts, layers=("umi",), measurements=("GEX",), name="only")
    with open_source(f"soma:{only}") as source:
        assert (source.describe()["measurement"], source.describe()["layer"]) == ("GEX", "umi")
        assert source.describe()["why"] == "the only one"
    for uri, error, message in [
        (f"soma:{url}", SourceError, r"has no measurement RNA. Name one: measurement=ATAC of ATAC, protein"),
        (f"soma:{url}?measurement=RNA", SourceError, "has no measurement 'RNA'"),
        (
            f"soma:{url}?measurement=ATAC",
            SourceError,
            "has no layer raw or counts. Name one: layer=spliced of spliced, un",
        ),
        (f"soma:{only}?layer=raw", SourceError, "has no layer 'raw'. Name one: layer=umi of umi"),
        (f"soma:{only}?key=nope", SourceError, "key=nope: soma:.*#GEX has no such obs column"),
        (f"soma:{only}?dataset=nope", SourceError, "dataset=nope: soma:.*#GEX has no such obs column"),
        (f"soma:{only}?filter=tisue == 'a'", FilterError, "names column 'tisue', which obs of soma:"),
        (f"soma:{only}?var_filter=a == 'a'", FilterError, "names column 'a', which var of soma:"),
        (f"soma:{only}?version=mine", SourceError, "version=mine is for stores that cannot be listed"),
        (f"soma:{url}-not", SourceError, "No SOMA object opens at .*-not .* Check the path"),
        (
            f"soma:{census_collection}",
            SourceError,
            "is a SOMA Collection, not an experiment. Name the experiment in it",
        ),
    ]:
        with pytest.raises(error, match=message):
            open_source(uri)


def test_several_measurements_are_beside_each_other(experiment, counts, read_all):
    url = experiment({}, counts, layers=("raw", "scaled"), measurements=("ATAC", "RNA", "spliced"))
    with open_source(f"soma:{url}?measurement=RNA,ATAC") as source:
        assert source.source == f"soma:file://{url}#ATAC,RNA", "in the order of the experiment"
        assert source.selection == "key=soma_joinid&layer=ATAC:raw,RNA:raw&measurement=ATAC:atac,RNA:rna"
        assert source.genes().modality == ("atac",) * 5 + ("rna",) * 5
        assert source.genes().columns["index"] == tuple(f"g{i}" for i in range(5)) * 2
        assert (source.describe()["measurement"], source.describe()["modalities"]) == ("ATAC, RNA", "5 atac, 5 rna")
        np.testing.assert_array_equal(read_all(source)[0].toarray(), np.concatenate((counts, counts), axis=1))
        (shard,) = source.scan(100).shards
        mapped = source.read(shard, np.array([-1] * 5 + [1, 0, -1, -1, -1], np.int32), 2)
        assert mapped.data.sum() == counts[:, :2].sum()
        version = source.version
    assert open_shard(shard).genes(shard).modalities == ("atac", "rna")
    with open_source(f"soma:{url}?measurement=RNA") as source:
        assert source.selection == "key=soma_joinid&layer=raw&measurement=RNA"
        assert source.genes().modality == ("rna",) * 5
        assert source.version != version, "it consists of fewer arrays"
    with open_source(f"soma:{url}?measurement=spliced") as source:
        assert source.genes().modality == ()
    query = "measurement=RNA,spliced:protein&layer=spliced:scaled&var_filter=feature_id != 'g3'"
    with open_source(f"soma:{url}?{query}") as source:
        assert source.describe()["layer"] == "RNA:raw, spliced:scaled"
        assert [i for i, name in enumerate(source.genes().columns["index"]) if not name] == [3, 8]
        assert read_all(source)[0][:, [3, 8]].nnz == 0
    for query, message in {
        "measurement=RNA,nope": "measurement=nope: .* has no such measurement. There are: ATAC, RNA, spliced",
        "measurement=RNA,spliced": r"measurement=spliced: .* Say what it is: measurement=NAME:rna",
        "measurement=RNA,ATAC&layer=ATAC:nope": "measurement ATAC of .* has no layer 'nope'",
    }.items():
        with pytest.raises(SourceError, match=message):
            open_source(f"soma:{url}?{query}")


def test_store_that_cannot_be_listed_takes_the_users_version(experiment, counts, monkeypatch):
    url = experiment({}, counts)

    def forbidden(url):
        raise_from = SourceError(f"{url} cannot be listed.", "")
        raise raise_from

    monkeypatch.setattr("scviaduct.sources.fingerprint.filesystem", forbidden)
    with pytest.raises(SourceError, match="cannot be listed"):
        open_source(f"soma:{url}")
    with pytest.raises(SourceError, match="cannot be listed"):
        open_source(f"soma:{url}?version={'0' * 32}")
    with open_source(f"soma:{url}?version=2025-11-08") as source:
        assert source.version == "2025-11-08"
        assert source.scan(100).shards[0].version == "2025-11-08"


def test_a_batch_of_counts_never_exceeds_the_buffers(census_collection, monkeypatch, read_all, equal):
    """TileDB fills a buffer for each column and no more, however many rows are asked for."""
    url = f"soma:{census_collection}/census_data/homo_sapiens"
    with open_source(url) as source:
        expected, _ = read_all(source, 4000)
    monkeypatch.setattr(somacounts, "BUFFER_BYTES", 256 << 10)
    sizes = []
    tables = tiledbsoma.SparseNDArrayRead.tables

    def noted(self):
        for table in tables(self):
            sizes.append(len(table))
            yield table

    monkeypatch.setattr(tiledbsoma.SparseNDArrayRead, "tables", noted)
    with open_source(url) as source:
        read, _ = read_all(source, 4000)
    assert equal(read, expected)
    assert sum(sizes) == expected.nnz
    assert max(sizes) <= (256 << 10) // 8
