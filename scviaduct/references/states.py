"""The state of a training as one file without anything that runs: tensors, and JSON for the rest.

Lightning's own checkpoints are pickles, so that a stranger's work folder could run code when it is resumed from. Here a
checkpoint is a safetensors file; what is not a tensor lies in its header as JSON, tagged where JSON has no word for it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, override

import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from scviaduct.errors import PackageError

_HEAD = "state"
_PLAIN = (str, int, float, bool, type(None))


def write_state(state: Any, path: Path) -> None:
    """Write nested dictionaries, lists and tuples of tensors and plain values, at once or not at all.

    Raises
    ------
    TypeError
        If something else is among them.
    """
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_told(state, tensors), separators=(",", ":"))
    path.parent.mkdir(parents=True, exist_ok=True)
    number, staged = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")
    os.close(number)
    try:
        save_file(tensors, staged, metadata={_HEAD: text})
        Path(staged).replace(path)
    finally:
        Path(staged).unlink(missing_ok=True)


def read_state(path: Path) -> Any:
    """Read what :func:`write_state` wrote.

    Raises
    ------
    PackageError
        If it is no such file.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            head = json.loads(file.metadata()[_HEAD])
            return _meant(head, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        remedy = "Start over: --restart."
        raise PackageError(f"{path} holds no state of a training ({str(error)[:200]}).", remedy) from error


def _told(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().to("cpu").contiguous().clone()
        return {"tensor": name}
    if isinstance(value, np.generic):
        return _told(value.item(), tensors)
    if isinstance(value, np.ndarray):
        # Copied through a list: random states are 64-bit unsigned, which torch has no arithmetic for.
        return {"array": value.tolist(), "dtype": value.dtype.str}
    if isinstance(value, dict):
        pairs = [[_told(key, tensors), _told(item, tensors)] for key, item in value.items()]
        return {"ordered" if isinstance(value, OrderedDict) else "dict": pairs}
    if isinstance(value, tuple):
        return {"tuple": [_told(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_told(item, tensors) for item in value]
    if type(value) in _PLAIN:
        return value
    raise TypeError(f"a state of training holds a {type(value).__module__}.{type(value).__name__}")


def _meant(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_meant(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "array" in value:
        return np.array(value["array"], np.dtype(value["dtype"]))
    if "tuple" in value:
        return tuple(_meant(item, tensors) for item in value["tuple"])
    kind: type[dict[Any, Any]] = OrderedDict if "ordered" in value else dict
    return kind((_meant(key, tensors), _meant(item, tensors)) for key, item in next(iter(value.values())))


class StateIO(CheckpointIO):
    """Lets Lightning save and load its checkpoints as such files."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint that was taken at the start of an epoch as one of the end of the epoch before.

        Only there has everything that belongs to an epoch happened (early stopping and learning-rate schedules follow
        the hooks of its end), and only the latter does Lightning resume as a whole epoch.
        """
        progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]
        for counts in (progress["total"], progress["current"]):
            done = counts["processed"]
            counts.update(ready=done, started=done, completed=done - 1)
        write_state(checkpoint, Path(path))

    @override
    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read one."""
        found: dict[str, Any] = read_state(Path(path))
        return found

    @override
    def remove_checkpoint(self, path: Any) -> None:
        """Delete one."""
        Path(path).unlink(missing_ok=True)
