"""Ids of units and runs: the same work has the same id anywhere, and different work another."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from scviaduct.errors import InputError, SourceError
from scviaduct.mapping.planning import kept_types, make_plan
from scviaduct.references.package import Reference
from scviaduct.sources import open_source
from scviaduct.values import ColumnSummary, GeneTable, Scan, Settings

REFERENCE = Reference(
    path=Path("nowhere"),
    name="pbmc",
    digest="d" * 32,
    family="SCANVI",
    scvi_version="1.5.1",
    genes=GeneTable({"index": ("A",)}),
    n_latent=10,
    encode_covariates=False,
)
SETTINGS = Settings({"tissue": "string", "age": "double"}, 1.0, "donor", neighbors=15)


def plan_of(uri, reference=REFERENCE, settings=SETTINGS, accepted=(), shard_cells=25):
    with open_source(str(uri)) as source:
        return make_plan(source, source.scan(shard_cells), reference, settings, accepted)


def ids(plan):
    return [unit.id for unit in plan.units]


def test_a_plan_holds_what_it_was_made_of(write, make_cells):
    path = write(make_cells())
    plan = plan_of(path, accepted=("genes", "counts"))
    assert [unit.shard.cells for unit in plan.units] == [25, 25, 10]
    assert plan.cells == 60
    assert (plan.reference, plan.reference_digest, plan.settings) == ("pbmc", "d" * 32, SETTINGS)
    assert plan.source.startswith(path.as_uri())
    assert plan.version in plan.source
    assert plan.accepted == ("counts", "genes")
    assert len(plan.run) == 16
    assert len(set(ids(plan))) == 3


def test_the_same_command_is_the_same_run(write, make_cells):
    path = write(make_cells())
    assert plan_of(path, accepted=["genes", "counts"]) == plan_of(path, accepted=["counts", "genes"])


def test_the_same_command_is_the_same_run_in_another_process(write, make_cells):
    path = write(make_cells())
    plan = plan_of(path)
    program = f"""
import sys
from pathlib import Path
from scviaduct.mapping.planning import make_plan
from scviaduct.references.package import Reference
from scviaduct.sources import open_source
from scviaduct.values import GeneTable, Settings

genes = GeneTable({{"index": ("A",)}})
told = {{"family": "SCANVI", "scvi_version": "1.5.1", "genes": genes, "n_latent": 10, "encode_covariates": False}}
reference = Reference(path=Path("elsewhere"), name="pbmc", digest="{REFERENCE.digest}", **told)
settings = Settings({{"age": "double", "tissue": "string"}}, 1.0, "donor", neighbors=15)
with open_source(sys.argv[1]) as source:
    plan = make_plan(source, source.scan(25), reference, settings)
