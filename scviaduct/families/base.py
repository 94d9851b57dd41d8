"""What a model family owes the rest: facts of a saved model, an encoder for it, and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from anndata import AnnData

    from scviaduct.references.archive import SavedModel
    from scviaduct.values import FloatArray, IntArray, LongArray


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
    """

    batch: LongArray | None = None
    categorical: LongArray | None = None
    continuous: FloatArray | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """What an encoder makes of a block.

    Attributes
    ----------
    mean
        float32, shape ``(n_cells, n_latent)``; the latent: the posterior's mean, transformed as the model does it.
    location, variance
        float32, same shape; mean and variance of the normal posterior. The location is the mean unless the latent is
        logistic-normal, and is what a classifier reads.
    """

    mean: FloatArray
    location: FloatArray
    variance: FloatArray


@dataclass(frozen=True, slots=True)
class Facts:
    """What a saved model is, read from what scvi-tools saved with it.

    Attributes
    ----------
    genes
        ``var_names``, in the order of the first layer.
    batch_key, labels_key
        obs columns it was set up with; empty for none.
    batch_categories, labels
        As text. ``labels`` are those that a classifier gives, in its order; empty without one.
    unlabeled_category
        Label that means none; empty for none.
    n_latent
        Size of the latent.
    encode_covariates
        Whether the encoder reads batch and covariates, judged by the width of its first layer.
    categorical_covariates
        Column to categories.
    continuous_covariates
        Columns.
    size_factor_key, layer
        As set up; empty for none.
    scvi_version
        Version of scvi-tools that saved it.
    """

    genes: tuple[str, ...]
    n_latent: int
    encode_covariates: bool
    scvi_version: str
    batch_key: str = ""
    batch_categories: tuple[str, ...] = ()
    labels_key: str = ""
    labels: tuple[str, ...] = ()
    unlabeled_category: str = ""
    categorical_covariates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    continuous_covariates: tuple[str, ...] = ()
    size_factor_key: str = ""
    layer: str = ""


class Encoder(Protocol):
    """A loaded model that encodes blocks; deterministic, in evaluation mode."""

    n_latent: int
    labels: tuple[str, ...]
    """What :meth:`classify` gives, in its order; empty without a classifier."""

    def encode(self, indptr: LongArray, indices: IntArray, data: FloatArray, covariates: Covariates) -> Encoded:
        """Encode counts given as CSR in the reference's genes."""

    def classify(self, location: FloatArray) -> FloatArray | None:
        """Probabilities of :attr:`labels`, shape ``(n_cells, n_labels)``, as scvi-tools' ``predict(soft=True)``."""

    def gene_influence(self) -> FloatArray:
        """How much each gene moves the encoder: shape ``(n_genes,)``, L2 norm of its first-layer weights."""

    def save(self, path: Path) -> None:
        """Write what encoding needs, without anything that runs: :meth:`Family.open` reads it."""


class Family(Protocol):
    """A model class of scvi-tools: one module each."""

    name: str
    """Name of the class, as scvi-tools saves it."""

    def facts(self, saved: SavedModel) -> Facts:
        """What a saved model is.

        Raises
        ------
        UnsupportedModelError
            If the weights are not this family's, or it was set up in a way that cannot be mapped.
        """

    def load(self, saved: SavedModel, template: AnnData, device: str) -> Encoder:
        """Instantiate a saved model through scvi-tools, from a template of its data."""

    def open(self, path: Path, device: str) -> Encoder:
        """Read an encoder that :meth:`Encoder.save` wrote; needs no scvi-tools, whose import takes many seconds."""

    def arguments(self) -> Mapping[str, Any]:
        """Model arguments that training takes, with their defaults."""
