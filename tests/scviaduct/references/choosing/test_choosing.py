"""Choosing a reference or a family: properties of real and of small written files, and every branch of the tree."""

from __future__ import annotations

import shlex
from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scviaduct.errors import InputError
from scviaduct.references.building import build_package
from scviaduct.references.choosing.choice import choose
from scviaduct.references.choosing.columns import Column, is_control, is_untold
from scviaduct.references.choosing.commands import TOLD, notes_of, stem_of, train_command
from scviaduct.references.choosing.fits import Fit
from scviaduct.references.choosing.profile import Profile, with_parameters
from scviaduct.references.choosing.tree import ROOT, TREE, Leaf, Node, explained, walk
from scviaduct.sources import open_source


def options(command):
    """The source and the options of a command, as a shell splits it."""
    words = shlex.split(command)
    assert words[:2] in (["scviaduct", "train"], ["scviaduct", "map"])
    return words[2], dict(zip(words[3::2], words[4::2], strict=True))


def found(choice, name):
    return next(item for item in choice.properties if item.name == name)


def write(cells, path, **changes):
    """Write cells, some of their columns changed."""
    cells = cells.copy()
    for name, values in changes.items():
        cells.obs[name] = values
    cells.write_h5ad(path)
    return str(path)


REAL = {
    "pbmc_10x_3tech_symphony.h5ad": (
        *("SCANVI", "", {"--labels-key": "cell_type", "--batch-key": "batch"}),
        "'cell_type' has 9 labels on 100.0% of the cells",
    ),
    "perturb_thp1_eccite_sceptre.h5ad": (
        *("ContrastiveVI", '?filter=perturbation != "unassigned"'),
        {"--background": "perturbation=non-targeting", "--batch-key": "batch"},
        "2,304 of 19,763 cells of 'perturbation' are non-targeting, and 966 untold",
    ),
    "citeseq_pbmc5k_scvitests.h5ad": (
        *("TOTALVI", "?proteins=protein_expression", {}),
        "features: 16,581 rna, 29 protein; 100% of the sampled cells have all of them",
    ),
    "multiome_rna_atac_muon.h5mu": (
        *("MULTIVI", "", {}),
        "features: 45 rna, 174 atac; 98% of the sampled cells have all of them",
    ),
    "multiome_a549_scicar_atac_binary.h5ad": ("PEAKVI", "?modality=atac", {}, "features: 52,761 atac"),
    "pbmc1k_10xv3_scwg.h5ad": (
        *("SCVI", "", {}),
        "no column of obs is called as labels usually are, with several of them",
    ),
}


@pytest.mark.parametrize("file", REAL)
def test_real_data(shared_data, file):
    family, parameters, expected, figure = REAL[file]
    choice = choose(str(shared_data / file))
    assert (choice.kind, choice.name, choice.exit_status) == ("family", family, 0)
    assert choice.steps[-1].figure == figure
    made = f"{file.rpartition('.')[0]}-{family.lower()}"
    uri, told = options(choice.commands[0])
    assert uri == f"{shared_data / file}{parameters}"
    assert told == {"--family": family.lower(), **expected, "--out": made}
    assert choice.commands[1] == f"scviaduct reference add ./{made} --name {made}"


def test_what_a_printed_source_selects(shared_data):
    choice = choose(str(shared_data / "perturb_thp1_eccite_sceptre.h5ad"))
    with open_source(options(choice.commands[0])[0]) as source:
        scan = source.scan(16_384, ["perturbation"])
    assert scan.cells == 20_729 - 966
    assert "unassigned" not in scan.columns["perturbation"].counts


def test_cells_of_a_census(census_collection):
    choice = choose(f"census:2025-11-08?uri={census_collection}")
    _, told = options(choice.commands[0])
    assert told["--family"] == "scanvi"
    assert (told["--labels-key"], told["--batch-key"]) == ("cell_type", "dataset_id")
    assert "--unlabeled-category" not in told  # 'unknown', which it is by itself
    assert found(choice, "organism").found == "homo_sapiens."


