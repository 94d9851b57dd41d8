"""What a card tells of how a reference was trained, and of how good it is."""

from __future__ import annotations

import csv
import json
from typing import TYPE_CHECKING, Any

from scviaduct import __version__
from scviaduct.references.fetching.searching import safe

if TYPE_CHECKING:
    from collections.abc import Mapping

    from scviaduct.references.package import Reference
    from scviaduct.references.publishing.criticism import Criticism
    from scviaduct.references.saved.archive import SavedModel

_LOSSES = "metrics.csv"
_RECIPE = (
    "preset",
    "epochs",
    "scanvi_epochs",
    "batch_size",
    "precision",
    "seed",
    "early_stopping",
    "patience",
    "train_size",
    "validation_size",
    "genes",
    "samples_per_label",
    "settings",
    "plan",
)
"""Fields of a training recipe that name no column and no place."""


def training(reference: Reference, saved: SavedModel) -> str:
    """How a model was trained: its recipe, its arguments, how its data was set up, and the software."""
    provenance = reference.provenance
    recipe, software = provenance.get("recipe"), provenance.get("software")
    known = {name: recipe[name] for name in _RECIPE if recipe.get(name) not in (None, {}, "")} if recipe else {}
    epochs = provenance.get("epochs")
    known |= {"epochs": epochs} if epochs else {}
    versions = software if isinstance(software, dict) else {"scvi-tools": reference.scvi_version}
    setup = {k: v for k, v in saved.attr_dict["registry_"].get("setup_args", {}).items() if v is not None}
    blocks = {"Recipe": known, "Arguments of the model": _arguments(saved), "Setup": setup}
    text = [f"{name}:\n\n```json\n{_json(values)}\n```" for name, values in blocks.items() if values]
    listed = ", ".join(f"{safe(str(k), lines=False)} {safe(str(v), lines=False)}" for k, v in versions.items())
    return "\n\n".join([*text, f"Software: {listed}. Published with scviaduct {__version__}."])


def _arguments(saved: SavedModel) -> dict[str, Any]:
    init = saved.attr_dict.get("init_params_", {})
    told = dict(init.get("non_kwargs", init))
    for more in dict(init.get("kwargs", {})).values():
        told |= more if isinstance(more, dict) else {}
    return {str(name): value for name, value in told.items() if value is not None}


def _json(values: Any) -> str:
    return safe(json.dumps(values, indent=2, default=str))


def metrics(reference: Reference, criticism: Criticism, told: Mapping[str, Any]) -> str:
    """What was measured of a model: final losses, calibration, and criticism as ``metrics.json`` holds it."""
    text = []
    losses = _last_losses(reference)
    rows = [f"| {name} | {value} |" for name, value in losses.items()]
    text.append("\n".join(["| After the last epoch | |", "| --- | --- |", *rows]) if rows else "Losses: not recorded.")
    text.append(_calibration(reference.provenance.get("calibration")))
    text.append("### Criticism (scvi.criticism)")
    for name, title in (("cell_wise_cv", "Cell-wise"), ("gene_wise_cv", "Gene-wise")):
        if told.get(name):
            text.append(f"{title} coefficient of variation:\n\n{safe(str(told[name]))}")
    if criticism.figures:
        text.append(f"Of {criticism.cells:,} cells, {criticism.samples} posterior predictive samples of each.")
    elif not told:
        text.append(f"Not computed: {criticism.reason}.")
    return "\n\n".join(text)


def _last_losses(reference: Reference) -> dict[str, str]:
    """The last row of what training logged."""
    if _LOSSES not in reference.files:
        return {}
    reference.require(_LOSSES)
    with (reference.path / _LOSSES).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    last = rows[-1] if rows else {}
    return {name: f"{float(value):.4g}" for name, value in last.items() if name not in ("model", "epoch") and value}


def _calibration(told: Any) -> str:
    if not isinstance(told, dict) or "ece" not in told:
        reason = told.get("left_out") if isinstance(told, dict) else "it was not recorded"
        return f"Calibration of labels: not measured ({reason})."
    groups = told.get("groups") or ()
    return (
        f"Calibration of labels on {int(told['cells']):,} cells of {len(groups):,} held-out groups: accuracy"
        f" {float(told['accuracy']):.3f}, expected calibration error {float(told['ece']):.3f}"
        f" ({safe(str(told.get('method', '')), lines=False)})."
    )
