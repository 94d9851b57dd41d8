"""Writing what was measured: every sample as JSON, the figures flat, a page of tables."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from benchmarks.suite import BENCHMARKS
from benchmarks.values import BARS, Ratio

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.values import Measurement, Report

REPORT, LATEST, REASONS, PAGE = "report.json", "latest.json", "latest-reasons.json", "report.md"
_KEPT_TEXT = 300


def section(report: Report, header: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a benchmark.

    Parameters
    ----------
    report
        What it found.
    header
        Machine, versions, command and time of the run.
    """
    measured = {
        group: [_measurement(one, found[0]) for one in found] for group, found in report.measurements.items() if found
    }
    told = {"title": report.title, "counts": report.counts, **header}
    return told | {"figures": [asdict(f) for f in report.figures], "measurements": measured, "facts": report.facts}


def _measurement(one: Measurement, first: Measurement) -> dict[str, Any]:
    """A measurement with what is derived from its samples; ``ratio`` is that of the group's first to it."""
    told: dict[str, Any] = {"way": one.way, "amount": one.amount, "unit": one.unit, "missing": one.missing}
    if one.samples:
        told |= {"cpu_median": one.cpu, "cpu_best": one.best_cpu, "wall_median": one.wall}
        told |= {"per_cpu_second_median": one.rate, "per_cpu_second_best": one.best_rate}
    if one.samples and first.samples:
        told["ratio"] = Ratio.of(first, one).value
    return told | {"samples": [asdict(sample) for sample in one.samples]}


def failed(title: str, trace: str, figures: tuple[str, ...], header: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a benchmark that raised an error."""
    reason = f"the benchmark failed: {trace.strip().rpartition(chr(10))[2][:_KEPT_TEXT]}"
    kept = [{"name": name, "value": None, "reason": reason, "best": None} for name in figures]
    return {"title": title, "counts": "", **header, "failed": trace, "figures": kept, "measurements": {}, "facts": {}}


def load(out: Path) -> dict[str, Any]:
    """Sections of earlier runs: name to section."""
    path = out / REPORT
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def write(out: Path, sections: dict[str, Any]) -> None:
    """Write all files anew from the sections."""
    ordered = {name: sections[name] for name in BENCHMARKS if name in sections}
    values, reasons = flat(ordered)
    _dump(out / REPORT, ordered)
    _dump(out / LATEST, values)
    _dump(out / REASONS, reasons)
    (out / PAGE).write_text(page(ordered))


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def flat(sections: dict[str, Any]) -> tuple[dict[str, float | None], dict[str, str]]:
    """The figures by name, and for each that is null why."""
    values: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    owner = {figure: name for name, entry in BENCHMARKS.items() for figure in entry.figures}
    found = {figure["name"]: figure for told in sections.values() for figure in told["figures"]}
    for name in BARS:
        figure = found.get(name)
        value = figure["value"] if figure else None
        values[name] = None if value is None else rounded(value)
        if value is None:
            reasons[name] = figure["reason"] if figure else f"not run: python -m benchmarks --only {owner[name]}"
    return values, reasons


def rounded(value: float) -> float:
    """A figure as it is told, and compared with its bar: to four digits."""
    return float(f"{value:.4g}")


def page(sections: dict[str, Any]) -> str:
    """The report as Markdown: figures first."""
    lines = ["# Benchmarks", "", *figures_table(sections), "", *machines(sections)]
    for name, told in sections.items():
        lines += ["", f"## {told['title']}", "", told["counts"], ""]
        if "failed" in told:
            lines += ["It failed:", "", "```", told["failed"].strip(), "```"]
        for group in told["measurements"]:
            lines += [f"{group}:", "", *group_table(told, group), ""]
        if found := facts_list(told):
            lines += [*found, ""]
        if told["measurements"]:
            lines += [f"![{told['title']}](plots/{name}.svg)"]
    return "\n".join(lines) + "\n"


def figures_table(sections: dict[str, Any]) -> list[str]:
    """Every figure with its bar."""
    values, reasons = flat(sections)
    found = {figure["name"]: figure for told in sections.values() for figure in told["figures"]}
    rows = []
    for name, value in values.items():
        bar, figure = BARS[name], found.get(name, {})
        met = "" if value is None else "met" if bar.met_by(value) else "**missed**"
        turns = f"{figure['low']:.3g} to {figure['high']:.3g}" if figure.get("low") else ""
        said = "none" if value is None else f"{value:.3g}"
        rows.append([f"`{name}`", said, turns, f"{bar.sense} {bar.value:g}", met, reasons.get(name, "")])
    return table(["figure", "value", "turns", "bar", "", "reason"], rows)


def machines(sections: dict[str, Any]) -> list[str]:
    """One line for each machine and set of versions that sections were measured with."""
    groups: dict[str, list[str]] = {}
    for name, told in sections.items():
        machine = told["machine"]
        versions = ", ".join(f"{key} {value}" for key, value in machine["versions"].items() if value)
        size = f"{machine['cpus']} CPUs, {machine['memory_gib']:g} GiB"
        groups.setdefault(f"{machine['processor']}, {size}, {machine['system']}; {versions}", []).append(name)
    lines = []
    for machine, names in groups.items():
        loads = ", ".join(f"{name} {sections[name]['machine']['load_before'][0]:g}" for name in names)
        quick = " Sizes of `--quick`: not for figures." if any(sections[name]["quick"] for name in names) else ""
        days = sorted({sections[name]["when"][:10] for name in names})
        lines += [f"{machine}. Measured on {', '.join(days)}; load before: {loads}.{quick}"]
    return lines


def group_table(told: dict[str, Any], group: str) -> list[str]:
    """The ways of a group: ratio of the first to each, rates, times."""
    rows = []
    for one in told["measurements"][group]:
        if one["missing"]:
            rows.append([one["way"], "", one["missing"], "", "", ""])
            continue
        rates = [number(one[f"per_cpu_second_{which}"]) for which in ("median", "best")]
        times = [f"{one['cpu_median']:.3g}", f"{one['wall_median']:.3g}"]
        rows.append([one["way"], f"{one['ratio']:.2f}" if "ratio" in one else "", *rates, *times])
    unit = told["measurements"][group][0]["unit"]
    return table(["", "first / this", f"{unit} per CPU-second", "best", "CPU s", "wall s"], rows)


def facts_list(told: dict[str, Any]) -> list[str]:
    """What else was found, a line each; the raw lists stay in the JSON."""
    lines = []
    for name, value in told["facts"].items():
        if isinstance(value, dict):
            inner = ", ".join(f"{key} {_said(item)}" for key, item in value.items() if _is_short(item))
            lines += [f"- {_words(name)}: {inner}"] if inner else []
        elif _is_short(value):
            lines += [f"- {_words(name)}: {_said(value)}"]
    return lines


def _is_short(value: Any) -> bool:
    return isinstance(value, int | float | str) or (
        isinstance(value, list) and all(isinstance(one, int | float) for one in value)
    )


def _said(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_said, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _words(name: str) -> str:
    return name.replace("_", " ") if name.isidentifier() else name  # a way is called what it is called


def number(value: float) -> str:
    """With separators where it is large."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown."""
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]
