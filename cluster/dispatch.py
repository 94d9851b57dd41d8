"""Dispatch: blocks flow from reader tasks to mapping actors, and every unit ends as done or as quarantined.

What is dispatched is an item: a unit, or several that one reading serves (:mod:`cluster.work`).

The driver decides everything; Ray only runs it. Reading and mapping are separate stages, so that reading goes on while
actors compute; what has been read and not yet mapped is bounded by a byte budget; an actor has at most two blocks, one
that it maps and one that waits. Retries are decided here, because Ray would charge the death of an actor to every call
that waits in its queue.
"""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayError, RayTaskError

from cluster.work import ATTEMPTS, Limits, Outcome, Quarantined, Sharded, Whole
from scviaduct.errors import DataError, EngineError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cluster.work import Parts, Pool


@dataclass(slots=True)
class _Work[Item]:
    item: Item
    attempts: int = 0
    # An item that was in an actor when it died is tried alone, so that a further death convicts exactly one unit.
    suspect: bool = False
    block: ray.ObjectRef[Any] | None = None
    nbytes: int = 0


@dataclass(slots=True, eq=False)
class _Slot:
    actor: Any
    ready_ref: ray.ObjectRef[Any]
    ready: bool = False
    works: list[_Work[Any]] = field(default_factory=list)
    last_key: str = ""

    def room(self, work: _Work[Any], limit: int) -> bool:
        if not self.ready or any(other.suspect for other in self.works):
            return False
        return not self.works if work.suspect else len(self.works) < limit


