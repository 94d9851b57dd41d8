"""A figure for each benchmark: what each way does per CPU-second, and how runs grow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

_FIRST, _OTHERS = "#2b6cb0", "#a0aec0"


def draw(out: Path, sections: dict[str, Any]) -> None:
    """One SVG a section, in the folder ``plots``.

    Parameters
    ----------
    out
        Folder of the results.
    sections
        As :mod:`benchmarks.output` keeps them.
    """
    folder = out / "plots"
    folder.mkdir(exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "benchmarks", "font.size": 9, "axes.spines.top": False}):
        for name, told in sections.items():
            if told["measurements"]:
                figure = _growth(told) if name == "scaling" else _rates(told)
                figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
                plt.close(figure)


def _rates(told: dict[str, Any]) -> Any:
    """Bars: the median of each way, a mark for every sample."""
    groups = told["measurements"]
    heights = [len(found) + 1.2 for found in groups.values()]
    size = (7.5, 0.32 * sum(heights) + 0.4)
    figure, axes = plt.subplots(
        len(groups), 1, figsize=size, height_ratios=heights, squeeze=False, layout="constrained"
    )
    for axis, (group, found) in zip(axes[:, 0], groups.items(), strict=True):
        _bars(axis, group, [one for one in found if one["samples"]])
    return figure


def _bars(axis: Axes, group: str, found: list[dict[str, Any]]) -> None:
    for place, one in enumerate(found):
        rate = one["per_cpu_second_median"]
        axis.barh(place, rate, color=_OTHERS if place else _FIRST, height=0.7)
        each = [one["amount"] / sample["cpu"] for sample in one["samples"]]
        axis.plot(each, [place] * len(each), "|", color="black", markersize=7)
        axis.annotate(f" {rate:,.0f}" if rate >= 1_000 else f" {rate:,.3g}", (max(rate, *each, 0), place), va="center")
    axis.set_yticks(range(len(found)), [one["way"] for one in found])
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.xaxis.set_major_formatter("{x:,.10g}")
    axis.set_title(f"{group}: {found[0]['unit'] if found else ''} per CPU-second", loc="left", fontsize=9)


def _growth(told: dict[str, Any]) -> Any:
    """CPU-seconds and peak memory against cells, of the runs into a new store."""
    runs = [run for run in told["facts"]["runs"] if run["state"] == "committed"][:-1]
    cells = [run["cells"] for run in runs]
    figure, axes = plt.subplots(1, 2, figsize=(7.5, 2.8), layout="constrained")
    for axis, label, values in (
        (axes[0], "CPU-seconds", [run["cpu"] for run in runs]),
        (axes[1], "peak memory, GiB", [run["peak_bytes"] / 2**30 for run in runs]),
    ):
        axis.plot(cells, values, "o-", color=_FIRST)
        axis.set(xlabel="cells", ylabel=label, xlim=(0, 1.05 * max(cells)), ylim=(0, 1.1 * max(values)))
        axis.xaxis.set_major_formatter("{x:,.0f}")
    return figure
