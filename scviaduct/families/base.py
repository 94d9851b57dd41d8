"""What a model family owes the rest: facts of a saved model, an encoder for it, and how it is set up and trained.

Cells are *flat* outside of a family: one AnnData whose ``var["modality"]`` says what each feature is, modality after
modality in the order of the reference. What scvi-tools wants instead (a MuData, proteins in ``obsm``) is made of them,
and read back, by the family alone: :meth:`Family.layout` and :meth:`Family.flatten`.
"""

from __future__ import annotations

import abc
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch
    from anndata import AnnData

    from scviaduct.families.recipe import Recipe
    from scviaduct.families.slots import Slot
    from scviaduct.references.saved.archive import SavedModel
    from scviaduct.values import FloatArray, GeneTable, IntArray, LongArray

MODALITY = "modality"
"""var column of flat cells."""
KERNELS = "compiled kernels"
"""The fast path of an encoder (:mod:`scviaduct.families.compiled`)."""


@dataclass(frozen=True, slots=True)
class Covariates:
    """Covariates of a block's cells, as far as the encoder reads them.

    Attributes
    ----------
    batch
        int64, shape ``(n_cells,)``; position in the reference's batch categories.
    categorical
        int64, shape ``(n_cells, n_categorical)``; positions in each covariate's categories.
    continuous
        float32, shape ``(n_cells, n_continuous)``.
    sample
        int64, shape ``(n_cells,)``; position in the reference's samples.
    """

    batch: LongArray | None = None
    categorical: LongArray | None = None
    continuous: FloatArray | None = None
    sample: LongArray | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """What an encoder makes of a block.

    Attributes
    ----------
    mean
        float32, shape ``(n_cells, n_latent)``; the latent: the posterior's mean, transformed as the model does it.
    location, variance
        float32, same shape; mean and variance of the normal posterior. The location is the mean unless the latent is
        logistic-normal (often in the same array), and is what a classifier reads.
    others
        Name of each further latent (:attr:`Encoder.latents`) to its mean, float32 of shape ``(n_cells, size)``.
    """

    mean: FloatArray
    location: FloatArray
    variance: FloatArray
    others: Mapping[str, FloatArray] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a saved model is, read from what scvi-tools saved with it.

    Attributes
    ----------
    genes
        Features in the order of the first layer: genes, and behind them other modalities. The table's ``modality`` says
        which is which.
    n_latent
        Size of the latent.
    latent_sizes
        Name of every latent that the model gives to its size; the first is the one that cells are placed by.
    encode_covariates
        Whether the encoder reads batch, covariates or sample, judged by its weights; surgery can move a latent only
        then.
    scvi_version
        Version of scvi-tools that saved it.
    batch_key, sample_key, labels_key
        obs columns it was set up with; empty for none.
    batch_categories, sample_categories, labels
        As text. ``labels`` are those that a classifier gives, in its order; empty without one.
    known_labels
        Values that the training cells had in ``labels_key``, whether or not a classifier gives them.
    unlabeled_category
        Label that means none; empty for none.
    categorical_covariates
        Column to categories.
    continuous_covariates
        Columns.
    size_factor_key, layer
        As set up; empty for none.
    batch_encoded
        False for a model whose encoder reads other covariates, and never the batch (MRVI).
    """

    genes: GeneTable
    n_latent: int
    encode_covariates: bool
    scvi_version: str
    latent_sizes: Mapping[str, int] = field(default_factory=dict)
    batch_key: str = ""
    batch_categories: tuple[str, ...] = ()
    sample_key: str = ""
    sample_categories: tuple[str, ...] = ()
    labels_key: str = ""
    labels: tuple[str, ...] = ()
    known_labels: tuple[str, ...] = ()
    unlabeled_category: str = ""
    categorical_covariates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    continuous_covariates: tuple[str, ...] = ()
    size_factor_key: str = ""
    layer: str = ""
    batch_encoded: bool = True

    @property
    def encoded_batch(self) -> str:
        """obs column of the batch if the encoder reads it, else empty."""
        read = self.encode_covariates and self.batch_encoded and len(self.batch_categories) > 1
        return self.batch_key if read else ""  # a batch of one category has no input

    @property
    def encoded_sample(self) -> str:
        """obs column of the sample if the encoder reads it, else empty."""
        return self.sample_key if self.encode_covariates else ""

    @property
    def names(self) -> tuple[str, ...]:
        """Name of every feature, as the model has it."""
        return self.genes.columns["index"]

    def span(self, modality: str) -> slice:
        """Where the features of a modality lie."""
        told = self.genes.modality
        first = told.index(modality) if modality in told else 0
        return slice(first, first + told.count(modality))


@dataclass(frozen=True, slots=True)
class Needs:
    """What a family needs of its training cells.

    Attributes
    ----------
    modalities
        Canonical names (``rna``, ``protein``, ``atac``), in the order of the model's features.
    optional
        Those of them that may be absent.
    labels, sample, background, panel
        Whether it takes labels, a sample column, a split of the cells into background and target, and a column of
        protein panels.
    size_factor
        Whether it takes a size factor.
    covariates
        Whether it takes categorical and continuous covariates.
    """

    modalities: tuple[str, ...] = ("rna",)
    optional: tuple[str, ...] = ()
    labels: Literal["required", "kept"] = "kept"
    sample: bool = False
    background: bool = False
    panel: bool = False
    size_factor: bool = True
    covariates: bool = True


class Encoder(Protocol):
    """A loaded model that encodes blocks; deterministic, in evaluation mode."""

    n_latent: int
    latents: tuple[str, ...]
    """Names of the latents, the main one first."""
    labels: tuple[str, ...]
    """What :meth:`classify` gives, in its order; empty without a classifier."""

    @property
    def arithmetic(self) -> str:
        """What computes: :data:`KERNELS`, or what does instead and why, e.g. ``PyTorch: …``."""

    def encode(self, indptr: LongArray, indices: IntArray, data: FloatArray, covariates: Covariates) -> Encoded:
        """Encode counts given as CSR in the reference's features."""

    def transformed(self, location: FloatArray) -> FloatArray:
        """The latent of a posterior's mean: itself, unless the latent is logistic-normal."""

    def classify(self, location: FloatArray) -> FloatArray | None:
        """Probabilities of :attr:`labels`, shape ``(n_cells, n_labels)``, as scvi-tools' ``predict(soft=True)``."""

    def gene_influence(self) -> FloatArray:
        """How much each feature moves the encoder: shape ``(n_features,)``, L2 norm of its first-layer weights."""

    def save(self, path: Path) -> None:
        """Write what encoding needs, without anything that runs: :meth:`Family.open` reads it."""

    def rows(self, covariate: str, code: int, columns: Sequence[str] = ()) -> dict[str, torch.Tensor]:
        """What the encoder looks up for a category.

        Parameters
        ----------
        covariate
            ``batch``, ``sample`` or ``covariate:COLUMN`` (:mod:`scviaduct.families.slots`).
        code
            Position of the category among those of the covariate.
        columns
            Names of the categorical covariates, in the order of :attr:`Facts.categorical_covariates`: an encoder knows
            them by position alone.

        Returns
        -------
        dict
            Names, unique in the encoder, e.g. ``latent/layers.0.table.0``, to float32 of shape ``(size,)``. Empty if
            it does not read the covariate, or reads no difference because there is one category.
        """

    def extended(self, more: Mapping[str, Sequence[Mapping[str, torch.Tensor]]], columns: Sequence[str] = ()) -> Self:
        """The encoder with further categories, whose codes follow those that it has; this one stays as it is.

        Every tensor is shared but the tables, which are small, and have the given rows behind their own. A covariate of
        one category, which has no table, gets one: zeros for that category, then the given rows. Cells of categories
        that were known are encoded as before, to the bit.

        Parameters
        ----------
        more
            Covariate to what :meth:`rows` gives for each further category. A covariate that the encoder does not read
            is passed over.
        columns
            As for :meth:`rows`.

        Raises
        ------
        InputError
            If a row is missing or of another size.
        """


