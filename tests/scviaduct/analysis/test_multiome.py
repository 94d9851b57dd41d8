"""Genes and peaks that MULTIVI imputes and compares, against scvi-tools called by hand, on real multiome cells.

1,000 PBMC with 45 genes and 174 peaks of both modalities, a quarter of them held out from training; and 2,641 A549
cells by sci-CAR, 300 genes and the 2,000 peaks that most cells have. Decoding draws nothing, and is compared with
scvi-tools to 1e-5 of a value: the latent is that of the reference's own encoder.
"""

from __future__ import annotations

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from anndata.io import read_elem
from scipy import sparse

from scviaduct.analysis import Cells, analysis
from scviaduct.errors import InputError
from scviaduct.families import MODALITY, Recipe, family
from scviaduct.families.vae import quiet
from scviaduct.references.saved.archive import read_model_file
from scviaduct.references.template import encode_cells

FAMILY = family("multivi")
RECIPE = Recipe(family="multivi", batch_key="batch")
FIELDS = {"rna": "imputed-expression", "atac": "imputed-accessibility"}


def flat(parts):
    """Flat cells of modalities, in two batches: canonical name to names and counts."""
    var = pd.DataFrame(
        {MODALITY: [name for name, (names, _) in parts.items() for _ in names]},
        index=[str(one) for names, _ in parts.values() for one in names],
    )
    counts = sparse.hstack([sparse.csr_matrix(one) for _, one in parts.values()], format="csr", dtype=np.float32)
    obs = pd.DataFrame({"batch": np.where(np.arange(counts.shape[0]) % 3, "a", "b")})
    cells = anndata.AnnData(counts, obs=obs.set_axis([f"c{i}" for i in range(len(obs))]), var=var)
    return cells[np.asarray(counts.sum(axis=1)).ravel() > 0].copy()


@pytest.fixture(scope="module")
def multiome(shared_data):
    """PBMC; mudata 0.4 does not read the file."""
    parts = {}
    with h5py.File(shared_data / "multiome_rna_atac_muon.h5mu") as file:
        for modality in ("rna", "atac"):
            group = file["mod"][modality]
            parts[modality] = (group["var/_index"].asstr()[:], read_elem(group["X"]))
    return flat(parts)


@pytest.fixture(scope="module")
def a549(shared_data):
    """A time course of dexamethasone, a file a modality."""
    parts = {}
    for modality, name, size in (("rna", "rna", 300), ("atac", "atac_binary", 2000)):
        cells = anndata.read_h5ad(shared_data / f"multiome_a549_scicar_{name}.h5ad")
        seen = np.asarray((cells.X > 0).sum(axis=0)).ravel()
        top = np.sort(np.argsort(-seen, kind="stable")[:size])
        parts[modality] = (cells.var_names[top], cells.X[:, top])
    return flat(parts)


def fitted(cells, folder, epochs, **arguments):
    """A model of scvi-tools, what it was saved as, its facts and its encoder."""
    scvi.settings.seed = 0
    told = {"accelerator": "cpu", "enable_progress_bar": False, "batch_size": 64, "early_stopping": False}
    with quiet():
        data = FAMILY.setup(cells.copy(), RECIPE)
        model = FAMILY.create(data, {"n_latent": 8, "n_hidden": 64, **arguments}, RECIPE)
        model.train(epochs, lr=2e-3, n_epochs_kl_warmup=epochs, adversarial_mixing=False, **told)
        model.save(str(folder / "saved"))
    saved = read_model_file(folder / "saved" / "model.pt")
    facts = FAMILY.facts(saved)
    return model, saved, facts, FAMILY.fold(model, facts, "cpu")


@pytest.fixture(scope="module")
def trained(multiome, tmp_path_factory):
    return fitted(multiome[np.arange(multiome.n_obs) % 4 != 0], tmp_path_factory.mktemp("multiome"), 10)


@pytest.fixture(scope="module")
def held(multiome):
    return multiome[::4].copy()


