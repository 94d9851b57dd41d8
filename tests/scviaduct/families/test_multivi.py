"""MULTIVI's latents equal scvi-tools' own: on real multiome cells, with modalities apart, and over its configurations.

Tolerance: max |difference| / sd <= 1e-5. Both sum the same float32 products, in another order; that leaves 1e-6 of a
latent's standard deviation, and two seeds of a training differ by 1e-1.
"""

from __future__ import annotations

from dataclasses import replace

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from anndata.io import read_elem
from mudata import MuData
from scipy import sparse

from scviaduct.errors import InputError, UnsupportedModelError
from scviaduct.families import MODALITY, Recipe, family
from scviaduct.families.vae import quiet
from scviaduct.references.saved.archive import SavedModel, read_model_file
from scviaduct.references.template import encode_cells, make_template

TOLERANCE = 1e-5
FAMILY = family("multivi")
SIZES = {"rna": 25, "atac": 40, "protein": 7}
ALL = tuple(SIZES)
EVERYTHING = {"batch_key": "batch", "categorical_covariates": ("donor", "same"), "continuous_covariates": ("age",)}
ENCODED = {"encode_covariates": True}

# Name: modalities, of the recipe, arguments of the model, whether the encoders read covariates.
MODELS = {
    "genes and peaks": (("rna", "atac"), {"batch_key": "batch"}, {}, False),
    "all three": (ALL, {"batch_key": "batch"}, {}, False),
    "genes and proteins": (("rna", "protein"), {"batch_key": "batch"}, {}, False),
    "genes alone": (("rna",), {"batch_key": "batch"}, {}, False),
    "peaks alone": (("atac",), {"batch_key": "batch"}, ENCODED, True),
    "learnt weights": (ALL, {}, {"modality_weights": "universal", "modality_penalty": "MMD"}, False),
    "no batches": (ALL, {}, ENCODED, False),
    "not encoded": (ALL, EVERYTHING, {}, False),
    "everything": (ALL, EVERYTHING, ENCODED, True),
    "everything, deeply": (ALL, EVERYTHING, ENCODED | {"deeply_inject_covariates": True, "n_layers_encoder": 3}, True),
    "batch norm": (ALL, {"batch_key": "batch"}, {"use_layer_norm": "none", "use_batch_norm": "both"}, False),
    "both norms": (ALL, {"batch_key": "batch"}, {"use_batch_norm": "encoder", "n_layers_encoder": 1}, False),
    "no norm": (("rna", "atac"), {}, {"use_layer_norm": "none", "region_factors": False}, False),
    "dispersion": (("rna", "atac"), {"batch_key": "batch"}, {"dispersion": "gene-batch"}, False),
}


def flat(parts):
    """Flat cells of modalities: canonical name to names and counts."""
    rng = np.random.default_rng(0)
    n_cells = next(iter(parts.values()))[1].shape[0]
    made = {"batch": rng.choice(["a", "b"], n_cells), "donor": rng.choice(["x", "y", "z"], n_cells), "same": "one"}
    made |= {"age": rng.normal(size=n_cells), "rna_size": rng.uniform(0.5, 2, n_cells), "atac_size": 0.5}
    modality = [name for name, (names, _) in parts.items() for _ in names]
    var = pd.DataFrame({MODALITY: modality}, index=[str(one) for names, _ in parts.values() for one in names])
    counts = sparse.hstack([sparse.csr_matrix(one) for _, one in parts.values()], format="csr", dtype=np.float32)
    return anndata.AnnData(counts, obs=pd.DataFrame(made, index=[f"c{i}" for i in range(n_cells)]), var=var)


def only(cells, modalities):
    return cells[:, cells.var[MODALITY].isin(modalities)].copy()


def without(cells, modality, rows):
    """The cells, some of which were not measured in a modality."""
    counts = cells.X.toarray()
    counts[np.ix_(rows, np.flatnonzero(cells.var[MODALITY] == modality))] = 0
    copy = cells.copy()
    copy.X = sparse.csr_matrix(counts)
    return copy


