"""What MRVI's encoders are built of: layers normalised by sample, residual blocks, and attention to a sample.

Every part is made from tensors under the names that scvi-tools gives them in a module's weights, which say all of its
sizes; epsilons and activations are those of ``scvi.external.mrvi``.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, override

import torch
from torch import nn

from scviaduct.families.network import Layer
from scviaduct.families.rowwise import elementwise

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

NORM_EPS = 1e-6
"""Of every layer norm."""


def gelu(values: torch.Tensor) -> torch.Tensor:
    """GELU in its approximation by tanh, as Flax has it."""
    return elementwise(_gelu, values)


def _gelu(values: torch.Tensor) -> torch.Tensor:
    return nn.functional.gelu(values, approximate="tanh")


@dataclass(frozen=True, slots=True)
class Weights:
    """Tensors whose names begin with a prefix.

    Attributes
    ----------
    tensors
        By full name.
    prefix
        Of the names, with the dot behind it.
    """

    tensors: Mapping[str, torch.Tensor]
    prefix: str = ""

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[self.prefix + name]

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        return self.prefix + name in self.tensors

    def under(self, name: str) -> Weights:
        """Those of a part."""
        return Weights(self.tensors, f"{self.prefix}{name}.")

    def linear(self, name: str, norm: str = "") -> Layer:
        """A linear layer, with the layer norm of another name behind it."""
        weight = self[f"{name}.weight"]
        bias = self[f"{name}.bias"] if self.has(f"{name}.bias") else weight.new_zeros(len(weight))
        told = (self[f"{norm}.weight"], self[f"{norm}.bias"]) if norm else None
        return Layer(weight, bias, norm=told, norm_eps=NORM_EPS)

    def normalised(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Values through a layer norm."""
        weight = self[f"{name}.weight"]
        return nn.functional.layer_norm(values, weight.shape, weight, self[f"{name}.bias"], NORM_EPS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditional(Layer):
    """A layer normalised without parameters, then scaled and shifted by those of each cell's sample; GELU behind it.

    Attributes
    ----------
    gamma, beta
        float32, shape ``(n_samples, n_out)``: scale and shift.
    effect
        float32, same shape: what each sample adds behind the activation; None for nothing.
    """

    gamma: torch.Tensor
    beta: torch.Tensor
    effect: torch.Tensor | None = None

    @override
    def finish(self, out: torch.Tensor, codes: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        """Normalise by the sample, which is the one code, and activate."""
        (sample,) = codes
        out = nn.functional.layer_norm(out, self.bias.shape, eps=NORM_EPS)
        out = gelu(self.gamma[sample] * out + self.beta[sample])
        return out if self.effect is None else out + self.effect[sample]


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual(Layer):
    """Two layers, each normalised and activated; what goes in is added between them.

    Attributes
    ----------
    last
        The second layer.
    match
        What brings the input to the width of the first layer's output; None where it has it.
    activate
        Activation of both.
    """

    last: Layer
    match: Layer | None
    activate: Callable[[torch.Tensor], torch.Tensor]

    @classmethod
    def of(cls, weights: Weights, activate: Callable[[torch.Tensor], torch.Tensor]) -> Residual:
        """Made of scvi-tools' ``ResnetBlock``."""
        first = weights.linear("fc1", "layer_norm1")
        return cls(
            first.weight,
            first.bias,
            norm=first.norm,
            norm_eps=first.norm_eps,
            last=weights.linear("fc2", "layer_norm2"),
            match=weights.linear("fc_match") if weights.has("fc_match.weight") else None,
            activate=activate,
        )

    @override
    def __call__(self, values: torch.Tensor, codes: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        hidden = self.activate(Layer.__call__(self, values))
        hidden = hidden + (values if self.match is None else self.match(values))
        return self.activate(self.last(hidden))


def residuals(weights: Weights, activate: Callable[[torch.Tensor], torch.Tensor]) -> tuple[Residual, ...]:
    """The blocks of scvi-tools' ``MLP`` or ``NormalDistOutputNN``."""
    found: list[Residual] = []
    while weights.has(f"resnet_blocks.{len(found)}.fc1.weight"):
        found.append(Residual.of(weights.under(f"resnet_blocks.{len(found)}"), activate))
    return tuple(found)


class SampleAttention:
    """From ``u``, which knows no sample, to ``z``, which does: ``z = base(u) + residual(u, sample)``.

    Keys and values depend on the sample alone; they are computed once.

    Parameters
    ----------
    weights
        Of scvi-tools' ``EncoderUZ``.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._base = weights.linear("fc") if weights.has("fc.weight") else None
        block = weights.under("attention_block")
        self._query, self._queries = block.linear("query_proj"), block.linear("q_proj")
        self._out = block.linear("out_proj")
        self._channels = len(self._out.bias)
        self._before = (*residuals(block.under("mlp_eps"), gelu), block.under("mlp_eps").linear("fc"))
        self._behind = (*residuals(block.under("mlp_residual"), gelu), block.under("mlp_residual").linear("fc"))
        self._keys, self._values = self._looked_up(weights["embedding.weight"])

    def extended(self, weights: Weights, more: torch.Tensor) -> Self:
        """Attention to further samples behind those that are known.

        Parameters
        ----------
        weights
            With the embedding of all samples.
        more
            float32, shape ``(n_further_samples, size)``: the embedding of the further ones.
        """
        keys, values = self._looked_up(more)
        other = copy.copy(self)
        vars(other).update(
            _weights=weights, _keys=torch.cat([self._keys, keys]), _values=torch.cat([self._values, values])
        )
        return other

    def _looked_up(self, embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of samples."""
        block = self._weights.under("attention_block")
        embedded = self._weights.normalised("layer_norm_embed", embedding)
        samples = block.linear("kv_proj")(embedded).unsqueeze(-1)
        return self._heads(block.linear("k_proj")(samples)), self._heads(block.linear("v_proj")(samples))

    def _heads(self, projected: torch.Tensor) -> torch.Tensor:
        """From ``(n, outer, heads * channels)`` to ``(n, heads, outer, channels)``."""
        return projected.unflatten(-1, (-1, self._channels)).transpose(1, 2)

    def __call__(self, u: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """``z`` of cells.

        Parameters
        ----------
        u
            float32, shape ``(n_cells, n_latent_u)``.
        sample
            int64, shape ``(n_cells,)``.

        Returns
        -------
        torch.Tensor
            float32, shape ``(n_cells, n_latent)``; the posterior's mean, where the model has a posterior of it.
        """
        normalised = self._weights.normalised("layer_norm", u)
        queries = self._heads(self._queries(self._query(normalised).unsqueeze(-1)))
        told = nn.functional.scaled_dot_product_attention(queries, self._keys[sample], self._values[sample])
        out = self._out(told.transpose(1, 2).flatten(2)).flatten(1)
        for layer in self._before:
            out = layer(out)
        out = torch.cat([normalised, out], dim=-1)
        for layer in self._behind:
            out = layer(out)
        base = u if self._base is None else self._base(u)
        # A model with use_map=False gives the scale of the residual's posterior behind its mean.
        return base + out[:, : base.shape[1]]
