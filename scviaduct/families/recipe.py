"""How a reference is trained, as one value: what the cells' columns mean, and every setting of training."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a reference is trained; the names are those of scvi-tools and of ``scviaduct train``.

    Attributes
    ----------
    family
        Name of the family, in any case.
    labels_key, unlabeled_category, samples_per_label
        obs column of labels, the label that means none, and the labelled cells per label and epoch (SCANVI).
    batch_key, layer, categorical_covariates, continuous_covariates, size_factor_key
        As ``setup_anndata`` takes them.
    sample_key
        obs column of samples, e.g. donors (MRVI).
    panel_key
        obs column of the panels that proteins were measured with; None for one a batch (TOTALVI).
    background
        Cells of the background as ``column=value`` pairs, any of which will do, e.g. ``perturbation=control``; all
        other cells are the target (ContrastiveVI).
    genes
        Highly variable genes to train on; 0 for all. Other modalities are kept whole.
    min_cells_per_peak
        Share of the cells in which a peak must be open to be kept. scvi-tools advises 0.05 for PEAKVI; in small or
        shallow data (sci-CAR: 608 of 52,761 peaks) that leaves too little, so that it is 0.01 unless said otherwise.
    epochs, scanvi_epochs
        Of the model, and of the SCANVI that starts from an SCVI; None for what scvi-tools chooses by the number of
        cells.
    batch_size, device, loader_workers, seed, precision
        Of training; the precision is one of Lightning's.
    early_stopping, patience, monitor
        Whether training ends when a validation metric no longer falls, after how many epochs, and which metric; None
        for what the family does. Naming one of the latter two asks for it.
    train_size, validation_size
        Shares of the cells; None for 0.9 and the rest. The split is seeded.
    preset
        Name of the recipe that the rest was filled up from: ``default``, ``scarches`` or ``census``.
    start
        Registered name or path of the reference that training starts from, instead of training one first.
    calibrate_by
        obs column of the groups that are held out to measure how sure labels are; None for the batch key, ``none`` for
        no calibration.
    with_counts
        Whether the minified data keeps the counts.
    settings, plan
        Model arguments, and those of its training plan (``lr``, ``weight_decay``, …), as text.
    """

    family: str
    labels_key: str | None = None
    unlabeled_category: str = "unknown"
    samples_per_label: int | None = None
    batch_key: str | None = None
    sample_key: str | None = None
    panel_key: str | None = None
    background: tuple[str, ...] = ()
    layer: str | None = None
    categorical_covariates: tuple[str, ...] = ()
    continuous_covariates: tuple[str, ...] = ()
    size_factor_key: str | None = None
    genes: int = 2000
    min_cells_per_peak: float = 0.01
    epochs: int | None = None
    scanvi_epochs: int | None = None
    batch_size: int = 128
    device: str = "auto"
    loader_workers: int = 0
    seed: int = 0
    precision: str = "32-true"
    early_stopping: bool | None = None
    patience: int | None = None
    monitor: str | None = None
    train_size: float | None = None
    validation_size: float | None = None
    preset: str = "default"
    start: str | None = None
    calibrate_by: str | None = None
    with_counts: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)
    plan: Mapping[str, str] = field(default_factory=dict)

    @property
    def columns(self) -> tuple[str, ...]:
        """Every obs column that the recipe names, once each."""
        keys = (self.labels_key, self.batch_key, self.size_factor_key, self.sample_key, self.panel_key, self.groups)
        background = (told.partition("=")[0] for told in self.background)
        named = (*keys, *self.categorical_covariates, *self.continuous_covariates, *background)
        return tuple(dict.fromkeys(column for column in named if column))

    @property
    def groups(self) -> str | None:
        """obs column of the groups that calibration holds out; None for no calibration."""
        if not self.labels_key or self.calibrate_by == "none":
            return None
        return self.calibrate_by or self.batch_key

    def told(self) -> dict[str, Any]:
        """All fields, as JSON has them."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain
