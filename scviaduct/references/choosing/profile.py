"""What a choice is made from: properties of a source, read from its metadata and from a bounded sample of its cells."""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote

import numpy as np

from scviaduct.errors import DataError
from scviaduct.references.choosing import columns
from scviaduct.sources.content import Place
from scviaduct.sources.files import open_root
from scviaduct.sources.modalities import CANONICAL, OTHER, canonical
from scviaduct.sources.unreadable import reading
from scviaduct.sources.uri import parse

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from scviaduct.references.choosing.columns import Column
    from scviaduct.references.choosing.fits import Fit
    from scviaduct.sources import Source
    from scviaduct.values import CellBlock, GeneTable, Scan, Shard

Aim = Literal["", "map", "integrate", "compare-samples", "perturbation"]
AIMS: tuple[Aim, ...] = ("map", "integrate", "compare-samples", "perturbation")
SAMPLE_CELLS = 1024
"""Cells whose counts are looked at, at most."""
_PLACES = 16
_PEAK = re.compile(r"(chr)?[\w.]+[:_-]\d+[_-]\d+", re.IGNORECASE)
_PEAKS_FROM = 0.9  # share of feature names that are intervals of a genome from which on they are taken for peaks
_ENSEMBL = re.compile(r"ENS([A-Z]*)G\d{11}")
_SPECIES = {"": "human", "MUS": "mouse", "RNO": "rat", "DAR": "zebrafish", "MMU": "macaque", "SSC": "pig"}
_TRIED = 500  # identifiers of a column that are looked at for an organism


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What the questions of the tree are asked of.

    Attributes
    ----------
    uri
        As it was given, and with the parameters that declare proteins or peaks: what commands are printed with.
    declared
        Why parameters were added to the URI; empty if none was.
    version
        Of the source.
    aim
        What the user wants; empty if it was not told.
    cells, sampled
        Selected cells, and those whose counts were looked at.
    features
        Modality to number of features, of the file that has most.
    named
        Whether the source says of what modality its features are.
    paired
        Share of the sampled cells that have counts in every modality.
    layer
        Where the counts were found, and why there.
    wrong
        Modality to what is wrong with its values; without an entry if they are counts.
    unread
        Why cells could not be sampled; empty if they could.
    labels, batch, samples, perturbation
        The best column of each role, None if there is none.
    others
        Role to the names of further columns that could have it.
    conditions
        obs column that is constant within each sample, to its values with the number of samples of each.
    organism, tissue
        Empty where not told.
    fits
        How the registered references fit, the best first.
    broken
        Registered references that cannot be read.
    """

    uri: str
    declared: str = ""
    version: str
    aim: Aim = ""
    cells: int
    sampled: int
    features: Mapping[str, int]
    named: bool = True
    paired: float = 1.0
    layer: str = ""
    wrong: Mapping[str, str] = field(default_factory=dict)
    unread: str = ""
    labels: Column | None = None
    batch: Column | None = None
    samples: Column | None = None
    perturbation: Column | None = None
    others: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    conditions: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    organism: str = ""
    tissue: str = ""
    fits: tuple[Fit, ...] = ()
    broken: Mapping[str, str] = field(default_factory=dict)


def profile_of(source: Source, scan: Scan, uri: str, aim: Aim = "", sample: int = SAMPLE_CELLS) -> Profile:
    """Find out about an open source.

    Parameters
    ----------
    source, scan
        Open, and scanned with the columns of :func:`~scviaduct.references.choosing.columns.candidates`.
    uri
        What it was opened with.
    aim
        What the user wants.
    sample
        Cells whose counts are looked at, at most.
    """
    roles = {
        "labels": columns.labels_of(scan),
        "batch": columns.batches_of(scan),
        "samples": columns.samples_of(scan),
        "perturbation": columns.perturbations_of(scan),
    }
    best = {role: found[0] if found else None for role, found in roles.items()}
    samples = best["samples"]
    there = [name for name in scan.columns if name not in scan.missing]
    conditions = columns.named(there, columns.CONDITIONS) if samples else []
    asked = list(dict.fromkeys([samples.name, *conditions])) if samples else []
    blocks, unread = _sampled(source, scan.shards, asked, sample)
    tables = {shard.uri: source.genes(shard) for shard in _files(scan.shards, blocks)}
    seen = [_features(table) for table in tables.values()]
    wrong, paired = _values(blocks, tables)
    told = source.describe()
    return Profile(
        uri=uri,
        version=source.version,
        aim=aim,
        cells=scan.cells,
        sampled=sum(block.n_cells for block in blocks),
        features={
            name: max(found.get(name, 0) for found in seen) for name in CANONICAL if any(name in f for f in seen)
        },
        named=all(table.modalities for table in tables.values()),
        paired=paired,
        layer=f"{told['layer']} ({told['why']})" if "why" in told else told.get("layer", ""),
        wrong=wrong,
        unread=unread,
        others={role: tuple(column.name for column in found[1:]) for role, found in roles.items()},
        conditions=_conditions(samples, conditions, blocks) if samples else {},
        organism=_organism(scan, uri, tables),
        tissue=_most(scan, columns.TISSUES),
        labels=best["labels"],
        batch=best["batch"],
        samples=best["samples"],
        perturbation=best["perturbation"],
    )


def undeclared(source: Source, scan: Scan, uri: str) -> tuple[dict[str, str], str]:
    """URI parameters that a file needs to give all that it holds, and why: peaks in ``X``, proteins in ``obsm``."""
    address = parse(uri)
    # What was opened tells a landing from other folders; what is in it was declared when it was landed.
    if parse(source.uri).scheme != "file" or not scan.shards:
        return {}, ""
    shard = scan.shards[0]
    table = source.genes(shard)
    if not table.modalities and _looks_like_peaks(table):
        name = next(iter(table.columns["index"]))
        return {"modality": "atac"}, f"The features have names of peaks such as '{name}', and no column of var says so"
    if {"proteins", "modality"} & set(address.parameters) or {"protein", "atac"} & set(table.modalities):
        return {}, ""
    found = _protein_elements(parse(shard.uri).location)
    if not found:
        return {}, ""
    more = f" (there is also {', '.join(found[1:])})" if found[1:] else ""
    return {"proteins": found[0]}, f"obsm['{found[0]}'] is taken for counts of proteins by its name{more}"


def with_parameters(uri: str, parameters: Mapping[str, str]) -> str:
    """A URI with parameters added or replaced, as a person would write it."""
    location, _, query = uri.partition("?")
    parts = [part for part in query.split("&") if part and part.partition("=")[0] not in parameters]
    parts += [f"{name}={quote(value, safe=SAFE)}" for name, value in parameters.items()]
    return f"{location}?{'&'.join(parts)}" if parts else location


SAFE = " /:,=!<>()[]\"'@+*"
"""What stays as it is in a parameter of a printed URI; it is quoted for the shell as a whole."""


def _looks_like_peaks(table: GeneTable) -> bool:
    names = table.columns["index"]
    return bool(names) and sum(_PEAK.fullmatch(name) is not None for name in names) >= _PEAKS_FROM * len(names)


def _protein_elements(url: str) -> list[str]:
    """Elements of obsm that are called as proteins are."""
    place = Place.of(url)
    with ExitStack() as handles, reading(f"obsm of {url}"):
        root = open_root(place, handles)
        names = list(root["obsm"].keys()) if "mod" not in root and "obsm" in root else []
    return [name for name in names if canonical(re.sub(r"_(raw|counts?)$", "", name.lower())) == "protein"]


def _features(table: GeneTable) -> dict[str, int]:
    """Number of features of each modality; of a table that says of none, genes."""
    if not table.modalities:
        return {"rna": len(table)}
    return {name: table.modality.count(name) for name in table.modalities if name != OTHER}


def _files(shards: Sequence[Shard], blocks: Sequence[CellBlock]) -> list[Shard]:
    """One shard of every file that was sampled, or of the first."""
    seen = {block.shard.uri: block.shard for block in blocks}
    return list(seen.values()) or list(shards[:1])


def _sampled(source: Source, shards: Sequence[Shard], names: Sequence[str], cells: int) -> tuple[list[CellBlock], str]:
    """A few cells from places spread evenly over the source, and why there are none."""
    if not shards:
        return [], "the source selects no cell"
    n = min(_PLACES, len(shards))
    chosen = [shards[i * (len(shards) - 1) // max(n - 1, 1)] for i in range(n)]
    limit = max(1, cells // _PLACES)
    blocks, unread = [], ""
    for shard in chosen:
        cuts = [shard.start + i * (shard.stop - shard.start) // (_PLACES // n) for i in range(_PLACES // n + 1)]
        for low, high in pairwise(cuts):
            try:
                blocks.append(source.read(replace(shard, start=low, stop=high), None, None, names, limit))
            except DataError as error:
                unread = str(error)
    return [block for block in blocks if block.n_cells], unread


def _values(blocks: Sequence[CellBlock], tables: Mapping[str, GeneTable]) -> tuple[dict[str, str], float]:
    """What is wrong with the values of each modality, and the share of cells with counts in all modalities."""
    wrong: dict[str, str] = {}
    cells = paired = 0
    for block in blocks:
        table = tables[block.shard.uri]
        modality = table.modality or ("rna",) * len(table)
        names = [name for name in dict.fromkeys(modality) if name and name != OTHER]
        code = np.array([names.index(name) if name in names else -1 for name in modality])[block.indices]
        row = np.repeat(np.arange(block.n_cells), np.diff(block.indptr))
        for i, name in enumerate(names):
            values = block.data[code == i]
            bad = values[~(np.isfinite(values) & (values >= 0) & (values == np.rint(values)))]
            if len(bad):
                wrong.setdefault(name, f"value {bad[0]:g} of {name} is no count")
        seen = [np.bincount(row[code == i], minlength=block.n_cells) > 0 for i in range(len(names))]
        paired += int(np.logical_and.reduce(seen).sum()) if seen else 0
        cells += block.n_cells
    return wrong, paired / cells if cells else 0.0


def _conditions(samples: Column, names: Sequence[str], blocks: Sequence[CellBlock]) -> dict[str, dict[str, int]]:
    """Columns of one value a sample, with at least two samples to two of their values, in the sampled cells."""
    found: dict[str, dict[str, int]] = {}
    for name in names:
        values_of: dict[str, set[str]] = {}
        for block in blocks:
            pairs = zip(block.obs[samples.name].to_pylist(), block.obs[name].to_pylist(), strict=True)
            for sample, value in set(pairs):
                if sample is not None and value is not None and not columns.is_untold(str(value)):
                    values_of.setdefault(str(sample), set()).add(str(value))
        if name == samples.name or any(len(values) > 1 for values in values_of.values()):
            continue
        held = [next(iter(values)) for values in values_of.values()]
        counts = {value: held.count(value) for value in sorted(set(held))}
        if sum(count > 1 for count in counts.values()) > 1:
            found[name] = counts
    return found


def _organism(scan: Scan, uri: str, tables: Mapping[str, GeneTable]) -> str:
    """By the Census, by obs, or by the Ensembl ids."""
    address = parse(uri)
    if address.scheme == "census":
        return address.parameters.get("organism", "homo_sapiens")
    for column in columns.columns_of(scan, columns.ORGANISMS):
        return ", ".join(sorted(column.values))
    several = [values for table in tables.values() for values in table.columns.values()]
    ids = [name for values in several for name in values[:: max(1, len(values) // _TRIED)]]
    found = {match.group(1) for name in ids if (match := _ENSEMBL.match(name))}
    return ", ".join(sorted(_SPECIES.get(code, f"ENS{code}") for code in found))


def _most(scan: Scan, names: Sequence[str]) -> str:
    """The most frequent value of the first column of some names."""
    found = columns.columns_of(scan, names)
    values = found[0].values if found else {}
    return max(values, key=lambda value: values[value]) if values else ""
