"""Normalised and differential expression are what scvi-tools gives, seeded and in bounded memory."""

from __future__ import annotations

from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
import scvi
import torch

from scviaduct.analysis import using
from scviaduct.analysis.expression import (
    DifferenceOptions,
    DifferentialExpression,
    ExpressionOptions,
    NormalisedExpression,
)
from scviaduct.errors import InputError
from scviaduct.families.vae import quiet

EXPRESSION, DIFFERENCE = NormalisedExpression(), DifferentialExpression()
CHOSEN = ("CD79A", "LYZ", "NKG7", "CD3D")


def plainly(cells, function, *positional, **told):
    """What scvi-tools gives, called by hand after the same seed."""
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(cells.seed)
        np.random.seed(cells.seed)  # noqa: NPY002
        return getattr(cells.model, function)(*positional, **told)


@pytest.mark.parametrize(
    "options",
    [
        ExpressionOptions(samples=1, library_size=1.0),
        ExpressionOptions(CHOSEN, samples=3),
        ExpressionOptions(CHOSEN, library_size=0, transform_batch=("5p",), samples=2),
        ExpressionOptions(CHOSEN[::-1], transform_batch=("5p", "3pv1"), samples=1),
    ],
    ids=["all genes", "chosen", "own library", "two batches"],
)
def test_expression_is_that_of_scvi_tools(pbmc_cells, options):
    found = EXPRESSION.unit(pbmc_cells, {}, options).matrices["expression"]
    shape = EXPRESSION.shape(pbmc_cells.facts, options)
    told = {"transform_batch": list(options.transform_batch) or None, "n_samples": options.samples}
    told["library_size"] = options.library_size or "latent"
    plain = plainly(pbmc_cells, "get_normalized_expression", pbmc_cells.data.copy(), **told)
    names = shape.matrices["expression"]
    assert names == (options.genes or tuple(pbmc_cells.data.var_names))
    assert found.dtype == np.float32
    assert (found == plain[list(names)].to_numpy()).all()  # in the order that was asked
    if not options.genes:
        assert np.allclose(found.sum(axis=1), options.library_size, rtol=1e-4)


def test_scanvi_is_asked_the_same(symphony, pbmc_scvi, as_cells):
    with quiet():
        model = scvi.model.SCANVI.from_scvi_model(pbmc_scvi, labels_key="cell_type", unlabeled_category="Unknown")
        model.train(1, accelerator="cpu", enable_progress_bar=False, logger=False)
    model.module.eval()
    cells = as_cells(model, anndata.read_h5ad(symphony)[:150].copy())
    options = ExpressionOptions(CHOSEN, transform_batch=("3pv2",), samples=2)
    found = EXPRESSION.unit(cells, {}, options).matrices["expression"]
    told = {"transform_batch": ["3pv2"], "n_samples": 2, "library_size": 1e4}
    plain = plainly(cells, "get_normalized_expression", cells.data.copy(), **told)
    assert (found == plain[list(CHOSEN)].to_numpy()).all()
    monocytes = (cells.data.obs.cell_type == "Mono_CD14").to_numpy()
    table = DIFFERENCE.compare(cells, monocytes, DifferenceOptions(samples=500)).tables["genes"].set_index("gene")
    assert table.loc["LYZ", "lfc_median"] > 1


def test_repeats_are_bit_equal_and_leave_no_trace(pbmc_cells):
    model, data = pbmc_cells.model, pbmc_cells.data
    store = model._per_instance_manager_store[model.id]
    before = (len(store), len(type(model)._setup_adata_manager_store), [*data.obs], [*data.obsm], [*data.uns])
    weights = {name: value.clone() for name, value in model.module.state_dict().items()}
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    outside = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    options, first = ExpressionOptions(CHOSEN, samples=2), np.arange(data.n_obs) < 90
    one, other = (EXPRESSION.unit(pbmc_cells, {}, options).matrices["expression"] for _ in range(2))
    assert one.tobytes() == other.tobytes()
    tables = [DIFFERENCE.compare(pbmc_cells, first, DifferenceOptions(samples=300)).tables["genes"] for _ in range(2)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    elsewhere = EXPRESSION.unit(replace(pbmc_cells, seed=8), {}, options).matrices["expression"]
    assert (elsewhere != one).mean() > 0.9
    assert torch.equal(outside[0], torch.get_rng_state())
    assert (outside[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    stores = len(store), len(type(model)._setup_adata_manager_store)
    assert (*stores, [*data.obs], [*data.obsm], [*data.uns]) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.module.state_dict().items())


def test_pieces_bound_the_memory_and_cover_every_cell(pbmc_cells, monkeypatch):
    """In pieces of 128 cells, each is what scvi-tools gives of it, whatever bound made them."""
    options = ExpressionOptions(CHOSEN, samples=3)
    made = []
    for values in (1, 128 * 4 * 3 + 1):
        monkeypatch.setattr(using, "_VALUES", values)
        made.append(EXPRESSION.unit(pbmc_cells, {}, options).matrices["expression"])
    assert (made[0] == made[1]).all()
    told = {"n_samples": 3, "library_size": 1e4, "gene_list": list(CHOSEN)}
    first = plainly(pbmc_cells, "get_normalized_expression", pbmc_cells.data.copy(), indices=np.arange(128), **told)
    assert (made[0][:128] == first[list(CHOSEN)].to_numpy()).all()
    assert np.isfinite(made[0]).all()
    assert [len(rows) for rows in using.pieces(300, 1 << 30)] == [128, 128, 44]


def test_batches_that_are_numbers_are_told_as_text(fitted, as_cells):
    rng = np.random.default_rng(0)
    data = anndata.AnnData(rng.poisson(1.0, (120, 30)).astype(np.float32))
    data.layers["raw"], data.obs["batch"] = data.X.copy(), np.repeat([1, 2, 10], 40)
    data.X = data.X * 0
    setup = {"batch_key": "batch", "layer": "raw"}
    model = fitted(scvi.model.SCVI, data.copy(), 2, setup=setup, n_hidden=16, n_latent=3)
    cells = as_cells(model, data)
    options = ExpressionOptions(transform_batch=("10",), samples=1, library_size=0)
    EXPRESSION.check(cells.facts, options)
    found = EXPRESSION.unit(cells, {}, options).matrices["expression"]
    told = {"transform_batch": 10, "library_size": "latent"}
    assert (found == plainly(cells, "get_normalized_expression", data.copy(), **told).to_numpy()).all()
    assert np.allclose(found.sum(axis=1), data.layers["raw"].sum(axis=1), rtol=1e-3)
    corrected = DifferenceOptions(batch_correction=True, samples=90)
    assert len(DIFFERENCE.compare(cells, np.arange(120) < 60, corrected).tables["genes"]) == 30


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (ExpressionOptions(("CD79", "LYZ")), r"'CD79' is not a gene.*CD79A"),
        (ExpressionOptions(("LYZ", "LYZ")), "'LYZ' twice"),
        (ExpressionOptions(transform_batch=("3pv3",)), r"'3pv3' is not a batch.*3pv2"),
        (ExpressionOptions(library_size=-1), "-library-size -1"),
        (ExpressionOptions(library_size=float("nan")), "nan"),
        (ExpressionOptions(samples=0), "--samples 0"),
        (DifferenceOptions(mode="bayes"), "'bayes'.*change, vanilla"),
        (DifferenceOptions(fdr=1.5), "--fdr 1.5"),
        (DifferenceOptions(delta=-0.1), "--delta"),
        (DifferenceOptions(cells=0), "--cells 0"),
        (DifferenceOptions(transform_batch=("5p",)), "--batch-correction"),
        (DifferenceOptions(transform_batch=("x",), batch_correction=True), "'x' is not a batch"),
    ],
)
def test_what_cannot_be_is_refused(pbmc_cells, options, told):
    one = EXPRESSION if isinstance(options, ExpressionOptions) else DIFFERENCE
    one.check(pbmc_cells.facts, type(options)())
    with pytest.raises(InputError, match=told):
        one.check(pbmc_cells.facts, options)


