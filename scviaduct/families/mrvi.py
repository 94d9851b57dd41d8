"""MRVI (Boyeau et al., Nature Methods 2025): cell states that samples share, and what each sample makes of them.

``u`` is a cell's state without the effect of its sample, and the latent that cells are placed by; ``z`` is ``u`` with
that effect. Both encoders read the sample, so a cell of a sample that the model does not know cannot be encoded.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, override

import numpy as np
import torch
from torch import nn

from scviaduct.errors import InputError, UnsupportedModelError
from scviaduct.families.attention import Conditional, SampleAttention, Weights, residuals
from scviaduct.families.base import Covariates, Encoded, Facts, Family, Needs
from scviaduct.families.columns import obs_column, require_read
from scviaduct.families.network import Bundle, Network, behind
from scviaduct.families.precision import exactly
from scviaduct.families.registered import common_facts, registry_of, state_of, texts
from scviaduct.families.rowwise import padded, rows_of
from scviaduct.families.scvi import model_arguments
from scviaduct.families.shapes import require_shape
from scviaduct.families.slots import BATCH, SAMPLE, Slot
from scviaduct.families.sparse import CELLS, GPU_CELLS, SparseEncoder
from scviaduct.values import GeneTable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from anndata import AnnData

    from scviaduct.families.base import Encoder
    from scviaduct.families.recipe import Recipe
    from scviaduct.references.saved.archive import SavedModel
    from scviaduct.values import FloatArray, IntArray, LongArray

_NAMES = ("MRVI", "TorchMRVI")
"""What scvi-tools called the class since it is one of PyTorch."""
_OF_JAX = ("0.", "1.0.", "1.1.", "1.2.", "1.3.")
"""Versions whose MRVI was one of JAX."""
_OLD_ATTENTION = "qz.attention_block.attention.in_proj_weight"
"""A weight of scvi-tools up to 1.4.2, whose attention differs from that of 1.5.1 in layers, norms and activation."""
_AGAIN = "Train it again with a current scvi-tools: scviaduct train --family MRVI."
_SCALE_EPS = 1e-5
_NORMS = ("gamma_embedding", "beta_embedding")
SAMPLE_ROWS = (
    *(f"qu.conditional_norm{i}.{part}.weight" for i in (1, 2) for part in _NORMS),
    *("qu.sample_embed.weight", "qz.embedding.weight"),
)
"""Tensors of the encoders that have a row a sample."""
_UNTAKEN = (
    "n_sample",
    "n_obs_per_sample",
    # scvi-tools 1.5.1 fails in the first step without the mixture, which takes the exponential of a float.
    "u_prior_mixture",
    "u_prior_scale",
)


class MrviFamily(Family):
    """The family of ``scvi.external.MRVI``, as scvi-tools 1.5 builds it."""

    name = "MRVI"
    module = "scvi.external"
    about = "A latent of cell states without the effect of samples (donors), and one with it, to compare samples by."
    needs = Needs(sample=True, size_factor=False, covariates=False)
    warmup = 20
    parts = ("qu px", "qz u_prior_logits u_prior_means u_prior_scales pz_scale")
    surgery = "of scviaduct alone: scvi-tools' own leaves no parameter of an MRVI to train"

    @override
    def facts(self, saved: SavedModel) -> Facts:
        """What a saved MRVI is; of batch and sample, its encoders read the sample alone.

        Raises
        ------
        UnsupportedModelError
            If it is of JAX or of the first scvi-tools 1.4, or if weights and registry do not add up.
        """
        registry = _registry(saved)
        if isinstance(saved.var_names, dict):
            raise UnsupportedModelError("The MRVI was set up from several modalities.", "Train it from one AnnData.")
        genes = texts(saved.var_names)
        samples = texts(state_of(registry, "sample").get("categorical_mapping", ()))
        sizes = _latents(saved, len(genes), len(samples))
        key = registry.get("setup_args", {}).get("sample_key") or ""
        return Facts(
            genes=GeneTable({"index": genes}, ("rna",) * len(genes)),
            n_latent=sizes["u"],
            latent_sizes=sizes,
            encode_covariates=True,
            batch_encoded=False,
            sample_key=key,
            sample_categories=samples if key else (),
            **common_facts(registry),
        )

    @override
    def model_class(self) -> Any:
        from scvi.external import MRVI

        return MRVI

    @override
    def setup(self, cells: AnnData, recipe: Recipe) -> Any:
        """Register training cells.

        Raises
        ------
        InputError
            If there is no sample column, or fewer than two samples in it, or if the recipe names what an MRVI does not
            read.
        """
        require_read(self, recipe)
        if not recipe.sample_key:
            raise InputError(
                "An MRVI compares samples, and no column of them is named.", "Name one: --sample-key donor."
            )
        values = obs_column(cells, recipe.sample_key, f"--sample-key {recipe.sample_key}")
        if values.isna().any():
            told = f"{int(values.isna().sum()):,} of {cells.n_obs:,} cells have no value in it"
            raise InputError(f"--sample-key {recipe.sample_key}: {told}.", "Fill them, or leave those cells out.")
        if values.nunique() < 2:
            told = f"all cells are of the sample '{values.iloc[0]}'"
            raise InputError(f"--sample-key {recipe.sample_key}: {told}.", "Name another column, or train an SCVI.")
        return super().setup(cells, recipe)

    @override
    def fold(self, model: Any, facts: Facts, device: str) -> Encoder:
        from scvi.external.mrvi import _components

        module = model.module
        used = {module.qu.activation, module.qz.activation}
        if used != {_components._gelu}:  # noqa: SLF001 - it has no other name
            told = ", ".join(sorted(repr(function) for function in used))
            raise UnsupportedModelError(f"The MRVI activates with {told}, which is not known here.", _AGAIN)
        # The decoder, the priors and the number of cells per sample, which scvi-tools counts anew, are left out.
        kept = {key: tensor for key, tensor in module.state_dict().items() if key.startswith(("qu.", "qz."))}
        return MrviEncoder({key: tensor.detach().clone() for key, tensor in kept.items()}, device)

    @override
    def open(self, path: Path, device: str) -> Encoder:
        return MrviEncoder.open(path, device)

    @override
    def layout(self, saved: SavedModel, cells: AnnData) -> Any:
        data = super().layout(saved, cells)
        data.obs["_indices"] = np.arange(data.n_obs)  # scvi-tools numbers training cells, and asks others for it
        return data

    @override
    def slots(self, model: Any, facts: Facts) -> tuple[Slot, ...]:
        """Rows of embeddings: of the sample in both encoders, of the batch in the decoder."""
        weights = model.module.state_dict()
        told = [(SAMPLE, name) for name in SAMPLE_ROWS if facts.sample_key]
        told += [(BATCH, "px.batch_embedding.weight")] if facts.batch_key else []
        return tuple(Slot(name, 0, 0, len(weights[name]), of) for of, name in told)

    @override
    def trained(self, new: tuple[str, ...]) -> tuple[str, ...]:
        """All: no layer adds what it knows of the sample to what it knows of the batch."""
        return new

    @override
    def loss(self, module: Any, tensors: Mapping[str, Any], kl_weight: float = 1.0) -> Any:
        """The loss of scvi-tools without labels: they would choose the component of the prior, and a query has none."""
        labels, module.n_labels = module.n_labels, 1
        try:
            return super().loss(module, tensors, kl_weight)
        finally:
            module.n_labels = labels

    @override
    def arguments(self) -> Mapping[str, Any]:
        from scvi.external.mrvi import MRVAE

        return model_arguments(MRVAE.__init__, without=_UNTAKEN)


def _registry(saved: SavedModel) -> dict[str, Any]:
    """The registry of an MRVI that scvi-tools of today could have written."""
    found = saved.attr_dict.get("registry_")
    told = found if isinstance(found, dict) else {}
    name, version = told.get("model_name"), str(told.get("scvi_version", ""))
    if name == "JaxMRVI" or (name in _NAMES and version.startswith(_OF_JAX)):
        raise UnsupportedModelError(
            f"The {name} was saved by scvi-tools {version or 'of old'} as a model of JAX, which scvi-tools has given up"
            " in 1.5.",
            _AGAIN,
        )
    registry = registry_of(saved, name if name in _NAMES else _NAMES[0])
    if _OLD_ATTENTION in saved.state_dict:
        raise UnsupportedModelError(
            f"The {name} was saved by scvi-tools {version}, whose attention ('{_OLD_ATTENTION}') is built otherwise"
            " than today's.",
            _AGAIN,
        )
    return registry


def _latents(saved: SavedModel, genes: int, samples: int) -> dict[str, int]:
    """Sizes of ``u`` and ``z``, if the weights are those of so many genes and samples."""

    def shape(parameter: str, *sizes: int | None) -> tuple[int, ...]:
        return require_shape(saved, "MRVI", parameter, *sizes)

    hidden, _ = shape("qu.fc1.weight", None, genes)
    shape("qu.sample_embed.weight", samples, hidden)
    for norm in ("conditional_norm1", "conditional_norm2"):
        shape(f"qu.{norm}.gamma_embedding.weight", samples, hidden)
        shape(f"qu.{norm}.beta_embedding.weight", samples, hidden)
    u, _ = shape("qu.output_nn.fc_mean.weight", None, None)
    shape("qz.embedding.weight", samples, None)
    # Without a layer from u to z, they are of one size.
    z = shape("qz.fc.weight", None, u)[0] if "qz.fc.weight" in saved.state_dict else u
    residual = "qz.attention_block.mlp_residual.fc.weight"
    if shape(residual, None, None)[0] != 2 * z:  # it is where z has a posterior (use_map=False)
        shape(residual, z, None)
    return {"u": u, "z": z}


@dataclass(frozen=True, slots=True)
class _Posterior(Network):
    """A network that gives a scale instead of a variance."""

    @override
    def positive(self, values: torch.Tensor) -> torch.Tensor:
        return Network.positive(self, values).square()


def _network(weights: Weights) -> Network:
    """From counts to ``u``: scvi-tools' ``EncoderXU``."""
    layers = []
    for i in (1, 2):
        layer, norm = weights.linear(f"fc{i}"), weights.under(f"conditional_norm{i}")
        effect = weights["sample_embed.weight"] if i == 2 else None
        gamma, beta = norm["gamma_embedding.weight"], norm["beta_embedding.weight"]
        layers.append(Conditional(layer.weight, layer.bias, gamma=gamma, beta=beta, effect=effect))
    out = weights.under("output_nn")
    blocks = residuals(out, nn.functional.relu)
    return _Posterior(
        (*layers, *blocks), out.linear("fc_mean"), out.linear("fc_scale.0"), layers[0].weight.shape[1],
        variance_activation="softplus", variance_eps=_SCALE_EPS,
    )  # fmt: skip