# ---- the tree ----


LABELS = Column("cell_type", {"B": 500, "T": 500})
DONORS = Column("donor_id", {"d1": 250, "d2": 250, "d3": 250, "d4": 250})
KNOCKED = Column("perturbation", {"NT": 300, "STAT1": 700}, controls=("NT",))


def profile(**changes):
    plain = Profile(uri="cells.h5ad", version="v", cells=1000, sampled=100, features={"rna": 50}, layer="X")
    return replace(plain, **changes)


def fit(name="blood", family="SCANVI", *, fits=True, complete=True, weighted=0.9):
    return Fit(name, family, fits, complete, weighted, weighted, 9, "", "told")


ENDS = {
    "no-cells": profile(cells=0),
    "unread": profile(sampled=0),
    "no-counts": profile(wrong={"rna": "value 1.5 of rna is no count"}),
    "MRVI-reference": profile(aim="compare-samples", fits=(fit(), fit("donors", "MRVI"))),
    "MRVI": profile(aim="compare-samples", samples=DONORS, fits=(fit(),)),
    "no-samples": profile(aim="compare-samples"),
    "ContrastiveVI-reference": profile(aim="perturbation", fits=(fit("screen", "ContrastiveVI"),)),
    "ContrastiveVI": profile(perturbation=KNOCKED, labels=LABELS),
    "no-control": profile(aim="perturbation", perturbation=Column("drug", {"a": 500, "b": 500})),
    "no-rna": profile(aim="perturbation", features={"atac": 50}, perturbation=KNOCKED),
    "reference": profile(perturbation=KNOCKED, fits=(fit(),)),
    "MULTIVI": profile(features={"rna": 50, "protein": 5, "atac": 50}, labels=LABELS),
    "TOTALVI": profile(features={"rna": 50, "protein": 5}),
    "PEAKVI": profile(features={"atac": 50}, labels=LABELS),
    "no-family": profile(features={"protein": 5}),
    "SCANVI": profile(labels=LABELS, fits=(fit(fits=False),)),
    "SCVI": profile(),
}


@pytest.mark.parametrize("leaf", ENDS)
def test_every_end_is_reached(leaf):
    name, steps = walk(ENDS[leaf])
    assert name == leaf
    assert steps[0].node == ROOT
    lines = list(explained(steps))
    *asked, end = [line for line in lines if line.startswith(">")]
    assert [line.endswith(step.question) for line, step in zip(asked, steps, strict=True)] == [True] * len(steps)
    assert TREE[leaf].why in end
    told = [line.strip() for line in lines if line.strip().startswith("[")]
    assert told == [f"[{step.answer}: {step.figure}]" for step in steps]


def test_the_table_is_a_whole_tree():
    told = {name for node in TREE.values() if isinstance(node, Node) for name in (node.yes, node.no, node.unknown)}
    assert told - {""} == set(TREE) - {ROOT}
    leaves = {name for name, node in TREE.items() if isinstance(node, Leaf)}
    assert leaves == set(ENDS)
    lines = "\n".join(explained(()))
    assert all(node.question in lines for node in TREE.values() if isinstance(node, Node))
    assert all(leaf.why in lines for leaf in TREE.values() if isinstance(leaf, Leaf))


