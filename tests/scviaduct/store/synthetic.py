"""Units whose cells say who wrote them: the latent of a cell is ``(row, stamp, 0.5, -row)``, its label ``type N``."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from scviaduct.store import Completion, RunRecord, Space, Stager, Store
from scviaduct.values import CellBlock, Mapping, Plan, Settings, Shard, Unit

SOURCE = "file:///data/query.h5ad"
DIGEST = "0123456789abcdef" * 2
DIMENSIONS = 4
KEPT = {"text": "string", "truth": "bool", "whole": "int64", "real": "double"}


def process(target, *args):
    """Start a process that holds nothing of this one's; what takes seconds to import is imported once for all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    started = context.Process(target=target, args=args, daemon=True)
    started.start()
    return started


def shard_of(rows, dataset="d", stamp=0, source=SOURCE, uri=None):
    """A shard of these source rows; another stamp is another version of the source."""
    rows = np.asarray(rows, np.int64)
    told = f"{rows.tolist()}"
    bounds = int(rows.min()), int(rows.max()) + 1
    return Shard(uri or source, source, f"v{stamp}", "", dataset, *bounds, len(rows), told)


def block_of(shard, rows, obs=None):
    """Cells ``c{row}`` without a count, and these obs columns."""
    rows = np.asarray(rows, np.int64)
    table = pa.table({"observation_id": [f"c{row}" for row in rows], **(obs or {})})
    nothing = np.zeros(0, np.int32), np.zeros(0, np.float32)
    return CellBlock(shard, np.zeros(len(rows) + 1, np.int64), *nothing, 3, rows, table)


def mapping_of(rows, stamp=0, unmapped=(), latent=None):
    """What comes out for these rows; those in ``unmapped`` have no position and no label."""
    rows = np.asarray(rows)
    mapped = ~np.isin(rows, list(unmapped))
    if latent is None:
        columns = (rows, np.full(len(rows), stamp), np.full(len(rows), 0.5), -rows)
        latent = np.stack(columns, axis=1)
    figures = (0.75, 0.5, np.where(rows % 2, 0.25, 1.25))
    return Mapping(
        np.where(mapped[:, None], latent, np.nan).astype(np.float32),
        mapped,
        np.where(mapped, 0, -1).astype(np.int32),
        (f"type {stamp}",),
        *(np.where(mapped, figure, np.nan).astype(np.float32) for figure in figures),
    )


@dataclass
class Lab:
    """A store with one space, and short ways to stage and commit."""

    store: Store
    space: Space

    @classmethod
    def make(cls, folder, reference="pbmc", digest=DIGEST):
        store = Store.create(folder)
        return cls(store, store.create_space(reference, digest, DIMENSIONS, ("type 0", "type 1")))

    def unit(self, rows, settings=None, **where):
        return Unit.of(shard_of(rows, **where), self.space.digest, settings or Settings())

    def stage(self, rows, dataset="d", stamp=0, *, kept=None, obs=None, unmapped=(), run="run", latent=None, **where):
        settings = Settings(keep_obs=kept or {})
        unit = self.unit(rows, settings, dataset=dataset, stamp=stamp, **where)
        stager = Stager(str(self.space.path), f"{self.space.reference}@{self.space.digest[:12]}", run)
        return stager.stage(unit, block_of(unit.shard, rows, obs), mapping_of(rows, stamp, unmapped, latent), settings)

    def commit(self, *completions: Completion, run="run", kept=None, before=lambda: None):
        return self.space.commit(list(completions), kept or {}, {"run": run}, before)

    def put(self, rows, dataset="d", stamp=0, *, run=None, **more):
        """Stage one unit and commit it."""
        run = run or f"{stamp:04x}"
        return self.commit(self.stage(rows, dataset, stamp, run=run, **more), run=run, kept=more.get("kept"))

    def plan(self, units, run="ab12", **more):
        plan = Plan(run, self.space.reference, self.space.digest, SOURCE, "v0", Settings(), tuple(units))
        return replace(plan, **more)

    def record(self, plan, attempt="1", started=1_000, done=None, **more):
        done = len(plan.units) if done is None else done
        cells = sum(unit.shard.cells for unit in plan.units[:done])
        return RunRecord(plan, attempt, self.space.name, started, started + 5, done, cells, **more)

    def stamps(self, as_of=None, space=None):
        """Key to the stamp in its latent; a key that is there twice, or a row that mixes two writers, fails."""
        found = {}
        for table in (space or self.space).read(as_of=as_of):
            for row in table.to_pylist():
                key = row["dataset_id"], row["observation_id"]
                assert key not in found, f"{key} is there twice"
                assert row["latent"][0] == row["source_row"] == int(row["observation_id"][1:])
                assert row["label"] == f"type {row['latent'][1]:g}"
                found[key] = int(row["latent"][1])
        return found
