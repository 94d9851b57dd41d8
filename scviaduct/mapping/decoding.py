"""Cells as a model of scvi-tools decodes them: encoded by the reference and its adapters, laid out for the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from scviaduct.analysis.base import Cells
from scviaduct.errors import DataError
from scviaduct.families import MODALITY, Encoded, Facts, family
from scviaduct.families.registered import own_categories
from scviaduct.families.slots import BATCH, SAMPLE, covariate
from scviaduct.families.vae import quiet
from scviaduct.families.widening import Added, known_categories, widen
from scviaduct.mapping.batches import batches_of, group_columns
from scviaduct.mapping.layout import panel_of
from scviaduct.mapping.mapper import Mapper, model_columns, query_batch_key, query_sample_key
from scviaduct.mapping.reading import read_block
from scviaduct.references.package import MODEL, REGISTRY, TEMPLATE
from scviaduct.references.saved.portable import read_model
from scviaduct.references.template import read_template
from scviaduct.sources import open_shard
from scviaduct.sources.obs import as_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt
    import pyarrow as pa

    from scviaduct.mapping.adapters import Adapter
    from scviaduct.mapping.batches import QueryBatch
    from scviaduct.mapping.fleet import Fleet
    from scviaduct.references.package import Reference
    from scviaduct.values import CellBlock, Settings, Shard

AVERAGE = "average of the reference"
"""Category of cells whose own is neither known to the reference nor fitted: the mean of the reference's columns."""


@dataclass(frozen=True, slots=True)
class Names:
    """What the categories of adapters are called in a widened model.

    Attributes
    ----------
    of
        Query batch to its covariates and the category of each.
    added
        Covariate to its further categories.
    """

    of: Mapping[QueryBatch, Mapping[str, str]]
    added: Mapping[str, Sequence[Added]]

    @classmethod
    def give(cls, facts: Facts, adapters: Mapping[QueryBatch, Adapter]) -> Names:
        """Call each by its value; where two adapters have the same one, by the query batch."""
        known = known_categories(facts)
        taken = {name: {*values, AVERAGE} for name, values in known.items()}
        added: dict[str, list[Added]] = {name: [] for name in known}
        of: dict[QueryBatch, dict[str, str]] = {}
        for batch, adapter in sorted(adapters.items()):
            of[batch] = {}
            for name, value in batch.values:
                called = value if value not in taken[name] else f"{value} ({batch.name})"
                taken[name].add(called)
                of[batch][name] = called
                added[name].append(Added(called, adapter.vectors.get(name, {})))
        for more in added.values():
            more.append(Added(AVERAGE, {}))  # the last, so that the others' codes are their positions
        return cls(of, added)


@dataclass(frozen=True, slots=True)
class Wanted:
    """obs columns that decoding takes of a source.

    Attributes
    ----------
    needed
        A source without one of them is refused.
    optional
        Those that the decoder alone reads: cells of a source without them decode as the reference's average.
    """

    needed: tuple[str, ...]
    optional: tuple[str, ...]

    @classmethod
    def of(cls, reference: Reference, settings: Settings, fleet: Fleet | None, obs: Sequence[str]) -> Wanted:
        """What a reference, its adapters and an analysis ask for."""
        grouped = group_columns(reference, settings, decoder=fleet.decoder) if fleet else ()
        asked = (source_column(reference, settings, name) for name in obs)
        needed = (*model_columns(reference, settings), *grouped, *asked)
        batch = query_batch_key(reference, settings) if reference.batch_key else ""
        other = (*reference.categorical_covariates, *reference.continuous_covariates, reference.size_factor_key)
        optional = tuple(name for name in dict.fromkeys((batch, *other)) if name and name not in needed)
        return cls(tuple(dict.fromkeys(needed)), optional)

    def read(self, shard: Shard, reference: Reference) -> CellBlock:
        """A shard's counts in the reference's genes, with those columns that its source has."""
        there = open_shard(shard).obs_columns()
        return read_block(shard, reference, (*self.needed, *(name for name in self.optional if name in there)))


