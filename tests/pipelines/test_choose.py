"""``scviaduct choose`` as a user meets it: tables, JSON, the tree, exit statuses, and commands that can be run."""

from __future__ import annotations

import json
import shlex

import anndata
import pytest
from typer.main import get_command
from typer.testing import CliRunner

from pipelines import cli as command_line
from pipelines.choosing import choose

RUNNER = CliRunner()


@pytest.fixture
def call(monkeypatch):
    """Run ``choose`` in this process; its exit status, output and error output."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        return RUNNER.invoke(command_line.app, ["choose", *map(str, arguments)])

    return run


@pytest.fixture
def none_registered(monkeypatch, tmp_path):
    monkeypatch.setenv("SCVIADUCT_HOME", str(tmp_path / "home"))


def test_a_family_with_its_reasons(call, none_registered, symphony):
    done = call(symphony)
    assert done.exit_code == 0
    assert "Train SCANVI. SCANVI models RNA with labels" in done.stdout
    assert "'cell_type' has 9 labels on 100.0% of the cells" in done.stdout
    command = (
        f"scviaduct train {symphony} --family scanvi --labels-key cell_type --batch-key batch"
        " --out pbmc_10x_3tech_symphony-scanvi"
    )
    assert f"\n  {command}\n" in done.stdout  # in one line, whatever the width of the terminal
    assert "\nOr SCVI, to keep labels out of the latent:\n  scviaduct train" in done.stdout


def test_the_whole_tree(call, none_registered, symphony):
    lines = call(symphony, "--explain").stdout.splitlines()
    taken = [line for line in lines if line.startswith(">")]
    assert taken[-1].strip("> ") == "yes: train SCANVI: models RNA with labels, and labels what is mapped."
    assert any("train MULTIVI" in line and not line.startswith(">") for line in lines)


def test_as_json(call, none_registered, symphony):
    told = json.loads(call(symphony, "--json", "--explain").stdout)
    assert (told["kind"], told["name"], told["exit_status"]) == ("family", "SCANVI", 0)
    assert told["steps"][-1]["node"] == "labels"
    assert {item["name"]: item["figures"] for item in told["properties"]}["batch"]["batches"] == 3
    assert len(told["tree"]) > len(told["steps"])


def test_no_family_for_an_aim(call, none_registered, symphony):
    done = call(symphony, "--aim", "compare-samples")
    assert done.exit_code == 1
    assert "Nothing fits. No column of obs is called as samples or donors usually are" in done.stdout


def test_an_aim_that_there_is_not(call, symphony):
    done = call(symphony, "--aim", "map-all")
    assert done.exit_code == 2
    assert "--aim map-all: there is no such aim. One of map, integrate" in done.stderr


@pytest.fixture(scope="module")
def blood(shared_data, symphony, tmp_path_factory):
    """A home with one reference, ``blood``: an SCVI of the 3' cells in genes that the 1k v3 set has too.

    It is hardly trained, because only its genes matter here.
    """
    import scvi

    from pipelines import reference
    from scviaduct.families.vae import quiet

    folder = tmp_path_factory.mktemp("choose")
    cells = anndata.read_h5ad(symphony)
    both = cells.var_names.isin(anndata.read_h5ad(shared_data / "pbmc1k_10xv3_scwg.h5ad").var_names)
    cells = cells[(cells.obs["batch"] != "5p").to_numpy(), both].copy()
    with quiet():
        scvi.settings.seed = 0
        scvi.model.SCVI.setup_anndata(cells, batch_key="batch")
        model = scvi.model.SCVI(cells, n_hidden=32)
        model.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False, logger=False)
        model.save(str(folder / "saved"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCVIADUCT_HOME", str(folder / "home"))
        reference.add(folder / "saved", name="blood")
        yield folder / "home"


def test_a_registered_reference_that_fits(call, blood, symphony):
    five_prime = f"{symphony}?filter=batch == '5p'"
    done = call(five_prime)
    assert "Map to blood. Reference 'blood' (SCVI) fits: 100.0% of its 1,261 genes found" in done.stdout
    assert choose(five_prime, aim="integrate").name == "SCANVI"


def test_a_registered_reference_of_an_unlabelled_query(blood, shared_data):
    choice = choose(str(shared_data / "pbmc1k_10xv3_scwg.h5ad"))
    assert (choice.kind, choice.name) == ("reference", "blood")


def test_a_registered_reference_whose_genes_are_missing(blood, shared_data):
    choice = choose(str(shared_data / "perturb_thp1_eccite_sceptre.h5ad"))
    assert choice.name == "ContrastiveVI"
    (step,) = [step for step in choice.steps if step.node == "fitting"]
    assert (step.answer, "best of 1: blood (SCVI): " in step.figure) == ("no", True)


def test_a_damaged_reference_is_named(call, blood, shared_data):
    torn = blood / "references" / "torn"
    torn.mkdir()
    (torn / "manifest.json").write_text('{"format": 1}')
    told = json.loads(call(shared_data / "pbmc1k_10xv3_scwg.h5ad", "--json").stdout)
    assert told["name"] == "blood"
    assert "'torn' cannot be read: " in told["properties"][-1]["found"]


@pytest.mark.parametrize(
    ("file", "aim"),
    [
        ("pbmc_10x_3tech_symphony.h5ad", "map"),
        ("perturb_thp1_eccite_sceptre.h5ad", "perturbation"),
        ("pancreas_2study_cepo.h5ad", "compare-samples"),
        ("citeseq_pbmc5k_scvitests.h5ad", "integrate"),
    ],
)
def test_what_is_printed_can_be_typed(none_registered, shared_data, file, aim):
    choice = choose(str(shared_data / file), aim=aim)
    commands = get_command(command_line.app).commands
    for line in (*choice.commands, *(other.command for other in choice.alternatives)):
        _, name, *arguments = shlex.split(line)
        command = commands[name]
        if name == "reference":
            command, arguments = command.commands[arguments[0]], arguments[1:]
        given = command.make_context(name, arguments).params  # an unknown option would end it
        assert name == "reference" or given["source"].startswith(str(shared_data / file))
