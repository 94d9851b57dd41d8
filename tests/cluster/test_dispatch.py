"""The dispatcher on a real Ray: every unit ends as done or as quarantined, whatever dies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.dispatch import Dispatcher, Limits
from scviaduct.errors import DataError, EngineError
from scviaduct.values import Settings, Shard, Unit

SETTINGS = Settings()


def units(n: int, dataset: str = "d") -> list[Unit]:
    shards = [Shard("file:///x.h5ad", "file:///x.h5ad", "v", "", dataset, i, i + 1, 1, str(i)) for i in range(n)]
    return [Unit.of(shard, "reference", SETTINGS) for shard in shards]


@pytest.fixture
def pool_of(local_ray, tmp_path):
    """A pool whose readers and actors misbehave as they are told; what they did is left in files."""
    ray = local_ray

    def build(*, read_faults=None, map_faults=None, broken_start=False):
        log = str(tmp_path)

        @ray.remote(num_returns=2, max_retries=0, num_cpus=0.5)
        def read(start, faults, log):
            import os
            from pathlib import Path

            count = len(list(Path(log).glob(f"read-{start}-*")))
            Path(log, f"read-{start}-{count}").touch()
            fault = (faults or {}).get(start, ())
            if count < len(fault):
                if fault[count] == "die":
                    os._exit(1)
                raise fault[count]
            return 8, start

        @ray.remote(num_cpus=0.5)
        class Worker:
            def __init__(self, faults, log, broken):
                if broken:
                    raise ValueError("no such package")
                self.faults, self.log = faults or {}, log

            def describe(self):
                return {}

            def run(self, start, block):
                import os
                from pathlib import Path

                count = len(list(Path(self.log).glob(f"map-{start}-*")))
                Path(self.log, f"map-{start}-{count}").touch()
                fault = self.faults.get(start, ())
                if count < len(fault):
                    if fault[count] == "die":
                        os._exit(1)
                    raise fault[count]
                assert block == start
                return start

        class Pool:
            def read(self, unit):
                return tuple(read.remote(unit.shard.start, read_faults, log))

            def start(self):
                return Worker.remote(map_faults, log, broken_start)

            def ready(self, actor):
                return actor.describe.remote()

            def map(self, actor, unit, block):
                return actor.run.remote(unit.shard.start, block)

        return Pool()

    return build


def run(pool, work, **limits):
    done, bad = [], []
    dispatcher = Dispatcher(pool, Limits(actors=2, readers=2, **limits), lambda unit, _: done.append(unit), bad.append)
    outcome = dispatcher.run(work)
    assert [q.unit for q in outcome.quarantined] == [q.unit for q in bad]
    assert {unit.id for unit in done} | {q.unit.id for q in bad} == {unit.id for unit in work}
    assert len(done) + len(bad) == len(work)
    return outcome


def tries(folder: Path, what: str, start: int) -> int:
    return len(list(folder.glob(f"{what}-{start}-*")))


def test_every_unit_is_mapped_once(pool_of, tmp_path):
    outcome = run(pool_of(), units(20))
    assert sorted(outcome.completions) == list(range(20))
    assert all(tries(tmp_path, "map", i) == 1 for i in range(20))


def test_a_unit_that_kills_its_actor_is_quarantined_alone(pool_of, tmp_path):
    outcome = run(pool_of(map_faults={3: ["die"] * 9}), units(8))
    (bad,) = outcome.quarantined
    assert bad.unit.shard.start == 3
    assert bad.attempts == 3
    assert "ActorDied" in bad.reason
    assert tries(tmp_path, "map", 3) == 3
    assert sorted(outcome.completions) == [0, 1, 2, 4, 5, 6, 7]


def test_an_actor_that_dies_once_loses_nothing(pool_of):
    outcome = run(pool_of(map_faults={2: ["die"], 5: ["die", "die"]}), units(8))
    assert sorted(outcome.completions) == list(range(8))
    assert not outcome.quarantined


def test_a_reader_that_dies_is_tried_again(pool_of, tmp_path):
    outcome = run(pool_of(read_faults={1: ["die", OSError("link down")], 4: ["die"] * 9}), units(6))
    (bad,) = outcome.quarantined
    assert bad.unit.shard.start == 4
    assert sorted(outcome.completions) == [0, 1, 2, 3, 5]
    assert tries(tmp_path, "read", 1) == 3


def test_an_error_of_the_data_is_not_tried_again(pool_of, tmp_path):
    wrong = DataError("Cell 'x' has -1 counts.", "Look at it.")
    outcome = run(pool_of(map_faults={0: [wrong] * 9}, read_faults={1: [wrong] * 9}), units(4))
    assert {q.unit.shard.start: (q.attempts, q.reason) for q in outcome.quarantined} == {
        0: (1, "DataError: Cell 'x' has -1 counts. Look at it."),
        1: (1, "DataError: Cell 'x' has -1 counts. Look at it."),
    }
    assert tries(tmp_path, "map", 0) == 1
    assert tries(tmp_path, "read", 1) == 1


def test_another_error_is_tried_three_times(pool_of, tmp_path):
    outcome = run(pool_of(map_faults={0: [OSError("disk full")] * 9}), units(2))
    (bad,) = outcome.quarantined
    assert (bad.attempts, bad.reason) == (3, "OSError: disk full")
    assert tries(tmp_path, "map", 0) == 3


def test_actors_that_cannot_start_end_the_run(pool_of):
    with pytest.raises(EngineError, match=r"did not start: .*no such package"):
        run(pool_of(broken_start=True), units(2))


def test_a_block_larger_than_the_budget_still_goes_through(pool_of):
    outcome = run(pool_of(), units(5), bytes_in_flight=1)
    assert sorted(outcome.completions) == list(range(5))


def test_no_units_start_no_actor(pool_of):
    assert not run(pool_of(), []).completions


class Pairs:
    """Items of several units, as a test tells them: a unit's start is the shard's; what failed comes back by it."""

    def units(self, item):
        return item.of

    def split(self, item):
        return [item.only(unit) for unit in item.of]

    def failed(self, item, result):
        return [(item.only(unit), *result[unit.shard.start]) for unit in item.of if result[unit.shard.start]]


@dataclass(frozen=True)
class Pair:
    of: tuple[Unit, ...]

    @property
    def shard(self):
        return self.of[0].shard

    def only(self, unit):
        return Pair((unit,))


@pytest.fixture
def pairs_of(local_ray, tmp_path):
    """A pool of pairs whose units fail, or kill their actor, as they are told."""
    ray = local_ray

    def build(faults, unread=0):
        log = str(tmp_path)

        @ray.remote(num_returns=2, max_retries=0, num_cpus=0.5)
        def read(starts):
            from pathlib import Path

            count = len(list(Path(log).glob(f"read-{starts[0]}-*")))
            Path(log, f"read-{starts[0]}-{count}").touch()
            if len(starts) > 1 and count < unread:
                raise OSError("link down")
            return 8, starts

        @ray.remote(num_cpus=0.5)
        class Worker:
            def describe(self):
                return {}

            def run(self, starts):
                import os
                from pathlib import Path

                told = {}
                for start in starts:
                    count = len(list(Path(log).glob(f"map-{start}-*")))
                    Path(log, f"map-{start}-{count}").touch()
                    fault = faults.get(start, ())
                    told[start] = fault[count] if count < len(fault) else None
                    if told[start] == "die":
                        os._exit(1)
                return told

        class Pool:
            def read(self, item):
                return tuple(read.remote([unit.shard.start for unit in item.of]))

            def start(self):
                return Worker.remote()

            def ready(self, actor):
                return actor.describe.remote()

            def map(self, actor, item, block):
                return actor.run.remote(block)

        return Pool()

    return build


def paired(pool, work):
    done, bad = set(), []

    def on_done(item, result):
        done.update(unit.shard.start for unit in item.of if not result[unit.shard.start])

    pairs = [Pair(tuple(work[i : i + 2])) for i in range(0, len(work), 2)]
    outcome = Dispatcher(pool, Limits(actors=1, readers=1), on_done, bad.append, Pairs()).run(pairs)
    assert outcome.quarantined == bad
    return done, {item.unit.shard.start: (item.attempts, item.reason) for item in bad}


def test_of_an_item_only_what_failed_is_tried_again(pairs_of, tmp_path):
    again, wrong = ("OSError: full", False), ("DataError: nan", True)
    done, bad = paired(pairs_of({0: [again], 2: [again] * 9, 5: [wrong]}), units(6))
    assert done == {0, 1, 3, 4}
    assert bad == {2: (3, "OSError: full"), 5: (1, "DataError: nan")}
    assert [tries(tmp_path, "map", i) for i in range(6)] == [2, 1, 3, 1, 1, 1]


def test_a_unit_that_kills_its_actor_does_not_take_the_others_of_its_item_along(pairs_of):
    """The one that comes after it in the item is done, too: the last try is made a unit at a time."""
    done, bad = paired(pairs_of({0: ["die"] * 9, 3: ["die"]}), units(4))
    assert done == {1, 2, 3}
    assert [*bad] == [0]
    assert bad[0][0] == 3
    assert "ActorDied" in bad[0][1]


@pytest.mark.parametrize("unread", [1, 2])
def test_a_first_death_at_the_last_try_convicts_nobody(pairs_of, tmp_path, unread):
    """Tries that were lost to a network say nothing of who kills: one is left for each unit of the item, alone."""
    done, bad = paired(pairs_of({0: ["die"] * 9}, unread), units(2))
    assert done == {1}
    assert [*bad] == [0]
    assert bad[0][0] == 3
    assert tries(tmp_path, "map", 0) == 2
