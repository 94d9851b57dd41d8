"""Fitting one query batch: what is trained, what is not, and that it equals columns put where they belong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scviaduct.analysis.using import registered
from scviaduct.families.registered import own_categories
from scviaduct.families.slots import BATCH, SAMPLE, covariate
from scviaduct.families.vae import quiet
from scviaduct.families.widening import Added, known_categories, widen
from scviaduct.mapping.fitting import Rows, Training, fit, mean_of, replaced
from scviaduct.mapping.layout import Laid
from tests.support.families import MODELS, made

BRIEF = Training(epochs=3, batch_size=64, patience=5)
ENCODES = [name for name in MODELS if name not in ("scvi of one batch", "totalvi of one batch", "scvi, not encoded")]


@pytest.fixture(scope="module")
def model_of(shared_data, tmp_path_factory):
    held = {}

    def make(name):
        if name not in held:
            one = made(name, shared_data, tmp_path_factory.mktemp("model") / "saved")
            held[name] = one, one.model(), one.family.facts(one.saved)
        return held[name]

    return make


def laid(one, facts, trained, averaged=(), rows=slice(0, 90)):
    """Cells as if of the first categories of some covariates, in the model's layout."""
    cells = one.cells[rows].copy()
    known = known_categories(facts)
    for name in (*trained, *averaged):
        column = {BATCH: facts.batch_key, SAMPLE: facts.sample_key}.get(name, name.removeprefix(covariate("")))
        cells.obs[column] = known[name][0]
    if facts.labels_key:
        cells.obs[facts.labels_key] = "u"
    flags = {"background": torch.arange(cells.n_obs) % 3 == 0} if one.family.needs.background else {}
    with quiet():
        data = one.family.layout(one.saved, own_categories(one.saved.attr_dict["registry_"], cells, facts))
    return Laid(data, tuple(trained), tuple(averaged), flags=flags)


def lead(name):
    return SAMPLE if MODELS[name][0] == "MRVI" else BATCH


@pytest.mark.parametrize("name", ENCODES)
def test_trains_the_slots_alone_and_is_repeatable(model_of, name):
    one, model, facts = model_of(name)
    slots = one.family.slots(model, facts)
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    with quiet():
        first = fit(model, one.family, slots, laid(one, facts, [lead(name)]), BRIEF)
        torch.rand(7)  # someone else draws
        fit(model, one.family, slots, laid(one, facts, [lead(name)], rows=slice(100, 160)), BRIEF)
        again = fit(model, one.family, slots, laid(one, facts, [lead(name)]), BRIEF)
    after = model.module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(parameter.grad is None for parameter in model.module.parameters())
    assert set(first.vectors) == {lead(name)}
    assert set(first.vectors[lead(name)]) == {slot.name for slot in slots if slot.covariate == lead(name)}
    # Another batch between two fits changes neither: a batch fitted together with others equals one fitted alone.
    assert all(torch.equal(vector, again.vectors[lead(name)][key]) for key, vector in first.vectors[lead(name)].items())
    assert first.loss_after < first.loss_before
    moved = {
        slot.name
        for slot in slots
        if slot.covariate == lead(name)
        and not torch.equal(first.vectors[lead(name)][slot.name], mean_of(before[slot.name], slot))
    }
    # Both halves learn; what no loss reads (an encoder of observed library sizes, absent proteins) stays where it was.
    assert any(part in told for told in moved for part in ("z_encoder", "encoder.encoder", "qu.", "embeddings_dict"))
    assert any("decoder" in told or told.startswith(("qz.", "px.")) or "embeddings" in told for told in moved)


@pytest.mark.parametrize("name", ENCODES)
def test_a_replaced_category_equals_a_column_where_it_belongs(model_of, name):
    one, model, facts = model_of(name)
    covariates = [lead(name), *map(covariate, facts.categorical_covariates)][:2]
    slots = one.family.slots(model, facts)
    generator = torch.Generator().manual_seed(3)
    weights = model.module.state_dict()
    of_covariate = {of: [slot for slot in slots if slot.covariate == of] for of in covariates}
    shapes = {slot.name: mean_of(weights[slot.name], slot).shape for slot in slots}
    vectors = {
        of: {slot.name: torch.randn(shapes[slot.name], generator=generator).abs() * 0.3 for slot in own}
        for of, own in of_covariate.items()
    }
    known = known_categories(facts)
    told = laid(one, facts, covariates)
    pairs = {of: [(slot, vectors[of][slot.name]) for slot in slots if slot.covariate == of] for of in covariates}
    with (
        torch.no_grad(),
        registered(model, told.data),
        one.family.fitting(model, told.data),
        replaced(model.module, pairs),
    ):
        torch.manual_seed(0)
        expected = one.family.loss(model.module, Rows(model, told, "cpu").take(np.arange(90)))
    wider = one.model(widen(one.saved, facts, slots, {of: [Added("new", vectors[of])] for of in covariates}))
    cells = one.cells[:90].copy()
    for of in covariates:
        column = {BATCH: facts.batch_key, SAMPLE: facts.sample_key}.get(of, of.removeprefix(covariate("")))
        cells.obs[column] = "new"
        assert "new" not in known[of]
    if facts.labels_key:
        cells.obs[facts.labels_key] = "u"
    with quiet():
        data = one.family.layout(one.saved, cells)
    wide = Laid(data, (), flags=told.flags)
    with torch.no_grad(), registered(wider, data), one.family.fitting(wider, data):
        torch.manual_seed(0)
        found = one.family.loss(wider.module, Rows(wider, wide, "cpu").take(np.arange(90)))
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_a_sample_without_a_cell_gives_the_means(model_of):
    one, model, facts = model_of("scvi")
    slots = one.family.slots(model, facts)
    fitted = fit(model, one.family, slots, laid(one, facts, [BATCH], rows=slice(0, 0)), BRIEF)
    weights = model.module.state_dict()
    for slot in slots:
        if slot.covariate == BATCH:
            assert torch.equal(fitted.vectors[BATCH][slot.name], mean_of(weights[slot.name], slot))
    assert fitted.epochs == fitted.cell_epochs == 0


def test_further_covariates_stay_at_the_mean(model_of):
    one, model, facts = model_of("scvi")
    slots = one.family.slots(model, facts)
    donor = covariate("donor")
    with quiet():
        fitted = fit(model, one.family, slots, laid(one, facts, [BATCH], [donor]), BRIEF)
    weights = model.module.state_dict()
    for slot in slots:
        if slot.covariate == donor:
            assert torch.equal(fitted.vectors[donor][slot.name], mean_of(weights[slot.name], slot))


def test_stops_early_and_keeps_the_best(model_of):
    one, model, facts = model_of("scvi")
    slots = one.family.slots(model, facts)
    hasty = Training(epochs=40, batch_size=32, lr=5.0, patience=2)  # steps so large that it only gets worse
    with quiet():
        fitted = fit(model, one.family, slots, laid(one, facts, [BATCH], rows=slice(0, 170)), hasty)
    assert fitted.epochs == fitted.best + 2 < 40
    assert fitted.loss_after <= fitted.loss_before
