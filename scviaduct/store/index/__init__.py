"""The index of a space: what a version is searched through, derived from its tables and built anew from them.

Its parts are loaded when they are first used: whoever stages cells asks for the centroids alone, and numba takes half a
second to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scviaduct.store.index.building import IVF_FROM, ensure_index, ready_index
    from scviaduct.store.index.manifest import Manifest, manifest_of
    from scviaduct.store.index.opened import Index
    from scviaduct.store.index.segments import Builder

__all__ = ["IVF_FROM", "Builder", "Index", "Manifest", "ensure_index", "manifest_of", "ready_index"]

_MODULES = {
    "IVF_FROM": "building",
    "Builder": "segments",
    "Index": "opened",
    "Manifest": "manifest",
    "ensure_index": "building",
    "manifest_of": "manifest",
    "ready_index": "building",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
