"""Reading a saved model of any day, and mending what scvi-tools of today would trip over; each repair is told.

A repair leaves every latent and label as the version that saved the model gave them. What has no such repair is
refused with the reason.
"""

from __future__ import annotations

import copy
import json
import re
from typing import TYPE_CHECKING, Any

from scviaduct.errors import PackageError, UnsupportedModelError
from scviaduct.references.saved.archive import SavedModel, read_model_file
from scviaduct.references.saved.legacy import legacy_prefix, read_legacy, registry_from_setup
from scviaduct.references.saved.portable import ATTRIBUTES, WEIGHTS, read_model
from scviaduct.references.saved.weights import AGAIN, RENAMED, check_arguments, check_weights, class_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

MODEL, METADATA = "model.pt", "_scvi_required_metadata.json"
_MAX_METADATA = 1 << 20
_REGISTRY = ("setup_args", "field_registries")
_METHODS = ("setup_anndata", "setup_mudata", "setup_datamodule")
"""What may be called by name on a class of scvi-tools; it has other methods, which make folders and load pickles."""


def read_saved(folder: Path) -> tuple[SavedModel, tuple[str, ...]]:
    """Read the model in a folder, as safetensors and JSON, ``model.pt``, or the three files of before 0.15.

    Parameters
    ----------
    folder
        As this package, scvi-tools or scvi-hub leave it.

    Returns
    -------
    saved
        The model, its registry complete.
    repairs
        What was mended, a sentence each.

    Raises
    ------
    PackageError
        If there is no model, or it is damaged.
    UnsafeModelError
        If a pickle was refused.
    UnsupportedModelError
        If it is of another class than it says, or cannot be mended.
    """
    metadata = read_metadata(folder)
    if (folder / WEIGHTS).is_file() and (folder / ATTRIBUTES).is_file():
        saved = read_model(folder)
    elif (folder / MODEL).is_file():
        saved = read_model_file(folder / MODEL)
    elif (prefixed := sorted(path for path in folder.glob(f"*{MODEL}") if path.name[0] != ".")) and len(prefixed) == 1:
        saved = read_model_file(prefixed[0])
    elif legacy_prefix(folder) is not None:
        saved = read_legacy(folder)
    else:
        raise PackageError(
            f"'{folder}' holds no {MODEL}{' but several: ' if prefixed else ''}"
            f"{', '.join(path.name for path in prefixed[:5])}.",
            "Name a folder that model.save() or scvi-hub made, one model each.",
        )
    try:
        return repair(saved, metadata)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UnsupportedModelError(
            f"What was saved in '{folder}' is not as any scvi-tools saves it ({type(error).__name__}:"
            f" {str(error)[:200]}).",
            AGAIN,
        ) from error


def read_metadata(folder: Path) -> dict[str, Any]:
    """What scvi-hub says of a model; empty without its file. The module that it names is never imported.

    Raises
    ------
    PackageError
        If the file is damaged.
    """
    path = folder / METADATA
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > _MAX_METADATA:
            raise PackageError(f"{path} has {path.stat().st_size:,} bytes.", "Take the model from its publisher again.")
        told = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise PackageError(f"{path} cannot be read ({error}).", "Take the model from its publisher again.") from error
    if not isinstance(told, dict):
        raise PackageError(f"{path} holds no facts of a model.", "Take the model from its publisher again.")
    return told


