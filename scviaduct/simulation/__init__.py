"""Simulated cells whose truth is known, for the demo, the benchmarks and the tests."""

from scviaduct.simulation.cells import DATASETS, Dataset, Simulation
from scviaduct.simulation.census import write_census
from scviaduct.simulation.cohort import Cohort

__all__ = ["DATASETS", "Cohort", "Dataset", "Simulation", "write_census"]
