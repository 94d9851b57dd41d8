"""What the families built on scvi-tools' VAE share: facts from the registry, instantiation, encoding."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from scviaduct.errors import ScviaductError, UnsupportedModelError
from scviaduct.families.base import Covariates, Encoded, Facts
from scviaduct.families.folding import fold_encoder, fold_layers, fold_linear
from scviaduct.families.network import Bundle
from scviaduct.families.precision import exactly
from scviaduct.families.registered import OTHERS_WEIGHTS, common_facts, registry_of, require_weights, texts
from scviaduct.families.rowwise import padded, rows_of
from scviaduct.families.slots import BATCH
from scviaduct.families.slots import covariate as covariate_of
from scviaduct.families.sparse import CELLS, GPU_CELLS, step_encoder
from scviaduct.values import GeneTable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from scviaduct.families.device import DeviceEncoder
    from scviaduct.families.network import Network
    from scviaduct.references.saved.archive import SavedModel
    from scviaduct.values import FloatArray, IntArray, LongArray

_FIRST_LAYER = "z_encoder.encoder.fc_layers.Layer 0.0.weight"
_MEAN = "z_encoder.mean_encoder.weight"


def read_facts(
    saved: SavedModel, name: str, modality: str = "rna", *, first: str = _FIRST_LAYER, mean: str = _MEAN
) -> Facts:
    """Read what a model of one matrix is from its registry and its weights.

    Parameters
    ----------
    saved
        As it was read.
    name
        Of its class.
    modality
        What its features are.
    first, mean
        Names of the weights of the encoder's first layer and of the latent's mean.

    Raises
    ------
    UnsupportedModelError
        If the weights are of another class, or of other shapes than the registry says.
    """
    registry = registry_of(saved, name)
    if isinstance(saved.var_names, dict):
        raise UnsupportedModelError(f"The {name} was set up from several modalities.", "Train it from one AnnData.")
    genes = texts(saved.var_names)
    width = require_weights(saved, name, first, len(genes))
    latent = saved.state_dict.get(mean)
    if latent is None:
        raise UnsupportedModelError(f"The weights are not those of a {name}: '{mean}' is missing.", OTHERS_WEIGHTS)
    n_latent = int(latent.shape[0])
    return Facts(
        genes=GeneTable({"index": genes}, (modality,) * len(genes)),
        n_latent=n_latent,
        latent_sizes={"latent": n_latent},
        encode_covariates=width > len(genes),
        **common_facts(registry),
    )


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


def instantiate(model_class: Any, saved: SavedModel, template: Any) -> Any:
    """Instantiate a model of scvi-tools from checked parts, as its ``load`` does without opening the file.

    Parameters
    ----------
    model_class
        Of scvi-tools.
    saved
        As it was read.
    template
        Cells in the layout that it was set up with.

    Raises
    ------
    UnsupportedModelError
        If the weights do not fit the model that the registry describes.
    """
    from scvi.model.base._save_load import _initialize_model

    from scviaduct.references.saved.weights import check_arguments, check_shapes, check_weights

    registry = saved.attr_dict["registry_"]
    check_weights(saved, str(registry.get("model_name")))
    check_arguments(saved, saved.attr_dict.get("init_params_"))
    try:
        # Of what else was saved, scvi-tools would set any name on the model; only its module is used here.
        attributes = {"init_params_": copy.deepcopy(saved.attr_dict["init_params_"])}
        with quiet():
            setup = getattr(model_class, registry.get("setup_method_name", "setup_anndata"))
            setup(template, source_registry=registry, **registry["setup_args"])
            with torch.device("meta"):  # takes no memory, whatever sizes the registry claims
                trial = _initialize_model(model_class, template, registry, copy.deepcopy(attributes), None)
            check_shapes(trial.module.state_dict(), saved)
            model = _initialize_model(model_class, template, registry, attributes, None)
            model.module.on_load(model, pyro_param_store=None)
            model.module.load_state_dict(saved.state_dict)
    except ScviaductError:
        raise
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


def _tables(columns: Sequence[str]) -> dict[str, int]:
    """Position of each covariate among the tables of a layer."""
    return {name: i for i, name in enumerate((BATCH, *map(covariate_of, columns)))}


class VaeEncoder:
    """Encodes sparse counts with networks, and classifies if the first has a classifier.

    Parameters
    ----------
    networks
        Name of each latent to the network that gives it, the main one first; each reads all features.
    device
        ``"cpu"`` or a CUDA device.
    """

    def __init__(self, networks: Mapping[str, Network], device: str = "cpu") -> None:
        self._networks = {name: network.to(device) for name, network in networks.items()}
        self._device = device
        self._encoders = {name: step_encoder(network, device) for name, network in self._networks.items()}
        self._step = 4 * CELLS if device == "cpu" else GPU_CELLS
        self.latents = tuple(networks)
        self._network = self._networks[self.latents[0]]
        self.labels = self._network.labels
        self.n_latent = len(self._network.mean.bias)
        self._there: DeviceEncoder | None = None
        if device != "cpu":
            from scviaduct.families.device import DeviceEncoder  # what it imports, a CPU does not need

            self._there = DeviceEncoder(self._networks, device)

    @property
    def arithmetic(self) -> str:
        """What computes: see :attr:`Encoder.arithmetic`."""
        return self._there.path if self._there else next(iter(self._encoders.values())).arithmetic

    @classmethod
    def open(cls, path: Path, device: str) -> Self:
        """Read what :meth:`save` wrote."""
        return cls(Bundle.load(path, device).networks, device)

    def save(self, path: Path) -> None:
        """Write what encoding needs, for a process without scvi-tools."""
        Bundle({name: network.to("cpu") for name, network in self._networks.items()}).save(path)

    def rows(self, covariate: str, code: int, columns: Sequence[str] = ()) -> dict[str, torch.Tensor]:
        """What the layers look up for a category: see :meth:`Encoder.rows`."""
        tables = _tables(columns)
        if covariate not in tables:
            return {}
        found: dict[str, torch.Tensor] = {}
        for name, network in self._networks.items():
            found |= network.rows(tables[covariate], code, f"{name}/")
        return found

    def extended(self, more: Mapping[str, Sequence[Mapping[str, torch.Tensor]]], columns: Sequence[str] = ()) -> Self:
        """The encoder with further categories: see :meth:`Encoder.extended`."""
        tables, networks, other = _tables(columns), dict(self._networks), copy.copy(self)
        for read, rows in more.items():
            if read in tables:
                for name, network in networks.items():
                    networks[name] = network.extended(tables[read], rows, f"{name}/")
        encoders = {name: self._encoders[name].reading(network) for name, network in networks.items()}
        there = self._there.reading(networks) if self._there else None
        vars(other).update(_networks=networks, _encoders=encoders, _network=next(iter(networks.values())), _there=there)
        return other

    @torch.inference_mode()
    def encode(self, indptr: LongArray, indices: IntArray, data: FloatArray, covariates: Covariates) -> Encoded:
        """Encode counts given as CSR in the reference's features.

        Parameters
        ----------
        indptr, indices, data
            int64 of shape ``(n_cells + 1,)``, int32 and float32 of shape ``(nnz,)``. Pointers may be those of a part of
            the rows.
        covariates
            What the encoder reads of the cells.

        Returns
        -------
        Encoded
            Of every cell, in their order.

        Raises
        ------
        DataError
            If pointers, a gene or a category are none.
        """
        if self._there:
            found: Encoded = self._there.encode(indptr, indices, data, covariates)
            return found
        n_cells, low, high = len(indptr) - 1, int(indptr[0]), int(indptr[-1])
        rows = indptr - low, indices[low:high], data[low:high]
        told = self._read(covariates, slice(0, n_cells), n_cells)
        posteriors = {name: encoder(*rows, *told) for name, encoder in self._encoders.items()}
        latents = {
            name: (torch.softmax(mean, dim=-1) if self._networks[name].logistic_normal else mean).numpy()
            for name, (mean, _) in posteriors.items()
        }
        location, variance = (part.numpy() for part in posteriors[self.latents[0]])
        return Encoded(latents.pop(self.latents[0]), location, variance, latents)

    def _tensor(self, values: Any) -> torch.Tensor:
        # Blocks come out of the object store read-only; torch warns of sharing such memory, so it is copied: 2 MB.
        return torch.tensor(values, device=self._device)

    def _given(self, values: Any) -> Any:
        """What an encoder takes: a tensor on a GPU, and on a CPU the array as it is."""
        return values if self._device == "cpu" else self._tensor(values)

    def _read(self, covariates: Covariates, cells: slice, rows: int) -> tuple[list[Any], Any]:
        """Codes of every categorical covariate, the batch first, and continuous covariates, for so many rows."""
        if covariates.batch is not None:
            codes = [self._given(padded(covariates.batch[cells], rows))]
        else:
            # A model without batches has one, which the encoder does not read, in the place of the first covariate.
            codes = [self._given(np.zeros(rows, np.int64))]
        if covariates.categorical is not None:
            codes += [self._given(padded(column[cells], rows)) for column in covariates.categorical.T]
        numbers = covariates.continuous
        return codes, None if numbers is None else self._given(padded(numbers[cells], rows))

    def transformed(self, location: FloatArray) -> FloatArray:
        """The latent of a posterior's mean: its softmax where the latent is logistic-normal."""
        if not self._network.logistic_normal:
            return location
        found: FloatArray = torch.softmax(self._tensor(location), dim=-1).cpu().numpy()
        return found

    @torch.inference_mode()
    def classify(self, location: FloatArray) -> FloatArray | None:
        """Probabilities of the labels, shape ``(n_cells, n_labels)``; None without a classifier."""
        if not self.labels:
            return None
        if self._device == "cpu":
            there: FloatArray = self._encoders[self.latents[0]].classify(location).numpy()
            return there
        found = np.empty((len(location), len(self.labels)), np.float32)
        for start in range(0, len(location), self._step):
            part = location[start : start + self._step]
            rows = padded(part, rows_of(len(part), self._step, self._device))
            with exactly(self._device):
                out = self._encoders[self.latents[0]].classify(self._given(rows))
            found[start : start + len(part)] = out[: len(part)].cpu().numpy()
        return found

    def gene_influence(self) -> FloatArray:
        """L2 norm of each feature's first-layer weights over all networks, shape ``(n_features,)``."""
        squares = [
            network.layers[0].weight[:, : network.n_genes].square().sum(dim=0) for network in self._networks.values()
        ]
        found: FloatArray = torch.stack(squares).sum(dim=0).sqrt().cpu().numpy()
        return found