def repair(saved: SavedModel, metadata: Mapping[str, Any] | None = None) -> tuple[SavedModel, tuple[str, ...]]:
    """Mend a saved model; one of today comes back equal, without repairs.

    Parameters
    ----------
    saved
        Is not changed.
    metadata
        What scvi-hub says of the model: its class and version, where the model does not.

    Raises
    ------
    UnsupportedModelError
        If the weights are another class's, or the model cannot be mended.
    """
    attributes = {name: copy.deepcopy(value) for name, value in saved.attr_dict.items()}
    told = metadata or {}
    repairs: list[str] = []
    if "registry_" not in attributes and "scvi_setup_dict_" in attributes:
        name = class_of(saved, told)
        setup = attributes.pop("scvi_setup_dict_")
        attributes["registry_"] = registry_from_setup(setup, name, _unlabeled(attributes, {}))
        version = setup["scvi_version"]
        repairs.append(f"The setup dictionary of scvi-tools {version} became the registry of a {name}.")
    registry = attributes.get("registry_")
    if not isinstance(registry, dict) or not all(isinstance(registry.get(key), dict) for key in _REGISTRY):
        raise UnsupportedModelError("The model has no registry of its data's setup.", AGAIN)
    _name_class(saved, registry, told, repairs)
    check_weights(saved, registry["model_name"])
    _complete_registry(saved, attributes, registry, told, repairs)
    _mend_arguments(registry["model_name"], attributes, repairs)
    check_arguments(saved, attributes["init_params_"])
    tensors = dict(saved.state_dict)
    if registry["model_name"] == "TOTALVI":
        _mend_totalvi(tensors, registry, repairs)
    if registry["model_name"] == "SCANVI" and _version(registry) < (1, 1):
        repairs.append("Its classifier ends in a softmax (scvi-tools before 1.1): what precedes it is read as logits.")
    _refuse_other_networks(registry["model_name"], tensors)
    return SavedModel(tensors, saved.var_names, attributes), tuple(repairs)


def _name_class(saved: SavedModel, registry: dict[str, Any], told: Mapping[str, Any], repairs: list[str]) -> None:
    named = registry.get("model_name")
    if named == "JaxMRVI":
        raise UnsupportedModelError(
            "The MRVI was trained with JAX, and scvi-tools of today reads PyTorch alone.", AGAIN
        )
    if not isinstance(named, str):
        registry["model_name"] = class_of(saved, told)
        repairs.append(f"The registry did not name the model's class: it is a {registry['model_name']}.")
    elif named in RENAMED:
        registry["model_name"] = RENAMED[named]
        repairs.append(f"The class {named} is called {registry['model_name']} today.")


def _complete_registry(
    saved: SavedModel,
    attributes: dict[str, Any],
    registry: dict[str, Any],
    told: Mapping[str, Any],
    repairs: list[str],
) -> None:
    name, setup, fields = registry["model_name"], registry["setup_args"], registry["field_registries"]
    if registry.get("setup_method_name", "setup_anndata") not in _METHODS:
        raise UnsupportedModelError(
            f"The registry says the data was set up by {registry['setup_method_name']!r:.80}, which is no setup.", AGAIN
        )
    if "setup_method_name" not in registry:
        method = "setup_mudata" if isinstance(saved.var_names, dict) or "modalities" in setup else "setup_anndata"
        registry["setup_method_name"] = method
        repairs.append(f"The registry did not name the method that set the data up: it is {method}.")
    if not re.match(r"\d+\.\d+", str(registry.get("scvi_version", ""))):
        version = told.get("scvi_version")
        if not isinstance(version, str) or not re.match(r"\d+\.\d+", version):
            raise UnsupportedModelError("The model does not say which scvi-tools saved it.", AGAIN)
        registry["scvi_version"] = version
        repairs.append(f"The registry did not name the version that saved the model: scvi-hub says {version}.")
    if name == "SCANVI":
        labels = fields["labels"]["state_registry"]
        for key, value in (
            ("labels_key", labels.get("original_key")),
            ("unlabeled_category", _unlabeled(attributes, labels)),
        ):
            if setup.get(key) is None and value is not None:
                setup[key] = value
                repairs.append(f"The setup did not name its {key}: it is '{value}'.")
        labels.setdefault("unlabeled_category", setup.get("unlabeled_category"))
    if name == "MULTIVI" and "labels_key" in setup:
        del setup["labels_key"]  # of 0.15 alone; no part of the model read it
        fields.pop("labels", None)
        repairs.append("A MULTIVI is no longer set up with labels, which it did not read.")


