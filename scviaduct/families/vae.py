"""What the families built on scvi-tools' VAE share: facts from the registry, instantiation, encoding."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from scviaduct.errors import UnsupportedModelError
from scviaduct.families.base import Covariates, Encoded, Facts
from scviaduct.families.network import fold_encoder, fold_layers, fold_linear
from scviaduct.families.sparse import CELLS, GPU_CELLS, SparseEncoder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from anndata import AnnData

    from scviaduct.families.network import Network
    from scviaduct.references.archive import SavedModel
    from scviaduct.values import FloatArray, IntArray, LongArray

_FIRST_LAYER = "z_encoder.encoder.fc_layers.Layer 0.0.weight"


def read_facts(saved: SavedModel, name: str) -> Facts:
    """Read what a model of the VAE family is from its registry and its weights.

    Raises
    ------
    UnsupportedModelError
        If the weights are of another class, or of other shapes than the registry says.
    """
    registry = saved.attr_dict.get("registry_")
    if not isinstance(registry, dict) or registry.get("model_name") != name:
        told = registry.get("model_name") if isinstance(registry, dict) else None
        raise UnsupportedModelError(f"The model says it is a {told}, not a {name}.", "Is it the right folder?")
    if registry.get("setup_method_name", "setup_anndata") != "setup_anndata" or isinstance(saved.var_names, dict):
        raise UnsupportedModelError(
            f"The {name} was not set up from an AnnData.", "Train it from one: scviaduct train."
        )
    setup = registry.get("setup_args", {})
    genes = tuple(str(gene) for gene in saved.var_names)
    first, latent = saved.state_dict.get(_FIRST_LAYER), saved.state_dict.get("z_encoder.mean_encoder.weight")
    if first is None or latent is None or first.shape[1] < len(genes):
        raise UnsupportedModelError(
            f"The weights are not those of a {name} of {len(genes)} genes: '{_FIRST_LAYER}' is"
            f" {'missing' if first is None else tuple(first.shape)}.",
            "The folder claims one class and holds another's weights; take the model from its publisher again.",
        )
    batch = _state(registry, "batch")
    categorical, continuous = _state(registry, "extra_categorical_covs"), _state(registry, "extra_continuous_covs")
    labels = _state(registry, "labels")
    return Facts(
        genes=genes,
        n_latent=int(latent.shape[0]),
        encode_covariates=int(first.shape[1]) > len(genes),
        scvi_version=str(registry.get("scvi_version", "")),
        batch_key=setup.get("batch_key") or "",
        batch_categories=_texts(batch.get("categorical_mapping", ())) if setup.get("batch_key") else (),
        labels_key=setup.get("labels_key") or "",
        unlabeled_category=str(labels.get("unlabeled_category") or ""),
        categorical_covariates={key: _texts(categorical["mappings"][key]) for key in categorical.get("field_keys", ())},
        continuous_covariates=_texts(continuous.get("columns", ())),
        size_factor_key=setup.get("size_factor_key") or "",
        layer=setup.get("layer") or "",
    )


def _state(registry: dict[str, Any], field: str) -> dict[str, Any]:
    found = registry.get("field_registries", {}).get(field, {}).get("state_registry", {})
    return dict(found)


def _texts(values: Any) -> tuple[str, ...]:
    return tuple(str(value) for value in values)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """scvi-tools and Lightning without their notices: what they say of a template of a few cells means nothing."""
    loggers = [logging.getLogger(name) for name in ("scvi", "lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def instantiate(model_class: Any, saved: SavedModel, template: AnnData) -> Any:
    """Instantiate a model of scvi-tools from checked parts, as its ``load`` does without opening the file.

    Raises
    ------
    UnsupportedModelError
        If the weights do not fit the model that the registry describes.
    """
    from scvi.model.base._save_load import _initialize_model

    registry = saved.attr_dict["registry_"]
    try:
        # Of what else was saved, scvi-tools would set any name on the model; only its module is used here.
        attributes = {"init_params_": copy.deepcopy(saved.attr_dict["init_params_"])}
        with quiet():
            model_class.setup_anndata(template, source_registry=registry, **registry["setup_args"])
            model = _initialize_model(model_class, template, registry, attributes, None)
            model.module.on_load(model, pyro_param_store=None)
            model.module.load_state_dict(saved.state_dict)
    # scvi-tools can fail in any way on a registry that it did not write.
    except Exception as error:
        told = next(iter(str(error).splitlines()), type(error).__name__).removesuffix(".")
        raise UnsupportedModelError(
            f"The saved {model_class.__name__} does not fit scvi-tools of today: {told}.",
            "Load and save it with the version that made it, or train it again.",
        ) from error
    model.module.eval()
    return model


def fold(module: Any, n_genes: int, labels: tuple[str, ...]) -> Network:
    """Take what mapping needs out of a module of scvi-tools' VAE.

    Parameters
    ----------
    module
        In evaluation mode.
    n_genes
        Genes of the model.
    labels
        What its classifier gives; empty without one.
    """
    embedding = None
    if getattr(module, "batch_representation", "one-hot") == "embedding" and module.encode_covariates:
        embedding = module.get_embedding("batch").weight
    encoder = module.z_encoder
    network = fold_encoder(encoder, n_genes, log_variational=module.log_variational, embedding=embedding)
    if not labels:
        return network
    # A classifier of scvi-tools before 1.1 ends in a softmax, a later one before it: what precedes it is kept.
    *hidden, last = [part for part in module.classifier.classifier if not isinstance(part, torch.nn.Softmax)]
    classifier = [layer for part in hidden for layer in fold_layers(part)]
    return replace(network, classifier=(*classifier, fold_linear(last)), labels=labels)


class VaeEncoder:
    """Encodes sparse counts with a network, and classifies if it has a classifier.

    Parameters
    ----------
    network
        Of a model of the VAE family.
    device
        ``"cpu"`` or a CUDA device.
    """

    def __init__(self, network: Network, device: str = "cpu") -> None:
        self._network = network = network.to(device)
        self._device = device
        self._encoder = SparseEncoder(network)
        self._step = CELLS if device == "cpu" else GPU_CELLS
        self.labels = network.labels
        self.n_latent = len(network.mean.bias)

    def save(self, path: Path) -> None:
        """Write what encoding needs, for a process without scvi-tools."""
        self._network.to("cpu").save(path)

    @torch.inference_mode()
    def encode(self, indptr: LongArray, indices: IntArray, data: FloatArray, covariates: Covariates) -> Encoded:
        """Encode counts given as CSR in the reference's genes, some cells at a time.

        Parameters
        ----------
        indptr, indices, data
            int64 of shape ``(n_cells + 1,)``, int32 and float32 of shape ``(nnz,)``.
        covariates
            As far as the encoder reads them.
        """
        n_cells = len(indptr) - 1
        location = np.empty((n_cells, self.n_latent), np.float32)
        variance, mean = np.empty_like(location), np.empty_like(location)
        for start in range(0, n_cells, self._step):
            stop = min(start + self._step, n_cells)
            low, high = int(indptr[start]), int(indptr[stop])
            parts = (indptr[start : stop + 1] - low, indices[low:high], data[low:high])
            pointers, genes, counts = (self._tensor(part) for part in parts)
            codes = self._codes(covariates, start, stop)
            numbers = covariates.continuous
            continuous = None if numbers is None else self._tensor(numbers[start:stop])
            loc, var = self._encoder(pointers, genes, counts, codes, continuous)
            location[start:stop], variance[start:stop] = loc.cpu().numpy(), var.cpu().numpy()
            transformed = torch.softmax(loc, dim=-1) if self._network.logistic_normal else loc
            mean[start:stop] = transformed.cpu().numpy()
        return Encoded(mean, location, variance)

    def _tensor(self, values: Any) -> torch.Tensor:
        # Blocks come out of the object store read-only; torch warns of sharing such memory, so it is copied: 2 MB.
        return torch.tensor(values, device=self._device)

    def _codes(self, covariates: Covariates, start: int, stop: int) -> list[torch.Tensor]:
        """Codes of every categorical covariate; the batch is the first."""
        if covariates.batch is not None:
            codes = [self._tensor(covariates.batch[start:stop])]
        else:
            # A model without batches has one, which the encoder does not read, in the place of the first covariate.
            codes = [torch.zeros(stop - start, dtype=torch.int64, device=self._device)]
        if covariates.categorical is not None:
            codes += [self._tensor(column[start:stop]) for column in covariates.categorical.T]
        return codes

    @torch.inference_mode()
    def classify(self, location: FloatArray) -> FloatArray | None:
        """Probabilities of the labels, shape ``(n_cells, n_labels)``; None without a classifier."""
        if not self.labels:
            return None
        out = self._tensor(location)
        for layer in self._network.classifier:
            out = layer(out)
        found: FloatArray = torch.softmax(out, dim=-1).cpu().numpy()
        return found

    def gene_influence(self) -> FloatArray:
        """L2 norm of each gene's first-layer weights, shape ``(n_genes,)``; batch normalisation is folded into them."""
        weight = self._network.layers[0].weight[:, : self._network.n_genes]
        found: FloatArray = weight.norm(dim=0).cpu().numpy()
        return found
