"""The commands that a choice comes to, with the columns filled in, and what to know before they are run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from scviaduct.references.choosing.columns import complete_enough, has_control, splits
from scviaduct.references.choosing.profile import with_parameters
from scviaduct.sources.uri import parse

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from scviaduct.references.choosing.columns import Column
    from scviaduct.references.choosing.fits import Fit
    from scviaduct.references.choosing.profile import Profile

FEW_CELLS = 1_000
"""Fewer cells than this are few to train on; there is no sharp bound."""
BLIND = ("SCVI", "SCANVI", "TOTALVI", "MULTIVI", "PEAKVI")
"""Families whose encoder can do without the batch, so that cells of new batches map."""
TOLD = ("TOTALVI",)
"""Those of them whose encoder reads the batch unless it is told not to (``encode_covariates`` of scvi-tools 1.5)."""
_NOT_READ = "encode_covariates=False"
_DEFAULT_UNTOLD = "unknown"  # what --unlabeled-category is unless it is given


def _line(*parts: str) -> str:
    """A command as a shell takes it."""
    return shlex.join(["scviaduct", *parts])


def stem_of(uri: str) -> str:
    """A name for what is made of a source: that of its file or folder, or of its release."""
    address = parse(uri)
    path = PurePosixPath(address.location.rstrip("/"))
    name = re.sub(r"[^a-z0-9._-]+", "-", re.sub(r"\.(h5ad|h5mu|zarr)$", "", path.name.lower())).strip("-._")
    return (f"{address.scheme}-{name}" if address.scheme != "file" else name)[:60].rstrip("-._") or "cells"


def map_command(profile: Profile, fit: Fit) -> str:
    """Maps the source to a registered reference."""
    batch = ("--batch-key", fit.batch_key) if fit.batch_key else ()
    store = f"{stem_of(profile.uri)}-store"
    return _line("map", profile.uri, "--reference", fit.reference, *batch, "--store", store)


def made_name(profile: Profile, family: str) -> str:
    """Folder and name of what a training command makes."""
    return f"{stem_of(profile.uri)}-{family.lower()}"


def add_command(profile: Profile, family: str) -> str:
    """Registers what :func:`train_command` made."""
    made = made_name(profile, family)
    return _line("reference", "add", f"./{made}", "--name", made)


def train_command(profile: Profile, family: str) -> str:
    """Trains a family on the source, with the columns that were found."""
    uri, background = profile.uri, []
    if family == "ContrastiveVI" and profile.perturbation is not None:
        uri = _known_only(profile, profile.perturbation)
        background = [f"--background={profile.perturbation.name}={name}" for name in profile.perturbation.controls]
    options = [*_labels(profile, family), *_batch(profile, family), *_sample(profile, family)]
    for told in background:
        options += told.split("=", 1)
    if profile.aim == "map" and family in TOLD and batch_of(profile, family) is not None:
        options += ["--set", _NOT_READ]
    return _line("train", uri, "--family", family.lower(), *options, "--out", made_name(profile, family))


def batch_of(profile: Profile, family: str) -> Column | None:
    """The batch column that a family is trained with: several batches of enough cells, and not what is under study."""
    batch, samples = profile.batch, profile.samples
    if batch is None or not splits(batch):
        return None
    return None if family == "MRVI" and samples is not None and samples.name == batch.name else batch


def _labels(profile: Profile, family: str) -> list[str]:
    labels = profile.labels
    if labels is None or (family == "SCANVI" and not complete_enough(labels, profile.cells)):
        return []
    untold = next(iter(labels.untold), "")
    category = ["--unlabeled-category", untold] if untold and untold != _DEFAULT_UNTOLD else []
    return ["--labels-key", labels.name, *category]


def _batch(profile: Profile, family: str) -> list[str]:
    batch = batch_of(profile, family)
    return ["--batch-key", batch.name] if batch else []


def _sample(profile: Profile, family: str) -> list[str]:
    return ["--sample-key", profile.samples.name] if family == "MRVI" and profile.samples else []


def _known_only(profile: Profile, column: Column) -> str:
    """The source without cells of which nobody knows what was done to them: they would count as perturbed."""
    if not column.lacking:
        return profile.uri
    name = column.name if column.name.isidentifier() else f"attr({json.dumps(column.name, ensure_ascii=False)})"
    listed = ", ".join(json.dumps(value, ensure_ascii=False) for value in column.untold)
    rule = f"{name} not in [{listed}]" if len(column.untold) > 1 else f"{name} != {listed or None}"
    before = parse(profile.uri).parameters.get("filter", "")
    return with_parameters(profile.uri, {"filter": f"({before}) and {rule}" if before else rule})


def notes_of(profile: Profile, family: str) -> tuple[str, ...]:
    """What to know before a family is trained."""
    return tuple(_notes(profile, family))


def _notes(profile: Profile, family: str) -> Iterator[str]:
    if profile.cells < FEW_CELLS:
        yield f"{profile.cells:,} cells are few to train on; there is no sharp bound, and 1,000 is ours."
    batch, column = batch_of(profile, family), profile.perturbation
    if batch is not None or family == "MRVI":
        yield _of_new_batches(profile, family)
    elif family in BLIND:
        yield "No batch key: no column of several batches was found, so that nothing is corrected."
    if batch is not None and batch.missing:
        yield f"{batch.missing:,} cells have no value in '{batch.name}': fill it, or filter them out."
    sample = profile.samples.name if family == "MRVI" and profile.samples else ""
    others = [name for name in profile.others.get("batch", ()) if name != sample]
    if batch is not None and others:
        yield f"'{batch.name}' is taken for the batch; {_listed(others)} could be too (--batch-key)."
    if family == "ContrastiveVI" and column is not None and column.lacking:
        untold = _listed([*column.untold, *(["no value"] if column.missing else [])])
        yield f"{column.lacking:,} cells of '{column.name}' ({untold}) are left out: they would count as perturbed."
    if family == "MRVI" and profile.samples is not None:
        yield from _of_samples(profile, profile.samples)
    if family == "MULTIVI" and profile.paired < 1:
        yield f"{profile.paired:.0%} of the sampled cells have counts in every modality; MULTIVI takes the others too."


def _of_new_batches(profile: Profile, family: str) -> str:
    """Whether what is trained maps cells of batches that it was not trained on."""
    if family not in BLIND:
        one, more = ("sample", "samples") if family == "MRVI" else ("batch", "batches")
        return f"{family}'s encoder reads the {one}: for cells of new {more} map fits adapters, by scArches surgery."
    if family not in TOLD:
        return f"The encoder does not read the batch ({_NOT_READ}), so that cells of new batches map without surgery."
    if profile.aim == "map":
        return f"--set {_NOT_READ}, because --aim map: cells of new batches map without surgery."
    return (
        f"{family}'s encoder reads the batch unless it is told not to: cells of new batches that are mapped later need"
        f" surgery, or none with --set {_NOT_READ}."
    )


def _of_samples(profile: Profile, samples: Column) -> Iterator[str]:
    if not samples.sure:
        yield f"Cannot tell whether '{samples.name}' is a donor: MRVI compares whatever --sample-key names."
    if not profile.conditions:
        yield f"No column that is constant within '{samples.name}' says what sets its values apart."


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def questions_of(profile: Profile, family: str) -> Iterator[tuple[str, str]]:
    """Families for questions that the data could answer beside the one that was chosen for."""
    if "rna" not in profile.features:
        return
    samples, column = profile.samples, profile.perturbation
    if family != "MRVI" and samples is not None and profile.conditions:
        condition, counts = next(iter(profile.conditions.items()))
        told = ", ".join(f"{count} {value}" for value, count in list(counts.items())[:4])
        unsure = "" if samples.sure else f"; cannot tell whether '{samples.name}' is a donor"
        why = f"to compare samples ('{samples.name}'; '{condition}' is constant within each: {told}{unsure})"
        yield "MRVI", why
    if family != "ContrastiveVI" and column is not None and has_control(column):
        yield "ContrastiveVI", f"to see what '{column.name}' does to cells, against {_listed(column.controls[:3])}"


def others_of(profile: Profile, family: str) -> Iterator[tuple[str, str]]:
    """Families that would do instead of a family that is trained, and when."""
    labels = profile.labels
    plain = "SCANVI" if labels is not None and complete_enough(labels, profile.cells) else "SCVI"
    if family == "SCANVI":
        yield "SCVI", "to keep labels out of the latent"
    elif family in ("TOTALVI", "MULTIVI"):
        yield plain, "to model the RNA alone, as most published references do"
    elif family in ("ContrastiveVI", "MRVI"):
        yield plain, "to map other cells to these, without a question of effects or samples"


def search_command(profile: Profile) -> str:
    """Looks for a published reference of the same tissue."""
    return _line("reference", "search", profile.tissue)
