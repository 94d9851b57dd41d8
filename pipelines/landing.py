"""Landing a source: transcode it once into a folder that later runs read many times faster."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from actors.landing import land_task
from cluster.connect import connect, require_answer
from cluster.tasks import run_tasks
from pipelines.jobs import SHARD_CELLS
from pipelines.landed import LandResult, Unreadable
from pipelines.progress import reporter
from scviaduct.errors import DataError, EngineError, InputError
from scviaduct.landing import Landing, land_piece, plan_landing
from scviaduct.landing.planning import bytes_a_cell, foreseen
from scviaduct.landing.pruning import prune as prune_landing
from scviaduct.sources import open_source
from scviaduct.sources.uri import parse

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipelines.progress import Reporter
    from scviaduct.landing import LandingPlan, Manifest, Piece, PieceJob
    from scviaduct.landing.writing import Landed


def land(
    source: str | None = None,
    *,
    out: str,
    piece_cells: int | None = None,
    engine: Literal["ray", "inline"] = "ray",
    address: str | None = None,
    readers: int | None = None,
    prune: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
) -> LandResult:
    """Transcode a source into a landing, or refresh one by what changed.

    Parameters
    ----------
    source
        URI of the cells; None only with ``prune``.
    out
        Folder of the landing, made if absent; on a cluster every node must be able to write it.
    piece_cells
        Cells of a piece; None for those of the landing that is there, or 16,384.
    engine
        ``ray``, or ``inline`` to land one piece after the other in this process. Both write the same bytes.
    address
        Ray cluster: ``local``, ``auto`` or ``HOST:PORT``; None takes ``RAY_ADDRESS``, and ``local`` without it.
    readers
        Pieces at a time; None for one a CPU.
    prune
        Remove pieces that the landing does not name any more.
    dry_run
        Say what would be written, reused and removed, and stop.
    quiet
        Without progress.

    Raises
    ------
    InputError
        If an argument or the source is wrong, or the folder holds something else.
    EngineError
        If a task is lost time after time. Complete pieces are kept.
    """
    landing = Landing.at(out)
    if piece_cells is not None and piece_cells < 1:
        raise InputError(f"--piece-cells {piece_cells} holds no cell.", f"Give at least 1, such as {SHARD_CELLS}.")
    if engine not in ("ray", "inline"):
        raise InputError(f"--engine {engine} is none.", "There are: ray, inline.")
    if source is None:
        return _pruned(landing, asked=prune, dry_run=dry_run)
    if engine == "ray" and not dry_run:
        require_answer(address)
    began = time.monotonic()
    with reporter(quiet=quiet) as progress, open_source(source) as opened:
        there = landing.manifest() if landing.is_there else None
        require_same(landing, there, opened.uri)
        plan = plan_landing(opened, piece_cells or (there.piece_cells if there else SHARD_CELLS))
        scanned = time.monotonic()
        if dry_run:
            return _foreseen(landing, plan, began, prune=prune)
        with landing.writing():
            _require_unchanged(landing, there, opened.uri)
            run = LandingRun(landing, plan, progress)
            run.inline() if engine == "inline" else run.on_ray(address, readers)
            seconds = {"scan": round(scanned - began, 3), "land": round(time.monotonic() - scanned, 3)}
            return replace(run.publish(prune=prune), seconds=seconds)


class LandingRun:
    """The pieces of a landing: which are left, how they are written, and their publication.

    Parameters
    ----------
    landing
        Where they go; hold its ``writing``.
    plan
        What is to be landed.
    progress
        Told of every piece.
    """

    def __init__(self, landing: Landing, plan: LandingPlan, progress: Reporter) -> None:
        self._landing, self._plan, self._progress = landing, plan, progress
        self._pieces: dict[PieceJob, Piece] = plan.recalled(landing)
        self._written = 0
        self._failures: list[Unreadable] = []
        plan.begin(landing)

    @property
    def todo(self) -> list[PieceJob]:
        """Pieces that are not complete."""
        return [job for jobs in self._plan.jobs for job in jobs if job not in self._pieces]

    def inline(self) -> None:
        """Land one piece after the other in this process."""
        todo = self._begun()
        for job in todo:
            try:
                landed = land_piece(self._landing, job)
            except DataError as error:
                self._failed(job, error)
            else:
                self.done(job, landed)

    def on_ray(self, address: str | None, readers: int | None) -> None:
        """Land pieces in tasks."""
        todo = self._begun()
        if not todo:
            return
        with connect(address) as resources:
            at_once = readers or max(1, int(resources.cpus))
            task = land_task.options(num_cpus=min(1.0, resources.cpus / at_once))
            self._progress.say(f"{at_once} reader{'s' * (at_once != 1)}")
            run_tasks(todo, lambda job: task.remote(self._landing, job), at_once, self.done, self._failed)

    def _begun(self) -> list[PieceJob]:
        todo = self.todo
        left = sum(job.shard.cells for job in todo)
        if todo:
            self._progress.start("landing", self._plan.cells, self._plan.cells - left)
        return todo

    def done(self, job: PieceJob, landed: Landed) -> None:
        """A piece is in its place."""
        self._pieces[job] = landed.piece
        self._written += landed.counts_written
        if landed.piece.reason:
            self._say_unreadable(job)
        self._progress.advance(job.shard.cells)

    def _failed(self, job: PieceJob, error: Exception) -> None:
        """Cells that cannot be read are told at the end; whatever else ends a task ends the run."""
        if not isinstance(error, DataError):
            if isinstance(error, OSError | InputError):
                raise error
            shard = job.shard
            raise EngineError(
                f"Landing {shard.dataset_id} rows {shard.start}-{shard.stop} failed ({type(error).__name__}: {error}).",
                "Complete pieces are kept: run the same command again.",
            ) from error
        self._failures.append(_unreadable(job, f"{type(error).__name__}: {error}"))
        self._say_unreadable(job)

    def _say_unreadable(self, job: PieceJob) -> None:
        shard = job.shard
        self._progress.say(f"unreadable: {shard.dataset_id} rows {shard.start:,}-{shard.stop:,}")

    def publish(self, *, prune: bool = False) -> LandResult:
        """Make all pieces visible at once, unless cells of one could not be read."""
        if self._failures:
            return replace(self._told("failed"), unreadable=tuple(self._failures))
        manifest = self._plan.finished(self._pieces)
        if self._landing.is_there and _same(self._landing.manifest(), manifest):
            result = self._told("nothing to do")
        else:
            self._landing.publish(manifest)
            result = self._told("landed")
        return replace(result, pruned=prune_landing(self._landing) if prune else None)

    def _told(self, state: Literal["nothing to do", "landed", "failed"]) -> LandResult:
        pieces = self._pieces
        unread = tuple(_unreadable(job, piece.reason) for job, piece in pieces.items() if piece.reason)
        return LandResult(
            state=state,
            **_named(self._landing, self._plan),
            written=self._written,
            reused=len(pieces) - self._written - len(unread),
            nbytes=sum(piece.nbytes for piece in pieces.values()),
            fractional=sum(not piece.integer for piece in pieces.values()),
            unreadable=unread,
        )


def _unreadable(job: PieceJob, reason: str) -> Unreadable:
    shard = job.shard
    return Unreadable(shard.dataset_id, shard.start, shard.stop, shard.cells, reason)


def _same(one: Manifest, other: Manifest) -> bool:
    return replace(one, software={}) == replace(other, software={})


def _named(landing: Landing, plan: LandingPlan) -> dict[str, Any]:
    """What every result says of a plan."""
    return {
        "landing": str(landing.path),
        "source": plan.manifest.uri,
        "version": plan.manifest.version,
        "cells": plan.cells,
        "pieces": sum(len(jobs) for jobs in plan.jobs),
        "left_out": {name: reason for part in plan.manifest.parts for name, reason in part.left_out.items()},
    }


def _pruned(landing: Landing, *, asked: bool, dry_run: bool) -> LandResult:
    if not asked:
        raise InputError("There is no source to land.", "Name one: scviaduct land SOURCE --out LANDING.")
    manifest = landing.manifest()
    with nullcontext() if dry_run else landing.writing():
        pruned = prune_landing(landing, dry_run=dry_run)
    sizes = manifest.cells, len(manifest.pieces)
    return LandResult(
        str(landing.path), "planned" if dry_run else "pruned", manifest.uri, manifest.version, *sizes, pruned=pruned
    )


def _foreseen(landing: Landing, plan: LandingPlan, began: float, *, prune: bool) -> LandResult:
    """What landing would do."""
    there = plan.recalled(landing)
    left = foreseen(landing, [job for jobs in plan.jobs for job in jobs if job not in there])
    todo = [job for job, piece in left.items() if not piece.counts_digest]
    about = int(bytes_a_cell(todo) * sum(job.shard.cells for job in todo)) if todo else 0
    return LandResult(
        state="planned",
        **_named(landing, plan),
        written=len(todo),
        reused=len(there) + len(left) - len(todo),
        nbytes=about,
        pruned=prune_landing(landing, plan.finished(there | left), dry_run=True) if prune else None,
        seconds={"scan": round(time.monotonic() - began, 3)},
    )


def require_same(landing: Landing, there: Manifest | None, uri: str) -> None:
    """Refuse to put another source, or another selection of it, in the place of what was landed."""
    if there is not None and _place(there.uri) != _place(uri):
        raise InputError(
            f"{landing.path} holds {there.uri}, not {uri}.", "Name another folder: --out, or delete this one."
        )


def _require_unchanged(landing: Landing, there: Manifest | None, uri: str) -> None:
    """Refuse to go on if another process landed between the first look at a folder and its lock."""
    now = landing.manifest() if landing.is_there else None
    if now != there:
        require_same(landing, now, uri)
        raise InputError(f"{landing.path} was landed into meanwhile.", "Run the same command again.")


def _place(uri: str) -> tuple[str, str, Mapping[str, str]]:
    """What stays when a source comes out in another version: where it is, and all that chooses cells or values."""
    address = parse(uri)
    # A release of a Census is its version, wherever the collection lies.
    where, varies = ("", ("version", "uri")) if address.scheme == "census" else (address.location, ("version",))
    return address.scheme, where, {name: told for name, told in address.parameters.items() if name not in varies}
