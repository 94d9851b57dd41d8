"""SipHash-2-4 of many strings, compiled (Aumasson and Bernstein, INDOCRYPT 2012)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numba import types

from scviaduct.compiling import compiled

if TYPE_CHECKING:
    import numpy.typing as npt

    from scviaduct.values import IntArray

    State = tuple[np.uint64, np.uint64, np.uint64, np.uint64]

_KEY = np.frombuffer(b"0123456789123456", np.uint64)
"""pandas' default."""
_V0, _V1 = _KEY[0] ^ np.uint64(0x736F6D6570736575), _KEY[1] ^ np.uint64(0x646F72616E646F6D)
_V2, _V3 = _KEY[0] ^ np.uint64(0x6C7967656E657261), _KEY[1] ^ np.uint64(0x7465646279746573)
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_LAST = np.uint64(0xFF)
_EIGHT, _27, _30, _31 = np.uint64(8), np.uint64(27), np.uint64(30), np.uint64(31)


@compiled()
def _turned(value: np.uint64, bits: int) -> np.uint64:
    return np.uint64((value << np.uint64(bits)) | (value >> np.uint64(64 - bits)))


@compiled()
def _round(v0: np.uint64, v1: np.uint64, v2: np.uint64, v3: np.uint64) -> State:
    v0 += v1
    v2 += v3
    v1 = _turned(v1, 13) ^ v0
    v3 = _turned(v3, 16) ^ v2
    v0 = _turned(v0, 32)
    v2 += v1
    v0 += v3
    v1 = _turned(v1, 17) ^ v2
    v3 = _turned(v3, 21) ^ v0
    v2 = _turned(v2, 32)
    return v0, v1, v2, v3


@compiled(
    types.void(
        types.Array(types.int32, 1, "C", readonly=True),
        types.Array(types.uint8, 1, "C", readonly=True),
        types.Array(types.uint64, 1, "C"),
    )
)
def siphash(offsets: IntArray, text: npt.NDArray[np.uint8], hashes: npt.NDArray[np.uint64]) -> None:
    """Fill in the hash of each string, spread over 64 bits as pandas does.

    Parameters
    ----------
    offsets
        int32, shape ``(n + 1,)``; where each string begins in ``text``, and where the last ends.
    text
        uint8; UTF-8.
    hashes
        uint64, shape ``(n,)``: what is filled in.
    """
    for row in range(len(hashes)):
        start, stop = np.uint64(offsets[row]), np.uint64(offsets[row + 1])
        v0, v1, v2, v3 = _V0, _V1, _V2, _V3
        whole = start + ((stop - start) & ~np.uint64(7))
        while start <= whole:
            word = np.uint64(0)
            if start < whole:
                for byte in range(np.uint64(8)):
                    word |= np.uint64(text[start + byte]) << (_EIGHT * byte)
            else:  # what is left, and the length in the last byte
                word = ((stop - np.uint64(offsets[row])) & _LAST) << np.uint64(56)
                for byte in range(stop - start):
                    word |= np.uint64(text[start + byte]) << (_EIGHT * byte)
            v3 ^= word
            v0, v1, v2, v3 = _round(v0, v1, v2, v3)
            v0, v1, v2, v3 = _round(v0, v1, v2, v3)
            v0 ^= word
            start += _EIGHT
        v2 ^= _LAST
        for _ in range(4):
            v0, v1, v2, v3 = _round(v0, v1, v2, v3)
        value = v0 ^ v1 ^ v2 ^ v3
        value = (value ^ (value >> _30)) * _M1
        value = (value ^ (value >> _27)) * _M2
        hashes[row] = value ^ (value >> _31)
