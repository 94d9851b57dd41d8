"""What a person starts: one module a run, and the command line.

Every command is a call of the same name here: ``import pipelines as sv; sv.map(...)``. They are loaded when they are
first used, because scvi-tools takes seconds to import and ``--help`` should not.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_CALLS = {
    "check": "pipelines.preflight",
    "choose": "pipelines.choosing",
    "demo": "pipelines.demo",
    "export": "pipelines.exporting",
    "map": "pipelines.mapping",
    "publish": "pipelines.publishing",
    "search": "pipelines.searching",
    "status": "pipelines.reporting",
    "train": "pipelines.training",
}
__all__ = ["check", "choose", "demo", "export", "map", "publish", "reference", "search", "status", "train"]


def __getattr__(name: str) -> Any:
    if name == "reference":
        return import_module("pipelines.reference")
    if name in _CALLS:
        return getattr(import_module(_CALLS[name]), name)
    raise AttributeError(f"module 'pipelines' has no attribute '{name}'")