def cells_of(trained, query, seed=7):
    """Some flat cells, as an analysis gets them."""
    model, saved, facts, encoder = trained
    encoded = encode_cells(encoder, query.X, query.obs, facts)
    return Cells(model, FAMILY.layout(saved, query.copy()), query.obs.copy(), encoded, facts, seed)


def made(name, cells, **options):
    """What an output makes of a unit, after its checks."""
    one = analysis(name, "multivi")
    given = one.options(**options)
    one.check(cells.facts, given)
    part = one.unit(cells, {}, given)
    shape = one.shape(cells.facts, given)
    assert part.columns.keys() == shape.columns.keys()
    (key, names), (own, values) = *shape.matrices.items(), *part.matrices.items()
    assert (own, values.shape, values.dtype) == (key, (cells.data.n_obs, len(names)), np.float32)
    return values, part.columns["measured"]


def by_hand(cells, method, *, known=False, **told):
    """scvi-tools' own method on the same cells from the same seed, drawn before or after they are registered."""
    data = cells.data.copy()
    data.obs["_indices"] = np.arange(data.n_obs)
    if known:
        with quiet():
            cells.model._validate_anndata(data)
    torch.manual_seed(cells.seed)
    np.random.seed(cells.seed)  # noqa: NPY002
    with quiet():
        cells.model._validate_anndata(data)
        found = getattr(cells.model, method)(data, batch_size=128, **told)
        cells.model.deregister_manager()
    return found


def own(query, modality):
    return query.X[:, (query.var[MODALITY] == modality).to_numpy()].toarray()


def without(query, modality, rows=slice(None)):
    """The cells, some of which were not measured in a modality, less those that are left without a count."""
    counts = query.X.toarray()
    counts[rows] *= (query.var[MODALITY] != modality).to_numpy()
    out = query.copy()
    out.X = sparse.csr_matrix(counts)
    return out[counts.sum(axis=1) > 0].copy()


def correlation(measured, decoded):
    """In the mean over features that vary: of each over cells."""
    vary = (measured.std(axis=0) > 0) & (decoded.std(axis=0) > 0)
    one, other = ((values - values.mean(axis=0))[:, vary] for values in (measured, decoded))
    return ((one * other).sum(axis=0) / np.sqrt((one**2).sum(axis=0) * (other**2).sum(axis=0))).mean()


def imputed(trained, query, modality):
    """How well a hidden modality is imputed, and the best of 100 other orders of the same cells."""
    hidden = without(query, modality)
    values, measured = made(FIELDS[modality], cells_of(trained, hidden))
    assert not measured.any()
    truth = own(query[hidden.obs_names], modality)
    if modality == "rna":
        truth = np.log1p(1e4 * truth / np.maximum(truth.sum(axis=1, keepdims=True), 1))
        values = np.log1p(values)
    else:
        truth = (truth > 0).astype(np.float32)
    rng = np.random.default_rng(0)
    return correlation(truth, values), max(correlation(rng.permutation(truth), values) for _ in range(100))


@pytest.mark.parametrize(("modality", "least"), [("rna", 0.2), ("atac", 0.05)])
def test_a_hidden_modality_of_held_out_cells_is_imputed(trained, held, modality, least):
    """Baseline: the same with cells in another order."""
    reached, chance = imputed(trained, held, modality)
    assert reached > least
    assert reached > 2 * chance


