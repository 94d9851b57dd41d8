"""Latents in a repository: what is left out of them, and which are left aside when they come back."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scviaduct.references.building import build_package
from scviaduct.references.latents import Statistics
from scviaduct.references.package import LATENTS, STATISTICS
from scviaduct.references.publishing.carried import bring_cells
from scviaduct.references.publishing.repository import Options, write_repository
from scviaduct.references.template import SYNTHETIC, read_template


@pytest.fixture
def labelled(train_and_save, cells, tmp_path):
    """Make a package whose cells are labelled by names."""
    train_scvi, save = train_and_save

    def make(*names):
        own = cells.copy()
        folder = save(train_scvi(own), tmp_path / "saved", data=False)
        own.obs["kind"] = [names[i % len(names)] for i in range(own.n_obs)]
        return build_package(
            folder, tmp_path / "package", "package", own, {"recipe": {"labels_key": "kind"}}, None, "kind"
        )

    return make


def test_labels_go_along_and_names_of_cells_do_not(labelled, tmp_path):
    reference = labelled("T cell", None, "P12")

    contents = write_repository(reference, "lab/x", tmp_path / "out", Options())

    table = pq.read_table(tmp_path / "out" / LATENTS)
    assert table["label"].to_pylist() == reference.latents().labels
    assert table["observation_id"].to_pylist() == [str(i) for i in range(len(table))]
    assert b"cell-1" not in (tmp_path / "out" / LATENTS).read_bytes()
    assert any("names of the cells" in one for one in contents.refused)
    write_repository(reference, "lab/x", tmp_path / "ids", Options(with_ids=True))
    assert pq.read_table(tmp_path / "ids" / LATENTS)["observation_id"].to_pylist()[1] == "cell-1"


def test_labels_that_look_like_people_stay_here(labelled, tmp_path):
    reference = labelled("jo@clinic.org", "T cell")

    contents = write_repository(reference, "lab/x", tmp_path / "out", Options())

    assert "labels of the cells (--allow-column kind publishes them)" in contents.refused
    assert set(pq.read_table(tmp_path / "out" / LATENTS)["label"].to_pylist()) == {None}
    assert Statistics.read(tmp_path / "out" / STATISTICS).labels == ()
    assert not [path.name for path in (tmp_path / "out").iterdir() if b"clinic" in path.read_bytes()]
    again = build_package(tmp_path / "out", tmp_path / "again", "again")
    assert "The reference has no labels: cells are mapped with a null label." in again.notes

    write_repository(reference, "lab/x", tmp_path / "allowed", Options(allow_columns=("kind",)))
    assert pq.read_table(tmp_path / "allowed" / LATENTS)["label"].to_pylist() == reference.latents().labels


def test_synthetic_cells_alone_give_no_latents_and_no_labels(labelled, tmp_path):
    reference = labelled("T cell")
    write_repository(reference, "lab/x", tmp_path / "out", Options())
    (tmp_path / "out" / LATENTS).unlink()

    again = build_package(tmp_path / "out", tmp_path / "again", "again")

    assert not again.has_latents
    assert again.notes == (
        "Its data are synthetic cells, so the package has no latents of its own.",
        "The reference has no labels: cells are mapped with a null label.",
    )


def narrower(path):
    table = pq.read_table(path)
    latent = pa.array([row[:-1] for row in table["latent"].to_pylist()], pa.list_(pa.float32()))
    pq.write_table(table.set_column(1, "latent", latent), path)


def ragged(path):
    table = pq.read_table(path)
    rows = table["latent"].to_pylist()
    rows[0], rows[1] = rows[0] + rows[1][:1], rows[1][1:]
    pq.write_table(table.set_column(1, "latent", pa.array(rows, pa.list_(pa.float32()))), path)


def endless(path):
    table = pq.read_table(path)
    rows = table["latent"].to_pylist()
    rows[0][0] = float("nan")
    pq.write_table(table.set_column(1, "latent", pa.array(rows, pa.list_(pa.float32()))), path)


def moved(path):
    sums = Statistics.read(path.with_name(STATISTICS))
    replace(sums, all_mean=sums.all_mean + np.float32(1)).write(path.with_name(STATISTICS))


def of_other_features(path):
    sums = Statistics.read(path.with_name(STATISTICS))
    replace(sums, influence=sums.influence[1:].copy()).write(path.with_name(STATISTICS))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda path: path.write_bytes(b"PAR1 nothing"), "cannot be read"),
        (lambda path: path.with_name(STATISTICS).unlink(), "cannot be read"),
        (narrower, "3 dimensions and the model 4"),
        (ragged, "differ in length"),
        (endless, "finite"),
        (moved, "does not sum it up"),
        (of_other_features, "of 39 features and the model of 40"),
    ],
)
def test_latents_that_are_not_the_models_are_left_aside(labelled, tmp_path, damage, told):
    reference = labelled("T cell", "B cell")
    write_repository(reference, "lab/x", tmp_path / "out", Options())
    damage(tmp_path / "out" / LATENTS)

    again = build_package(tmp_path / "out", tmp_path / "again", "again")

    assert not again.has_latents
    assert told in again.notes[0]
    assert again.notes[1].startswith("Its data are synthetic cells")


def test_cells_with_counts_are_encoded(labelled, tmp_path):
    reference = labelled("T cell", "B cell")
    (tmp_path / "out").mkdir()
    data = read_template(reference.path)
    for name in (LATENTS, STATISTICS):
        shutil.copyfile(reference.path / name, tmp_path / name)

    data.uns.pop(SYNTHETIC, None)
    assert not bring_cells(tmp_path, tmp_path / "out", data, reference).taken
    data.uns["_scvi_adata_minify_type"] = "latent_posterior_parameters"
    assert "cells and the data" in bring_cells(tmp_path, tmp_path / "out", data, reference).notes[0]
    data.uns[SYNTHETIC] = True
    assert bring_cells(tmp_path, tmp_path / "out", data, reference).taken