print(plan.run, *(unit.id for unit in plan.units))
"""
    told = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    assert told.stdout.split() == [plan.run, *ids(plan)]


@pytest.mark.parametrize(
    "changed",
    [
        replace(SETTINGS, keep_obs={"tissue": "string"}),
        replace(SETTINGS, keep_obs={"tissue": "string", "age": "string"}),
        replace(SETTINGS, ambiguous_entropy=0.9),
        replace(SETTINGS, batch_key=""),
        replace(SETTINGS, sample_key="donor"),
        replace(SETTINGS, neighbors=14),
    ],
)
def test_any_setting_makes_other_units(write, make_cells, changed):
    path = write(make_cells())
    plan, other = plan_of(path), plan_of(path, settings=changed)
    assert plan.run != other.run
    assert not set(ids(plan)) & set(ids(other))


def test_every_field_of_the_settings_is_tried():
    assert list(Settings.__slots__) == ["keep_obs", "ambiguous_entropy", "batch_key", "sample_key", "neighbors"]


def test_another_reference_makes_other_units_and_another_name_does_not(write, make_cells):
    path = write(make_cells())
    plan = plan_of(path)
    other = plan_of(path, replace(REFERENCE, digest="e" * 32))
    assert plan.run != other.run
    assert not set(ids(plan)) & set(ids(other))
    renamed = plan_of(path, replace(REFERENCE, name="blood", path=Path("moved")))
    assert (renamed.run, ids(renamed)) == (plan.run, ids(plan))


def test_other_content_makes_other_units(write, make_cells):
    path = write(make_cells())
    plan = plan_of(path)
    write(make_cells(seed=2))
    other = plan_of(path)
    assert plan.run != other.run
    assert not set(ids(plan)) & set(ids(other))


def test_other_layers_and_cells_make_other_units(write, make_cells):
    adata = make_cells()
    adata.layers["counts"] = adata.X.copy()
    path = write(adata)
    plans = [plan_of(f"{path}{parameters}") for parameters in ("", "?layer=counts", "?filter=batch != 'b0'")]
    assert len({unit for plan in plans for unit in ids(plan)}) == sum(len(plan.units) for plan in plans)
    assert len({plan.run for plan in plans}) == 3


def test_other_cuts_share_the_units_that_are_cut_alike(write, make_cells):
    path = write(make_cells())
    plan, other = plan_of(path, shard_cells=25), plan_of(path, shard_cells=50)
    assert plan.run != other.run
    assert set(ids(plan)) & set(ids(other)) == {ids(plan)[-1]}


def test_what_was_accepted_is_another_run_over_the_same_units(write, make_cells):
    path = write(make_cells())
    plan, other = plan_of(path), plan_of(path, accepted=("counts",))
    assert plan.run != other.run
    assert ids(plan) == ids(other)


def test_a_moved_file_is_not_mapped_again(write, make_cells, tmp_path):
    path = write(make_cells())
    plan = plan_of(path)
    moved = tmp_path / "elsewhere" / path.name
    moved.parent.mkdir()
    shutil.move(path, moved)
    other = plan_of(moved)
    assert other.run != plan.run
    assert ids(other) == ids(plan)


def test_two_files_with_the_same_cells_are_refused(write, make_cells):
    adata = make_cells(study=["study 1"] * 60)
    write(adata, "a")
    folder = write(adata, "b").parent
    assert len(plan_of(folder).units) == 6  # each file is a dataset of its own
    with pytest.raises(SourceError, match=r"a\.h5ad.*b\.h5ad") as error:
        plan_of(f"{folder}?dataset=study")
    assert error.value.problem.startswith("Two files hold the same cells of dataset 'study 1': file://")
    assert error.value.remedy == "Remove one of them from the source."


def test_types_of_kept_columns(write, make_cells):
    path = write(make_cells())
    columns = ["age", "lane", "fresh", "batch"]
    with open_source(str(path)) as source:
        found = kept_types(source.scan(100, columns), columns, source.obs_columns())
    assert found == {"age": "double", "lane": "int64", "fresh": "bool", "batch": "string"}
    assert list(found) == columns


@pytest.mark.parametrize(
    ("column", "there"),
    [("cell_typ", "cell_type"), ("BATCHES", "age, batch, cell_type, fresh, lane, sex"), ("batches", "batch")],
)
def test_a_missing_column_is_named_with_those_that_are_close(write, make_cells, column, there):
    path = write(make_cells())
    with open_source(str(path)) as source, pytest.raises(InputError) as error:
        kept_types(source.scan(100, ["age", column]), ["age", column], source.obs_columns())
    assert error.value.problem == f"obs column '{column}' is not in {path.as_uri()} (there are: {there})."
    assert error.value.remedy == "Name existing columns: --keep-obs tissue,disease."


def test_a_column_that_one_file_lacks():
    scan = Scan((), 0, columns={"age": ColumnSummary("double", {})}, missing={"age": "file:///b.h5ad"})
    with pytest.raises(InputError, match=r"obs column 'age' is not in file:///b\.h5ad"):
        kept_types(scan, ["age"], ["age", "sex"])
