"""Genes and proteins that TOTALVI decodes, imputes and compares, against scvi-tools called by hand, on real CITE-seq.

Two datasets of PBMC, 5k cells with 29 proteins and 10k with 14 of them (200 cells of each are there), and the 150 genes
that vary most. A quarter of the cells is held out from training. What is drawn is seeded, so that equality is exact.
"""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from scipy import sparse

from scviaduct.analysis import Cells, analysis
from scviaduct.errors import InputError
from scviaduct.families import MODALITY, Recipe, family
from scviaduct.families.vae import quiet
from scviaduct.references.saved.archive import read_model_file
from scviaduct.references.template import encode_cells

FAMILY = family("totalvi")
RECIPE = Recipe(family="totalvi", batch_key="batch")
N_GENES, N_PROTEINS, N_SMALLER = 150, 29, 14


@pytest.fixture(scope="module")
def citeseq(shared_data):
    """Flat cells: a column ``batch``, 5k or 10k, and ``half``, of which there are two in each."""
    parts = [anndata.read_h5ad(shared_data / f"citeseq_pbmc{n}_scvitests.h5ad") for n in ("5k", "10k")]
    genes = parts[0].var_names.intersection(parts[1].var_names)
    names = parts[0].obsm["protein_expression"].columns
    rna = sparse.vstack([part[:, genes].X for part in parts]).tocsr()
    proteins = [part.obsm["protein_expression"].reindex(columns=names).fillna(0) for part in parts]
    shares = np.log1p(rna.multiply(1e4 / rna.sum(axis=1))).toarray()
    top = np.sort(np.argsort(-shares.var(axis=0))[:N_GENES])
    var = pd.DataFrame({MODALITY: ["rna"] * N_GENES + ["protein"] * N_PROTEINS}, index=[*genes[top], *names])
    obs = pd.DataFrame({"batch": np.repeat(["5k", "10k"], 200), "half": ["a", "b"] * 200})
    counts = sparse.hstack([rna[:, top], sparse.csr_matrix(np.vstack(proteins))], format="csr", dtype=np.float32)
    return anndata.AnnData(counts, obs=obs.set_axis([f"c{i}" for i in range(400)]), var=var)


@pytest.fixture(scope="module")
def held(citeseq):
    return citeseq[::4].copy()


@pytest.fixture(scope="module")
def trained(citeseq, tmp_path_factory):
    """The model of scvi-tools, what it was saved as, and its encoder."""
    folder = tmp_path_factory.mktemp("citeseq")
    scvi.settings.seed = 0
    arguments = {"n_latent": 10, "n_hidden": 64, "empirical_protein_background_prior": False}
    told = {"accelerator": "cpu", "enable_progress_bar": False, "batch_size": 64, "early_stopping": False}
    with quiet():
        data = FAMILY.setup(citeseq[np.arange(400) % 4 != 0].copy(), RECIPE)
        model = FAMILY.create(data, arguments, RECIPE)
        model.train(25, **told)
        model.save(str(folder / "saved"))
    saved = read_model_file(folder / "saved" / "model.pt")
    facts = FAMILY.facts(saved)
    return model, saved, facts, FAMILY.fold(model, facts, "cpu")


def cells_of(trained, flat, seed=7, model=None):
    """Some flat cells, as an analysis gets them."""
    own, saved, facts, encoder = trained
    encoded = encode_cells(encoder, flat.X, flat.obs, facts)
    with quiet():
        data = FAMILY.layout(saved, flat.copy())
    return Cells(model or own, data, flat.obs.copy(), encoded, facts, seed)


def made(name, cells, told=None, **options):
    """What an output makes of a unit, after its checks."""
    one = analysis(name, "totalvi")
    given = one.options(**options)
    one.check(cells.facts, given)
    part = one.unit(cells, told or {}, given)
    shape = one.shape(cells.facts, given)
    assert part.columns.keys() == shape.columns.keys()
    assert {key: values.shape for key, values in part.matrices.items()} == {
        key: (cells.data.n_obs, len(names)) for key, names in shape.matrices.items()
    }
    assert all(values.dtype == np.float32 for values in part.matrices.values())
    return part


def by_hand(cells, method, **told):
    """scvi-tools' own method on the same cells from the same seed."""
    data = cells.data.copy()
    torch.manual_seed(cells.seed)
    np.random.seed(cells.seed)  # noqa: NPY002
    with quiet():
        cells.model._validate_anndata(data)  # draws, too
        found = getattr(cells.model, method)(data, batch_size=128, **told)
        cells.model.deregister_manager()
    return found


