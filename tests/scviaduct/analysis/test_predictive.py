"""Posterior predictive checks: sums that merge, and a likelihood that does not fit is seen not to."""

from __future__ import annotations

from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from scvi.criticism import PosteriorPredictiveCheck

from scviaduct.analysis import using
from scviaduct.analysis.predictive import PosteriorPredictive, PredictiveOptions
from scviaduct.errors import InputError
from scviaduct.families.vae import quiet

PREDICTIVE = PosteriorPredictive()


def replicates(cells, samples):
    """What scvi-tools draws after the same seed: shape ``(samples, cells, genes)``."""
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(cells.seed)
        drawn = cells.model.posterior_predictive_sample(cells.data.copy(), n_samples=samples).todense()
    return drawn.reshape(*cells.data.shape, samples).transpose(2, 0, 1).astype(np.float64)


@pytest.mark.parametrize("samples", [1, 3])
def test_columns_and_tables_are_those_of_the_drawn_counts(pbmc_cells, samples):
    options = PredictiveOptions(samples)
    part = PREDICTIVE.unit(pbmc_cells, {}, options)
    observed, drawn = pbmc_cells.data.X.toarray().astype(np.float64), replicates(pbmc_cells, samples)
    shape = PREDICTIVE.shape(pbmc_cells.facts, options)
    assert {name: {"float64": "double"}.get(str(v.dtype), str(v.dtype)) for name, v in part.columns.items()} == {
        **shape.columns
    }
    assert (part.columns["observed_counts"] == observed.sum(axis=1)).all()
    assert (part.columns["observed_genes"] == (observed > 0).sum(axis=1)).all()
    assert np.allclose(part.columns["replicated_counts"], drawn.sum(axis=2).mean(axis=0), rtol=1e-12)
    assert np.allclose(part.columns["replicated_genes"], (drawn > 0).sum(axis=2).mean(axis=0), rtol=1e-12)
    genes = PREDICTIVE.finish([part.sums], pbmc_cells.facts, options).tables["genes"].set_index("gene")
    assert tuple(genes.index) == pbmc_cells.facts.names
    for side, values in (("observed", observed[None]), ("replicated", drawn)):
        assert np.allclose(genes[f"{side}_mean"], values.mean(axis=(0, 1)))
        assert np.allclose(genes[f"{side}_variance"], values.var(axis=1).mean(axis=0))
        assert np.allclose(genes[f"{side}_zeros"], (values == 0).mean(axis=(0, 1)))
        with np.errstate(invalid="ignore"):
            each = pd.DataFrame(values.std(axis=1) / values.mean(axis=1))
        assert np.allclose(genes[f"{side}_variation"], each.mean(axis=0), equal_nan=True)


def test_units_merge_exactly_in_any_cut(pbmc_cells, monkeypatch):
    """Sums of two units are those of their cells, to the bit, and in whatever order they come."""
    options, data = PredictiveOptions(2), pbmc_cells.data
    units = [
        replace(pbmc_cells, data=data[rows].copy(), seed=seed) for seed, rows in enumerate((range(70), range(70, 200)))
    ]
    parts = [PREDICTIVE.unit(unit, {}, options) for unit in units]
    monkeypatch.setattr(using, "_VALUES", 1)
    again = [PREDICTIVE.unit(unit, {}, options).sums for unit in units]
    assert all((again[0][name] == parts[0].sums[name]).all() for name in again[0])  # of one piece, as before
    drawn = np.concatenate([replicates(unit, 2) for unit in units], axis=1)
    merged = {name: parts[0].sums[name] + parts[1].sums[name] for name in ("observed", "replicated")}
    assert (merged["replicated"] == [drawn.sum(1), np.square(drawn).sum(1), (drawn == 0).sum(1)]).all()
    counts = data.X.toarray().astype(np.float64)[None]
    assert (merged["observed"] == [counts.sum(1), np.square(counts).sum(1), (counts == 0).sum(1)]).all()
    tables = [
        PREDICTIVE.finish(order, pbmc_cells.facts, options) for order in ([p.sums for p in parts], again[::-1][::-1])
    ]
    reverse = PREDICTIVE.finish([p.sums for p in parts[::-1]], pbmc_cells.facts, options)
    pd.testing.assert_frame_equal(tables[0].tables["genes"], reverse.tables["genes"], check_exact=True)
    assert tables[0].facts == {"cells": 200, "samples": 2}
    assert PREDICTIVE.finish([], pbmc_cells.facts, options).tables == {}


