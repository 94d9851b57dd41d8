"""How long until a fresh process, or a Ray actor, holds a reference: a package against scvi-tools' ``Model.load``.

    python -m benchmarks.load [--actors] [--out FILE], or as a part of the suite

A model of the Census's architecture (8,000 genes, two layers of 512, latent 50) is saved once. Each way then loads it
in processes of their own, in turns; the time is from before the imports until the first cell is encoded, as wall and as
CPU seconds. With ``--actors`` the same happens in actors of a local Ray. Bytecode is compiled before.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.machine import machine
from benchmarks.values import Measurement, Report, Sample

if TYPE_CHECKING:
    from benchmarks.context import Context

TITLE = "Loading"
COUNTS = (
    "Seconds of a fresh process from before its first import until it has encoded a cell with a reference of the"
    " Census's architecture, page cache warm, bytecode compiled; not pinned."
)
GENES, HIDDEN, LAYERS, LATENT = 8_000, 512, 2, 50
_TIMES = 5
_BEGIN = (
    "import time; began = time.perf_counter(); import numpy as np; import warnings; warnings.simplefilter('ignore');"
)
_END = "; print(time.perf_counter() - began, time.process_time())"
_OURS = """
from scviaduct.families import Covariates
from scviaduct.references.package import Reference
encoder = Reference.load(r'{package}').encoder()
n = len(encoder.gene_influence())
encoder.encode(np.array([0, n]), np.arange(n, dtype=np.int32), np.ones(n, np.float32), Covariates())
"""
_PLAIN = """
import logging; logging.disable(logging.CRITICAL)
import anndata, scvi
model = scvi.model.SCVI.load(r'{saved}', accelerator='cpu')
model.get_latent_representation(indices=[0])
"""


def main() -> None:
    """Time both ways in turns, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", action="store_true", help="load in Ray actors, too")
    parser.add_argument("--out", type=Path, help="JSON file to write the figures to")
    told = parser.parse_args()
    command = "python -m benchmarks.load" + (" --actors" if told.actors else "")
    found: dict[str, Any] = {"command": command, "machine": machine()}
    found["model"] = f"SCVI, {GENES:,} genes, {HIDDEN} x {LAYERS}, latent {LATENT}"
    with tempfile.TemporaryDirectory() as folder:
        saved, package = _make(Path(folder))
        found["process"] = _compare(saved, package, _in_process)
        if told.actors:
            found["actor"] = _compare(saved, package, _in_actor)
    if told.out:
        told.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{found['model']}; {found['machine']['processor']}, load before {found['machine']['load_before'][0]}")
    for where in ("process", "actor"):
        if row := found.get(where):
            print(
                f"{where}: package {row['ours']['wall']:.2f} s ({row['ours']['cpu']:.2f} CPU), Model.load"
                f" {row['plain']['wall']:.2f} s ({row['plain']['cpu']:.2f} CPU), ratio {row['ratio']:.1f}"
            )


def run(context: Context) -> Report:
    """Both ways in fresh processes, in turns."""
    with tempfile.TemporaryDirectory(dir=context.folder) as folder:
        saved, package = _make(Path(folder))
        found = _compare(saved, package, _in_process, context.pick(_TIMES, 2))
    names = {"ours": "package", "plain": "Model.load"}
    measured = [
        Measurement(name, 1, "loads", tuple(Sample(turn, *spent) for turn, spent in enumerate(found[way]["samples"])))
        for way, name in names.items()
    ]
    return Report(TITLE, COUNTS, [], {"Fresh processes": measured}, {"ratio_of_walls": found["ratio"]})


def _make(folder: Path) -> tuple[Path, Path]:
    """The model as scvi-tools saves it, and as a package."""
    import anndata
    import numpy as np
    import scvi

    from scviaduct.references.building import build_package

    warnings.simplefilter("ignore")
    logging.getLogger("scvi").setLevel(logging.ERROR)
    cells = anndata.AnnData(np.random.default_rng(0).poisson(0.2, (64, GENES)).astype(np.float32))
    cells.var_names = [f"ENSG{i:011d}" for i in range(GENES)]
    cells.obs["batch"] = [f"batch {i % 8}" for i in range(cells.n_obs)]
    scvi.model.SCVI.setup_anndata(cells, batch_key="batch")
    model = scvi.model.SCVI(cells, n_hidden=HIDDEN, n_layers=LAYERS, n_latent=LATENT)
    model.is_trained = True
    model.save(str(folder / "saved"), save_anndata=True)
    return folder / "saved", build_package(folder / "saved", folder / "package", "census-like").path


def _compare(saved: Path, package: Path, measure: Any, times: int = _TIMES) -> dict[str, Any]:
    """Median of several times, both ways in turns, after one of each that fills the page cache."""
    ways = {"ours": _OURS.format(package=package), "plain": _PLAIN.format(saved=saved)}
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(times + 1):
        for name, code in ways.items():
            spent = measure(code)
            if turn:
                samples[name].append(spent)
    found: dict[str, Any] = {
        name: {
            "wall": statistics.median(wall for wall, _ in taken),
            "cpu": statistics.median(cpu for _, cpu in taken),
            "samples": taken,
        }
        for name, taken in samples.items()
    }
    return found | {"ratio": found["plain"]["wall"] / found["ours"]["wall"]}


def _in_process(code: str) -> tuple[float, float]:
    program = _BEGIN + "\n" + code + _END.removeprefix("; ")
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    wall, cpu = done.stdout.split()[-2:]
    return float(wall), float(cpu)


def _in_actor(code: str) -> tuple[float, float]:
    """From the request for an actor until it has encoded a cell; the CPU seconds are those of its process."""
    import time

    import ray

    if not ray.is_initialized():
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")

    class Holder:
        def load(self, program: str) -> float:
            exec(program, {"np": __import__("numpy")})
            return time.process_time()

    began = time.perf_counter()
    actor = ray.remote(Holder).remote()
    cpu = ray.get(actor.load.remote(code))
    wall = time.perf_counter() - began
    ray.kill(actor)
    return wall, cpu


if __name__ == "__main__":
    main()