def test_batches_that_are_not_there_or_too_many(pbmc_cells):
    none = replace(pbmc_cells.facts, batch_key="", batch_categories=())
    with pytest.raises(InputError, match="without a batch"):
        EXPRESSION.check(none, ExpressionOptions(transform_batch=("5p",)))
    with pytest.raises(InputError, match="without a batch"):
        DIFFERENCE.check(none, DifferenceOptions(batch_correction=True))
    many = replace(pbmc_cells.facts, batch_categories=tuple(f"b{i}" for i in range(1000)))
    with pytest.raises(InputError, match="1,000 batches"):
        DIFFERENCE.check(many, DifferenceOptions(batch_correction=True))
    DIFFERENCE.check(many, DifferenceOptions(batch_correction=True, transform_batch=("b7",)))
    with pytest.raises(InputError, match="second selection has no cell"):
        DIFFERENCE.compare(pbmc_cells, np.ones(200, bool), DifferenceOptions())


@pytest.fixture(scope="module")
def all_pbmc(symphony, pbmc_scvi, as_cells):
    return as_cells(pbmc_scvi, anndata.read_h5ad(symphony))


@pytest.mark.parametrize(
    ("kinds", "markers"),
    [(["B"], ["CD79A", "MS4A1", "CD79B"]), (["Mono_CD14", "Mono_CD16"], ["LYZ", "S100A8", "S100A9", "FCN1", "CST3"])],
)
def test_markers_of_real_cells_come_out(all_pbmc, kinds, markers):
    first = all_pbmc.data.obs.cell_type.isin(kinds).to_numpy()
    done = DIFFERENCE.compare(all_pbmc, first, DifferenceOptions(samples=2000))
    table = done.tables["genes"]
    by_gene = table.set_index("gene")
    assert by_gene.loc[markers, "is_de"].all()
    assert (by_gene.loc[markers, "lfc_median"] > 1).all()
    assert by_gene.loc["CD3D", "lfc_median"] < -1
    assert (table["proba_de"].diff().dropna() <= 0).all()
    assert done.facts["cells"] == {"first": int(first.sum()), "against": int((~first).sum())}
    mean = np.asarray(all_pbmc.data.X[first].mean(axis=0)).ravel()
    position = list(all_pbmc.data.var_names).index("CD79A")
    assert by_gene.loc["CD79A", "raw_mean1"] == pytest.approx(mean[position])


def test_a_random_split_of_one_kind_gives_none(all_pbmc):
    kind = np.flatnonzero((all_pbmc.data.obs.cell_type == "T_CD4") & (all_pbmc.data.obs.batch == "3pv2"))
    half = replace(all_pbmc, data=all_pbmc.data[kind].copy())
    first = np.random.default_rng(3).permutation(len(kind)) < len(kind) // 2
    table = DIFFERENCE.compare(half, first, DifferenceOptions(samples=2000)).tables["genes"]
    assert not table["is_de"].any()


@pytest.mark.parametrize("mode", ["change", "vanilla"])
def test_differential_expression_is_that_of_scvi_tools(pbmc_cells, mode):
    """Corrected over the batches of the reference alone, though the model knows one more."""
    cells = replace(pbmc_cells, facts=replace(pbmc_cells.facts, batch_categories=("3pv1", "3pv2")))
    first = (cells.data.obs.cell_type == "B").to_numpy()
    found = DIFFERENCE.compare(cells, first, DifferenceOptions(mode=mode, samples=400, batch_correction=True))
    known = ["3pv1", "3pv2"]
    told = {"batch_correction": True, "batchid1": known, "batchid2": known, "n_samples_overall": 400, "silent": True}
    function = "differential_expression"
    plain = plainly(cells, function, cells.data.copy(), idx1=first, idx2=~first, mode=mode, **told)
    table = found.tables["genes"].set_index("gene")
    plain = plain.rename(columns={"is_de_fdr_0.05": "is_de", "proba_m1": "proba_higher"}).loc[table.index]
    assert ("is_de" in table, "lfc_mean" in table, "proba_higher" in table) == (
        *[mode == "change"] * 2,
        mode != "change",
    )
    pd.testing.assert_frame_equal(table, plain[list(table)], check_exact=True, check_names=False)
