"""Genes of a query meet the genes of a reference."""

from __future__ import annotations

import pickle
import re

import anndata
import numpy as np
import pytest

from scviaduct.errors import InputError
from scviaduct.mapping.genes import match_genes
from scviaduct.sources import open_source
from scviaduct.values import GeneTable

P53, BRCA1, ACTB = "ENSG00000141510", "ENSG00000012048", "ENSG00000075624"


def table(**columns):
    return GeneTable({name: tuple(values) for name, values in columns.items()})


@pytest.mark.parametrize(
    ("source", "reference", "target", "columns"),
    [
        pytest.param(
            table(index=[BRCA1, P53]), table(index=[P53, BRCA1, ACTB]), [1, 0], ("index", "index"), id="other order"
        ),
        pytest.param(
            table(index=[P53 + ".19", "X"]), table(index=[P53]), [0, -1], ("index", "index"), id="version in the query"
        ),
        pytest.param(
            table(index=[P53]), table(index=[P53 + ".2"]), [0], ("index", "index"), id="version in the reference"
        ),
        pytest.param(
            table(index=["TP53", "ACTB"], gene_ids=[P53, ACTB]),
            table(index=[ACTB, P53]),
            [1, 0],
            ("gene_ids", "index"),
            id="symbols, ids in a column of the query",
        ),
        pytest.param(
            table(index=["TP53", "ACTB"]),
            table(index=[ACTB, P53], symbol=["ACTB", "TP53"]),
            [1, 0],
            ("index", "symbol"),
            id="symbols, names in a column of the reference",
        ),
        pytest.param(
            table(index=[P53, "", ""]),
            table(index=["", P53]),
            [1, -1, -1],
            ("index", "index"),
            id="missing identifiers",
        ),
    ],
)
def test_targets(source, reference, target, columns):
    match = match_genes(source, reference)
    assert match.target.dtype == np.int32
    assert match.target.tolist() == target
    assert (match.source_column, match.reference_column) == columns


def test_genes_that_mean_the_same_are_counted():
    match = match_genes(table(index=[P53 + ".1", P53 + ".2", ACTB]), table(index=[P53, ACTB]))
    assert match.target.tolist() == [0, 0, 1]
    assert match.summed == 1
    assert match.versions_stripped


def test_a_pseudoautosomal_locus_is_not_its_twin():
    match = match_genes(
        table(index=["ENSG00000182378.15", "ENSG00000182378.15_PAR_Y"]), table(index=["ENSG00000182378"])
    )
    assert match.target.tolist() == [0, -1]


def test_a_symbol_that_names_two_reference_genes_is_not_matched():
    match = match_genes(
        table(index=["A", "B", "C"]), table(index=["e1", "e2", "e3", "e4"], symbol=["A", "A", "B", "C"])
    )
    assert match.target.tolist() == [-1, 2, 3]
    assert match.ambiguous == 1
    assert match.present.tolist() == [False, False, True, True]


def test_shares_are_plain_and_by_influence():
    match = match_genes(table(index=["a", "b"]), table(index=["a", "b", "c", "d"]))
    assert match.share == 0.5
    assert match.weighted_share(np.array([3, 3, 1, 1], np.float32)) == 0.75


def test_no_gene_in_common():
    match = match_genes(table(index=["a"]), table(index=["b"]))
    assert match.target.tolist() == [-1]
    assert match.share == 0


def features(**modalities):
    """A table of several modalities; ``unsaid`` stands for none."""
    names = [name for values in modalities.values() for name in values]
    told = [modality.replace("unsaid", "") for modality, values in modalities.items() for _ in values]
    return GeneTable({"index": tuple(names)}, tuple(told))


def test_a_gene_and_a_protein_of_one_name_never_meet():
    source = features(protein=["CD4", "CD3"], rna=["CD4", "ACTB"])
    reference = features(rna=["ACTB", "CD3", "CD4"], protein=["CD4"])
    match = match_genes(source, reference)
    assert match.target.tolist() == [3, -1, 2, 0]
    assert match.present.tolist() == [True, False, True, True]
    assert match.modalities == ("rna", "protein")
    assert (match.found("rna"), match.found("protein")) == ((2, 3), (1, 1))
    assert match.share_of("rna") == pytest.approx(2 / 3)
    assert match.share == 0.75
    assert match.summed == 0
    with pytest.raises(InputError, match=r"no genes of modality 'atac'. It has: rna, protein"):
        match.share_of("atac")
    assert pickle.loads(pickle.dumps(match)).modality == match.modality


def test_what_the_source_does_not_say_is_of_the_first_modality():
    reference = features(rna=["CD4", "ACTB"], protein=["CD4"])
    assert match_genes(table(index=["CD4", "ACTB"]), reference).target.tolist() == [0, 1]
    match = match_genes(features(unsaid=["ACTB"], protein=["CD4"], other=["CD4"]), reference)
    assert match.target.tolist() == [1, 2, -1]
    peaks = features(atac=["chr1:1-2"])
    assert match_genes(table(index=["chr1-1-2"]), peaks).target.tolist() == [0]
    assert match_genes(features(rna=["chr1:1-2"]), peaks).target.tolist() == [-1]