class Decoder:
    """A model of scvi-tools that knows the query's batches, and the encoder that goes with it.

    Parameters
    ----------
    reference
        The package; the files that are used are verified.
    settings
        With which the cells were mapped.
    fleet
        Adapters of all query batches of what is decoded; all are read at once, because a model knows its categories
        from the start.
    device
        ``"cpu"`` or a CUDA device.
    """

    def __init__(self, reference: Reference, settings: Settings, fleet: Fleet | None, device: str = "cpu") -> None:
        reference.require(MODEL, REGISTRY, TEMPLATE)
        self.reference, self._settings, self._fleet = reference, settings, fleet
        # Whether fractions may be was decided when the cells were mapped.
        self._mapper = Mapper(reference, settings, device, fleet, fractional=True)
        self._family, own = family(reference.family), read_model(reference.path)
        adapters = {batch: fleet.shelf.get(address) for batch, address in fleet.addresses.items()} if fleet else {}
        self._names = Names.give(reference, adapters)
        with quiet():
            template = read_template(reference.path)
            slots = self._family.slots(self._family.instantiate(own, template), reference)
            self._saved = widen(own, reference, slots, self._names.added)
            self.model = self._family.instantiate(self._saved, template)
        self.model.is_trained_ = True  # scvi-tools asks before it decodes anything
        self.model.module.to(device)
        self.facts = decoded_facts(reference, adapters)

    def cells(self, block: CellBlock, obs: Sequence[str], seed: int) -> tuple[Cells | None, npt.NDArray[np.bool_]]:
        """Encode a block's cells, and lay those out that have a count.

        Parameters
        ----------
        block
            Counts in the reference's genes, with what :class:`Wanted` names.
        obs
            Columns that the analysis asked for.
        seed
            Of everything random.

        Returns
        -------
        tuple
            The cells, or None if none has a count; and bool of shape ``(n_cells,)``, which have one.

        Raises
        ------
        DataError
            As mapping does.
        """
        encoded, _, _ = self._mapper.encode(block)
        mapped = self._mapper.counted(block)
        if not mapped.any():
            return None, mapped
        rows = np.flatnonzero(mapped)
        shape = block.n_cells, block.n_genes
        counts = sparse.csr_matrix((block.data, block.indices, block.indptr), shape=shape)[rows]
        frame = pd.DataFrame(
            {name: self._column(block, name).take(rows).to_pandas() for name in obs}, index=pd.RangeIndex(len(rows))
        )
        data = self._laid_out(counts, self._covariates(block, rows))
        taken = Encoded(
            encoded.mean[rows],
            encoded.location[rows],
            encoded.variance[rows],
            {name: values[rows] for name, values in encoded.others.items()},
        )
        return Cells(self.model, data, frame, taken, self.facts, seed), mapped

    def _column(self, block: CellBlock, name: str) -> pa.ChunkedArray:
        return block.obs[source_column(self.reference, self._settings, name)]

    def _laid_out(self, counts: sparse.csr_matrix, obs: pd.DataFrame) -> Any:
        from anndata import AnnData

        var = pd.DataFrame({MODALITY: list(self.reference.genes.modality)}, index=list(self.reference.names))
        with quiet():  # a protein may be called like its gene
            flat = AnnData(counts, obs=obs, var=var)
            if panel := panel_of(self._saved):
                flat.obs[panel[0]] = panel[1]
            return self._family.layout(
                self._saved, own_categories(self._saved.attr_dict["registry_"], flat, self.reference)
            )

    def _covariates(self, block: CellBlock, rows: npt.NDArray[np.int64]) -> pd.DataFrame:
        """Columns that the model was set up with, of values that it knows."""
        facts, made = self.reference, {}
        batches, of = self._batches(block)
        told = [(BATCH, facts.batch_key, query_batch_key(facts, self._settings))] if facts.batch_key else []
        if facts.sample_key:
            told.append((SAMPLE, facts.sample_key, query_sample_key(facts, self._settings)))
        told += [(covariate(key), key, key) for key in facts.categorical_covariates]
        known = known_categories(facts)
        for name, key, column in told:
            values = _texts(block, column)
            values[~np.isin(values, known[name])] = AVERAGE
            for position, batch in enumerate(batches):
                if called := self._names.of.get(batch, {}).get(name):
                    values[of == position] = called
            made[key] = values[rows]
        for key in (*facts.continuous_covariates, facts.size_factor_key):
            if key:
                made[key] = _numbers(block, key)[rows]
        if facts.labels_key and facts.labels_key not in made:
            # The query's own labels are never read.
            made[facts.labels_key] = np.full(len(rows), facts.unlabeled_category or facts.known_labels[0], object)
        return pd.DataFrame(made, index=[f"cell-{i}" for i in range(len(rows))])

    def _batches(self, block: CellBlock) -> tuple[tuple[QueryBatch, ...], npt.NDArray[np.int32]]:
        if self._fleet is None:
            return (), np.full(block.n_cells, -1, np.int32)
        return batches_of(block, self.reference, self._settings, decoder=self._fleet.decoder)


def source_column(facts: Facts, settings: Settings, name: str) -> str:
    """obs column of the query for one that an analysis names: batch and sample may be called otherwise there."""
    if name and name == facts.batch_key:
        return query_batch_key(facts, settings)
    return query_sample_key(facts, settings) if name and name == facts.sample_key else name


def decoded_facts(reference: Reference, adapters: Mapping[QueryBatch, object]) -> Facts:
    """Facts of a reference whose samples are followed by the query's: what is compared sample by sample."""
    more = [value for batch in sorted(adapters) for name, value in batch.values if name == SAMPLE]
    return replace(reference, sample_categories=(*reference.sample_categories, *dict.fromkeys(more)))


def _texts(block: CellBlock, column: str) -> Any:
    """A column as text, shape ``(n_cells,)``; of a source that lacks it, a value that nobody knows."""
    if column not in block.obs.column_names:
        return np.full(block.n_cells, AVERAGE, object)
    return as_text(block.obs[column].combine_chunks()).fill_null(AVERAGE).to_numpy(zero_copy_only=False).astype(object)


def _numbers(block: CellBlock, column: str) -> Any:
    if column not in block.obs.column_names or block.obs[column].null_count:
        raise DataError(
            f"Dataset '{block.shard.dataset_id}' has cells without a value in obs column '{column}', and the model"
            " decodes with it.",
            "Add it to the source's obs.",
        )
    return block.obs[column].to_numpy().astype(np.float64)
