"""A package's model in the layout of scvi-tools."""

from __future__ import annotations

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
    from pathlib import Path

    from scviaduct.references.package import Reference

SAVED = "model.pt"


def export_model(reference: Reference, folder: Path) -> Path:
    """Write ``model.pt``, and the template's cells in the layout that the model was set up with.

    Parameters
    ----------
    reference
        The package.
    folder
        Made if absent; it must not hold a model.

    Raises
    ------
    InputError
        If a model lies there.
    PackageError
        If the package's own files were changed.
    """
    if (folder / SAVED).exists():
        raise InputError(f"'{folder}' holds a {SAVED}.", "Name a new folder: --out DIR.")
    reference.require(MODEL, REGISTRY, TEMPLATE)
    saved, found = read_model(reference.path), family(reference.family)
    with quiet():  # a protein may be called like its gene
        cells = own_categories(saved.attr_dict["registry_"], read_template(reference.path), reference)
        data = found.layout(saved, cells)
        data.uns[SYNTHETIC] = True
    folder.mkdir(parents=True, exist_ok=True)
    with quiet():
        if isinstance(data, anndata.AnnData):
            data.write_h5ad(folder / "adata.h5ad")
        else:
            data.write_h5mu(folder / "mdata.h5mu")
    to_scvi_file(saved, folder / SAVED)
    return folder
