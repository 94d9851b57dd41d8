"""Panels that are there and not the reference's: proteins of other names, peaks of another build or other calls."""

from __future__ import annotations

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scviaduct.mapping import checks, preflight
from scviaduct.mapping.genes import match_genes
from scviaduct.mapping.panelchecks import features
from scviaduct.references.package import Reference
from scviaduct.sources import open_source
from scviaduct.values import GeneTable, Settings


@pytest.fixture(scope="module")
def a549(shared_data):
    """52,761 real peaks of GRCh37: chromosome as ``1``, start, end."""
    names = anndata.read_h5ad(shared_data / "multiome_a549_scicar_atac_binary.h5ad", backed="r").var_names
    split = names.to_series().str.rsplit("-", n=2, expand=True)
    return pd.DataFrame({"chromosome": split[0], "start": split[1].astype(int), "end": split[2].astype(int)})


@pytest.fixture(scope="module")
def some(a549):
    """Those of three chromosomes."""
    return a549[a549["chromosome"].isin(["1", "17", "19"])]


def spelled(peaks, pattern="{}-{}-{}"):
    return tuple(pattern.format(*peak) for peak in zip(peaks["chromosome"], peaks["start"], peaks["end"], strict=True))


def found_of(query, reference, kind="atac", optional=()):
    """Findings about one panel, of tables that hold nothing else."""
    tables = [GeneTable({"index": tuple(names)}, (kind,) * len(names)) for names in (query, reference)]
    matches = {"file:///q.h5ad": match_genes(*tables)}
    return list(features(matches, lambda uri: tables[0], tables[1], optional))


def shifted(peaks, bases):
    return peaks.assign(start=peaks["start"] + bases, end=peaks["end"] + bases)


def called_anew(peaks, seed=0):
    """The same regions with ends that moved by up to 300 bases, a third lost and a third of others gained."""
    rng = np.random.default_rng(seed)
    moved = peaks.sample(frac=2 / 3, random_state=seed)
    moved = moved.assign(start=moved["start"] + rng.integers(-300, 300, len(moved)))
    moved = moved.assign(end=np.maximum(moved["end"] + rng.integers(-300, 300, len(moved)), moved["start"] + 50))
    return pd.concat([moved, shifted(peaks.sample(frac=1 / 3, random_state=seed + 1), 50_000)])


def test_the_reference_s_peaks_are_no_finding(some):
    names = spelled(some)
    assert found_of(names, names) == []
    assert found_of(spelled(some, "{}:{}-{}"), names) == [], "another spelling is the same peak"
    assert found_of(names[::5], names) == [], "a fifth of the peaks is"
    assert found_of(names, names[::25]) == [], "and a reference of a choice of them"


@pytest.mark.parametrize("bases", [5000, 64_620, 1_500_000])
def test_peaks_of_another_build_are_told_by_their_positions(some, bases):
    (stop,) = found_of(spelled(shifted(some, bases)), spelled(some))
    assert (stop.name, stop.level, stop.overridable) == ("peaks", "stop", False)
    assert stop.message.startswith("0 of the query's 10,740 peaks (1-")
    assert stop.message.endswith("so they are of another genome build or chromosomes have other names.")
    assert stop.remedy.startswith("Lift the query's fragments over to the reference's build and count them in the ref")
    assert stop.figures["overlap"] < 0.15


def test_real_peaks_of_grch38_are_not_those_of_grch37(a549, shared_data):
    with h5py.File(shared_data / "multiome_rna_atac_muon.h5mu") as file:
        muon = [name.decode() for name in file["mod/atac/var/_index"][:]]
    (stop,) = found_of(muon, spelled(a549))
    assert "another genome build" in stop.message
    assert "(the query writes chromosomes as 'chr4', the reference as '1')" in stop.message


