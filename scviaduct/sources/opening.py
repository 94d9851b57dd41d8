"""From a URI or a shard to an open source."""

from __future__ import annotations

import atexit
from collections import OrderedDict
from typing import TYPE_CHECKING

from scviaduct.allocator import keep_memory
from scviaduct.errors import SourceChangedError
from scviaduct.sources.source import REPLAN
from scviaduct.sources.unreadable import NothingThereError
from scviaduct.sources.uri import local_path, parse

if TYPE_CHECKING:
    from scviaduct.sources.source import Source
    from scviaduct.values import Shard

KEPT_OPEN = 8
"""Sources that a process keeps open for the shards it reads."""

_OPEN: OrderedDict[str, Source] = OrderedDict()


def open_source(uri: str) -> Source:
    """Open a source of query cells; close it, or use it as a context manager.

    Parameters
    ----------
    uri
        ``census:2025-11-08?organism=homo_sapiens&filter=tissue_general == 'lung'`` (with ``uri=`` a mirror or a local
        collection); ``soma:PATH_OR_URL?measurement=RNA&layer=raw``; the path or fsspec URL of a ``.h5ad``, a
        ``.h5mu``, a ``.zarr``, a folder or a glob of them; or ``landing:PATH`` (also the bare folder of a landing). See
        :mod:`scviaduct.sources.uri` for the parameters.

    Raises
    ------
    SourceError
        If the URI does not parse or what it names cannot be opened.
    FilterError
        If a filter does not parse or names an unknown column.
    SourceChangedError
        If the URI is pinned and leads to other content by now.
    """
    address = parse(uri)
    keep_memory()  # before a library starts threads, each of which would take an arena
    if address.scheme == "file" and (path := local_path(address.location)) and (path / "landing.json").is_file():
        address = parse(f"landing:{address}")
    # tiledbsoma takes seconds to import, and h5py with zarr one: a command pays for what it opens.
    if address.scheme == "census":
        from scviaduct.sources.census import CensusSource

        return CensusSource(address)
    if address.scheme == "soma":
        from scviaduct.sources.soma import SomaSource

        return SomaSource(address)
    if address.scheme == "landing":
        from scviaduct.landing.sets import open_landing

        return open_landing(address)
    from scviaduct.sources.fileset import open_files

    return open_files(address)


def open_shard(shard: Shard) -> Source:
    """The source that a shard is read from, kept open by this process for the next shard.

    The source belongs to the process: do not close it, and do not hold it across another call, which may close it.

    Raises
    ------
    SourceChangedError
        If the source is no longer of the version that was planned, or no longer there.
    SourceError
        If it cannot be opened, for now or for good.
    """
    source = _OPEN.pop(shard.uri, None)
    if source is not None and not source.is_current():
        source.close()
        source = None
    try:
        source = source or open_source(shard.uri)
    except NothingThereError as error:
        raise SourceChangedError(f"{shard.source} was planned and is gone: {error.problem}", REPLAN) from error
    _OPEN[shard.uri] = source
    while len(_OPEN) > KEPT_OPEN:
        _OPEN.popitem(last=False)[1].close()
    if source.version != shard.version:
        raise SourceChangedError(
            f"{shard.source} was planned as version {shard.version} and is {source.version} now.", REPLAN
        )
    return source


@atexit.register
def close_shards() -> None:
    """Close what :func:`open_shard` keeps open; also at the end of the process."""
    while _OPEN:
        _OPEN.popitem()[1].close()
