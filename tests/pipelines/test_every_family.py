"""The table of families: each trains on real cells, maps a query of a new batch by surgery, and gives its outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest

import pipelines as sv
from pipelines.derivation import sources_of
from pipelines.deriving import derive
from scviaduct.analysis import Output, analyses, analysis
from scviaduct.analysis.expression import ExpressionOptions
from scviaduct.errors import InputError
from scviaduct.families.vae import quiet
from scviaduct.mapping.adapters import batch_of
from scviaduct.mapping.decoding import AVERAGE, Decoder, Wanted, decoded_facts
from scviaduct.store import Store
from tests.support.references import RECIPES, UNPAIRED

if TYPE_CHECKING:
    from tests.support.references import Tiny

pytest_plugins = ["tests.support.tiny"]

TOLD = {"engine": "inline", "quiet": True}
SMALL = {"surgery_epochs": 2, "keep_obs": ["batch", "donor", "sex"], "shard_cells": 50} | TOLD
SCREEN = {"perturbation": "sex", "controls": "f"}
DONORS = {"sample_covariates": ("condition",), "permutations": 19}

# Output: options that make it small. Each output of a family is here, and no other.
OUTPUTS: dict[str, dict[str, dict[str, Any]]] = {
    "SCVI": {"latents": {}, "normalised-expression": {"samples": 2}, "posterior-predictive": {"samples": 2}},
    "SCANVI": {"latents": {}, "normalised-expression": {"samples": 2}, "posterior-predictive": {"samples": 2}},
    "TOTALVI": {
        "latents": {},
        "denoised": {"samples": 2},
        "protein-foreground": {"samples": 2},
        "imputed-proteins": {"samples": 2},
    },
    "PEAKVI": {"latents": {}, "accessibility": {}},
    "MULTIVI": {"latents": {}, "imputed-expression": {}, "imputed-accessibility": {}},
    "MRVI": {
        "latents": {},
        "sample-representations": {},
        "sample-distances": {"group_by": "sex"},
        "admissible": {},
        "differential-abundance": DONORS,
        "multivariate-de": DONORS | {"samples": 2},
    },
    "ContrastiveVI": {
        "latents": {},
        "perturbation-score": SCREEN | {"permutations": 20},
        "guide-enrichment": SCREEN | {"guide": "donor"},
    },
}
PAIRS = [(family, what) for family, told in OUTPUTS.items() for what in told]


@dataclass(frozen=True)
class Mapped:
    """A query that was mapped to a reference."""

    tiny: Tiny
    store: str
    result: Any

    @property
    def space(self):
        return Store.open(self.store).space()

    def source(self):
        return sources_of(Store.open(self.store), self.space, self.tiny.reference)


@pytest.fixture(autouse=True)
def without_ray(monkeypatch):
    """Work in this process asks nothing of Ray, which would start itself to answer."""

    def asked(*_, **__):
        raise AssertionError("Ray was asked")

    monkeypatch.setattr("ray.get_gpu_ids", asked)
    monkeypatch.setattr("ray.init", asked)


@pytest.fixture(scope="module")
def mapped(tiny, tmp_path_factory):
    """The query of a family, mapped when first asked for."""
    folder, there = tmp_path_factory.mktemp("mapped"), {}

    def get(family):
        if family not in there:
            made, store = tiny(family), str(folder / family)
            result = sv.map(made.query, reference=str(made.reference.path), store=store, **SMALL)
            there[family] = Mapped(made, store, result)
        return there[family]

    return get


def latents(table):
    """Cell to its latent."""
    return dict(zip(table["observation_id"].to_pylist(), table["latent"].to_pylist(), strict=True))


def blocks(at, obs=()):
    """Decoded cells of each unit, their ids, and what decoded them."""
    reference, source = at.tiny.reference, at.source()
    decoder = Decoder(reference, source.settings, source.fleet)
    for unit in source.units:
        block = Wanted.of(reference, source.settings, source.fleet, obs).read(unit.shard, reference)
        cells, counted = decoder.cells(block, obs, 7)
        yield decoder.model, cells, np.array(block.obs["observation_id"].to_pylist())[counted]


def plain(family, model, data):
    """Latents as scvi-tools gives them, by the names that they have here; the first is the store's."""
    calls: dict[str, dict[str, Any]] = {"latent": {}}
    if family == "MRVI":
        calls["z"] = {"give_z": True}
    if family == "ContrastiveVI":
        calls = {"latent": {"representation_kind": "background"}, "salient": {"representation_kind": "salient"}}
    with quiet():
        return {name: model.get_latent_representation(data, **told) for name, told in calls.items()}


