"""Arithmetic that gives a cell the same bits whatever other cells share its mini-batch, and wherever it stands in it.

PyTorch promises that of no operation, and two kinds break it (MKL on AVX2, float32):

- A matrix product sums a row in an order that depends on the number of rows (up to 3 rows with one thread, up to 7 with
  two: 1e-5 of the sum) and, with an odd number of outputs (a classifier of nine labels), on whether the row is even or
  odd. Padding mends the former only, so rows are summed one at a time here, by ``embedding_bag``. It takes 0.2 ms
  instead of 0.1 for 1,024 cells from 128 hidden units to 10, 1.1 instead of 0.4 to 128, 17 instead of 7 from 512 to
  512; the first layer, which is summed so in any case, takes the most by far.
- Softplus, GELU, SiLU and ELU compute the elements behind the last whole vector register with another function: the
  last of the array, and the last of each thread's part. Arrays of :data:`ROWS` rows, or a multiple, have none of the
  former; long ones are cut into strips, which PyTorch gives to one thread each.

``log1p``, ``exp``, softmax over a row, layer norm and attention depend on a cell's own values alone; tests hold them to
it. On a GPU every mini-batch is padded to the same number of rows, so that each runs the same kernels.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

ROWS = 32
"""A mini-batch of PyTorch's on a CPU has a multiple of so many rows: two registers of AVX-512 hold as many float32."""
_STRIP = 1 << 14
"""Elements of a strip; PyTorch shares out 32,768 or more among its threads."""
_CACHE_BYTES = 1 << 19
_COLUMNS = 64
"""Outputs summed at a time where the weights outgrow a core's cache: 512 inputs x 64 float32 are 128 KB."""


def rows_of(cells: int, step: int, device: str) -> int:
    """Rows of the mini-batch that encodes so many cells.

    Parameters
    ----------
    cells
        At most ``step``.
    step
        Most cells of a mini-batch.
    device
        ``"cpu"`` or a CUDA device.
    """
    if device != "cpu" and cells:
        return step
    return -(-cells // ROWS) * ROWS


def padded[T: np.generic](values: npt.NDArray[T], rows: int) -> npt.NDArray[T]:
    """An array with its last row repeated up to a number of rows; of row pointers, this makes cells without a count."""
    missing = rows - len(values)
    if not missing:
        return values
    import numpy as np

    return np.concatenate([values, np.repeat(values[-1:], missing, axis=0)])


def linear(values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """A linear layer, each row summed on its own in the order of the inputs.

    Parameters
    ----------
    values
        float32, shape ``(..., n_in)``.
    weight, bias
        float32, shapes ``(n_out, n_in)`` and ``(n_out,)``.

    Returns
    -------
    torch.Tensor
        float32, shape ``(..., n_out)``.
    """
    if values.device.type != "cpu":
        return nn.functional.linear(values, weight, bias)
    n_out, n_in = weight.shape
    indices, offsets = _bags(values.numel() // n_in, n_in)
    wide = weight.numel() * weight.element_size() > _CACHE_BYTES
    parts = [
        nn.functional.embedding_bag(
            indices,
            part.T.contiguous(),
            offsets,
            mode="sum",
            per_sample_weights=values.reshape(-1),
            include_last_offset=True,
        )
        for part in weight.split(_COLUMNS if wide else n_out)
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    if bias is not None:
        out += bias
    return out.unflatten(0, values.shape[:-1]) if values.ndim != 2 else out


def elementwise(function: Callable[[torch.Tensor], torch.Tensor], values: torch.Tensor) -> torch.Tensor:
    """A function of each element of an array whose number of elements is a multiple of :data:`ROWS`."""
    if values.device.type != "cpu" or values.numel() <= _STRIP or torch.get_num_threads() == 1:
        return function(values)
    strips = values.reshape(-1).split(_STRIP)
    return torch.cat([function(strip) for strip in strips]).view(values.shape)


def _bags(rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bags of ``width`` indices, 0 and so on, for each row; and where each begins and the last ends."""
    indices, offsets = _made(1 << max(rows - 1, 0).bit_length(), width)
    return indices[: rows * width], offsets[: rows + 1]


@lru_cache(maxsize=64)
def _made(rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode(mode=False):  # whoever asks next may want gradients
        offsets = torch.arange(0, rows * width + 1, width, dtype=torch.int32)
        return torch.arange(width, dtype=torch.int32).repeat(rows), offsets
