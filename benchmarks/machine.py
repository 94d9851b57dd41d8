"""The machine and the versions that a figure belongs to."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

_PACKAGES = ("scvi-tools", "torch", "ray", "tiledbsoma", "anndata", "pyarrow", "numpy", "numba", "zarr", "faiss-cpu")
PEERS = ("annbatch", "tiledbsoma-ml", "lancedb", "usearch", "tiledb-vector-search")
"""What the extra ``bench`` installs to compare with."""


def machine() -> dict[str, Any]:
    """Processor, memory, load and versions; the version of what is not installed is None."""
    return {
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_before": [round(load, 2) for load in os.getloadavg()],
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in (*_PACKAGES, *PEERS)},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
