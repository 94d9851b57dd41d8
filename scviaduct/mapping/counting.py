"""Which cells have counts, compiled: numpy would pass over all of them, and most cells are told by their first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from numba import types

from scviaduct.compiling import compiled

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from scviaduct.values import FloatArray, LongArray


@compiled(
    types.void(
        types.Array(types.int64, 1, "C", readonly=True),
        types.Array(types.float32, 1, "C", readonly=True),
        types.Array(types.boolean, 1, "C"),
    )
)
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