@pytest.mark.parametrize(
    ("changes", "leaf"),
    [
        ({"aim": "map"}, "reference"),
        ({"aim": "integrate"}, "SCANVI"),
        ({"aim": "integrate", "perturbation": KNOCKED}, "SCANVI"),
        ({"fits": (fit(complete=False),)}, "SCANVI"),
        ({"fits": (fit(complete=False),), "aim": "map"}, "reference"),
        ({"fits": (fit(complete=False), fit("other"))}, "reference"),
        ({"labels": Column("cell_type", {"B": 60, "T": 39})}, "reference"),
        ({"fits": (), "labels": Column("cell_type", {"B": 60, "T": 39})}, "SCVI"),  # 9.9 % of the cells
        ({"fits": (), "labels": Column("cell_type", {"B": 60, "T": 40})}, "SCANVI"),
        ({"fits": (), "labels": Column("cell_type", {"B": 991, "T": 9})}, "SCVI"),  # one label on ten cells
        ({"aim": "compare-samples", "samples": DONORS}, "MRVI"),
        ({"fits": (), "perturbation": Column("drug", {"DMSO": 9, "a": 991}, controls=("DMSO",))}, "SCANVI"),
    ],
)
def test_aims_and_thresholds(changes, leaf):
    assert walk(profile(**{"labels": LABELS, "fits": (fit(),), **changes}))[0] == leaf


def test_a_sample_that_may_be_no_donor():
    unsure = replace(DONORS, name="sample", sure=False)
    steps = walk(profile(aim="compare-samples", samples=unsure))[1]
    assert steps[-1].figure.endswith("cannot tell whether 'sample' is a donor")


@pytest.mark.parametrize(
    ("value", "control"),
    [
        *[(value, True) for value in ("NT", "NTg7", "non-targeting", "Non-Targeting_3", "ctrl", "DMSO", "vehicle")],
        *[(value, True) for value in ("control", "Untreated", "mock", "NTC", "negctrl1")],
        *[(value, False) for value in ("NTRK1", "STAT1", "CTRL2B", "controlled", "unassigned", "", "DMSO+IFN", "NT5E")],
    ],
)
def test_controls(value, control):
    assert is_control(value) is control


def test_values_that_say_nothing():
    assert all(map(is_untold, ("unassigned", "Unknown", "NA", "n/a", "", "Unlabelled", "not available")))
    assert not any(map(is_untold, ("NK", "Nan cells", "T", "0", "control")))


# ---- commands ----


def test_commands_as_a_shell_takes_them():
    odd = Column("my drug", {"DMSO": 100, "x & y": 800}, untold={'"none"': 50, "na": 50}, controls=("DMSO",))
    uri, told = options(
        train_command(profile(perturbation=odd, uri="a b.h5ad?filter=n > 3 or m == 1"), "ContrastiveVI")
    )
    assert uri == 'a b.h5ad?filter=(n > 3 or m == 1) and attr("my drug") not in ["%5C"none%5C"", "na"]'
    assert told["--background"] == "my drug=DMSO"
    several = replace(KNOCKED, values={"NT1": 30, "NT2": 30, "a": 900}, controls=("NT1", "NT2"))
    words = shlex.split(train_command(profile(perturbation=several), "ContrastiveVI"))
    assert [words[i + 1] for i, word in enumerate(words) if word == "--background"] == [
        "perturbation=NT1",
        "perturbation=NT2",
    ]
    missing = replace(KNOCKED, missing=4)
    assert options(train_command(profile(perturbation=missing), "ContrastiveVI"))[0].endswith("perturbation != None")


WITHOUT_SURGERY = "The encoder does not read the batch (encode_covariates=False), so that cells of new batches map"