def _unlabeled(attributes: Mapping[str, Any], labels: Mapping[str, Any]) -> Any:
    """The unlabelled category, which has lain in several places."""
    arguments = attributes.get("init_params_", {})
    places = (labels, attributes, arguments, arguments.get("non_kwargs", {}))
    names = ("unlabeled_category", "unlabeled_category_")
    return next((place[name] for place in places for name in names if place.get(name) is not None), None)


def _mend_arguments(name: str, attributes: dict[str, Any], repairs: list[str]) -> None:
    """Bring the arguments into today's form: ``non_kwargs`` by name, ``kwargs`` by the name that gathered them."""
    told = attributes.get("init_params_")
    if not isinstance(told, dict):
        raise UnsupportedModelError("The model does not hold the arguments that it was made with.", AGAIN)
    if "non_kwargs" not in told:
        plain = {key: value for key, value in told.items() if not isinstance(value, dict)}
        told = {"kwargs": {key: value for key, value in told.items() if isinstance(value, dict)}, "non_kwargs": plain}
        repairs.append("The arguments of the model were saved as scvi-tools before 0.8 did.")
    groups = [told["non_kwargs"], *told["kwargs"].values()]
    for old, harmless, reason in _GONE.get(name, ()) + _GONE["any"]:
        for group in groups:
            if old in group:
                value = group.pop(old)
                if harmless is not None and value not in harmless:
                    raise UnsupportedModelError(f"The model was made with {old}={value!r:.80}: {reason}.", AGAIN)
                repairs.append(f"The argument '{old}' is gone: {reason}.")
    attributes["init_params_"] = told


_Gone = tuple[tuple[str, tuple[Any, ...] | None, str], ...]
_GONE: Mapping[str, _Gone] = {
    "any": (("use_cuda", None, "it said where the model was trained"),),
    "SCANVI": (
        ("unlabeled_category", None, "the setup names the unlabelled category"),
        ("pretrained_model", None, "it said what the weights began from"),
        ("use_labels_groups", (False, None), "groups of labels are no longer built"),
    ),
    "MULTIVI": (
        ("n_proteins", None, "the registry counts the proteins"),
        ("empirical_protein_background_prior", None, "it said what the weights began from"),
    ),
}
"""Class to arguments that its constructor no longer has: which values leave the model as it is (None for all), and
why."""


def _mend_totalvi(tensors: dict[str, torch.Tensor], registry: Mapping[str, Any], repairs: list[str]) -> None:
    if "log_per_batch_efficiency" not in tensors:
        fields, alpha = registry["field_registries"], tensors["background_pro_alpha"]
        batches = fields["batch"]["summary_stats"]["n_batch"]
        tensors["log_per_batch_efficiency"] = alpha.new_zeros((len(alpha), int(batches)))
        repairs.append("The efficiency per batch, which TOTALVI has since 1.4, is that of a model without: exp(0) = 1.")
    if _version(registry) < (1, 2):
        repairs.append("Its protein background is activated by exp, as TOTALVI did before scvi-tools 1.2.")


def _refuse_other_networks(name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse what is of the right class, and of a network that the class no longer has."""
    if name == "MULTIVI" and not any(key.startswith("z_encoder_protein.") for key in tensors):
        raise UnsupportedModelError("The MULTIVI lacks the protein parts that the class has since 0.18.", AGAIN)
    if name == "MRVI" and any(".embed_dim_proj_query." in key for key in tensors):
        raise UnsupportedModelError(
            "The MRVI's attention is that of scvi-tools before 1.4.3, which has other weights since.",
            "Train it again: scviaduct train.",
        )


def _version(registry: Mapping[str, Any]) -> tuple[int, int]:
    found = re.match(r"(\d{1,6})\.(\d{1,6})", str(registry["scvi_version"]))
    if found is None:
        raise UnsupportedModelError(f"The model says it was saved by {registry['scvi_version']!r:.80}.", AGAIN)
    return int(found[1]), int(found[2])
