"""TileDB-SOMA experiments, written by Python or R."""

from __future__ import annotations

import contextlib
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import tiledbsoma

from scviaduct.errors import SourceChangedError, SourceError
from scviaduct.sources.features import Features
from scviaduct.sources.filters import ValueFilter, parse_filter
from scviaduct.sources.fingerprint import fingerprint
from scviaduct.sources.modalities import canonical, chosen_layers, chosen_modalities, token
from scviaduct.sources.obs import PRIMARY, Cells, RowRule, comparable, select
from scviaduct.sources.somacounts import SOMA_ERRORS, buffers
from scviaduct.sources.somavar import JOINID, chosen, open_measurement
from scviaduct.sources.source import BATCH_ROWS, REPLAN, TableSource
from scviaduct.sources.unreadable import NothingThereError, each, reading, refused, told
from scviaduct.sources.uri import Address, local_path, quoted_url

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from scviaduct.sources.counts import GeneTarget, Rows
    from scviaduct.values import GeneTable, LongArray, Shard

SORTED_ROWS = 4 << 20
"""Rows of obs that are held and sorted at a time where obs is not indexed on its joinid alone."""
ORDERED_ROWS = 1 << 20
"""Rows of obs that are held at a time where it is, and sorted if TileDB hands them over in another order. To ask for
them in order takes five times as long: 196,608 rows and six columns .19 s instead of .034."""
_CELL_IDS = ("observation_joinid", "obs_id")
_LAYERS = ("raw", "counts")