@pytest.mark.parametrize(
    ("family", "aim", "setting", "note"),
    [
        ("SCVI", "map", None, WITHOUT_SURGERY),
        ("SCANVI", "", None, WITHOUT_SURGERY),
        ("MULTIVI", "map", None, WITHOUT_SURGERY),
        ("PEAKVI", "map", None, WITHOUT_SURGERY),
        ("TOTALVI", "map", "encode_covariates=False", "--set encode_covariates=False, because --aim map"),
        ("TOTALVI", "", None, "TOTALVI's encoder reads the batch unless it is told not to"),
        ("MRVI", "map", None, "MRVI's encoder reads the sample: for cells of new samples map fits adapters"),
        ("ContrastiveVI", "map", None, "ContrastiveVI's encoder reads the batch: for cells of new batches map fits"),
    ],
)
def test_how_what_is_trained_maps_new_batches_is_said(family, aim, setting, note):
    batch = Column("batch", {"a": 500, "b": 500})
    seen = profile(aim=aim, batch=batch, samples=DONORS, perturbation=KNOCKED)
    _, told = options(train_command(seen, family))
    assert "--recipe" not in told  # that of surgery is named in the documentation, and costs fitting
    assert told.get("--set") == setting
    assert told.get("--sample-key") == ("donor_id" if family == "MRVI" else None)
    notes = notes_of(seen, family)
    assert any(one.startswith(note) for one in notes), notes
    needs_surgery = family in ("MRVI", "ContrastiveVI") or (family == "TOTALVI" and setting is None)
    assert any("surgery" in one and "without surgery" not in one for one in notes) is needs_surgery


@pytest.mark.parametrize("family", ["SCVI", "SCANVI", "MULTIVI", "PEAKVI", "TOTALVI"])
def test_which_families_read_the_batch_unless_they_are_told(family):
    import inspect

    from scvi import module

    built = {"SCVI": "VAE", "SCANVI": "SCANVAE", "MULTIVI": "MULTIVAE", "PEAKVI": "PEAKVAE", "TOTALVI": "TOTALVAE"}
    parent = next(
        one
        for one in getattr(module, built[family]).__mro__
        if "encode_covariates" in inspect.signature(one).parameters
    )
    assert inspect.signature(parent).parameters["encode_covariates"].default is (family in TOLD)


def test_a_batch_of_one_value_and_the_samples_are_no_batch_key():
    alone = Column("batch", {"a": 1000})
    assert "--batch-key" not in train_command(profile(batch=alone), "SCVI")
    assert "--batch-key" in train_command(profile(batch=DONORS, samples=DONORS), "SCVI")
    assert "--batch-key" not in train_command(profile(batch=DONORS, samples=DONORS), "MRVI")


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("/data/My Cells.v2.h5ad?layer=X", "my-cells.v2"),
        ("census:2025-11-08?organism=mus_musculus", "census-2025-11-08"),
        ("s3://bucket/folder/", "folder"),
        ("soma:/data/exp", "soma-exp"),
    ],
)
def test_names_of_what_is_made(uri, name):
    assert stem_of(uri) == name


def test_parameters_of_a_printed_uri():
    assert with_parameters("a.h5ad", {"modality": "atac"}) == "a.h5ad?modality=atac"
    assert with_parameters("a.h5ad?layer=X&filter=b", {"filter": "c & d"}) == "a.h5ad?layer=X&filter=c %26 d"


# ---- files written for it ----


@pytest.fixture(scope="module")
def package(scvi_folder, tmp_path_factory):
    """A registered SCVI of 40 genes with ``encode_covariates=False``."""
    return build_package(scvi_folder, tmp_path_factory.mktemp("package") / "toy", "toy")


def test_a_reference_that_fits_is_preferred(cells, package, tmp_path):
    choice = choose(write(cells, tmp_path / "query.h5ad"), [package], aim="map")
    assert (choice.kind, choice.name) == ("reference", "toy")
    assert "100.0% of its 40 genes found, 100.0% by influence" in choice.why
    uri, told = options(choice.commands[0])
    assert uri == str(tmp_path / "query.h5ad")
    assert told == {"--reference": "toy", "--store": "query-store"}
    (own,) = choice.alternatives
    assert own.name == "SCANVI"
    assert "--recipe" not in own.command  # it is for integrating these cells, not for mapping to them


