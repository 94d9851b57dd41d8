"""Searches on few cells, where every neighbour can be worked out by hand or by numpy."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from scviaduct.errors import FilterError, InputError, StoreError
from scviaduct.store.search import Queries, search, stored_queries
from tests.scviaduct.store.synthetic import DIMENSIONS, SOURCE

KEPT = {"tissue": "string", "whole": "int64"}


def queries_of(latent):
    latent = np.atleast_2d(np.asarray(latent, np.float32))
    return Queries(["q"] * len(latent), [f"query {i}" for i in range(len(latent))], latent)


def hits_of(hits):
    """Query to its neighbours' ids in order of rank, after checking that ranks count from 1."""
    found = {}
    for row in hits.table.to_pylist():
        ids = found.setdefault((row["query_dataset"], row["query"]), [])
        ids.append(row["observation_id"])
        assert row["rank"] == len(ids)
    return found


@pytest.fixture
def line(lab):
    """Eight cells at 0 to 7 on a line, of which cell 5 has no latent; tissues alternate."""
    latent = np.zeros((8, DIMENSIONS))
    latent[:, 0] = range(8)
    obs = {"tissue": ["lung", "skin"] * 4, "whole": range(8)}
    lab.put(range(8), latent=latent, unmapped=[5], kept=KEPT, obs=obs)
    return lab


@pytest.mark.parametrize(
    ("at", "k", "where", "expected"),
    [
        (0, 3, None, [0, 1, 2]),
        (6.2, 3, None, [6, 7, 4]),  # not 5, which has no latent
        (3.4, 2, None, [3, 4]),
        (0, 100, None, [0, 1, 2, 3, 4, 6, 7]),
        (0, 1, None, [0]),
        (0, 2, "tissue = 'skin'", [1, 3]),
        (0, 9, "tissue = 'skin'", [1, 3, 7]),
        (0, 2, "whole in (6, 5, 7)", [6, 7]),
        (0, 2, "whole = 5", []),
        (0, 2, "tissue = 'bone'", []),
        (9, 2, "label = 'type 0' and probability > 0.5 and not whole = 7", [6, 4]),
        (9, 2, "label is null", []),
    ],
)
@pytest.mark.parametrize("exact", [True, False])
def test_neighbours_on_a_line(line, at, k, where, expected, exact):
    hits = search(line.space, queries_of([at, 0, 0, 0]), k, where=where, exact=exact)
    assert hits_of(hits) == ({("q", "query 0"): [f"c{row}" for row in expected]} if expected else {})
    np.testing.assert_allclose(hits.table["distance"].to_numpy(), [abs(at - row) for row in expected], rtol=1e-6)
    assert hits.recall == 1
    assert hits.version == line.space.head()
    assert hits.method == ("exact on the selected cells" if where and hits.candidates else "exact")


def test_a_hit_says_who_it_is(line):
    (hit,) = search(line.space, queries_of([2.5, 0, 0, 0]), 1, where="whole >= 3").table.to_pylist()
    assert hit == {
        "query_dataset": "q",
        "query": "query 0",
        "rank": 1,
        "distance": 0.5,
        "source": SOURCE,
        "dataset_id": "d",
        "observation_id": "c3",
        "soma_joinid": None,
        "label": "type 0",
        "probability": 0.75,
        "margin": 0.5,
        "entropy": 0.25,
        "ambiguous": False,
        "reference": "pbmc@0123456789ab",
        "adapter": None,
        "tissue": "skin",
        "whole": 3,
    }


def test_no_hit_has_the_columns_of_one(line):
    some = search(line.space, queries_of([2.5, 0, 0, 0]), 1).table
    assert search(line.space, queries_of([2.5, 0, 0, 0]), 1, where="whole > 9").table.schema == some.schema
    assert search(line.space, queries_of(np.zeros((0, DIMENSIONS))), 1).table.schema == some.schema


def test_a_kept_column_called_like_one_of_a_hit(lab):
    kept = {"rank": "int64", "cell.rank": "int64", "distance": "double", "query": "string"}
    obs = {"rank": [7, 8], "cell.rank": [70, 80], "distance": [-1.0, -2.0], "query": ["kept", "too"]}
    lab.commit(lab.stage(range(2), kept=kept, obs=obs), kept=kept)
    queries = Queries(["q"], ["0"], np.zeros((1, DIMENSIONS), np.float32))
    one, two = search(lab.space, queries, 2).table.to_pylist()
    assert (one["query"], one["rank"], two["rank"]) == ("0", 1, 2)
    assert 0 <= one["distance"] <= two["distance"]
    told = {"cell.rank": 7, "cell.cell.rank": 70, "cell.distance": -1.0, "cell.query": "kept"}
    assert told.items() <= one.items()
    (found,) = search(lab.space, queries, 2, where="rank = 8").table.to_pylist()
    assert found["observation_id"] == "c1"


@pytest.mark.parametrize("many", [3, 64])
def test_exact_neighbours_are_numpys(lab, many):
    rng = np.random.default_rng(0)
    latent, query = rng.normal(size=(500, DIMENSIONS)) + 20, rng.normal(size=(many, DIMENSIONS)) + 20
    lab.commit(lab.stage(range(300), latent=latent[:300]), lab.stage(range(300, 500), latent=latent[300:]))
    distance = np.linalg.norm(query[:, None] - latent[None], axis=2)
    order = np.argsort(distance, axis=1)[:, :30]
    hits = search(lab.space, queries_of(query), 30)
    expected = {("q", f"query {i}"): [f"c{row}" for row in rows] for i, rows in enumerate(order)}
    assert hits_of(hits) == expected
    found = hits.table["distance"].to_numpy().reshape(many, 30)
    np.testing.assert_allclose(found, np.take_along_axis(distance, order, axis=1), rtol=1e-4)


