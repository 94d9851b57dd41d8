"""What is not published by accident: donors, names of cells, columns, counts, paths and tokens."""

from __future__ import annotations

import shutil

import anndata
import numpy as np
import pytest
from scvi.hub import HubModel

from scviaduct.errors import InputError, PackageError, SourceError
from scviaduct.families.vae import quiet
from scviaduct.references.building import build_package
from scviaduct.references.publishing.origin import origin_of
from scviaduct.references.publishing.privacy import require_clean, suspicion
from scviaduct.references.publishing.repository import Options, write_repository
from tests.scviaduct.references.saved.seven import save_small

TOKEN = "hf_" + "AbcdefGhijkLmnopQrst" * 2


@pytest.fixture
def out(tmp_path):
    return tmp_path / "repository"


def written(reference, out, **options):
    return write_repository(reference, "lab/mini", out, Options(**options))


@pytest.mark.parametrize(
    ("column", "values", "told"),
    [
        ("donor", ["a"], "donors"),
        ("DonorID", ["a"], "donors"),
        ("patient_no", ["a"], "donors"),
        ("individual", ["a"], "donors"),
        ("subjects", ["a"], "donors"),
        ("sample_id", ["a"], "samples"),
        ("SampleName", ["a"], "samples"),
        ("orig.ident", ["a"], "samples"),
        ("age", ["40"], "of a person"),
        ("batch", ["run", "Patient-7"], "a donor's name"),
        ("batch", ["run", "P12"], "a donor's name"),
        ("batch", ["run", "jo@clinic.org"], "an e-mail address"),
        ("batch", ["Miller, Anna"], "a person's name"),
        ("batch", ["lane 2 2019-05-03"], "a date"),
        ("batch", ["03.05.2019"], "a date"),
        ("batch", ["19520317"], "a number"),
    ],
)
def test_columns_of_donors_are_suspected(column, values, told):
    reason, value = suspicion(column, values)

    assert told in reason
    assert value == values[-1]


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("batch", ["b1", "3pv2", "GSM1234567", "10x 3' v3", "Fluidigm C1", "2019", "rep_1"]),
        ("assay", ["sampled by hand"]),
        ("stage", ["E14.5"]),
        ("n_genes", []),
        ("batch", []),
    ],
)
def test_other_columns_are_not(column, values):
    assert suspicion(column, values) is None


def test_cell_types_may_be_called_as_donors_are():
    assert suspicion("cell_type", ["P12", "D1"], labels=True) is None
    assert suspicion("cell_type", ["jo@clinic.org"], labels=True) is not None


def test_a_model_of_donors_is_refused_unless_it_is_allowed(tmp_path, out):
    save_small("MRVI", tmp_path / "saved")
    reference = build_package(tmp_path / "saved", tmp_path / "mrvi", "mrvi")

    with pytest.raises(InputError, match=r"obs column 'donor' .* 4 values, e.g. '1'.*--allow-column donor"):
        written(reference, out)
    assert not out.exists()

    contents = written(reference, out, allow_columns=("donor",))
    card = (out / "README.md").read_text()
    assert "donor" in contents.columns
    assert "Donors or samples (`donor`): 4\n" in card


def test_values_of_a_batch_are_looked_at(minified, out):
    reference = minified(batch=["Patient 1" if i % 2 else "Patient 2" for i in range(90)])

    with pytest.raises(InputError, match=r"'batch' .*e.g. 'Patient 1'.*a donor's name.*--allow-column batch"):
        written(reference, out)


def test_numbers_of_people_are_refused_only_where_cells_carry_them(minified, tmp_path, out):
    reference = minified(setup={"continuous_covariate_keys": ["age"]})

    with pytest.raises(InputError, match=r"'age' and its cells hold the values.*--allow-column age"):
        written(reference, out)

    (reference.path / "minified.h5ad").unlink()
    bare = build_package(tmp_path / "mini-saved", tmp_path / "bare", "bare")
    assert written(bare, out).data == "template"


def test_an_unknown_column_cannot_be_allowed(minified, out):
    with pytest.raises(InputError, match=r"--allow-column donr.*There are: donor"):
        written(minified(), out, allow_columns=("donr",))


def test_columns_and_names_of_cells_stay_here(minified, out):
    contents = written(minified(), out)

    data = anndata.read_h5ad(out / "adata.h5ad")
    assert sorted(data.obs) == ["batch", "observed_lib_size"]
    assert list(data.obs_names) == [str(i) for i in range(90)]
    assert (sorted(data.obsm), list(data.uns)) == (
        ["scvi_latent_qzm", "scvi_latent_qzv"],
        ["_scvi_adata_minify_type"],
    )
    assert not data.layers
    assert data.raw is None
    told = " ".join(contents.refused)
    assert all(f"'{column}'" in told for column in ("cell_type", "donor", "age"))
    assert "names of the cells" in told
    held = (out / "adata.h5ad").read_bytes() + (out / "model.pt").read_bytes() + (out / "README.md").read_bytes()
    assert [word for word in (b"cell-1", b"donor", b"cell_type") if word in held] == []


def test_what_is_allowed_is_published(minified, out):
    contents = written(minified(), out, with_ids=True, allow_columns=("donor",))

    data = anndata.read_h5ad(out / "adata.h5ad")
    assert list(data.obs_names[:2]) == ["cell-0", "cell-1"]
    assert {"donor"} <= {*data.obs}
    assert not any("names of the cells" in one or "'donor'" in one for one in contents.refused)