def test_a_reference_whose_genes_are_missing_is_not(cells, package, tmp_path):
    renamed = cells.copy()
    renamed.var = pd.DataFrame(index=[f"other-{name}" for name in cells.var_names])
    choice = choose(write(renamed, tmp_path / "query.h5ad"), [package])
    assert choice.name == "SCANVI"
    (step,) = [step for step in choice.steps if step.node == "fitting"]
    assert step.answer == "no"
    assert "toy (SCVI): 0.0% of its 40 genes found" in step.figure


def test_half_of_the_influence_is_not_enough(cells, package, tmp_path):
    influence = package.encoder().gene_influence()
    share = float(influence[:28].sum() / influence.sum())
    assert 0.5 < share < 0.8  # preflight lets it through
    choice = choose(write(cells[:, :28], tmp_path / "query.h5ad"), [package])
    assert choice.name == "SCANVI"
    assert f"{share:.1%} by influence, of 80% that are needed" in found(choice, "references").found


def test_the_best_of_several_comes_first(cells, package, tmp_path):
    uri = write(cells[:, :36], tmp_path / "query.h5ad")
    others = [replace(package, name="b"), replace(package, name="a"), replace(package, name="c", family="MRVI")]
    choice = choose(uri, others)
    assert [choice.name, *(other.name for other in choice.alternatives)] == ["a", "b", "c", "SCANVI"]
    assert choose(uri, others, aim="compare-samples").name == "c"


@pytest.fixture(scope="module")
def reads_batch(cells, train_and_save, tmp_path_factory):
    """An SCVI whose encoder reads the batch."""
    train, save = train_and_save
    folder = tmp_path_factory.mktemp("reads-batch")
    return build_package(save(train(cells.copy(), encode_covariates=True), folder / "saved"), folder / "toy", "toy")


def test_batches_that_the_encoder_does_not_know(cells, reads_batch, tmp_path):
    known = choose(write(cells, tmp_path / "known.h5ad"), [reads_batch])
    assert (known.kind, known.notes) == ("reference", ())
    assert "surgery" not in known.why
    new = choose(write(cells, tmp_path / "new.h5ad", batch="b3"), [reads_batch])
    assert (new.kind, new.name) == ("reference", "toy")
    assert "surgery for 1 new value of what its encoder reads" in new.why


def test_the_batch_column_of_another_name(cells, reads_batch, tmp_path):
    other = cells.copy()
    other.obs = other.obs.rename(columns={"batch": "library_id"}).drop(columns="donor")
    choice = choose(write(other, tmp_path / "query.h5ad"), [reads_batch])
    assert options(choice.commands[0])[1]["--batch-key"] == "library_id"
    assert choice.notes == ("'library_id' plays the reference's batch.",)


def test_a_reference_that_leaves_proteins_unused(cells, package, tmp_path):
    cite = cells.copy()
    cite.obsm["protein_counts"] = pd.DataFrame({"CD3": 2.0, "CD4": 1.0}, index=cite.obs_names)
    cite.obsm["X_pca"] = np.zeros((cite.n_obs, 2))
    uri = write(cite, tmp_path / "cite.h5ad")
    choice = choose(uri, [package])
    assert choice.name == "TOTALVI"
    assert [other.name for other in choice.alternatives] == ["toy", "SCANVI"]
    assert "leaves protein unused" in choice.alternatives[0].why
    assert options(choice.commands[0])[0] == f"{uri}?proteins=protein_counts"
    assert choose(uri, [package], aim="map").name == "toy"


def test_proteins_without_names_are_told_of(cells, tmp_path):
    cite = cells.copy()
    cite.obsm["protein_expression"] = np.ones((cite.n_obs, 3), np.float32)
    choice = choose(write(cite, tmp_path / "cite.h5ad"))
    assert choice.name == "SCANVI"
    told = found(choice, "modalities")
    assert told.level == "warn"
    assert "and cannot be read: " in told.found
    assert "matrix without names" in told.found


