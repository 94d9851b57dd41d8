"""The manifest of a package, which may be a stranger's: everything in it is checked before any of it is used."""

from __future__ import annotations

import json
from dataclasses import fields
from functools import lru_cache
from hashlib import blake2b
from itertools import chain, groupby, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scviaduct.errors import PackageError
from scviaduct.families.base import Facts
from scviaduct.values import GeneTable, digest

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT = 2
MANIFEST = "manifest.json"
_AGAIN = "Add the reference again from where it came."
_NAME_BYTES = 200
_KEPT = 16
"""Manifests that a process need not check again: it keeps what their files say."""
_TEXTS = ("scvi_version", "batch_key", "sample_key", "labels_key", "unlabeled_category", "size_factor_key", "layer")
_LISTS = ("batch_categories", "sample_categories", "labels", "known_labels", "continuous_covariates")
_FLAGS = ("encode_covariates", "batch_encoded")
_FACTS = {
    *_TEXTS,
    *_LISTS,
    "genes",
    "modalities",
    "categorical_covariates",
    "n_latent",
    "latent_sizes",
    *_FLAGS,
}


def is_name(name: Any) -> bool:
    """Whether something names a package: as a single folder, which the name becomes part of in a store.

    Printable characters, no slashes of either kind, no ``%`` (Delta Lake reads it as an escape, and ``%2F`` as
    a slash), not beginning with a dot, at most 200 bytes long in UTF-8.
    """
    return (
        isinstance(name, str)
        and bool(name)
        and name.isprintable()
        and not name.startswith(".")
        and not {"/", "\\", "%"} & set(name)
        and len(name.encode()) <= _NAME_BYTES
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a manifest and check that it is whole.

    Raises
    ------
    PackageError
        If it is missing, of another format, its own digest does not hold, or what it says cannot be.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise PackageError(f"'{folder}' is not a reference package: it has no {MANIFEST}.", "scviaduct reference add.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PackageError(f"{path} cannot be read ({error}).", _AGAIN) from error
    _check(content, path)
    return dict(json.loads(content))


@lru_cache(maxsize=_KEPT)
def _check(content: bytes, path: Path) -> None:
    """Refuse a manifest that is not whole; a run reads each package's five times."""
    try:
        manifest: dict[str, Any] = dict(json.loads(content))
        version = manifest["format"]
        if version != FORMAT:
            raise PackageError(f"{path} has format {version}, this version reads {FORMAT}.", "Add the reference again.")
        told, expected = str(manifest["digest"]), manifest_digest(manifest)
        name, _ = manifest["name"], (manifest["notes"], manifest["provenance"], manifest["repairs"])
        outside = next((file for file in manifest["files"] if file in ("", "..") or Path(file).name != file), None)
    # json descends by recursion, so that brackets in brackets end in a RecursionError.
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PackageError(f"{path} cannot be read ({error}).", _AGAIN) from error
    if not is_name(name):
        raise PackageError(
            f"{path} has the name {str(name)[:_NAME_BYTES]!r}, which cannot be that of a folder.",
            "Do not use a stranger's package that says so. A name has no /, \\ or %, does not begin with a dot, and "
            f"has at most {_NAME_BYTES} bytes: give your own package another one in its manifest, e.g. hlca-v2.",
        )
    if outside is not None:
        raise PackageError(f"{path} names '{outside}', which is not in its folder.", "Do not use this package.")
    if told != expected:
        raise PackageError(
            f"{path} has digest {expected[:12]}, and says {told[:12]}.",
            "It was changed or damaged: add the reference again from where it came.",
        )
    wrong = _first_wrong(manifest)
    if wrong is not None:
        raise PackageError(f"{path} cannot be read: {wrong} is missing or not what it should be.", _AGAIN)


def _first_wrong(manifest: Mapping[str, Any]) -> str | None:
    """The first entry that is missing or of another kind; None if all are what they should be."""
    facts, files, latent = manifest["facts"], manifest["files"], manifest["template_latent"]
    if not isinstance(facts, dict) or not facts.keys() <= _FACTS:
        return "'facts'"
    size: Any = facts.get("n_latent")
    sizes: Any = facts.get("latent_sizes")
    genes: Any = facts.get("genes")
    width = sum(sizes.values()) if _are_sizes(sizes) else -1
    right = {
        **{f"'{key}' of the facts": isinstance(facts.get(key), str) for key in _TEXTS},
        **{f"'{key}' of the facts": _are_texts(facts.get(key)) for key in _LISTS},
        "'n_latent' of the facts": type(size) is int and size > 0,
        **{f"'{key}' of the facts": isinstance(facts.get(key), bool) for key in _FLAGS},
        "'genes' of the facts": _are_columns(genes) and "index" in genes and len(set(map(len, genes.values()))) == 1,
        "'modalities' of the facts": _are_runs(facts.get("modalities"), genes),
        "'latent_sizes' of the facts": width > 0 and next(iter(sizes.values())) == size,
        "'categorical_covariates' of the facts": _are_columns(facts.get("categorical_covariates")),
        "'family'": isinstance(manifest["family"], str),
        "'files'": isinstance(files, dict) and all(_is_file(told) for told in files.values()),
        "'template_latent'": isinstance(latent, list) and latent and all(_is_vector(row, width) for row in latent),
        "'notes'": _are_texts(manifest["notes"]),
        "'repairs'": _are_texts(manifest["repairs"]),
        "'provenance'": isinstance(manifest["provenance"], dict),
    }
    return next((what for what, holds in right.items() if not holds), None)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and set(map(type, value)) <= {str}  # of 20,000 genes; JSON has no subclass


def _are_columns(value: Any) -> bool:
    return isinstance(value, dict) and all(_are_texts(texts) for texts in value.values())


def _are_sizes(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(type(size) is int and size > 0 for size in value.values())


def _are_runs(value: Any, genes: Any) -> bool:
    """Whether runs of modalities cover the features."""
    if not isinstance(value, list) or not _are_columns(genes) or "index" not in genes:
        return False
    right = all(
        isinstance(run, list) and len(run) == 2 and isinstance(run[0], str) and type(run[1]) is int and run[1] > 0
        for run in value
    )
    return right and sum(run[1] for run in value) == len(genes["index"])


def _is_file(told: Any) -> bool:
    return isinstance(told, dict) and isinstance(told.get("digest"), str) and type(told.get("size")) is int


def _is_vector(row: Any, size: Any) -> bool:
    return isinstance(row, list) and len(row) == size and all(type(value) in (int, float) for value in row)


def facts_to_json(facts: Facts) -> dict[str, Any]:
    """Facts as a manifest has them: modalities as runs, because one word a gene would be a tenth of it."""
    told = {item.name: getattr(facts, item.name) for item in fields(Facts) if item.name != "genes"}
    runs = [[name, len(list(run))] for name, run in groupby(facts.genes.modality)]
    told |= {"genes": dict(facts.genes.columns), "modalities": runs}
    plain: dict[str, Any] = json.loads(json.dumps(told))
    return plain


def facts_of(told: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of :class:`~scviaduct.families.Facts` from what :func:`facts_to_json` gave."""
    facts = dict(told)
    columns = {key: tuple(values) for key, values in facts.pop("genes").items()}
    modality = tuple(chain.from_iterable(repeat(name, size) for name, size in facts.pop("modalities")))
    categorical = {key: tuple(values) for key, values in facts.pop("categorical_covariates").items()}
    facts |= {key: tuple(facts[key]) for key in _LISTS}
    return facts | {"genes": GeneTable(columns, modality), "categorical_covariates": categorical}


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """Digest of what decides how a package maps: its files, family and facts."""
    return digest(
        manifest["format"], manifest["family"], manifest["files"], manifest["facts"], manifest["template_latent"]
    )


def file_digest(path: Path) -> str:
    """BLAKE2b of a file's content."""
    found = blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            found.update(chunk)
    return found.hexdigest()
