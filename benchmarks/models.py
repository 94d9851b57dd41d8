"""References of the sizes that matter, on genes of the benchmark's cells: initial weights, as scvi-tools and packaged.

What a model costs does not depend on what it learnt, so none is trained.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import warnings
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.data import TYPES, Design
from scviaduct.values import digest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

UNLABELED = "unknown"
_CELLS = 512


@dataclass(frozen=True, slots=True)
class Size:
    """A SCANVI.

    Attributes
    ----------
    genes, hidden, layers, latent
        Of its encoder.
    plain_batch
        Batch size that plain scvi-tools maps quickest with on a CPU (``benchmarks.encode`` tries four).
    """

    genes: int
    hidden: int
    layers: int
    latent: int
    plain_batch: int


TYPICAL = Size(2_000, 128, 1, 30, 1024)
WIDE = Size(8_000, 128, 1, 30, 512)
CENSUS = Size(8_000, 512, 2, 50, 512)
"""Architecture of the scVI models that the Census publishes, as a SCANVI."""


def genes_of(design: Design, size: Size, seed: int = 0) -> list[str]:
    """The reference's genes: drawn at random, so that a cell has the same density in them as in all genes."""
    chosen = np.random.default_rng([seed, size.genes]).choice(design.genes, size.genes, replace=False)
    names = design.gene_ids()
    return [names[number] for number in np.sort(chosen)]


def reference(folder: Path, design: Design, size: Size, seed: int = 0) -> tuple[Path, Path]:
    """The model as scvi-tools saves it, and as a package; made once.

    Parameters
    ----------
    folder
        Scratch.
    design
        Of the cells whose genes it takes.
    size
        Of the model.
    seed
        Of its weights and its choice of genes.

    Returns
    -------
    tuple of Path
        The folder that scvi-tools loads, and the package.
    """
    where = folder / f"reference-{digest(asdict(design), asdict(size), seed)[:10]}"
    if where.exists():
        return where / "saved", where / "package"
    from scviaduct.references.building import build_package

    temporary = where.with_name(f".{where.name}.making")
    shutil.rmtree(temporary, ignore_errors=True)
    with quiet():
        _save(temporary / "saved", design, size, seed)
    build_package(temporary / "saved", temporary / "package", f"b{size.genes}x{size.hidden}s{seed}")
    temporary.rename(where)
    return where / "saved", where / "package"


def _save(path: Path, design: Design, size: Size, seed: int) -> None:
    import anndata
    import scvi
    from scipy import sparse

    random = np.random.default_rng(seed)
    counts = sparse.csr_matrix(random.poisson(0.12, (_CELLS, size.genes)).astype(np.float32))
    cells = anndata.AnnData(counts)
    cells.var_names = genes_of(design, size, seed)
    cells.obs["assay"] = [f"assay {number % 4}" for number in range(_CELLS)]
    cells.obs["cell_type"] = [f"type {number % TYPES}" for number in range(_CELLS)]
    scvi.settings.seed = seed
    keys = {"batch_key": "assay", "labels_key": "cell_type", "unlabeled_category": UNLABELED}
    scvi.model.SCANVI.setup_anndata(cells, **keys)
    model = scvi.model.SCANVI(cells, n_hidden=size.hidden, n_layers=size.layers, n_latent=size.latent)
    model.is_trained = True
    model.save(str(path), save_anndata=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what scvi-tools and Lightning tell of themselves."""
    for name in ("scvi", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
