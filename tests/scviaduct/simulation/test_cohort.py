"""A cohort is what it says: the planted effects are where they are said to be, and nowhere else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from scviaduct.simulation.cohort import Cohort

COHORT = Cohort(cells=400, donor_effect=0.0)


def mean_log(data, **chosen):
    rows = np.logical_and.reduce([data.obs[name] == value for name, value in chosen.items()])
    total = np.asarray(data.X[rows].sum(axis=0)).ravel()
    return np.log((total + 1) / total.sum())


def test_effects_are_planted():
    data, planted = COHORT.cohort(), COHORT.fold_changes()
    assert (planted != 0).sum() == 10
    for kind in COHORT.TYPES:
        for stimulation in ("control", "stimulated"):
            told = {"cell_type": kind, "stimulation": stimulation}
            found = mean_log(data, genotype="variant", **told) - mean_log(data, genotype="reference", **told)
            there = kind == "genotype" or (kind == "interaction" and stimulation == "stimulated")
            expected = planted if there else 0 * planted
            # A share of genes that changes shifts the shares of all others alike.
            frequent = mean_log(data, genotype="reference", **told) > np.log(0.005)
            apart = (found - expected)[frequent]
            assert np.abs(apart - np.median(apart)).max() < 0.2, (kind, stimulation)


def test_cells_are_counts_of_donors_in_balanced_conditions():
    data = COHORT.cohort()
    assert data.shape == (4800, 100)
    assert data.X.dtype == np.float32
    assert (data.X.data == np.round(data.X.data)).all()
    donors = data.obs.groupby("donor", observed=True)[["genotype", "stimulation", "batch"]].agg(["nunique", "first"])
    assert (donors.xs("nunique", axis=1, level=1) == 1).all(axis=None)
    first = donors.xs("first", axis=1, level=1)
    assert set(first.value_counts(["genotype", "stimulation"])) == {3}
    assert set(first["batch"]) == {"run 1", "run 2"}
    share = (data.obs["cell_type"] == "abundance").groupby(data.obs["stimulation"].to_numpy()).mean()
    assert abs(share["control"] - 1 / 4) < 0.03
    assert abs(share["stimulated"] - 3 / 6) < 0.03


def test_the_same_arguments_give_the_same_cells():
    one, two = COHORT.cohort(), COHORT.cohort()
    assert (one.X != two.X).nnz == 0
    assert one.obs.equals(two.obs)
    assert (replace(COHORT, seed=1).cohort().X != one.X).nnz > 0
