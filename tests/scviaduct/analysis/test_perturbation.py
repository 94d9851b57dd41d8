"""Scores of perturbations and enrichment of guides: on real THP-1 cells, on planted effects, and without any effect."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scvi
from scipy import sparse, stats
from scipy.stats import contingency
from scvi.external import ContrastiveVI

from scviaduct.analysis.base import Cells
from scviaduct.analysis.perturbation import ANALYSES, NORM, SCORE, GuideOptions, ScoreOptions
from scviaduct.errors import InputError
from scviaduct.families.base import Encoded, Facts
from scviaduct.families.vae import quiet
from scviaduct.values import GeneTable

SCORING, GUIDES = ANALYSES
CONTROL = "non-targeting"
TOLD = ScoreOptions("perturbation", CONTROL, permutations=199)
TOLD_GUIDES = GuideOptions("perturbation", CONTROL, "guide")
FACTS = Facts(
    genes=GeneTable({"index": ("g",)}, ("rna",)),
    n_latent=2,
    encode_covariates=True,
    scvi_version="1.5.1",
    latent_sizes={"background": 2, "salient": 2},
    batch_key="batch",
    batch_categories=("a", "b"),
)


def trained(data, epochs, controls, **arguments):
    """A ContrastiveVI whose background are the controls."""
    scvi.settings.seed = 0
    background = (data.obs["perturbation"] == controls).to_numpy()
    with quiet():
        ContrastiveVI.setup_anndata(data, batch_key="batch")
        model = ContrastiveVI(data, **arguments)
        model.train(
            background_indices=np.flatnonzero(background).tolist(),
            target_indices=np.flatnonzero(~background).tolist(),
            max_epochs=epochs,
            accelerator="cpu",
            enable_progress_bar=False,
            logger=False,
        )
    model.module.eval()
    return model


@pytest.fixture(scope="module")
def thp1(shared_data):
    """2,000 cells of the screen, three batches, all perturbations."""
    cells = anndata.read_h5ad(shared_data / "perturb_thp1_eccite_sceptre.h5ad")
    rows = np.sort(np.random.default_rng(0).choice(cells.n_obs, 2000, replace=False))
    cells = cells[rows]
    obs = cells.obs[["batch", "guide", "perturbation"]].astype(str)
    return anndata.AnnData(sparse.csr_matrix(cells.X, dtype=np.float32), obs=obs, var=cells.var[[]].copy())


@pytest.fixture(scope="module")
def screen(thp1, as_cells):
    model = trained(thp1.copy(), 3, CONTROL, n_hidden=32)
    return as_cells(model, thp1.copy())


def drawn(norms, obs):
    """Cells of given lengths of the salient latent."""
    norms = np.asarray(norms, np.float32)
    angle = np.random.default_rng(0).uniform(0, 2 * np.pi, len(norms)).astype(np.float32)
    salient = np.column_stack([norms * np.cos(angle), norms * np.sin(angle)])
    none = np.zeros((len(norms), 2), np.float32)
    obs = pd.DataFrame(obs)
    obs.index = obs.index.astype(str)
    data = anndata.AnnData(np.ones((len(norms), 1), np.float32), obs=obs)
    return Cells(None, data, obs, Encoded(none, none, none, {"salient": salient}), FACTS, 0)


def piece(cells, rows):
    encoded = cells.encoded
    others = {name: values[rows] for name, values in encoded.others.items()}
    part = Encoded(encoded.mean[rows], encoded.location[rows], encoded.variance[rows], others)
    return Cells(cells.model, cells.data[rows], cells.obs.iloc[rows], part, cells.facts, cells.seed)


def run(analysis, cells, options, units=None):
    """Tables and facts over units of these rows, and the columns of all cells in their order."""
    units = [np.arange(len(cells.obs))] if units is None else units
    parts = [analysis.unit(piece(cells, rows), {}, options) for rows in units]
    finished = analysis.finish([part.sums for part in parts], cells.facts, options)
    columns = {}
    for rows, part in zip(units, parts, strict=True):
        for name, values in {**part.columns, **analysis.settle(part.columns, finished, options)}.items():
            assert values.dtype == np.float64
            columns.setdefault(name, np.full(len(cells.obs), np.nan))[rows] = values
    assert set(columns) == set(analysis.shape(cells.facts, options).columns)
    return finished, columns


def two_ways(cells):
    """Units of other cuts, and of cells and units in another order; one is empty."""
    n = len(cells.obs)
    mixed = np.random.default_rng(3).permutation(n)
    return np.array_split(np.arange(n), 7), [*np.array_split(mixed, 4), np.empty(0, np.int64)]


# Real cells


def test_norms_are_those_of_scvi_tools(screen):
    with quiet():
        salient = screen.model.get_latent_representation(representation_kind="salient")
    _, columns = run(SCORING, screen, TOLD)
    np.testing.assert_allclose(columns[NORM], np.linalg.norm(salient, axis=1), rtol=1e-4)


def test_table_against_an_independent_computation(screen):
    with quiet():
        salient = screen.model.get_latent_representation(representation_kind="salient")
    norm = np.linalg.norm(salient, axis=1).astype(float)
    obs = screen.obs
    control = (obs["perturbation"] == CONTROL).to_numpy()
    score = (norm - norm[control].mean()) / norm[control].std(ddof=1)
    finished, columns = run(SCORING, screen, TOLD)
    np.testing.assert_allclose(columns[SCORE], score, atol=1e-3)
    assert abs(columns[SCORE][control].mean()) < 1e-9
    assert columns[SCORE][control].std(ddof=1) == pytest.approx(1)
    table = finished.tables["perturbation-score"].set_index("perturbation")
    assert set(table.index) == set(obs["perturbation"])
    for name, row in table[~table["null"]].iterrows():
        own = (obs["perturbation"] == name).to_numpy()
        both = own | control
        design = np.column_stack([own, pd.get_dummies(obs["batch"])])[both].astype(float)
        assert row["cells"] == own.sum()
        assert row["mean_score"] == pytest.approx(score[own].mean(), abs=1e-3)
        assert row["effect"] == pytest.approx(np.linalg.lstsq(design, score[both], rcond=None)[0][0], abs=1e-3)
    tested = table[~table["null"]]
    np.testing.assert_allclose(tested["q_value"], stats.false_discovery_control(tested["p_value"]))
    null = table.loc[CONTROL]
    assert null["null"]
    assert null["cells"] + null["controls"] == control.sum()
    assert np.isnan(null["q_value"])


@pytest.mark.parametrize("analysis", ANALYSES, ids=lambda one: one.name)
def test_cuts_and_order_change_nothing(screen, analysis):
    told = TOLD if analysis is SCORING else TOLD_GUIDES
    whole, columns = run(analysis, screen, told)
    for units in two_ways(screen):
        found, others = run(analysis, screen, told, units)
        pd.testing.assert_frame_equal(found.tables[analysis.name], whole.tables[analysis.name], check_exact=True)
        assert found.facts == whole.facts
        for name, values in columns.items():
            np.testing.assert_array_equal(others[name], values)


def test_shuffled_labels_give_uniform_p_values(screen):
    """Labels of real cells, shuffled within batches: 26 perturbations, six times."""
    random, found = np.random.default_rng(0), []
    for _ in range(6):
        obs = screen.obs.copy()
        for rows in obs.groupby("batch").indices.values():
            obs.iloc[rows, obs.columns.get_loc("perturbation")] = random.permutation(obs["perturbation"].iloc[rows])
        shuffled = Cells(None, screen.data, obs, screen.encoded, screen.facts, 0)
        table = run(SCORING, shuffled, TOLD)[0].tables["perturbation-score"]
        found += list(table.loc[~table["null"], "p_value"])
        assert (table["q_value"].dropna() > 0.02).all()
    assert len(found) == 6 * 26
    # Perturbations share their controls, so that p-values of one shuffle are not independent of each other.
    assert stats.kstest(found, "uniform").pvalue > 1e-3


def test_guides_against_counting(screen):
    finished, _ = run(GUIDES, screen, TOLD_GUIDES)
    table = finished.tables["guide-enrichment"]
    norm = np.linalg.norm(screen.encoded.others["salient"].astype(float), axis=1).astype(np.float32).astype(float)
    control = (screen.obs["perturbation"] == CONTROL).to_numpy()
    assert finished.facts["threshold"] == pytest.approx(np.quantile(norm[control], 0.95), rel=1e-6)
    high = norm > finished.facts["threshold"]
    counts = screen.obs.assign(high=high).groupby(["guide", "perturbation"], observed=True)["high"].agg(["size", "sum"])
    found = table.set_index(["guide", "perturbation"]).sort_index()
    np.testing.assert_array_equal(found["cells"], counts["size"])
    np.testing.assert_array_equal(found["high"], counts["sum"])
    tested = table[~table["control"]]
    np.testing.assert_allclose(tested["q_value"], stats.false_discovery_control(tested["p_value"]))
    assert table.loc[table["control"], "q_value"].isna().all()
    assert (table.loc[table["control"], "perturbation"] == CONTROL).all()


# Planted effects


def simulated(random, fold):
    """1,200 cells of 80 genes in two batches, a third each: controls, ``strong``, and ``none`` that is like controls.

    Counts are negative binomial with dispersion 2 about a depth (log-normal, sd 0.3) times a gene's share; a second
    batch has every gene changed by log-normal factors of sd 0.2. ``strong`` cells have 16 genes ``fold`` times.
    """
    share = random.lognormal(1, 0.5, 80)
    batch, label = random.integers(0, 2, 1200), np.repeat([CONTROL, "strong", "none"], 400)
    rate = share * np.where(batch[:, None] == 1, random.lognormal(0, 0.2, 80), 1)
    rate[label == "strong", :16] *= fold
    rate *= random.lognormal(0, 0.3, (1200, 1))
    counts = random.poisson(rate * random.gamma(2, 1 / 2, rate.shape)).astype(np.float32)
    obs = pd.DataFrame({"batch": np.where(batch, "b", "a"), "perturbation": label})
    obs["guide"] = [f"{name}-{i % 4}" for i, name in enumerate(label)]
    obs.index = obs.index.astype(str)
    return anndata.AnnData(sparse.csr_matrix(counts), obs=obs)


def test_a_planted_perturbation_is_found(as_cells):
    data = simulated(np.random.default_rng(0), fold=3)
    cells = as_cells(trained(data.copy(), 25, CONTROL, n_hidden=32), data)
    table = run(SCORING, cells, TOLD)[0].tables["perturbation-score"].set_index("perturbation")
    assert table.loc["strong", "p_value"] == 1 / 200
    assert table.loc["strong", "effect"] > 1
    assert abs(table.loc["none", "effect"]) < 0.3
    guides = run(GUIDES, cells, TOLD_GUIDES)[0].tables["guide-enrichment"].set_index("guide")
    strong, none = (guides[guides["perturbation"] == name] for name in ("strong", "none"))
    assert (strong["odds_ratio_low"] > 1).all()
    assert (strong["q_value"] < 1e-3).all()
    assert (none["q_value"] > 0.01).all()


def test_a_guide_in_one_batch_is_fishers_test():
    random = np.random.default_rng(1)
    # More cells of the second non-targeting guide than of the first are high.
    norms = np.concatenate([random.uniform(0, 1, 140), random.uniform(0, 1.05, 60), random.uniform(0.8, 1.1, 30)])
    obs = {
        "perturbation": [CONTROL] * 200 + ["GENE"] * 30,
        "guide": ["nt0"] * 140 + ["nt1"] * 60 + ["g1"] * 30,
        "batch": ["a"] * 230,
    }
    finished, _ = run(GUIDES, drawn(norms, obs), TOLD_GUIDES)
    table = finished.tables["guide-enrichment"].set_index("guide")
    # In float32, as lengths come out of the encoder.
    high = drawn(norms, obs).encoded.others["salient"].astype(float)
    high = np.linalg.norm(high, axis=1).astype(np.float32) > finished.facts["threshold"]

    def expected(first, second):
        counts = np.array([[high[side].sum(), (~high[side]).sum()] for side in (first, second)])
        return stats.fisher_exact(counts).pvalue, contingency.odds_ratio(counts).statistic

    guide, control = np.array(obs["guide"]), np.array(obs["perturbation"]) == CONTROL
    for name, others in (("g1", control), ("nt0", guide == "nt1"), ("nt1", guide == "nt0")):
        p_value, odds = expected(guide == name, others)
        assert table.loc[name, "p_value"] == pytest.approx(p_value, rel=1e-6)
        assert table.loc[name, "odds_ratio"] == pytest.approx(odds, rel=1e-5)


def test_a_batch_of_larger_norms_is_no_effect():
    """All of 40 perturbed cells are in the batch whose cells, controls as well, have larger lengths."""
    random = np.random.default_rng(2)
    batch = np.repeat(["a", "b", "b"], [300, 100, 40])
    norms = random.gamma(20, 0.1, 440) + np.where(batch == "b", 2.0, 0.0)
    label = np.repeat([CONTROL, "GENE"], [400, 40])
    cells = drawn(norms, {"perturbation": label, "batch": batch, "guide": label})
    row = run(SCORING, cells, TOLD)[0].tables["perturbation-score"].set_index("perturbation").loc["GENE"]
    assert row["mean_score"] > 0.8
    assert abs(row["effect"]) < 0.3
    assert row["p_value"] > 0.05
    assert row["controls"] == 100
    guide = run(GUIDES, cells, TOLD_GUIDES)[0].tables["guide-enrichment"].set_index("guide").loc["GENE"]
    assert guide["p_value"] > 0.05


def test_a_p_value_does_not_depend_on_other_perturbations():
    random = np.random.default_rng(4)
    label = np.repeat([CONTROL, "A", "B"], [100, 30, 30])
    cells = drawn(random.gamma(20, 0.1, 160), {"perturbation": label, "batch": ["a", "b"] * 80})
    with_b, without = (
        run(SCORING, piece(cells, rows), TOLD)[0].tables["perturbation-score"].set_index("perturbation")
        for rows in (np.arange(160), np.flatnonzero(label != "B"))
    )
    assert with_b.loc["A", "p_value"] == without.loc["A", "p_value"]
    other = run(SCORING, cells, ScoreOptions("perturbation", CONTROL, permutations=199, seed=1))[0]
    assert (
        other.tables["perturbation-score"].set_index("perturbation").loc["A", "p_value"] != with_b.loc["A", "p_value"]
    )


# What is missing


def test_cells_without_a_perturbation_have_a_score_and_no_row():
    obs = {"perturbation": [CONTROL] * 4 + ["A", "A", None], "batch": list("aabbabb"), "guide": [None] * 4 + ["g"] * 3}
    cells = drawn([1, 2, 3, 4, 5, 6, 7], obs)
    finished, columns = run(SCORING, cells, TOLD)
    assert list(finished.tables["perturbation-score"]["perturbation"]) == ["A", CONTROL]
    assert np.isfinite(columns[SCORE]).all()
    assert finished.facts["control_cells"] == 4
    table = run(GUIDES, cells, TOLD_GUIDES)[0].tables["guide-enrichment"]
    assert list(table["guide"]) == ["g"]
    assert list(table["cells"]) == [2]


def test_a_batch_without_controls_is_counted_and_not_compared():
    obs = {"perturbation": [CONTROL] * 4 + ["A"] * 4 + ["B"] * 2, "batch": list("aaaaaabbbb")}
    table = run(SCORING, drawn(np.arange(10) + 1, obs), TOLD)[0].tables["perturbation-score"]
    table = table.set_index("perturbation")
    assert list(table.loc["A", ["cells", "compared"]]) == [4, 2]
    assert list(table.loc["B", ["cells", "compared"]]) == [2, 0]
    assert table.loc["B", ["effect", "p_value", "q_value"]].isna().all()
    assert table.loc["A", "q_value"] == table.loc["A", "p_value"]  # B was not tested


@pytest.mark.parametrize("analysis", ANALYSES, ids=lambda one: one.name)
def test_controls_that_are_not_there(analysis):
    obs = {"perturbation": ["NT", "NT", "A"], "guide": ["n", "n", "g"], "batch": ["a"] * 3}
    told = {"perturbation": "perturbation", "controls": "N"}
    if analysis is GUIDES:
        told["guide"] = "guide"
    with pytest.raises(InputError, match=r"No cell has 'N' in 'perturbation'.*There are: NT"):
        run(analysis, drawn([1, 2, 3], obs), analysis.options(**told))
    for norms in ([1, 1, 3], [1]):
        cells = drawn(norms, {name: values[-len(norms) :] for name, values in obs.items()})
        with pytest.raises(InputError, match="cells with one length"):
            run(analysis, cells, analysis.options(**told | {"controls": cells.obs["perturbation"].iloc[0]}))


def test_a_column_that_is_not_there():
    with pytest.raises(InputError, match=r"no obs column 'perturbatoin'.*There are: perturbation"):
        run(SCORING, drawn([1, 2], {"perturbation": ["A", "B"], "batch": ["a"] * 2}), ScoreOptions("perturbatoin", "A"))


@pytest.mark.parametrize(
    ("analysis", "options", "told"),
    [
        (SCORING, ScoreOptions(), "'perturbation', and it is empty"),
        (SCORING, ScoreOptions("perturbation"), "'controls'.*controls=non-targeting"),
        (SCORING, ScoreOptions("perturbation", CONTROL, permutations=0), "permutations=0"),
        (GUIDES, GuideOptions("perturbation", CONTROL), "'guide'"),
        (GUIDES, GuideOptions("perturbation", CONTROL, "guide", quantile=1.0), r"quantile=1\.0"),
    ],
)
def test_options_are_checked(analysis, options, told):
    with pytest.raises(InputError, match=told):
        analysis.check(FACTS, options)
    analysis.check(FACTS, TOLD if analysis is SCORING else TOLD_GUIDES)


def test_what_is_read():
    assert SCORING.obs(FACTS, TOLD) == ("perturbation",)
    assert GUIDES.obs(FACTS, TOLD_GUIDES) == ("perturbation", "guide")
    assert [one.families for one in ANALYSES] == [("ContrastiveVI",)] * 2
