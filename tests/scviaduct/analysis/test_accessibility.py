"""Accessibility of peaks: what scvi-tools gives, and where it is wrong, what it should."""

from __future__ import annotations

from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
import scvi
import scvi.external
import torch
from scipy import sparse

from scviaduct.analysis import using
from scviaduct.analysis.accessibility import (
    AccessibilityDifferenceOptions,
    AccessibilityOptions,
    PeakviAccessibility,
    PeakviDifference,
)
from scviaduct.analysis.fragments import (
    PoissonAccessibilityOptions,
    PoissonviAccessibility,
    PoissonviDifference,
    called,
)
from scviaduct.errors import InputError
from scviaduct.families.vae import quiet

PEAKVI, POISSONVI = PeakviAccessibility(), PoissonviAccessibility()
DIFFERENCE = {"PEAKVI": PeakviDifference(), "POISSONVI": PoissonviDifference()}
PLANTED = 30


def plainly(cells, function, *positional, **told):
    """What scvi-tools gives, called by hand after the same seed."""
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(cells.seed)
        np.random.seed(cells.seed)  # noqa: NPY002
        return getattr(cells.model, function)(*positional, **told)


def planted():
    """400 cells of two kinds and two batches, 300 peaks, Poisson of mean 0.2; 30 of mean 0.8 in the first kind.

    Both kinds have as many fragments in expectation: 30 further peaks have that mean in the second.
    """
    rng = np.random.default_rng(1)
    kind = np.arange(400) < 200
    rate = np.full((400, 300), 0.2)
    rate[np.ix_(kind, np.arange(PLANTED))] = 0.8
    rate[np.ix_(~kind, np.arange(PLANTED, 2 * PLANTED))] = 0.8
    counts = rng.poisson(rate).astype(np.float32)
    obs = pd.DataFrame({"batch": rng.choice(["a", "b"], 400), "kind": kind}, index=[f"c{i}" for i in range(400)])
    var = pd.DataFrame(index=[f"chr1:{i}-{i + 1}" for i in range(300)])
    return anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=var)


@pytest.fixture(scope="module")
def poisson_model(fitted):
    return fitted(scvi.external.POISSONVI, planted(), 40, lr=1e-2, batch_size=64, n_hidden=32, n_latent=4)


@pytest.fixture(scope="module")
def peak_model(fitted):
    return fitted(scvi.model.PEAKVI, planted(), 40, lr=1e-2, batch_size=64, n_hidden=32, n_latent=4)


@pytest.fixture
def poisson_cells(poisson_model, as_cells):
    return as_cells(poisson_model, planted())


@pytest.fixture
def peak_cells(peak_model, as_cells):
    return as_cells(peak_model, planted())


@pytest.fixture(scope="module")
def a549(shared_data, fitted, as_cells):
    """A PEAKVI of real chromatin: 800 peaks of A549 cells."""
    data = anndata.read_h5ad(shared_data / "multiome_a549_scicar_atac_binary.h5ad")
    often = np.argsort(-np.asarray(data.X.sum(axis=0)).ravel())[:800]
    data = data[np.asarray(data.X[:, often].sum(axis=1)).ravel() > 0, often][:600].copy()
    data.obs["batch"] = data.obs["dex_hours"].astype(str)
    return as_cells(fitted(scvi.model.PEAKVI, data.copy(), 5, n_hidden=32, n_latent=5), data)


def test_accessibility_of_real_chromatin_is_that_of_scvi_tools(a549, monkeypatch):
    names = a549.facts.names
    found = PEAKVI.unit(a549, {}, AccessibilityOptions()).matrices["accessibility"]
    plain = plainly(a549, "get_normalized_accessibility", a549.data.copy())
    assert found.dtype == np.float32
    assert (found == plain.to_numpy()).all()
    chosen = (names[7], names[3], names[500])
    monkeypatch.setattr(using, "_VALUES", 1)  # pieces of 128 cells: nothing is drawn, so nothing changes
    some = PEAKVI.unit(a549, {}, AccessibilityOptions(chosen)).matrices["accessibility"]
    assert (some == found[:, [7, 3, 500]]).all()
    assert PEAKVI.shape(a549.facts, AccessibilityOptions(chosen)).matrices == {"accessibility": chosen}


