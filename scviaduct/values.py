"""The small frozen values that cross every boundary.

They are picklable, hold addresses and configuration and never an open handle. Their names are the vocabulary of the
whole program. A value that stands for work is addressed by content: :func:`digest` of what determines its result.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping as MappingType

    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

    FloatArray = npt.NDArray[np.float32]
    IntArray = npt.NDArray[np.int32]
    LongArray = npt.NDArray[np.int64]

SCHEMA_VERSION = 1
"""Version of the columns a unit writes; part of every unit id, so that a new layout maps again."""


def digest(*parts: Any) -> str:
    """Address values by content.

    Parameters
    ----------
    parts
        JSON-serialisable values; dictionaries are ordered by key first.

    Returns
    -------
    str
        32 hexadecimal characters of BLAKE2b over the canonical JSON.
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class GeneTable:
    """The identifiers that one side (a source or a reference) has for its genes.

    Genes stand for features of any modality: proteins and peaks have their identifiers here too.

    Attributes
    ----------
    columns
        Name of the identifier column (``"index"`` is ``var_names``, or the key column of SOMA's ``var``) to one string
        per gene, in matrix order. ``""`` stands for a missing identifier. The first entry is the preferred one.
    modality
        One per gene: ``rna``, ``protein`` or ``atac``; ``other`` for what no reference encodes, ``""`` where it is not
        said. Empty if the table says it of none: all are then of the reference's first modality.
    """

    columns: MappingType[str, tuple[str, ...]]
    modality: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that the table names, in order."""
        return tuple(dict.fromkeys(name for name in self.modality if name))


@dataclass(frozen=True, slots=True)
class Shard:
    """A stable, addressed piece of query cells of one dataset.

    The cells are those rows in ``[start, stop)`` that belong to ``dataset_id`` and pass the filter that ``uri``
    carries; ``rows_digest`` pins them.

    Attributes
    ----------
    uri
        What a reader opens, anywhere: canonical, with version, layer, measurement and filter spelled out.
    source
        Namespace of the cell key, without version or filter: ``census:homo_sapiens``, ``soma:URL#RNA`` or a file's URL.
    version
        What pins the content: a Census release, a fingerprint of a SOMA experiment or the digest of a file.
    selection
        What else decides the values that are read (layer, measurement, key column), canonical text.
    dataset_id
        The dataset that every cell of the shard belongs to.
    start, stop
        Half-open range of source rows (``soma_joinid``, or the row in the file).
    cells
        Number of selected cells in the range.
    rows_digest
        BLAKE2b of the selected row numbers as little-endian int64.
    """

    uri: str
    source: str
    version: str
    selection: str
    dataset_id: str
    start: int
    stop: int
    cells: int
    rows_digest: str

    @property
    def address(self) -> str:
        """Digest of what determines the shard's content; where it lies (``uri``) does not enter."""
        return digest(self.version, self.selection, self.dataset_id, self.cells, self.rows_digest)


@dataclass(frozen=True, slots=True)
class ColumnSummary:
    """What a scan saw of one obs column.

    Attributes
    ----------
    type
        Arrow type that the column has in the store: ``string``, ``bool``, ``int64`` or ``double``.
    counts
        Value (as text) to number of selected cells, for string and bool columns and for integers of few values; at
        most ``MAX_CATEGORIES`` of them.
    nulls
        Number of selected cells without a value.
    truncated
        True if there were more values than ``counts`` holds.
    """

    MAX_CATEGORIES = 10_000

    type: str
    counts: MappingType[str, int]
    nulls: int = 0
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class Scan:
    """One pass over a source's obs: the shards, and what planning and preflight ask of the metadata.

    Attributes
    ----------
    shards
        In the source's order.
    cells
        Number of selected cells; the sum over ``shards``.
    duplicates_skipped
        Cells left out because ``is_primary_data`` is false.
    empty
        Files or datasets in which nothing was selected.
    columns
        Summary of each requested obs column that exists.
    missing
        Requested obs columns that a file or experiment lacks: column to the first place that lacks it.
    groups
        If columns to group by were named, one per shard in the order of ``shards``: combination of their values (as
        text, None for a missing one) to number of cells.
    """

    shards: tuple[Shard, ...]
    cells: int
    duplicates_skipped: int = 0
    empty: tuple[str, ...] = ()
    columns: MappingType[str, ColumnSummary] = field(default_factory=dict)
    missing: MappingType[str, str] = field(default_factory=dict)
    groups: tuple[MappingType[tuple[str | None, ...], int], ...] = ()


