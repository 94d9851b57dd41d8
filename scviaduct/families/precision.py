"""What matrices on a GPU are multiplied in, whatever the process does elsewhere.

Lightning tells users to turn TensorFloat-32 on; a run multiplies in float32, in a user's process as in an actor.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

type Precision = Literal["float32", "tf32", "bf16"]


def exactly(device: str) -> AbstractContextManager[None]:
    """Matrices in float32 on a device; nothing is set for a CPU, which knows no other way."""
    return nullcontext() if device == "cpu" else multiplying("float32")


@contextlib.contextmanager
def multiplying(precision: Precision) -> Iterator[None]:
    """Matrices in TensorFloat-32 or not; what the process had set is set again in the end.

    PyTorch has two settings since 2.9, and refuses to read the older one once a process has set the newer one.
    """
    matmul: Any = torch.backends.cuda.matmul
    newer, fast = hasattr(matmul, "fp32_precision"), precision == "tf32"
    name, value = ("fp32_precision", "tf32" if fast else "ieee") if newer else ("allow_tf32", fast)
    held = getattr(matmul, name)
    setattr(matmul, name, value)
    try:
        yield
    finally:
        setattr(matmul, name, held)