def without_proteins(flat):
    out = flat.copy()
    out.X = sparse.csr_matrix(flat.X.multiply((flat.var[MODALITY] == "rna").to_numpy()))
    return out


def proteins_of(flat):
    return flat.X[:, N_GENES:].toarray()


def correlations(measured, decoded):
    """Of each protein over cells, on a log scale, where the measured counts differ at all."""
    return np.array(
        [
            np.corrcoef(np.log1p(one), np.log1p(other))[0, 1]
            for one, other in zip(measured.T, decoded.T, strict=True)
            if one.std() > 0
        ]
    )


def test_denoised_is_what_scvi_tools_gives(trained, held):
    cells = cells_of(trained, held)
    genes, proteins = (held.var_names[20], held.var_names[3]), (held.var_names[-1], held.var_names[N_GENES])
    batches = {"transform_batch": ("5k", "10k"), "samples": 3}
    found = made("denoised", cells, genes=genes, proteins=proteins, **batches)
    rna, protein = by_hand(
        cells, "get_normalized_expression", transform_batch=["5k", "10k"], n_samples=3, library_size=1
    )
    assert (found.matrices["expression"] == rna[list(genes)].to_numpy() * np.float32(1e4)).all()
    assert (found.matrices["protein"] == protein[list(proteins)].to_numpy()).all()
    again = made("denoised", cells, genes=genes, proteins=proteins, **batches)
    assert all((again.matrices[name] == values).all() for name, values in found.matrices.items())
    assert set(cells.data.obs) == set(held.obs)
    own = made("denoised", cells, library_size=0.0, samples=1)
    rna, protein = by_hand(cells, "get_normalized_expression", n_samples=1, library_size="latent")
    assert (own.matrices["expression"] == rna.to_numpy()).all()
    assert (own.matrices["protein"] == protein.to_numpy()).all()


def test_expression_adds_up_to_the_library_size_over_several_batches(trained, held):
    """scvi-tools multiplies once a batch what it has so far."""
    cells = cells_of(trained, held)
    found = made("denoised", cells, transform_batch=("5k", "10k"), library_size=500.0, samples=2)
    assert np.allclose(found.matrices["expression"].sum(axis=1), 500, rtol=1e-4)
    rna, _ = by_hand(cells, "get_normalized_expression", transform_batch=["5k", "10k"], library_size=500)
    assert rna.to_numpy().sum(axis=1).min() > 100_000


def test_outside_nothing_is_drawn_or_kept(trained, held):
    cells = cells_of(trained, held[:20])
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    expected = torch.rand(1).item(), np.random.rand()  # noqa: NPY002
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    managers = len(cells.model._per_instance_manager_store[cells.model.id])
    made("denoised", cells, samples=1)
    made("protein-foreground", cells, samples=1)
    made("imputed-proteins", cells, samples=1)
    assert (torch.rand(1).item(), np.random.rand()) == expected  # noqa: NPY002
    assert len(cells.model._per_instance_manager_store[cells.model.id]) == managers


def test_foreground_is_what_scvi_tools_gives(trained, held):
    cells = cells_of(trained, held)
    proteins = tuple(held.var_names[[-2, N_GENES + 1]])
    found = made("protein-foreground", cells, proteins=proteins, transform_batch=("5k",), samples=2)
    expected = by_hand(cells, "get_protein_foreground_probability", transform_batch=["5k"], n_samples=2)
    assert (found.matrices["foreground"] == expected[list(proteins)].to_numpy()).all()
    assert 0 <= found.matrices["foreground"].min() < found.matrices["foreground"].max() <= 1


def test_proteins_of_cells_without_any_are_imputed(trained, held):
    """Of 50 held-out cells of each dataset, decoded from their genes alone, against their measured counts.

    Baseline: the same with cells in another order, 200 times.
    """
    measured = proteins_of(held)
    found = made("imputed-proteins", cells_of(trained, without_proteins(held)))
    decoded, rng = found.matrices["protein"], np.random.default_rng(0)
    for dataset in ("5k", "10k"):
        own = (held.obs["batch"] == dataset).to_numpy()
        reached = correlations(measured[own], decoded[own])
        assert len(reached) == (N_PROTEINS if dataset == "5k" else N_SMALLER)
        chance = [correlations(rng.permutation(measured[own]), decoded[own]).mean() for _ in range(200)]
        assert reached.mean() > 0.35
        assert reached.mean() > max(chance) + 0.15
    names = held.var_names[N_GENES:]
    assert (found.columns["proteins_imputed"] == N_PROTEINS).all()
    assert set(found.columns["imputed"]) == {" || ".join(names)}


