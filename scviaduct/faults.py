"""Named points at which a test kills the process, to prove that nothing is lost.

``SCVIADUCT_FAULT=NAME@FILE`` makes the first process that reaches :func:`point` ``NAME`` create ``FILE`` and end by
SIGKILL, as a lost node would. ``FILE`` marks that it happened, so that it happens once. Several are joined by commas.
Without the variable a point costs one dictionary look-up.

Points, in the order that a unit meets them: ``read`` (a reader holds the shard), ``encode`` (an actor holds the block),
``staged`` (the unit's files are written), ``recorded`` (its completion record is), ``latents-committed`` (inside the
commit, between the two tables), ``committed`` (after the commit point). A batch that is fitted meets ``fitted`` (its
adapter is on the shelf); a unit that is derived meets ``decode`` (an actor holds the block), ``staged``, ``recorded``,
``placed`` (one of its files is in its place) and, in the commit of its set, ``derived-written``. A piece that is landed
meets ``piece-written`` (its counts are in their place, its cells are not), and the landing ``landing-written`` (its
manifest is written and not yet in its place).
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

POINTS = (
    *("read", "encode", "staged", "recorded", "latents-committed", "committed"),
    *("fitted", "decode", "placed", "derived-written"),
    *("piece-written", "landing-written"),
)


def point(name: str) -> None:
    """End this process here if the environment asks for it, once."""
    wanted = os.environ.get("SCVIADUCT_FAULT")
    if wanted is None:
        return
    for told in wanted.split(","):
        fault, _, marker = told.partition("@")
        if fault != name:
            continue
        try:
            Path(marker).touch(exist_ok=False)
        except FileExistsError:
            continue
        os.kill(os.getpid(), signal.SIGKILL)
