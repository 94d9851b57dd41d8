"""Comparing queries with segments: all of their cells, or those of some lists."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from scviaduct.store.index.comparing import FARTHEST, LAST, MOST, scan, settle
from scviaduct.store.index.kernels import invert
from scviaduct.store.index.quantizer import cores

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy.typing as npt

    from scviaduct.store.index.segments import Segment
    from scviaduct.values import FloatArray, IntArray, LongArray

SLOT = 40
"""A slot is the number of a segment, shifted by so many bits, plus the place of a vector in it."""
_MORE = 34
"""Places of a query beyond its neighbours, at least."""
_ALONE = 64  # queries of a thread, below which starting it takes longer


def frozen(values: npt.NDArray[Any]) -> Any:
    """A view that cannot be written to: the loops are compiled for such, which memory-mapped arrays are."""
    view = values.view()
    view.flags.writeable = False
    return view


_ALL = np.zeros(0, np.int64), np.zeros(0, np.int32)
_EVERY = frozen(np.zeros(0, bool))


class Found(NamedTuple):
    """Neighbours of queries, the nearest first; ties in the order of positions.

    Attributes
    ----------
    distance
        Squared, float32, shape ``(n_queries, k)``; infinite where there are fewer neighbours.
    position
        Among the version's cells, int64, shape ``(n_queries, k)``.
    slot
        Segment and place of each, int64, shape ``(n_queries, k)``; -1 for none.
    """

    distance: FloatArray
    position: LongArray
    slot: LongArray

    @classmethod
    def none(cls, queries: int, k: int) -> Found:
        """No neighbours."""
        return cls(
            np.full((queries, k), np.inf, np.float32),
            np.full((queries, k), LAST, np.int64),
            np.full((queries, k), -1, np.int64),
        )

    @classmethod
    def merged(cls, parts: Sequence[Found], k: int) -> Found:
        """The k nearest of several."""
        if len(parts) == 1:
            (one,) = parts
            # What comes from another process is read-only.
            return one if one.slot.flags.writeable else cls(one.distance.copy(), one.position.copy(), one.slot.copy())
        distance = np.concatenate([part.distance for part in parts], axis=1)
        position = np.concatenate([part.position for part in parts], axis=1)
        slot = np.concatenate([part.slot for part in parts], axis=1)
        order = np.lexsort((position, distance), axis=1)[:, :k]
        distance, position = np.take_along_axis(distance, order, 1), np.take_along_axis(position, order, 1)
        return cls(distance, position, np.take_along_axis(slot, order, 1))

    @classmethod
    def stacked(cls, parts: Sequence[Found]) -> Found:
        """What was found for parts of the queries, one after the other."""
        return cls(
            np.concatenate([part.distance for part in parts]),
            np.concatenate([part.position for part in parts]),
            np.concatenate([part.slot for part in parts]),
        )

    def replace(self, queries: LongArray, better: Found) -> None:
        """Put in what was found for some of the queries."""
        self.distance[queries], self.position[queries], self.slot[queries] = better


class Nearest(NamedTuple):
    """The nearest vectors of each query that were seen so far, and some more.

    What is near enough is put behind the others, and when the row is full the k nearest stay. That takes less than half
    of the time that a heap takes, which a processor guesses wrong at every level.

    Attributes
    ----------
    key, slots
        uint64, int64, shape ``(n_queries, width)``: bits of the squared distance above the position; and the slot.
    limit
        uint64, shape ``(n_queries,)``: key of the k-th when the row was last full; what is beyond it is passed over.
    places
        int64, shape ``(n_queries,)``: how many there are.
    k
        Neighbours that are wanted.
    """

    key: npt.NDArray[np.uint64]
    slots: LongArray
    limit: npt.NDArray[np.uint64]
    places: LongArray
    k: int

    @classmethod
    def none(cls, queries: int, k: int, bounds: FloatArray | None = None) -> Nearest:
        """None yet.

        Parameters
        ----------
        queries, k
            How many, and neighbours of each.
        bounds
            float32, shape ``(n_queries,)``: squared distances beyond which nothing is taken; None for all of infinity.
        """
        shape = queries, k + max(_MORE, k // 4)
        limit, places = np.full(queries, FARTHEST), np.zeros(queries, np.int64)
        if bounds is not None:
            limit = bounds.view(np.uint32).astype(np.uint64) << np.uint64(32) | np.uint64(MOST)
        return cls(np.empty(shape, np.uint64), np.empty(shape, np.int64), limit, places, k)

    def found(self) -> Found:
        """The k of each query, the nearest first. Nothing is kept here."""
        return settled(self.key, self.slots, self.places, self.k)


def settled(key: npt.NDArray[np.uint64], slots: LongArray, places: LongArray, k: int) -> Found:
    """The k nearest of what was compared, which is lost: see :func:`scviaduct.store.index.comparing.settle`."""
    shape = len(key), k
    found = Found(np.empty(shape, np.float32), np.empty(shape, np.int64), np.empty(shape, np.int64))
    settle(key, slots, places, *found)
    return found


class Block(NamedTuple):
    """Vectors that are compared, in lists; arrays as :func:`scviaduct.store.index.comparing.scan` takes them."""

    x: FloatArray
    offsets: LongArray
    members: IntArray
    bases: LongArray
    mask: npt.NDArray[np.bool_]
    first: int

    @classmethod
    def of(cls, number: int, segment: Segment, mask: npt.NDArray[np.bool_] = _EVERY) -> Block:
        """A segment, or those of its vectors that a mask names."""
        bases = frozen(segment.bases)
        return cls(segment.x, segment.offsets, segment.members, bases, frozen(mask), number << SLOT)

    @classmethod
    def plain(cls, x: FloatArray, offsets: LongArray, positions: IntArray) -> Block:
        """Vectors whose positions are told one by one."""
        members = np.stack([np.zeros_like(positions), positions], axis=1)
        return cls(frozen(x), frozen(offsets), frozen(members), frozen(np.zeros(1, np.int64)), _EVERY, 0)


def scan_blocks(blocks: Sequence[Block], latent: FloatArray, k: int) -> Found:
    """Compare queries with every vector of blocks."""
    nearest = Nearest.none(len(latent), k)
    for block in blocks:
        scan(*block[:5], *_ALL, latent, *nearest, block.first)
    return nearest.found()


def scan_lists(
    blocks: Sequence[Block],
    latent: FloatArray,
    k: int,
    order: LongArray | IntArray,
    upto: LongArray,
    bounds: FloatArray | None = None,
) -> Found:
    """Compare each query with some lists of blocks; each list is read once, for all of its queries.

    To begin with the nearest list of each, so that most of what the others hold is too far already, would spare some of
    what is kept for a while, and have much of the memory read twice.

    Parameters
    ----------
    blocks
        All of the same lists.
    latent, k
        Queries, float32, shape ``(n_queries, dimensions)``; neighbours of each.
    order, upto
        Integers, shape ``(n_queries, n)``, and int64, shape ``(n_queries,)``: lists of each, in so many columns.
    bounds
        As :meth:`Nearest.none` takes them.
    """
    nearest = Nearest.none(len(latent), k, bounds)
    lists = len(blocks[0].offsets) - 1 if blocks else 0
    pairs = invert(order, upto, lists)
    for block in blocks:
        scan(*block[:5], *pairs, latent, *nearest, block.first)
    return nearest.found()


def scan_all(segments: Mapping[int, Segment], latent: FloatArray, k: int) -> Found:
    """Compare queries with every vector of segments."""
    return scan_blocks([Block.of(*one) for one in segments.items()], latent, k)


def threaded(call: Callable[..., Found], *arrays: Any, threads: int | None = None) -> Found:
    """What a call finds with parts of the queries, a thread each; parameters are those of :func:`in_threads`."""
    found = in_threads(call, *arrays, threads=threads)
    return found[0] if len(found) == 1 else Found.stacked(found)


def in_threads[Made](call: Callable[..., Made], *arrays: Any, threads: int | None = None) -> list[Made]:
    """Call with parts of the queries, a thread each.

    Parameters
    ----------
    call
        Takes parts of ``arrays``, row for row; what it makes of a query does not depend on the others.
    arrays
        A row per query.
    threads
        Threads at most; None for one a core of this process.
    """
    count = max(1, min(threads or cores(), len(arrays[0]) // _ALONE))
    if count == 1:
        return [call(*arrays)]
    parts = zip(*(np.array_split(one, count) for one in arrays), strict=True)
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda part: call(*part), parts))
