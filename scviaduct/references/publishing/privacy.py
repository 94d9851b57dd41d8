"""What must not be published by accident: donors and samples by name, paths of this machine, tokens.

A model carries the categories of every column that it was set up with, so that such a column cannot be left out of what
is published: it is refused unless it is allowed by name. All else is dropped unless it is allowed.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scviaduct.errors import InputError
from scviaduct.families.registered import state_of, texts

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from scviaduct.families import Facts

_PEOPLE = ("donor", "patient", "individual", "subject", "person", "participant", "proband", "volunteer")
_SAMPLES = ("sample", "specimen", "biosample", "aliquot")
_TRAITS = ("age", "dob", "birth", "birthdate", "birthday", "bmi", "ethnicity", "ancestry", "race", "postcode", "zip")
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_SEURAT = "origident"
"""Seurat's own column of samples."""
_OF_PEOPLE = re.compile(rf"(?i)\b(?:{'|'.join(_PEOPLE)})s?[ _.-]?(?:id|no|nr)?[ _.-]?[a-z]?\d+\b|^[DPH]\d{{1,4}}$")
_IDENTIFIERS = (
    ("an e-mail address", re.compile(r"[\w.+-]+@[\w-]+\.\w+")),
    ("a person's name", re.compile(r"^[A-Z][\w'\u2019-]+, [A-Z][\w.'\u2019-]*(?: [A-Z][\w.'\u2019-]*)?$")),
    (
        "a date",
        re.compile(
            r"\b(?:19|20)\d\d[-/.](?:0?[1-9]|1[0-2])[-/.](?:0?[1-9]|[12]\d|3[01])\b|\b\d\d?[./]\d\d?[./](?:19|20)\d\d\b"
        ),
    ),
    ("a number as registers give to people", re.compile(r"^(?:\d{7,}|\d{3}-\d{2}-\d{4}|\d{6}[-+]\d{4})$")),
)
_SECRETS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{20,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_PATHS = re.compile(
    r"file:///?[^\s\"'\\]+|(?<![\w.:/])/(?:home|Users|root|mnt|data|scratch)/[^\s\"'\\]+|[A-Z]:\\+Users\\+\w+"
)


def registered_columns(registry: Mapping[str, Any], facts: Facts) -> dict[str, tuple[str, ...]]:
    """obs columns that a model was set up with, to their categories; those of numbers have none.

    Parameters
    ----------
    registry
        What scvi-tools saved of the data's layout.
    facts
        Of the same model.
    """
    setup = registry.get("setup_args", {})
    named: dict[str, tuple[str, ...]] = {}
    for option, value in setup.items():
        if option.endswith(("_key", "_keys")) and "obsm" not in option:
            found = [value] if isinstance(value, str) else value
            if isinstance(found, list | tuple):
                named |= {str(column): () for column in found if isinstance(column, str)}
    named |= {facts.batch_key: facts.batch_categories, facts.sample_key: facts.sample_categories}
    named |= {facts.labels_key: facts.known_labels, **facts.categorical_covariates}
    if setup.get("panel_key"):
        named[setup["panel_key"]] = texts(state_of(dict(registry), "panel").get("categorical_mapping", ()))
    return {column: values for column, values in named.items() if column}


def suspicion(column: str, values: Iterable[str], *, labels: bool = False) -> tuple[str, str] | None:
    """Why a column may name donors or samples.

    Parameters
    ----------
    column
        Its name.
    values
        Its categories.
    labels
        Whether they are cell types, for which ``D1`` is no donor.

    Returns
    -------
    tuple of str or None
        What it looks like, and the first value that does; None if nothing does.
    """
    known = list(values)
    words = [word.lower() for word in _WORDS.findall(column)]
    first = known[0] if known else ""
    if any(word.startswith(_PEOPLE) for word in words):
        return "it is called as a column of donors is", first
    if "".join(words) == _SEURAT or any(word.startswith(_SAMPLES) for word in words):
        return "it is called as a column of samples is, which stand for donors", first
    if any(word in _TRAITS for word in words):
        return "it is called as what is known of a person", first
    for value in known:
        told = next((what for what, pattern in _IDENTIFIERS if pattern.search(value)), None)
        if told is None and not labels and _OF_PEOPLE.search(value):
            told = "a donor's name"
        if told is not None:
            return f"a value looks like {told}", value
    return None


def require_public(
    columns: Mapping[str, Sequence[str]], facts: Facts, allowed: Sequence[str], others: Iterable[str] = ()
) -> None:
    """Refuse to publish a model whose columns may name donors, unless they are allowed by name.

    Parameters
    ----------
    columns
        Columns that the model was set up with, to their categories.
    facts
        Of the model.
    allowed
        Names of columns that may be published.
    others
        Columns that its data has besides.

    Raises
    ------
    InputError
        If a column may name donors, or an allowed one is not there.
    """
    known = {*columns, *others}
    for name in allowed:
        if name not in known:
            close = get_close_matches(name, known, n=3) or sorted(known)[:8]
            told = f"--allow-column {name}: neither the model nor its data has that column"
            raise InputError(f"{told}.", f"There are: {', '.join(close) or 'none'}.")
    for column, values in columns.items():
        if column in allowed:
            continue
        found = suspicion(column, values, labels=column == facts.labels_key)
        if found is not None:
            reason, value = found
            example = f", e.g. '{value}'" if value else ""
            holds = f"holds its {len(values):,} values{example}" if values else "its cells hold the values"
            raise InputError(
                f"The model was trained with the obs column '{column}' and {holds}: {reason}. Nothing was published.",
                f"If these values may be public: --allow-column {column}. Else train again with codes in their place.",
            )


def require_clean(documents: Mapping[str, str], places: Sequence[Path] = ()) -> None:
    """Refuse to publish text that holds a token, or a path of this machine.

    Parameters
    ----------
    documents
        Name of each text to the text.
    places
        Folders of this machine that none may name, besides the user's own.

    Raises
    ------
    InputError
        Naming where it was found; a token is not repeated.
    """
    private = [str(path) for path in (*_homes(), *places) if len(path.parts) > 2]
    for name, text in documents.items():
        if _SECRETS.search(text):
            told = f"{name} would hold an access token or a private key"
            raise InputError(f"{told}; nothing was published.", "Take it out, and revoke it if it was ever shown.")
        path = next((place for place in private if place in text), None)
        found = _PATHS.search(text)
        if path or found:
            shown = path or (found[0] if found else "")
            told = f"{name} would hold '{shown}', a path of this machine"
            raise InputError(f"{told}; nothing was published.", "Take it out of the text or of the model's arguments.")


def _homes() -> tuple[Path, ...]:
    """The user's home; none for a number without an account, such as a container may run as."""
    try:
        return (Path.home(),)
    except RuntimeError:
        return ()