def test_imputed_values_are_what_scvi_tools_gives(trained, held):
    query = without(without(held, "rna", slice(40)), "atac", slice(60, 100))
    cells = cells_of(trained, query)
    genes, peaks = tuple(held.var_names[[7, 2, 30]]), tuple(held.var_names[[200, 46]])
    values, measured = made("imputed-expression", cells, genes=genes, library_size=500.0)
    expected = by_hand(cells, "get_normalized_expression")[list(genes)]
    assert np.allclose(values, 500 * expected.to_numpy(), rtol=1e-4)
    assert (measured == (own(query, "rna").sum(axis=1) > 0)).all()
    assert 20 < measured.sum() < len(measured) - 20
    values, measured = made("imputed-accessibility", cells, peaks=peaks)
    expected = by_hand(cells, "get_normalized_accessibility")[list(peaks)]
    assert np.allclose(values, expected.to_numpy(), rtol=1e-4)
    assert (measured == (own(query, "atac").sum(axis=1) > 0)).all()
    assert (made("imputed-accessibility", cells, peaks=peaks)[0] == values).all()
    assert set(cells.data.obs) == {*query.obs, "_indices"}


def test_cells_of_a_time_course_without_genes(a549, tmp_path):
    """Their expression is decoded, and is what scvi-tools gives. How they differ is not: sci-CAR's peaks of one cell
    line hold too little for that, 20 epochs reach a correlation of 0 with the hidden counts.
    """
    model = fitted(a549[:600], tmp_path, 1)
    query = without(a549[600:700], "rna", slice(50))
    cells = cells_of(model, query)
    values, measured = made("imputed-expression", cells)
    assert (measured == (own(query, "rna").sum(axis=1) > 0)).all()
    assert not measured.all()
    assert np.allclose(values, 1e4 * by_hand(cells, "get_normalized_expression").to_numpy(), rtol=1e-4)
    values, measured = made("imputed-accessibility", cells)
    assert measured.sum() > 90
    assert np.allclose(values, by_hand(cells, "get_normalized_accessibility").to_numpy(), rtol=1e-4)


def test_several_batches_are_averaged(trained, held):
    """Of which scvi-tools takes the first alone for peaks."""
    cells = cells_of(trained, held[:50])
    for name, method in (
        ("imputed-expression", "get_normalized_expression"),
        ("imputed-accessibility", "get_normalized_accessibility"),
    ):
        size = 1e4 if name == "imputed-expression" else 1
        single = [size * by_hand(cells, method, transform_batch=batch).to_numpy() for batch in ("a", "b")]
        assert np.abs(single[0] / single[1] - 1).max() > 1e-3
        assert np.allclose(made(name, cells, transform_batch=("b",))[0], single[1], rtol=1e-4)
        assert np.allclose(made(name, cells, transform_batch=("a", "b"))[0], np.mean(single, axis=0), rtol=1e-4)


def test_a_cell_is_encoded_as_of_its_own_batch(multiome, held, tmp_path):
    """scvi-tools encodes it as of the one that it is decoded as, where the encoder reads the batch."""
    encoding = fitted(multiome[:300], tmp_path, 1, encode_covariates=True)
    cells = cells_of(encoding, held[:60])
    found, _ = made("imputed-expression", cells, transform_batch=("a",))
    theirs = 1e4 * by_hand(cells, "get_normalized_expression", transform_batch="a").to_numpy()
    same = (held.obs["batch"][:60] == "a").to_numpy()
    assert np.allclose(found[same], theirs[same], rtol=1e-4)
    assert np.abs(found[~same] / theirs[~same] - 1).max() > 1e-3
    one = analysis("differential-expression", "multivi")
    with pytest.raises(InputError, match="as of every batch"):
        one.check(encoding[2], one.options(batch_correction=True))
    analysis("differential-accessibility", "multivi").check(encoding[2], one.options(batch_correction=True))


def monocytes_of(query):
    """The quarter of the cells with most counts of LYZ."""
    counts = query.X[:, query.var_names.get_loc("LYZ")].toarray().ravel()
    return counts > np.quantile(counts, 0.75)


def compared(name, cells, first, **options):
    one = analysis(name, "multivi")
    given = one.options(samples=500, **options)
    one.check(cells.facts, given)
    return one.compare(cells, first, given)


