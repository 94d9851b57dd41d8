"""The vocabulary: addressed by content, picklable, and unable to change."""

import pickle
from dataclasses import FrozenInstanceError, replace

import pytest

from scviaduct.errors import DataError, InputError, ScviaductError
from scviaduct.values import GeneTable, Plan, Settings, Shard, Unit, digest

SHARD = Shard("cells.h5ad?layer=X", "cells.h5ad", "v1", "layer=X", "blood", 0, 500, 480, "0f")


def test_digest_ignores_the_order_of_keys_and_nothing_else():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1}) != digest({"a": "1"})
    assert digest("ab", "c") != digest("a", "bc")
    assert len(digest()) == 32


def test_an_address_is_of_the_content_not_of_the_place():
    assert replace(SHARD, uri="/mirror/cells.h5ad?layer=X").address == SHARD.address
    for change in ({"version": "v2"}, {"selection": "layer=raw"}, {"rows_digest": "1f"}, {"dataset_id": "lung"}):
        assert replace(SHARD, **change).address != SHARD.address


@pytest.mark.parametrize(
    "settings",
    [
        Settings({"tissue": "string"}),
        Settings(ambiguous_entropy=0.5),
        Settings(batch_key="donor"),
        Settings({}, 1, "", 3),
    ],
)
def test_a_unit_is_another_under_any_other_setting(settings):
    assert Unit.of(SHARD, "r", settings).id != Unit.of(SHARD, "r", Settings()).id
    assert Unit.of(SHARD, "r", settings).id == Unit.of(SHARD, "r", replace(settings)).id


def test_a_unit_is_another_under_another_reference_or_adapter():
    ids = {
        Unit.of(SHARD, "r", Settings()).id,
        Unit.of(SHARD, "s", Settings()).id,
        Unit.of(SHARD, "r", Settings(), "a").id,
    }
    assert len(ids) == 3


def test_values_cross_process_boundaries_and_stay_as_they_are():
    settings = Settings({"tissue": "string"})
    plan = Plan("run", "pbmc", "d", "cells.h5ad", "v1", settings, (Unit.of(SHARD, "d", settings),))
    for value in (SHARD, plan, GeneTable({"index": ("A", "B")})):
        assert pickle.loads(pickle.dumps(value)) == value
    assert plan.cells == 480
    with pytest.raises(FrozenInstanceError):
        SHARD.cells = 1


@pytest.mark.parametrize("kind", [ScviaductError, InputError, DataError])
def test_errors_cross_process_boundaries_and_end_in_the_remedy(kind):
    error = pickle.loads(pickle.dumps(kind("Column 'x' is not there.", "Name another.")))
    assert type(error) is kind
    assert str(error) == "Column 'x' is not there. Name another."
