"""``make bench``, or ``python -m benchmarks``: run the benchmarks, write what came out, say which bars are met.

Sections of earlier runs are kept where ``--only`` leaves them out: every section says on which machine and when it was
measured.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.context import Context
from benchmarks.machine import machine
from benchmarks.output import REPORT, failed, flat, load, rounded, section, write
from benchmarks.suite import BENCHMARKS
from benchmarks.values import BARS


def main() -> None:
    """Run what was asked for."""
    told = _told()
    if told.list:
        for name, entry in BENCHMARKS.items():
            print(f"{name:10} {entry.about}")
        return
    folder = told.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    told.out.mkdir(parents=True, exist_ok=True)
    pythons = dict(item.split("=", 1) for item in told.peer_python)
    context = Context(folder, folder / "bench.log", told.quick, pythons)
    sections = load(told.out)
    began = time.monotonic()
    for name in told.only or BENCHMARKS:
        sections[name] = _run(name, context)
        write(told.out, sections)  # what is measured is kept, whatever becomes of the rest
    _draw(told.out, sections)
    print(f"\n{time.monotonic() - began:.0f} s; {told.out / REPORT}\n")
    sys.exit(_summary(sections, told.only or list(BENCHMARKS), strict=told.strict))


def _told() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the benchmarks")
    parser.add_argument("--quick", action="store_true", help="small sizes: checks that everything runs")
    parser.add_argument("--list", action="store_true", help="say which benchmarks there are")
    parser.add_argument("--out", type=Path, help="folder of the results [benchmarks/results; quick: FOLDER/quick]")
    parser.add_argument("--folder", type=Path, default=Path("build/bench"), help="scratch; kept for another run")
    parser.add_argument(
        "--peer-python", action="append", default=[], metavar="PEER=PATH", help="interpreter that has a peer installed"
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a bar is missed")
    told = parser.parse_args()
    if unknown := sorted(set(told.only or ()) - BENCHMARKS.keys()):
        parser.error(f"--only {' '.join(unknown)}: there are {', '.join(BENCHMARKS)}")
    if wrong := [item for item in told.peer_python if "=" not in item]:
        parser.error(f"--peer-python {wrong[0]}: write PEER=PATH, as tiledb-vector-search=/path/to/python")
    told.out = told.out or (told.folder / "quick" if told.quick else Path(__file__).with_name("results"))
    return told


def _run(name: str, context: Context) -> dict[str, Any]:
    """One benchmark, and what is kept of it."""
    entry = BENCHMARKS[name]
    command = f"python -m benchmarks --only {name}{' --quick' if context.quick else ''}"
    when = datetime.now(UTC).isoformat(timespec="seconds")
    header: dict[str, Any] = {"command": command, "when": when, "quick": context.quick, "machine": machine()}
    print(f"{name}: {entry.about}", flush=True)
    began = time.monotonic()
    try:
        report = importlib.import_module(f"benchmarks.{entry.module}").run(context)
    except Exception:  # noqa: BLE001 - the others run, and the exit status tells
        trace = traceback.format_exc()
        print(trace, flush=True)
        return failed(name, trace, entry.figures, header | {"seconds": round(time.monotonic() - began, 1)})
    told = section(report, header | {"seconds": round(time.monotonic() - began, 1)})
    for figure in report.figures:
        value = None if figure.value is None else rounded(figure.value)
        print(f"  {_line(figure.name, value, figure.reason)}", flush=True)
    print(f"  in {told['seconds']:.0f} s", flush=True)
    return told


def _draw(out: Path, sections: dict[str, Any]) -> None:
    from benchmarks.plots import draw  # takes a second to import

    draw(out, sections)


def _line(name: str, value: float | None, reason: str) -> str:
    bar = BARS[name]
    wanted = f"bar: {bar.sense} {bar.value:g}"
    if value is None:
        return f"{name:28} {'none':<8} {wanted}: {reason}"
    return f"{name:28} {value:<8.3g} {wanted}, {'met' if bar.met_by(value) else 'MISSED'}"


def _summary(sections: dict[str, Any], ran: list[str], *, strict: bool) -> int:
    """Print every figure; the exit status."""
    values, reasons = flat(sections)
    for name in (figure for part in ran for figure in BENCHMARKS[part].figures):
        print(_line(name, values[name], reasons.get(name, "")))
    broken = [name for name in ran if "failed" in sections[name]]
    if broken:
        print(f"failed: {', '.join(broken)}")
    missed = [name for name, value in values.items() if value is not None and not BARS[name].met_by(value)]
    return 1 if broken or (strict and missed) else 0


if __name__ == "__main__":
    main()
