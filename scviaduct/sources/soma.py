"""TileDB-SOMA experiments, written by Python or R."""

from __future__ import annotations

import contextlib
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import tiledbsoma

from scviaduct.errors import FilterError, SourceChangedError, SourceError
from scviaduct.sources.filters import EXAMPLE, ValueFilter, parse_filter
from scviaduct.sources.fingerprint import fingerprint
from scviaduct.sources.obs import PRIMARY, Cells, RowRule, normal, select, store_type
from scviaduct.sources.somacounts import SOMA_ERRORS, buffers, read_counts
from scviaduct.sources.source import BATCH_ROWS, MAX_VAR_COLUMNS, REPLAN, TableSource, without_genes
from scviaduct.sources.unreadable import NothingThereError, each, reading, refused, told
from scviaduct.sources.uri import Address, local_path, quoted_url
from scviaduct.values import GeneTable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from scviaduct.sources.counts import GeneTarget, Rows
    from scviaduct.values import LongArray, Shard

JOINID = "soma_joinid"
SORTED_ROWS = 4 << 20
"""Rows of obs that are held and sorted at a time where obs is not indexed on its joinid alone."""
_FEATURE_IDS = ("feature_id", "var_id", "gene_id")
_CELL_IDS = ("observation_joinid", "obs_id")
_LAYERS = ("raw", "counts")