def test_a_protein_is_decoded_as_the_batches_that_measured_it(trained, held):
    """14 proteins were measured in both, and are decoded as both; 15 as the larger panel alone."""
    cells = cells_of(trained, held[:30])
    found = made("imputed-proteins", cells, samples=2)
    both = proteins_of(held)[held.obs["batch"] == "10k"].any(axis=0)
    assert both.sum() == N_SMALLER
    names = held.var_names[N_GENES:]
    told = {"gene_list": [], "n_samples": 2}
    for batches, own in ((["10k", "5k"], both), (["5k"], ~both)):
        _, expected = by_hand(
            cells, "get_normalized_expression", transform_batch=batches, protein_list=list(names[own]), **told
        )
        assert (found.matrices["protein"][:, own] == expected.to_numpy()).all()
    few = tuple(reversed(names[:5]))
    chosen = made("imputed-proteins", cells, samples=2, proteins=few, transform_batch=("10k",))
    kept = both[:5][::-1]
    assert (np.isnan(chosen.matrices["protein"]).all(axis=0) == ~kept).all()
    assert not np.isnan(chosen.matrices["protein"][:, kept]).any()
    assert kept.any()
    assert not kept.all()


def test_panels_are_told_by_the_sampled_cells_of_a_batch(trained, held):
    """Cells of the smaller panel: 15 proteins imputed; one of them without any count: all of them."""
    one, flat = analysis("imputed-proteins", "totalvi"), held.copy()
    flat.X = sparse.vstack([flat.X[:-1], without_proteins(flat[-1:]).X]).tocsr()
    options, facts = one.options(samples=1, cells=40), trained[2]
    strata = one.strata(facts, options)
    assert (strata.column, strata.cells, one.obs(facts, options)) == ("batch", 40, ("batch",))
    told = one.prepare(cells_of(trained, flat[10:90]), options)
    parts = [
        made("imputed-proteins", cells_of(trained, flat[rows]), told, samples=1) for rows in (slice(60), slice(60, 100))
    ]
    counts = np.concatenate([part.columns["proteins_imputed"] for part in parts])
    expected = np.where(flat.obs["batch"] == "5k", 0, N_PROTEINS - N_SMALLER)
    expected[-1] = N_PROTEINS
    assert (counts == expected).all()
    table = one.finish([part.sums for part in parts], facts, options).tables["proteins"]
    both = proteins_of(held)[held.obs["batch"] == "10k"].any(axis=0)
    assert list(table["protein"]) == list(held.var_names[N_GENES:])
    assert list(table["cells_imputed"]) == np.where(both, 1, 50).tolist()
    assert (table["cells_measured"] + table["cells_imputed"] == 100).all()
    assert list(table["decoded_as"]) == ["10k || 5k" if there else "5k" for there in both]
    text = parts[1].columns["imputed"]
    assert text[0].split(" || ") == list(held.var_names[N_GENES:][~both])
    assert len(text[-1].split(" || ")) == N_PROTEINS


def test_panels_by_another_column_and_counts_of_a_cell_itself(trained, held):
    """A count in a cell says that the protein was measured there, whatever the sample of its batch shows."""
    one = analysis("imputed-proteins", "totalvi")
    options = one.options(group_by="half", samples=1)
    assert one.obs(trained[2], options) == ("half",)
    cells = cells_of(trained, held[:20])
    told = {"batches": np.unique(held.obs["half"][:20]), "panels": np.zeros((1, N_PROTEINS), bool)}
    found = made("imputed-proteins", cells, told, group_by="half", samples=1)
    assert (found.columns["proteins_imputed"] == (proteins_of(held[:20]) == 0).sum(axis=1)).all()


def groups_of(flat):
    """T cells and monocytes of the larger panel, by their proteins."""
    names = list(flat.var_names)
    cd3, cd14 = (flat.X[:, names.index(name)].toarray().ravel() for name in ("CD3_TotalSeqB", "CD14_TotalSeqB"))
    return (cd3 > 300) & (cd14 < 100), (cd14 > 300) & (cd3 < 100)


