"""Independent tasks: so many at a time, each told of as it ends."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError, RayTaskError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def run_tasks[Item](
    items: Sequence[Item],
    start: Callable[[Item], ray.ObjectRef[Any]],
    at_once: int,
    on_done: Callable[[Item, Any], None],
    on_failed: Callable[[Item, Exception], None],
    attempts: int = 3,
) -> None:
    """Run a task for each item.

    Whatever ends the call, an interrupt included, ends the tasks too. A task that is lost with its process or node is
    tried again here, as the dispatcher does with units.

    Parameters
    ----------
    items
        What to work on.
    start
        Submits the task of an item.
    at_once
        Tasks that are submitted and have not ended, at most.
    on_done
        Told of each result as it comes.
    on_failed
        Told of each error that a task ended with: the one that it raised, or Ray's own after the last attempt.
    attempts
        Tries of a task that is lost; one that raises is not tried again.
    """
    pending = deque((item, 1) for item in items)
    running = dict[ray.ObjectRef[Any], tuple[Item, int]]()
    try:
        while pending or running:
            while pending and len(running) < at_once:
                item, attempt = pending.popleft()
                running[start(item)] = (item, attempt)
            ended, _ = ray.wait(list(running), num_returns=1)
            item, attempt = running.pop(ended[0])
            try:
                result = ray.get(ended[0])
            except RayTaskError as error:
                on_failed(item, error.cause if isinstance(error.cause, Exception) else error)
            except RayError as error:
                if attempt < attempts:
                    pending.append((item, attempt + 1))
                else:
                    on_failed(item, error)
            else:
                on_done(item, result)
    finally:
        for ref in running:
            ray.cancel(ref, force=True)