class Dispatcher[Item: Sharded]:
    """Runs items over a pool until each unit is done or quarantined.

    Parameters
    ----------
    pool
        Starts readers and actors.
    limits
        Bounds.
    on_done
        Called with every item and what came out of it, as it arrives.
    on_quarantine
        Called with every quarantined unit.
    parts
        How items come apart; None for items that are units.
    """

    def __init__(
        self,
        pool: Pool[Item],
        limits: Limits,
        on_done: Callable[[Item, Any], None],
        on_quarantine: Callable[[Quarantined], None],
        parts: Parts[Item] | None = None,
    ) -> None:
        self._pool = pool
        self._limits = limits
        self._on_done = on_done
        self._on_quarantine = on_quarantine
        self._parts = parts or cast("Parts[Item]", Whole())
        self._pending: deque[_Work[Item]] = deque()
        self._reading: dict[ray.ObjectRef[Any], _Work[Item]] = {}
        self._read: deque[_Work[Item]] = deque()
        self._mapping: dict[ray.ObjectRef[Any], tuple[_Slot, _Work[Item]]] = {}
        self._slots: list[_Slot] = []
        self._outcome = Outcome()
        self._largest = 0
        self._failed_starts = 0
        self._on_ready: Callable[[Any], None] = _nothing

    def run(self, items: Sequence[Item], on_ready: Callable[[Any], None] | None = None) -> Outcome:
        """Map all items.

        Whatever ends the call, an interrupt included, ends the actors too; completed units keep their records, so the
        same run goes on from there.

        Parameters
        ----------
        items
            What to map.
        on_ready
            Called when the first actor has loaded its reference, with what it says of itself.

        Raises
        ------
        EngineError
            If actors cannot be started.
        """
        self._pending = deque(_Work(item) for item in items)
        self._on_ready = on_ready or _nothing
        try:
            for _ in range(min(self._limits.actors, len(items))):
                self._start()
            while self._pending or self._reading or self._read or self._mapping:
                self._fill_readers()
                self._fill_actors()
                self._wait()
            return self._outcome
        finally:
            for slot in self._slots:
                ray.kill(slot.actor)
            for ref in self._reading:
                ray.cancel(ref, force=True)

    def _start(self) -> None:
        actor = self._pool.start()
        self._slots.append(_Slot(actor, self._pool.ready(actor)))

    def _held(self) -> int:
        return sum(work.nbytes for work in self._read) + sum(work.nbytes for _, work in self._mapping.values())

    def _fill_readers(self) -> None:
        while self._pending and len(self._reading) < self._limits.readers:
            # What is being read counts as the largest block seen: its size is known only when it is there.
            expected = self._held() + (len(self._reading) + 1) * self._largest
            if expected > self._limits.bytes_in_flight and (self._reading or self._read or self._mapping):
                return
            work = self._pending.popleft()
            size, work.block = self._pool.read(work.item)
            self._reading[size] = work

    def _fill_actors(self) -> None:
        waiting: deque[_Work[Item]] = deque()
        while self._read:
            work = self._read.popleft()
            slot = self._route(work)
            if slot is None:
                waiting.append(work)
                continue
            slot.works.append(work)
            slot.last_key = work.item.shard.dataset_id
            self._mapping[self._pool.map(slot.actor, work.item, work.block)] = (slot, work)
        self._read = waiting

    def _route(self, work: _Work[Item]) -> _Slot | None:
        """The actor for a block: the one that last had its dataset if it has room, else the least busy one."""
        open_slots = [slot for slot in self._slots if slot.room(work, self._limits.blocks_per_actor)]
        if not open_slots:
            return None
        key = work.item.shard.dataset_id
        return min(open_slots, key=lambda slot: (len(slot.works), slot.last_key != key))

    def _wait(self) -> None:
        starting = {slot.ready_ref: slot for slot in self._slots if not slot.ready}
        done, _ = ray.wait([*self._mapping, *self._reading, *starting], num_returns=1, timeout=1.0)
        for ref in done:
            if ref in self._mapping:
                self._finish_map(ref)
            elif ref in self._reading:
                self._finish_read(ref)
            elif starting[ref] in self._slots:
                self._finish_start(starting[ref])

    def _finish_start(self, slot: _Slot) -> None:
        try:
            described = ray.get(slot.ready_ref)
        except RayError as error:
            self._slots.remove(slot)
            self._failed_starts += 1
            if self._failed_starts >= self._limits.start_attempts:
                raise EngineError(
                    f"{self._failed_starts} mapping actors in a row did not start: {_cause(error)}.",
                    "Can every node read the reference package? Completed units are kept: run the same command again.",
                ) from error
            self._start()
        else:
            if not any(other.ready for other in self._slots):
                self._on_ready(described)
                self._on_ready = _nothing
            slot.ready = True
            self._failed_starts = 0

    def _finish_read(self, ref: ray.ObjectRef[Any]) -> None:
        work = self._reading.pop(ref)
        try:
            work.nbytes = ray.get(ref)
        except (RayError, DataError) as error:
            # The block has the same error; Ray prints the traceback of one that nobody asked for.
            with contextlib.suppress(RayError, DataError):
                ray.get(work.block)
            work.block = None
            self._retry(work, *_judged(error))
            return
        self._largest = max(self._largest, work.nbytes)
        self._read.append(work)

    def _finish_map(self, ref: ray.ObjectRef[Any]) -> None:
        slot, work = self._mapping.pop(ref)
        slot.works.remove(work)
        try:
            result = ray.get(ref)
        except ActorUnavailableError as error:
            self._forget(work)
            self._retry(work, *_judged(error))
        except (ActorDiedError, RayActorError) as error:
            if slot in self._slots:
                self._slots.remove(slot)
                self._start()
            self._forget(work)
            if not work.suspect:  # nobody knows which of several it was: a try is left, however many were lost before
                work.attempts = min(work.attempts, self._limits.attempts - 2)
            work.suspect = True
            self._retry(work, *_judged(error))
        except (RayError, DataError) as error:
            self._forget(work)
            self._retry(work, *_judged(error))
        else:
            self._forget(work)
            self._outcome.completions.append(result)
            self._on_done(work.item, result)
            for part, reason, final in self._parts.failed(work.item, result):
                self._retry(_Work(part, work.attempts), reason, final)

    @staticmethod
    def _forget(work: _Work[Item]) -> None:
        work.block, work.nbytes = None, 0

    def _retry(self, work: _Work[Item], reason: str, final: bool) -> None:  # noqa: FBT001 - as _judged returns it
        work.attempts += 1
        if not final and work.attempts < self._limits.attempts:
            # The last try of what was in a dying actor is made a unit at a time, so that the others of it are done.
            last = work.suspect and work.attempts == self._limits.attempts - 1
            items = self._parts.split(work.item) if last else (work.item,)
            self._pending.extend(_Work(item, work.attempts, work.suspect) for item in items)
            return
        for unit in self._parts.units(work.item):
            quarantined = Quarantined(unit, work.attempts, reason)
            self._outcome.quarantined.append(quarantined)
            self._on_quarantine(quarantined)


def _nothing(_: object) -> None:
    """Tells nobody."""


def _judged(error: Exception) -> tuple[str, bool]:
    """Why something failed, and whether it would fail again for sure."""
    return _cause(error), isinstance(error, DataError) or isinstance(getattr(error, "cause", None), DataError)


def _cause(error: Exception) -> str:
    """The error in one line, without Ray's remote traceback."""
    inner = error.cause if isinstance(error, RayTaskError) and error.cause is not None else error
    lines = str(inner).strip().splitlines()
    if not lines:
        return type(inner).__name__
    # What a constructor raised stands at the end of a traceback; everything else says what it is at the beginning.
    told = lines[-1] if "creation task" in lines[0] else lines[0]
    return f"{type(inner).__name__}: {told}"


__all__ = ["ATTEMPTS", "Dispatcher", "Limits", "Outcome", "Quarantined"]
