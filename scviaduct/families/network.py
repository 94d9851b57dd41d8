"""What an encoder of scvi-tools computes, as tensors and a few facts: no class of scvi-tools, and no pickle.

Importing scvi-tools takes 9 CPU-seconds (30 without compiled bytecode), and a pickle can run anything. A package
therefore holds the network that its model encodes with as safetensors; only whoever makes or verifies a package loads
the model itself. Batch normalisation in evaluation mode is affine and is folded into the weights; a batch embedding,
which the first layer multiplies with a part of its weights, becomes that product.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from scviaduct.errors import PackageError, UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

_FORMAT = "1"
_ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    repr(module): module
    for module in (nn.ReLU(), nn.LeakyReLU(), nn.ELU(), nn.GELU(), nn.SiLU(), nn.Softplus(), nn.Tanh())
}
_VARIANCES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "exp": torch.exp,
    "softplus": nn.functional.softplus,
}


@dataclass(frozen=True, slots=True)
class Layer:
    """A fully connected layer with its batch normalisation folded in.

    Attributes
    ----------
    weight
        float32, shape ``(n_out, n_in)``, of what comes from the layer below; for the first layer the genes, and behind
        them continuous covariates.
    bias
        float32, shape ``(n_out,)``.
    tables
        One per categorical covariate, batch first: float32, shape ``(n_categories, n_out)``; None for one that the
        layer does not read.
    norm
        Weight and bias of a layer norm; None without one.
    norm_eps
        Its epsilon.
    activation
        Name of the activation; empty for none.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    tables: tuple[torch.Tensor | None, ...] = ()
    norm: tuple[torch.Tensor, torch.Tensor] | None = None
    norm_eps: float = 0.0
    activation: str = ""

    def finish(self, out: torch.Tensor, codes: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        """Add the columns of each cell's categories in place, then normalise and activate."""
        for table, code in zip(self.tables, codes, strict=False):
            if table is not None:
                out += table[code]
        if self.norm is not None:
            out = nn.functional.layer_norm(out, self.bias.shape, *self.norm, self.norm_eps)
        return _ACTIVATIONS[self.activation](out) if self.activation else out

    def __call__(self, values: torch.Tensor, codes: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        """Apply to dense values of shape ``(n_cells, n_in)``."""
        return self.finish(nn.functional.linear(values, self.weight, self.bias), codes)

    def to(self, device: str) -> Self:
        """The layer on a device."""
        tables = tuple(table if table is None else table.to(device) for table in self.tables)
        norm = None if self.norm is None else (self.norm[0].to(device), self.norm[1].to(device))
        return replace(self, weight=self.weight.to(device), bias=self.bias.to(device), tables=tables, norm=norm)


@dataclass(frozen=True, slots=True)
class Network:
    """An encoder, and a classifier on its latent where the model has one.

    Attributes
    ----------
    layers
        From counts to the last hidden layer.
    mean, variance
        From there to the posterior's mean and, before ``variance_activation``, its variance.
    n_genes
        Genes, the first inputs of the first layer.
    variance_activation, variance_eps
        What makes the variance positive, and its least value.
    log_variational
        Whether counts pass through ``log1p`` first.
    logistic_normal
        Whether the latent is the softmax of what the posterior describes.
    classifier
        From the posterior's mean to the logits of the labels.
    labels
        What the classifier gives, in its order; empty without one.
    """

    layers: tuple[Layer, ...]
    mean: Layer
    variance: Layer
    n_genes: int
    variance_activation: str = "exp"
    variance_eps: float = 1e-4
    log_variational: bool = True
    logistic_normal: bool = False
    classifier: tuple[Layer, ...] = ()
    labels: tuple[str, ...] = ()

    def positive(self, values: torch.Tensor) -> torch.Tensor:
        """Variance from what its layer gives."""
        return _VARIANCES[self.variance_activation](values) + self.variance_eps

    def to(self, device: str) -> Self:
        """The network on a device."""
        return replace(
            self,
            layers=tuple(layer.to(device) for layer in self.layers),
            mean=self.mean.to(device),
            variance=self.variance.to(device),
            classifier=tuple(layer.to(device) for layer in self.classifier),
        )

    def save(self, path: Path) -> None:
        """Write the network as safetensors, its facts as JSON in the file's metadata."""
        tensors: dict[str, torch.Tensor] = {}
        facts = {name: getattr(self, name) for name in _FACTS}
        for part, layers in self._parts():
            facts[part] = [_pack(layer, f"{part}.{i}", tensors) for i, layer in enumerate(layers)]
        # One entry: safetensors writes several in an order of chance, and the same model would have two digests.
        save_file(tensors, path, metadata={"network": json.dumps({"format": _FORMAT, **facts})})

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> Self:
        """Read a network that :meth:`save` wrote.

        Raises
        ------
        PackageError
            If the file is not one.
        """
        try:
            with safe_open(path, framework="pt", device=device) as file:
                facts = json.loads(file.metadata()["network"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise PackageError(f"{path} holds no network ({error}).", "Add the reference again.") from error
        parts = {
            part: tuple(_unpack(told, f"{part}.{i}", tensors) for i, told in enumerate(facts[part])) for part in _PARTS
        }
        (mean,), (variance,) = parts["mean"], parts["variance"]
        own = {name: facts[name] for name in _FACTS} | {"labels": tuple(facts["labels"])}
        return cls(layers=parts["layers"], mean=mean, variance=variance, classifier=parts["classifier"], **own)

    def _parts(self) -> Iterable[tuple[str, tuple[Layer, ...]]]:
        return zip(_PARTS, (self.layers, (self.mean,), (self.variance,), self.classifier), strict=True)


_PARTS = ("layers", "mean", "variance", "classifier")
_FACTS = ("n_genes", "variance_activation", "variance_eps", "log_variational", "logistic_normal", "labels")


def _pack(layer: Layer, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Put a layer's tensors under names, and say what else it is."""
    tensors[f"{name}.weight"], tensors[f"{name}.bias"] = layer.weight.contiguous(), layer.bias
    for i, table in enumerate(layer.tables):
        if table is not None:
            tensors[f"{name}.table.{i}"] = table
    if layer.norm is not None:
        tensors[f"{name}.norm.weight"], tensors[f"{name}.norm.bias"] = layer.norm
    return {"tables": len(layer.tables), "norm_eps": layer.norm_eps, "activation": layer.activation}


def _unpack(told: Mapping[str, Any], name: str, tensors: Mapping[str, torch.Tensor]) -> Layer:
    tables = tuple(tensors.get(f"{name}.table.{i}") for i in range(told["tables"]))
    norm = (tensors[f"{name}.norm.weight"], tensors[f"{name}.norm.bias"]) if f"{name}.norm.weight" in tensors else None
    weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    return Layer(weight, bias, tables, norm, told["norm_eps"], told["activation"])


def fold_encoder(
    encoder: Any, n_genes: int, *, log_variational: bool, embedding: torch.Tensor | None = None
) -> Network:
    """Take the arithmetic out of scvi-tools' ``Encoder``, in evaluation mode.

    Parameters
    ----------
    encoder
        ``module.z_encoder`` of a loaded model.
    n_genes
        Genes of the model; further inputs of its first layer are continuous covariates, then a batch embedding.
    log_variational
        Whether counts pass through ``log1p`` first.
    embedding
        float32, shape ``(n_batches, n_dimensions)``: the batch embedding, where the model has one.

    Raises
    ------
    UnsupportedModelError
        If it activates with a function that cannot be written down by name.
    """
    layers = fold_layers(encoder.encoder)
    if embedding is not None:
        first = layers[0]
        split = first.weight.shape[1] - embedding.shape[1]
        table = embedding.detach() @ first.weight[:, split:].T
        layers[0] = replace(first, weight=first.weight[:, :split].contiguous(), tables=(table, *first.tables))
        layers[1:] = [replace(layer, tables=(None, *layer.tables)) for layer in layers[1:]]
    variance = next((name for name, known in _VARIANCES.items() if known is encoder.var_activation), None)
    if variance is None:
        raise _unnamed(encoder.var_activation)
    return Network(
        tuple(layers),
        fold_linear(encoder.mean_encoder),
        fold_linear(encoder.var_encoder),
        n_genes,
        variance,
        float(encoder.var_eps),
        log_variational=log_variational,
        logistic_normal=isinstance(encoder.z_transformation, nn.Softmax),
    )


def fold_layers(layers: Any) -> list[Layer]:
    """Split scvi-tools' ``FCLayers``, in evaluation mode, into their parts.

    Raises
    ------
    UnsupportedModelError
        If they activate with a function that cannot be written down by name.
    """
    folded = []
    for i, modules in enumerate(layers.fc_layers):
        linear, norm, layer_norm, activation = list(modules)[:4]
        injected = layers.inject_into_layer(i)
        layer = fold_linear(linear)
        weight, bias = layer.weight, layer.bias
        if norm is not None:
            scale = norm.weight.detach() / torch.sqrt(norm.running_var + norm.eps)
            weight, bias = weight * scale[:, None], (bias - norm.running_mean) * scale + norm.bias.detach()
        n_in = linear.in_features - (layers.n_cov if injected else 0)
        tables, column = [], n_in
        for n in layers.n_cat_list:
            used = injected and n > 0
            tables.append(weight[:, column : column + n].T.contiguous() if used else None)
            column += n if used else 0
        name = "" if activation is None else repr(activation)
        if name and name not in _ACTIVATIONS:
            raise _unnamed(activation)
        own = None
        if layer_norm is not None:
            plain = layer_norm.weight is None
            ones = (torch.ones_like(bias), torch.zeros_like(bias))
            own = ones if plain else (layer_norm.weight.detach().clone(), layer_norm.bias.detach().clone())
        eps = 0.0 if layer_norm is None else float(layer_norm.eps)
        folded.append(Layer(weight[:, :n_in].contiguous(), bias, tuple(tables), own, eps, name))
    return folded


def fold_linear(linear: Any) -> Layer:
    """A linear layer without anything behind it."""
    weight = linear.weight.detach().clone()
    return Layer(weight, linear.bias.detach().clone() if linear.bias is not None else weight.new_zeros(len(weight)))


def _unnamed(function: object) -> UnsupportedModelError:
    remedy = f"Known: {', '.join([*_ACTIVATIONS, *_VARIANCES])}."
    return UnsupportedModelError(f"The model activates with {function!r}, which is not known here.", remedy)
