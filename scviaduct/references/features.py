"""Which features a reference is trained on: those that every file has, variable genes, and peaks that are open often.

Memory: sums over the cells, never the cells (see :mod:`scviaduct.references.variable`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd

from scviaduct.errors import InputError
from scviaduct.references.variable import VariableGenes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy.typing as npt

    from scviaduct.families import Family, Recipe
    from scviaduct.sources import Source
    from scviaduct.values import CellBlock, GeneTable, IntArray, Shard

    Blocks = Callable[["Features"], Iterator[CellBlock]]

_REMEDY = {
    "protein": "proteins=KEY names the element of obsm that holds them, modality=rna,NAME:protein the modality of a"
    " .h5mu",
    "atac": "modality=NAME:atac says which modality of a .h5mu holds them",
    "rna": "modality=NAME:rna says which modality of a .h5mu holds them",
}


@dataclass(frozen=True, slots=True)
class Features:
    """Features in the order of a model, modality after modality.

    Attributes
    ----------
    names, modality
        One per feature.
    others
        Further identifiers of the features, by column.
    """

    names: tuple[str, ...]
    modality: tuple[str, ...]
    others: Mapping[str, tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.names)

    def only(self, kept: npt.NDArray[np.bool_]) -> Self:
        """Some of the features, in their order."""
        at = np.flatnonzero(kept)
        others = {column: tuple(values[i] for i in at) for column, values in self.others.items()}
        return type(self)(tuple(self.names[i] for i in at), tuple(self.modality[i] for i in at), others)

    def of(self, modality: str) -> npt.NDArray[np.bool_]:
        """bool, shape ``(n_features,)``: which are of a modality."""
        return np.array([name == modality for name in self.modality], np.bool_)

    def target(self, table: GeneTable, found: Family) -> IntArray:
        """Where the features of a file go: int32, shape ``(n_file_features,)``, -1 for one that is not wanted."""
        wanted = pd.MultiIndex.from_arrays([self.modality, self.names])
        there = pd.MultiIndex.from_arrays([_modalities(table, found), table.columns["index"]])
        target: IntArray = wanted.get_indexer(there).astype(np.int32)
        return target

    def to_json(self) -> dict[str, Any]:
        """As a work folder keeps it."""
        return {"names": self.names, "modality": self.modality, "others": dict(self.others)}

    @classmethod
    def of_json(cls, told: Mapping[str, Any]) -> Self:
        """What :meth:`to_json` gave."""
        others = {column: tuple(values) for column, values in told["others"].items()}
        return cls(tuple(told["names"]), tuple(told["modality"]), others)


def _modalities(table: GeneTable, found: Family) -> tuple[str, ...]:
    """Modality of each feature; what a file does not say is the first that the family needs and no other part is."""
    told = table.modality or ("",) * len(table)
    unsaid = next((name for name in found.needs.modalities if name not in told), "")
    return tuple(name or unsaid for name in told)


def common_features(source: Source, shards: Sequence[Shard], found: Family) -> Features:
    """Features that every file has and the family reads, in the order of its modalities and of the first file.

    Raises
    ------
    InputError
        If a modality that the family needs is absent, or the files have nothing in common.
    """
    tables = [source.genes(shard) for shard in {shard.uri: shard for shard in shards}.values()]
    keys = [list(zip(_modalities(table, found), table.columns["index"], strict=True)) for table in tables]
    common = set(keys[0]).intersection(*keys[1:])
    position: dict[tuple[str, str], int] = {}
    for i, key in enumerate(keys[0]):
        if key in common and key[1] and key[0] in found.needs.modalities:
            position.setdefault(key, i)
    _check_modalities(tuple(dict.fromkeys(name for name, _ in keys[0])), {name for name, _ in position}, found)
    if not position:
        told = "The files of the source have no gene in common."
        raise InputError(told, "Give them the same identifiers in var_names.")
    order = sorted(position, key=lambda key: (found.needs.modalities.index(key[0]), position[key]))
    columns = {column: values for column, values in tables[0].columns.items() if column != "index"}
    others = {column: tuple(values[position[key]] for key in order) for column, values in columns.items()}
    return Features(tuple(name for _, name in order), tuple(name for name, _ in order), others)


def _check_modalities(there: Sequence[str], shared: set[str], found: Family) -> None:
    needs = found.needs
    required = [name for name in needs.modalities if name not in needs.optional]
    missing = [name for name in required if name not in there]
    if not missing and len(needs.modalities) > 1 and len(set(there).intersection(needs.modalities)) < 2:
        missing = [name for name in needs.modalities if name not in there]
    if missing:
        has = ", ".join(name or "features of no named modality" for name in there) or "none"
        remedy = "; ".join(f"{name}: {_REMEDY[name]}" for name in missing if name in _REMEDY)
        raise InputError(
            f"A {found.name} needs {' or '.join(missing)} features, and the source has {has}.",
            f"Say in the source's URI where they are. {remedy}.",
        )
    lost = [name for name in required if name not in shared]
    if lost and shared:
        told = f"The files of the source have no {lost[0]} feature in common."
        raise InputError(told, "Give them the same identifiers in var_names.")


def choose_features(features: Features, recipe: Recipe, blocks: Blocks) -> Features:
    """Drop genes that vary little and peaks that are seldom open; two passes over the cells at most.

    Parameters
    ----------
    features
        All that could be trained on.
    recipe
        ``genes`` counts those of ``rna`` alone; ``min_cells_per_peak`` is for ``atac``.
    blocks
        Streams the cells, with the features that it is given, in the same order each time.

    Raises
    ------
    InputError
        If the genes cannot be ranked, or no peak is left.
    """
    genes, peaks = features.of("rna"), features.of("atac")
    ranks = bool(0 < recipe.genes < genes.sum())
    counts = bool(peaks.any() and recipe.min_cells_per_peak > 0)
    if not ranks and not counts:
        return features
    looked_at = (genes & ranks) | (peaks & counts)
    part = features.only(looked_at)
    n_genes = int(genes.sum()) if ranks else 0
    variable = VariableGenes(n_genes, recipe.batch_key)
    cells, opened = 0, np.zeros(len(part), np.int64)
    for block in blocks(part):
        cells += block.n_cells
        opened += np.bincount(block.indices[block.data > 0], minlength=len(part))
        if ranks:
            variable.add(block)
    kept = np.ones(len(features), np.bool_)
    if ranks:
        variable.fit()
        for block in blocks(features.only(genes)):
            variable.clip(block)
        kept[genes] = variable.chosen(recipe.genes)
    if counts:
        often = opened[n_genes:] >= recipe.min_cells_per_peak * cells
        _check_peaks(opened[n_genes:], often, cells, recipe)
        kept[peaks] = often
    return features.only(kept)


def _check_peaks(opened: npt.NDArray[np.int64], often: npt.NDArray[np.bool_], cells: int, recipe: Recipe) -> None:
    if not often.any():
        most = int(opened.max(initial=0))
        told = (
            f"No peak is open in {recipe.min_cells_per_peak:.1%} of {cells:,} cells; the most frequent is in {most:,}"
        )
        raise InputError(f"{told}.", "Ask for fewer: --min-cells-per-peak 0.001, or 0 for all peaks.")
