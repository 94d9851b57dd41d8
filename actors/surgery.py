"""The surgery task: some query batches in, their adapters on the shelf."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ray
import torch

from scviaduct import faults
from scviaduct.mapping.surgery import Surgeon
from scviaduct.references.package import Reference

if TYPE_CHECKING:
    from scviaduct.mapping.adapters import Shelf
    from scviaduct.mapping.batches import QueryBatch
    from scviaduct.mapping.surgery import Job, Operated, Surgery
    from scviaduct.values import Settings

_SURGEONS: dict[tuple[str, str], Surgeon] = {}


def fit_batches(job: Job, reference: str, settings: Settings, surgery: Surgery, shelf: Shelf) -> Operated:
    """Fit the adapters of some query batches that are not on the shelf.

    Parameters
    ----------
    job
        The batches, and the shards that have their cells.
    reference
        Path of the package.
    settings, surgery
        What maps, and how adapters are fitted.
    shelf
        Where they are kept.

    Returns
    -------
    Operated
        Where the adapters are, and which could not be fitted.

    Notes
    -----
    The process computes on one thread from then on. It keeps the model: a worker fits many jobs of one run, and
    importing scvi-tools takes it longer than a small batch.
    """
    torch.set_num_threads(1)
    device = "cuda" if ray.get_gpu_ids() and torch.cuda.is_available() else "cpu"
    key = (reference, repr((settings, surgery, shelf, device)))
    if key not in _SURGEONS:
        _SURGEONS.clear()
        _SURGEONS[key] = Surgeon(Reference.load(reference), settings, surgery, shelf, device)

    def done(_batch: QueryBatch, _address: str) -> None:
        faults.point("fitted")

    return _SURGEONS[key].run(job, done)


fit_task = ray.remote(max_retries=0)(fit_batches)
"""Retries are the driver's: an adapter is put on the shelf whole, and not fitted twice."""
