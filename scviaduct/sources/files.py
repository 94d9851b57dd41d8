"""h5ad, h5mu and zarr files, local or behind an fsspec URL."""

from __future__ import annotations

import contextlib
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pyarrow as pa
import zarr
from zarr.storage import FsspecStore

from scviaduct.errors import SourceChangedError, SourceError
from scviaduct.sources.containers import open_container
from scviaduct.sources.content import Content, Place, contents, nothing_at
from scviaduct.sources.filters import parse_filter
from scviaduct.sources.obs import PRIMARY, Cells, RowRule, comparable, select
from scviaduct.sources.source import BATCH_ROWS, REPLAN, TableSource
from scviaduct.sources.unreadable import FILE_ERRORS, quarantined, reading, refused, told
from scviaduct.sources.uri import Address, local_path, quoted_url

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scviaduct.sources.counts import GeneTarget, Rows
    from scviaduct.values import GeneTable, LongArray, Shard


class FileSource(TableSource):
    """One AnnData or MuData file.

    Parameters
    ----------
    address
        Decoded; ``version`` in it is compared with the content.
    place
        What lies there, if it was looked up already.
    content
        What it held, if that is known already.

    Raises
    ------
    SourceError
        If the file is missing, is neither AnnData nor MuData of a known encoding, or lacks what the address names.
    SourceChangedError
        If the content is not that of the version in the address, or changes while it is opened.
    """

    def __init__(self, address: Address, place: Place | None = None, content: Content | None = None) -> None:
        planned = address.parameters.get("version")
        self._place = place or Place.of(address.location)
        with refused():
            self._content = content or contents([self._place], planned)[0]
        self.version = self._content.version
        self.source = quoted_url(address.location)
        if planned not in (None, self.version):
            raise SourceChangedError(
                f"{self.source} was planned as version {planned} and is {self.version} now.", REPLAN
            )
        self._handles = contextlib.ExitStack()
        with refused(), contextlib.ExitStack() as on_error:
            on_error.callback(self._handles.close)
            self._open(address)
            if not self.is_current():
                raise SourceChangedError(f"{self.source} changed while it was being identified.", REPLAN)
            on_error.pop_all()

    def _open(self, address: Address) -> None:
        root = open_root(self._place, self._handles)
        with reading(self.source):
            self._held = open_container(root, address.parameters, self.source)
            self._obs, self._features = self._held.obs, self._held.features
            primary = PRIMARY in self._obs.columns and self._obs.is_bool(PRIMARY) and not address.keeps_duplicates
        self.var_index, self.n_genes = self._features.parts[0].var.index, self._features.n_genes
        key = self._column(address, "key") or self._obs.index
        dataset = self._column(address, "dataset")
        self._rule = RowRule(key, dataset, "" if dataset else stem(address.location), primary, self.source)
        self._filter = parse_filter(address.parameters["filter"]) if "filter" in address.parameters else None
        if self._filter:
            self._filter.check((*self._obs.columns, self._obs.index), f"obs of {self.source}")
        var_filter = address.parameters.get("var_filter")
        chosen = None if var_filter is None else parse_filter(var_filter)
        self.absent_genes = self._features.absent(chosen, f"var of {self.source}")
        pinned = address.pinned(**self._held.pinned, key=key, version=self.version)
        self.uri, self.selection = str(pinned), pinned.selection

    def _column(self, address: Address, parameter: str) -> str:
        name = address.parameters.get(parameter, "")
        if name and name not in (*self._obs.columns, self._obs.index):
            raise SourceError(
                f"{parameter}={name}: {self.source} has no such obs column.",
                f"There are: {', '.join(self._obs.columns)}.",
            )
        return name

    def describe(self) -> dict[str, str]:
        """See :meth:`~scviaduct.sources.source.Source.describe`."""
        counted = "features" if len(self._features.parts) > 1 else "genes"
        told = {
            "kind": self._kind(),
            "place": self.source,
            "size": f"{len(self._obs):,} rows x {self.n_genes:,} {counted}",
            **self._features.described(),
            "modalities": self._features.sizes(),
            "not read": ", ".join(self._held.left_out),
            "key": self._rule.key,
            "dataset": f"obs column {self._rule.dataset}" if self._rule.dataset else self._rule.dataset_name,
            "duplicates": "left out (is_primary_data)" if self._rule.primary_only else "kept",
        }
        return {name: value for name, value in told.items() if value or name not in ("modalities", "not read")}

    def _kind(self) -> str:
        if self._held.kind == "MuData":
            return "zarr of MuData" if self._place.is_folder else "h5mu"
        return "zarr" if self._place.is_folder else "h5ad"

    def obs_columns(self) -> tuple[str, ...]:
        """Names of the obs columns."""
        return self._obs.columns

    def genes(self, shard: Shard | None = None) -> GeneTable:
        """See :meth:`~scviaduct.sources.source.Source.genes`."""
        where = f"var of {self.source}"
        # Genes of the source are asked for before anything runs, those of a shard by who maps it.
        with quarantined(f"Genes of {self.source}") if shard else refused(), reading(where):
            return self._features.table(self.absent_genes)

    def cells(self, columns: tuple[str, ...], start: int = 0, stop: int | None = None) -> Iterator[Cells]:
        """See :meth:`~scviaduct.sources.source.TableSource.cells`."""
        stop = len(self._obs) if stop is None else min(stop, len(self._obs))
        filtered = self._filter.columns if self._filter else ()
        needed = tuple(dict.fromkeys((*self._rule.columns, *filtered, *columns)))
        for first in range(start, stop, BATCH_ROWS):
            last = min(first + BATCH_ROWS, stop)
            table = pa.table({name: self._obs.read(name, first, last) for name in needed})
            passed = None
            if self._filter:
                plain = {name: comparable(table[name], name, f"obs of {self.source}") for name in filtered}
                passed = self._filter.mask(pa.table(plain))
            yield select(np.arange(first, last, dtype=np.int64), table, self._rule, columns, passed)

    def counts(self, rows: LongArray, target: GeneTarget) -> Iterator[Rows]:
        """See :meth:`~scviaduct.sources.source.TableSource.counts`."""
        return self._features.read(rows, target)

    def is_current(self) -> bool:
        """Whether size and time of the file are still those of when it was opened."""
        seen = self._content.stamp
        return seen is None or (bool(self._place.fs.exists(self._place.path)) and self._place.stamp() == seen)

    def close(self) -> None:
        """Close the file."""
        self._handles.close()


def stem(url: str) -> str:
    """Name of a file without ``.h5ad``, ``.h5mu`` or ``.zarr``; its ``dataset_id`` unless a column names it."""
    name = PurePosixPath(url).name
    return name.removesuffix(".h5ad").removesuffix(".zarr").removesuffix(".h5mu")


def open_root(place: Place, handles: contextlib.ExitStack) -> Any:
    """Root group of an h5ad or zarr file; what has to be closed goes to ``handles``."""
    local = local_path(place.url)
    try:
        if place.is_folder:
            store = str(local) if local else FsspecStore.from_url(place.url, read_only=True)
            return zarr.open_group(store, mode="r")
        file = local or handles.enter_context(place.fs.open(place.path, "rb"))
        # Some network file systems know no locks; a reader of a pinned file needs none.
        return handles.enter_context(h5py.File(file, "r", locking="best-effort" if local else None))
    except FileNotFoundError as error:
        raise nothing_at(place.url, error) from error
    except FILE_ERRORS as error:
        raise SourceError(
            f"{quoted_url(place.url)} cannot be opened as HDF5 or zarr ({told(error)}).",
            "Give a .h5ad or .h5mu file, a .zarr store or a folder.",
        ) from error
