"""The two Delta tables of a space, as far as this project uses Delta Lake: lists of files, and versions of them."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Schema, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import AddAction, RemoveAction

from scviaduct.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

# Versions stay readable for good (--as-of): neither logs nor removed files are cleaned up by themselves.
_CONFIGURATION = {
    "delta.logRetentionDuration": "interval 36500 days",
    "delta.deletedFileRetentionDuration": "interval 36500 days",
    "delta.enableExpiredLogCleanup": "false",
}


@dataclass(frozen=True, slots=True)
class DataFile:
    """A parquet file of a table, as the log names it.

    Attributes
    ----------
    path
        Relative to the table.
    size, rows
        Bytes and rows.
    source, dataset_id
        Of every row in it.
    first_row
        Smallest ``source_row`` in it, which orders the files of a source; None in ``latents``, which lacks the column.
    """

    path: str
    size: int
    rows: int
    source: str
    dataset_id: str
    first_row: int | None = None

    @property
    def name(self) -> str:
        """File name without folder and suffix; the same for both tables of a space."""
        return self.path.rsplit("/", 1)[-1].removesuffix(".parquet")

    @property
    def unit(self) -> str:
        """Unit that wrote the rows."""
        return self.name.partition(".")[0]

    def add(self, modified: int) -> AddAction:
        """The action that names the file; ``modified`` in milliseconds."""
        values = {"source": self.source, "dataset_id": self.dataset_id}
        least = values if self.first_row is None else values | {"source_row": self.first_row}
        nulls = dict.fromkeys(values, 0)
        stats = {"numRecords": self.rows, "minValues": least, "maxValues": values, "nullCount": nulls}
        return AddAction(self.path, self.size, {}, modified, data_change=True, stats=json.dumps(stats))

    def remove(self, deleted: int) -> RemoveAction:
        """The action that stops naming it; ``deleted`` in milliseconds."""
        return RemoveAction(self.path, True, deleted, self.size)  # noqa: FBT003 - delta-rs takes it by position


@dataclass(frozen=True, slots=True)
class Version:
    """A version of a table: its number and its files.

    Attributes
    ----------
    number
        Of the table's log.
    files
        Path to file.
    timestamp
        Milliseconds since 1970, UTC.
    sequence
        Transaction version of the space's app id.
    columns
        Schema.
    """

    number: int
    files: Mapping[str, DataFile]
    timestamp: int
    sequence: int
    columns: pa.Schema


def _file(row: Mapping[str, Any]) -> DataFile:
    numbers = row["path"], row["size_bytes"], row["num_records"]
    return DataFile(*numbers, row["min.source"], row["min.dataset_id"], row.get("min.source_row"))


class Table:
    """A Delta table whose files are written by workers and named by commits.

    Parameters
    ----------
    path
        Folder of the table.
    app
        App id that serialises its commits.
    """

    def __init__(self, path: Path, app: str) -> None:
        self.path = path
        self._app = app

    def create(self, schema: pa.Schema) -> None:
        """Make the table unless it is there."""
        # Without retries: one that comes second must not say again, on top of what was committed since, which columns
        # there are.
        once = CommitProperties(max_commit_retries=0)
        with suppress(CommitFailedError):
            DeltaTable.create(
                str(self.path),
                Schema.from_arrow(schema),
                mode="ignore",
                configuration=_CONFIGURATION,
                commit_properties=once,
            )

    def load(self, number: int | None = None) -> Version:
        """Read a version, the newest if none is named.

        Raises
        ------
        StoreError
            If there is no such version.
        """
        try:
            table = DeltaTable(str(self.path), version=number)
        except (DeltaError, OSError, OverflowError, ValueError) as error:
            remedy = "scviaduct status lists the versions."
            raise StoreError(f"{self.path} has no version {number}: {error}.", remedy) from error
        listed = pa.table(table.get_add_actions(flatten=True)).to_pylist()
        files = {row["path"]: _file(row) for row in listed}
        sequence = table.transaction_version(self._app) or 0
        timestamp = self._commit_info(table.version())["timestamp"]
        return Version(table.version(), files, timestamp, sequence, pa.schema(table.schema().to_arrow()))

    def told(self, number: int) -> dict[str, str]:
        """What the commit of a version said in this project's words, or the last one before it that said anything.

        Added columns and a stock Delta vacuum make versions of their own, with the same rows as the one before.
        """
        for earlier in range(number, -1, -1):
            said = self._commit_info(earlier).items()
            if told := {key: str(value) for key, value in said if key.startswith("scviaduct.")}:
                return told
        return {}

    def _commit_info(self, number: int) -> dict[str, Any]:
        """What a commit said of itself, from the log.

        ``DeltaTable.history`` numbers the commits of a table that is not loaded at its newest version wrongly (delta-rs
        1.6.6), and reads them all.
        """
        log = self.path / "_delta_log" / f"{number:020}.json"
        for line in log.read_text(encoding="utf-8").splitlines():
            action: dict[str, dict[str, Any]] = json.loads(line)
            if "commitInfo" in action:
                return action["commitInfo"]
        raise StoreError(f"{log} says nothing of its commit.", "Was the log written by something else?")

    def history(self) -> list[dict[str, Any]]:
        """What each commit said, newest first."""
        return DeltaTable(str(self.path)).history()

    def widen(self, base: Version, fields: Sequence[pa.Field]) -> None:
        """Add columns, on top of ``base``."""
        table = DeltaTable(str(self.path), version=base.number)
        schema = Schema.from_arrow(pa.schema(fields))
        table.alter.add_columns(schema.fields, commit_properties=self._properties(base, {}))

    def commit(
        self,
        base: Version,
        add: Iterable[DataFile],
        remove: Iterable[DataFile],
        told: Mapping[str, str],
        *,
        now: int,
    ) -> None:
        """Commit on top of ``base``; fails if anyone committed since.

        Raises
        ------
        deltalake.exceptions.CommitFailedError
            If ``base`` is no longer the newest version.
        """
        table = DeltaTable(str(self.path), version=base.number)
        actions: Sequence[Any] = [*(file.remove(now) for file in remove), *(file.add(now) for file in add)]
        properties = self._properties(base, told)
        table.create_write_transaction(list(actions), "append", table.schema(), commit_properties=properties)

    def _properties(self, base: Version, told: Mapping[str, str]) -> CommitProperties:
        """What a commit says, and the transaction version that makes a second one on the same base fail."""
        transaction = Transaction(self._app, base.sequence + 1)
        return CommitProperties(custom_metadata=dict(told), app_transactions=[transaction], max_commit_retries=0)
