"""Queries against references of several modalities and of samples: what preflight says, and that they map."""

from __future__ import annotations

import anndata
import numpy as np
import pytest

from scviaduct.errors import DataError
from scviaduct.families import Recipe
from scviaduct.mapping import preflight
from scviaduct.mapping.batches import group_columns
from scviaduct.mapping.mapper import Mapper, model_columns
from scviaduct.mapping.reading import read_block
from scviaduct.references.training import train
from scviaduct.sources import open_source
from scviaduct.values import Settings


@pytest.fixture(scope="module")
def totalvi(shared_data, tmp_path_factory):
    """200 cells of CITE-seq with 29 proteins."""
    source = f"{shared_data / 'citeseq_pbmc5k_scvitests.h5ad'}?proteins=protein_expression"
    recipe = Recipe(family="totalvi", genes=300, epochs=1, device="cpu", settings={"n_hidden": "16", "n_latent": "6"})
    return train(source, recipe, tmp_path_factory.mktemp("totalvi") / "cite")


@pytest.fixture(scope="module")
def mrvi(shared_data, tmp_path_factory):
    """500 THP-1 cells, perturbations as samples."""
    cells = anndata.read_h5ad(shared_data / "perturb_thp1_eccite_sceptre.h5ad")
    folder = tmp_path_factory.mktemp("mrvi")
    known = cells[cells.obs["perturbation"].isin(["non-targeting", "IFNGR1", "STAT1"])].copy()[:500].copy()
    known.write_h5ad(folder / "cells.h5ad")
    recipe = Recipe(
        family="mrvi", sample_key="perturbation", batch_key="batch", genes=0, epochs=1, device="cpu",
        calibrate_by="none",
    )  # fmt: skip
    return train(str(folder / "cells.h5ad"), recipe, folder / "thp1")


def report_of(source, reference, settings=None, **options):
    told = settings or Settings()
    with open_source(str(source)) as opened:
        scan = opened.scan(10_000, preflight.scan_columns(reference, told), group_columns(reference, told))
        return preflight.check(opened, scan, reference, told, reference.encoder().gene_influence(), **options)


def finding(report, name):
    return next(found for found in report.findings if found.name == name)


def latents(source, reference, settings=None):
    told = settings or Settings()
    mapper = Mapper(reference, told)
    with open_source(str(source)) as opened:
        shards = opened.scan(10_000).shards
    return [mapper.map(read_block(shard, reference, model_columns(reference, told))) for shard in shards]


def test_a_smaller_panel_of_proteins_fits_and_is_told(totalvi, shared_data):
    """14 of the 29 proteins: the others read as no count."""
    source = f"{shared_data / 'citeseq_pbmc10k_scvitests.h5ad'}?proteins=protein_expression"
    report = report_of(source, totalvi)
    assert report.verdict == "fit"
    assert "protein 14 of 29" in finding(report, "genes").message
    (mapping,) = latents(source, totalvi)
    assert mapping.latent.shape == (200, 6)
    assert np.isfinite(mapping.latent[mapping.mapped]).all()


def test_a_query_without_proteins_fits_with_a_warning_that_names_the_parameter(totalvi, shared_data):
    report = report_of(shared_data / "citeseq_pbmc10k_scvitests.h5ad", totalvi)
    assert report.verdict == "fit"
    found = finding(report, "genes")
    assert (found.level, found.remedy) == (
        "warn",
        "Encoded without protein. If the source has it, name it: proteins=KEY or modality=...",
    )
    assert "protein 0 of 29" in found.message


def test_proteins_move_the_latent(totalvi, shared_data):
    """So a query is told of proteins that it has and does not name."""
    path = shared_data / "citeseq_pbmc5k_scvitests.h5ad"
    (with_proteins,) = latents(f"{path}?proteins=protein_expression", totalvi)
    (without,) = latents(path, totalvi)
    assert np.abs(with_proteins.latent - without.latent).max() > 1e-3
    recorded = totalvi.latents().latent
    assert np.abs(with_proteins.latent - recorded).max() / recorded.std() <= 1e-5


def test_samples_that_a_reference_does_not_know_need_surgery(mrvi, shared_data):
    path = shared_data / "perturb_thp1_eccite_sceptre.h5ad"
    known = "?filter=perturbation in ['STAT1', 'IFNGR1']"
    report = report_of(f"{path}{known}", mrvi)
    assert report.verdict == "fit"
    assert "All 2 values of 'perturbation' are known" in finding(report, "sample").message
    assert "the encoder reads the sample alone" in finding(report, "batch").message
    (mapping,) = latents(f"{path}{known}", mrvi)
    assert mapping.latent.shape[1] == mrvi.n_latent
    strange = f"{path}?filter=perturbation in ['STAT1', 'CAV1']"
    fitted = report_of(strange, mrvi)
    assert (finding(fitted, "sample").level, fitted.verdict) == ("ok", "fit")
    assert finding(fitted, "surgery").message.startswith("Surgery fits adapters for 1 query batch, ")
    assert "(sample=CAV1)" in finding(fitted, "surgery").message
    found = finding(report_of(strange, mrvi, surgery="off"), "sample")
    assert (found.level, found.overridable) == ("stop", False)
    assert "CAV1" in found.message
    with pytest.raises(DataError, match=r"'perturbation' of cell .* is 'CAV1', not one that the reference"):
        latents(strange, mrvi)
    by_another = report_of(path, mrvi, Settings(sample_key="donor"))
    assert "Name the column that holds it: --sample-key COLUMN." in finding(by_another, "sample").remedy


def test_a_panel_without_one_of_the_reference_s_proteins_stops_unless_accepted(totalvi, shared_data, tmp_path):
    cells = anndata.read_h5ad(shared_data / "citeseq_pbmc10k_scvitests.h5ad")
    panel = cells.obsm["protein_expression"]
    cells.obsm["protein_expression"] = panel.set_axis([f"ADT-{i}" for i in range(panel.shape[1])], axis=1)
    cells.write_h5ad(tmp_path / "other.h5ad")
    report = report_of(f"{tmp_path}/other.h5ad?proteins=protein_expression", totalvi)
    stop = finding(report, "proteins")
    assert (stop.level, report.verdict) == ("stop", "not fit")
    assert stop.message.startswith("None of the query's 14 proteins (ADT-0, ADT-1, ADT-2 and 11 more) is one of the")
    assert finding(report, "genes").remedy == "", "the panel was named"
    assert report.accept(["proteins"]).verdict == "fit"
