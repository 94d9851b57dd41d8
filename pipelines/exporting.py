"""Exporting cells, labels and latents."""

from __future__ import annotations

from pathlib import Path

from pipelines.progress import reporter
from scviaduct.store import Store
from scviaduct.store.export import export as export_space


def export(
    store: str | Path,
    *,
    to: str,
    out: str | Path,
    where: str | None = None,
    reference: str | None = None,
    as_of: int | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> Path:
    """Write a space's cells to a file, in the source's order.

    Parameters
    ----------
    store
        Folder of the store.
    to
        ``h5ad`` or ``zarr`` (an AnnData with the columns in ``obs`` and the latent in ``obsm["X_<reference name>"]``,
        NaN where a cell has none), or ``parquet``.
    out
        File or folder to write.
    where
        Condition that cells fulfil.
    reference
        Space of the store, by its reference; needed if the store has several.
    as_of
        Version; None for the newest.
    overwrite
        Replace what is there.
    quiet
        Without progress.

    Returns
    -------
    Path
        What was written.

    Raises
    ------
    InputError
        If ``to`` is no format, or ``out`` is there.
    """
    space = Store.open(store).space(reference)
    with reporter(quiet=quiet) as progress:
        version = space.snapshot(as_of).version
        progress.start("exporting", space.count(where, version))
        return export_space(space, to, Path(out), where, version, overwrite=overwrite, advance=progress.advance)
