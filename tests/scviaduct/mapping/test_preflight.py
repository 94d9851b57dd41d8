"""What a query can have wrong, and what preflight says of it."""

from __future__ import annotations

from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from scviaduct.errors import DataError, InputError, NotFitError
from scviaduct.mapping import checks, preflight
from scviaduct.mapping.batches import group_columns
from scviaduct.mapping.genes import match_genes
from scviaduct.mapping.mapper import Mapper, model_columns
from scviaduct.mapping.reading import read_block
from scviaduct.references.saved.portable import read_model
from scviaduct.sources import open_source
from scviaduct.values import ColumnSummary, GeneTable, Settings, Shard


@pytest.fixture
def check(write):
    """Preflight of an AnnData or a URI against a reference."""

    def check(query, reference, batch_key="", shard_cells=1000, parameters="", **options):
        uri = write(query) if hasattr(query, "obs") else query
        settings = Settings(batch_key=batch_key)
        groups = group_columns(reference, settings, decoder=options.get("surgery") == "decoder")
        with open_source(f"{uri}{parameters}") as source:
            scan = source.scan(shard_cells, preflight.scan_columns(reference, settings), groups)
            return preflight.check(source, scan, reference, settings, reference.encoder().gene_influence(), **options)

    return check


def findings(report, name):
    return [finding for finding in report.findings if finding.name == name]


def finding(report, name):
    (found,) = findings(report, name)
    return found


def with_value(adata, cell, gene, value):
    dense = adata.X.toarray()
    dense[cell, gene] = value
    adata.X = sparse.csr_matrix(dense)
    return adata


def log_normalised(adata):
    dense = adata.X.toarray()
    adata.X = sparse.csr_matrix(np.log1p(dense / dense.sum(axis=1, keepdims=True) * 1e4).astype(np.float32))
    return adata


def test_a_query_that_fits(check, make_cells, scanvi):
    report = check(make_cells(), scanvi)
    assert (report.verdict, report.exit_status) == ("fit", 0)
    assert [found.name for found in report.findings] == ["cells", "genes", "gene-ids", "counts", "batch", "labels"]
    assert {found.level for found in report.findings} == {"ok"}
    assert (report.cells, report.shards, report.sampled, report.accepted) == (60, 1, 60, ())
    assert finding(report, "cells").message == "60 cells in 1 shard."
    assert finding(report, "counts").message == "Non-negative integers in 60 sampled cells."
    report.require_fit()


def test_real_cells_of_another_chemistry_fit(check, symphony, pbmc):
    report = check(symphony, pbmc, parameters="?filter=batch == '5p'")
    assert (report.verdict, report.cells, report.sampled) == ("fit", 543, 543)
    assert finding(report, "genes").figures["found"] == 1764
    assert "1 new to the reference, 0 missing" in finding(report, "batch").message


# Genes


def saved_influence(reference):
    """Norms of the first layer's weights, scaled by its batch normalisation, as torch itself reads the saved model."""
    saved = read_model(reference.path).state_dict
    layer = "z_encoder.encoder.fc_layers.Layer 0"
    scale = saved[f"{layer}.1.weight"] / torch.sqrt(saved[f"{layer}.1.running_var"] + 1e-3)  # eps of scvi-tools
    return (saved[f"{layer}.0.weight"] * scale[:, None])[:, :40].norm(dim=0).numpy()


@pytest.mark.parametrize(
    ("kept", "level", "verdict", "remedy"),
    [
        (40, "ok", "fit", ""),
        (26, "warn", "fit", "Missing genes read as zero."),
        (10, "stop", "not fit", "choose a reference trained on these genes."),
        (0, "stop", "not fit", "choose a reference trained on these genes."),
    ],
)
def test_missing_genes_are_told_plainly_and_by_influence(check, make_cells, scanvi, kept, level, verdict, remedy):
    adata = make_cells()[:, ::-1][:, :kept].copy() if kept else make_cells()
    if not kept:
        adata.var_names = [f"NOT_A_GENE_{i}" for i in range(adata.n_vars)]
        adata.var = adata.var.drop(columns="symbol")
    report = check(adata, scanvi)
    found = finding(report, "genes")
    influence = saved_influence(scanvi)
    weighted = influence[40 - kept :].sum() / influence.sum()
    assert found.message == f"{kept} of 40 reference genes ({kept / 40:.1%}; {weighted:.1%} by influence)."
    assert found.figures["weighted_share"] == pytest.approx(weighted, abs=1e-6)
    assert (found.level, report.verdict) == (level, verdict)
    assert found.remedy.endswith(remedy)
    assert bool(findings(report, "gene-ids")) == (kept > 0)