@pytest.mark.parametrize("family", RECIPES)
def test_a_new_batch_gets_one_adapter_that_its_rows_name(mapped, rows, family):
    at = mapped(family)
    (fitted,) = at.result.adapters
    assert (at.result.state, fitted.state, at.result.units) == ("committed", "fitted", 2)
    (told,) = at.space.adapters.manifests()
    kind = "sample" if family == "MRVI" else "batch"
    assert batch_of(told).values == ((kind, at.tiny.held),)
    assert (told["digest"], told["facts"]["epochs"]) == (fitted.adapter, 2)
    table = rows(at.store)
    new = np.array(table[at.tiny.column].to_pylist()) == at.tiny.held
    named = np.array(table["adapter"].to_pylist(), object)
    assert set(named[new]) == {fitted.adapter}
    assert set(named[~new]) == {None}
    assert (~new).sum() == 20
    assert new.sum() == fitted.cells == told["facts"]["cells_seen"]


@pytest.mark.parametrize("family", RECIPES)
def test_cells_of_known_batches_map_as_they_do_without_the_new_one(mapped, rows, family, tmp_path):
    at = mapped(family)
    told = {"reference": str(at.tiny.reference.path), "store": str(tmp_path / "alone"), "surgery": "off"}
    alone = sv.map(at.tiny.known, **told, **SMALL)
    assert alone.adapters == ()
    mixed, known = rows(at.store), rows(tmp_path / "alone")
    of_mixed = latents(mixed)
    assert len(known) == 20
    for cell, latent in latents(known).items():
        assert of_mixed[cell] == latent, cell
    kept = mixed.filter([value is None for value in mixed["adapter"].to_pylist()])
    assert kept["label"].to_pylist() == known["label"].to_pylist()


@pytest.mark.parametrize("family", RECIPES)
def test_latents_are_those_of_scvi_tools_on_the_widened_model(mapped, rows, family):
    at = mapped(family)
    stored, n_cells, moved = latents(rows(at.store)), 0, 0.0
    for model, cells, names in blocks(at):
        for name, expected in plain(family, model, cells.data).items():
            ours = np.array([stored[cell] for cell in names]) if name == "latent" else cells.encoded.others[name]
            spread = expected.std(axis=0)
            assert (np.abs(ours - expected) / spread).max() <= 1e-5, name
        # Where the new cells are told to be of a batch that is known, they lie elsewhere: surgery is seen.
        other = cells.data.copy()
        column = at.tiny.column
        for part in (other, *getattr(other, "mod", {}).values()):
            if column in part.obs:
                part.obs[column] = "a" if column == "batch" else "x"
        new = (cells.data.obs[column] == at.tiny.held).to_numpy()
        elsewhere = plain(family, model, other)["latent" if family != "MRVI" else "z"][new]
        ours = cells.encoded.mean if family != "MRVI" else cells.encoded.others["z"]
        moved = max(moved, np.abs(ours[new] - elsewhere).max())
        n_cells += len(names)
    assert n_cells == len(stored)
    assert moved > 1e-3


def test_the_table_has_every_output():
    for family, told in OUTPUTS.items():
        there = {one.name for found in analyses().values() for one in found if family in one.families}
        assert {name for name in there if isinstance(analysis(name, family), Output)} == {*told}, family
    assert {*OUTPUTS} == {*RECIPES}


