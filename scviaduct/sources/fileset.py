"""Several files as one source: a folder, or a glob."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scviaduct.errors import SourceChangedError, SourceError
from scviaduct.sources.content import Place, contents, filesystem, is_there
from scviaduct.sources.files import FileSource, stem
from scviaduct.sources.source import REPLAN, Source
from scviaduct.sources.summary import merge_scans
from scviaduct.sources.unreadable import NothingThereError, reading, refused
from scviaduct.sources.uri import combined_version, parse, quoted_url

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scviaduct.sources.uri import Address
    from scviaduct.values import CellBlock, GeneTable, IntArray, Scan, Shard

_SUFFIXES = (".h5ad", ".zarr")
_MUDATA = ".h5mu"
_ROOTS = ("zarr.json", ".zgroup")


class FileSetSource(Source):
    """The files of a folder or a glob, sorted by URL; one is open at a time.

    They are its ``.h5ad`` and ``.zarr``; only where there is none of these, its ``.h5mu``: a MuData file often lies
    beside its modalities, whose cells would come twice.

    Parameters
    ----------
    address
        Decoded; its location is the folder or the glob.
    places
        The files, sorted.

    Raises
    ------
    SourceError
        If two files would give one ``dataset_id``.
    SourceChangedError
        If the files are not those of the version in the address.
    """

    def __init__(self, address: Address, places: Sequence[Place]) -> None:
        self._places = {place.url: place for place in places}
        self._open: FileSource | None = None
        if "dataset" not in address.parameters:
            _refuse_same_stems(places)
        with refused():
            self._contents = dict(zip(self._places, contents(places), strict=True))
        self._where = quoted_url(address.location)
        # Names without their folder: the same files elsewhere are the same version.
        versions = {url: content.version for url, content in self._contents.items()}
        names = {url.rpartition("/")[2]: version for url, version in versions.items()}
        self.version = combined_version(names if len(names) == len(versions) else versions)
        planned = address.parameters.get("version", self.version)
        if planned != self.version:
            raise SourceChangedError(
                f"{self._where} was planned as version {planned} and is {self.version} now.", REPLAN
            )
        self._address = address.pinned(version=None)
        self.uri = str(address.pinned(version=self.version))

    def _file(self, url: str) -> FileSource:
        if self._open is not None and self._open.source == quoted_url(url):
            return self._open
        self.close()
        self._open = FileSource(self._address.at(url), self._places[url], self._contents[url])
        return self._open

    def _file_of(self, shard: Shard) -> FileSource:
        url = parse(shard.uri).location
        if url not in self._places:
            raise SourceChangedError(f"{self._where} no longer holds {quoted_url(url)}.", REPLAN)
        return self._file(url)

    def describe(self) -> dict[str, str]:
        """See :meth:`~scviaduct.sources.source.Source.describe`."""
        first = self._file(next(iter(self._places))).describe()
        return {**first, "kind": f"{len(self._places)} files", "place": self._where, "first": first["place"]}

    def obs_columns(self) -> tuple[str, ...]:
        """Names of the obs columns of the first file."""
        return self._file(next(iter(self._places))).obs_columns()

    def scan(self, shard_cells: int, columns: Sequence[str] = (), groups: Sequence[str] = ()) -> Scan:
        """See :meth:`~scviaduct.sources.source.Source.scan`; shards are in the order of the files."""
        return merge_scans([self._file(url).scan(shard_cells, columns, groups) for url in self._places])

    def genes(self, shard: Shard | None = None) -> GeneTable:
        """See :meth:`~scviaduct.sources.source.Source.genes`."""
        if shard is None and len(self._places) > 1:
            raise SourceError(f"{self._where} has {len(self._places)} files, each with its genes.", "Ask genes(shard).")
        return (self._file_of(shard) if shard else self._file(next(iter(self._places)))).genes(shard)

    def read(
        self,
        shard: Shard,
        gene_map: IntArray | None = None,
        n_genes: int | None = None,
        columns: Sequence[str] = (),
        limit: int | None = None,
    ) -> CellBlock:
        """See :meth:`~scviaduct.sources.source.Source.read`."""
        return self._file_of(shard).read(shard, gene_map, n_genes, columns, limit)

    def close(self) -> None:
        """Close the open file."""
        if self._open is not None:
            self._open.close()
            self._open = None


def open_files(address: Address) -> FileSource | FileSetSource:
    """Open a file, a folder of files or a glob.

    Raises
    ------
    SourceError
        If nothing is there, or nothing that is AnnData.
    """
    fs, path = filesystem(address.location)
    if not is_there(address.location, fs, path):
        with refused(), reading(quoted_url(address.location)):
            found = sorted(fs.glob(path)) if _has_magic(path) else []
        return FileSetSource(address, _places(found, fs, address.location))
    place = Place.of(address.location)
    if not place.is_folder and not path.endswith((".h5ad", _MUDATA)):
        raise SourceError(
            f"{quoted_url(address.location)} is not a .h5ad file or a .zarr store.",
            "Write it as one: adata.write_h5ad('cells.h5ad').",
        )
    if not place.is_folder or any(fs.exists(f"{path}/{name}") for name in _ROOTS):
        return FileSource(address, place)
    with refused(), reading(quoted_url(address.location)):
        listed = sorted(entry["name"] for entry in fs.ls(path, detail=True))
    return FileSetSource(address, _places(listed, fs, address.location))


def _has_magic(path: str) -> bool:
    """Whether a path holds a wildcard."""
    return any(sign in path for sign in "*?[")


def _places(paths: Sequence[str], fs: Any, where: str) -> list[Place]:
    named = [path.rstrip("/") for path in paths]
    taken = [path for path in named if path.endswith(_SUFFIXES)] or [path for path in named if path.endswith(_MUDATA)]
    urls = [fs.unstrip_protocol(path) for path in taken]
    if not urls:
        raise NothingThereError(
            f"No .h5ad file or .zarr store at {quoted_url(where)}.",
            "Check the path; a '?' or '%' in it is written %3F or %25.",
        )
    return [Place.of(url) for url in sorted(urls)]


def _refuse_same_stems(places: Sequence[Place]) -> None:
    seen: dict[str, str] = {}
    for place in places:
        name = stem(place.url)
        if name in seen:
            raise SourceError(
                f"{quoted_url(seen[name])} and {quoted_url(place.url)} would both be dataset '{name}'.",
                "Rename one, or name the obs column that tells them apart: dataset=COLUMN.",
            )
        seen[name] = place.url