def test_few_genes_can_be_accepted(check, make_cells, scanvi):
    few = check(make_cells()[:, :10].copy(), scanvi).accept(["genes"])
    assert (few.verdict, few.exit_status, few.accepted) == ("fit", 0, ("genes",))
    few.require_fit()


def test_no_genes_cannot_be_accepted(check, make_cells, scanvi):
    adata = make_cells()
    adata.var = adata.var.drop(columns="symbol").set_axis([f"x{i}" for i in range(40)])
    with pytest.raises(InputError, match=r"--accept genes: 0 of 40 reference genes .*It cannot be overridden\."):
        check(adata, scanvi).accept(["genes"])


@pytest.mark.parametrize(
    ("measured", "level", "told"),
    [
        ("A", "warn", "1 of 5 reference genes (20.0%; 71.4% by influence)"),
        ("BCDE", "stop", "4 of 5 reference genes (80.0%; 28.6% by influence)"),
    ],
)
def test_influence_decides_and_not_the_number_of_genes(measured, level, told):
    match = match_genes(GeneTable({"index": tuple(measured)}), GeneTable({"index": tuple("ABCDE")}))
    found = next(iter(checks.genes({"file:///q.h5ad": match}, np.array([10, 1, 1, 1, 1], np.float32))))
    assert (found.level, found.message) == (level, f"{told}.")


def test_the_file_with_fewest_genes_decides(check, make_cells, write, scanvi):
    write(make_cells(), "whole")
    folder = write(make_cells()[:, :10].copy(), "poor").parent
    found = finding(check(folder, scanvi), "genes")
    assert found.level == "stop"
    assert found.message.startswith("10 of 40 reference genes")
    assert "poor.h5ad" in found.message


def ids_in_a_column(adata):
    adata.var = adata.var.assign(gene_ids=adata.var_names).set_axis([f"gene{i}" for i in range(adata.n_vars)])
    return adata


def versioned(adata):
    adata.var_names = [f"{name}.{i + 1}" for i, name in enumerate(adata.var_names)]
    return adata


def symbols(adata):
    adata = adata[:, 1:].copy()
    adata.var = adata.var.set_index("symbol")
    return adata


@pytest.mark.parametrize(
    ("change", "told", "genes"),
    [
        pytest.param(lambda adata: adata, "source 'index' with reference 'index'.", 40, id="index"),
        pytest.param(ids_in_a_column, "source 'gene_ids' with reference 'index'.", 40, id="column"),
        pytest.param(versioned, "source 'index' with reference 'index'; Ensembl versions ignored.", 40, id="versions"),
        pytest.param(
            symbols,
            "source 'index' with reference 'symbol'; 1 reference identifiers name several genes and were not matched.",
            38,
            id="symbols, one of them ambiguous",
        ),
    ],
)
def test_how_genes_were_matched_is_told(check, make_cells, scanvi, change, told, genes):
    report = check(change(make_cells()), scanvi)
    assert finding(report, "gene-ids").message == f"Matched {told}"
    assert finding(report, "genes").figures["found"] == genes
    assert report.verdict == "fit"


def test_real_cells_match_by_symbol_or_ensembl_id(check, symphony, pbmc):
    adata = anndata.read_h5ad(symphony)[:100].copy()
    adata.var = pd.DataFrame(index=adata.var["ensembl_id"].astype(str).to_numpy())
    report = check(adata, pbmc)
    assert finding(report, "gene-ids").message.startswith("Matched source 'index' with reference 'ensembl_id'")
    assert report.verdict == "fit"


