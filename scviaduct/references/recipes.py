"""Recipes that have a name: what they fill up, where the caller says nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from scviaduct.errors import InputError
from scviaduct.families import Recipe
from scviaduct.families import family as family_of

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Preset:
    """What a named recipe says.

    Attributes
    ----------
    about
        What it is for, and where it comes from.
    options
        Fields of :class:`~scviaduct.families.Recipe`.
    settings
        Model arguments, as text; those that a family's constructor does not take are left out.
    """

    about: str
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)


PRESETS = {
    "default": Preset("What scvi-tools does unless it is told otherwise."),
    "scarches": Preset(
        "A reference that surgery can move: covariates enter the encoder, and layer normalisation keeps no statistics "
        "of the reference's batches (Lotfollahi et al., Nature Biotechnology 2022; scvi-tools' scArches tutorial).",
        settings={
            "use_layer_norm": "both",
            "use_batch_norm": "none",
            "encode_covariates": "True",
            "dropout_rate": "0.2",
            "n_layers": "2",
        },
    ),
    "census": Preset(
        "The scVI models of CZ CELLxGENE Discover Census: 8,000 highly variable genes, two layers of 512, a latent of "
        "50 (Census documentation, 'scVI integrated-embeddings with batch correction'). Census' own batch joins "
        "dataset, donor and assay; dataset_id is taken unless a batch key is given.",
        options={"genes": 8000, "batch_key": "dataset_id"},
        settings={"n_hidden": "512", "n_layers": "2", "n_latent": "50"},
    ),
}
"""Name of each recipe to what it says."""


def fill_up(given: Mapping[str, Any], preset: str = "default") -> Recipe:
    """A whole recipe from what a caller said and a named recipe; what the caller said wins.

    Parameters
    ----------
    given
        Fields of :class:`~scviaduct.families.Recipe`; None stands for nothing said. ``family`` is among them.
    preset
        Name of the recipe.

    Raises
    ------
    InputError
        If there is no recipe of that name.
    """
    known = PRESETS.get(preset)
    if known is None:
        raise InputError(f"There is no recipe '{preset}'.", f"One of {', '.join(PRESETS)}.")
    said = {name: value for name, value in given.items() if value is not None}
    taken = family_of(said["family"]).arguments() if known.settings else {}
    settings = {name: text for name, text in known.settings.items() if name in taken} | dict(said.get("settings", {}))
    return Recipe(**{**known.options, **said, "settings": settings, "preset": preset})