class Family(abc.ABC):
    """A model class of scvi-tools: one module each, which ends in ``FAMILY = …``."""

    name: ClassVar[str]
    """Name of the class, as scvi-tools saves it."""
    module: ClassVar[str] = "scvi.model"
    """Where scvi-tools has it."""
    about: ClassVar[str]
    """What it is for, in a line."""
    needs: ClassVar[Needs] = Needs()
    surgery: ClassVar[str] = "scvi-tools"
    """What can fit new batches: ``scvi-tools`` (``load_query_data``), or why not."""
    monitor: ClassVar[str] = "elbo_validation"
    """What early stopping watches."""
    starts_from: ClassVar[str] = ""
    """Family of the model that training starts from; empty for none."""

    warmup: ClassVar[int] = 400
    """Epochs over which scvi-tools, left to itself, raises the weight of the divergences to one."""

    parts: ClassVar[tuple[str, str]] = ("", "")
    """Parts of the module that the weights have, and those that they may have besides: the names before the first dot,
    with blanks between. Another class is known by them before anything is made of its weights; empty to leave that to
    the shapes."""

    @abc.abstractmethod
    def facts(self, saved: SavedModel) -> Facts:
        """What a saved model is.

        Raises
        ------
        UnsupportedModelError
            If the weights are not this family's, or it was set up in a way that cannot be mapped.
        """

    @abc.abstractmethod
    def model_class(self) -> Any:
        """The class of scvi-tools; imports it."""

    @abc.abstractmethod
    def fold(self, model: Any, facts: Facts, device: str) -> Encoder:
        """Take what encodes out of a model of scvi-tools in evaluation mode."""

    @abc.abstractmethod
    def open(self, path: Path, device: str) -> Encoder:
        """Read an encoder that :meth:`Encoder.save` wrote; needs no scvi-tools, whose import takes many seconds."""

    @abc.abstractmethod
    def arguments(self) -> Mapping[str, Any]:
        """Model arguments that training takes, with their defaults."""

    def load(self, saved: SavedModel, template: AnnData, device: str) -> Encoder:
        """Instantiate a saved model through scvi-tools, from flat template cells, and fold it."""
        return self.fold(self.instantiate(saved, template), self.facts(saved), device)

    def instantiate(self, saved: SavedModel, template: AnnData) -> Any:
        """The model of scvi-tools, in evaluation mode on the CPU, from checked parts and flat cells.

        Raises
        ------
        UnsupportedModelError
            If the weights do not fit the model that the registry describes.
        """
        from scviaduct.families.registered import own_categories
        from scviaduct.families.vae import instantiate

        cells = own_categories(saved.attr_dict["registry_"], template, self.facts(saved))
        return instantiate(self.model_class(), saved, self.layout(saved, cells))

    def layout(self, saved: SavedModel, cells: AnnData) -> Any:
        """Flat cells as the data that the model was set up with: an AnnData, or a MuData."""
        layer = saved.attr_dict["registry_"]["setup_args"].get("layer")
        if layer:
            cells.layers[layer] = cells.X.copy()
        return cells

    def flatten(self, saved: SavedModel, data: Any) -> AnnData | None:
        """Cells in the layout that the model was set up with as flat ones; ``X`` holds the layer it was trained on.

        None if they lack what the model was trained on.
        """
        layer = saved.attr_dict["registry_"]["setup_args"].get("layer")
        if not layer:
            return data
        if layer not in data.layers:
            return None
        flat = data.copy()
        flat.X = data.layers[layer]
        return flat

    def setup(self, cells: AnnData, recipe: Recipe) -> Any:
        """Register flat training cells with scvi-tools; what comes back is the data to create the model with."""
        model_class = self.model_class()
        options: dict[str, Any] = {"batch_key": recipe.batch_key, "labels_key": recipe.labels_key}
        if self.needs.covariates:
            options["categorical_covariate_keys"] = list(recipe.categorical_covariates) or None
            options["continuous_covariate_keys"] = list(recipe.continuous_covariates) or None
        if self.needs.size_factor:
            options["size_factor_key"] = recipe.size_factor_key
        if self.needs.sample:
            options["sample_key"] = recipe.sample_key
        model_class.setup_anndata(cells, **options)
        return cells

    def create(self, data: Any, arguments: Mapping[str, Any], recipe: Recipe, start: Any = None) -> Any:  # noqa: ARG002
        """An untrained model of the data that :meth:`setup` gave; ``start`` is a trained one of ``starts_from``."""
        return self.model_class()(data, **arguments)

    def slots(self, model: Any, facts: Facts) -> tuple[Slot, ...]:
        """Where the model keeps what it knows of each category: what scArches surgery adds to."""
        from scviaduct.families.slots import slots_of

        return slots_of(model.module, facts)

    def trained(self, new: tuple[str, ...]) -> tuple[str, ...]:
        """Which of a query batch's new covariates surgery trains; the means of the reference stand for the others.

        The first alone, unless a family says otherwise: a layer adds the columns of all covariates up, and of cells
        that share all new values only the sum can be known.
        """
        return new[:1]

    def fitting(self, model: Any, data: Any) -> AbstractContextManager[None]:  # noqa: ARG002
        """What has to be told of a query batch's cells while they are fitted; undone in the end."""
        return nullcontext()

    def loss(self, module: Any, tensors: Mapping[str, Any], kl_weight: float = 1.0) -> Any:
        """What surgery minimises over a mini-batch of one query batch: the loss of scvi-tools, a scalar."""
        return module(tensors, loss_kwargs={"kl_weight": kl_weight})[2].loss

    def training(self, data: Any, recipe: Recipe) -> dict[str, Any]:  # noqa: ARG002
        """What this family's ``train`` is told besides epochs, batch size and device."""
        return {}