# Counts


@pytest.mark.parametrize(
    ("value", "kind", "can_be_accepted"),
    [
        (np.nan, "NaN: cell 'cell7', gene 'ENSG00000000005', value nan", False),
        (np.inf, "infinite: cell 'cell7', gene 'ENSG00000000005', value inf", False),
        (-3, "negative: cell 'cell7', gene 'ENSG00000000005', value -3", False),
        (2.5, "not an integer: cell 'cell7', gene 'ENSG00000000005', value 2.5", True),
    ],
)
def test_what_is_not_a_count_is_shown(check, make_cells, scanvi, value, kind, can_be_accepted):
    report = check(with_value(make_cells(), 7, 5, value), scanvi)
    found = finding(report, "counts")
    assert found.message.startswith(f"Counts are {kind} (")
    assert "query.h5ad" in found.message
    assert "log-normalised" not in found.message
    assert found.remedy == "The reference needs raw counts: name where they are, e.g. layer=counts or layer=raw."
    assert (found.level, report.verdict, report.exit_status) == ("stop", "not fit", 1)
    if can_be_accepted:
        assert report.accept(["counts"]).verdict == "fit"
    else:
        with pytest.raises(InputError, match="cannot be overridden"):
            report.accept(["counts"])


def test_log_normalised_values_are_recognised(check, make_cells, scanvi):
    adata = make_cells()
    raw = adata.X.copy()
    found = finding(check(log_normalised(adata), scanvi), "counts")
    cell, gene = 0, int(adata.X[0].indices.min())
    shown = f"cell 'cell{cell}', gene 'ENSG{gene:011d}', value {adata.X[cell, gene]:g}"
    assert shown in found.message
    assert found.message.endswith("It looks log-normalised.")
    adata.layers["umi"] = raw
    assert check(adata, scanvi, parameters="?layer=X").verdict == "not fit"
    assert check(adata, scanvi, parameters="?layer=umi").verdict == "fit"


def test_a_fault_that_cannot_be_mapped_goes_before_one_that_can(check, make_cells, write, scanvi):
    write(with_value(make_cells(), 0, 5, 2.5), "a")
    folder = write(with_value(make_cells(), 3, 4, np.nan), "b").parent
    report = check(folder, scanvi)
    assert finding(report, "counts").message.startswith("Counts are NaN: cell 'cell3', gene 'ENSG00000000004'")
    with pytest.raises(InputError, match="cannot be overridden"):
        report.accept(["counts"])


@pytest.mark.parametrize(
    ("empty", "level", "verdict"), [(20, "warn", "fit"), (30, "warn", "fit"), (31, "stop", "not fit")]
)
def test_cells_without_counts(check, make_cells, scanvi, empty, level, verdict):
    adata = make_cells()
    dense = adata.X.toarray()
    dense[::2][:empty] = 0
    dense[1::2][: max(0, empty - 30)] = 0
    adata.X = sparse.csr_matrix(dense)
    report = check(adata, scanvi)
    found = finding(report, "empty-cells")
    assert found.message == f"{empty} of 60 sampled cells have no count in the reference's genes."
    assert found.remedy == (
        "They get a null latent and a null label."
        if level == "warn"
        else "Is it the right reference, and the right layer?"
    )
    assert (found.level, report.verdict) == (level, verdict)
    assert report.accept(["empty-cells"]).verdict == "fit"


def test_cells_without_the_reference_s_genes_have_no_counts(check, make_cells, scanvi):
    adata = make_cells()
    dense = adata.X.toarray()
    dense[:5, :30] = 0  # what they have is of genes that the reference does not know
    adata.X = sparse.csr_matrix(dense)
    adata.var_names = [*adata.var_names[:30], *(f"NOT_A_GENE_{i}" for i in range(10))]
    adata.var = adata.var.drop(columns="symbol")
    assert finding(check(adata, scanvi), "empty-cells").figures == {"empty": 5, "sampled": 60}


# Batch and covariates