def stir(module):
    """Norms that are not at their initial values, and weights that tell cells apart as a trained model's do."""
    torch.manual_seed(0)
    for part in module.eval().modules():
        if isinstance(part, torch.nn.BatchNorm1d):
            part.running_mean.normal_(0, 0.2)
            part.running_var.uniform_(0.01, 0.1)
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.Linear) and name.startswith("z_encoder"):
            part.weight.data *= 0.1 if "var_encoder" in name else 1.5
    if module.modality_weights == "universal":
        module.mod_weights.data = torch.tensor([0.3, 1.2, -0.5])


def save(model, folder, epochs=0):
    with quiet():
        if epochs:
            model.train(epochs, accelerator="cpu", enable_progress_bar=False)
        else:
            stir(model.module)
            model.is_trained_ = True
        model.save(str(folder))
    return model


def made(cells, folder, recipe, arguments, epochs=0):
    """A saved model, as scvi-tools has it, after so many epochs."""
    scvi.settings.seed = 0
    told = Recipe(family="multivi", **recipe)
    with quiet():
        model = FAMILY.create(FAMILY.setup(cells.copy(), told), arguments, told)
    return save(model, folder, epochs)


def opened(saved, tmp_path):
    """Facts, and the encoder by way of the file that a package holds."""
    saved = saved if isinstance(saved, SavedModel) else read_model_file(saved / "model.pt")
    facts = FAMILY.facts(saved)
    FAMILY.load(saved, make_template(facts), "cpu").save(tmp_path / "encoder.safetensors")
    return facts, FAMILY.open(tmp_path / "encoder.safetensors", "cpu")


def assert_parity(found, model, data=None):
    """Of the joint latent, its variance, and every modality's own."""
    with quiet():
        location, variance = model.get_latent_representation(data, return_dist=True)
        own = {name: model.get_latent_representation(data, name, return_dist=True)[0] for name in found.others}
    assert found.location.dtype == found.mean.dtype == np.float32
    assert (np.abs(found.location - location) / location.std(axis=0)).max() <= TOLERANCE
    assert np.abs(found.variance / variance - 1).max() <= 1e-4
    assert location.std(axis=0).min() > 1e-3
    for name, latent in own.items():
        assert (np.abs(found.others[name] - latent) / latent.std(axis=0)).max() <= TOLERANCE
    return location


@pytest.fixture(scope="module")
def some():
    """Cells with all modalities, and some without one or two of them."""
    rng = np.random.default_rng(1)
    cells = flat(
        {name: ([f"{name}{i}" for i in range(size)], rng.poisson(1.5, (90, size))) for name, size in SIZES.items()}
    )
    cells = without(without(cells, "atac", range(20)), "rna", range(20, 40))
    return without(without(cells, "protein", range(10)), "protein", range(30, 60))


@pytest.mark.parametrize("name", MODELS)
def test_latents_over_configurations(some, tmp_path, name):
    modalities, recipe, arguments, reads = MODELS[name]
    cells = only(some, modalities)
    cells = cells[np.asarray(cells.X.sum(1)).ravel() > 0].copy()
    model = made(cells, tmp_path / "saved", recipe, {"n_hidden": 12, "n_latent": 4} | arguments)
    facts, encoder = opened(tmp_path / "saved", tmp_path)
    assert facts.encode_covariates is reads
    assert (facts.names, facts.genes.modalities) == (tuple(cells.var_names), modalities)
    assert tuple(facts.latent_sizes) == encoder.latents
    found = encode_cells(encoder, cells.X, cells.obs, facts)
    assert set(found.others) == set(encoder.latents[1:])
    assert len(found.others) == (len(modalities) if len(modalities) > 1 else 0)
    assert_parity(found, model)
    assert (found.mean == found.location).all()
    assert encoder.classify(found.location) is None


