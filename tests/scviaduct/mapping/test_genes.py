"""Genes of a query meet the genes of a reference."""

from __future__ import annotations

import numpy as np
import pytest

from scviaduct.mapping.genes import match_genes
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
