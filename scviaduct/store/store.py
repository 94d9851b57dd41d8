"""A store: a folder of spaces, and the record of every run."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa
from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError

from scviaduct.errors import InputError, StoreError
from scviaduct.store.files import read_json, write_once
from scviaduct.store.space import Space

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from scviaduct.values import Plan

FORMAT = 1
"""Version of the layout of folders and tables."""
_RUNS = pa.schema(
    [
        ("run", pa.string()),
        ("attempt", pa.string()),
        ("space", pa.string()),
        ("reference", pa.string()),
        ("source", pa.string()),
        ("source_version", pa.string()),
        ("started", pa.int64()),
        ("ended", pa.int64()),
        ("units", pa.int64()),
        ("units_done", pa.int64()),
        ("cells", pa.int64()),
        ("cells_done", pa.int64()),
        ("quarantined", pa.string()),
        ("settings", pa.string()),
        ("accepted", pa.string()),
        ("software", pa.string()),
        ("seconds", pa.string()),
    ]
)
_JSON = ("quarantined", "settings", "accepted", "software", "seconds")
_TRIES = 20


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What is kept of one attempt at a run, written before anything of it becomes visible.

    Attributes
    ----------
    plan
        What was to be done.
    attempt
        Distinguishes the attempts at the same run.
    space
        Name of the space.
    started, ended
        Milliseconds since 1970, UTC.
    units_done, cells_done
        Of the plan, completed by this and earlier attempts.
    quarantined
        Units that could not be mapped: unit, dataset_id, start, stop, cells, attempts, reason.
    software
        Package to version.
    seconds
        Stage to its time.
    """

    plan: Plan
    attempt: str
    space: str
    started: int
    ended: int
    units_done: int
    cells_done: int
    quarantined: Sequence[Mapping[str, Any]] = ()
    software: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """As the ``runs`` table holds it."""
        plan = self.plan
        told = {
            "run": plan.run,
            "reference": f"{plan.reference}@{plan.reference_digest[:12]}",
            "source": plan.source,
            "source_version": plan.version,
            "units": len(plan.units),
            "cells": plan.cells,
            "quarantined": list(self.quarantined),
            "settings": asdict(plan.settings),
            "accepted": list(plan.accepted),
        }
        own = {name: getattr(self, name) for name in _RUNS.names if name not in told}
        return {name: json.dumps(value) if name in _JSON else value for name, value in (told | own).items()}


