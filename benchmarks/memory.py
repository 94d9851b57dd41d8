"""Peak memory of a run over 50,000 and over 400,000 cells: ``make bench-memory``.

Both runs are the real one, in a process of its own with a Ray of its own: two actors, one reader, shards of 16,384
cells, from a simulated collection of the Census schema. Counted is the whole process tree with the object store. The
bar is 1.1 times.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.tree import Peak
from scviaduct.simulation import DATASETS, Simulation, write_census

SIZES = (50_000, 400_000)
BAR = 1.1
_GENES = 2000


def main() -> None:
    """Simulate, train, run both sizes, write and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/bench-memory"), help="scratch; kept for another run")
    parser.add_argument("--out", type=Path, help="where the figures go; FOLDER/memory.json unless said")
    told = parser.parse_args()
    folder = told.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    found = {"command": "make bench-memory", "machine": machine(), "runs": [_run(folder, cells) for cells in SIZES]}
    small, large = (run["peak_bytes"] for run in found["runs"])
    found |= {"ratio": round(large / small, 3), "bar": BAR, "met": large <= BAR * small}
    (told.out or folder / "memory.json").write_text(json.dumps(found, indent=1) + "\n")
    for run in found["runs"]:
        parts = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in run["parts"].items())
        print(
            f"{run['cells']:>8,} cells: peak {run['peak_bytes'] / 2**20:,.0f} MiB in {run['seconds']:.0f} s ({parts})"
        )
    print(f"ratio {found['ratio']:.3f}, bar {BAR}; {found['machine']['processor']}, {found['machine']['cpus']} CPUs")
    sys.exit(0 if found["met"] else 1)


def _run(folder: Path, cells: int) -> dict[str, Any]:
    """One run over so many cells; its peak, what it was made of, and its time."""
    census, model = _prepare(folder, cells)
    store = folder / f"store-{cells}-{time.time_ns()}"
    source = f"census:simulated?organism=homo_sapiens&uri={census}"
    command = [sys.executable, "-m", "pipelines", "map", source, "--reference", str(model), "--store", str(store)]
    command += ["--actors", "2", "--readers", "1", "--keep-obs", "cell_type,donor_id,disease", "--json", "--quiet"]
    environment = os.environ | {"RAY_ADDRESS": "local"}
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    with Peak(process.pid) as peak:
        output, _ = process.communicate()
    seconds = time.monotonic() - began
    result = json.loads(output)
    if result["state"] != "committed" or result["cells"] != cells:
        raise SystemExit(f"the run over {cells:,} cells did not map them all: {output}")
    return {
        "cells": cells,
        "peak_bytes": peak.total,
        "parts": dict(peak.parts.most_common(8)),
        "samples": peak.samples,
        "seconds": round(seconds, 1),
        "stages": result["seconds"],
    }


def _prepare(folder: Path, cells: int) -> tuple[Path, Path]:
    """A collection of so many cells, and a reference of 2,000 genes; made once."""
    census, model = folder / f"census-{cells}", folder / "model"
    each = [cells // 4, cells // 4, cells - 2 * (cells // 4)]
    datasets = tuple(replace(dataset, cells=n, counts=1500.0) for dataset, n in zip(DATASETS, each, strict=True))
    if not census.exists():
        print(f"simulating {cells:,} cells", flush=True)
        write_census(Simulation(datasets, genes=_GENES), census)
    if not model.exists():
        import pipelines as sv

        source = f"census:simulated?organism=homo_sapiens&uri={census}&filter=soma_joinid < 3000"
        keys = {"labels_key": "cell_type", "batch_key": "assay"}
        sv.train(source, family="scanvi", out=model, genes=0, epochs=2, scanvi_epochs=1, quiet=True, **keys)
    return census, model


if __name__ == "__main__":
    main()
