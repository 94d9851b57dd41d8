"""``python -m benchmarks.page``: put the results into ``docs/performance.md``.

What lies between ``<!-- results: NAME -->`` and ``<!-- end -->`` is written anew: ``figures`` are all figures with
their bars, ``machine`` where they come from, and the name of a benchmark what it counts, with its tables.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from benchmarks.output import facts_list, figures_table, group_table, load, machines

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md")
    told = parser.parse_args()
    told.page.write_text(rendered(told.page.read_text(), load(told.results)))


def rendered(text: str, sections: dict[str, Any]) -> str:
    """A page with its blocks filled.

    Parameters
    ----------
    text
        The page.
    sections
        Name of a benchmark to what was kept of it.
    """
    return _BLOCK.sub(lambda found: f"{found[1]}\n{_block(found[2], sections)}\n\n{found[3]}", text)


def _block(name: str, sections: dict[str, Any]) -> str:
    if name == "figures":
        return "\n".join(figures_table(sections))
    if name == "machine":
        return "\n\n".join(machines(sections))
    told = sections.get(name)
    if told is None:
        return f"Not measured yet: `python -m benchmarks --only {name}`."
    if "failed" in told:
        return f"It failed when it was last run: `{told['command']}`."
    lines = [told["counts"], ""]
    for group in told["measurements"]:
        lines += [f"**{group}**", "", *group_table(told, group), ""]
    if found := facts_list(told):
        lines += [*found, ""]
    return "\n".join([*lines, f"`{told['command']}`, {told['seconds']:.0f} s."])


if __name__ == "__main__":
    main()
