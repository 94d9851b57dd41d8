"""What a landing says of itself: ``landing.json``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Self

from scviaduct.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT = 1
"""Version of the layout; part of every address, so that a new layout is landed again."""
_AGAIN = "Land the source again: scviaduct land SOURCE --out LANDING."


@dataclass(frozen=True, slots=True)
class Piece:
    """A shard of the source as it was landed.

    Attributes
    ----------
    dataset_id, start, stop, cells, rows_digest
        Of the shard, as :class:`~scviaduct.values.Shard` has them.
    obs, obs_digest
        Address and digest of its file of cells.
    counts, counts_digest
        Address and seal of its counts; empty where the source's could not be read.
    genes
        Address of the gene table that the counts are numbered by.
    values
        Stored counts.
    nbytes
        Of the counts and the cells on disk.
    integer
        Whether all counts are whole numbers from 0 on; others are kept as float32.
    reason
        Why there are no counts.
    """

    dataset_id: str
    start: int
    stop: int
    cells: int
    rows_digest: str
    obs: str
    obs_digest: str
    counts: str = ""
    counts_digest: str = ""
    genes: str = ""
    values: int = 0
    nbytes: int = 0
    integer: bool = True
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Part:
    """One table of cells of the source: a file, or all of an experiment.

    Attributes
    ----------
    uri
        Canonical and pinned, where it was landed from.
    source, version, selection
        As the source's own shards have them, so that cells, rows and units are those of the source.
    key
        Name of the obs column or index that names a cell.
    var_index
        Name of the column of var that ``index`` of the gene table is.
    duplicates
        Whether cells that are not primary data were landed too.
    genes
        Address of its gene table.
    n_genes
        Its length.
    columns
        obs columns with their types.
    left_out
        obs columns that cannot be kept, with the reason.
    described
        What the source said of itself.
    pieces
        In the order of the source's shards.
    """

    uri: str
    source: str
    version: str
    selection: str
    key: str
    var_index: str
    duplicates: bool
    genes: str
    n_genes: int
    columns: Mapping[str, str]
    left_out: Mapping[str, str]
    described: Mapping[str, str]
    pieces: tuple[Piece, ...] = ()

    @property
    def cells(self) -> int:
        """Number of cells."""
        return sum(piece.cells for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Manifest:
    """A landing.

    Attributes
    ----------
    uri, version
        Of the whole source, canonical and pinned.
    piece_cells
        Cells of a full piece.
    parts
        In the source's order.
    empty
        Files or datasets in which nothing was selected.
    software
        What wrote it.
    """

    uri: str
    version: str
    piece_cells: int
    parts: tuple[Part, ...]
    empty: tuple[str, ...] = ()
    software: Mapping[str, str] = field(default_factory=dict)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Of all parts."""
        return tuple(piece for part in self.parts for piece in part.pieces)

    @property
    def cells(self) -> int:
        """Number of cells."""
        return sum(part.cells for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        """As it is written."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def of(cls, told: Any, where: str) -> Self:
        """Read back what :meth:`to_json` gave.

        Raises
        ------
        SourceError
            If it is of another format, or not a manifest.
        """
        made = told.get("format") if isinstance(told, dict) else None
        if made != FORMAT:
            raise SourceError(f"{where} is a landing of format {made}, and this version reads {FORMAT}.", _AGAIN)
        try:
            parts = tuple(
                Part(**{**part, "pieces": tuple(Piece(**piece) for piece in part["pieces"])}) for part in told["parts"]
            )
            rest = {name: told[name] for name in ("uri", "version", "piece_cells", "software")}
            return cls(**rest, parts=parts, empty=tuple(told["empty"]))
        except (KeyError, TypeError) as error:
            raise SourceError(f"{where} is not a landing's manifest ({error!r}).", _AGAIN) from error