class SomaSource(TableSource):
    """One measurement of a SOMA experiment, or several beside each other.

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
        measurements = self._chosen_measurements(tuple(experiment.ms.keys()), address)
        self._obs = experiment.obs
        self.source = self._namespace(",".join(measurements))
        layers = self._chosen_layers(experiment, measurements, address)
        opened = [
            open_measurement(experiment.ms[name], name, modality, *layers[name], self._namespace(name))
            for name, modality in measurements.items()
        ]
        self._arrays = {name: experiment.ms[name] for name in measurements}
        columns = self.obs_columns()
        key = self._obs_column("key", address) or next((name for name in _CELL_IDS if name in columns), JOINID)
        dataset = self._obs_column("dataset", address) or ("dataset_id" if "dataset_id" in columns else "")
        primary = PRIMARY in columns and pa.types.is_boolean(self._obs.schema.field(PRIMARY).type)
        name = "" if dataset else address.location.rstrip("/").rpartition("/")[2]
        self._rule = RowRule(key, dataset, name, primary and not address.keeps_duplicates, self.source)
        text = address.parameters.get("filter")
        self._filter = None if text is None else parse_filter(text)
        if self._filter:
            self._filter.check(self._obs.schema.names, f"obs of {self.source}")
        self.absent_genes = self._absent(address, [joinids for _, joinids in opened])
        self._features = Features([part for part, _ in opened])
        self.n_genes, self._genes = self._features.n_genes, self._features.table(self.absent_genes)
        self.var_index = self._features.parts[0].var.index
        layer = ",".join(f"{name}:{held}" if len(layers) > 1 else held for name, (held, _) in layers.items())
        spelled = (token(*item) if len(layers) > 1 else item[0] for item in measurements.items())
        return address.pinned(measurement=",".join(spelled), layer=layer, key=key, dataset=dataset or None)

    def _chosen_measurements(self, there: tuple[str, ...], address: Address) -> dict[str, str]:
        """Names of the measurements to read, and the modality of each where its name tells."""
        wanted = address.parameters.get("measurement")
        if wanted is not None and wanted not in there and ("," in wanted or ":" in wanted):
            return chosen_modalities(wanted, there, self._where, "measurement")
        name = chosen("measurement", wanted, there, ("RNA",), self._where)
        return {name: canonical(name)}

    def _chosen_layers(
        self, experiment: Any, measurements: dict[str, str], address: Address
    ) -> dict[str, tuple[str, str]]:
        """Layer of each measurement, and why."""
        text = address.parameters.get("layer")
        several = len(measurements) > 1
        wanted = chosen_layers(text, measurements, self.source) if several else dict.fromkeys(measurements, text)
        layers = {}
        for name in measurements:
            there = tuple(experiment.ms[name].X.keys()) if "X" in experiment.ms[name] else ()
            asked = wanted.get(name)
            layer = chosen("layer", asked, there, _LAYERS, f"measurement {name} of {self._where}")
            layers[name] = layer, "asked for" if asked else "its name" if layer in _LAYERS else "the only one"
        return layers

    def _absent(self, address: Address, joinids: list[LongArray]) -> npt.NDArray[np.bool_] | None:
        """Genes that ``var_filter`` leaves out, in the measurements that have its columns."""
        text = address.parameters.get("var_filter")
        if text is None:
            return None
        parsed = parse_filter(text)
        frames = [measurement.var for measurement in self._arrays.values()]
        able = [{*parsed.columns} <= {*frame.schema.names} for frame in frames]
        if not any(able):
            parsed.check(frames[0].schema.names, f"var of {self.source}")
        masks = []
        for frame, has_them, ids in zip(frames, able, joinids, strict=True):
            tables = self._filtered(frame, parsed, [JOINID]) if has_them else ()
            kept = np.concatenate([np.zeros(0, np.int64), *(table[JOINID].to_numpy() for table in tables)])
            masks.append(~np.isin(ids, kept) if has_them else np.zeros(len(ids), np.bool_))
        return np.concatenate(masks)

    def _obs_column(self, parameter: str, address: Address) -> str:
        name = address.parameters.get(parameter, "")
        if name and name not in self._obs.schema.names:
            raise SourceError(
                f"{parameter}={name}: {self.source} has no such obs column.",
                f"There are: {', '.join(self.obs_columns())}.",
            )
        return name

    def _pin(self, address: Address) -> tuple[str, Address]:
        """Version, and the address that carries it."""
        planned = address.parameters.get("version")
        arrays = {"obs": self._obs.uri}
        for part in self._features.parts:
            held, of = self._arrays[part.name], f"/{part.name}" if len(self._arrays) > 1 else ""
            arrays |= {f"var{of}": held.var.uri, f"X{of}": held.X[part.layer].uri}
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

    def describe(self) -> dict[str, str]:
        """See :meth:`~scviaduct.sources.source.Source.describe`."""
        parts = self._features.parts
        several = self._features.described() if len(parts) > 1 else {"layer": parts[0].layer, "why": parts[0].why}
        counted = {"modalities": self._features.sizes()} if len(parts) > 1 else {}
        return {
            "kind": "soma",
            "place": self._where,
            "size": f"{self._obs.count:,} cells x {self.n_genes:,} {'features' if counted else 'genes'}",
            "measurement": ", ".join(part.name for part in parts),
            **several,
            **counted,
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
        """Read a data frame, or its rows of some joinids, with TileDB's complaints turned into ours.

        Rows are filtered here, not by TileDB-SOMA: it makes a context of its own for every condition it is given, which
        takes 10 ms and gives all of the process's free memory back to the system (``malloc_trim``). To take it again is
        a fifth of a shard's read. Ranges of joinids where obs is indexed on something else still pay for that.
        """
        wanted = tuple(dict.fromkeys((*columns, *(chosen.columns if chosen else ()))))
        condition = None if within is None else f"{JOINID} >= {within[0]} and {JOINID} < {within[1]}"
        read = frame.read(coords, column_names=list(wanted), value_filter=condition)
        where = f"{'obs' if frame is self._obs else 'var'} of {self.source}"
        for table in each(lambda: read, where, SOMA_ERRORS):
            if chosen is None:
                yield table
                continue
            # What is decoded for the filter is bounded. Of no row at all there is an empty batch.
            for first in range(0, max(len(table), 1), BATCH_ROWS):
                batch = table.slice(first, BATCH_ROWS)
                compared = {name: comparable(batch[name], name, where) for name in chosen.columns}
                yield batch.filter(pa.array(chosen.mask(pa.table(compared)))).select(list(columns))

    def cells(self, columns: tuple[str, ...], start: int = 0, stop: int | None = None) -> Iterator[Cells]:
        """See :meth:`~scviaduct.sources.source.TableSource.cells`."""
        needed = list(dict.fromkeys((JOINID, *self._rule.columns, *columns)))
        for table in self._obs_tables(needed, start, stop):
            # TileDB fills its buffers, with two million rows and more; decoded strings of so many would be too large.
            for first in range(0, max(len(table), 1), BATCH_ROWS):
                batch = table.slice(first, BATCH_ROWS)
                yield select(batch[JOINID].to_numpy(), batch, self._rule, columns)

    def _obs_tables(self, columns: Sequence[str], start: int, stop: int | None) -> Iterator[pa.Table]:
        """Rows of obs in the order of their joinids."""
        if tuple(self._obs.index_column_names) == (JOINID,):
            end = int(self._obs.non_empty_domain()[0][1]) + 1 if stop is None else stop
            windows = (slice(first, min(first + ORDERED_ROWS, end) - 1) for first in range(start, end, ORDERED_ROWS))
            read = (self._filtered(self._obs, self._filter, columns, (window,)) for window in windows)
        else:  # ranges of joinids, for which all of obs is read
            ranges = self._windows(start, np.iinfo(np.int64).max if stop is None else stop)
            read = (self._filtered(self._obs, self._filter, columns, within=within) for within in ranges)
        for tables in map(list, read):
            if tables:
                table = pa.concat_tables(tables, promote_options="permissive")
                yield table if (np.diff(table[JOINID].to_numpy()) > 0).all() else table.sort_by(JOINID)

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
        return self._features.read(rows, target)

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


def _is_fingerprint(version: str) -> bool:
    return len(version) == 32 and all(sign in "0123456789abcdef" for sign in version)