def test_expression_of_monocytes_differs(trained, multiome):
    first = monocytes_of(multiome)
    cells = cells_of(trained, multiome)
    found = compared("differential-expression", cells, first)
    table = found.tables["genes"].set_index("gene")
    assert len(table) == 45
    assert (table["proba_de"].diff()[1:] <= 0).all()
    assert table.loc["LYZ", "lfc_median"] > 0.5
    raw = np.log2((table["raw_normalized_mean1"] + 1) / (table["raw_normalized_mean2"] + 1))
    assert np.corrcoef(table["lfc_median"], raw)[0, 1] > 0.5
    expected = by_hand(
        cells, "differential_expression", idx1=first, idx2=~first, n_samples_overall=500, delta=0.25, silent=True
    )
    expected = expected.loc[table.index]
    for column in ("proba_de", "lfc_median", "scale1"):
        assert (table[column] == expected[column]).all()
    measured = own(multiome[first], "rna")
    means = pd.Series(measured[measured.sum(axis=1) > 0].mean(axis=0), index=multiome.var_names[:45])
    assert np.allclose(table["raw_mean1"], means[table.index], rtol=1e-5)
    assert compared("differential-expression", cells, first).tables["genes"].set_index("gene").equals(table)


def test_accessibility_of_monocytes_differs(trained, multiome):
    query = without(multiome, "atac", slice(200))
    first = monocytes_of(query)
    cells = cells_of(trained, query)
    found = compared("differential-accessibility", cells, first)
    table = found.tables["peaks"].set_index("peak")
    expected = by_hand(
        cells,
        "differential_accessibility",
        known=True,
        idx1=first,
        idx2=~first,
        n_samples_overall=500,
        delta=0.05,
        silent=True,
    ).loc[table.index]
    assert (table["proba_da"] == expected["prob_da"]).all()
    assert (table["estimated1"] == expected["est_prob1"]).all()
    counts = own(query, "atac")
    there = counts.sum(axis=1) > 0
    assert found.facts["cells_with_atac"] == {
        "first": int((first & there).sum()),
        "against": int((~first & there).sum()),
    }
    assert found.facts["cells"] == {"first": int(first.sum()), "against": int((~first).sum())}
    shares = pd.Series((counts[first & there] > 0).mean(axis=0), index=query.var_names[45:])
    assert np.allclose(table["detected1"], shares[table.index])
    assert np.corrcoef(table["difference"], table["detected1"] - table["detected2"])[0, 1] > 0.3
    higher = compared("differential-accessibility", cells, first, mode="vanilla", batch_correction=True)
    assert "is_da" not in higher.tables["peaks"]
    assert set(cells.data.obs) == {*query.obs, "_indices"}


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("imputed-expression", {"genes": ("MS4A",)}, "MS4A1"),
        ("imputed-expression", {"library_size": 0.0}, "has no library size"),
        ("imputed-expression", {"transform_batch": ("c",)}, "'c' is not a batch"),
        ("imputed-accessibility", {"peaks": ("MS4A1",)}, "is not a peak"),
        ("differential-expression", {"fdr": 0.0}, "--fdr 0"),
        ("differential-accessibility", {"delta": -1.0}, "--delta -1"),
    ],
)
def test_what_the_reference_does_not_have_is_refused(trained, name, options, told):
    one = analysis(name, "multivi")
    with pytest.raises(InputError, match=told):
        one.check(trained[2], one.options(**options))


def test_a_reference_of_one_modality_has_nothing_of_the_other(multiome, tmp_path):
    peaks = multiome[:100, multiome.var[MODALITY] == "atac"]
    peaks = peaks[np.asarray(peaks.X.sum(axis=1)).ravel() > 0].copy()
    alone = fitted(peaks, tmp_path, 1)
    for name in ("imputed-expression", "differential-expression"):
        one = analysis(name, "multivi")
        with pytest.raises(InputError, match="has no genes: it was trained on atac alone"):
            one.check(alone[2], one.options())
    values, measured = made("imputed-accessibility", cells_of(alone, peaks[:20]))
    assert measured.all()
    assert values.shape == (20, 174)