CELLS = 60
UNKNOWN_TO_THE_ENCODER = [
    # finding, obs columns that differ (None: left out), message, remedy
    ("batch", {"batch": None}, "obs column 'batch' is not in file:", "--batch-key COLUMN."),
    (
        "batch",
        {"batch": [None, None, *["b0"] * 58]},
        "2 of 60 cells have no value in obs column 'batch'.",
        "Fill 'batch', or filter those cells out.",
    ),
    (
        "batch",
        {"batch": np.linspace(0, 1, CELLS)},
        "obs column 'batch' holds numbers, where categories such as 'b0' are meant.",
        "Name a categorical column: --batch-key COLUMN.",
    ),
    ("covariates", {"sex": None}, "obs column 'sex' is not in file:", "Add it to the source's obs."),
    (
        "covariates",
        {"sex": ["f", None, *["m"] * 58]},
        "1 of 60 cells have no value in obs column 'sex'.",
        "Fill 'sex', or filter those cells out.",
    ),
    (
        "covariates",
        {"sex": np.linspace(0, 1, CELLS)},
        "obs column 'sex' holds numbers, where categories such as 'f' are meant.",
        "Write 'sex' as text.",
    ),
    ("covariates", {"age": None}, "obs column 'age' is not in file:", "Add it to the source's obs."),
    (
        "covariates",
        {"age": [np.nan, np.nan, np.nan, *np.linspace(20, 80, 57)]},
        "Continuous covariate 'age' has 3 cells without a value.",
        "Give every cell a number.",
    ),
    (
        "covariates",
        {"age": ["old"] * CELLS},
        "Continuous covariate 'age' has string values.",
        "Give every cell a number.",
    ),
]


NEW_TO_THE_REFERENCE = [
    # finding, obs columns that differ, what is seen
    ("batch", {"batch": ["b9", "b8", *["b0"] * 58]}, "2 values that the reference does not know (b9, b8), in 2 cells"),
    (
        "batch",
        {"batch": [i % 2 for i in range(CELLS)]},
        "2 values that the reference does not know (0, 1), in 60 cells",
    ),
    ("covariates", {"sex": ["male", *["m"] * 59]}, "1 value that the reference does not know (male), in 1 cell"),
]


def with_columns(adata, columns):
    for name, values in columns.items():
        if values is None:
            adata.obs = adata.obs.drop(columns=name)
        else:
            adata.obs[name] = values
    return adata


def test_known_batches_and_covariates_fit_an_encoder_that_reads_them(check, make_cells, conditional):
    report = check(make_cells(), conditional)
    assert report.verdict == "fit"
    assert finding(report, "batch").message == "All 3 values of 'batch' are known to the reference."
    assert [found.message for found in findings(report, "covariates")] == [
        "All 2 values of 'sex' are known to the reference.",
        "Continuous covariate 'age' is there.",
    ]


def test_a_continuous_covariate_may_be_of_yes_and_no(check, make_cells, conditional):
    report = check(with_columns(make_cells(CELLS), {"age": np.arange(CELLS) % 2 == 0}), conditional)
    assert findings(report, "covariates")[1].message == "Continuous covariate 'age' is there."


@pytest.mark.parametrize(("name", "columns", "told", "remedy"), UNKNOWN_TO_THE_ENCODER)
def test_what_an_encoder_reads_must_be_known(check, make_cells, conditional, name, columns, told, remedy):
    report = check(with_columns(make_cells(CELLS), columns), conditional)
    (stop,) = [found for found in report.findings if found.level == "stop"]
    assert stop.name == name
    assert stop.message.startswith(told)
    assert stop.remedy.endswith(remedy)
    assert (report.verdict, report.exit_status) == ("not fit", 1)
    assert not findings(report, "surgery")
    with pytest.raises(InputError, match=rf"--accept {name}: .*It cannot be overridden\."):
        report.accept([name])


