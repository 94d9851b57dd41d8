"""The process of one way: told what to do by lines of JSON, it prepares, and repeats when it is told to.

``python -m benchmarks.child`` is started by :mod:`benchmarks.turns`. It imports nothing but the way's module, so that
another interpreter can run it where a peer needs one.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from typing import Any

from benchmarks.usage import adopt_orphans, own_seconds, reap, running_seconds


def main() -> None:
    """Prepare what the first line names, then do it once for each further line."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to the log, not among the answers
    told = json.loads(sys.stdin.readline())
    os.sched_setaffinity(0, told["cpus"])
    adopt_orphans()
    try:
        once = _prepare(told)
        _answer(answers, {"ready": True})
        for _ in sys.stdin:
            _answer(answers, _timed(once))
    except ImportError as error:
        _answer(answers, {"missing": f"{error.name or 'a package'} cannot be imported: {error}"})
    except Exception:  # noqa: BLE001 - the parent raises it
        _answer(answers, {"failed": traceback.format_exc()})
    finally:
        reap()


def _prepare(told: dict[str, Any]) -> Any:
    module, _, name = told["call"].partition(":")
    return getattr(importlib.import_module(module), name)(**told["told"])


def _timed(once: Any) -> dict[str, Any]:
    before = running_seconds()  # looking takes 5 ms, which the two calls of own_seconds leave out
    own, began = own_seconds(), time.perf_counter()
    result = once()
    wall, own = time.perf_counter() - began, own_seconds() - own
    return {"wall": wall, "cpu": own + running_seconds() - before, "result": result or {}}


def _answer(answers: Any, value: dict[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")


if __name__ == "__main__":
    main()
