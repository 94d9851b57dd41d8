"""Finding references on the hub, and reading the card of one."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scviaduct.errors import PackageError
from scviaduct.references.fetching.cached import offline

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from huggingface_hub import Collection, HfApi

_LIBRARY = "scvi-tools"
_MOST = 5_000
"""Most models that are looked through; the hub had 121 of scvi-tools in 2026."""
_ITEMS = 200
_CARD = 256 << 10
_EXPANDED: Any = ["tags", "downloads", "lastModified"]
_HEADER = re.compile(r"\A\s*---[ \t]*\r?\n.*?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
# CSI (colours, cursor), OSC and the like (titles, links, clipboard) up to their end, then any other two-byte sequence.
_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"
    r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\n\x07\x1b\x9c]*(?:\x1b\\|[\x07\x9c])?"
    r"|\x1b."
)


@dataclass(frozen=True, slots=True)
class Found:
    """A model on the hub, as its tags describe it.

    Attributes
    ----------
    repository
        ``OWNER/NAME``; ``hf://OWNER/NAME`` fetches it.
    family
        Name of its class; empty where the tags do not say.
    tissues, modalities
        As the publisher names them.
    annotated
        Whether its cells have labels; None where the tags do not say.
    scvi_version
        Of the scvi-tools that saved it.
    licence
        Identifier, e.g. ``cc-by-4.0``.
    downloads
        Of the last thirty days.
    last_modified
        ISO 8601.
    mapped_here
        Whether scviaduct has the family.
    """

    repository: str
    family: str
    tissues: tuple[str, ...]
    modalities: tuple[str, ...]
    annotated: bool | None
    scvi_version: str
    licence: str
    downloads: int
    last_modified: str
    mapped_here: bool


def search(
    text: str = "",
    *,
    family: str | None = None,
    tissue: str | None = None,
    collection: str | None = None,
    limit: int = 50,
) -> tuple[Found, ...]:
    """Find scvi-tools models on the hub.

    The hub itself searches in repository names only and compares tags letter by letter, so that all models of the
    library are listed (a page or two) and compared here.

    Parameters
    ----------
    text
        Words that all occur in the name, family, tissues, modalities or tags, in any case.
    family
        Class of the model, in any case.
    tissue
        Part of a tissue's name, in any case.
    collection
        A collection's slug (``OWNER/TITLE-0123...``), or words of its title, where scvi-tools is the owner unless
        written ``OWNER/WORDS``. Models of the collection are found whatever library they name, except those that are
        gone or that the token may not see.
    limit
        Most models to return.

    Returns
    -------
    tuple of Found
        Those mapped here first, then by downloads.

    Raises
    ------
    PackageError
        If the hub cannot be reached, or has no such collection.
    """
    from huggingface_hub import get_session

    from scviaduct.references.fetching.hub import asked, client, endpoint
    from scviaduct.references.fetching.web import TIMEOUT

    if offline():
        raise PackageError("A search needs the hub, and HF_HUB_OFFLINE forbids requests.", "Unset HF_HUB_OFFLINE.")

    def ask() -> list[Any]:
        # The client tries a listing for half a minute where there is no network, and waits for ever behind some walls.
        get_session().head(endpoint(), timeout=TIMEOUT)
        api = client()
        infos = list(api.list_models(filter=_LIBRARY, expand=_EXPANDED, sort="downloads", limit=_MOST))
        if collection is None:
            return infos
        names = _members(api, collection)
        known = {info.id: info for info in infos}
        infos = [known.get(name) or _info(api, name) for name in names]
        return [info for info in infos if info is not None]

    found = [_found(info) for info in asked(ask)]
    words = text.casefold().split()
    kept = [
        model
        for model in found
        if (family is None or model.family.casefold() == family.casefold())
        and (tissue is None or any(tissue.casefold() in name.casefold() for name in model.tissues))
        and all(word in _searched(model) for word in words)
    ]
    return tuple(sorted(kept, key=lambda model: (not model.mapped_here, -model.downloads, model.repository))[:limit])


def _searched(model: Found) -> str:
    return " ".join([model.repository, model.family, *model.tissues, *model.modalities, model.licence]).casefold()


def _found(info: Any) -> Found:
    from scviaduct.families import families

    tags = [safe(str(tag), lines=False) for tag in info.tags or ()]

    def told(name: str) -> tuple[str, ...]:
        return tuple(tag.removeprefix(f"{name}:") for tag in tags if tag.startswith(f"{name}:"))

    def first(name: str) -> str:
        return next(iter(told(name)), "")

    annotated = first("annotated").lower()
    name = first("model_cls_name")
    return Found(
        repository=safe(str(info.id), lines=False),
        family=name,
        tissues=told("tissue"),
        modalities=told("modality"),
        annotated=annotated == "true" if annotated in ("true", "false") else None,
        scvi_version=first("scvi_version"),
        licence=first("license"),
        downloads=int(info.downloads or 0),
        last_modified="" if info.last_modified is None else info.last_modified.isoformat(),
        mapped_here=name in families(),
    )


def _info(api: HfApi, name: str) -> Any:
    """What the hub tells of a model; None if it is gone, or hidden from whoever asks."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return api.model_info(name, expand=_EXPANDED)
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403, 404):
            return None
        raise