@pytest.mark.parametrize(("name", "columns", "told"), NEW_TO_THE_REFERENCE)
def test_new_values_get_adapters_unless_surgery_is_off(check, make_cells, conditional, name, columns, told):
    adata = with_columns(make_cells(CELLS), columns)
    report = check(adata, conditional)
    found = next(found for found in findings(report, name) if "does not know" in found.message)
    column = next(iter(columns))
    reads = f"obs column '{column}' has {told}, and its encoder reads them (encode_covariates=True): "
    assert found.message == f"{reads}scArches surgery fits an adapter for each."
    assert (found.level, report.verdict) == ("ok", "fit")
    off = check(adata, conditional, surgery="off")
    (stop,) = [found for found in off.findings if found.level == "stop"]
    known = {"batch": "b0, b1, b2", "sex": "f, m"}[column]
    assert stop.message == f"{reads}new ones need scArches surgery, which is switched off."
    assert stop.remedy == f"Fit them, --surgery auto, or map cells of known values only ({known})."
    assert not findings(off, "surgery")
    with pytest.raises(InputError, match=rf"--accept {name}: .*It cannot be overridden\."):
        off.accept([name])


def test_query_batches_are_counted_and_those_of_few_cells_named(check, make_cells, conditional):
    batch = [*["b9"] * 30, *["b8"] * 19, *["b0"] * 11]
    report = check(make_cells(batch=batch, sex=["f"] * 60), conditional)
    found = finding(report, "surgery")
    assert (found.level, report.verdict) == ("warn", "fit")
    assert found.message == (
        "Surgery fits adapters for 2 query batches, 49 cells (batch=b8; batch=b9). 1 of them has fewer than 20 cells"
        " (batch=b8: 19)."
    )
    assert found.figures == {"query_batches": 2, "cells": 49, "few": 1}
    enough = finding(check(make_cells(batch=[*["b9"] * 30, *["b8"] * 20, *["b0"] * 10]), conditional), "surgery")
    assert enough.level == "ok"
    assert enough.message.startswith("Surgery fits adapters for 2 query batches, 50 cells")
    together = finding(check(make_cells(batch=["b9"] * 60, sex=["x", "f"] * 30), conditional), "surgery")
    assert "(batch=b9; batch=b9, sex=x)" in together.message
    assert not findings(check(make_cells(), conditional), "surgery")


def test_a_scan_without_groups_is_checked_without_counting_query_batches(make_cells, write, conditional):
    with open_source(str(write(make_cells(batch=["b9"] * 60)))) as source:
        scan = source.scan(1000, preflight.scan_columns(conditional, Settings()))
        influence = conditional.encoder().gene_influence()
        report = preflight.check(source, scan, conditional, Settings(), influence)
    assert report.verdict == "fit"
    assert "in 60 cells" in finding(report, "batch").message
    assert not findings(report, "surgery")


def test_batches_of_the_decoder_alone_get_adapters_if_asked(check, make_cells, scanvi):
    adata = make_cells(batch=["b9"] * 60)
    plain, asked = check(adata, scanvi), check(adata, scanvi, surgery="decoder")
    assert "does not depend on the batch" in finding(plain, "batch").message
    assert not findings(plain, "surgery")
    assert finding(asked, "batch").message == (
        "obs column 'batch' has 1 value that the reference does not know (b9), in 60 cells, and its decoder reads them"
        " (--surgery decoder): scArches surgery fits an adapter for each."
    )
    assert finding(asked, "surgery").message == "Surgery fits adapters for 1 query batch, 60 cells (batch=b9)."
    for columns in ({"batch": None}, {"batch": [None, *["b9"] * 59]}):
        stopped = check(with_columns(make_cells(), columns), scanvi, surgery="decoder")
        assert findings(stopped, "batch")[0].level == "stop"
        assert not findings(stopped, "surgery")


def test_a_reference_of_one_batch_has_no_input_for_it(check, make_cells, conditional):
    one = replace(conditional, batch_categories=("b0",))
    report = check(make_cells(batch=["b9"] * 60), one)
    assert finding(report, "batch").message == (
        "The latent does not depend on the batch (the reference was trained with one batch);"
        " 'batch' has 1 values, 1 new to the reference, 0 missing."
    )
    assert report.verdict == "fit"


