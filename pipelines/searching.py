"""Searching a store for the neighbours of query cells."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq

from pipelines.jobs import SHARD_CELLS
from pipelines.progress import reporter
from scviaduct.errors import InputError, StoreError
from scviaduct.mapping import preflight
from scviaduct.mapping.batches import group_columns, query_batches
from scviaduct.mapping.mapper import Mapper, model_columns, some
from scviaduct.mapping.reading import read_block
from scviaduct.references.registry import Registry
from scviaduct.sources import open_source
from scviaduct.store import Store
from scviaduct.store.index import ensure_index
from scviaduct.store.search import Queries, Searcher
from scviaduct.values import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pyarrow as pa

    from actors.searching import Fan
    from cluster.connect import Resources
    from scviaduct.store import Space
    from scviaduct.store.index import Index

_TRIES = 3


def search(
    store: str | Path,
    *,
    cells: str | None = None,
    stored: str | None = None,
    label: str | None = None,
    k: int = 30,
    where: str | None = None,
    out: str | Path | None = None,
    exact: bool = False,
    actors: int | None = None,
    address: str | None = None,
    reference: str | None = None,
    package: str | None = None,
    batch_key: str = "",
    sample_key: str = "",
    accept: Sequence[str] = (),
    as_of: int | None = None,
    quiet: bool = False,
) -> pa.Table:
    """Find the nearest stored cells of query cells.

    Name the query cells in one of three ways: ``cells``, ``stored`` or ``label``.

    Parameters
    ----------
    store
        Folder of the store.
    cells
        Source of query cells, such as an h5ad; mapped on the fly with the space's reference.
    stored
        Condition over the store's columns: the cells for which it holds are the query cells.
    label
        The store's cells of this label are the query cells.
    k
        Neighbours of each query cell. A stored cell is not its own neighbour.
    where
        Condition that neighbours fulfil, e.g. ``"tissue = 'lung'"``.
    out
        Parquet file to write the hits to.
    exact
        Compare with every cell, without the index.
    actors
        Search on Ray, with so many actors at most that hold a slice of the index each; None for this process. What is
        found is the same.
    address
        Ray cluster, for ``actors``: ``local``, ``auto`` or ``HOST:PORT``.
    reference
        Space of the store, by its reference; needed if the store has several.
    package
        Path of the space's reference package, to map ``cells`` where it is not registered under its name.
    batch_key, sample_key
        obs columns of ``cells`` that play the reference's batch and sample, where they have other names there.
    accept
        Preflight findings to override, for ``cells``.
    as_of
        Version; None for the newest.
    quiet
        Without notices.

    Returns
    -------
    pyarrow.Table
        ``query_dataset`` and ``query``, ``rank``, ``distance`` (Euclidean, in the latent space), the neighbour's key,
        label and its uncertainty, and the kept columns.

    Raises
    ------
    InputError
        If no query or more than one is named, or the store has no such space.
    NotFitError
        If ``cells`` do not fit the reference.
    """
    named = [name for name, value in (("cells", cells), ("from", stored), ("label", label)) if value is not None]
    if len(named) != 1:
        told = "No query cells are named." if not named else f"Query cells are named by {' and '.join(named)}."
        raise InputError(told, "Give one of --cells QUERY.h5ad, --from CONDITION and --label LABEL.")
    if out is not None and Path(out).is_dir():
        raise InputError(f"--out {out} is a folder.", "Name a file: --out hits.parquet.")
    space = Store.open(store).space(reference)
    # Both steps read the same version, whoever commits between them.
    version = space.snapshot(as_of).version
    with reporter(quiet=quiet) as progress:
        queries = None
        if cells is not None:
            settings = Settings(batch_key=batch_key, sample_key=sample_key)
            queries = _map_queries(space, cells, package, settings, accept)
        quoted = (label or "").replace("'", "''")
        condition = stored if stored is not None else f"label = '{quoted}'"
        with _searcher(space, version, actors, address) as searcher:
            mine = queries if queries is not None else searcher.stored(condition)
            hits = searcher.search(mine, k, where, exact=exact)
        measured = f" (measured on {hits.measured})" if hits.measured else ""
        progress.say(
            f"{len(mine.ids):,} query cells against {hits.candidates:,} cells of version {hits.version}:"
            f" {hits.method}, recall {hits.recall:.4f}{measured}"
        )
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(hits.table, out)
    return hits.table


@contextmanager
def _searcher(space: Space, version: int, actors: int | None, address: str | None) -> Iterator[Searcher]:
    """What searches a version: this process, or actors on Ray."""
    if actors is None:
        yield space.searcher(version)
        return
    from cluster.connect import connect

    ensure_index(space, version)  # what cannot be searched needs no cluster
    with connect(address) as resources:
        index, fan = _fan(space, version, actors, resources)
        try:
            yield Searcher(index, space.name, fan, threads=1)  # actors have the other cores
        finally:
            fan.close()


def _fan(space: Space, version: int, actors: int, resources: Resources) -> tuple[Index, Fan]:
    """Open the index here and its slices in actors; again if it was rebuilt or removed in between."""
    from actors.searching import Fan

    for _ in range(_TRIES):
        index = ensure_index(space, version)
        gpus = 1.0 if resources.gpus >= min(actors, len(index.manifest.parts)) else 0.0
        cpus = min(1.0, resources.cpus / (actors + 1))
        try:
            return index, Fan(index.manifest, str(space.path / "index" / f"{version}"), actors, cpus, gpus)
        except FileNotFoundError as error:
            missing = error
    told = f"The actors do not find the index of version {version} that this process opened ({missing})."
    raise StoreError(told, "Keep the store on a disk that all nodes see, and search when nobody rebuilds the index.")


def _map_queries(space: Space, cells: str, path: str | None, settings: Settings, accept: Sequence[str]) -> Queries:
    """Map query cells in this process, through the same gate as ``map``."""
    package = Registry().get(path or space.reference)
    if package.digest != space.digest:
        raise InputError(
            f"Reference '{package.name}' is {package.digest[:12]} here, the space is of {space.digest[:12]}.",
            "Register the reference that the space was mapped with, or name its package: --package PATH.",
        )
    mapper = Mapper(package, settings, fractional="counts" in accept)
    datasets, ids, latent = [], [], []
    with open_source(cells) as source:
        grouped = group_columns(package, settings)
        scan = source.scan(SHARD_CELLS, preflight.scan_columns(package, settings), grouped)
        preflight.check(source, scan, package, settings, mapper.gene_influence()).accept(accept).require_fit()
        if new := query_batches(package, settings, scan).cells:
            raise InputError(
                f"{sum(new.values()):,} of the cells are of batches that the reference does not know"
                f" ({some([batch.name for batch in new])}), and need adapters to be encoded.",
                "Map them into the store, which fits these, and search with the stored cells: --from CONDITION.",
            )
    for shard in scan.shards:
        block = read_block(shard, package, model_columns(package, settings))
        mapped = mapper.map(block)
        ids += np.array(block.obs["observation_id"].to_pylist(), object)[mapped.mapped].tolist()
        datasets += [shard.dataset_id] * int(mapped.mapped.sum())
        latent.append(mapped.latent[mapped.mapped])
    return Queries(datasets, ids, np.concatenate(latent))