def test_counts_stay_here_unless_asked_for(minified, cells, tmp_path, out):
    reference = minified(counts=True)

    contents = written(reference, out)
    assert contents.data == "minified"
    assert any(one.startswith("counts") for one in contents.refused)
    data = anndata.read_h5ad(out / "adata.h5ad")
    assert data.X.nnz == 0
    assert not data.layers

    more = tmp_path / "with-counts"
    assert written(reference, more, with_counts=True).data == "minified with counts"
    np.testing.assert_array_equal(anndata.read_h5ad(more / "adata.h5ad").X.toarray(), cells.X.toarray())
    with quiet():
        model = HubModel(str(more)).model
    assert model.minified_data_type == "latent_posterior_parameters_with_counts"


def test_counts_that_are_not_there_cannot_be_published(minified, out):
    with pytest.raises(InputError, match=r"--with-counts: package 'mini' has no counts\. .*train with --with-counts"):
        written(minified(), out, with_counts=True)


def test_a_layer_that_the_model_reads_is_emptied(minified, tmp_path, out):
    reference = minified(counts=True, setup={"layer": "counts"})

    written(reference, out)
    assert anndata.read_h5ad(out / "adata.h5ad").layers["counts"].nnz == 0

    more = tmp_path / "with-counts"
    written(reference, more, with_counts=True)
    assert anndata.read_h5ad(more / "adata.h5ad").layers["counts"].nnz > 0


def test_proteins_are_counts(made, out):
    import mudata

    written(made("TOTALVI").reference, out)

    with quiet():
        data = mudata.read_h5mu(out / "mdata.h5mu")
    assert all(part.X.nnz == 0 for part in data.mod.values())
    assert all(list(part.obs_names[:2]) == ["0", "1"] for part in data.mod.values())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"use {TOKEN}", "token"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "private key"),
        ("trained on /home/anna/cells.h5ad", "/home/anna/cells.h5ad"),
        ("see file:///srv/cells", "file:///srv/cells"),
        ("in C:\\Users\\anna", "Users"),
    ],
)
def test_paths_and_tokens_are_refused(minified, out, text, told):
    with pytest.raises(InputError, match="nothing was published") as caught:
        written(minified(), out, description=text)

    assert told in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_addresses_on_the_web_are_no_paths():
    require_clean({"card": "https://example.org/data/x and hf://lab/home/x, a/b, obs/mnt"})


def test_a_path_among_the_models_attributes_is_refused(train_and_save, cells, tmp_path, out):
    train_scvi, save = train_and_save
    model = train_scvi(cells.copy())
    model.trained_on_ = "/home/anna/cells.h5ad"
    reference = build_package(save(model, tmp_path / "saved"), tmp_path / "package", "package")

    with pytest.raises(InputError, match=r"The model would hold '/home/anna/cells\.h5ad'"):
        written(reference, out)


@pytest.mark.parametrize(
    ("provenance", "told"),
    [
        ({"source": "file:///home/anna/smith.h5ad?layer=counts", "source_version": "abc123"}, "version `abc123`"),
        ({"source": "s3://clinic-bucket/smith.h5ad"}, "an object store (S3)"),
        ({"source": "soma:https://node7.clinic.local/smith"}, "a web server that is not public"),
        ({"source": "soma:http://10.0.0.7/smith"}, "a web server that is not public"),
        ({"source": "https://me:pw@example.org/a.h5ad?token=secret"}, "<https://example.org/a.h5ad>"),
        ({"source": "census:2025-11-08?organism=homo_sapiens"}, "`census:2025-11-08?organism=homo_sapiens`"),
        ({"source": "census:2025-11-08?uri=file:///mnt/census"}, "files that are not public"),
        ({"kind": "hub", "repository": "lab/x", "commit": "0" * 40, "uri": "hf://lab/x"}, "hf://lab/x@" + "0" * 40),
        (
            {
                "kind": "hub",
                "repository": "clinic/smith",
                "commit": "0" * 40,
                "private": True,
                "uri": "hf://clinic/smith",
            },
            "a model on the hub that is not public",
        ),
        ({"folder": "/home/anna/model"}, "files that are not public"),
        ({}, "not recorded"),
    ],
)
def test_the_origin_names_nothing_private(provenance, told):
    text = origin_of(provenance)

    assert told in text
    assert not any(word in text for word in ("anna", "smith", "clinic", "10.0.0.7", "token", "pw", "mnt"))


@pytest.mark.parametrize("url", ["ftp://x.org/a", "file:///a", "https://intranet/a", "not a url"])
def test_a_data_url_is_an_address_on_the_web(minified, out, url):
    with pytest.raises(InputError, match=r"--data-url .*E\.g\. --data-url https://"):
        written(minified(), out, data_url=url)


def test_a_data_url_carries_no_secret(minified, out):
    with pytest.raises(SourceError, match="token"):
        written(minified(), out, data_url="https://example.org/a?token=abc")


def test_the_folder_must_be_new(minified, out):
    out.mkdir()
    (out / "old").touch()
    with pytest.raises(InputError, match=r"not empty.*--out"):
        written(minified(), out)


def test_a_changed_package_is_refused(minified, out):
    reference = minified()
    shutil.copyfile(reference.path / "template.h5ad", reference.path / "minified.h5ad")
    with pytest.raises(PackageError, match="digest"):
        written(reference, out)
