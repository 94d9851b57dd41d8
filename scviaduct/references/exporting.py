"""A package's model in the layout of scvi-tools."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import anndata

from scviaduct.errors import InputError
from scviaduct.families import family
from scviaduct.families.registered import own_categories
from scviaduct.families.vae import quiet
from scviaduct.references.package import MODEL, REGISTRY, TEMPLATE
from scviaduct.references.saved.portable import read_model, to_scvi_file
from scviaduct.references.template import SYNTHETIC, read_template

if TYPE_CHECKING:
    from scviaduct.references.package import Reference

SAVED = "model.pt"


def export_model(reference: Reference, folder: Path) -> Path:
    """Write ``model.pt``, and the template's cells in the layout that the model was set up with.

    Parameters
    ----------
    reference
        The package.
    folder
        To make; it must be new or empty.

    Raises
    ------
    InputError
        If it is not.
    PackageError
        If the package's own files were changed.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"'{folder}' is there and not empty.", "Name a new folder: --out DIR.")
    reference.require(MODEL, REGISTRY, TEMPLATE)
    saved, found = read_model(reference.path), family(reference.family)
    with quiet():  # a protein may be called like its gene
        cells = own_categories(saved.attr_dict["registry_"], read_template(reference.path), reference)
        data = found.layout(saved, cells)
        data.uns[SYNTHETIC] = True
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        made = Path(temporary, "model")
        made.mkdir()
        with quiet():
            if isinstance(data, anndata.AnnData):
                data.write_h5ad(made / "adata.h5ad")
            else:
                data.write_h5mu(made / "mdata.h5mu")
        to_scvi_file(saved, made / SAVED)
        if folder.exists():
            folder.rmdir()
        made.rename(folder)
    return folder