class MrviEncoder:
    """Encodes sparse counts into ``u`` and ``z``.

    Parameters
    ----------
    tensors
        Weights of the encoders ``qu`` and ``qz``, by the names of scvi-tools.
    device
        ``"cpu"`` or a CUDA device.
    """

    latents: tuple[str, ...] = ("u", "z")
    labels: tuple[str, ...] = ()
    arithmetic = "PyTorch: attention over samples has no compiled kernel"

    def __init__(self, tensors: Mapping[str, torch.Tensor], device: str = "cpu") -> None:
        self._tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        self._device = device
        weights = Weights(self._tensors)
        self._network = _network(weights.under("qu"))
        self._to_u = SparseEncoder(self._network)
        with torch.inference_mode(), exactly(device):
            self._to_z = SampleAttention(weights.under("qz"))
        self._n_samples = len(weights["qz.embedding.weight"])
        self._step = CELLS if device == "cpu" else GPU_CELLS
        self.n_latent = len(self._network.mean.bias)

    @classmethod
    def open(cls, path: Path, device: str) -> Self:
        """Read what :meth:`save` wrote."""
        return cls(Bundle.load(path, device).tensors, device)

    def save(self, path: Path) -> None:
        """Write what encoding needs, for a process without scvi-tools."""
        Bundle(tensors={name: tensor.to("cpu") for name, tensor in self._tensors.items()}).save(path)

    def rows(self, covariate: str, code: int, columns: Sequence[str] = ()) -> dict[str, torch.Tensor]:  # noqa: ARG002
        """What both encoders look up for a sample, by the names of scvi-tools: see :meth:`Encoder.rows`."""
        return {name: self._tensors[name][code].clone() for name in SAMPLE_ROWS} if covariate == SAMPLE else {}

    def extended(
        self,
        more: Mapping[str, Sequence[Mapping[str, torch.Tensor]]],
        columns: Sequence[str] = (),  # noqa: ARG002 - what every encoder takes
    ) -> Self:
        """The encoder with further samples: see :meth:`Encoder.extended`."""
        other, samples = copy.copy(self), more.get(SAMPLE, ())
        if samples:
            tensors = self._tensors | {name: behind(name, self._tensors[name], samples) for name in SAMPLE_ROWS}
            weights = Weights(tensors)
            network, embedding = _network(weights.under("qu")), weights["qz.embedding.weight"]
            with torch.inference_mode(), exactly(self._device):
                to_z = self._to_z.extended(weights.under("qz"), embedding[self._n_samples :])
            changed = {"_tensors": tensors, "_network": network, "_to_u": self._to_u.reading(network), "_to_z": to_z}
            vars(other).update(changed, _n_samples=len(embedding))
        return other

    @torch.inference_mode()
    def encode(self, indptr: LongArray, indices: IntArray, data: FloatArray, covariates: Covariates) -> Encoded:
        """Encode counts given as CSR in the reference's genes, some cells at a time.

        Parameters
        ----------
        indptr, indices, data
            int64 of shape ``(n_cells + 1,)``, int32 and float32 of shape ``(nnz,)``.
        covariates
            The sample of each cell; it may be left out where the model knows one only.

        Raises
        ------
        InputError
            If the samples are needed and not given.
        """
        n_cells = len(indptr) - 1
        samples = self._samples(covariates, n_cells)
        found: list[tuple[torch.Tensor, ...]] = []
        for start in range(0, max(n_cells, 1), self._step):
            stop = min(start + self._step, n_cells)
            low, high = int(indptr[start]), int(indptr[stop])
            # Blocks come out of the object store read-only; torch warns of sharing such memory, so it is copied.
            rows = rows_of(stop - start, self._step, self._device)
            pointers, sample = padded(indptr[start : stop + 1] - low, rows + 1), padded(samples[start:stop], rows)
            parts = (pointers, indices[low:high], data[low:high], sample)
            pointers, genes, counts, sample = (torch.tensor(part, device=self._device) for part in parts)
            with exactly(self._device):
                u, variance = self._to_u(pointers, genes, counts, [sample])
                z = self._to_z(u, sample)
            found.append(tuple(part[: stop - start] for part in (u, variance, z)))
        u, variance, z = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
        return Encoded(u, u, variance, {"z": z})

    def _samples(self, covariates: Covariates, n_cells: int) -> LongArray:
        if covariates.sample is not None:
            return covariates.sample
        if self._n_samples > 1:
            raise InputError(
                f"An MRVI of {self._n_samples} samples reads the sample of every cell, and none was given.",
                "Name the cells' samples in the obs column that the reference was trained with.",
            )
        return np.zeros(n_cells, np.int64)

    def transformed(self, location: FloatArray) -> FloatArray:
        """Itself: ``u`` is normal."""
        return location

    def classify(self, location: FloatArray) -> FloatArray | None:  # noqa: ARG002 - what every encoder takes
        """None: an MRVI has no classifier."""
        return None

    def gene_influence(self) -> FloatArray:
        """L2 norm of each gene's first-layer weights, shape ``(n_genes,)``."""
        found: FloatArray = self._network.layers[0].weight.norm(dim=0).cpu().numpy()
        return found


FAMILY = MrviFamily()