@dataclass(frozen=True, slots=True)
class CellBlock:
    """A shard's counts in memory, as CSR, aligned to a gene list.

    Attributes
    ----------
    shard
        Where the cells come from.
    indptr
        int64, shape ``(n_cells + 1,)``.
    indices
        int32, shape ``(nnz,)``; gene positions, ascending within a cell, without duplicates.
    data
        float32, shape ``(nnz,)``; raw counts.
    n_genes
        Width of the matrix.
    rows
        int64, shape ``(n_cells,)``; source rows, ascending.
    obs
        One row per cell: ``observation_id`` (string) first, then the requested columns.
    """

    shard: Shard
    indptr: LongArray
    indices: IntArray
    data: FloatArray
    n_genes: int
    rows: LongArray
    obs: pa.Table

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.indptr) - 1

    @property
    def nbytes(self) -> int:
        """Bytes held by the arrays and the table."""
        arrays = self.indptr.nbytes + self.indices.nbytes + self.data.nbytes + self.rows.nbytes
        return int(arrays + self.obs.nbytes)


@dataclass(frozen=True, slots=True)
class Mapping:
    """What came out for a block, cell by cell in the block's order.

    Attributes
    ----------
    latent
        float32, shape ``(n_cells, n_latent)``; posterior mean. Rows where ``mapped`` is false hold NaN.
    mapped
        bool, shape ``(n_cells,)``; false for a cell without a single count in the reference's genes.
    label
        int32, shape ``(n_cells,)``; position in ``labels``, -1 for none.
    labels
        Label categories.
    probability, margin, entropy
        float32, shape ``(n_cells,)``; probability of the label, its distance to the runner-up's, and the Shannon
        entropy in nats of all labels' probabilities. NaN where there is no label.
    adapter
        int32, shape ``(n_cells,)``; position in ``adapters`` of the one that the cell was encoded with, -1 for none.
        None where no cell has one.
    adapters
        The adapters, as the store names them.
    """

    latent: FloatArray
    mapped: npt.NDArray[np.bool_]
    label: IntArray
    labels: tuple[str, ...]
    probability: FloatArray
    margin: FloatArray
    entropy: FloatArray
    adapter: IntArray | None = field(default=None, kw_only=True)
    adapters: tuple[str, ...] = field(default=(), kw_only=True)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user chose that decides a mapping's rows; every field enters the unit id.

    Attributes
    ----------
    keep_obs
        Kept obs column to its Arrow type in the store.
    ambiguous_entropy
        Entropy in nats above which a label is flagged ``ambiguous``.
    batch_key, sample_key
        obs columns of the query that play the reference's batch and sample; empty for the reference's own names.
    neighbors
        k of the label transfer by nearest neighbours, for references without a classifier.
    """

    keep_obs: MappingType[str, str] = field(default_factory=dict)
    ambiguous_entropy: float = 1.0
    batch_key: str = ""
    sample_key: str = ""
    neighbors: int = 15


@dataclass(frozen=True, slots=True)
class Unit:
    """A shard under one reference and one set of settings: the smallest piece of work that is retried or resumed."""

    id: str
    shard: Shard

    @classmethod
    def of(cls, shard: Shard, reference_digest: str, settings: Settings, adapter_digest: str = "") -> Unit:
        """Address the work of mapping ``shard``: same inputs, same id, same rows."""
        key = digest(SCHEMA_VERSION, shard.address, reference_digest, adapter_digest, asdict(settings))
        return cls(key, shard)


@dataclass(frozen=True, slots=True)
class Plan:
    """The units of one run and the digests that make the run repeatable.

    Attributes
    ----------
    run
        Run id: the digest of everything below, so that the same command resumes the same run.
    reference, reference_digest
        Registered name and digest of the package.
    source
        Canonical URI of the whole source.
    version
        Version of the whole source.
    settings
        What decides the rows.
    units
        In the source's order.
    accepted
        Preflight findings that the user overrode by name.
    adapters
        Each query batch, as text, with the address of its adapter; empty for one that could not be fitted.
    decoder
        Whether those are among them that only decoding depends on.
    """

    run: str
    reference: str
    reference_digest: str
    source: str
    version: str
    settings: Settings
    units: tuple[Unit, ...]
    accepted: tuple[str, ...] = ()
    adapters: tuple[tuple[str, str], ...] = ()
    decoder: bool = False

    @property
    def cells(self) -> int:
        """Number of cells in the plan."""
        return sum(unit.shard.cells for unit in self.units)