def test_surgery_needs_the_size_factor_that_the_reference_was_trained_with(check, make_cells, conditional):
    sized = replace(conditional, size_factor_key="depth")
    stop = finding(check(make_cells(batch=["b9"] * 60), sized), "surgery")
    assert (stop.level, stop.overridable, stop.remedy) == ("stop", False, "Add 'depth' to the source's obs.")
    assert check(make_cells(), sized).verdict == "fit"
    assert check(make_cells(batch=["b9"] * 60, depth=[1.0] * 60), sized).verdict == "fit"


@pytest.mark.parametrize("columns", [row[1] for row in (*UNKNOWN_TO_THE_ENCODER, *NEW_TO_THE_REFERENCE)])
def test_an_encoder_that_reads_no_covariates_takes_any(check, make_cells, conditional, columns):
    deaf = replace(conditional, encode_covariates=False)
    report = check(with_columns(make_cells(CELLS), columns), deaf)
    assert report.verdict == "fit"
    assert finding(report, "covariates").message == (
        "The latent does not depend on sex, age (encode_covariates=False)."
    )


@pytest.mark.parametrize(
    ("batch", "level", "told"),
    [
        (None, "ok", "; the query has no obs column 'batch'."),
        (["b0", None, *["b9"] * 58], "ok", "; 'batch' has 2 values, 1 new to the reference, 1 missing."),
        (
            [i % 2 for i in range(CELLS)],
            "warn",
            "; 'batch' has 2 values, 2 new to the reference, 0 missing, and holds numbers where categories are meant.",
        ),
    ],
)
def test_a_batch_that_moves_nothing_is_only_noted(check, make_cells, scanvi, batch, level, told):
    found = finding(check(with_columns(make_cells(CELLS), {"batch": batch}), scanvi), "batch")
    assert found.level == level
    assert found.message == f"The latent does not depend on the batch (encode_covariates=False){told}"


def test_the_query_may_name_its_batch_otherwise(check, make_cells, conditional):
    adata = make_cells()
    adata.obs = adata.obs.rename(columns={"batch": "donor"})
    assert check(adata, conditional).verdict == "not fit"
    report = check(adata, conditional, batch_key="donor")
    assert report.verdict == "fit"
    assert finding(report, "batch").message == "All 3 values of 'donor' are known to the reference."


def test_a_reference_without_batches(check, make_cells, scanvi):
    report = check(make_cells(), replace(scanvi, batch_key=""), batch_key="donor")
    assert finding(report, "batch").message == "The reference was trained without batches."


def test_a_batch_column_that_one_of_two_files_lacks(check, make_cells, write, conditional):
    write(make_cells(), "with")
    folder = write(with_columns(make_cells(), {"batch": None, "age": None}), "without").parent
    report = check(folder, conditional)
    for name, column in (("batch", "batch"), ("covariates", "age")):
        (stop,) = [found for found in findings(report, name) if found.level == "stop"]
        assert f"obs column '{column}' is not in file:" in stop.message
        assert "without.h5ad" in stop.message


def test_a_batch_column_of_numbers_in_one_of_two_files(check, make_cells, write, conditional):
    write(make_cells(), "text")
    folder = write(make_cells(batch=np.linspace(0, 1, 60)), "numbers").parent
    assert "holds numbers" in finding(check(folder, conditional), "batch").message


def test_a_batch_column_of_very_many_integers_is_an_identifier(check, make_cells, conditional, monkeypatch):
    monkeypatch.setattr(ColumnSummary, "MAX_CATEGORIES", 20)
    found = finding(check(make_cells(batch=list(range(60))), conditional), "batch")
    assert (found.level, found.message.split(",")[0]) == ("stop", "obs column 'batch' holds numbers")


# Labels


def test_the_query_s_own_labels_are_noted(check, make_cells, scanvi):
    found = finding(check(make_cells(cell_type=["zebra", *["type 0"] * 59]), scanvi), "labels")
    assert found.message == ("4 labels can come out. The query's own 'cell_type' is not used; it has others (zebra).")
    without = finding(check(with_columns(make_cells(), {"cell_type": None}), scanvi), "labels")
    assert (without.level, without.message) == ("ok", "4 labels can come out.")


