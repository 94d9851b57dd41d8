"""Publishing a reference on the Hugging Face hub."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.progress import reporter
from scviaduct.errors import InputError
from scviaduct.references.publishing.repository import Options, write_repository
from scviaduct.references.publishing.upload import target_of, upload
from scviaduct.references.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scviaduct.references.publishing.repository import Contents

_TEXT = 1 << 20


@dataclass(frozen=True, slots=True)
class Publication:
    """What was published, or would be.

    Attributes
    ----------
    uri
        ``hf://OWNER/NAME@COMMIT``; after a dry run ``hf://OWNER/NAME``.
    contents
        The files; their folder is there afterwards only if it was named.
    dry_run
        Whether nothing was uploaded.
    """

    uri: str
    contents: Contents
    dry_run: bool = False


def publish(
    name: str,
    target: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    out: str | Path | None = None,
    with_counts: bool = False,
    with_ids: bool = False,
    licence: str = "",
    description: str = "",
    data_url: str = "",
    tissues: Sequence[str] = (),
    allow_columns: Sequence[str] = (),
    criticise: str = "",
    replace: bool = False,
    quiet: bool = False,
) -> Publication:
    """Publish a registered reference as a repository of scvi-hub.

    Parameters
    ----------
    name
        Registered name, or path of a package.
    target
        ``hf://OWNER/NAME``.
    private
        Make a private repository.
    dry_run
        Write the repository's files and check them, and upload nothing.
    out
        Folder that keeps the files; new or empty.
    with_counts, with_ids
        Publish counts and names of the cells, where the package kept them.
    licence
        The hub's identifier, e.g. ``cc-by-4.0``.
    description
        Markdown for the card, or ``@FILE`` that holds it.
    data_url
        Where the training data can be had.
    tissues
        Names for the hub's search.
    allow_columns
        obs columns to publish though they may name donors, or though the model does not need them.
    criticise
        URI of cells to compare the model's samples with.
    replace
        Take the place of another model.
    quiet
        Without notices.

    Returns
    -------
    Publication
        With the commit.

    Raises
    ------
    InputError
        If something private would be published, or the repository holds something else.
    PackageError
        If the package does not load, or the hub refuses or cannot be reached.
    """
    repository = target_of(target)
    reference = Registry().get(name)
    options = Options(
        licence=licence,
        description=_text(description),
        data_url=data_url,
        tissues=tuple(tissues),
        with_counts=with_counts,
        with_ids=with_ids,
        allow_columns=tuple(allow_columns),
        criticise=criticise,
    )
    with ExitStack() as stack, reporter(quiet=quiet) as progress:
        kept = Path(out) if out is not None else Path(stack.enter_context(tempfile.TemporaryDirectory()), "repository")
        progress.say(f"writing the repository of '{reference.name}'")
        contents = write_repository(reference, repository.name, kept, options)
        if dry_run:
            return Publication(f"hf://{repository.name}", contents, dry_run=True)
        progress.say(f"uploading {sum(contents.files.values()) / 1e6:,.1f} MB to hf://{repository.name}")
        commit = upload(contents, repository, private=private, replace=replace)
    return Publication(f"hf://{repository.name}@{commit}", contents)


def _text(description: str) -> str:
    """A text, or that of the file which ``@FILE`` names."""
    if not description.startswith("@"):
        return description
    path = Path(description[1:])
    try:
        if path.stat().st_size > _TEXT:
            raise InputError(f"--description {description}: the file has more than {_TEXT:,} bytes.", "Shorten it.")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        told = f"--description {description}: the file cannot be read ({error})"
        raise InputError(f"{told}.", "Name a text file, or write the text itself.") from error
