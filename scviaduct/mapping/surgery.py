"""Surgery of a whole query: which adapters it needs, and fitting those that are not there yet."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal

from scviaduct.errors import DataError
from scviaduct.mapping.adapters import Adapter, address
from scviaduct.mapping.fitting import Training, fit
from scviaduct.mapping.layout import laid_out
from scviaduct.mapping.sampling import merge_samples, sample_batches
from scviaduct.software import software
from scviaduct.values import digest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from scviaduct.mapping.adapters import Shelf
    from scviaduct.mapping.batches import QueryBatch, QueryBatches
    from scviaduct.mapping.sampling import Sample
    from scviaduct.references.package import Reference
    from scviaduct.values import Settings, Shard

Mode = Literal["auto", "off", "decoder"]
CELLS = 512
"""Cells of a batch that an adapter is fitted on. More brought nothing on simulated cells of 1,500 counts; cells of few
counts need more (docs/surgery.md)."""
_SUPPOSED_EPOCHS = 100
_TOGETHER = 8
"""Batches of one task: they share what is read and the model, and at most so many are lost with a node."""


@dataclass(frozen=True, slots=True)
class Surgery:
    """What the user chose of surgery; everything but the mode enters an adapter's address.

    Attributes
    ----------
    mode
        ``auto`` fits a batch where the encoder reads what is new of it; ``decoder`` also where the decoder alone does;
        ``off`` fits nothing.
    cells
        Of each batch, at most.
    training
        How they are fitted.
    background
        ContrastiveVI: ``column=value`` pairs that make a query cell one of the background (a control); without any,
        all cells are targets.
    """

    mode: Mode = "auto"
    cells: int = CELLS
    training: Training = field(default_factory=Training)
    background: tuple[str, ...] = ()

    @property
    def decoder(self) -> bool:
        """Whether batches are fitted that only decoding depends on."""
        return self.mode == "decoder"


def trained_kl_weight(reference: Reference) -> float:
    """Weight of the divergences with which a reference's training ended, as far as its package says how long that was.

    scvi-tools raises it over the epochs, 400 of them for most classes, and few references are trained for so long. Of
    one that does not say, 100 epochs are supposed: as if of surgery by scvi-tools, 200 epochs long, half were done.
    """
    from scviaduct.families import family

    told = reference.provenance
    epochs = (
        told.get("epochs", {}).get(reference.family, _SUPPOSED_EPOCHS) if isinstance(told.get("epochs"), dict) else 0
    )
    plan = told.get("recipe", {}).get("plan", {}) if isinstance(told.get("recipe"), dict) else {}
    warmup = plan.get("n_epochs_kl_warmup", family(reference.family).warmup)
    if warmup in ("None", None):
        return 1.0
    return min(1.0, (epochs or _SUPPOSED_EPOCHS) / max(float(warmup), 1.0))


@dataclass(frozen=True, slots=True)
class Job:
    """Some query batches that are fitted in one go, one after the other.

    Attributes
    ----------
    batches
        Each with the key under which its address is remembered.
    shards
        Where they have cells.
    """

    batches: tuple[tuple[QueryBatch, str], ...]
    shards: tuple[Shard, ...]


@dataclass(frozen=True, slots=True)
class Operated:
    """What became of a job.

    Attributes
    ----------
    addresses
        Query batch to the address of its adapter.
    failures
        Query batch to why it has none.
    found
        Batches whose cells led to an adapter that was there.
    """

    addresses: Mapping[QueryBatch, str]
    failures: Mapping[QueryBatch, str] = field(default_factory=dict)
    found: frozenset[QueryBatch] = frozenset()


def memo_key(batch: QueryBatch, shards: Sequence[Shard], reference: Reference, surgery: Surgery) -> str:
    """Key under which the address of a batch's adapter is remembered: what determines its sample, without reading."""
    told = asdict(surgery)
    told.pop("mode")
    return digest("sample", reference.digest, batch.values, sorted(shard.address for shard in shards), told)


