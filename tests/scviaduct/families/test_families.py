"""All families are found by themselves, with or without what only a GPU needs."""

from __future__ import annotations

import subprocess
import sys

from scviaduct.families import families

CLASSES = {"SCVI", "SCANVI", "TOTALVI", "MULTIVI", "PEAKVI", "POISSONVI", "MRVI", "ContrastiveVI"}


def test_families_are_found_by_the_names_of_their_classes():
    assert families().keys() == CLASSES


def test_none_needs_triton():
    # A PyTorch for CPUs does not bring it, and on macOS there is none.
    code = "import sys; sys.modules['triton'] = None; from scviaduct.families import families; print(*families())"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert set(done.stdout.split()) == CLASSES, done.stderr
