"""Taking the arithmetic out of modules of scvi-tools, in evaluation mode.

Batch normalisation in evaluation mode is affine and is folded into the weights; a batch embedding, which the first
layer multiplies with a part of its weights, becomes that product.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from scviaduct.errors import UnsupportedModelError
from scviaduct.families.network import ACTIVATIONS, VARIANCES, Layer, Network

if TYPE_CHECKING:
    from collections.abc import Iterable


def reads_covariates(name: str, width: int, n_features: int, n_continuous: int, categories: Iterable[int]) -> bool:
    """Whether a first layer reads covariates, which scvi-tools lays behind the features.

    Parameters
    ----------
    name
        Of the class, for the error.
    width
        Inputs of the layer.
    n_features, n_continuous, categories
        What was registered: features, continuous covariates, and the categories of each categorical one. One of a
        single category tells nothing, and has no input.

    Raises
    ------
    UnsupportedModelError
        If the layer is neither as wide as the features alone nor as wide as all of it.
    """
    n_covariates = n_continuous + sum(size for size in categories if size > 1)
    if width not in (n_features, n_features + n_covariates):
        raise UnsupportedModelError(
            f"The first layer of the {name} has {width:,} inputs, and its registry names {n_features:,} features and"
            f" {n_covariates:,} inputs for covariates.",
            "The folder holds the weights of one model and the registry of another; take it from its publisher again.",
        )
    return width > n_features


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
    variance = next((name for name, known in VARIANCES.items() if known is encoder.var_activation), None)
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
        if name and name not in ACTIVATIONS:
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
    remedy = f"Known: {', '.join([*ACTIVATIONS, *VARIANCES])}."
    return UnsupportedModelError(f"The model activates with {function!r}, which is not known here.", remedy)
