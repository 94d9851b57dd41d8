"""What an encoder of scvi-tools computes, as tensors and a few facts: no class of scvi-tools, and no pickle.

Importing scvi-tools takes 9 CPU-seconds (30 without compiled bytecode), and a pickle can run anything. A package
therefore holds the networks that its model encodes with as safetensors; only whoever makes or verifies a package loads
the model itself, and :mod:`scviaduct.families.folding` takes them out of it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from scviaduct.errors import InputError, PackageError
from scviaduct.families.rowwise import elementwise, linear

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

_FORMAT = "2"
ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    repr(module): module
    for module in (nn.ReLU(), nn.LeakyReLU(), nn.ELU(), nn.GELU(), nn.SiLU(), nn.Softplus(), nn.Tanh())
}
VARIANCES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "exp": torch.exp,
    "softplus": nn.functional.softplus,
}


def behind(name: str, known: torch.Tensor, more: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
    """The rows of known categories, and those of further ones behind them.

    Parameters
    ----------
    name
        Of the rows.
    known
        float32, shape ``(n_categories, size)``.
    more
        For each further category, rows by name: float32 of shape ``(size,)``, on any device.

    Raises
    ------
    InputError
        If a category has no row of that name, or one of another size.
    """
    for rows in more:
        if name not in rows or tuple(rows[name].shape) != tuple(known.shape[1:]):
            told = f"has the shape {tuple(rows[name].shape)}" if name in rows else "is missing"
            raise InputError(
                f"A category's row '{name}' {told}, and the encoder has rows of the shape {tuple(known.shape[1:])}.",
                "It was fitted on another reference: fit it on this one.",
            )
    return torch.cat([known, *(rows[name].to(known)[None] for rows in more)])


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
        return elementwise(ACTIVATIONS[self.activation], out) if self.activation else out

    def __call__(self, values: torch.Tensor, codes: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        """Apply to dense values of shape ``(n_cells, n_in)``."""
        return self.finish(linear(values, self.weight, self.bias), codes)

    def extended(self, prefix: str, table: int, more: Sequence[Mapping[str, torch.Tensor]]) -> Self:
        """The layer with further categories of a covariate behind its own; all other tensors are shared.

        Parameters
        ----------
        prefix
            What the names of the layer's rows begin with.
        table
            Position of the covariate among the tables.
        more
            Rows of each category by name, as :meth:`rows` gives them.
        """
        name = f"{prefix}.table.{table}"
        known = self.tables[table] if table < len(self.tables) else None
        if table >= len(self.tables) or (known is None and not any(name in rows for rows in more)):
            return self
        if known is None:  # a covariate of one category adds nothing until there is another
            known = self.bias.new_zeros(1, len(self.bias))
        tables = (*self.tables[:table], behind(name, known, more), *self.tables[table + 1 :])
        return replace(self, tables=tables)

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
        Features, the first inputs of the first layer.
    offset
        Where they begin among the reference's features.
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
    offset: int = 0

    def positive(self, values: torch.Tensor) -> torch.Tensor:
        """Variance from what its layer gives."""
        return elementwise(VARIANCES[self.variance_activation], values) + self.variance_eps

    def rows(self, table: int, code: int, prefix: str = "") -> dict[str, torch.Tensor]:
        """What the layers look up for a category.

        Parameters
        ----------
        table
            Position of the covariate: the batch is 0, categorical covariates follow.
        code
            Position of the category.
        prefix
            What the names begin with.

        Returns
        -------
        dict
            ``{prefix}layers.{i}.table.{table}`` to float32 of shape ``(n_out,)``, for the layers that read it.
        """
        return {
            f"{prefix}layers.{i}.table.{table}": known[code].clone()
            for i, layer in enumerate(self.layers)
            if table < len(layer.tables) and (known := layer.tables[table]) is not None
        }

    def extended(self, table: int, more: Sequence[Mapping[str, torch.Tensor]], prefix: str = "") -> Self:
        """The network with further categories of a covariate behind its own; all but its tables are shared."""
        layers = tuple(layer.extended(f"{prefix}layers.{i}", table, more) for i, layer in enumerate(self.layers))
        return replace(self, layers=layers)

    def to(self, device: str) -> Self:
        """The network on a device."""
        return replace(
            self,
            layers=tuple(layer.to(device) for layer in self.layers),
            mean=self.mean.to(device),
            variance=self.variance.to(device),
            classifier=tuple(layer.to(device) for layer in self.classifier),
        )

    def _packed(self, prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Put the tensors under names that begin with a prefix, and say what else the network is."""
        facts = {name: getattr(self, name) for name in _FACTS}
        for part, layers in zip(_PARTS, (self.layers, (self.mean,), (self.variance,), self.classifier), strict=True):
            facts[part] = [_pack(layer, f"{prefix}{part}.{i}", tensors) for i, layer in enumerate(layers)]
        return facts

    @classmethod
    def _unpacked(cls, prefix: str, facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Self:
        parts = {
            part: tuple(_unpack(told, f"{prefix}{part}.{i}", tensors) for i, told in enumerate(facts[part]))
            for part in _PARTS
        }
        (mean,), (variance,) = parts["mean"], parts["variance"]
        own = {name: facts[name] for name in _FACTS} | {"labels": tuple(facts["labels"])}
        return cls(layers=parts["layers"], mean=mean, variance=variance, classifier=parts["classifier"], **own)


@dataclass(frozen=True, slots=True)
class Bundle:
    """What an encoder's file holds.

    Attributes
    ----------
    networks
        Name to network; for a model of one, the name of its latent.
    tensors
        What a family keeps besides.
    facts
        JSON-serialisable; what else the family's encoder is made from.
    """

    networks: Mapping[str, Network] = field(default_factory=dict)
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write everything as safetensors, facts as JSON in the file's metadata."""
        tensors = {f"{_EXTRA}{name}": tensor.contiguous() for name, tensor in self.tensors.items()}
        networks = {name: network._packed(f"{name}/", tensors) for name, network in self.networks.items()}  # noqa: SLF001
        told = {"format": _FORMAT, "networks": networks, "facts": dict(self.facts)}
        # One entry: safetensors writes several in an order of chance, and the same model would have two digests.
        save_file(tensors, path, metadata={"encoder": json.dumps(told)})

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> Self:
        """Read what :meth:`save` wrote.

        Raises
        ------
        PackageError
            If the file is not one.
        """
        try:
            with safe_open(path, framework="pt", device=device) as file:
                told = json.loads(file.metadata()["encoder"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            networks = {
                name: Network._unpacked(f"{name}/", facts, tensors)  # noqa: SLF001
                for name, facts in told["networks"].items()
            }
            extra = {name.removeprefix(_EXTRA): t for name, t in tensors.items() if name.startswith(_EXTRA)}
            return cls(networks, extra, told["facts"])
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, OSError) as error:
            raise PackageError(f"{path} holds no encoder ({error}).", "Add the reference again.") from error


_EXTRA = "tensor/"
_PARTS = ("layers", "mean", "variance", "classifier")
_FACTS = ("n_genes", "variance_activation", "variance_eps", "log_variational", "logistic_normal", "labels", "offset")


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