def test_normalised_values_alone(cells, tmp_path):
    normal = anndata.AnnData(sparse.csr_matrix(np.log1p(cells.X.toarray())), obs=cells.obs, var=cells.var)
    choice = choose(write(normal, tmp_path / "normal.h5ad"))
    assert (choice.kind, choice.commands, choice.exit_status) == ("nothing", (), 1)
    assert "is no count; looked in X (no matrix holds counts)" in choice.why
    normal.layers["counts"] = cells.X
    choice = choose(write(normal, tmp_path / "both.h5ad"))
    assert choice.name == "SCANVI"
    assert found(choice, "counts").found.startswith("In layers/counts")


def test_no_cell_selected(cells, tmp_path):
    choice = choose(f"{write(cells, tmp_path / 'cells.h5ad')}?filter=age > 1000")
    assert (choice.kind, choice.exit_status) == ("cannot tell", 3)
    assert choice.why.startswith("0 cells selected.")


def test_what_labels_are_does_not_enter(cells, tmp_path):
    uri = write(cells, tmp_path / "cells.h5ad")
    before = choose(uri)
    swapped = cells.obs["cell_type"].astype(str).map({"B": "x", "NK": "y", "T": "z", "unknown": "unknown"})
    after = choose(write(cells, tmp_path / "cells.h5ad", cell_type=swapped))
    assert replace(after, version=before.version) == before
    assert found(before, "labels").found == "'cell_type': 3 labels, 9 cells without ('unknown')."


def test_labels_that_mean_none_are_named(cells, tmp_path):
    other = cells.obs["cell_type"].astype(str).replace("unknown", "Unassigned")
    choice = choose(write(cells, tmp_path / "cells.h5ad", cell_type=other))
    assert options(choice.commands[0])[1]["--unlabeled-category"] == "Unassigned"


def test_samples_that_differ_by_a_condition(cells, tmp_path):
    donor = np.array([f"d{i % 4}" for i in range(cells.n_obs)])
    ill = np.where(np.isin(donor, ["d0", "d1"]), "ill", "well")
    sex = np.where(np.isin(donor, ["d0", "d2"]), "male", "female")
    sex[3] = "male"  # one cell of a donor who is female
    choice = choose(write(cells, tmp_path / "cells.h5ad", donor=donor, disease=ill, sex=sex))
    assert found(choice, "samples").found == "'donor': 4 samples; 'disease' is constant within each (2 ill, 2 well)."
    (mrvi,) = [other for other in choice.alternatives if other.name == "MRVI"]
    assert mrvi.why == "to compare samples ('donor'; 'disease' is constant within each: 2 ill, 2 well)"
    assert options(mrvi.command)[1]["--sample-key"] == "donor"
    alone = choose(write(cells, tmp_path / "alone.h5ad", donor=donor, disease=np.where(donor == "d0", "ill", "well")))
    assert "MRVI" not in [other.name for other in alone.alternatives]


def test_an_identifier_is_no_role(cells, tmp_path):
    each = [f"cell-{i}" for i in range(cells.n_obs)]
    choice = choose(write(cells, tmp_path / "cells.h5ad", cell_type=each, batch=each, donor=each))
    assert choice.name == "SCVI"
    assert "--batch-key" not in choice.commands[0]
    assert found(choice, "samples").found.startswith("No column")


def test_a_reference_that_is_damaged_hides_no_other(cells, package, tmp_path):
    lost = replace(package, name="lost", path=tmp_path / "gone")
    choice = choose(write(cells, tmp_path / "cells.h5ad"), [lost, package], broken={"torn": "No manifest."})
    assert choice.name == "toy"
    told = found(choice, "references")
    assert "lost (SCVI) does not fit: cannot be checked: " in told.found
    assert told.found.endswith("'torn' cannot be read: No manifest.")


def test_an_aim_that_there_is_not(cells, tmp_path):
    with pytest.raises(InputError, match=r"--aim mapping: there is no such aim. One of map, integrate"):
        choose(str(tmp_path / "none.h5ad"), aim="mapping")
