"""A small MRVI and its cells, as an analysis is handed them."""

from __future__ import annotations

import numpy as np
import torch

from scviaduct.analysis.base import Cells
from scviaduct.families import Recipe, family
from scviaduct.families.vae import quiet
from scviaduct.references.saved.archive import read_model_file
from scviaduct.references.template import encode_cells

FAMILY = family("mrvi")


def train(data, folder, *, sample, batch, epochs, arguments, labels="", gain=1.0, **told):
    """A trained MRVI, its facts and its encoder.

    The cells come shuffled. ``gain`` enlarges what samples add, which is little after a few epochs.
    """
    torch.manual_seed(0)
    with quiet():
        FAMILY.setup(data, Recipe(family="MRVI", sample_key=sample, batch_key=batch, labels_key=labels or None))
        model = FAMILY.model_class()(data, **arguments)
        model.train(
            max_epochs=epochs,
            batch_size=128,
            accelerator="cpu",
            devices=1,
            early_stopping=False,
            shuffle_set_split=False,  # without a global seed, its split is another each time
            enable_progress_bar=False,
            logger=False,
            **told,
        )
        with torch.no_grad():
            for part in model.module.qz.modules():
                if isinstance(part, torch.nn.Linear):
                    part.weight *= gain
        model.save(str(folder / "saved"), save_anndata=False)
    model.module.eval()
    facts = FAMILY.facts(read_model_file(folder / "saved" / "model.pt"))
    return model, facts, FAMILY.fold(model, facts, "cpu")


def cells_of(trained, rows=slice(None), seed=7, **changed):
    """Some of the training cells; ``changed`` are obs columns that the source has otherwise."""
    model, facts, encoder = trained
    data = model.adata[rows].copy()
    return Cells(model, data, data.obs.assign(**changed), encode_cells(encoder, data.X, data.obs, facts), facts, seed)


def run(analysis, options, trained, units=(slice(None),), **changed):
    """What an output makes of cells in units: parts, put together, and what it finished with."""
    facts = trained[1]
    analysis.check(facts, options)
    told = {}
    if analysis.strata(facts, options):
        told = analysis.prepare(cells_of(trained, **changed), options)
    parts = [analysis.unit(cells_of(trained, rows, **changed), told, options) for rows in units]
    finished = analysis.finish([part.sums for part in parts], facts, options)
    settled = [analysis.settle(part.columns, finished, options) for part in parts]
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns}
    columns |= {name: np.concatenate([part[name] for part in settled]) for name in settled[0]}
    matrices = {name: np.concatenate([part.matrices[name] for part in parts]) for name in parts[0].matrices}
    shape = analysis.shape(facts, options)
    assert set(columns) == set(shape.columns)
    assert {name: matrix.shape[1] for name, matrix in matrices.items()} == {
        name: len(features) for name, features in shape.matrices.items()
    }
    assert all(matrix.dtype == np.float32 for matrix in matrices.values())
    return columns, matrices, finished
