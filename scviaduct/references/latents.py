"""The reference's own cells, as they lie in its latent: a table, and what is summed up of it.

The table has a row per training cell; :class:`Statistics` is what scoring a query against the reference asks of it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from scviaduct.errors import PackageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from scviaduct.values import FloatArray, LongArray


@dataclass(frozen=True, slots=True)
class ReferenceLatents:
    """The reference's own cells, or some of them.

    Attributes
    ----------
    latent
        float32, shape ``(n_cells, n_latent)``; posterior mean.
    labels
        One per cell; None for a cell without.
    variance
        float32, shape ``(n_cells, n_latent)``; of the posterior. None where the data's file had means only.
    others
        Name of each further latent to its mean, float32 of shape ``(n_cells, size)``.
    """

    latent: FloatArray
    labels: list[str | None]
    variance: FloatArray | None = None
    others: Mapping[str, FloatArray] = field(default_factory=dict)

    def table(self, names: Sequence[str]) -> pa.Table:
        """A row a cell, beside the cells' names."""
        columns: dict[str, Any] = {"observation_id": pa.array(names, pa.string()), "latent": _lists(self.latent)}
        if self.variance is not None:
            columns["variance"] = _lists(self.variance)
        columns |= {f"latent_{name}": _lists(values) for name, values in self.others.items()}
        columns["label"] = pa.array(self.labels, pa.string())
        return pa.table(columns)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what :meth:`write` wrote.

        Raises
        ------
        PackageError
            If it is no such table.
        """
        try:
            table = pq.read_table(path)
            latent = _matrix(table["latent"])
            variance = _matrix(table["variance"]) if "variance" in table.column_names else None
            names = [name for name in table.column_names if name.startswith("latent_")]
            others = {name.removeprefix("latent_"): _matrix(table[name]) for name in names}
            return cls(latent, table["label"].to_pylist(), variance, others)
        except (pa.ArrowException, LookupError, ValueError, AttributeError) as error:
            raise PackageError(f"{path} cannot be read ({error}).", "Add the reference again.") from error


def _lists(values: FloatArray) -> pa.ListArray:
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    return pa.ListArray.from_arrays(pa.array(np.arange(0, flat.size + 1, values.shape[1], dtype=np.int32)), flat)


def _matrix(column: pa.ChunkedArray) -> FloatArray:
    whole = column.combine_chunks()
    found: FloatArray = whole.flatten().to_numpy().reshape(len(whole), -1)
    return found


@dataclass(frozen=True, slots=True)
class Statistics:
    """What the training cells sum up to.

    Attributes
    ----------
    labels
        In alphabetical order; empty without labels.
    count
        int64, shape ``(n_labels,)``; cells of each.
    mean
        float32, shape ``(n_labels, n_latent)``.
    covariance
        float32, shape ``(n_labels, n_latent, n_latent)``; unbiased, zero for a label of one cell.
    all_mean, all_covariance
        The same of all cells, shapes ``(n_latent,)`` and ``(n_latent, n_latent)``.
    influence
        float32, shape ``(n_features,)``; L2 norm of each feature's first-layer weights.
    """

    labels: tuple[str, ...]
    count: LongArray
    mean: FloatArray
    covariance: FloatArray
    all_mean: FloatArray
    all_covariance: FloatArray
    influence: FloatArray

    @classmethod
    def of(cls, latents: ReferenceLatents, influence: FloatArray) -> Self:
        """Sum up the cells of a reference; in float64, because a covariance of 10 million float32 rows drifts."""
        told = np.array([label or "" for label in latents.labels], object)
        labels = tuple(sorted(set(told) - {""}))
        groups = [latents.latent[told == label].astype(np.float64) for label in labels]
        size = latents.latent.shape[1]
        mean = np.array([group.mean(axis=0) for group in groups], np.float32).reshape(len(labels), size)
        covariance = np.array([_covariance(group) for group in groups], np.float32).reshape(len(labels), size, size)
        every = latents.latent.astype(np.float64)
        return cls(
            labels,
            np.array([len(group) for group in groups], np.int64),
            mean,
            covariance,
            every.mean(axis=0).astype(np.float32),
            _covariance(every).astype(np.float32),
            influence,
        )

    def write(self, path: Path) -> None:
        """Write as safetensors."""
        tensors = {name: np.ascontiguousarray(getattr(self, name)) for name in _TENSORS}
        save_file(tensors, path, metadata={"labels": json.dumps(self.labels)})

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what :meth:`write` wrote.

        Raises
        ------
        PackageError
            If it is no such file.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                labels = tuple(json.loads(file.metadata()["labels"]))
                return cls(labels, *(file.get_tensor(name) for name in _TENSORS))
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise PackageError(f"{path} holds no statistics ({error}).", "Add the reference again.") from error


_TENSORS = ("count", "mean", "covariance", "all_mean", "all_covariance", "influence")


def _covariance(rows: np.ndarray) -> np.ndarray:
    size = rows.shape[1]
    return np.cov(rows, rowvar=False).reshape(size, size) if len(rows) > 1 else np.zeros((size, size))
