"""Mapping a block of cells: one deterministic forward pass, then labels with their uncertainty."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scviaduct.errors import DataError
from scviaduct.families.base import Covariates
from scviaduct.families.slots import BATCH, SAMPLE, covariate
from scviaduct.mapping.labels import Certainty, NeighborVote
from scviaduct.sources.obs import as_text
from scviaduct.values import Mapping

if TYPE_CHECKING:
    from collections.abc import Mapping as MappingType
    from collections.abc import Sequence

    import numpy.typing as npt

    from scviaduct.families.base import Encoded, Facts
    from scviaduct.mapping.fleet import Fleet
    from scviaduct.references.package import Reference
    from scviaduct.values import CellBlock, FloatArray, IntArray, LongArray, Settings


def model_columns(reference: Reference, settings: Settings) -> tuple[str, ...]:
    """obs columns that the encoder reads.

    None for a reference with ``encode_covariates=False``: its latent does not depend on batch or covariates, so cells
    without them map just the same.
    """
    if not reference.encode_covariates:
        return ()
    batch = (query_batch_key(reference, settings),) if reference.encoded_batch else ()
    sample = (query_sample_key(reference, settings),) if reference.encoded_sample else ()
    return (*batch, *sample, *reference.categorical_covariates, *reference.continuous_covariates)


def query_batch_key(reference: Facts, settings: Settings) -> str:
    """obs column of the query that plays the reference's batch."""
    return settings.batch_key or reference.batch_key or ""


def query_sample_key(reference: Facts, settings: Settings) -> str:
    """obs column of the query that plays the reference's sample."""
    return settings.sample_key or reference.sample_key or ""


class Mapper:
    """A loaded reference that maps blocks.

    Parameters
    ----------
    reference
        The package; its digest is verified while it loads.
    settings
        What decides the rows.
    device
        ``"cpu"`` or a CUDA device.
    fleet
        Adapters of the query's new batches; None for a query that has none.
    fractional
        Whether counts that are not whole are mapped, too; else they are an error.
    """

    def __init__(
        self,
        reference: Reference,
        settings: Settings,
        device: str = "cpu",
        fleet: Fleet | None = None,
        *,
        fractional: bool = False,
    ) -> None:
        from scviaduct.mapping.adapted import Adapted

        self.reference, self._fractional = reference, fractional
        self.settings = settings
        self._encoder = reference.encoder(device)
        self._adapted = Adapted(reference, settings, self._encoder, fleet) if fleet else None
        self._vote: NeighborVote | None = None
        if not self._encoder.labels and reference.has_latents:
            latents = reference.latents()
            if any(label is not None for label in latents.labels):
                self._vote = NeighborVote(latents.latent, latents.labels, settings.neighbors)

    @property
    def labels(self) -> tuple[str, ...]:
        """Label categories that a cell can get; empty if the reference has none."""
        return self._vote.labels if self._vote else self._encoder.labels

    @property
    def arithmetic(self) -> str:
        """What encodes: see :attr:`scviaduct.families.Encoder.arithmetic`."""
        return self._encoder.arithmetic

    def map(self, block: CellBlock) -> Mapping:
        """Encode and label a block's cells.

        Parameters
        ----------
        block
            Counts in the reference's gene order, with the obs columns of :func:`model_columns`, and with adapters those
            of :func:`~scviaduct.mapping.batches.group_columns`.

        Returns
        -------
        Mapping
            In the block's order. A cell without a count in the reference's genes has neither latent nor label.

        Raises
        ------
        DataError
            If a count is NaN, infinite, negative or, unless fractions were let through, not whole; a batch or covariate
            value is one that the reference does not know; or a latent is not finite.
        """
        encoded, adapters, of = self.encode(block)
        mean, location = encoded.mean, encoded.location
        mapped = self.counted(block)
        strange = mapped & ~np.isfinite(mean).all(axis=1)
        if strange.any():
            bad = int(np.flatnonzero(strange)[0])
            raise DataError(
                f"Cell '{block.obs['observation_id'][bad]}' of dataset '{block.shard.dataset_id}' encodes to a"
                " latent that is not finite.",
                "Look for extremely large counts or covariates in it, and run scviaduct reference verify.",
            )
        if not mapped.all():
            mean = np.where(mapped[:, None], mean, np.float32(np.nan))  # a copy: it may be the location itself
        found = self._label(mean, location, mapped)
        return replace(found, adapter=of, adapters=adapters) if adapters else found

    def encode(self, block: CellBlock) -> tuple[Encoded, tuple[str, ...], IntArray | None]:
        """Encode a block's cells.

        Returns
        -------
        tuple
            The latents; the addresses of the adapters that cells were encoded with; and int32 of shape ``(n_cells,)``,
            each cell's position in them and -1 for none, or None where no cell has one.

        Raises
        ------
        DataError
            As :meth:`map` does.
        """
        self._require_counts(block)
        if self._adapted is None:
            covariates = self._covariates(block, {})
            return self._encoder.encode(block.indptr, block.indices, block.data, covariates), (), None
        adapters, of, codes = self._adapted.assign(block)
        covariates = self._covariates(block, codes)
        encoder = self._adapted.encoder
        return encoder.encode(block.indptr, block.indices, block.data, covariates), adapters, of

    @staticmethod
    def counted(block: CellBlock) -> npt.NDArray[np.bool_]:
        """Which cells have a count in the reference's genes; bool, shape ``(n_cells,)``."""
        from scviaduct.mapping.counting import counted  # numba takes 0.4 s

        found: npt.NDArray[np.bool_] = np.empty(block.n_cells, np.bool_)
        counted(np.ascontiguousarray(block.indptr), np.ascontiguousarray(block.data), found)
        return found

    def gene_influence(self) -> FloatArray:
        """How much each gene moves the encoder; float32, shape ``(n_genes,)``."""
        return self._encoder.gene_influence()

    def _require_counts(self, block: CellBlock) -> None:
        """Preflight sees a sample only; NaN or a negative sum would make a cell look empty and pass for one."""
        from scviaduct.mapping.counting import are_counts

        data = np.ascontiguousarray(block.data)
        if are_counts(data, self._fractional):
            return
        possible = (data >= 0) & (data < np.inf)
        wrong = ~possible if self._fractional or not possible.all() else data != np.floor(data)
        at = int(np.flatnonzero(wrong)[0])
        cell = block.obs["observation_id"][int(np.searchsorted(block.indptr, at, side="right")) - 1].as_py()
        gene = next(iter(self.reference.genes.columns.values()))[int(block.indices[at])]
        remedy = "Mend the cell, or name where raw counts are, e.g. layer=counts or layer=raw."
        if possible[at]:
            remedy += " If fractions are meant, as after a removal of ambient RNA, let them through: --accept counts."
        raise DataError(
            f"Cell '{cell}' of dataset '{block.shard.dataset_id}' has {data[at]:g} of gene '{gene}', which is not a"
            " count.",
            remedy,
        )

    def _label(
        self, latent: FloatArray, location: FloatArray, mapped: np.ndarray[tuple[int], np.dtype[np.bool_]]
    ) -> Mapping:
        n_cells = len(latent)
        label: IntArray = np.full(n_cells, -1, np.int32)
        figures = [np.full(n_cells, np.nan, np.float32) for _ in range(3)]
        if self.labels and mapped.any():
            rows = slice(None) if mapped.all() else mapped  # which copies
            if self._vote:
                probabilities: FloatArray | None = self._vote.probabilities(latent[rows])
            else:
                probabilities = self._encoder.classify(location[rows])
            if probabilities is not None:
                certainty = Certainty.of(probabilities)
                label[rows] = certainty.label
                values = (certainty.probability, certainty.margin, certainty.entropy)
                for figure, value in zip(figures, values, strict=True):
                    figure[rows] = value
        return Mapping(latent, mapped, label, self.labels, *figures)

    def _covariates(self, block: CellBlock, codes: MappingType[str, LongArray]) -> Covariates:
        """Codes of the block's categories: those of new ones as told, the others as the reference has them."""
        reference = self.reference
        if not reference.encode_covariates:
            return Covariates()
        batch = sample = None
        if reference.encoded_batch:
            column = query_batch_key(reference, self.settings)
            batch = self._codes(block, column, reference.batch_categories, "Batch", codes.get(BATCH))
        if reference.encoded_sample:
            column = query_sample_key(reference, self.settings)
            sample = self._codes(block, column, reference.sample_categories, "Sample", codes.get(SAMPLE))
        categorical = None
        if reference.categorical_covariates:
            items = reference.categorical_covariates.items()
            columns = [self._codes(block, key, known, "Covariate", codes.get(covariate(key))) for key, known in items]
            categorical = np.stack(columns, axis=1)
        continuous = None
        if reference.continuous_covariates:
            continuous = np.stack([self._numbers(block, key) for key in reference.continuous_covariates], axis=1)
        return Covariates(batch, categorical, continuous, sample)

    @staticmethod
    def _codes(
        block: CellBlock, column: str, categories: Sequence[str], what: str, adapted: LongArray | None
    ) -> LongArray:
        """Positions in the categories, or in what adapters add behind them."""
        values = as_text(block.obs[column].combine_chunks())
        found = pc.index_in(values, value_set=pa.array(categories, pa.string()))
        codes: LongArray = found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        if adapted is not None:
            codes = np.where(adapted >= 0, adapted, codes)
        if (codes < 0).any():
            row = int(np.flatnonzero(codes < 0)[0])
            cell, bad = block.obs["observation_id"][row].as_py(), values[row].as_py()
            told = "has no value" if bad is None else f"is '{bad}'"
            raise DataError(
                f"{what} '{column}' of cell '{cell}' in dataset '{block.shard.dataset_id}' {told}, not one that the"
                f" reference was trained on ({some(categories)}).",
                "A new value needs an adapter, which surgery fits: --surgery auto. A missing one must be filled.",
            )
        return codes

    @staticmethod
    def _numbers(block: CellBlock, column: str) -> FloatArray:
        # Through numpy: Arrow refuses integers above 2**24 as float32, and they are common (counts of a library).
        values = block.obs[column].combine_chunks().cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        with np.errstate(over="ignore"):
            values = values.astype(np.float32)
        if not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values))[0])
            raise DataError(
                f"Covariate '{column}' of cell '{block.obs['observation_id'][row]}' in dataset"
                f" '{block.shard.dataset_id}' is {values[row]}.",
                "Give every cell a finite value.",
            )
        return np.asarray(values, np.float32)


def some(values: Sequence[str] | MappingType[str, object], limit: int = 5) -> str:
    """A few values for a message: ``a, b, c and 4 more``."""
    shown = list(values)[:limit]
    rest = len(values) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")
