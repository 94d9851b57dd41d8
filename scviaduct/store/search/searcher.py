"""Searching an open index: what a condition leaves decides how, and slices of the index do the work."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
import pyarrow as pa

from scviaduct.errors import InputError
from scviaduct.store.index import ensure_index
from scviaduct.store.index.calibration import HELD, NEIGHBORS
from scviaduct.store.index.coarse import Coarse
from scviaduct.store.index.scanning import Found
from scviaduct.store.search.fan import Here, Slices
from scviaduct.store.search.hits import Hits, Queries, hits_table, kept_of
from scviaduct.store.search.slices import Slice
from scviaduct.store.where import parse_where

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from scviaduct.store.index import Index
    from scviaduct.store.index.coarse import Lists
    from scviaduct.store.space import Space
    from scviaduct.values import FloatArray, IntArray, LongArray

_EXACT_UP_TO = 20_000
"""Selected cells up to which each is always compared with a query: 0.12 ms for one alone, 0.02 in a batch."""
_EXACT_FACTOR = 8
"""Selected cells up to which each is compared, over those that probing compares, centroids included. At a million cells
that is 48,000: 0.3 ms for a query alone, 0.08 in a batch. Probing lists that are short then finds .97 to 1."""
_EXACT_PAIRS = 1 << 26
"""Queries times selected cells up to which all are compared: 0.1 s, less than copying the selected cells into lists."""
_SAMPLE = 8, 64
"""Queries of a filtered search, at least and at most, that are searched exactly, to choose how much is probed."""
_SELECTED_RECALL = 0.995
"""Recall of these, which are few, so that that of all is .99."""
_GROWTH = 1 / 6
"""Power of the number of neighbours that the reach grows with above 30. Of a million cells, the lists of 300 neighbours
hold .994 of them without, and .9995 with it."""
_QUERIES = 4096
"""Queries that are planned and probed at a time: a condition may ask for all lists of each, 0.5 GB at 16,384 lists."""
_PLANS = 64
"""Conditions whose selected cells of each list are kept."""


class _Plan(NamedTuple):
    """Lists of queries, and how far they look: see :func:`scviaduct.store.index.scanning.scan_lists`."""

    order: LongArray | IntArray
    upto: LongArray
    bounds: FloatArray


class Answer(NamedTuple):
    """Neighbours of queries, by position.

    Attributes
    ----------
    found
        Neighbours, the nearest first.
    method, recall, measured, candidates
        As :class:`scviaduct.store.search.Hits` has them.
    """

    found: Found
    method: str
    recall: float
    measured: str
    candidates: int


class Searcher:
    """Searches one version of a space, as often as it is asked. Open one with :meth:`open`.

    Parameters
    ----------
    index
        Open; of a distributed search its rows and vectors are not touched here.
    name
        Of the space, for messages.
    slices
        What compares. None for this process.
    threads
        That queries are spread over here; None for one a core of this process.
    """

    def __init__(self, index: Index, name: str, slices: Slices | None = None, threads: int | None = None) -> None:
        self.index = index
        self._threads = threads
        self._name = name
        self._slices = slices or Here(Slice(index, threads))
        self._coarse = Coarse.of(index.quantizer) if index.quantizer else None
        self._sizes: LongArray = np.sum(self._slices.call("sizes"), axis=0)
        self._plans: OrderedDict[str, LongArray] = OrderedDict()

    @classmethod
    def open(cls, space: Space, as_of: int | None = None, threads: int | None = None) -> Self:
        """Open the index of a version, and build it first if it is not there.

        Parameters
        ----------
        space
            Whose.
        as_of
            Version; None for the newest.
        threads
            That queries are spread over; None for one a core of this process. A single query has one.
        """
        index = ensure_index(space, as_of)
        return cls(index, space.name, threads=threads)

    def stored(self, where: str, limit: int | None = None) -> Queries:
        """Stored cells as queries.

        Raises
        ------
        InputError
            If no cell with a latent fulfils ``where``.
        """
        self._parse(where)
        told = self._slices.call("members", where, limit)
        positions, slots = (np.concatenate([one[i] for one in told]) for i in range(2))
        order = np.argsort(positions, kind="stable")[:limit]
        if not len(order):
            remedy = "scviaduct export shows what labels and columns there are."
            raise InputError(f"No stored cell fulfils {where}.", remedy)
        rows = self._rows(slots[order])
        latent = np.empty((len(order), self.index.manifest.dimensions), np.float32)
        for at, part in self._slices.at(slots[order], "vectors"):
            latent[at] = part
        return Queries(rows["dataset_id"].to_pylist(), rows["observation_id"].to_pylist(), latent, positions[order])

    def search(self, queries: Queries, k: int = NEIGHBORS, where: str | None = None, *, exact: bool = False) -> Hits:
        """Find the k nearest stored cells of each query.

        Parameters
        ----------
        queries
            Cells in the space's latent.
        k
            Neighbours of each; fewer come back if fewer cells are selected.
        where
            Condition that neighbours fulfil.
        exact
            Compare with every cell.

        Raises
        ------
        InputError
            If k is not positive, or the queries are of another latent size or not finite.
        FilterError
            If ``where`` does not parse.
        """
        self._require(queries.latent, k, queries.ids)
        answer = self._neighbors(queries.latent, k + (queries.own is not None), where, exact=exact)
        keep = kept_of(answer.found, queries.own, k)
        table = hits_table(queries, answer.found, keep, self._rows(answer.found.slot[keep]))
        version = self.index.manifest.version
        return Hits(table, answer.method, answer.recall, version, answer.candidates, answer.measured)

    def neighbors(
        self, latent: FloatArray, k: int = NEIGHBORS, where: str | None = None, *, exact: bool = False
    ) -> Answer:
        """Find the k nearest stored cells of each query, without their rows. Errors are those of :meth:`search`.

        Parameters
        ----------
        latent
            Queries, float32, shape ``(n_queries, n_latent)``, all finite.
        k, where, exact
            As :meth:`search` takes them.
        """
        self._require(latent, k)
        return self._neighbors(latent, k, where, exact=exact)

    def _neighbors(self, latent: FloatArray, k: int, where: str | None, *, exact: bool) -> Answer:
        latent = np.ascontiguousarray(latent, np.float32)
        manifest = self.index.manifest
        counts = None if where is None else self._counts(where)
        candidates = manifest.cells if counts is None else int(counts.sum())
        wanted = min(k, candidates)
        if not wanted:
            return Answer(Found.none(len(latent), 0), "exact", 1.0, "", candidates)
        if exact or self._coarse is None or (where is not None and self.compares_all(len(latent), candidates, k)):
            method = "exact" if where is None else "exact on the selected cells"
            return Answer(self._exact(latent, wanted, where), method, 1.0, "", candidates)
        if where is None or counts is None:
            found = self._in_parts(latent, wanted, None, lambda part: self._plan(part, k))
            return Answer(
                found,
                "IVF-Flat",
                manifest.recall,
                f"{manifest.sample} of the index's cells, for {NEIGHBORS} neighbours",
                candidates,
            )
        more, recall, sample = self._widen(latent, wanted, where, counts)
        found = self._in_parts(latent, wanted, where, lambda part: self._plan_selected(part, k, counts, more))
        return Answer(found, "IVF-Flat", recall, f"{sample} of these queries, with this condition", candidates)

    def compares_all(self, queries: int, selected: int, k: int) -> bool:
        """Whether all selected cells are compared: where that costs little more than probing, or little."""
        manifest = self.index.manifest
        compared = max(HELD * k, self._probes(k) * manifest.cells / max(1, manifest.lists))
        limit = max(_EXACT_UP_TO, int(_EXACT_FACTOR * (compared + manifest.lists)))
        return selected <= limit or queries * selected <= _EXACT_PAIRS

    def _beyond(self, k: int) -> float:
        """How much more reach k neighbours take than the 30 that the index was calibrated for."""
        return float((max(k, NEIGHBORS + 1) / (NEIGHBORS + 1)) ** _GROWTH)

    def _probes(self, k: int) -> int:
        """Lists that a query looks into, about."""
        manifest = self.index.manifest
        return min(manifest.lists, math.ceil(manifest.probes * self._beyond(k)))

    @property
    def _centroids(self) -> Coarse:
        if self._coarse is None:
            raise TypeError("an exact index has no lists")
        return self._coarse

    def _counts(self, where: str) -> LongArray:
        """Selected cells of each list."""
        counts = self._plans.pop(where, None)
        if counts is None:
            self._parse(where)
            counts = np.sum(self._slices.call("count", where), axis=0)
        self._plans[where] = counts
        while len(self._plans) > _PLANS:
            self._plans.popitem(last=False)
        return counts

    def _exact(self, latent: FloatArray, k: int, where: str | None) -> Found:
        return Found.merged(self._slices.call("exact", latent, k, where), k)

    def _in_parts(self, latent: FloatArray, k: int, where: str | None, plan: Callable[[FloatArray], _Plan]) -> Found:
        """Plan and search for some queries at a time."""
        parts = [latent[start : start + _QUERIES] for start in range(0, max(1, len(latent)), _QUERIES)]
        return Found.stacked([self._probe(part, k, where, plan(part)) for part in parts])

    def _probe(self, latent: FloatArray, k: int, where: str | None, plan: _Plan) -> Found:
        """Search lists; a query whose lists held too few selected cells is compared with all of them.

        A query that found too few within its bound is searched again without: what is found does not depend on bounds.
        """
        found = Found.merged(self._slices.call("probe", latent, k, where, *plan), k)
        short = np.flatnonzero(found.slot[:, -1] < 0)
        if not len(short):
            return found
        few = np.ascontiguousarray(latent[short])
        if np.isfinite(plan.bounds[short]).all():
            again = _Plan(plan.order[short], plan.upto[short], np.full(len(short), np.inf, np.float32))
            found.replace(short, self._probe(few, k, where, again))
        else:
            found.replace(short, self._exact(few, k, where))
        return found

    def _lists(self, latent: FloatArray, k: int) -> Lists:
        """The lists of each query within reach."""
        reach = self.index.manifest.reach * self._beyond(k)
        return self._centroids.within(latent, reach, self._sizes, HELD * k, self._threads)

    def _plan(self, latent: FloatArray, k: int) -> _Plan:
        """Where each query looks. The bounds spare a ninth of a batch's time, in which cells are kept for a while."""
        lists = self._lists(latent, k)
        span = self.index.manifest.span if k <= NEIGHBORS + 1 else np.inf
        return _Plan(lists.order, lists.upto, np.float32(span) * lists.mean)

    def _plan_selected(self, latent: FloatArray, k: int, counts: LongArray, more: int) -> _Plan:
        """Lists of each query that hold as many selected cells, times ``more``, as it sees without a condition.

        Lists without a selected cell are passed over.
        """
        wanted = np.minimum(more * self._lists(latent, k).held, counts.sum())
        among = np.flatnonzero(counts)
        coarse = self._centroids.among(among)
        n = min(len(among), 2 * more * self._probes(k) * -(-int(self._sizes.sum()) // int(counts.sum())))
        while True:
            order = coarse.nearest(latent, n)
            seen = np.cumsum(counts[order], axis=1)
            if n == len(among) or (seen[:, -1] >= wanted).all():
                upto = np.minimum((seen < wanted[:, None]).sum(axis=1) + 1, n)
                return _Plan(order, upto, np.full(len(latent), np.inf, np.float32))
            n = min(len(among), 2 * n)

    def _widen(self, latent: FloatArray, k: int, where: str, counts: LongArray) -> tuple[int, float, int]:
        """How much more than without a condition is probed, so that a sample of the queries finds its neighbours.

        Queries far from all selected cells need more: nothing that they look into is near.

        Returns
        -------
        tuple
            How many times as much, the recall of the sample, and its size.
        """
        size = min(len(latent), max(_SAMPLE[0], min(_SAMPLE[1], _EXACT_PAIRS // int(counts.sum()))))
        sample = np.ascontiguousarray(latent[np.linspace(0, len(latent) - 1, size).astype(int)])
        truth = self._exact(sample, k, where)
        more = 1
        while True:
            plan = self._plan_selected(sample, k, counts, more)
            found = self._probe(sample, k, where, plan)
            recall = float(np.mean([np.isin(a, b).mean() for a, b in zip(truth.slot, found.slot, strict=True)]))
            if recall >= _SELECTED_RECALL or plan.upto.min() == np.count_nonzero(counts):
                return more, recall, size
            more *= 2

    def _rows(self, slots: LongArray) -> pa.Table:
        """Rows of slots, in their order."""
        parts = self._slices.at(slots, "take")
        if len(parts) == 1:
            return parts[0][1]
        back = np.argsort(np.concatenate([at for at, _ in parts]), kind="stable")
        return pa.concat_tables([table for _, table in parts]).take(pa.array(back))

    def _parse(self, where: str) -> None:
        """Refuse a condition that does not parse, before anybody is asked."""
        parse_where(where, next(iter(self.index.segments.values())).table.schema)

    def _require(self, latent: FloatArray, k: int, names: Sequence[str] | None = None) -> None:
        """Refuse what cannot be compared; names of the queries are told where they have some."""
        if k < 1:
            raise InputError(f"k = {k} asks for no neighbour.", "Give at least 1, e.g. -k 30.")
        dimensions = self.index.manifest.dimensions
        if latent.ndim != 2 or latent.shape[1] != dimensions:
            wide = f"{latent.shape[1]} dimensions" if latent.ndim == 2 else f"the shape {latent.shape}"
            raise InputError(f"Queries have {wide}, {self._name} has {dimensions}.", "Give a row for each query.")
        finite = np.isfinite(latent).all(axis=1)
        if not finite.all():
            first = int(np.argmin(finite))
            told = f"query {first}" if names is None else f"query '{names[first]}'"
            raise InputError(f"The latent of {told} is not a number.", "Leave out the cells that were not mapped.")