def _members(api: HfApi, wanted: str) -> list[str]:
    """Names of the models in a collection."""
    owner, _, title = wanted.rpartition("/")
    if not (owner and re.search(r"-[0-9a-f]{16,}$", title)):
        wanted = _slug(api.list_collections(owner=owner or _LIBRARY), owner or _LIBRARY, title)
    items = api.get_collection(wanted).items
    return [item.item_id for item in items if item.item_type == "model"][:_ITEMS]


def _slug(collections: Iterable[Collection], owner: str, words: str) -> str:
    there = {found.slug: safe(found.title, lines=False) for found in collections}
    asked_for = re.split(r"[\s-]+", words.casefold())
    fitting = [slug for slug, title in there.items() if all(word in title.casefold() for word in asked_for)]
    exact = [slug for slug in fitting if there[slug].casefold() == words.casefold()]
    if len(exact or fitting) == 1:
        return (exact or fitting)[0]
    listed = ", ".join(repr(there[slug]) for slug in (fitting or there)) or "none"
    problem = f"{len(fitting)} collections of {owner} fit" if fitting else f"{owner} has no collection that fits"
    raise PackageError(f"{problem} '{words}'.", f"Name one of: {listed}; or OWNER/WORDS for another owner's.")


def card(folder: Path) -> str:
    """What a model's card says, without its header, fit for a terminal.

    Parameters
    ----------
    folder
        Holds ``README.md``.

    Returns
    -------
    str
        At most 256 KiB of Markdown; empty if there is no card. Control sequences, which could rewrite what the
        terminal shows, and marks that turn the direction of writing are taken out.
    """
    path = folder / "README.md"
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        text = file.read(_CARD + 1).decode(errors="replace")
    text, cut = text[:_CARD], len(text) > _CARD
    body = safe(_HEADER.sub("", text.removeprefix("\ufeff"), count=1)).strip()
    return f"{body}\n\n(cut after {_CARD >> 10} KiB)" if cut else body


def safe(text: str, *, lines: bool = True) -> str:
    """A stranger's text without what a terminal would obey.

    Parameters
    ----------
    text
        Any text.
    lines
        Keep line ends and tabs.
    """
    kept = "\n\t" if lines else ""
    text = _ESCAPES.sub("", text.replace("\r\n", "\n"))
    # Categories C: control, format (zero width, direction), surrogate, private use, unassigned.
    return "".join(char for char in text if char in kept or not unicodedata.category(char).startswith("C"))