def test_a_reference_that_says_nothing_is_looked_for_in_one_modality():
    source = features(protein=["CD4", "CD8A"], rna=["ACTB", "CD4", "CD8A"], other=["CD4"])
    match = match_genes(source, table(index=["CD4", "ACTB", "MYC"]))
    assert match.target.tolist() == [-1, -1, 1, 0, -1, -1], "counts of the protein are not added to the gene's"
    assert match.modalities == ()
    assert match.share == pytest.approx(2 / 3)
    with pytest.raises(InputError, match="of a modality that it does not name"):
        match.found("rna")


def test_each_modality_has_its_own_columns():
    source = GeneTable({"index": ("TP53", "CD4_TotalSeqB"), "ids": (P53 + ".2", "")}, ("rna", "protein"))
    match = match_genes(source, features(rna=[P53], protein=["CD4_TotalSeqB"]))
    assert match.target.tolist() == [0, 1]
    assert (match.source_column, match.versions_stripped, match.notes) == ("ids", True, ())


@pytest.mark.parametrize(
    ("source", "reference", "target", "note"),
    [
        (["CD4"], ["CD4_TotalSeqB"], [0], "1 proteins were found by name without case .*'CD4' as 'CD4_TotalSeqB'"),
        (["cd4-TotalSeq-A", "PD-1"], ["CD4_TotalC", "pd-1"], [0, 1], "2 proteins were found"),
        (["CD4_TotalSeqB", "CD4"], ["CD4_TotalSeqB"], [0, -1], None),
        (["CD4_TotalSeqA", "CD4"], ["CD4_TotalSeqB"], [-1, -1], "2 proteins of the source, such as 'CD4_TotalSeqA'"),
        (["CD4"], ["CD4_TotalSeqB", "cd4"], [-1], None),
        (["CD4", "CD45RA"], ["CD4", "CD45RO"], [0, -1], None),
        (["", "x"], ["_TotalSeqB", "y"], [-1, -1], None),
    ],
)
def test_names_of_proteins(source, reference, target, note):
    match = match_genes(features(protein=source), features(protein=reference))
    assert match.target.tolist() == target
    assert len(match.notes) == (note is not None)
    if note:
        assert re.search(note, match.notes[0])


def test_tags_are_of_proteins_alone():
    assert match_genes(features(rna=["cd4"]), features(rna=["CD4"])).target.tolist() == [-1]


@pytest.mark.parametrize("name", ["chr1:100-200", "chr1-100-200", "chr1_100_200", "chr1_100-200"])
def test_a_peak_in_every_spelling(name):
    reference = features(atac=["chr1_KI270706v1_random:5-9", "chr1:100-200", "chr1:100-201", "chr1-100-2000"])
    match = match_genes(features(atac=[name, "chr1_KI270706v1_random_5_9"]), reference)
    assert match.target.tolist() == [1, 0]
    assert match_genes(features(rna=[name]), features(rna=["chr1:100-200"])).target.tolist() == [
        0 if name == "chr1:100-200" else -1
    ]


def test_a_reference_without_genes():
    assert match_genes(table(index=["a"]), GeneTable({"index": ()})).target.tolist() == [-1]
    assert match_genes(features(rna=["a"]), GeneTable({})).share == 0


def test_real_panels_of_proteins(shared_data):
    """The panel of the 10k set is 14 of the 29 proteins of the 5k set; names are also found without their tags."""
    tables = {}
    for name in ("5k", "10k"):
        with open_source(f"{shared_data}/citeseq_pbmc{name}_scvitests.h5ad?proteins=protein_expression") as source:
            tables[name] = source.genes()
    adata = anndata.read_h5ad(shared_data / "citeseq_pbmc10k_scvitests.h5ad")
    match = match_genes(tables["10k"], tables["5k"])
    assert match.found("protein") == (14, 29)
    assert match.share_of("rna") > 0.9
    assert match.notes == ()
    targets = [tables["5k"].columns["index"][at] for at in match.target[adata.n_vars :]]
    assert targets == adata.obsm["protein_expression"].columns.tolist()
    names = (*adata.var_names, *(name.removesuffix("_TotalSeqB").lower() for name in targets))
    plain = match_genes(GeneTable({"index": names}, tables["10k"].modality), tables["5k"])
    assert plain.target[adata.n_vars :].tolist() == match.target[adata.n_vars :].tolist()
    assert plain.notes[0].startswith("14 proteins were found")


def test_real_peaks_and_genes(shared_data):
    with open_source(f"{shared_data}/multiome_rna_atac_muon.h5mu") as source:
        held = source.genes()
    with open_source(f"{shared_data}/multiome_rna_atac_muon.h5mu?modality=atac") as source:
        peaks = source.genes()
    spelled = GeneTable({"index": tuple(name.replace(":", "-") for name in peaks.columns["index"])})
    match = match_genes(held, peaks)
    assert match.found("atac") == (174, 174)
    assert (match.target[174:] == -1).all()
    assert match_genes(spelled, peaks).share_of("atac") == 1
    assert match_genes(peaks, held).share_of("rna") == 0
