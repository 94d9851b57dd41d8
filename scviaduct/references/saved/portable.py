"""A saved model as safetensors and JSON: what a package keeps, so that nothing that runs a pickle is needed again.

``model.safetensors`` holds the weights, and the large arrays of what else was saved; ``model.json`` the rest, its
values tagged where JSON has no word for them. The same model gives the same bytes.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from scviaduct.errors import PackageError, UnsupportedModelError
from scviaduct.references.saved.allowed import STORAGES
from scviaduct.references.saved.archive import MAX_BYTES, SavedModel
from scviaduct.references.saved.tagging import Tagged, holds_table, tag, untag

if TYPE_CHECKING:
    from pathlib import Path

WEIGHTS, ATTRIBUTES = "model.safetensors", "model.json"
FORMAT = 1
_ARRAYS = "attr_dict/"
_MAX_JSON = 256 << 20
_NEEDED = ("registry_", "init_params_")
_AGAIN = "Add the reference again from where it came."
_KINDS = frozenset(STORAGES.values())


def write_model(saved: SavedModel, folder: Path) -> None:
    """Write a model as ``model.safetensors`` and ``model.json``.

    The training history is left out, and any other attribute that holds a table: nothing reads them.

    Parameters
    ----------
    saved
        What :func:`scviaduct.references.saved.legacy.read_saved` gives, or the parts of a trained model.
    folder
        Must exist; files of these names are replaced.

    Raises
    ------
    UnsupportedModelError
        If an attribute holds what neither JSON nor an array can say, such as a function.
    """
    strange = next((name for name, value in saved.state_dict.items() if value.dtype not in _KINDS), None)
    if strange is not None or any(name.startswith(_ARRAYS) for name in saved.state_dict):
        told = f"'{strange}' is of {saved.state_dict[strange].dtype}" if strange else f"a name begins with {_ARRAYS}"
        raise UnsupportedModelError(f"The weights cannot be written down: {told}.", "Save it in float32.")
    told_of = Tagged()
    document = {
        "format": FORMAT,
        "state_dict": list(saved.state_dict),
        "var_names": tag(saved.var_names, told_of),
        "attr_dict": tag(kept_attributes(saved), told_of),
    }
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    if len(text) > _MAX_JSON:
        raise UnsupportedModelError(
            f"What was saved beside the weights takes {len(text):,} characters, more than {_MAX_JSON:,}.",
            "Remove per-cell attributes (such as labels_) from the model before saving it.",
        )
    # Views of one storage are copied apart: safetensors refuses to write memory that is shared.
    tensors = {name: value.detach().to("cpu").contiguous().clone() for name, value in saved.state_dict.items()}
    tensors |= {f"{_ARRAYS}{i}": torch.from_numpy(array) for i, array in enumerate(told_of.arrays)}
    save_file(tensors, folder / WEIGHTS)
    (folder / ATTRIBUTES).write_text(text, encoding="utf-8")


def read_model(folder: Path) -> SavedModel:
    """Read a model that :func:`write_model` wrote; no pickle, and nothing that is executed.

    Raises
    ------
    PackageError
        If a file is missing, or is not what it should be.
    """
    path = folder / ATTRIBUTES
    tensors = _read_tensors(folder / WEIGHTS)
    try:
        if path.stat().st_size > _MAX_JSON:
            raise PackageError(f"{path} has {path.stat().st_size:,} bytes, more than {_MAX_JSON:,}.", _AGAIN)
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
        if document["format"] != FORMAT:
            raise PackageError(f"{path} has format {document['format']!r:.40}, this version reads {FORMAT}.", _AGAIN)
        names = document["state_dict"]
        arrays = {int(name.removeprefix(_ARRAYS)): tensors.pop(name) for name in [*tensors] if name.startswith(_ARRAYS)}
        if not isinstance(names, list) or len(names) != len(tensors) or set(names) != tensors.keys():
            raise PackageError(f"{path} names other weights than {WEIGHTS} holds.", _AGAIN)
        told_of = Tagged([arrays[i].numpy() for i in range(len(arrays))])
        var_names, attributes = untag(document["var_names"], told_of), untag(document["attr_dict"], told_of)
        if type(attributes) is not dict or not all(isinstance(name, str) for name in attributes):
            raise TypeError("attr_dict is no dictionary")
    # json descends by recursion, so that brackets in brackets end in a RecursionError.
    except (ValueError, LookupError, TypeError, OSError, RecursionError, OverflowError) as error:
        raise PackageError(f"{path} cannot be read ({type(error).__name__}: {str(error)[:200]}).", _AGAIN) from error
    return SavedModel({name: tensors[name] for name in names}, var_names, attributes)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise PackageError(f"{path} has {path.stat().st_size:,} bytes, more than {MAX_BYTES:,}.", _AGAIN)
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise PackageError(f"{path} holds no weights ({str(error)[:200]}).", _AGAIN) from error
    strange = next((name for name, value in tensors.items() if value.dtype not in _KINDS), None)
    if strange is not None:
        raise PackageError(f"{path} holds '{strange[:80]}' as {tensors[strange].dtype}.", _AGAIN)
    # Any byte may stand for a bool in the file; one that is neither 0 nor 1 means something else to every operation.
    return {n: value.view(torch.uint8) != 0 if value.dtype == torch.bool else value for n, value in tensors.items()}


def kept_attributes(saved: SavedModel) -> dict[str, Any]:
    """What is kept of a model's attributes: all but training history and tables.

    Raises
    ------
    UnsupportedModelError
        If the registry or the arguments hold a table, without which the model cannot be set up again.
    """
    tables = [name for name, value in saved.attr_dict.items() if name.endswith("history_") or holds_table(value)]
    needed = next((name for name in _NEEDED if name in tables), None)
    if needed is not None:
        raise UnsupportedModelError(f"The model's '{needed}' holds a table, which is not read.", "Train it again.")
    return {name: value for name, value in saved.attr_dict.items() if name not in tables}


def to_scvi_file(saved: SavedModel, path: Path) -> None:
    """Write a model as the ``model.pt`` that scvi-tools loads.

    Parameters
    ----------
    saved
        As for :func:`write_model`; its training history is left out as well.
    path
        File to write.
    """
    state = OrderedDict((name, value.detach().to("cpu").clone()) for name, value in saved.state_dict.items())
    parts = {"model_state_dict": state, "var_names": saved.var_names, "attr_dict": kept_attributes(saved)}
    torch.save(parts, path)