def recalled(
    found: QueryBatches, shelf: Shelf, reference: Reference, surgery: Surgery, at_once: int = 1
) -> tuple[dict[QueryBatch, str], list[Job]]:
    """Adapters that are there, and jobs for those that are not known to be.

    Parameters
    ----------
    found
        The query batches of a scan.
    shelf
        The space's adapters.
    reference, surgery
        What is fitted, and how.
    at_once
        Jobs that will run at a time.

    Returns
    -------
    tuple
        Query batch to the address of its adapter, and what is left to do: batches that share shards together.
    """
    there: dict[QueryBatch, str] = {}
    missing: dict[tuple[Shard, ...], list[tuple[QueryBatch, str]]] = defaultdict(list)
    for batch in found.cells:
        shards = found.shards_of(batch)
        key = memo_key(batch, shards, reference, surgery)
        known = shelf.recall(key)
        if known is None:
            missing[shards].append((batch, key))
        else:
            there[batch] = known
    # Fewer in a job than it may hold where there are workers that would have none.
    size = max(1, min(_TOGETHER, sum(map(len, missing.values())) // max(at_once, 1)))
    jobs = []
    for shards, batches in missing.items():
        jobs += [Job(tuple(batches[i : i + size]), shards) for i in range(0, len(batches), size)]
    return there, jobs


class Surgeon:
    """A model of scvi-tools, loaded once, on which batches are fitted.

    Parameters
    ----------
    reference
        The package; the files that are used are verified.
    settings, surgery
        What maps, and how adapters are fitted.
    shelf
        Where they are kept.
    device
        ``"cpu"`` or a CUDA device.
    """

    def __init__(
        self, reference: Reference, settings: Settings, surgery: Surgery, shelf: Shelf, device: str = "cpu"
    ) -> None:
        from scviaduct.families import family
        from scviaduct.families.vae import quiet
        from scviaduct.references.package import MODEL, REGISTRY, TEMPLATE
        from scviaduct.references.saved.portable import read_model
        from scviaduct.references.template import read_template

        reference.require(MODEL, REGISTRY, TEMPLATE)
        self._reference, self._settings, self._surgery, self._shelf = reference, settings, surgery, shelf
        self._device, self._family = device, family(reference.family)
        self._saved = read_model(reference.path)
        with quiet():
            self._template = read_template(reference.path)
            self._model = self._family.instantiate(self._saved, self._template)
        self._slots = self._family.slots(self._model, reference)

    def run(self, job: Job, on_done: Callable[[QueryBatch, str], None] | None = None) -> Operated:
        """Fit the batches of a job, but for those whose cells led to an adapter that is there.

        A shard that cannot be read is passed over: mapping puts its unit into quarantine, and says why. A batch of
        which no shard can be read has no adapter.

        Parameters
        ----------
        job
            What to fit.
        on_done
            Told of each adapter that is there.
        """
        surgery = self._surgery
        addresses: dict[QueryBatch, str] = {}
        failures: dict[QueryBatch, str] = {}
        found: set[QueryBatch] = set()
        samples, errors = self._samples(job)
        for batch, key in job.batches:
            sample = samples.get(batch)
            if sample is None or (errors and not sample.n_cells):
                failures[batch] = str(errors[0])
                continue
            try:
                addresses[batch] = address(self._reference.digest, batch, sample.digest, surgery)
                if self._shelf.has(addresses[batch]):
                    found.add(batch)
                else:
                    self._shelf.put(self.fit(batch, sample))
            except DataError as error:
                failures[batch] = str(error)
                del addresses[batch]
                continue
            if not errors:
                self._shelf.remember(key, addresses[batch])
            if on_done:
                on_done(batch, addresses[batch])
        return Operated(addresses, failures, frozenset(found))

    def _samples(self, job: Job) -> tuple[dict[QueryBatch, Sample], list[DataError]]:
        """Samples of a job's batches, and what kept shards from being read."""
        surgery, wanted = self._surgery, [batch for batch, _ in job.batches]
        columns = tuple(dict.fromkeys(pair.partition("=")[0] for pair in surgery.background))
        told = self._reference, self._settings, wanted, surgery.cells, surgery.training.seed
        merged: dict[QueryBatch, Sample] = {}
        errors: list[DataError] = []
        for shard in job.shards:
            try:
                more = sample_batches([shard], *told, decoder=surgery.decoder, columns=columns)
            except DataError as error:
                errors.append(error)
            else:
                merged = merge_samples([merged, more], surgery.cells)
        return merged, errors

    def fit(self, batch: QueryBatch, sample: Sample) -> Adapter:
        """Fit one batch on a sample of its cells.

        Parameters
        ----------
        batch
            The query batch.
        sample
            Of its cells. One without a cell gives an adapter of the reference's means.
        """
        from scviaduct.families.vae import quiet

        began = time.monotonic()
        own = self._surgery
        laid = laid_out(
            self._family, self._saved, self._reference, self._settings, batch, sample, background=own.background
        )
        with quiet():
            fitted = fit(self._model, self._family, self._slots, laid, own.training, self._device)
        vectors = {name: fitted.vectors[name] for name, _ in batch.values}
        told = {
            "cells_seen": sample.seen,
            "cells_sampled": sample.n_cells,
            "sample": sample.digest,
            "epochs": fitted.epochs,
            "best_epoch": fitted.best,
            "cell_epochs": fitted.cell_epochs,
            "loss_before": fitted.loss_before,
            "loss_after": fitted.loss_after,
            "surgery": asdict(own),
            "seconds": round(time.monotonic() - began, 2),
            "software": software("scvi-tools", "torch"),
        }
        where = address(self._reference.digest, batch, sample.digest, own)
        return Adapter(where, self._reference.digest, batch, self._encoder_rows(batch, vectors), vectors, told)

    def _encoder_rows(
        self, batch: QueryBatch, vectors: Mapping[str, Mapping[str, torch.Tensor]]
    ) -> dict[str, dict[str, torch.Tensor]]:
        """What the encoder looks up for the batch, folded from a model that is widened by it."""
        from scviaduct.families.vae import quiet
        from scviaduct.families.widening import Added, known_categories, widen

        added = {name: [Added(value, vectors[name])] for name, value in batch.values}
        with quiet():
            model = self._family.instantiate(widen(self._saved, self._reference, self._slots, added), self._template)
        encoder = self._family.fold(model, self._reference, "cpu")
        columns, known = tuple(self._reference.categorical_covariates), known_categories(self._reference)
        found = {name: encoder.rows(name, len(known[name]), columns) for name, _ in batch.values}
        return {name: rows for name, rows in found.items() if rows}