def test_t_cells_and_monocytes_differ(trained, citeseq):
    larger = citeseq[citeseq.obs["batch"] == "5k"]
    t_cells, monocytes = groups_of(larger)
    assert min(t_cells.sum(), monocytes.sum()) > 20
    cells = cells_of(trained, larger[t_cells | monocytes])
    first = t_cells[t_cells | monocytes]
    one = analysis("differential-expression", "totalvi")
    options = one.options(samples=500)
    one.check(cells.facts, options)
    found = one.compare(cells, first, options)
    table = found.tables["features"]
    assert len(table) == N_GENES + N_PROTEINS
    assert (table["proba_de"].diff()[1:] <= 0).all()
    rows = table.set_index(["modality", "feature"])
    assert rows.loc[("protein", "CD3_TotalSeqB"), "lfc_median"] > 1
    assert rows.loc[("protein", "CD14_TotalSeqB"), "lfc_median"] < -1
    assert rows.loc[("rna", "S100A8"), "lfc_median"] < -1
    assert rows.loc[[("protein", "CD14_TotalSeqB"), ("rna", "S100A8")], "is_de"].all()
    counted = {"first": int(first.sum()), "against": int((~first).sum())}
    measured = {f"cells_with_{name}": counted for name in ("rna", "protein")}
    assert found.facts == {"mode": "change", "cells": counted} | measured
    assert one.compare(cells, first, options).tables["features"].equals(table)
    expected = by_hand(
        cells, "differential_expression", idx1=first, idx2=~first, n_samples_overall=500, delta=0.25, silent=True
    )
    names = [name if kind == "rna" else f"{name}_protein" for kind, name in rows.index]
    for column in ("proba_de", "bayes_factor", "lfc_mean", "lfc_median", "scale1", "scale2"):
        assert (rows[column].to_numpy() == expected.loc[names, column].to_numpy()).all()
    for column in ("raw_mean1", "raw_mean2", "raw_normalized_mean1", "non_zeros_proportion2"):
        assert np.allclose(rows[column], expected.loc[names, column], rtol=1e-4, equal_nan=True)


def test_a_random_split_of_t_cells_does_not_differ(trained, citeseq):
    larger = citeseq[citeseq.obs["batch"] == "5k"]
    t_cells, _ = groups_of(larger)
    cells = cells_of(trained, larger[t_cells])
    one = analysis("differential-expression", "totalvi")
    first = np.arange(t_cells.sum()) % 2 == 0
    table = one.compare(cells, first, one.options(samples=500)).tables["features"]
    assert not table["is_de"].any()
    higher = one.compare(cells, first, one.options(samples=200, mode="vanilla")).tables["features"]
    assert "is_de" not in higher
    assert higher["proba_higher"].between(0.2, 0.8).all()
    assert (higher["proba_higher"].diff()[1:] <= 0).all()


def test_raw_figures_are_of_measured_cells(trained, citeseq):
    """scvi-tools takes cells without proteins for cells without expression."""
    flat = citeseq[:100].copy()
    first = np.arange(100) < 50
    flat.X = sparse.vstack([without_proteins(flat[:10]).X, flat.X[10:]]).tocsr()
    cells = cells_of(trained, flat)
    one = analysis("differential-expression", "totalvi")
    found = one.compare(cells, first, one.options(samples=100))
    rows = found.tables["features"].set_index(["modality", "feature"])
    expected = proteins_of(citeseq[10:50]).mean(axis=0)
    assert np.allclose(rows.loc["protein"].loc[citeseq.var_names[N_GENES:], "raw_mean1"], expected)
    assert found.facts["cells_with_protein"] == {"first": 40, "against": 50}


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("denoised", {"genes": ("S100A",)}, "S100A8"),
        ("denoised", {"proteins": ("CD3",)}, "--proteins: 'CD3' is not a protein"),
        ("denoised", {"transform_batch": ("6k",)}, "'6k' is not a batch"),
        ("denoised", {"samples": 0}, "--samples 0"),
        ("denoised", {"library_size": -1.0}, "--library-size -1"),
        ("protein-foreground", {"proteins": ("S100A8",)}, "'S100A8' is not a protein"),
        ("imputed-proteins", {"proteins": ("CD14_TotalSeqB", "CD14_TotalSeqB")}, "twice"),
        ("imputed-proteins", {"cells": 0}, "--cells 0"),
        ("differential-expression", {"mode": "two"}, "'two' is not a mode"),
    ],
)
def test_what_the_reference_does_not_have_is_refused(trained, name, options, told):
    one = analysis(name, "totalvi")
    with pytest.raises(InputError, match=told):
        one.check(trained[2], one.options(**options))


def test_nothing_to_compare_with(trained, held):
    one = analysis("differential-expression", "totalvi")
    with pytest.raises(InputError, match="no cell to compare"):
        one.compare(cells_of(trained, held), np.ones(100, bool), one.options())
