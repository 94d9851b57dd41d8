"""A reference's encoder and the adapters of query batches: which cell is encoded with what."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scviaduct.errors import DataError
from scviaduct.families.widening import known_categories
from scviaduct.mapping.batches import batches_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from scviaduct.families import Encoder
    from scviaduct.mapping.batches import QueryBatch
    from scviaduct.mapping.fleet import Fleet
    from scviaduct.references.package import Reference
    from scviaduct.values import CellBlock, IntArray, LongArray, Settings


class Adapted:
    """An encoder that learns batches as they come.

    Memory grows by each adapter's rows alone: an adapter is read when the first block needs it, and stays. Adapters of
    a Census's donors, ten thousand, are some 30 MB.

    Parameters
    ----------
    reference, settings
        What maps, and how.
    encoder
        Of the reference.
    fleet
        Where the adapters of the run are.
    """

    def __init__(self, reference: Reference, settings: Settings, encoder: Encoder, fleet: Fleet) -> None:
        self._reference, self._settings, self._fleet = reference, settings, fleet
        self._own, self.encoder = encoder, encoder
        self._columns = tuple(reference.categorical_covariates)
        self._known = {name: len(values) for name, values in known_categories(reference).items()}
        self._rows: dict[str, list[Mapping[str, torch.Tensor]]] = {}
        self._codes: dict[QueryBatch, dict[str, int]] = {}

    def assign(self, block: CellBlock) -> tuple[tuple[str, ...], IntArray, dict[str, LongArray]]:
        """Adapters of a block's cells; they are read if they are not there yet.

        Parameters
        ----------
        block
            With the obs columns that tell query batches apart.

        Returns
        -------
        tuple
            Addresses of the adapters; int32 of shape ``(n_cells,)``, each cell's position in them and -1 for none; and
            covariate to int64 of the same shape, the code of each cell's category, -1 where the reference knows it.

        Raises
        ------
        DataError
            If a batch has no adapter.
        """
        batches, of = batches_of(block, self._reference, self._settings, decoder=self._fleet.decoder)
        new = [batch for batch in batches if batch not in self._codes]
        try:
            for batch in new:
                self._learn(batch, block)
        finally:  # what was learnt before a batch failed has codes, and the next block may ask for them
            if new:
                self.encoder = self._own.extended(self._rows, self._columns)
        codes: dict[str, LongArray] = {}
        for position, batch in enumerate(batches):
            for name, code in self._codes[batch].items():
                codes.setdefault(name, np.full(block.n_cells, -1, np.int64))[of == position] = code
        return tuple(self._fleet.addresses[batch] for batch in batches), of, codes

    def _learn(self, batch: QueryBatch, block: CellBlock) -> None:
        where = self._fleet.addresses.get(batch)
        if where is None:
            why = self._fleet.failures.get(batch, "it was not among the batches of the scan")
            raise DataError(
                f"There is no adapter for {batch.name}, which dataset '{block.shard.dataset_id}' has: {why}",
                "Run the same command again.",
            )
        adapter = self._fleet.shelf.get(where)
        self._codes[batch] = {}
        for name, rows in adapter.encoder.items():
            held = self._rows.setdefault(name, [])
            self._codes[batch][name] = self._known[name] + len(held)
            held.append(rows)