@pytest.fixture(scope="module")
def likelihoods(fitted, as_cells):
    """Planted: negative binomial counts of mean 5 and dispersion 0.5, whose variance is 55; Poisson draws have 5."""
    rng = np.random.default_rng(0)
    data = anndata.AnnData(rng.poisson(rng.gamma(0.5, 5 / 0.5, (400, 60))).astype(np.float32))

    def make(likelihood):
        arguments = {"gene_likelihood": likelihood, "n_hidden": 16, "n_latent": 2}
        return as_cells(fitted(scvi.model.SCVI, data.copy(), 40, setup={}, **arguments), data.copy())

    return {name: make(name) for name in ("nb", "poisson")}


def done(cells):
    """Tables of all cells, as one unit."""
    options = PredictiveOptions()
    return PREDICTIVE.finish([PREDICTIVE.unit(cells, {}, options).sums], cells.facts, options).tables


@pytest.mark.parametrize("likelihood", ["nb", "poisson"])
def test_coefficients_of_variation_are_those_of_criticism(likelihoods, likelihood):
    """scvi-tools draws with other seeds: they agree as two of its own draws do."""
    cells = likelihoods[likelihood]
    with quiet():
        checked = PosteriorPredictiveCheck(cells.data.copy(), {"model": cells.model}, n_samples=5)
        checked.coefficient_of_variation("cells")
        checked.coefficient_of_variation("features")
    tables = done(cells)
    genes, rows = tables["genes"], tables["coefficients_of_variation"].set_index("of")
    assert rows["count"].tolist() == [60, 400]
    for name, theirs in (("genes over cells", "cv_gene"), ("cells over genes", "cv_cell")):
        told = checked.metrics[theirs]
        assert rows.loc[name, "observed"] == pytest.approx(told["Raw"].mean(), rel=1e-4)
        assert rows.loc[name, "replicated"] == pytest.approx(told["model"].mean(), rel=0.03)
        error = (told["model"] - told["Raw"]).abs().mean()
        assert rows.loc[name, "mean_absolute_error"] == pytest.approx(error, rel=0.15)
    assert np.allclose(genes["observed_variation"], checked.metrics["cv_gene"]["Raw"], rtol=1e-4)
    assert np.median(np.abs(genes["replicated_variation"] / checked.metrics["cv_gene"]["model"].to_numpy() - 1)) < 0.05


def test_a_likelihood_without_overdispersion_is_seen_not_to_fit(likelihoods):
    found = {name: done(cells) for name, cells in likelihoods.items()}
    genes = found["poisson"]["genes"]
    assert genes["observed_variance"].mean() == pytest.approx(55, rel=0.15)
    assert genes["replicated_variance"].mean() < 30
    assert (genes["replicated_zeros"] < genes["observed_zeros"] - 0.1).mean() > 0.9
    tables = {name: tables["coefficients_of_variation"].set_index("of") for name, tables in found.items()}
    nb, poisson = (tables[name].loc["genes over cells", "mean_absolute_error"] for name in ("nb", "poisson"))
    assert nb < 0.5 * poisson


def test_no_replicates_are_refused(pbmc_cells):
    PREDICTIVE.check(pbmc_cells.facts, PredictiveOptions())
    with pytest.raises(InputError, match="--samples 0"):
        PREDICTIVE.check(pbmc_cells.facts, PredictiveOptions(0))