def test_several_batches_are_a_mean_over_them(a549):
    """scvi-tools takes the first of several, and says nothing."""
    batches = a549.facts.batch_categories[:2]
    found = PEAKVI.unit(a549, {}, AccessibilityOptions(transform_batch=batches)).matrices["accessibility"]
    told = {"return_numpy": True}
    each = [
        plainly(a549, "get_normalized_accessibility", a549.data.copy(), transform_batch=name, **told)
        for name in batches
    ]
    assert np.abs(each[0] - each[1]).max() > 1e-4
    assert np.allclose(found, np.mean(each, axis=0), atol=1e-7)


@pytest.mark.parametrize(
    "options",
    [
        PoissonAccessibilityOptions(samples=1, library_size=1.0),
        PoissonAccessibilityOptions(("chr1:9-10", "chr1:2-3"), samples=2, library_size=0, transform_batch=("b", "a")),
    ],
)
def test_accessibility_of_fragments_is_that_of_scvi_tools(poisson_cells, options):
    found = POISSONVI.unit(poisson_cells, {}, options).matrices["accessibility"]
    told = {"transform_batch": list(options.transform_batch) or None, "n_samples": options.samples}
    told["library_size"] = options.library_size or "latent"
    plain = plainly(poisson_cells, "get_normalized_accessibility", poisson_cells.data.copy(), **told)
    names = options.peaks or poisson_cells.facts.names
    assert (found == plain[list(names)].to_numpy()).all()


def test_a_unit_of_few_cells_is_decoded_too(poisson_cells):
    """scvi-tools refuses fewer than 100; the values are those that it gives of the cells among others."""
    few, options = poisson_cells.data[:20].copy(), PoissonAccessibilityOptions(samples=2)
    with quiet(), pytest.raises(ValueError, match="at least 100"):
        poisson_cells.model.get_normalized_accessibility(few.copy())
    cells = replace(poisson_cells, data=few)
    found = POISSONVI.unit(cells, {}, options).matrices["accessibility"]
    told = {"indices": np.arange(20), "n_samples": 2, "library_size": 1e4}
    plain = plainly(poisson_cells, "get_normalized_accessibility", poisson_cells.data.copy(), **told)
    assert (found == plain.to_numpy()).all()
    compared = DIFFERENCE["POISSONVI"].compare(cells, np.arange(20) < 5, AccessibilityDifferenceOptions(samples=50))
    shown = compared.tables["peaks"].set_index("peak").loc[list(cells.facts.names), "detected2"]
    assert np.allclose(shown, (few.X[5:].toarray() > 0).mean(axis=0))


def test_region_factors_stay_as_they_were(poisson_cells, monkeypatch):
    layer = poisson_cells.model.module.decoder.px_scale_decoder[-2]
    bias, values = layer.bias, layer.bias.detach().clone()
    POISSONVI.unit(poisson_cells, {}, PoissonAccessibilityOptions(samples=1))
    assert layer.bias is bias
    strange = replace(poisson_cells, data=planted())
    strange.data.obs["batch"] = "c"  # a batch that the model does not know
    with pytest.raises(ValueError, match="c"):
        POISSONVI.unit(strange, {}, PoissonAccessibilityOptions())
    monkeypatch.setattr(scvi.model.base.RNASeqMixin, "_get_transform_batch_gen_kwargs", None)  # fails while decoding
    for _ in range(2):
        with pytest.raises(TypeError):
            POISSONVI.unit(poisson_cells, {}, PoissonAccessibilityOptions())
    assert layer.bias is bias
    assert torch.equal(bias, values)
    assert not [name for name in poisson_cells.data.uns if name.startswith("_scvi")]


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("name", ["PEAKVI", "POISSONVI"])
def test_planted_peaks_come_out_and_others_do_not(peak_cells, poisson_cells, name, corrected):
    cells = {"PEAKVI": peak_cells, "POISSONVI": poisson_cells}[name]
    first = cells.data.obs["kind"].to_numpy()
    delta = {"PEAKVI": 0.1, "POISSONVI": 1.0}[name]  # planted: a fold change of 2 in log2, of probabilities 1.6
    options = AccessibilityDifferenceOptions(samples=1000, delta=delta, batch_correction=corrected)
    one = DIFFERENCE[name]
    one.check(cells.facts, options)
    done = one.compare(cells, first, options)
    table = done.tables["peaks"]
    pd.testing.assert_frame_equal(table, one.compare(cells, first, options).tables["peaks"], check_exact=True)
    higher, lower = (table["peak"].isin(cells.facts.names[i : i + PLANTED]) for i in (0, PLANTED))
    assert table[higher | lower]["is_da"].mean() > 0.9
    assert table[~(higher | lower)]["is_da"].mean() < 0.1  # a rate of 0.05 is asked for, in expectation
    assert (table[higher]["difference"] > 0).all()
    assert (table[lower]["difference"] < 0).all()
    assert (table["detected1"] - table["detected2"])[higher].min() > 0.2
    if name == "POISSONVI":
        assert table[higher]["lfc_median"].median() == pytest.approx(2, abs=0.7)
    assert done.facts == {"cells": {"first": 200, "against": 200}, "mode": "change"}