def test_a_modality_that_a_cell_lacks_does_not_count(some, tmp_path):
    """Its latent is then that of the other modality alone."""
    cells = only(some, ("rna", "atac"))
    made(cells, tmp_path / "saved", {}, {"n_latent": 4})
    facts, encoder = opened(tmp_path / "saved", tmp_path)
    found = encode_cells(encoder, cells.X, cells.obs, facts)
    assert (found.mean[:20] == found.others["expression"][:20]).all()
    assert (found.mean[20:40] == found.others["accessibility"][20:40]).all()
    both = (found.others["expression"] + found.others["accessibility"])[40:] / 2
    assert np.allclose(found.mean[40:], both, atol=1e-6)


def test_a_latent_on_the_simplex(some, tmp_path):
    """scvi-tools samples there even for the mean; ours is the softmax of the posterior's mean."""
    model = made(some, tmp_path / "saved", {}, {"latent_distribution": "ln", "n_latent": 4})
    facts, encoder = opened(tmp_path / "saved", tmp_path)
    found = encode_cells(encoder, some.X, some.obs, facts)
    with quiet():
        location, _ = model.get_latent_representation(return_dist=True)
    odds = np.exp(location)
    assert np.abs(found.location - location).max() <= TOLERANCE * location.std()
    assert np.abs(found.mean - odds / odds.sum(1, keepdims=True)).max() <= TOLERANCE
    assert np.allclose(found.others["accessibility"].sum(1), 1, atol=1e-5)


def test_the_layout_of_a_stranger(some, tmp_path):
    """Modalities by other names and in another order, in layers, with size factors, columns here and there."""
    parts = {}
    for mod, modality in {"adt": "protein", "peaks": "atac", "gex": "rna"}.items():
        one = only(some, (modality,))
        one.layers["counts"] = one.X.toarray() if modality == "protein" else one.X.copy()
        one.X = np.zeros(one.shape, np.float32)
        one.obs = one.obs[["donor"]] if modality == "atac" else one.obs[[]]
        parts[mod] = one
    with quiet():
        data = MuData(parts)
        data.obs = some.obs[["batch", "rna_size", "atac_size"]].copy()
        data.obs["donor"] = "another meaning"
        scvi.model.MULTIVI.setup_mudata(
            data,
            **dict.fromkeys(["rna_layer", "atac_layer", "protein_layer"], "counts"),
            batch_key="batch",
            size_factor_key=["rna_size", "atac_size"],
            categorical_covariate_keys=["donor"],
            modalities={
                "rna_layer": "gex",
                "atac_layer": "peaks",
                "protein_layer": "adt",
                "categorical_covariate_keys": "peaks",
            },
        )
        model = scvi.model.MULTIVI(data, n_hidden=12, n_latent=4, encode_covariates=True)
    save(model, tmp_path / "saved")
    facts, encoder = opened(tmp_path / "saved", tmp_path)
    assert (facts.names, facts.genes.modality) == (tuple(some.var_names), tuple(some.var[MODALITY]))
    assert facts.layer == "counts"
    back = FAMILY.flatten(read_model_file(tmp_path / "saved" / "model.pt"), data)
    assert tuple(back.var[MODALITY]) == facts.genes.modality
    assert (back.X != some.X).nnz == 0
    assert list(back.obs["donor"]) == list(some.obs["donor"])
    assert_parity(encode_cells(encoder, back.X, back.obs, facts), model)


