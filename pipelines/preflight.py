"""Checking whether a query fits a reference, without mapping it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.jobs import SHARD_CELLS
from pipelines.query import Asked, scan_query, told_surgery
from scviaduct.mapping import preflight
from scviaduct.references.registry import Registry
from scviaduct.sources import open_source
from scviaduct.values import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scviaduct.mapping.preflight import Report


def check(
    source: str,
    *,
    reference: str,
    accept: Sequence[str] = (),
    batch_key: str = "",
    sample_key: str = "",
    surgery: str = "auto",
    sample: int = preflight.SAMPLE_CELLS,
) -> Report:
    """Check whether a query fits a reference.

    Reads the metadata of every cell, the gene list of every file, and the counts of a bounded sample.

    Parameters
    ----------
    source
        URI of the query cells, e.g. ``"census:2025-11-08?organism=homo_sapiens&filter=tissue_general == 'lung'"``.
    reference
        Registered name, or path of a package.
    accept
        Findings to override, by name.
    batch_key
        obs column of the query that plays the reference's batch, where it has another name there.
    sample_key
        The same for the reference's sample (MRVI).
    surgery
        What a run would do about batches that the reference does not know, as ``map`` takes it.
    sample
        Cells whose counts are looked at, at most.

    Returns
    -------
    Report
        Its ``verdict`` is ``fit``, ``not fit`` or ``cannot tell``; its ``findings`` say why.

    Raises
    ------
    InputError
        If the source or the reference cannot be opened.
    """
    package = Registry().get(reference)
    settings = Settings(batch_key=batch_key, sample_key=sample_key)
    wanted = told_surgery(surgery, None, None, (), package)
    with open_source(source) as opened:
        (scan,), settings = scan_query(opened, [Asked(package, wanted)], settings, shard_cells=SHARD_CELLS)
        influence = package.encoder().gene_influence()
        report = preflight.check(opened, scan, package, settings, influence, sample=sample, surgery=wanted.mode)
    return report.accept(accept)