def test_differential_accessibility_is_that_of_scvi_tools(peak_cells):
    first = peak_cells.data.obs["kind"].to_numpy()
    for mode, lead in (("change", "proba_da"), ("vanilla", "proba_higher")):
        options = AccessibilityDifferenceOptions(samples=200, mode=mode)
        table = DIFFERENCE["PEAKVI"].compare(peak_cells, first, options).tables["peaks"]
        table = table.set_index("peak")
        told = {"idx1": first, "idx2": ~first, "mode": mode, "n_samples_overall": 200, "silent": True}
        plain = plainly(peak_cells, "differential_accessibility", peak_cells.data.copy(), **told).loc[table.index]
        assert (table[lead] == plain["prob_da"]).all()
        assert (table["bayes_factor"] == plain["bayes_factor"]).all()
        assert np.allclose(table["difference"], -plain["effect_size"])
        assert ("is_da" in table) == (mode == "change")


def test_what_scvi_tools_makes_of_fragments_is_passed_over_for_a_reason(poisson_cells):
    """It takes the larger of "differs" and "does not differ", so that no peak is below a half."""
    first = poisson_cells.data.obs["kind"].to_numpy()
    told = {"idx1": first, "idx2": ~first, "delta": 1.0, "n_samples_overall": 1000, "silent": True}
    theirs = plainly(poisson_cells, "differential_accessibility", poisson_cells.data.copy(), **told)
    assert theirs["proba_de"].min() >= 0.5
    ours = DIFFERENCE["POISSONVI"]
    options = AccessibilityDifferenceOptions(samples=1000, delta=1.0)
    table = ours.compare(poisson_cells, first, options).tables["peaks"].set_index("peak").loc[theirs.index]
    assert np.allclose(table["lfc_median"], theirs["lfc_median"])  # the same samples
    null = ~table.index.isin(poisson_cells.facts.names[: 2 * PLANTED])
    assert theirs["is_de_fdr_0.05"][null].mean() > 0.9 > 0.05 > table["is_da"][null].mean()
    vanilla = replace(options, mode="vanilla")
    assert "proba_higher" in ours.compare(poisson_cells, first, vanilla).tables["peaks"]


def test_peaks_are_called_as_scvi_tools_calls_genes():
    from scvi.model.base._de_core import _fdr_de_prediction

    for seed in range(5):
        probability = np.random.default_rng(seed).beta(2, 0.3, 200)
        assert (called(probability, 0.1) == _fdr_de_prediction(pd.Series(probability), fdr=0.1).to_numpy()).all()
    assert called(np.array([0.2, 0.99, 0.96]), 0.05).tolist() == [False, True, True]


def test_what_cannot_be_is_refused(poisson_cells):
    facts = poisson_cells.facts
    for one, options in ((PEAKVI, AccessibilityOptions), (POISSONVI, PoissonAccessibilityOptions)):
        one.check(facts, options())
        with pytest.raises(InputError, match=r"'chr2:9-10' is not a peak.*chr1:"):
            one.check(facts, options(("chr2:9-10",)))
        with pytest.raises(InputError, match="'c' is not a batch"):
            one.check(facts, options(transform_batch=("c",)))
    with pytest.raises(InputError, match="--samples 0"):
        POISSONVI.check(facts, PoissonAccessibilityOptions(samples=0))
    with pytest.raises(InputError, match="--fdr 0"):
        DIFFERENCE["PEAKVI"].check(facts, AccessibilityDifferenceOptions(fdr=0))
    with pytest.raises(InputError, match="first selection has no cell"):
        DIFFERENCE["PEAKVI"].compare(poisson_cells, np.zeros(400, bool), AccessibilityDifferenceOptions())