@pytest.mark.parametrize("choice", [1, 20])
def test_other_calls_of_the_same_build_are_told_apart_from_another_build(some, choice):
    (stop,) = found_of(spelled(called_anew(some)), spelled(some[::choice]))
    assert "so they are other peak calls of the same build" in stop.message
    assert stop.remedy.startswith("Peaks are matched by name: count the query's fragments in the reference's peaks")
    assert stop.figures["overlap"] > 0.6
    assert stop.figures["chance"] < 0.15


def test_positions_counted_from_one_are_other_calls(some):
    (stop,) = found_of(spelled(some.assign(start=some["start"] + 1)), spelled(some))
    assert "100% overlap" in stop.message
    assert "other peak calls" in stop.message


def test_another_name_of_chromosomes_is_told(some):
    (stop,) = found_of(spelled(some, "chr{}:{}-{}"), spelled(some))
    assert (
        "the query writes chromosomes as 'chr1', the reference as '1', and without that 100% of the peaks are the"
        " reference's." in stop.message
    )
    assert stop.remedy == "Write them as the reference does, such as adata.var_names.str.removeprefix('chr')."
    (anew,) = found_of(spelled(called_anew(some), "chr{}:{}-{}"), spelled(some))
    assert anew.message.endswith(
        "other peak calls of the same build, and the query writes chromosomes as 'chr1', the reference as '1'."
    )


def test_features_that_are_no_intervals_are_left_to_the_other_checks(some):
    assert found_of([f"peak_{i}" for i in range(100)], spelled(some)) == []
    assert found_of(["chr1:1-2"], ["A", "B", "C"]) == []


def test_a_family_that_can_do_without_peaks_may_be_told_to(some):
    (stop,) = found_of(spelled(shifted(some, 64_620)), spelled(some), optional=("rna", "atac"))
    assert stop.overridable


def test_proteins_without_one_in_common():
    query, known = [f"Hu.CD{i}" for i in range(9)], ["CD3_TotalSeqB", "CD4_TotalSeqB"]
    (stop,) = found_of(query, known, "protein", ("protein",))
    assert (stop.name, stop.level, stop.overridable) == ("proteins", "stop", True)
    assert stop.message == (
        "None of the query's 9 proteins (Hu.CD0, Hu.CD1, Hu.CD2 and 6 more) is one of the reference's 2 (CD3_TotalSeqB,"
        " CD4_TotalSeqB) in file:///q.h5ad."
    )
    assert stop.remedy.endswith("encode without proteins: --accept proteins.")
    assert found_of([*query, "cd4"], known, "protein", ("protein",)) == []


def test_preflight_of_shifted_peaks(a549, shared_data, tmp_path):
    """The whole way, from a file of real peaks to the gate."""
    adata = anndata.read_h5ad(shared_data / "multiome_a549_scicar_atac_binary.h5ad", backed="r")[:50, :5000].to_memory()
    first = a549[:5000]
    reference = Reference(
        path=tmp_path, name="peaks", digest="d" * 32, family="PEAKVI", n_latent=10, encode_covariates=False,
        scvi_version="1.5.1", genes=GeneTable({"index": spelled(first)}, ("atac",) * 5000),
    )  # fmt: skip

    def report(file, names):
        query = anndata.AnnData(sparse.csr_matrix(adata.X), obs=adata.obs, var=pd.DataFrame(index=list(names)))
        query.write_h5ad(tmp_path / f"{file}.h5ad")
        with open_source(f"{tmp_path}/{file}.h5ad?modality=atac") as source:
            influence = np.ones(5000, np.float32)
            return preflight.check(source, source.scan(1000), reference, Settings(), influence)

    assert report("whole", spelled(first, "{}:{}-{}")).verdict == "fit"
    wrong = report("lifted", spelled(shifted(first, 64_620)))
    assert wrong.verdict == "not fit"
    (stop,) = [found for found in wrong.findings if found.name == "peaks"]
    assert "another genome build" in stop.message
    assert str(tmp_path / "lifted.h5ad") in stop.message


def test_the_names_of_findings_can_be_accepted():
    assert {"proteins", "peaks", "surgery"} <= set(checks.NAMES)