class Store:
    """A folder with a space per reference. Open one with :meth:`open` or :meth:`create`.

    Parameters
    ----------
    path
        The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: str | Path) -> Self:
        """Open a store, and make it first if it is not there.

        Raises
        ------
        InputError
            If the folder holds something else, cannot be made, or is not on a file system.
        """
        folder = _local(path)
        marker = folder / "store.json"
        if not marker.exists():
            # Another process may be making the same store, or have died doing so: what it left begins with a dot.
            strange = folder.exists() and (
                not folder.is_dir() or any(not path.name.startswith(".store.json.") for path in folder.iterdir())
            )
            if strange and not marker.exists():  # the other one may have come to its end meanwhile
                raise InputError(f"'{folder}' holds something that is not a store.", "Name an empty or a new folder.")
            try:
                write_once(marker, {"format": FORMAT})
            except (NotADirectoryError, PermissionError) as error:
                remedy = "Name a folder that can be made: --store STORE."
                raise InputError(f"'{folder}' cannot be made ({error.strerror}).", remedy) from error
        return cls.open(folder)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a store that is there.

        Raises
        ------
        InputError
            If it is not, or was written by a later version.
        """
        folder = _local(path)
        marker = folder / "store.json"
        if not marker.is_file():
            raise InputError(f"'{folder}' is not a store.", "scviaduct map SOURCE --reference NAME --store STORE.")
        found = read_json(marker)["format"]
        if found != FORMAT:
            remedy = "Use the version that wrote it."
            raise InputError(f"'{folder}' has format {found}, this version reads {FORMAT}.", remedy)
        return cls(folder)

    def spaces(self) -> list[Space]:
        """The spaces, by name."""
        return [Space(marker.parent) for marker in sorted(self.path.glob("spaces/*/space.json"))]

    def space(self, reference: str | None = None) -> Space:
        """The space of a reference.

        Parameters
        ----------
        reference
            Its name, its digest, or both as the space is called; None if the store has one only.

        Raises
        ------
        InputError
            If there is none, or more than one.
        """
        spaces = self.spaces()
        names = ", ".join(space.name for space in spaces) or "none"
        fitting = [
            space
            for space in spaces
            if reference is None or reference in (space.name, space.reference) or space.digest.startswith(reference)
        ]
        if len(fitting) == 1:
            return fitting[0]
        if not spaces:
            raise InputError(f"'{self.path}' has no space yet.", "Map something into it first: scviaduct map.")
        if not fitting:
            close = get_close_matches(reference or "", [space.reference for space in spaces], n=1)
            hint = f" (do you mean '{close[0]}'?)" if close else ""
            raise InputError(f"'{self.path}' has no space of reference '{reference}'{hint}.", f"There are: {names}.")
        raise InputError(f"'{self.path}' has several spaces that fit: {names}.", "Name one: --reference NAME.")

    def create_space(self, reference: str, digest: str, n_latent: int, labels: Sequence[str]) -> Space:
        """Open the space of a reference, and make it first if it is not there.

        Raises
        ------
        InputError
            If the name is not that of one folder, or the folder is the space of another reference.
        """
        spaces, name = self.path / "spaces", f"{reference}-{digest[:12]}"
        path = spaces / name
        if path.parent != spaces or path.name != name or {"\0", "%"} & set(name):  # Delta Lake reads %2F as /
            remedy = "Do not use a stranger's reference that is called so; add your own under another name."
            raise InputError(f"A space cannot be called '{name}': that is not one folder in '{spaces}'.", remedy)
        return Space.create(
            path, {"reference": reference, "digest": digest, "n_latent": n_latent, "labels": list(labels)}
        )

    def begin_run(self, plan: Plan, space: str) -> None:
        """Note that a run has begun; the first attempt's note stays."""
        told = asdict(plan) | {"space": space, "cells": plan.cells}
        write_once(self.path / "runs" / "_plans" / f"{plan.run}.json", told)

    def plan(self, run: str) -> dict[str, Any]:
        """The plan of a run, as it was when it first began.

        Raises
        ------
        InputError
            If no such run has begun.
        """
        path = self.path / "runs" / "_plans" / f"{run}.json"
        if not re.fullmatch(r"[0-9a-f]+", run) or not path.exists():
            known = sorted(file.stem for file in path.parent.glob("*.json"))
            raise InputError(f"No run '{run}' has begun here.", f"Runs: {', '.join(known) or 'none'}.")
        found: dict[str, Any] = read_json(path)
        return found

    def plans(self) -> Iterator[dict[str, Any]]:
        """The plans of all runs that have begun."""
        for file in sorted((self.path / "runs" / "_plans").glob("*.json")):
            yield read_json(file)

    def record(self, record: RunRecord) -> None:
        """Append a run's record."""
        row = pa.Table.from_pylist([record.row()], schema=_RUNS)
        for _ in range(_TRIES):
            try:
                write_deltalake(str(self.path / "runs"), row, mode="append")
            except CommitFailedError:
                continue
            except DeltaError as error:  # so it says that a disk is full
                raise OSError(str(error)) from error
            return
        remedy = "What is staged is kept: run the command again."
        raise StoreError("Other writers kept writing to the runs table.", remedy)

    def records(self) -> list[dict[str, Any]]:
        """Records of all attempts, the newest first."""
        path = self.path / "runs"
        if not DeltaTable.is_deltatable(str(path)):
            return []
        rows = pa.table(DeltaTable(str(path)).to_pyarrow_table()).to_pylist()
        read = [{name: json.loads(value) if name in _JSON else value for name, value in row.items()} for row in rows]
        return sorted(read, key=lambda row: -row["started"])

    def runs(self) -> list[dict[str, Any]]:
        """Every run that has begun, newest first: its last record, its state and its version.

        The state is ``committed`` if a version names the run, ``failed`` if its last attempt committed nothing, and
        ``open`` if it was begun and neither finished nor failed: the same command goes on with it.
        """
        versions = {space.name: space.runs() for space in self.spaces()}
        last: dict[str, dict[str, Any]] = {}
        for row in self.records():
            last.setdefault(row["run"], row)
        found = []
        for file in (self.path / "runs" / "_plans").glob("*.json"):
            plan = read_json(file)
            version = versions.get(plan["space"], {}).get(plan["run"])
            row = last.get(plan["run"]) or _unfinished(plan, file)
            failed = plan["run"] in last and row["units_done"] == 0
            state = "committed" if version is not None else "failed" if failed else "open"
            found.append(row | {"state": state, "version": version})
        return sorted(found, key=lambda row: -row["started"])


def _unfinished(plan: dict[str, Any], file: Path) -> dict[str, Any]:
    """What is known of a run that left no record."""
    space = file.parents[2] / "spaces" / plan["space"]
    there = (space / "space.json").exists()  # unless someone removed it
    done = Space(space).completions(unit["id"] for unit in plan["units"]) if there else {}
    return {
        "run": plan["run"],
        "space": plan["space"],
        "reference": f"{plan['reference']}@{plan['reference_digest'][:12]}",
        "source": plan["source"],
        "source_version": plan["version"],
        "started": int(file.stat().st_mtime * 1000),
        "ended": None,
        "units": len(plan["units"]),
        "units_done": len(done),
        "cells": plan["cells"],
        "cells_done": sum(completion.cells.rows for completion in done.values()),
        "quarantined": [],
        "settings": plan["settings"],
        "accepted": plan["accepted"],
        "software": {},
        "seconds": {},
    }


def _local(path: str | Path) -> Path:
    text = str(path)
    scheme = re.match(r"^([a-z][a-z0-9+.-]+)://", text)
    if scheme and scheme.group(1) != "file":
        raise InputError(
            f"Store '{text}' is on object storage, which this version does not write.",
            "Name a folder on a file system that every node shares.",
        )
    place = Path(text.removeprefix("file://")).expanduser().absolute()
    if found := re.search(r"%[0-9A-Fa-f]{2}|[\[\]^|\\]", str(place)):
        # delta-rs takes a path for a URL: 'a%20b' would be the folder 'a b'.
        raise InputError(f"Store '{place}' has '{found[0]}' in its path.", "Name a folder without it.")
    return place
