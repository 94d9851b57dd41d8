"""Peers are searched at the least effort that is right."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.peers import _EFFORTS, _least


@pytest.mark.parametrize("needed", [1, 4, 5, 18, 24, 25, 1600])
def test_the_least_effort_that_reaches_a_recall(needed):
    truth, asked = np.arange(300).reshape(10, 30), []

    def search(queries, effort):
        asked.append(effort)
        return truth if effort >= needed else truth + 1_000

    assert _least(search, np.zeros((10, 2)), truth, 0.999) == (max(needed, _EFFORTS[0]), 1.0)
    assert min(asked) >= _EFFORTS[0]


def test_a_peer_that_never_reaches_it_says_how_far_it_came():
    truth = np.arange(300).reshape(10, 30)
    found = truth.copy()
    found[:, 0] = 1_000
    effort, reached = _least(lambda *_: found, np.zeros((10, 2)), truth, 0.999)
    assert (effort, reached) == (_EFFORTS[-1], pytest.approx(29 / 30))
