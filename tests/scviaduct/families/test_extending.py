"""Encoders with further categories: what they share, what they look up, and that known cells keep every bit."""

from __future__ import annotations

from dataclasses import fields, is_dataclass

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from scviaduct.errors import InputError
from scviaduct.families import Covariates
from scviaduct.families.slots import BATCH, SAMPLE, covariate
from scviaduct.families.sparse import CELLS
from scviaduct.families.widening import Added, known_categories, widen
from scviaduct.references.template import encode_cells
from tests.support.families import MODELS, made

NAMES = [name for name in MODELS if name != "totalvi of one batch"]
RNG = np.random.default_rng(3)


class Pair:
    """An encoder, and the extended one made of rows of a widened model, as adapters carry them."""

    def __init__(self, name, shared, folder):
        self.made = made(name, shared, folder)
        family, saved = self.made.family, self.made.saved
        self.facts = family.facts(saved)
        model = self.made.model()
        self.columns = tuple(self.facts.categorical_covariates)
        self.encoder = family.fold(model, self.facts, "cpu")
        slots = family.slots(model, self.facts)
        self.known = known_categories(self.facts)
        added = {one: [Added(new, drawn(saved, slots, one)) for new in ("new", "other")] for one in self.known}
        wide = widen(saved, self.facts, slots, added)
        self.wide_facts = family.facts(wide)
        self.wide = family.fold(self.made.model(wide), self.wide_facts, "cpu")
        self.more = {
            one: [self.wide.rows(one, len(known) + i, self.columns) for i in range(2)]
            for one, known in self.known.items()
        }
        self.extended = self.encoder.extended(self.more, self.columns)

    def obs(self, n, share):
        """Covariates of cells, so much of which are of the new categories."""
        obs = {"same": np.full(n, "one"), **{key: RNG.choice(values, n) for key, values in CHOICES.items()}}
        keys = {BATCH: self.facts.batch_key, SAMPLE: self.facts.sample_key}
        keys |= {covariate(column): column for column in self.columns}
        frame = pd.DataFrame(obs).astype(str)
        new = RNG.random(n) < share
        for one in self.known:
            frame.loc[new, keys[one]] = RNG.choice(["new", "other"], new.sum())
        return frame, ~new


CHOICES = {"batch": ["a", "b", "c"], "donor": ["x", "y", "z"], "sex": ["f", "m"]}


def drawn(saved, slots, one):
    found = {}
    for slot in slots:
        if slot.covariate == one:
            shape = saved.state_dict[slot.name].select(slot.dim, 0).shape
            found[slot.name] = torch.tensor(RNG.normal(size=tuple(shape)) * 0.2, dtype=torch.float32)
    return found


@pytest.fixture(scope="module")
def pair(request, shared_data, tmp_path_factory):
    return Pair(request.param, shared_data, tmp_path_factory.mktemp("model") / "saved")


def every(found):
    """All arrays of what an encoder gives."""
    return {"mean": found.mean, "location": found.location, "variance": found.variance, **found.others}


@pytest.mark.parametrize("pair", NAMES, indirect=True)
def test_an_extended_encoder(pair):
    """New cells are encoded as the widened model does; known ones to the bit as before, in any company."""
    counts = sparse.csr_matrix(pair.made.cells.X)
    counts = counts[RNG.integers(0, counts.shape[0], CELLS + 77)]
    obs, known = pair.obs(counts.shape[0], 0.3)
    mixed = encode_cells(pair.extended, counts, obs, pair.wide_facts)
    expected = encode_cells(pair.wide, counts, obs, pair.wide_facts)
    for array, told in zip(every(mixed).values(), every(expected).values(), strict=True):
        assert np.abs(array - told).max() <= 2e-6 * np.abs(told).max()

    alone = encode_cells(pair.encoder, counts[known], obs[known], pair.facts)
    for name, array in every(alone).items():
        assert (every(mixed)[name][known] == array).all(), name
    if pair.encoder.labels:
        assert (pair.extended.classify(mixed.location)[known] == pair.encoder.classify(alone.location)).all()
    if pair.facts.encode_covariates:
        rows = obs.copy()
        rows.loc[~known] = obs[known].iloc[0].to_numpy()
        assert np.abs(encode_cells(pair.encoder, counts, rows, pair.facts).mean - mixed.mean)[~known].max() > 1e-3


