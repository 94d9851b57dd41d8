"""What a card says: its header, its sections, and figures from the package; not its prose."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from scviaduct.errors import InputError
from scviaduct.references.publishing.criticism import criticise
from scviaduct.references.publishing.repository import Options, write_repository

SECTIONS = ["Intended use and limits", "Training data", "Training", "Metrics", "How to use it", "Files"]


@pytest.fixture
def write(made, tmp_path):
    """Write a family's repository: header, sections by heading, and folder."""

    def run(name, **options):
        folder = tmp_path / name
        write_repository(made(name).reference, f"lab/{name.lower()}", folder, Options(**options))
        text = (folder / "README.md").read_text()
        _, header, body = text.split("---\n", 2)
        parts = re.split(r"^## (.+)$", body, flags=re.MULTILINE)
        return yaml.safe_load(header), dict(zip(parts[1::2], parts[2::2], strict=True)), folder, parts[0]

    return run


def test_the_structure(write, made):
    reference = made("SCANVI").reference
    header, sections, folder, lead = write(
        "SCANVI",
        licence="cc-by-4.0",
        tissues=("blood", "lung"),
        description="Of **blood**.",
        data_url="https://e.org/d",
    )

    assert header["library_name"] == "scvi-tools"
    assert header["license"] == "cc-by-4.0"
    assert header["tags"] == [
        "biology",
        "genomics",
        "single-cell",
        "model_cls_name:SCANVI",
        f"scvi_version:{reference.scvi_version}",
        f"anndata_version:{reference.provenance['software']['anndata']}",
        "modality:rna",
        "tissue:blood",
        "tissue:lung",
        "annotated:True",
    ]
    assert list(sections) == SECTIONS
    assert "Of **blood**." in lead
    data = sections["Training data"]
    assert f"Cells: {reference.provenance['cells']}" in data
    assert f"Labels (`cell_type`): {len(reference.known_labels)} (" in data
    assert "Batches (`batch`): 1 (3pv1)" in data
    assert "<https://e.org/d>" in data
    assert "Licence: cc-by-4.0" in data
    assert "hf://lab/scanvi" in sections["How to use it"]
    assert 'pull_from_huggingface_hub("lab/scanvi"' in sections["How to use it"]
    listed = dict(re.findall(r"\| `([^`]+)` \| [\d,]+ \| `([0-9a-f]{64})` \|", sections["Files"]))
    assert sorted(listed) == sorted(path.name for path in folder.iterdir() if path.name != "README.md")
    assert reference.digest in sections["Files"]
    assert ModelCard((folder / "README.md").read_text()).data.library_name == "scvi-tools"


def test_how_it_was_trained_and_what_was_measured(write, made):
    reference = made("SCANVI").reference
    _, sections, _, _ = write("SCANVI")

    blocks = [json.loads(text) for text in re.findall(r"```json\n(.*?)```", sections["Training"], re.DOTALL)]
    assert blocks[0]["epochs"] == reference.provenance["epochs"]
    assert blocks[0]["settings"] == {"n_latent": "3", "n_hidden": "8"}
    assert blocks[1]["n_latent"] == 3
    assert blocks[2]["labels_key"] == "cell_type"
    assert f"scvi-tools {reference.scvi_version}" in sections["Training"]
    losses = dict(re.findall(r"^\| (\w+) \| ([-\d.e+]+) \|$", sections["Metrics"], re.MULTILINE))
    assert float(losses["elbo_train"]) > 0
    assert "Not computed" in sections["Metrics"]


@pytest.mark.parametrize(
    ("name", "features"), [("TOTALVI", "50 rna, 29 protein"), ("PEAKVI", "atac"), ("MRVI", "50 rna")]
)
def test_what_a_query_needs(write, made, name, features):
    _, sections, _, _ = write(name)

    uses = sections["Intended use and limits"]
    assert features in uses
    assert ("column for the sample (`batch`)" in uses) == (name == "MRVI")
    assert f"latent of {made(name).reference.n_latent} dimensions" in uses


def test_calibration_names_no_group(made, tmp_path):
    from scviaduct.references.publishing.measured import _calibration

    told = {"by": "donor", "method": "classifier", "cells": 120, "groups": ["d1", "d2"], "accuracy": 0.9, "ece": 0.05}

    text = _calibration(told)

    assert all(word in text for word in ("120 cells", "2 held-out groups", "0.900", "0.050"))
    assert "d1" not in text
    assert "donor" not in text


@pytest.mark.parametrize(("name", "file"), [("SCVI", "pbmc_10x_3tech_symphony.h5ad"), ("TOTALVI", None)])
def test_criticism_is_measured_on_a_sources_cells(write, shared_data, name, file):
    source = (
        f"{shared_data / file}?filter=batch == '3pv1'"
        if file
        else f"{shared_data / 'citeseq_pbmc5k_scvitests.h5ad'}?proteins=protein_expression"
    )

    _, sections, folder, _ = write(name, criticise=source)

    told = json.loads((folder / "metrics.json").read_text())
    assert {"cell_wise_cv", "gene_wise_cv", "diff_exp", "scviaduct"} == told.keys()
    own = told["scviaduct"]
    assert 100 < own["cells"] <= 1000
    assert -1 <= own["gene_wise_cv"]["pearson"] <= 1
    assert own["gene_wise_cv"]["mae"] > 0
    assert f"| Mean Absolute Error | {own['cell_wise_cv']['mae']:.2f} |" in told["cell_wise_cv"]
    assert told["gene_wise_cv"] in sections["Metrics"]
    assert "metrics.json" in sections["Files"]


def test_criticism_that_scvi_tools_cannot_do_is_said(made, shared_data):
    found = criticise(made("PEAKVI").reference, str(shared_data / "multiome_rna_atac_muon.h5mu"))

    assert not found.figures
    assert "no posterior predictive samples of a PEAKVI" in found.reason


def test_criticism_wants_cells_that_the_model_knows(made, shared_data):
    source = shared_data / "pbmc_10x_3tech_symphony.h5ad"

    with pytest.raises(InputError, match=r"'3pv2' in 'batch' is not one.*filter=batch == '3pv1'"):
        criticise(made("SCVI").reference, f"{source}?filter=batch == '3pv2'")
    with pytest.raises(InputError, match=r"no obs column 'batch'"):
        criticise(made("SCVI").reference, str(shared_data / "tenx_ensembl_100cells_cas.h5ad"))


def test_counts_at_hand_are_enough(minified, tmp_path):
    write_repository(minified(counts=True), "lab/x", tmp_path / "out", Options())

    told = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert told["scviaduct"]["cells"] == 90


def test_metrics_that_the_package_came_with_are_kept(scvi_folder, tmp_path):
    import shutil

    from scviaduct.references.building import build_package

    shutil.copytree(scvi_folder, tmp_path / "saved")
    (tmp_path / "saved" / "metrics.json").write_text(json.dumps({"cell_wise_cv": "| of their own |"}))
    reference = build_package(tmp_path / "saved", tmp_path / "package", "kept")

    write_repository(reference, "lab/x", tmp_path / "out", Options())

    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == {"cell_wise_cv": "| of their own |"}
    assert "| of their own |" in (tmp_path / "out" / "README.md").read_text()
