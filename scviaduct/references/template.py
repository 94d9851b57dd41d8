"""The template of a reference: a few synthetic cells from which a process instantiates the model.

They are made from what scvi-tools saved of the training data's layout, never from its cells, so that a package carries
no donor's data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from scviaduct.errors import PackageError
from scviaduct.families import Covariates, family
from scviaduct.references.archive import read_model_file
from scviaduct.references.package import MODEL, TEMPLATE

if TYPE_CHECKING:
    from scviaduct.families import Encoder, Facts
    from scviaduct.references.archive import SavedModel
    from scviaduct.references.package import Reference
    from scviaduct.values import FloatArray

CELLS = 16
_SEED = 0


def make_template(saved: SavedModel, facts: Facts) -> AnnData:
    """Synthetic cells with every obs column and layer that the model was set up with.

    Counts are Poisson of mean 1, seeded; categories are those of the model, in turn; labels are the unlabelled
    category.
    """
    rng = np.random.default_rng(_SEED)
    counts = sparse.csr_matrix(rng.poisson(1.0, (CELLS, len(facts.genes))).astype(np.float32))
    fields = saved.attr_dict["registry_"]["field_registries"]
    obs: dict[str, Any] = {}
    if facts.batch_key:
        obs[facts.batch_key] = _in_turn(fields["batch"]["state_registry"]["categorical_mapping"])
    for key in facts.categorical_covariates:
        obs[key] = _in_turn(fields["extra_categorical_covs"]["state_registry"]["mappings"][key])
    for key in facts.continuous_covariates:
        obs[key] = rng.normal(size=CELLS)
    if facts.size_factor_key:
        obs[facts.size_factor_key] = np.ones(CELLS)
    if facts.labels_key:
        known = fields["labels"]["state_registry"]["categorical_mapping"]
        obs[facts.labels_key] = _in_turn([facts.unlabeled_category] if facts.unlabeled_category else known)
    frame = pd.DataFrame(obs, index=[f"template-{i}" for i in range(CELLS)])
    template = AnnData(counts, obs=frame, var=pd.DataFrame(index=list(facts.genes)))
    if facts.layer:
        template.layers[facts.layer] = counts.copy()
    return template


def _in_turn(categories: Any) -> pd.Categorical:
    values = [categories[i % len(categories)] for i in range(CELLS)]
    return pd.Categorical(values, categories=list(dict.fromkeys(values)))


def encode_template(encoder: Encoder, template: AnnData, facts: Facts | Reference) -> FloatArray:
    """Latents of the template's cells, with the covariates that they carry; what ``verify`` compares."""
    counts = template.layers[facts.layer] if facts.layer else template.X
    return encode_rows(encoder, counts, template.obs, facts)


def encode_rows(encoder: Encoder, counts: Any, obs: pd.DataFrame, facts: Facts | Reference) -> FloatArray:
    """Latents of cells whose genes are the model's, with the covariates of their obs.

    Raises
    ------
    PackageError
        If a covariate has a value that the model does not know.
    """
    rows = sparse.csr_matrix(counts)
    covariates = Covariates()
    if facts.encode_covariates:
        batch = _codes(obs, facts.batch_key, facts.batch_categories) if facts.batch_key else None
        categorical = [_codes(obs, key, known) for key, known in facts.categorical_covariates.items()]
        continuous = [obs[key].to_numpy(np.float32) for key in facts.continuous_covariates]
        covariates = Covariates(
            batch,
            np.stack(categorical, axis=1) if categorical else None,
            np.stack(continuous, axis=1) if continuous else None,
        )
    parts = rows.indptr.astype(np.int64), rows.indices.astype(np.int32), rows.data.astype(np.float32)
    return encoder.encode(*parts, covariates).mean


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
    template = anndata.read_h5ad(reference.path / TEMPLATE)
    saved = read_model_file(reference.path / MODEL)
    model = family(reference.family).load(saved, template.copy(), "cpu")
    encoders = {"encoding by the model": model, "encoding by the package's encoder": reference.encoder()}
    scale = max(float(recorded.std()), 1e-12)
    return {
        what: float(np.abs(encode_template(encoder, template, reference) - recorded).max()) / scale
        for what, encoder in encoders.items()
    }


def _codes(obs: pd.DataFrame, column: str, categories: tuple[str, ...]) -> Any:
    values = obs[column].astype(str)
    codes = pd.Index(categories).get_indexer(pd.Index(values))
    if (codes < 0).any():
        bad = values.iloc[int(np.flatnonzero(codes < 0)[0])]
        raise PackageError(
            f"The data's '{column}' holds '{bad}', which the model does not know.", "Is it the model's data?"
        )
    return codes.astype(np.int64)