def test_labels_of_a_reference_without_a_classifier(check, make_cells, conditional):
    assert "nearest labelled cells" in finding(check(make_cells(), conditional), "labels").message
    bare = finding(check(make_cells(), replace(conditional, files=())), "labels")
    assert (bare.level, bare.message) == ("warn", "The reference has no labels: every label will be null.")


# The gate


def test_nothing_selected_cannot_be_told(check, make_cells, scanvi):
    report = check(make_cells(), scanvi, parameters="?filter=batch == 'zzz'")
    assert (report.verdict, report.exit_status, report.sampled) == ("cannot tell", 3, 0)
    assert finding(report, "cells").message.startswith("The source selects no cell; 1 empty (file:")
    assert finding(report, "cells").remedy.startswith("Widen the filter")
    assert report.accept(["cells", "counts"]).verdict == "cannot tell"
    with pytest.raises(NotFitError, match="The source selects no cell"):
        report.require_fit()


def test_duplicates_are_counted(check, make_cells, scanvi):
    adata = make_cells(is_primary_data=[i < 20 for i in range(60)])
    assert finding(check(adata, scanvi), "cells").message == (
        "20 cells in 1 shard; 40 duplicates (is_primary_data is false) left out."
    )
    adata.obs["is_primary_data"] = False
    report = check(adata, scanvi)
    assert report.verdict == "cannot tell"
    assert "60 duplicates" in finding(report, "cells").message
    assert "duplicates=keep" in finding(report, "cells").remedy


@pytest.mark.parametrize(("torn", "verdict", "level"), [({40}, "fit", "warn"), ({0, 40}, "not fit", "stop")])
def test_what_cannot_be_read_is_left_to_quarantine_unless_it_is_all(
    torn, verdict, level, check, make_cells, scanvi, monkeypatch
):
    read = preflight.read_block

    def tear(shard, *rest):
        if shard.start in torn:
            raise DataError("Chunk 7 of X in cells.h5ad is damaged.", "Write the file again.")
        return read(shard, *rest)

    monkeypatch.setattr(preflight, "read_block", tear)
    report = check(make_cells(), scanvi, shard_cells=20)
    found = finding(report, "reading")
    assert (report.verdict, found.level) == (verdict, level)
    assert found.message.startswith(f"{len(torn)} of 2 sampled shards cannot be read: Chunk 7 of X in cells.h5ad")
    assert report.sampled == 40 - 20 * len(torn)


def test_an_unknown_name_cannot_be_accepted(check, make_cells, scanvi):
    with pytest.raises(InputError) as error:
        check(make_cells(), scanvi).accept(["gene"])
    assert str(error.value) == (
        "--accept gene: no check has that name. Checks: cells, reading, genes, gene-ids, proteins, peaks, counts,"
        " empty-cells, batch, sample, covariates, surgery, labels."
    )


def test_only_what_was_overridden_is_recorded(check, make_cells, scanvi):
    report = check(log_normalised(make_cells()), scanvi).accept(["batch", "counts", "genes"])
    assert report.accepted == ("counts",)
    assert finding(report, "counts").level == "accepted"
    assert finding(report, "genes").level == "ok"


def test_the_gate_names_everything_that_is_wrong(check, make_cells, conditional):
    adata = log_normalised(with_columns(make_cells(), {"batch": None, "sex": None}))[:, :10].copy()
    report = check(adata, conditional)
    with pytest.raises(NotFitError) as error:
        report.require_fit()
    assert error.value.exit_status == 1
    assert str(error.value).startswith("The query does not fit reference 'conditional'; nothing was mapped.\n")
    for found in report.findings:
        assert (f"\n  {found.name}: {found.message} {found.remedy}" in str(error.value)) == (found.level == "stop")
    assert [found.name for found in report.findings if found.level == "stop"] == [
        "genes",
        "counts",
        "batch",
        "covariates",
    ]
    assert str(error.value).endswith("\nOverride what you know better: --accept counts,genes")
    with pytest.raises(NotFitError):
        report.accept(["counts", "genes"]).require_fit()


