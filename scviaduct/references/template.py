"""The template of a reference: a few synthetic cells from which a process instantiates the model.

They are made from what scvi-tools saved of the training data's layout, never from its cells, so that a package carries
no donor's data. They are flat: features of all modalities side by side (see :mod:`scviaduct.families.base`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from scviaduct.errors import PackageError
from scviaduct.families import MODALITY, Covariates, family
from scviaduct.families.registered import column_texts
from scviaduct.families.vae import quiet
from scviaduct.references.package import TEMPLATE
from scviaduct.references.saved.contained import check_contained
from scviaduct.references.saved.portable import read_model

if TYPE_CHECKING:
    from pathlib import Path

    from scviaduct.families import Encoded, Encoder, Facts
    from scviaduct.references.package import Reference
    from scviaduct.values import FloatArray

CELLS = 16
SYNTHETIC = "scviaduct_synthetic_cells"
"""Entry of ``uns`` that tells a template's cells, where they stand for a model's data, from real ones."""
_SEED = 0


def make_template(facts: Facts) -> AnnData:
    """Synthetic cells with every obs column that the model was set up with.

    Counts are Poisson of mean 1, seeded; categories are those of the model, in turn; labels are the unlabelled
    category, or those of a classifier.
    """
    rng = np.random.default_rng(_SEED)
    names = list(facts.names)
    counts = sparse.csr_matrix(rng.poisson(1.0, (CELLS, len(names))).astype(np.float32))
    obs: dict[str, Any] = {}
    if facts.batch_key:
        obs[facts.batch_key] = _in_turn(facts.batch_categories)
    if facts.sample_key:
        obs[facts.sample_key] = _in_turn(facts.sample_categories)
    for key, categories in facts.categorical_covariates.items():
        obs[key] = _in_turn(categories)
    for key in facts.continuous_covariates:
        obs[key] = rng.normal(size=CELLS)
    if facts.size_factor_key:
        obs[facts.size_factor_key] = np.ones(CELLS)
    if facts.labels_key and facts.labels_key not in obs:
        none = (facts.unlabeled_category,)
        obs[facts.labels_key] = _in_turn(none if facts.unlabeled_category else facts.known_labels)
    frame = pd.DataFrame(obs, index=[f"template-{i}" for i in range(CELLS)])
    var = pd.DataFrame({MODALITY: list(facts.genes.modality)}, index=names)
    with quiet():  # a protein may be called like its gene
        return AnnData(counts, obs=frame, var=var)


def read_template(folder: Path) -> AnnData:
    """The template of the package in a folder; a stranger's may lead to other files, and is refused."""
    check_contained(folder / TEMPLATE)
    with quiet():
        return anndata.read_h5ad(folder / TEMPLATE)


def _in_turn(categories: tuple[str, ...]) -> Any:
    if not categories:
        raise ValueError("a column without categories")
    values = [categories[i % len(categories)] for i in range(CELLS)]
    return pd.Categorical(values, categories=list(dict.fromkeys(values)))


def encode_cells(encoder: Encoder, counts: Any, obs: pd.DataFrame, facts: Facts) -> Encoded:
    """What an encoder makes of cells whose features are the model's, with the covariates of their obs.

    Raises
    ------
    PackageError
        If a covariate has a value that the model does not know.
    """
    rows = sparse.csr_matrix(counts)
    covariates = Covariates()
    if facts.encode_covariates:
        batch = _codes(obs, facts.batch_key, facts.batch_categories) if facts.encoded_batch else None
        sample = _codes(obs, facts.sample_key, facts.sample_categories) if facts.encoded_sample else None
        categorical = [_codes(obs, key, known) for key, known in facts.categorical_covariates.items()]
        continuous = [obs[key].to_numpy(np.float32) for key in facts.continuous_covariates]
        covariates = Covariates(
            batch,
            np.stack(categorical, axis=1) if categorical else None,
            np.stack(continuous, axis=1) if continuous else None,
            sample,
        )
    parts = rows.indptr.astype(np.int64), rows.indices.astype(np.int32), rows.data.astype(np.float32)
    return encoder.encode(*parts, covariates)


def encode_template(encoder: Encoder, template: AnnData, facts: Facts) -> FloatArray:
    """Latents of the template's cells, side by side where a model gives several; what ``verify`` compares.

    Returns
    -------
    numpy.ndarray
        float32, shape ``(n_cells, sum of the latents' sizes)``.
    """
    encoded = encode_cells(encoder, template.X, template.obs, facts)
    return np.concatenate([encoded.mean, *(encoded.others[name] for name in encoder.latents[1:])], axis=1)


def verify_encoding(reference: Reference, recorded: FloatArray) -> dict[str, float]:
    """How far the template's latents are from those that were recorded, in standard deviations of these.

    Parameters
    ----------
    reference
        The package.
    recorded
        float32, shape ``(n_cells, n_latent)``.

    Returns
    -------
    dict of str to float
        Largest difference of the model as scvi-tools loads it, and of the package's encoder.
    """
    template = read_template(reference.path)
    with quiet():
        model = family(reference.family).load(read_model(reference.path), template.copy(), "cpu")
    encoders = {"encoding by the model": model, "encoding by the package's encoder": reference.encoder()}
    scale = max(float(recorded.std()), 1e-12)
    return {
        what: float(np.abs(encode_template(encoder, template, reference) - recorded).max()) / scale
        for what, encoder in encoders.items()
    }


def _codes(obs: pd.DataFrame, column: str, categories: tuple[str, ...]) -> Any:
    if column not in obs:
        told = f"The data has no obs column '{column}', which the encoder reads."
        raise PackageError(told, "Is it the model's data?")
    values = column_texts(obs[column])
    codes = pd.Index(categories).get_indexer(pd.Index(values))
    if (codes < 0).any():
        bad = values.iloc[int(np.flatnonzero(codes < 0)[0])]
        raise PackageError(
            f"The data's '{column}' holds '{bad}', which the model does not know.", "Is it the model's data?"
        )
    return codes.astype(np.int64)
