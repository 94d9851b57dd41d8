"""Simulated cells whose truth is known, for the demo, the benchmarks and the tests."""

from scviaduct.simulation.cells import DATASETS, Dataset, Simulation
from scviaduct.simulation.census import write_census

__all__ = ["DATASETS", "Dataset", "Simulation", "write_census"]
