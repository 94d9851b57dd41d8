"""Whether counts are counts, and which cells have some, compiled: numpy passes over all of them once a question."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numba import types

from scviaduct.compiling import compiled

if TYPE_CHECKING:
    import numpy.typing as npt

    from scviaduct.values import FloatArray, LongArray

_ZERO, _INFINITE = np.float32(0), np.float32(np.inf)  # as other numbers, they would be doubles
_counts = types.Array(types.float32, 1, "C", readonly=True)


@compiled(types.boolean(_counts, types.boolean))
def are_counts(data: FloatArray, fractional: bool) -> bool:  # noqa: FBT001 - numba takes arguments by position
    """Whether all values are finite and none is negative, and unless fractions may be, all are whole.

    Parameters
    ----------
    data
        float32, shape ``(nnz,)``.
    fractional
        Whether fractions may be.
    """
    right = True  # no branch, so that vectors do it: 0.3 ns a count
    if fractional:
        for i in range(len(data)):
            right &= (data[i] >= _ZERO) & (data[i] < _INFINITE)
    else:
        for i in range(len(data)):
            right &= (data[i] >= _ZERO) & (data[i] < _INFINITE) & (data[i] == np.floor(data[i]))
    return right


@compiled(types.void(types.Array(types.int64, 1, "C", readonly=True), _counts, types.Array(types.boolean, 1, "C")))
def counted(indptr: LongArray, data: FloatArray, found: npt.NDArray[np.bool_]) -> None:
    """Fill in whether any value of each row is positive.

    Parameters
    ----------
    indptr, data
        int64 of shape ``(n_cells + 1,)``, float32 of shape ``(nnz,)``.
    found
        bool, shape ``(n_cells,)``: what is filled in.
    """
    for row in range(len(found)):
        found[row] = False
        for i in range(indptr[row], indptr[row + 1]):
            if data[i] > 0:
                found[row] = True
                break