class SomaSource(TableSource):
    """One measurement of a SOMA experiment.

    Parameters
    ----------
    address
        Decoded; ``version`` in it is compared with the fingerprint.

    Raises
    ------
    SourceError
        If there is no experiment, or no such measurement, layer or column, or its fragments cannot be listed.
    SourceChangedError
        If the content is not that of the version in the address.
    """

    def __init__(self, address: Address) -> None:
        self._handles = contextlib.ExitStack()
        with refused(), reading(quoted_url(address.location), SOMA_ERRORS), contextlib.ExitStack() as on_error:
            on_error.callback(self._handles.close)
            experiment = self._open_experiment(address)
            pinned = self._open_arrays(experiment, address)
            self.version, pinned = self._pin(pinned)
            self.uri, self.selection = str(pinned), pinned.selection
            on_error.pop_all()

    def _open_experiment(self, address: Address) -> Any:
        """The experiment, entered into ``_handles``; also names ``source``'s place."""
        local = local_path(address.location)
        self._where = quoted_url(address.location)
        experiment = _opened(str(local or address.location), tiledbsoma.SOMATileDBContext(tiledb_config=buffers()))
        if not isinstance(experiment, tiledbsoma.Experiment):
            experiment.close()
            raise SourceError(
                f"{self._where} is a SOMA {type(experiment).__name__}, not an experiment.",
                "Name the experiment in it (for a Census, PATH/census_data/homo_sapiens), or census:RELEASE?uri=PATH.",
            )
        return self._handles.enter_context(experiment)

    def _namespace(self, measurement: str) -> str:
        return f"soma:{self._where}#{measurement}"

    def _open_arrays(self, experiment: Any, address: Address) -> Address:
        """Open obs, var and X; the address with the choices spelled out."""
        there = tuple(experiment.ms.keys())
        self._measurement = _choice("measurement", address, there, ("RNA",), self._where)
        measurement = experiment.ms[self._measurement]
        layers = tuple(measurement.X.keys()) if "X" in measurement else ()
        self._layer = _choice("layer", address, layers, _LAYERS, f"measurement {self._measurement} of {self._where}")
        self.source = self._namespace(self._measurement)
        self._why = (
            "asked for" if "layer" in address.parameters else "its name" if self._layer in _LAYERS else "the only one"
        )
        self._obs, self._var, self._x = experiment.obs, measurement.var, measurement.X[self._layer]
        if not isinstance(self._x, tiledbsoma.SparseNDArray):
            raise SourceError(f"Layer '{self._layer}' of {self.source} is dense.", "Name a sparse layer: layer=NAME.")
        columns = self.obs_columns()
        key = self._obs_column("key", address) or next((name for name in _CELL_IDS if name in columns), JOINID)
        dataset = self._obs_column("dataset", address) or ("dataset_id" if "dataset_id" in columns else "")
        primary = PRIMARY in columns and pa.types.is_boolean(self._obs.schema.field(PRIMARY).type)
        name = "" if dataset else address.location.rstrip("/").rpartition("/")[2]
        self._rule = RowRule(key, dataset, name, primary and not address.keeps_duplicates, self.source)
        self._filter = self._value_filter(address, "filter", self._obs)
        self._read_var(self._value_filter(address, "var_filter", self._var))
        return address.pinned(measurement=self._measurement, layer=self._layer, key=key, dataset=dataset or None)

    def _obs_column(self, parameter: str, address: Address) -> str:
        name = address.parameters.get(parameter, "")
        if name and name not in self._obs.schema.names:
            raise SourceError(
                f"{parameter}={name}: {self.source} has no such obs column.",
                f"There are: {', '.join(self.obs_columns())}.",
            )
        return name

    def _value_filter(self, address: Address, parameter: str, frame: Any) -> ValueFilter | None:
        text = address.parameters.get(parameter)
        if text is None:
            return None
        parsed = parse_filter(text)
        parsed.check(frame.schema.names, f"{'obs' if parameter == 'filter' else 'var'} of {self.source}")
        return parsed

    def _pin(self, address: Address) -> tuple[str, Address]:
        """Version, and the address that carries it."""
        planned = address.parameters.get("version")
        arrays = {"obs": self._obs.uri, "var": self._var.uri, "X": self._x.uri}
        try:
            version = fingerprint(arrays, int(self._obs.tiledb_timestamp_ms))
        except SourceError:
            # The user's word for a store that cannot be listed; a fingerprint was made by listing and is verified so.
            if planned is None or _is_fingerprint(planned):
                raise
            return planned, address
        if planned and not _is_fingerprint(planned):
            raise SourceError(
                f"version={planned} is for stores that cannot be listed; {self.source} can, and is {version}.",
                "Leave version= out.",
            )
        if planned not in (None, version):
            raise SourceChangedError(f"{self.source} was planned as version {planned} and is {version} now.", REPLAN)
        return version, address.pinned(version=version)

    def _read_var(self, chosen: ValueFilter | None) -> None:
        """Genes in the order of their joinids, and which of them the filter leaves out."""
        schema = self._var.schema
        texts = [name for name in schema.names if name != JOINID and store_type(schema.field(name).type) == "string"]
        index = next((name for name in _FEATURE_IDS if name in texts), JOINID)
        wanted = [JOINID, *texts[:MAX_VAR_COLUMNS]]
        if index != JOINID and index not in wanted:
            wanted.append(index)
        table = self._var.read(column_names=wanted).concat().sort_by(JOINID)
        joinids = table[JOINID].to_numpy()
        self.n_genes = len(joinids)
        self._gene_at = np.full(int(joinids.max(initial=-1)) + 1, -1, np.int32)
        self._gene_at[joinids] = np.arange(self.n_genes, dtype=np.int32)
        names = [index, *(name for name in wanted if name not in (JOINID, index, "index"))]
        where = f"var of {self.source}"
        columns = {name: normal(table[name], name, where).cast(pa.string()).fill_null("") for name in names}
        self.absent_genes = None
        if chosen is not None:
            kept = self._filtered(self._var, chosen, [JOINID])
            self.absent_genes = ~np.isin(
                joinids, np.concatenate([np.zeros(0, np.int64), *(t[JOINID].to_numpy() for t in kept)])
            )
        self._genes = GeneTable(
            {
                "index" if name == index else name: without_genes(values.to_pylist(), self.absent_genes)
                for name, values in columns.items()
            }
        )

    def describe(self) -> dict[str, str]:
        """See :meth:`~scviaduct.sources.source.Source.describe`."""
        return {
            "kind": "soma",
            "place": self._where,
            "size": f"{self._obs.count:,} cells x {self.n_genes:,} genes",
            "measurement": self._measurement,
            "layer": self._layer,
            "why": self._why,
            "key": self._rule.key,
            "dataset": f"obs column {self._rule.dataset}" if self._rule.dataset else self._rule.dataset_name,
            "duplicates": "left out (is_primary_data)" if self._rule.primary_only else "kept",
        }

    def obs_columns(self) -> tuple[str, ...]:
        """Names of the obs columns, without the joinid."""
        return tuple(name for name in self._obs.schema.names if name != JOINID)

    def genes(self, shard: Shard | None = None) -> GeneTable:  # noqa: ARG002
        """See :meth:`~scviaduct.sources.source.Source.genes`."""
        return self._genes

    def _filtered(
        self,
        frame: Any,
        chosen: ValueFilter | None,
        columns: Sequence[str],
        coords: tuple[Any, ...] = (),
        within: tuple[int, int] | None = None,
    ) -> Iterator[pa.Table]:
        """Read a data frame, or its rows of some joinids, with TileDB's complaints turned into ours."""
        order = "row-major" if tuple(frame.index_column_names) == (JOINID,) else "auto"
        conditions = [] if within is None else [f"{JOINID} >= {within[0]} and {JOINID} < {within[1]}"]
        # The line break ends a comment that the filter may end in.
        conditions += [] if chosen is None else [f"({chosen.text.strip()}\n)" if conditions else chosen.text]
        try:
            # TileDB-SOMA judges a filter here; what fails later is the data.
            read = frame.read(
                coords, column_names=list(columns), value_filter=" and ".join(conditions) or None, result_order=order
            )
        except tiledbsoma.SOMAError as error:
            if chosen is None:
                raise
            why = str(error).partition("\n")[0]
            raise FilterError(f'Filter "{chosen.text}" is refused by TileDB-SOMA: {why}.', EXAMPLE) from error
        yield from each(lambda: read, f"{'obs' if frame is self._obs else 'var'} of {self.source}", SOMA_ERRORS)

    def cells(self, columns: tuple[str, ...], start: int = 0, stop: int | None = None) -> Iterator[Cells]:
        """See :meth:`~scviaduct.sources.source.TableSource.cells`."""
        needed = list(dict.fromkeys((JOINID, *self._rule.columns, *columns)))
        for table in self._obs_tables(needed, start, stop):
            # TileDB fills its buffers, with two million rows and more; decoded strings of so many would be too large.
            for first in range(0, len(table), BATCH_ROWS):
                batch = table.slice(first, BATCH_ROWS)
                yield select(batch[JOINID].to_numpy(), batch, self._rule, columns)

    def _obs_tables(self, columns: Sequence[str], start: int, stop: int | None) -> Iterator[pa.Table]:
        if tuple(self._obs.index_column_names) == (JOINID,):
            coords = (slice(start, None if stop is None else stop - 1),)
            yield from self._filtered(self._obs, self._filter, columns, coords)
            return
        # obs indexed on something else comes in that order: ranges of joinids are read whole and sorted.
        for within in self._windows(start, np.iinfo(np.int64).max if stop is None else stop):
            tables = list(self._filtered(self._obs, self._filter, columns, within=within))
            if tables:
                yield pa.concat_tables(tables, promote_options="permissive").sort_by(JOINID)

    def _windows(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Ranges of joinids of obs, together from ``start`` to ``stop``, that select ``SORTED_ROWS`` cells each."""
        if stop - start <= SORTED_ROWS:
            return [(start, stop)]
        tables = self._filtered(self._obs, self._filter, [JOINID], within=(start, stop))
        joinids = np.concatenate([np.zeros(0, np.int64), *(table[JOINID].to_numpy() for table in tables)])
        joinids.sort()
        edges = [int(joinid) for joinid in joinids[::SORTED_ROWS]]
        return list(pairwise([*edges, int(joinids[-1]) + 1])) if edges else []

    def counts(self, rows: LongArray, target: GeneTarget) -> Iterator[Rows]:
        """See :meth:`~scviaduct.sources.source.TableSource.counts`."""
        return read_counts(self._x, rows, self._gene_at, target, f"X/{self._layer} of {self.source}")

    def close(self) -> None:
        """Close the experiment."""
        self._handles.close()


def _opened(url: str, context: Any) -> Any:
    try:
        return tiledbsoma.open(url, context=context)
    except SOMA_ERRORS as error:
        kind = NothingThereError if isinstance(error, tiledbsoma.DoesNotExistError) else SourceError
        raise kind(
            f"No SOMA object opens at {url} ({told(error)}).",
            "Check the path and the credentials; write soma:PATH or soma:s3://BUCKET/PATH.",
        ) from error


def _choice(parameter: str, address: Address, there: Sequence[str], preferred: Sequence[str], where: str) -> str:
    """What the user named, else what is preferred, else the only one."""
    wanted = address.parameters.get(parameter)
    for name in (wanted,) if wanted else preferred:
        if name in there:
            return name
    if wanted is None and len(there) == 1:
        return there[0]
    problem = f"has no {parameter} '{wanted}'" if wanted else f"has no {parameter} {' or '.join(preferred)}"
    raise SourceError(
        f"{where} {problem}.", f"Name one: {parameter}={there[0] if there else 'NAME'} of {', '.join(there) or 'none'}."
    )


def _is_fingerprint(version: str) -> bool:
    return len(version) == 32 and all(sign in "0123456789abcdef" for sign in version)
