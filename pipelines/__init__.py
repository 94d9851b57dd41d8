"""What a person starts: one module a run, and the command line.

Every command is a call of the same name here: ``import pipelines as sv; sv.map(...)``. They are loaded when they are
first used, because scvi-tools takes seconds to import and ``--help`` should not.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import scviaduct  # noqa: F401 - before anything imports Arrow: it says where Arrow's memory lies

_CALLS = {
    "check": "pipelines.preflight",
    "choose": "pipelines.choosing",
    "demo": "pipelines.demo",
    "derive": "pipelines.deriving",
    "export": "pipelines.exporting",
    "index": "pipelines.indexing",
    "land": "pipelines.landing",
    "map": "pipelines.mapping",
    "publish": "pipelines.publishing",
    "search": "pipelines.searching",
    "status": "pipelines.reporting",
    "train": "pipelines.training",
}
_GROUPS = ("adapters", "reference")
__all__ = [
    "adapters",
    "check",
    "choose",
    "demo",
    "derive",
    "export",
    "index",
    "land",
    "map",
    "publish",
    "reference",
    "search",
    "status",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _GROUPS:
        return import_module(f"pipelines.{name}")
    if name in _CALLS:
        return getattr(import_module(_CALLS[name]), name)
    raise AttributeError(f"module 'pipelines' has no attribute '{name}'")
