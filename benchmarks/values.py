"""What the suite measures and says: small frozen values, from a raw sample to a figure with its bar."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


_TURNS = 6
"""Turns from which on it is said between which values a ratio lies."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One time that a way was taken.

    Attributes
    ----------
    turn
        Which round it was in: samples of one turn follow each other, so that the machine's drift hits all ways.
    wall, cpu
        Seconds of the clock, and CPU-seconds of the process tree.
    result
        What the way said of itself, such as the cells it read.
    """

    turn: int
    wall: float
    cpu: float
    result: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Measurement:
    """All samples of one way.

    Attributes
    ----------
    way
        Its name.
    amount, unit
        How much one sample does: 32768 ``cells``.
    samples
        In the order in which they were taken; warm-ups are not among them.
    missing
        Why the way was not taken; empty if it was.
    """

    way: str
    amount: float
    unit: str
    samples: tuple[Sample, ...] = ()
    missing: str = ""

    @property
    def cpu(self) -> float:
        """Median of the CPU-seconds."""
        return statistics.median(sample.cpu for sample in self.samples)

    @property
    def wall(self) -> float:
        """Median of the seconds of the clock."""
        return statistics.median(sample.wall for sample in self.samples)

    @property
    def best_cpu(self) -> float:
        """Smallest number of CPU-seconds."""
        return min(sample.cpu for sample in self.samples)

    @property
    def rate(self) -> float:
        """Amount per CPU-second, by the median."""
        return self.amount / self.cpu

    @property
    def best_rate(self) -> float:
        """Amount per CPU-second, by the best sample."""
        return self.amount / self.best_cpu

    def last(self, name: str) -> Any:
        """What the last sample said of itself."""
        return self.samples[-1].result[name]


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times one way does as much per CPU-second as another, or why that is not known."""

    value: float | None
    best: float | None = None
    reason: str = ""
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, one: Measurement, other: Measurement) -> Ratio:
        """Median of the turns' ratios, or ratio of the medians where they took no turns; ``best`` of the best samples.

        Samples of a turn follow each other: a machine whose speed changes by a quarter from minute to minute changes it
        for both, while medians may come from different minutes.
        """
        if reason := one.missing or other.missing:
            return cls(None, reason=reason)
        value, best = one.rate / other.rate, one.best_rate / other.best_rate
        pairs = [(a.cpu, b.cpu) for a, b in zip(one.samples, other.samples, strict=False) if a.turn == b.turn]
        if len(pairs) == len(one.samples) == len(other.samples):
            return cls.of_turns([b / a * one.amount / other.amount for a, b in pairs], best)
        return cls(value, best)

    @classmethod
    def of_turns(cls, turns: Sequence[float], best: float | None = None) -> Ratio:
        """Median of what each turn gave.

        How sure it is, is told by ``low`` and ``high``, the least and the largest of a turn but one: of nine turns, in
        96 of 100 cases the median of very many lies between.
        """
        value, ordered = statistics.median(turns), sorted(turns)
        if len(ordered) < _TURNS:
            return cls(value, best)
        return cls(value, best, low=ordered[1], high=ordered[-2])


@dataclass(frozen=True, slots=True)
class Bar:
    """What a figure must come to."""

    sense: Literal["at least", "at most"]
    value: float

    def met_by(self, value: float) -> bool:
        """Whether a figure fulfils it."""
        return value >= self.value if self.sense == "at least" else value <= self.value


@dataclass(frozen=True, slots=True)
class Figure:
    """A named number of the suite.

    Attributes
    ----------
    name
        Its key in ``latest.json``.
    value
        None where it could not be measured.
    reason
        Why it could not.
    best, low, high
        Of a ratio: the same by the best samples, and between which it lies, where there were turns enough to say.
    """

    name: str
    value: float | None
    reason: str = ""
    best: float | None = None
    low: float | None = None
    high: float | None = None

    @classmethod
    def ratio(cls, name: str, ratio: Ratio) -> Figure:
        """A ratio by its name."""
        return cls(name, ratio.value, ratio.reason, ratio.best, ratio.low, ratio.high)


@dataclass(frozen=True, slots=True)
class Report:
    """What one benchmark found.

    Attributes
    ----------
    title
        Heading of its section.
    counts
        What its figures count, in sentences.
    figures
        Those of ``latest.json``.
    measurements
        Group of comparable ways to their measurements.
    facts
        Everything else that was found, JSON.
    """

    title: str
    counts: str
    figures: Sequence[Figure]
    measurements: Mapping[str, Sequence[Measurement]]
    facts: Mapping[str, Any] = field(default_factory=dict)


BARS = {
    "read_vs_blockwise": Bar("at least", 4.0),
    "read_vs_tiledbsoma_ml": Bar("at least", 1.8),
    "read_vs_tables": Bar("at least", 0.88),
    "encode_2000x128": Bar("at least", 8.0),
    "encode_8000x128": Bar("at least", 5.0),
    "encode_census": Bar("at least", 3.5),
    "e2e_2000": Bar("at least", 2.5),
    "e2e_census": Bar("at least", 4.0),
    "e2e_vs_read_only": Bar("at least", 0.9),
    "two_workers": Bar("at least", 1.6),
    "ray_overhead": Bar("at most", 0.05),
    "references_4_vs_1": Bar("at most", 1.3),
    "landing_vs_soma": Bar("at least", 4.0),
    "surgery_vs_per_batch": Bar("at least", 5.0),
    "index_build_vs_hnsw": Bar("at least", 15.0),
    "search_vs_lance": Bar("at least", 20.0),
    "search_vs_tiledb": Bar("at least", 1.0),
    "search_single_ms": Bar("at most", 1.0),
    "filter_recall_0p1": Bar("at least", 0.99),
    "filter_recall_2_correlated": Bar("at least", 0.99),
    "filter_recall_10": Bar("at least", 0.99),
}
"""The figures of ``latest.json``, in order, and what each must come to."""