def from_anndata(saved, cells):
    """The model as scvi-tools 1.3 saved one that was set up from an AnnData: genes and peaks in one X."""
    registry = dict(saved.attr_dict["registry_"])
    fields = {key: value for key, value in registry["field_registries"].items() if key != "atac"}
    names = np.array(cells.var_names[cells.var[MODALITY] != "protein"], object)
    state = {"n_obs": cells.n_obs, "n_vars": len(names), "column_names": names}
    fields["X"] = {"data_registry": {"attr_name": "layers", "attr_key": "counts"}, "state_registry": state}
    proteins = list(cells.var_names[cells.var[MODALITY] == "protein"])
    told = {"attr_name": "obsm", "attr_key": "adt"}
    fields["proteins"] = {"data_registry": told, "state_registry": {"column_names": proteins}}
    setup = {"layer": "counts", "protein_expression_obsm_key": "adt", "protein_names_uns_key": None}
    setup |= {key: registry["setup_args"][key] for key in ("batch_key", "size_factor_key")}
    setup |= {
        f"{key}_covariate_keys": registry["setup_args"][f"{key}_covariate_keys"]
        for key in ("categorical", "continuous")
    }
    registry |= {"setup_method_name": "setup_anndata", "setup_args": setup, "field_registries": fields}
    return replace(saved, var_names=names, attr_dict={**saved.attr_dict, "registry_": registry})


def test_a_model_that_was_set_up_from_an_anndata(some, tmp_path):
    """scvi-tools 1.3 and before did, which one of today cannot; models that 1.3.3 saved were read like this."""
    model = made(some, tmp_path / "saved", EVERYTHING, {"n_hidden": 12, "n_latent": 4, **ENCODED})
    saved = from_anndata(read_model_file(tmp_path / "saved" / "model.pt"), some)
    facts, encoder = opened(saved, tmp_path)
    assert (facts.names, facts.genes.modality) == (tuple(some.var_names), tuple(some.var[MODALITY]))
    assert facts.layer == "counts"
    data = only(some, ("rna", "atac"))
    data.layers["counts"], data.X = data.X.copy(), np.zeros(data.shape, np.float32)
    data.obsm["adt"] = pd.DataFrame(only(some, ("protein",)).X.toarray(), index=data.obs_names)
    back = FAMILY.flatten(saved, data)
    assert tuple(back.var[MODALITY]) == facts.genes.modality
    assert (back.X != some.X).nnz == 0
    assert_parity(encode_cells(encoder, back.X, back.obs, facts), model)
    saved.attr_dict["init_params_"]["non_kwargs"]["n_genes"] = None
    with pytest.raises(UnsupportedModelError, match="None are genes"):
        FAMILY.facts(saved)


@pytest.fixture(scope="module")
def multiome(shared_data):
    """1,000 PBMC, 45 genes and 174 peaks; mudata 0.4 does not read the file."""
    parts = {}
    with h5py.File(shared_data / "multiome_rna_atac_muon.h5mu") as file:
        for modality in ("rna", "atac"):
            group = file["mod"][modality]
            parts[modality] = (group["var/_index"].asstr()[:], read_elem(group["X"]))
    return flat(parts)


@pytest.mark.parametrize("lacks", ["none", "atac", "rna"])
def test_train_and_encode_real_cells(multiome, trained, lacks):
    model, facts, encoder = trained
    query = multiome[600:].copy()
    query = query if lacks == "none" else without(query, lacks, range(query.n_obs))
    query = query[np.asarray(query.X.sum(1)).ravel() > 0].copy()  # without a count there is no latent
    data = FAMILY.setup(query.copy(), Recipe(family="multivi", batch_key="batch"))
    assert_parity(encode_cells(encoder, query.X, query.obs, facts), model, data)


@pytest.fixture(scope="module")
def trained(multiome, tmp_path_factory):
    folder = tmp_path_factory.mktemp("multiome")
    known = without(without(multiome[:600].copy(), "atac", range(100)), "rna", range(100, 200))
    model = made(known, folder / "saved", {"batch_key": "batch"}, {"n_latent": 6, **ENCODED}, 3)
    return model, *opened(folder / "saved", folder)


def test_influence_of_genes_and_peaks(multiome, trained):
    model, _, encoder = trained
    weights = [
        part.encoder.fc_layers[0][0].weight.detach().numpy()[:, :size]
        for part, size in ((model.module.z_encoder_expression, 45), (model.module.z_encoder_accessibility, 174))
    ]
    expected = np.concatenate([np.linalg.norm(one, axis=0) for one in weights])
    assert np.allclose(encoder.gene_influence(), expected, rtol=1e-5)


