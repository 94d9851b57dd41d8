"""MRVI's comparisons of samples on real perturbed cells equal scvi-tools' own on the same cells, in one unit or two."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from scviaduct.analysis.abundance import AbundanceOptions, Admissible, AdmissibleOptions, DifferentialAbundance
from scviaduct.analysis.sample_effects import EffectOptions, MultivariateDE
from scviaduct.analysis.samples import DistanceOptions, RepresentationOptions, SampleDistances, SampleRepresentations
from scviaduct.errors import DataError, InputError
from scviaduct.families.vae import quiet
from tests.support.mrvi import cells_of, run, train

HALVES = (slice(0, 301), slice(301, None))
SMALL = {"encoder_n_hidden": 32, "n_latent": 8, "n_latent_u": 5}


@pytest.fixture(scope="module")
def thp1(shared_data, tmp_path_factory):
    """An MRVI of two epochs on 800 THP-1 cells of eight perturbations, which play the donors."""
    cells = anndata.read_h5ad(shared_data / "perturb_thp1_eccite_sceptre.h5ad")
    kept = sorted(cells.obs["perturbation"].value_counts().index[:8])
    rng = np.random.default_rng(0)
    rows = [rng.choice(np.flatnonzero(cells.obs["perturbation"] == one), 100, replace=False) for one in kept]
    cells = cells[np.random.default_rng(1).permutation(np.concatenate(rows))]
    obs = pd.DataFrame({name: pd.Categorical(cells.obs[name].astype(str)) for name in ("perturbation", "batch")})
    obs.index = cells.obs_names
    number = obs["perturbation"].cat.codes.to_numpy()
    obs["arm"] = pd.Categorical(np.where(number % 2, "treated", "control"))
    obs["dose"] = number * 0.5
    obs["stage"] = pd.Categorical(np.array(["I", "II", "III"])[number % 3])
    data = anndata.AnnData(sparse.csr_matrix(cells.X, dtype=np.float32), obs=obs, var=cells.var[[]].copy())
    folder = tmp_path_factory.mktemp("thp1")
    return train(data, folder, sample="perturbation", batch="batch", epochs=2, gain=3.0, arguments=SMALL)


@pytest.fixture(scope="module", params=[{}, {"qz_kwargs": {"use_map": False}}], ids=["map", "posterior"])
def either(request, thp1, tmp_path_factory):
    """Both kinds of residual."""
    if not request.param:
        return thp1
    folder = tmp_path_factory.mktemp("posterior")
    data = thp1[0].adata.copy()
    del data.uns["_scvi_uuid"]
    return train(
        data, folder, sample="perturbation", batch="batch", epochs=1, gain=3.0, arguments=SMALL | request.param
    )


def in_order(found, facts, dim="sample"):
    return found.sel({dim: list(facts.sample_categories)}).values


def test_representations(either):
    model, facts, _ = either
    with quiet():
        expected = in_order(model.get_local_sample_representation(), facts)
    _, matrices, _ = run(SampleRepresentations(), RepresentationOptions(), either)
    found = matrices["sample_representations"]
    np.testing.assert_allclose(found, expected.reshape(len(found), -1), atol=1e-5 * expected.std())
    features = SampleRepresentations().shape(facts, RepresentationOptions()).matrices["sample_representations"]
    assert features[9] == f"{facts.sample_categories[1]}:1"
    _, apart, _ = run(SampleRepresentations(), RepresentationOptions(), either, HALVES)
    np.testing.assert_allclose(apart["sample_representations"], found, atol=1e-5 * expected.std())


def matrix_of(table, group, names):
    rows = table[table["group"] == group].set_index(["sample_1", "sample_2"])["distance"]
    return np.array([[rows.get((a, b), rows.get((b, a), 0.0)) for b in names] for a in names])


def test_distances(either):
    model, facts, _ = either
    with quiet():
        expected = model.get_local_sample_distances(groupby="batch", keep_cell=False)["batch"]
    for units in ((slice(None),), HALVES):
        _, _, finished = run(SampleDistances(), DistanceOptions(group_by="batch"), either, units)
        table = finished.tables["sample_distances"]
        assert len(table) == 3 * 8 * 7 / 2
        for group, part in table.groupby("group"):
            told = in_order(in_order_of(expected, facts).sel(batch_name=group), facts, "sample_y")
            np.testing.assert_allclose(matrix_of(table, group, facts.sample_categories), told, rtol=1e-4)
            assert set(part["cells"]) == {int((model.adata.obs["batch"] == group).sum())}


def in_order_of(found, facts):
    return found.sel(sample_x=list(facts.sample_categories))


def test_distances_of_draws(either):
    """scvi-tools draws other numbers; over cells and draws the means come together."""
    model, facts, _ = either
    rows, told = slice(0, 200), DistanceOptions(mode="normalised", samples=20)
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        expected = model.get_local_sample_distances(
            cells_of(either, rows).data, use_mean=False, normalize_distances=True, mc_samples=20
        )["cell"]
    theirs = in_order(in_order_of(expected, facts), facts, "sample_y").mean(axis=0)
    table = run(SampleDistances(), told, either, (rows,))[2].tables["sample_distances"]
    found = matrix_of(table, "", facts.sample_categories)[~np.eye(8, dtype=bool)]
    theirs = theirs[~np.eye(8, dtype=bool)]
    # A residual that is drawn is so wide here that samples lie as far apart as two draws of one.
    spread = 0.3 if model.module.qz.use_map else 0.0
    assert theirs.max() - theirs.min() > spread
    assert np.abs(found - theirs).max() < 0.08
    again = run(SampleDistances(), told, either, (rows,))[2].tables["sample_distances"]
    pd.testing.assert_frame_equal(again, table, check_exact=True)


def test_cells_without_a_group_are_in_none(thp1):
    group = np.where(np.arange(800) < 5, None, "there")
    table = run(SampleDistances(), DistanceOptions(group_by="arm"), thp1, arm=group)[2].tables["sample_distances"]
    assert set(table["group"]) == {"there"}
    assert set(table["cells"]) == {795}
    everything = run(SampleDistances(), DistanceOptions(), thp1)[2].tables["sample_distances"]
    assert set(everything["group"]) == {""}
    assert set(everything["cells"]) == {800}


def test_admissible(thp1):
    model, facts, _ = thp1
    with quiet():
        expected = in_order(model.get_outlier_cell_sample_pairs()["is_admissible"], facts)
    assert 1 - expected.mean() > 0.01
    for units in ((slice(None),), HALVES):
        columns, matrices, _ = run(Admissible(), AdmissibleOptions(), thp1, units)
        np.testing.assert_array_equal(matrices["admissible"], expected)
        np.testing.assert_array_equal(columns["admissible_samples"], expected.sum(axis=1))


def test_samples_without_a_cell_are_not_known(thp1):
    model, facts, _ = thp1
    there = np.flatnonzero(model.adata.obs["perturbation"] != facts.sample_categories[2])
    some = cells_of(thp1, there)
    told = Admissible().prepare(some, AdmissibleOptions())
    found = Admissible().unit(some, told, AdmissibleOptions()).matrices["admissible"]
    assert np.isnan(found[:, 2]).all()
    assert not np.isnan(np.delete(found, 2, axis=1)).any()


def test_abundance(thp1):
    model, facts, _ = thp1
    model.update_sample_info(model.adata)
    with quiet():
        expected = model.differential_abundance(sample_cov_keys=["arm"], compute_log_enrichment=True)
    told = AbundanceOptions(("arm", "stage=II"), "batch", permutations=99)
    one = run(DifferentialAbundance(), told, thp1)
    columns, matrices, finished = one
    np.testing.assert_allclose(matrices["sample_log_density"], in_order(expected["log_probs"], facts), atol=1e-4)
    theirs = expected["arm_log_enrichs"].sel(arm="treated").values
    np.testing.assert_allclose(columns["abundance_arm"], theirs, atol=1e-4)
    two = run(DifferentialAbundance(), told, thp1, HALVES)
    np.testing.assert_allclose(two[0]["abundance_stage_II"], columns["abundance_stage_II"], atol=1e-5)
    table = finished.tables["differential_abundance"]
    pd.testing.assert_frame_equal(two[2].tables["differential_abundance"], table, rtol=1e-5)

    # The table's difference, from the matrix: means over cells of other samples, then over samples.
    own = model.adata.obs["perturbation"].cat.codes.to_numpy()
    group = (model.adata.obs["batch"] == "rep_2").to_numpy()
    means = np.array([matrices["sample_log_density"][group & (own != code), code].mean() for code in range(8)])
    row = table[(table["group"] == "rep_2") & (table["term"] == "arm")].iloc[0]
    assert row["difference"] == pytest.approx(means[1::2].mean() - means[::2].mean(), abs=1e-5)
    assert row["of"] == "arm=treated"


def test_effects_by_scvi_tools_are_those_that_it_gives(thp1):
    model, facts, _ = thp1
    before = model.sample_info
    told = EffectOptions(("arm", "dose"), "batch", genes=facts.names[:2], samples=3, mode="scvi-tools")
    rows = slice(0, 200)
    columns, matrices, finished = run(MultivariateDE(), told, thp1, (rows,))
    assert model.sample_info is before
    model.update_sample_info(model.adata)
    info = model.sample_info.assign(arm=lambda table: (table["arm"] == "treated").astype(float))
    model.sample_info = info
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(7)
        expected = model.differential_expression(
            cells_of(thp1, rows).data, sample_cov_keys=["arm", "dose"], mc_samples=3, store_lfc=True, delta=None
        )
    for position, term in enumerate(("arm", "dose")):
        np.testing.assert_allclose(columns[f"effect_{term}"], expected["effect_size"].values[:, position], rtol=1e-5)
        np.testing.assert_allclose(columns[f"p_{term}"], expected["pvalue"].values[:, position], atol=1e-6)
        np.testing.assert_allclose(matrices[f"lfc_{term}"], expected["lfc"].values[:, position, :2], atol=1e-5)
        # The rates come from counted levels of p: at most a hundredth of a decade too large.
        rates, theirs = columns[f"fdr_{term}"], expected["padj"].values[:, position]
        assert (rates >= theirs * (1 - 1e-9)).all()
        assert (rates <= theirs * 1.024 + 1e-9).all()
    assert finished.tables["multivariate_de"]["p"].isna().all()


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"sample_covariates": ()}, r"--sample-covariates is empty.*genotype:stimulation"),
        ({"sample_covariates": ("arm:",)}, r"'arm:' is not a term"),
        ({"sample_covariates": ("arm", "arm")}, r"'arm' and 'arm' would have the same columns"),
        ({"genes": ("CD4X",)}, r"--genes: 'CD4X' is not a gene of the reference"),
        ({"transform_batch": ("rep_9",)}, r"'rep_9' is not a batch of the reference\. Did you mean rep_"),
        ({"permutations": 5}, r"--permutations 5 is not 19 or more"),
        ({"mode": "wald"}, r"--mode 'wald' .*permutation, scvi-tools"),
        ({"fdr": 1.0}, r"--fdr 1 is not between"),
    ],
)
def test_what_cannot_be_is_refused(thp1, changed, reason):
    options = EffectOptions(**{"sample_covariates": ("arm",)} | changed)
    with pytest.raises(InputError, match=reason):
        MultivariateDE().check(thp1[1], options)


def test_covariates_are_those_of_samples(thp1):
    varies = np.where(np.arange(800) == 3, "treated", thp1[0].adata.obs["arm"].astype(str))
    some = cells_of(thp1, arm=varies)
    own = str(some.data.obs["perturbation"].iloc[3])
    if (thp1[0].adata.obs["arm"].iloc[3]) == "treated":
        some.obs.iloc[3, some.obs.columns.get_loc("arm")] = "control"
    options = EffectOptions(("arm",))
    with pytest.raises(InputError, match=rf"arm: the cells of sample '{own}' have 2 values"):
        MultivariateDE().prepare(some, options)
    told = MultivariateDE().prepare(cells_of(thp1), options)
    with pytest.raises(DataError, match=rf"arm: cells of sample '{own}' have other values"):
        MultivariateDE().unit(some, told, options)
    with pytest.raises(InputError, match=r"stage has 3 values .*stage=III"):
        DifferentialAbundance().prepare(cells_of(thp1), AbundanceOptions(("stage",)))
    with pytest.raises(InputError, match=r"stage: no sample is 'IV'.*I, II, III"):
        MultivariateDE().prepare(cells_of(thp1), EffectOptions(("stage=IV",)))
    with pytest.raises(InputError, match=r"'dose' has other values than two"):
        DifferentialAbundance().prepare(cells_of(thp1), AbundanceOptions(("dose",)))
    with pytest.raises(InputError, match=r"'arm:dose' is an interaction"):
        DifferentialAbundance().check(thp1[1], AbundanceOptions(("arm:dose",)))
