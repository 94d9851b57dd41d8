"""A widened model is the reference to the reference's cells, and treats a new category as its vectors say.

Tolerance: 1e-6 of the largest value. Matrix products of other widths sum in another order; scvi-tools samples with the
same seed on either side.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from scviaduct.errors import InputError
from scviaduct.families import Recipe, family
from scviaduct.families.slots import BATCH, SAMPLE, covariate
from scviaduct.families.vae import quiet
from scviaduct.families.widening import Added, known_categories, widen
from scviaduct.references.saved.archive import SavedModel, read_model_file
from tests.support.families import MODELS, Made, cells_of, made

TOLERANCE = 1e-6
COPIED = 1
"""Position of the category whose vectors a new one gets."""


@pytest.fixture(scope="module")
def reference(request, shared_data, tmp_path_factory):
    return made(request.param, shared_data, tmp_path_factory.mktemp("model") / "saved")


def slots_of(made_model):
    facts = made_model.family.facts(made_model.saved)
    return facts, made_model.family.slots(made_model.model(), facts)


def vectors(saved, slots, name, code):
    """What a model has of a category."""
    return {
        slot.name: saved.state_dict[slot.name].select(slot.dim, slot.start + code).clone()
        for slot in slots
        if slot.covariate == name and slot.count
    }


def copied(reference):
    """A model in which every covariate has two more categories: the copy of an old one, and the mean of all."""
    facts, slots = slots_of(reference)
    added = {}
    for name, known in known_categories(facts).items():
        code = min(COPIED, len(known) - 1)
        added[name] = (Added("twin", vectors(reference.saved, slots, name, code)), Added("mean", {}))
    return facts, widen(reference.saved, facts, slots, added)


def frames(found):
    """Everything in what scvi-tools gives, as arrays."""
    if isinstance(found, dict):
        return [array for value in found.values() for array in frames(value)]
    if isinstance(found, tuple | list):
        return [array for value in found for array in frames(value)]
    return [] if found is None else [np.asarray(found, np.float64)]


def outputs(model):
    """Latents, what is decoded from them, the loss of the cells and their labels, by scvi-tools."""
    name = type(model).__name__
    if name == "ContrastiveVI":
        kinds = ("background", "salient")
        calls = [partial(model.get_latent_representation, representation_kind=kind) for kind in kinds]
    else:
        calls = [model.get_latent_representation]
    if name == "MRVI":
        calls += [partial(model.get_latent_representation, give_z=True)]
    if name not in ("MRVI", "ContrastiveVI", "MULTIVI"):
        calls += [model.get_reconstruction_error]
    if name == "SCANVI":
        calls += [partial(model.predict, soft=True)]
    return seeded(model, calls) + decoded(model)


def decoded(model, **told):
    """Expression and accessibility by scvi-tools, as far as the model has them."""
    name = type(model).__name__
    calls = [] if name in ("PEAKVI", "POISSONVI") else [partial(model.get_normalized_expression, **told)]
    if name in ("MULTIVI", "PEAKVI", "POISSONVI"):
        calls += [partial(model.get_normalized_accessibility, **told)]
    return seeded(model, calls)


def seeded(model, calls):
    model.is_trained_ = True
    found = []
    with quiet():
        for call in calls:
            torch.manual_seed(0)
            np.random.seed(0)  # noqa: NPY002 - scvi-tools draws from it
            found += frames(call())
    return found


def apart(found, expected):
    assert len(found) == len(expected)
    assert found
    scale = [max(np.abs(array).max(), 1e-12) for array in expected]
    return max(np.abs(a - b).max() / s for a, b, s in zip(found, expected, scale, strict=True))


@pytest.mark.parametrize("reference", MODELS, indirect=True)
def test_reference_cells_are_as_before_and_a_twin_is_as_the_old_one(reference):
    """Whether cells are of the new category, or are decoded as if they were."""
    facts, wide = copied(reference)
    before = {name: tensor.clone() for name, tensor in reference.saved.state_dict.items()}
    plain, widened = reference.model(), reference.model(wide)
    expected = outputs(plain)
    assert apart(outputs(widened), expected) <= TOLERANCE
    assert reference.family.facts(wide).genes == facts.genes
    assert all((before[name] == tensor).all() for name, tensor in reference.saved.state_dict.items())

    columns = {BATCH: facts.batch_key, SAMPLE: facts.sample_key}
    columns |= {covariate(column): column for column in facts.categorical_covariates}
    twins = reference
    for name, known in known_categories(facts).items():
        twins = Made(reference.family, wide, twins.renamed(columns[name], known[min(COPIED, len(known) - 1)], "twin"))
        assert (twins.cells.obs[columns[name]] == "twin").sum() > 50
    assert apart(outputs(twins.model()), expected) <= TOLERANCE

    if not facts.sample_key:  # the function of an MRVI takes no transform_batch
        known = facts.batch_categories
        expected = decoded(plain, transform_batch=known[min(COPIED, len(known) - 1)])
        assert apart(decoded(widened, transform_batch="twin"), expected) <= TOLERANCE
        mean = decoded(widened, transform_batch="mean")
        assert all(np.isfinite(array).all() for array in mean)
        assert len(known) == 1 or apart(mean, expected) > 1e-4


@pytest.mark.parametrize("reference", ["scvi", "multivi"], indirect=True)
def test_facts_and_encoder_of_a_widened_model(reference):
    facts, wide = copied(reference)
    found = reference.family.facts(wide)
    assert found.batch_categories == (*facts.batch_categories, "twin", "mean")
    assert found.categorical_covariates == {
        column: (*known, "twin", "mean") for column, known in facts.categorical_covariates.items()
    }
    encoder = reference.family.fold(reference.model(wide), found, "cpu")
    for name, known in known_categories(found).items():
        columns = tuple(found.categorical_covariates)
        twin = encoder.rows(name, len(known) - 2, columns)
        old = encoder.rows(name, COPIED, columns)
        mean = encoder.rows(name, len(known) - 1, columns)
        assert twin
        assert all(torch.equal(twin[row], old[row]) for row in twin)
        others = [encoder.rows(name, code, columns) for code in range(len(known) - 2)]
        for row in mean:
            assert torch.allclose(mean[row], torch.stack([other[row] for other in others]).mean(0), atol=1e-6)


@pytest.mark.parametrize("reference", ["scvi of one batch"], indirect=True)
def test_a_second_batch_of_a_model_of_one(reference):
    facts, slots = slots_of(reference)
    (first,) = [slot for slot in slots if slot.covariate == BATCH and slot.name.startswith("z_encoder")]
    assert first.count == 0
    vector = torch.randn(16)
    wide = widen(reference.saved, facts, slots, {BATCH: [Added("new", {first.name: vector})]})
    columns = wide.state_dict[first.name][:, first.start : first.start + 2]
    assert (columns[:, 0] == 0).all()
    assert torch.equal(columns[:, 1], vector)
    assert apart(outputs(reference.model(wide)), outputs(reference.model())) <= TOLERANCE
    told = outputs(reference.model(wide, reference.renamed("same", "one", "new")))
    assert apart(told, outputs(reference.model())) > 1e-3


@pytest.mark.parametrize("reference", ["scvi"], indirect=True)
def test_differential_expression_between_new_batches(reference):
    _, wide = copied(reference)
    model = reference.model(wide, reference.renamed("batch", "a", "twin"))
    model.is_trained_ = True
    with quiet():
        told = model.differential_expression(groupby="batch", group1="twin", group2="b", mode="change")
    assert set(told.index) == set(reference.cells.var_names)
    assert np.isfinite(told["lfc_mean"]).all()


def with_numbers(reference):
    """The same model, whose batches scvi-tools registered as 1, 2 and 3."""
    saved = reference.saved
    field = saved.attr_dict["registry_"]["field_registries"]["batch"]
    changed = field | {"state_registry": field["state_registry"] | {"categorical_mapping": np.array([1, 2, 3])}}
    fields = saved.attr_dict["registry_"]["field_registries"] | {"batch": changed}
    registry = saved.attr_dict["registry_"] | {"field_registries": fields}
    cells = reference.cells.copy()
    cells.obs["batch"] = pd.Categorical(cells.obs["batch"].map({"a": 1, "b": 2, "c": 3}))
    changed_model = SavedModel(saved.state_dict, saved.var_names, saved.attr_dict | {"registry_": registry})
    return Made(reference.family, changed_model, cells)


@pytest.mark.parametrize("reference", ["scvi"], indirect=True)
def test_categories_that_are_numbers(reference):
    numbered = with_numbers(reference)
    _, wide = copied(numbered)
    expected = outputs(reference.model())
    assert apart(outputs(numbered.model(wide)), expected) <= TOLERANCE
    assert apart(outputs(numbered.model(wide, numbered.renamed("batch", "2", "twin"))), expected) <= TOLERANCE


def test_proteins_that_a_batch_lacks_and_panels(shared_data, tmp_path):
    cells = cells_of("TOTALVI", shared_data)
    proteins = np.flatnonzero(cells.var["modality"] == "protein")
    counts = cells.X.toarray()
    counts[np.ix_((cells.obs["batch"] == "a").to_numpy().nonzero()[0], proteins[:4])] = 0
    counts[:, proteins[4]] = 0
    cells.X = type(cells.X)(counts)
    cells.obs["panel"] = cells.obs["batch"].map({"a": 1, "b": 2, "c": 3})
    recipe = Recipe(family="totalvi", batch_key="batch", panel_key="panel")
    found = family("totalvi")
    with quiet():
        model = found.create(
            found.setup(cells.copy(), recipe), {"n_hidden": 12, "empirical_protein_background_prior": False}, recipe
        )
        model.module.eval()
        model.is_trained_ = True
        model.save(str(tmp_path / "saved"))
    reference = Made(found, read_model_file(tmp_path / "saved" / "model.pt"), cells)
    facts, wide = copied(reference)
    fields = wide.attr_dict["registry_"]["field_registries"]
    masks = fields["proteins"]["state_registry"]["protein_batch_mask"]
    assert sorted(masks) == ["0", "1", "2", "3", "4"]
    assert masks["0"].sum() == len(proteins) - 5
    assert masks["3"].sum() == masks["4"].sum() == len(proteins) - 1
    assert fields["panel"]["summary_stats"]["n_panel"] == 5
    expected = outputs(reference.model())
    assert apart(outputs(reference.model(wide)), expected) <= TOLERANCE
    twin = reference.renamed("batch", facts.batch_categories[COPIED], "twin")
    assert apart(outputs(reference.model(wide, twin)), expected) <= TOLERANCE


@pytest.mark.parametrize("reference", ["scvi"], indirect=True)
def test_refusals(reference):
    facts, slots = slots_of(reference)
    name = next(slot.name for slot in slots if slot.covariate == BATCH)

    def told(added):
        with pytest.raises(InputError) as error:
            widen(reference.saved, facts, slots, added)
        return str(error.value)

    assert "'b' is to be a further category of the covariate 'batch'" in told({BATCH: [Added("b", {})]})
    assert "there is one of that name" in told({BATCH: [Added("n", {}), Added("n", {})]})
    assert "'sample', which the model was not set up with" in told({SAMPLE: [Added("n", {})]})
    assert "has the shape (3,) instead of" in told({BATCH: [Added("n", {name: torch.zeros(3)})]})
    assert "vector of 'n' for 'other.weight'" in told({BATCH: [Added("n", {"other.weight": torch.zeros(3)})]})
    same = widen(reference.saved, facts, slots, {BATCH: []})
    assert all(same.state_dict[key] is tensor for key, tensor in reference.saved.state_dict.items())