@pytest.mark.parametrize(("family", "what"), PAIRS)
def test_every_output_is_derived_whole(mapped, rows, family, what):
    at, told = mapped(family), OUTPUTS[family][what]
    result = derive(at.store, what, package=str(at.tiny.reference.path), **TOLD, **told)
    n_cells, fleet = at.result.cells, at.source().fleet
    assert (result.state, result.units, result.derived_units, result.cells) == ("committed", 2, 2, n_cells)
    one = analysis(what, family)
    shape = one.shape(decoded_facts(at.tiny.reference, fleet.addresses), one.options(**told))
    assert set(result.columns) == {f"{what.replace('-', '_')}.{name}" for name in shape.columns}
    assert set(result.matrices) == {*shape.matrices}
    assert result.columns or result.matrices or result.tables
    table = rows(at.store)
    assert len(table) == n_cells
    for name in result.columns:
        values = table[name]
        assert values.null_count == 0, name
        if pa.types.is_floating(values.type):
            assert np.isfinite(values.to_numpy()).all(), name
    for name, features in shape.matrices.items():
        found = np.concatenate([values for _, values in at.space.matrix(what, name)])
        assert (found.shape, found.dtype) == ((n_cells, len(features)), np.float32)
        assert np.isfinite(found).all(), name
        assert found.std() > 0, name
    for name, found in result.tables.items():
        assert len(found), name
        assert found.equals(at.space.table(what, name).to_pandas()), name


def test_peaks_of_cells_without_any_are_imputed(mapped, rows):
    """The query's first cells have genes alone: they get accessibility, and a column says that it is imputed."""
    at = mapped("MULTIVI")
    at_once = {"package": str(at.tiny.reference.path), **TOLD}
    derive(at.store, "imputed-accessibility", name="open", **at_once)
    measured = [value for part in at.space.read(["open.measured"]) for value in part[0].to_pylist()]
    assert measured.count(False) == UNPAIRED
    found = np.concatenate([values for _, values in at.space.matrix("open", "accessibility")])
    assert ((found > 0) & (found < 1)).all()


def test_the_decoder_of_a_reference_that_encodes_no_batch_is_fitted_when_asked(tiny, rows, tmp_path):
    """No latent moves, so what is decoded is all that surgery changes: of the new batch's cells alone."""
    made = tiny("SCVI", encode_covariates="False")
    reference, found = made.reference, {}
    assert not reference.encoded_batch
    told = {"reference": str(reference.path), **SMALL}
    for mode in ("auto", "decoder"):
        store = str(tmp_path / mode)
        at = found[mode] = Mapped(made, store, sv.map(made.query, store=store, surgery=mode, **told))
        options = {"package": str(reference.path), "samples": 2}
        assert derive(store, "normalised-expression", **options, **TOLD).state == "committed"
        assert np.isfinite(np.concatenate([x for _, x in at.space.matrix("normalised-expression", "expression")])).all()
    plain, fitted = found["auto"], found["decoder"]
    assert (plain.result.adapters, [item.state for item in fitted.result.adapters]) == ((), ["fitted"])
    tables = rows(plain.store), rows(fitted.store)
    assert tables[0]["observation_id"].equals(tables[1]["observation_id"])
    assert tables[0]["latent"].to_pylist() == tables[1]["latent"].to_pylist()
    new = 0
    for (_, average, _), (_, own, _) in zip(blocks(plain), blocks(fitted), strict=True):
        decoded = [
            analysis("normalised-expression", "SCVI").unit(cells, {}, ExpressionOptions(samples=2))
            for cells in (average, own)
        ]
        held = (own.data.obs["batch"] == made.held).to_numpy()
        assert set(average.data.obs["batch"][held]) == {AVERAGE}
        one, other = (part.matrices["expression"] for part in decoded)
        # The same draws: cells of known batches decode as before.
        np.testing.assert_array_equal(one[~held], other[~held])
        assert (np.abs(np.log2(other[held] / one[held])).max(axis=1) > 1e-3).all()
        new += held.sum()
    assert new == fitted.result.adapters[0].cells


def test_controls_that_no_cell_is_one_of_are_refused(tiny, tmp_path):
    screen = tiny("ContrastiveVI")
    told = {"reference": str(screen.reference.path), "store": str(tmp_path / "s"), "engine": "inline", "quiet": True}
    with pytest.raises(InputError, match=r"--background sex=x: no cell has 'x' in 'sex'.*There are: .*f"):
        sv.map(str(screen.query), background=["sex=x"], **told)
    with pytest.raises(InputError, match=r"--background sexes=f: .* has no obs column 'sexes'"):
        sv.map(str(screen.query), background=["sexes=f"], **told)
    assert not (tmp_path / "s").exists()
    result = sv.map(str(screen.query), background=["sex=f"], surgery_epochs=1, **told)
    assert [item.state for item in result.adapters] == ["fitted"]
