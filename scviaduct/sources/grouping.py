"""Which combinations of values some obs columns take, shard by shard, gathered while the shards are cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scviaduct.errors import SourceError
from scviaduct.sources.obs import as_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pyarrow as pa

    from scviaduct.values import LongArray

MAX_COMBINATIONS = 1_000_000
"""Combinations that one obs table may have: they are held in memory, about 200 bytes each. All donors of a Census are
some ten thousand; a column of more values is a measurement or an identifier."""


class Combinations:
    """Numbers the combinations of values of obs columns, in the order in which cells have them.

    Parameters
    ----------
    columns
        Names; one that obs lacks has no value in any cell.
    where
        Place, for messages.
    """

    def __init__(self, columns: Sequence[str], where: str = "obs") -> None:
        self._columns = tuple(columns)
        self._where = where
        self._known: dict[tuple[str | None, ...], int] = {}

    @property
    def values(self) -> tuple[tuple[str | None, ...], ...]:
        """The combinations so far, by their numbers; values as text, None for a missing one."""
        return tuple(self._known)

    def number(self, obs: pa.Table, n_cells: int) -> LongArray:
        """Number of each cell's combination.

        Parameters
        ----------
        obs
            One row per cell.
        n_cells
            Number of cells, which a table without columns does not know.

        Returns
        -------
        numpy.ndarray
            int64, shape ``(n_cells,)``; positions in :attr:`values`.

        Raises
        ------
        SourceError
            If there are more than ``MAX_COMBINATIONS``.
        """
        within = np.zeros(n_cells, np.int64)
        texts: list[pa.DictionaryArray | None] = []
        for column in self._columns:
            if column not in obs.column_names:
                texts.append(None)
                continue
            told = as_text(obs[column].combine_chunks()).dictionary_encode(null_encoding="encode")
            texts.append(told)
            # Numbered anew after every column, so that the product never outgrows 64 bits.
            within = pd.factorize(within * max(len(told.dictionary), 1) + told.indices.to_numpy())[0]
        _, first, of = np.unique(within, return_index=True, return_inverse=True)
        lists = [None if told is None else told.take(first).to_pylist() for told in texts]
        rows = [tuple(None if values is None else values[i] for values in lists) for i in range(len(first))]
        # In the order of the cells, whatever unique sorts by.
        for i in np.argsort(first):
            self._known.setdefault(rows[i], len(self._known))
        if len(self._known) > MAX_COMBINATIONS:
            raise SourceError(
                f"obs columns {', '.join(self._columns)} of {self._where} have more than {MAX_COMBINATIONS:,}"
                f" combinations of values, such as {rows[0]}.",
                "A batch, a sample and covariates are categories: name such columns, --batch-key donor_id.",
            )
        codes = np.array([self._known[row] for row in rows], np.int64)
        return codes[of] if len(codes) else within

    def told(self, counts: Mapping[int, int]) -> dict[tuple[str | None, ...], int]:
        """Cells by combination, of cells by its number."""
        values = self.values
        return {values[number]: cells for number, cells in sorted(counts.items())}