@pytest.mark.parametrize("pair", NAMES, indirect=True)
def test_size_and_place_of_a_block(pair):
    """From one cell to more than a mini-batch, and each cell wherever it stands."""
    counts = sparse.csr_matrix(pair.made.cells.X)
    obs, _ = pair.obs(counts.shape[0], 0.3)
    whole = every(encode_cells(pair.extended, counts, obs, pair.wide_facts))
    labels = pair.extended.classify(whole["location"])
    rows = [np.arange(n) for n in (1, 2, 3, 5, 9, 31, 32, 33, 100)]
    rows += [np.array([150]), np.arange(37, 160), RNG.permutation(len(obs)), RNG.integers(0, len(obs), CELLS + 9)]
    for chosen in rows:
        part = every(encode_cells(pair.extended, counts[chosen], obs.iloc[chosen], pair.wide_facts))
        for name, array in part.items():
            assert (array == whole[name][chosen]).all(), (name, len(chosen))
        if labels is not None:
            assert (pair.extended.classify(part["location"]) == labels[chosen]).all()


def tensors(value):
    """Every tensor that an encoder holds, wherever it lies; arrays, which the compiled kernels read, as tensors."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, np.ndarray):
        return [torch.from_numpy(value)]
    if is_dataclass(value):
        inner = [getattr(value, field.name) for field in fields(value)]
    elif isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, list | tuple):
        inner = list(value)
    else:
        inner = list(vars(value).values()) if type(value).__module__.startswith("scviaduct") else []
    return [tensor for one in inner for tensor in tensors(one)]


@pytest.mark.parametrize("pair", NAMES, indirect=True)
def test_memory_grows_by_tables_alone(pair):
    """What is not shared has a row a category; the rest of the tensors are the very same."""
    own = {tensor.data_ptr() for tensor in tensors(pair.encoder)}
    held = tensors(pair.extended)
    assert any(max(tensor.shape) >= 100 for tensor in held)  # the genes' weights, as they are read
    fresh = [tensor for tensor in held if tensor.data_ptr() not in own]
    sizes = {len(known) + 2 for known in pair.known.values()} | {1 + 2}
    assert all(len(tensor) in sizes for tensor in fresh)
    assert bool(fresh) == any(rows for more in pair.more.values() for rows in more)


@pytest.mark.parametrize("pair", ["scvi", "mrvi"], indirect=True)
def test_rows_and_the_original(pair):
    encoder = pair.encoder
    (batch,) = [one for one in pair.known if one in (BATCH, SAMPLE) and encoder.rows(one, 0, pair.columns)]
    rows = encoder.rows(batch, 1, pair.columns)
    assert set(rows) == set(pair.more[batch][0])
    assert set(rows) == (
        {"latent/layers.0.table.0", "latent/layers.1.table.0"}
        if batch == BATCH
        else {
            *(f"qu.conditional_norm{i}.{part}_embedding.weight" for i in (1, 2) for part in ("gamma", "beta")),
            *("qu.sample_embed.weight", "qz.embedding.weight"),
        }
    )
    assert encoder.rows("covariate:nothing", 0, pair.columns) == {}
    again = pair.extended.rows(batch, len(pair.known[batch]), pair.columns)
    assert all(torch.equal(again[name], row) for name, row in pair.more[batch][0].items())
    first = next(iter(rows))
    before = encoder.rows(batch, 0, pair.columns)[first].clone()
    encoder.rows(batch, 0, pair.columns)[first] += 1
    assert torch.equal(encoder.rows(batch, 0, pair.columns)[first], before)
    # Extended twice is extended by both.
    once = encoder.extended({batch: pair.more[batch][:1]}, pair.columns)
    twice = once.extended({batch: pair.more[batch][1:]}, pair.columns)
    code = len(pair.known[batch]) + 1
    assert all(
        torch.equal(twice.rows(batch, code, pair.columns)[name], row) for name, row in pair.more[batch][1].items()
    )

    with pytest.raises(InputError, match="is missing"):
        encoder.extended({batch: [{name: row for name, row in rows.items() if name != first}]}, pair.columns)
    with pytest.raises(InputError, match=r"has the shape \(3,\)"):
        encoder.extended({batch: [rows | {first: torch.zeros(3)}]}, pair.columns)


@pytest.mark.parametrize("pair", ["scvi of one batch"], indirect=True)
def test_a_second_batch_of_one(pair):
    """The only batch has no column: it gets zeros, and a block that names no batch is of it."""
    assert pair.encoder.rows(BATCH, 0, pair.columns) == {}
    assert set(pair.more[BATCH][0]) == {"latent/layers.0.table.0"}
    assert (pair.extended.rows(BATCH, 0, pair.columns)["latent/layers.0.table.0"] == 0).all()
    counts = sparse.csr_matrix(pair.made.cells.X)
    parts = counts.indptr.astype(np.int64), counts.indices.astype(np.int32), counts.data.astype(np.float32)
    donors = RNG.integers(0, 3, (counts.shape[0], 1))
    none = pair.extended.encode(*parts, Covariates(categorical=donors)).mean
    assert (none == pair.encoder.encode(*parts, Covariates(categorical=donors)).mean).all()
    second = pair.extended.encode(*parts, Covariates(batch=np.ones(len(donors), np.int64), categorical=donors)).mean
    assert np.abs(second - none).max() > 1e-3