def test_a_cell_does_not_depend_on_its_neighbours(multiome, trained):
    _, facts, encoder = trained
    counts, obs = sparse.vstack([multiome.X] * 2, format="csr"), pd.concat([multiome.obs] * 2)
    together = encode_cells(encoder, counts, obs, facts).mean
    apart = encode_cells(encoder, counts[1020:1030], obs[1020:1030], facts).mean
    assert np.abs(together[1020:1030] - apart).max() <= TOLERANCE * together.std()
    none = encode_cells(encoder, counts[:0], obs[:0], facts)
    assert none.mean.shape == none.variance.shape == none.others["expression"].shape == (0, 6)


def test_train_on_genes_and_peaks_of_a_time_course(shared_data, tmp_path):
    """A549 by sci-CAR, a file per modality: every 8th gene and 80th peak."""
    parts = {}
    for modality, name, step in (("rna", "rna", 8), ("atac", "atac_binary", 80)):
        cells = anndata.read_h5ad(shared_data / f"multiome_a549_scicar_{name}.h5ad")
        parts[modality] = (cells.var_names[::step], cells.X[:800, ::step])
    cells = flat(parts)
    cells = cells[np.asarray(cells.X.sum(1)).ravel() > 0].copy()
    model = made(cells, tmp_path / "saved", {}, {"modality_weights": "universal"}, 1)
    facts, encoder = opened(tmp_path / "saved", tmp_path)
    assert_parity(encode_cells(encoder, cells.X, cells.obs, facts), model)


def test_weights_of_training_cells_alone_are_refused(some, tmp_path):
    with pytest.raises(InputError, match="for no other"):
        made(some, tmp_path / "none", {}, {"modality_weights": "cell"})
    with quiet():
        data = FAMILY.setup(some.copy(), Recipe(family="multivi"))
        save(scvi.model.MULTIVI(data, modality_weights="cell"), tmp_path / "saved")
    with pytest.raises(UnsupportedModelError, match="90 training cells"):
        FAMILY.facts(read_model_file(tmp_path / "saved" / "model.pt"))


def test_training_needs_genes_or_peaks(some):
    with pytest.raises(InputError, match="needs rna or atac"):
        FAMILY.setup(only(some, ("protein",)), Recipe(family="multivi"))


@pytest.mark.parametrize("what", ["first layer", "mean", "width", "peaks", "class", "batches", "names", "weights"])
def test_strangers_models_that_do_not_add_up(some, tmp_path, what):
    made(some, tmp_path / "saved", {"batch_key": "batch"}, {"n_latent": 4, **ENCODED})
    saved = read_model_file(tmp_path / "saved" / "model.pt")
    assert FAMILY.facts(saved).n_latent == 4
    state, registry, names = dict(saved.state_dict), saved.attr_dict["registry_"], saved.var_names
    first = "z_encoder_accessibility.encoder.fc_layers.Layer 0.0.weight"
    if what in ("first layer", "weights"):
        del state[first if what == "first layer" else "mod_weights"]
    elif what == "mean":
        del state["z_encoder_expression.mean_encoder.weight"]
    elif what == "width":
        state[first] = state[first][:, :-1]
    elif what == "peaks":
        del registry["field_registries"]["atac"]
    elif what == "class":
        registry["model_name"] = "TOTALVI"
    elif what == "batches":
        registry["field_registries"]["batch"]["state_registry"]["categorical_mapping"] = np.array(["a", "b", "c"])
    elif what == "names":
        names = {**names, "rna": names["rna"][:-1]}
    with pytest.raises(UnsupportedModelError):
        FAMILY.facts(replace(saved, state_dict=state, var_names=names))


def test_arguments_are_those_that_the_data_leave_open():
    told = FAMILY.arguments()
    assert {"n_hidden", "n_latent", "modality_weights", "encode_covariates", "dispersion"} <= told.keys()
    assert not {"n_genes", "n_regions", "n_input_genes", "n_obs", "gene_dispersion", "adata"} & told.keys()