# The sample


@pytest.mark.parametrize(
    ("shard_cells", "sampled", "last_place"),
    [
        (10_000, 1024, 2500),  # two places in one shard
        (2500, 1024, 2500),  # one in each of two
        (100, 200, 4900),  # two whole shards of fifty
    ],
)
def test_the_sample_is_bounded_and_spread_along_a_file(check, make_cells, scanvi, shard_cells, sampled, last_place):
    adata = make_cells(5000)
    report = check(adata, scanvi, shard_cells=shard_cells)
    assert report.sampled == sampled
    assert finding(report, "counts").level == "ok"
    adata = with_value(adata, last_place, 0, -1)
    found = finding(check(adata, scanvi, shard_cells=shard_cells, sample=160), "counts")
    assert f"cell 'cell{last_place}'" in found.message


def test_the_sample_looks_into_every_file(check, make_cells, write, scanvi):
    for i in range(19):
        write(make_cells(10, i), f"{i:02}")
    folder = write(with_value(make_cells(10), 0, 0, -1), "19").parent
    report = check(folder, scanvi, sample=40)
    assert report.sampled == 40
    assert "19.h5ad" in finding(report, "counts").message


def shards(files, each, cells=100):
    return [
        Shard(f"file:///{f:03}.h5ad", "", "", "", "", i * cells, (i + 1) * cells, cells, "")
        for f in range(files)
        for i in range(each)
    ]


@pytest.mark.parametrize(
    ("files", "each", "cells"),
    [(1, 1, 1024), (1, 40, 1024), (3, 7, 1024), (20, 1, 40), (64, 2, 1000), (65, 1, 650), (500, 2, 1024), (1, 40, 5)],
)
def test_the_sample_s_bounds(files, each, cells):
    sample = preflight._sample(shards(files, each), cells)
    taken = {shard.uri for shard, _ in sample}
    assert len(taken) == min(files, preflight.SAMPLE_FILES)
    assert {"file:///000.h5ad", f"file:///{files - 1:03}.h5ad"} <= taken
    assert sum(limit for _, limit in sample) <= cells
    assert min(limit for _, limit in sample) >= 1
    assert len(sample) <= max(*preflight.SAMPLE_PLACES, len(taken))
    looked = [row for shard, limit in sample for row in range(shard.start, min(shard.start + limit, shard.stop))]
    if files == 1:
        assert len(looked) == len(set(looked))
        assert max(looked) >= each * 100 // 2


@pytest.mark.parametrize(("cells", "places"), [(100_000, 2), (300_000, 3), (50_000_000, 8)])
def test_more_cells_are_looked_at_in_more_places(cells, places):
    sample = preflight._sample(shards(1, 50, cells // 50), 1024)
    assert len(sample) == places
    assert sum(limit for _, limit in sample) <= 1024


@pytest.mark.parametrize("value", [np.nan, np.inf, -3, 2.5])
def test_what_the_sample_missed_stops_the_mapping(check, make_cells, write, scan, scanvi, value):
    path = write(with_value(make_cells(600), 599, 5, value))
    assert check(path, scanvi, sample=16).verdict == "fit"
    (shard,) = scan(path).shards
    block = read_block(shard, scanvi, model_columns(scanvi, Settings()))
    with pytest.raises(DataError) as error:
        Mapper(scanvi, Settings()).map(block)
    told = f"Cell 'cell599' of dataset 'query' has {value:g} of gene 'ENSG00000000005', which is not a count."
    assert error.value.problem == told
    assert "e.g. layer=counts or layer=raw." in error.value.remedy
    lenient = Mapper(scanvi, Settings(), fractional=True)
    if value == 2.5:
        assert error.value.remedy.endswith("let them through: --accept counts.")
        assert lenient.map(block).mapped.all()
    else:
        assert "--accept" not in error.value.remedy
        with pytest.raises(DataError, match="which is not a count"):
            lenient.map(block)
