"""A landing of several files as one source."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from scviaduct.errors import SourceChangedError, SourceError
from scviaduct.landing.source import LandingSource, landing_at
from scviaduct.sources.source import REPLAN, Source
from scviaduct.sources.summary import merge_scans
from scviaduct.sources.uri import parse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scviaduct.landing.folder import Landing
    from scviaduct.landing.manifest import Manifest
    from scviaduct.sources.uri import Address
    from scviaduct.values import CellBlock, GeneTable, IntArray, Scan, Shard


class LandingSetSource(Source):
    """All parts of a landing, in the order of the files that were landed.

    Parameters
    ----------
    address
        Decoded; ``version`` in it is compared with what was landed.
    landing, manifest
        Its folder, and what it says of itself.
    stamp
        Of the landing, from before its manifest was read.

    Raises
    ------
    SourceChangedError
        If the landing was refreshed since.
    """

    def __init__(self, address: Address, landing: Landing, manifest: Manifest, stamp: tuple[int, int]) -> None:
        self._stamp = stamp
        self._landing, self._manifest, self.version = landing, manifest, manifest.version
        planned = address.parameters.get("version")
        if planned not in (None, self.version):
            raise SourceChangedError(
                f"{landing.path} was planned as version {planned} and holds {self.version} now.", REPLAN
            )
        plain = address.pinned(version=None)
        self._parts = {
            part.source: LandingSource(plain.pinned(part=part.source), landing, part, stamp) for part in manifest.parts
        }
        self.uri = str(address.pinned(version=self.version))

    @property
    def _first(self) -> LandingSource:
        return next(iter(self._parts.values()))

    def _part_of(self, shard: Shard) -> LandingSource:
        name = parse(shard.uri).parameters.get("part", "")
        if name not in self._parts:
            raise SourceChangedError(f"{self._landing.path} no longer holds {shard.source}.", REPLAN)
        return self._parts[name]

    def describe(self) -> dict[str, str]:
        """See :meth:`~scviaduct.sources.source.Source.describe`."""
        first = self._first.describe()
        told = {"kind": f"landing of {len(self._parts)} files", "landed from": self._manifest.uri}
        return {**first, **told, "first": first["landed from"]}

    def obs_columns(self) -> tuple[str, ...]:
        """Names of the obs columns of the first file."""
        return self._first.obs_columns()

    def scan(self, shard_cells: int, columns: Sequence[str] = (), groups: Sequence[str] = ()) -> Scan:
        """See :meth:`~scviaduct.sources.source.Source.scan`; shards are in the order of the files."""
        whole = merge_scans([part.scan(shard_cells, columns, groups) for part in self._parts.values()])
        return replace(whole, empty=(*whole.empty, *(name for name in self._manifest.empty if name not in whole.empty)))

    def genes(self, shard: Shard | None = None) -> GeneTable:
        """See :meth:`~scviaduct.sources.source.Source.genes`."""
        if shard is None and len(self._parts) > 1:
            problem = f"{self._landing.path} has {len(self._parts)} files, each with its genes."
            raise SourceError(problem, "Ask genes(shard).")
        return (self._part_of(shard) if shard else self._first).genes(shard)

    def read(
        self,
        shard: Shard,
        gene_map: IntArray | None = None,
        n_genes: int | None = None,
        columns: Sequence[str] = (),
        limit: int | None = None,
    ) -> CellBlock:
        """See :meth:`~scviaduct.sources.source.Source.read`."""
        return self._part_of(shard).read(shard, gene_map, n_genes, columns, limit)

    def is_current(self) -> bool:
        """Whether the landing was not published anew since it was opened."""
        return self._landing.stamp() == self._stamp

    def close(self) -> None:
        """Forget what was remembered."""
        for part in self._parts.values():
            part.close()


def open_landing(address: Address) -> LandingSource | LandingSetSource:
    """Open a landing: all of it, or the file that ``part=`` names.

    Raises
    ------
    SourceError
        If there is none, or no such part.
    SourceChangedError
        If it is of another version than the address.
    """
    landing = landing_at(address)
    stamp, manifest = landing.stamp(), landing.manifest()
    wanted = address.parameters.get("part")
    if wanted is not None:
        parts = {part.source: part for part in manifest.parts}
        if wanted not in parts:
            problem = f"{landing.path} does not hold {wanted}."
            if "version" in address.parameters:
                raise SourceChangedError(problem, REPLAN)
            raise SourceError(problem, f"There are: {', '.join(list(parts)[:8])}.")
        return LandingSource(address, landing, parts[wanted], stamp)
    # What is one table from the beginning is named without a part, as it was.
    if len(manifest.parts) == 1 and manifest.parts[0].version == manifest.version:
        return LandingSource(address, landing, manifest.parts[0], stamp)
    return LandingSetSource(address, landing, manifest, stamp)
