"""64-bit hashes of cell keys: those of ``pandas.util.hash_array``, without an object a string.

Committed stores carry digests of these hashes, so that their values are fixed: SipHash-2-4 of a string's UTF-8 under
pandas' default key, then spread by the last step of SplitMix64. Arrow's buffers are read as they lie; pandas takes a
Python string of each cell: 0.15 us a key instead of 0.016.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa

if TYPE_CHECKING:
    import numpy.typing as npt

    Hashes = npt.NDArray[np.uint64]


def hash_keys(keys: pa.Array | pa.ChunkedArray) -> Hashes:
    """Hash of each string; uint64, shape ``(n,)``."""
    plain = keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys
    if plain.null_count or not pa.types.is_string(plain.type):
        return pd.util.hash_array(plain.to_numpy(zero_copy_only=False), categorize=False)
    from scviaduct.sources.siphash import siphash  # numba takes a quarter of a second

    hashes = np.empty(len(plain), np.uint64)
    if len(plain):
        _, ends, text = plain.buffers()
        offsets = np.frombuffer(ends, np.int32, len(plain) + 1, 4 * plain.offset)
        siphash(offsets, np.frombuffer(text or b"", np.uint8), hashes)
    return hashes
