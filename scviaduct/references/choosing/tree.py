"""The decision tree as data: what is asked, of which figure, and where each answer leads.

:func:`walk` follows the table and :func:`explained` prints it: what is printed is what was executed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from scviaduct.references.choosing.columns import complete_enough, has_control
from scviaduct.references.choosing.fits import ENOUGH

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from scviaduct.references.choosing.fits import Fit
    from scviaduct.references.choosing.profile import Profile

Word = Literal["yes", "no", "cannot tell"]


class Answer(NamedTuple):
    """What a question was answered, and the figure that decided it."""

    word: Word
    figure: str


@dataclass(frozen=True, slots=True)
class Node:
    """A question.

    Attributes
    ----------
    question
        For people.
    ask
        Answers it from a profile.
    yes, no, unknown
        Names of the nodes or leaves that follow; ``unknown`` is ``no`` unless it is given.
    """

    question: str
    ask: Callable[[Profile], Answer]
    yes: str
    no: str
    unknown: str = ""

    def after(self, word: Word) -> str:
        """Name of what follows an answer."""
        return {"yes": self.yes, "no": self.no, "cannot tell": self.unknown or self.no}[word]


@dataclass(frozen=True, slots=True)
class Leaf:
    """An end of the tree.

    Attributes
    ----------
    kind
        ``reference``: map to a registered one; ``family``: train one; ``nothing``: neither is possible;
        ``cannot tell``.
    family
        Family to train, or that a registered reference has to be of; empty for any and none.
    why
        Why this; what to do instead where it is nothing.
    """

    kind: Literal["reference", "family", "nothing", "cannot tell"]
    why: str
    family: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """One question on the way, with its answer.

    Attributes
    ----------
    node
        Name of the question in :data:`TREE`.
    question, answer, figure
        For people; ``answer`` is ``yes``, ``no`` or ``cannot tell``.
    """

    node: str
    question: str
    answer: Word
    figure: str


def _of(holds: object, figure: str) -> Answer:
    return Answer("yes" if holds else "no", figure)


def _cells(p: Profile) -> Answer:
    return _of(p.cells, f"{p.cells:,} cells selected")


def _counts(p: Profile) -> Answer:
    if not p.sampled:
        return Answer("cannot tell", f"no cell could be read: {p.unread or 'the sample is empty'}")
    if p.wrong:
        return Answer("no", f"{'; '.join(p.wrong.values())}; looked in {p.layer}")
    return Answer("yes", f"{p.layer}; non-negative integers in {p.sampled:,} sampled cells")


def _aim(wanted: str) -> Callable[[Profile], Answer]:
    return lambda p: _of(p.aim == wanted, f"--aim {p.aim}" if p.aim else "no aim was told")


def usable(p: Profile, family: str = "") -> list[Fit]:
    """References that answer the aim: of one family where it asks for one, else those that leave nothing unused.

    Whoever says ``--aim map`` also takes one that leaves a modality unused.
    """
    found = [fit for fit in p.fits if fit.fits and (not family or fit.family == family)]
    return [fit for fit in found if family or fit.complete or p.aim == "map"]


def _reference(family: str = "") -> Callable[[Profile], Answer]:
    def ask(p: Profile) -> Answer:
        if p.aim == "integrate":
            return Answer("no", "--aim integrate")
        able = usable(p, family)
        if able:
            return Answer("yes", f"{able[0].reference} ({able[0].family}): {able[0].why}")
        of = [fit for fit in p.fits if not family or fit.family == family]
        if not of:
            return Answer("no", f"no {family + ' ' if family else ''}reference is registered")
        return Answer("no", f"best of {len(of)}: {of[0].reference} ({of[0].family}): {of[0].why}")

    return ask


def _measured(wanted: str) -> Callable[[Profile], Answer]:
    """Whether all of some modalities are measured."""

    def ask(p: Profile) -> Answer:
        told = ", ".join(f"{count:,} {name}" for name, count in p.features.items()) or "none that is known"
        both = f"; {p.paired:.0%} of the sampled cells have all of them" if len(p.features) > 1 else ""
        return _of(set(wanted.split("+")) <= set(p.features), f"features: {told}{both}")

    return ask


def _samples(p: Profile) -> Answer:
    if p.samples is None:
        return Answer("no", "no column of obs is called as samples or donors usually are, with several of them")
    told = f"'{p.samples.name}' has {len(p.samples.values):,} values"
    if not p.samples.sure:
        return Answer("yes", f"{told}; cannot tell whether '{p.samples.name}' is a donor")
    return Answer("yes", told)


def _control(p: Profile) -> Answer:
    column = p.perturbation
    if column is None:
        return Answer("no", "no column of obs is called as perturbations usually are")
    if not has_control(column):
        shown = ", ".join(list(column.values)[:4])
        return Answer("no", f"'{column.name}' has no control with enough cells among its values ({shown})")
    told = f"{column.in_control:,} of {column.told:,} cells of '{column.name}' are {' or '.join(column.controls[:3])}"
    return Answer("yes", f"{told}{f', and {column.lacking:,} untold' if column.lacking else ''}")


def _effect(p: Profile) -> Answer:
    answer = _control(p)
    if p.aim and answer.word == "yes":
        return Answer("no", f"--aim {p.aim}, though {answer.figure}")
    return answer


def _labels(p: Profile) -> Answer:
    if p.labels is None:
        return Answer("no", "no column of obs is called as labels usually are, with several of them")
    share = p.labels.told / max(p.cells, 1)
    told = f"'{p.labels.name}' has {len(p.labels.values):,} labels on {share:.1%} of the cells"
    return _of(complete_enough(p.labels, p.cells), told)


TREE: Mapping[str, Node | Leaf] = {
    "cells": Node("Does the source select any cell?", _cells, "counts", "no-cells"),
    "counts": Node("Are the values raw counts?", _counts, "samples-asked", "no-counts", "unread"),
    "samples-asked": Node("Is the aim to compare samples?", _aim("compare-samples"), "samples-rna", "effect-asked"),
    "samples-rna": Node("Is RNA measured?", _measured("rna"), "samples-reference", "no-rna"),
    "samples-reference": Node("Does a registered MRVI fit?", _reference("MRVI"), "MRVI-reference", "samples-column"),
    "samples-column": Node("Is there a column of samples?", _samples, "MRVI", "no-samples"),
    "effect-asked": Node("Is the aim the effect of a perturbation?", _aim("perturbation"), "effect-rna", "fitting"),
    "effect-rna": Node("Is RNA measured?", _measured("rna"), "effect-reference", "no-rna"),
    "effect-reference": Node(
        "Does a registered ContrastiveVI fit?", _reference("ContrastiveVI"), "ContrastiveVI-reference", "effect-control"
    ),
    "effect-control": Node("Is there a perturbation with a control?", _control, "ContrastiveVI", "no-control"),
    "fitting": Node(
        f"Does a registered reference fit (preflight, at least {ENOUGH:.0%} of its genes by influence, every modality"
        " read unless --aim map), and is the aim not to integrate?",
        _reference(),
        "reference",
        "rna+atac",
    ),
    "rna+atac": Node("Are RNA and accessibility measured?", _measured("rna+atac"), "MULTIVI", "rna+protein"),
    "rna+protein": Node("Are RNA and proteins measured?", _measured("rna+protein"), "TOTALVI", "rna"),
    "rna": Node("Is RNA measured?", _measured("rna"), "effect", "atac"),
    "atac": Node("Is accessibility measured?", _measured("atac"), "PEAKVI", "no-family"),
    "effect": Node(
        "Is there a perturbation with a control, and no other aim told?", _effect, "ContrastiveVI", "labels"
    ),
    "labels": Node("Are there labels on enough cells?", _labels, "SCANVI", "SCVI"),
    "reference": Leaf("reference", "A registered reference fits: mapping needs no training."),
    "MRVI-reference": Leaf("reference", "A registered MRVI fits: mapping needs no training.", "MRVI"),
    "ContrastiveVI-reference": Leaf(
        "reference", "A registered ContrastiveVI fits: mapping needs no training.", "ContrastiveVI"
    ),
    "MULTIVI": Leaf("family", "models RNA and accessibility, and proteins, of cells that may lack some", "MULTIVI"),
    "TOTALVI": Leaf("family", "models RNA and proteins together, with the proteins' background", "TOTALVI"),
    "PEAKVI": Leaf("family", "models accessibility of peaks", "PEAKVI"),
    "MRVI": Leaf("family", "models how samples differ, cell by cell", "MRVI"),
    "ContrastiveVI": Leaf(
        "family", "separates what the perturbation adds from what control cells have", "ContrastiveVI"
    ),
    "SCANVI": Leaf("family", "models RNA with labels, and labels what is mapped", "SCANVI"),
    "SCVI": Leaf("family", "models RNA without labels", "SCVI"),
    "no-cells": Leaf(
        "cannot tell", "Widen the filter, or add duplicates=keep to the source if every cell is a duplicate."
    ),
    "unread": Leaf("cannot tell", "Check the file: the same command goes on once it can be read."),
    "no-counts": Leaf(
        "nothing",
        "Every family models raw counts: name where they are, e.g. layer=counts or layer=raw in the source; normalised"
        " values cannot be turned back.",
    ),
    "no-rna": Leaf("nothing", "This aim needs RNA: give the source that has it, or leave --aim out."),
    "no-samples": Leaf(
        "nothing", "Name the column by hand: scviaduct train SOURCE --family mrvi --sample-key COLUMN --out DIR."
    ),
    "no-control": Leaf(
        "nothing",
        "Name the control by hand: scviaduct train SOURCE --family contrastivevi --background COLUMN=VALUE --out DIR.",
    ),
    "no-family": Leaf(
        "nothing", "Proteins alone are modelled by none of the families: give the RNA of the same cells."
    ),
}
"""Every question and every end by name; the first is the root."""
ROOT = "cells"


def walk(profile: Profile) -> tuple[str, tuple[Step, ...]]:
    """Follow the tree from its root; the name of the leaf, and the steps that led there."""
    name, steps = ROOT, []
    while isinstance(node := TREE[name], Node):
        word, figure = node.ask(profile)
        steps.append(Step(name, node.question, word, figure))
        name = node.after(word)
    return name, tuple(steps)


def explained(steps: Sequence[Step]) -> Iterator[str]:
    """The whole tree as lines; ``>`` marks the branch that was taken, and its questions have their figures."""
    yield from _lines(ROOT, "", 0, {step.node: step for step in steps}, here=True)


def _lines(name: str, word: str, depth: int, taken: Mapping[str, Step], *, here: bool) -> Iterator[str]:
    """A node, its short branches below it, and its long one at the same depth."""
    node = TREE[name]
    head = f"{'>' if here else ' '} {'    ' * depth}{f'{word}: ' if word else ''}"
    if isinstance(node, Leaf):
        yield f"{head}{_named(node)}"
        return
    yield f"{head}{node.question}"
    step = taken.get(name) if here else None
    if step is not None:
        yield f"  {'    ' * depth}    [{step.answer}: {step.figure}]"
    branches = {"yes": node.yes, "no": node.no} | ({"cannot tell": node.unknown} if node.unknown else {})
    chosen = "" if step is None else step.answer if step.answer in branches else "no"
    long = max(branches, key=lambda word: _size(branches[word]))
    long = long if _size(branches[long]) else ""
    for word in sorted(branches, key=lambda word: word == long):
        yield from _lines(branches[word], word, depth + (word != long), taken, here=word == chosen)


def _size(name: str) -> int:
    """Number of questions below."""
    node = TREE[name]
    if isinstance(node, Leaf):
        return 0
    return 1 + sum(_size(one) for one in (node.yes, node.no, node.unknown) if one)


def _named(leaf: Leaf) -> str:
    if leaf.kind == "family":
        return f"train {leaf.family}: {leaf.why}."
    return {"reference": "map", "nothing": "nothing", "cannot tell": "cannot tell"}[leaf.kind] + f": {leaf.why}"