def test_ties_are_all_found_and_none_twice(lab):
    """Three places with ten cells each: at any k whole places come first, and no cell comes twice."""
    latent = np.repeat(np.eye(3, DIMENSIONS) * [[1], [2], [3]], 10, axis=0)
    lab.put(range(30), latent=latent)
    for k in (5, 10, 15, 30):
        (ids,) = hits_of(search(lab.space, queries_of(np.zeros(DIMENSIONS)), k)).values()
        places = [int(key[1:]) // 10 for key in ids]
        assert len(set(ids)) == k
        assert places == sorted([0] * 10 + [1] * 10 + [2] * 10)[:k]


@pytest.mark.parametrize(
    ("where", "k", "expected"),
    [
        (None, 2, {"c0": ["c1", "c2"], "c7": ["c6", "c4"]}),
        (None, 100, {"c0": ["c1", "c2", "c3", "c4", "c6", "c7"], "c7": ["c6", "c4", "c3", "c2", "c1", "c0"]}),
        ("tissue = 'lung'", 2, {"c0": ["c2", "c4"], "c7": ["c6", "c4"]}),
        ("tissue = 'skin'", 9, {"c0": ["c1", "c3", "c7"], "c7": ["c3", "c1"]}),
        ("whole = 7", 1, {"c0": ["c7"]}),
    ],
)
def test_a_stored_cell_is_not_its_own_neighbour(line, where, k, expected):
    queries = stored_queries(line.space, "whole in (0, 5, 7)")
    assert (queries.datasets, queries.ids) == (["d", "d"], ["c0", "c7"])
    assert hits_of(search(line.space, queries, k, where=where)) == {("d", key): ids for key, ids in expected.items()}


def test_a_stored_cell_is_left_out_among_its_doubles(lab):
    lab.put(range(6), latent=np.ones((6, DIMENSIONS)))
    found = hits_of(search(lab.space, stored_queries(lab.space, "source_row < 4"), 3))
    assert len(found) == 4
    for (_, query), ids in found.items():
        assert len(set(ids) - {query}) == 3


def test_queries_of_a_label(lab):
    lab.commit(lab.stage(range(4)), lab.stage(range(4, 7), stamp=1))
    queries = stored_queries(lab.space, "label = 'type 1'")
    assert queries.ids == ["c4", "c5", "c6"]
    np.testing.assert_array_equal(queries.latent[:, 0], [4, 5, 6])
    assert stored_queries(lab.space, "label = 'type 1'", limit=2).ids == ["c4", "c5"]
    with pytest.raises(InputError, match="No stored cell fulfils label = 'type 2'"):
        stored_queries(lab.space, "label = 'type 2'")


def test_cells_of_one_name_in_two_datasets_are_two(lab):
    lab.commit(lab.stage(range(3)), lab.stage(range(3), dataset="e", stamp=1))
    found = search(lab.space, stored_queries(lab.space, "source_row = 1"), 1).table
    told = found.select(["query_dataset", "query", "dataset_id", "observation_id"]).to_pylist()
    assert told == [
        {"query_dataset": one, "query": "c1", "dataset_id": other, "observation_id": "c1"}
        for one, other in (("d", "e"), ("e", "d"))
    ]


def test_the_past_is_searched_as_it_was(lab):
    lab.put(range(3))
    lab.put(range(1, 5), stamp=1)
    query = queries_of([2, 0, 0.5, -2])
    for version, candidates, labels in ((1, 3, ["type 0"]), (2, 5, ["type 1"]), (None, 5, ["type 1"])):
        hits = search(lab.space, query, 1, as_of=version)
        assert (hits.version, hits.candidates) == (version or 2, candidates)
        assert (hits_of(hits)["q", "query 0"], hits.table["label"].to_pylist()) == (["c2"], labels)
    assert stored_queries(lab.space, "source_row < 9", as_of=1).ids == ["c0", "c1", "c2"]
    with pytest.raises(StoreError, match="no version 9"):
        search(lab.space, query, 1, as_of=9)


@pytest.mark.parametrize(
    ("latent", "k", "where", "error", "told"),
    [
        (np.zeros((1, DIMENSIONS)), 0, None, InputError, "k = 0"),
        (np.zeros((1, DIMENSIONS)), -1, None, InputError, "k = -1"),
        (np.zeros((1, DIMENSIONS + 1)), 1, None, InputError, "5 dimensions, pbmc-0123456789ab has 4"),
        (np.zeros((1, DIMENSIONS)), 1, "tisue = 'lung'", FilterError, "no column 'tisue'"),
        (np.zeros((1, DIMENSIONS)), 1, "tissue =", FilterError, "'text'"),
        (np.full((1, DIMENSIONS), np.nan), 1, None, InputError, "not a number"),
        (np.full((1, DIMENSIONS), np.inf), 1, "whole = 1", InputError, "not a number"),
    ],
)
def test_a_search_that_cannot_be(line, latent, k, where, error, told):
    with pytest.raises(error, match=told):
        search(line.space, queries_of(latent), k, where=where)


def test_nothing_to_search_is_said(lab):
    with pytest.raises(StoreError, match="no cell with a latent"):
        search(lab.space, queries_of(np.zeros(DIMENSIONS)), 1)
    lab.put(range(3), unmapped=range(3))
    with pytest.raises(StoreError, match="Version 1 of pbmc-0123456789ab has no cell with a latent"):
        search(lab.space, queries_of(np.zeros(DIMENSIONS)), 1)
    assert isinstance(next(lab.space.read(["latent"]))["latent"].type, pa.ListType)
