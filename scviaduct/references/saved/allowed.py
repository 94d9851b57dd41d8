"""The exact names that a saved model may refer to, and what each stands for while it is read.

Where a function could be made to allocate without bound or to reach further, a narrow one of our own stands in its
place: it does what saved models need and nothing else. States are set by :func:`set_state` alone: numpy and pandas
believe what a state says of memory, so that a dtype with object fields makes pointers of any bytes.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

STORAGES: dict[str, torch.dtype] = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True, slots=True)
class Storage:
    """Memory that tensors are views of."""

    flat: torch.Tensor


def _parameter(data: torch.Tensor, *_: Any) -> torch.Tensor:
    """``torch._utils._rebuild_parameter``: the tensor, as ``state_dict`` gives it."""
    if not isinstance(data, torch.Tensor):
        raise TypeError("a parameter that is no tensor")
    return data


class _Array:
    """Stands for ``numpy.ndarray`` as an argument; it cannot be called or instantiated by a pickle."""


_ARRAY = _Array()


_HUGE = 1 << 62
_DIMENSIONS = 32


def _tensor(storage: Storage, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any) -> torch.Tensor:
    """``torch._utils._rebuild_tensor_v2`` with checked bounds: a view never leaves its storage."""
    whole = all(isinstance(n, int) and 0 <= n < _HUGE for n in (offset, *size, *stride))
    whole = whole and len(size) == len(stride) <= _DIMENSIONS
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=False)) if whole else -1
    if not whole or (math.prod(size) > 0 and last >= storage.flat.numel()):
        raise ValueError("a tensor lies outside of its storage")
    if math.prod(size) > storage.flat.numel():  # steps of zero: a few bytes that whoever copies them makes terabytes of
        raise ValueError("a tensor has more elements than its storage")
    return (
        storage.flat.as_strided(tuple(size), tuple(stride), offset)
        if math.prod(size)
        else storage.flat.new_empty(tuple(size))
    )


def _array(kind: Any, shape: Any, code: Any) -> np.ndarray[Any, Any]:
    """``numpy.core.multiarray._reconstruct``: an empty array, which its state fills."""
    if kind is not _ARRAY or shape != (0,) or code not in (b"b", "b"):
        raise ValueError("an array is made in an unknown way")
    return np.ndarray((0,), np.int8)


def _scalar(dtype: np.dtype[Any], data: bytes = b"") -> Any:
    """``numpy.core.multiarray.scalar`` of a plain number or text."""
    if dtype.hasobject or len(data) != dtype.itemsize:
        raise ValueError("a scalar of a type that holds objects")
    return np.frombuffer(data, dtype, 1)[0]


_PLAIN = re.compile(r"[biufcSUO][0-9]{0,9}")


def _dtype(code: Any, *_: Any) -> np.dtype[Any]:
    """``numpy.dtype`` of the code of a number, a text or objects."""
    if not isinstance(code, str) or not _PLAIN.fullmatch(code):
        raise TypeError(f"a dtype that is not plain: {reprlib.repr(code)}")
    return np.dtype(code)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """``_codecs.encode``, as pickles of protocol 2 write bytes."""
    if encoding not in ("latin1", "latin-1", "utf-8"):
        raise ValueError(f"encoding {encoding}")
    return text.encode(encoding)


def _bytes(data: bytes = b"") -> bytes:
    """``bytes`` of nothing or of bytes; ``bytes(10**12)`` would allocate as much."""
    if not isinstance(data, bytes):
        raise TypeError("bytes that are made of something else")
    return data


_RANGE = frozenset({"start", "stop", "step"})


def _index(_kind: Any, state: dict[str, Any]) -> pd.Index:
    """``pandas.core.indexes.base._new_Index``: a plain index of its data, a range of its bounds."""
    # pandas asks a list of lists for its shape, and a name for its hash: both may take for ever.
    name = state.get("name")
    if not isinstance(name, str | int | None):
        raise TypeError("an index whose name is not plain")
    if state.keys() >= _RANGE:
        start, stop, step = bounds = [state[key] for key in ("start", "stop", "step")]
        if not all(type(bound) is int and abs(bound) < _HUGE for bound in bounds):
            raise TypeError("a range without bounds")
        return pd.RangeIndex(start, stop, step, name=name)
    data = state["data"]
    if not isinstance(data, np.ndarray) or data.ndim != 1:
        raise TypeError("an index that is not made of an array of one dimension")
    index: pd.Index = pd.Index(data, name=name)
    return index


class _IndexKind:
    """Stands for a class of pandas index as an argument; every kind is read as a plain index."""


_INDEX_KIND = _IndexKind()


class Table:
    """Stands for a table of pandas, or a part of one: the training history, which nothing here reads."""

    def __init__(self, *_: Any) -> None:
        pass


def set_state(target: Any, state: Any) -> None:
    """Give a new object its state, as far as saved models need it.

    Raises
    ------
    TypeError, ValueError
        If it is no state that such a model has.
    """
    if isinstance(target, Table | OrderedDict):
        return  # a table is not read; what a state_dict says of its modules' versions is not either
    if isinstance(target, np.dtype):
        _, order, *parts = state
        if order not in ("<", "|", "=") or any(part is not None for part in parts[:3]) or len(parts) != 6:
            raise ValueError("a dtype that has fields or another byte order")
    elif type(target) is np.ndarray:
        _fill(target, *state)
    else:
        raise TypeError(f"a {type(target).__name__} that is given a state")


def _fill(array: Any, version: Any, shape: Any, dtype: Any, fortran: Any, data: Any) -> None:
    """Fill an array that :func:`_array` made, once: memory that something views is never given back."""
    if array.shape != (0,) or array.dtype != np.int8:
        raise ValueError("an array that is filled twice")
    if not isinstance(shape, tuple) or not all(isinstance(n, int) and 0 <= n < _HUGE for n in shape):
        raise ValueError("an array without a shape")
    expected = math.prod(shape) * (1 if dtype.hasobject else dtype.itemsize)
    if not isinstance(data, list if dtype.hasobject else bytes) or len(data) != expected:
        raise ValueError("an array whose data has not the size of its shape")
    array.__setstate__((version, shape, dtype, bool(fortran), data))


_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
_TABLE: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): defaultdict,
    ("builtins", "dict"): dict,
    ("builtins", "slice"): slice,
    ("builtins", "bytes"): _bytes,
    ("_codecs", "encode"): _encode,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    # TOTALVI.convert_legacy_save puts a parameter among the tensors.
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("numpy", "ndarray"): _ARRAY,
    ("numpy", "matrix"): _ARRAY,  # the protein mask of a model that was set up from sparse proteins
    ("numpy", "dtype"): _dtype,
    **{(module, "_reconstruct"): _array for module in _NUMPY},
    **{(module, "scalar"): _scalar for module in _NUMPY},
    ("pandas.core.frame", "DataFrame"): Table,
    ("pandas.core.internals.managers", "BlockManager"): Table,
    ("pandas._libs.internals", "_unpickle_block"): Table,
    ("pandas.core.indexes.base", "_new_Index"): _index,
    ("pandas.core.indexes.base", "Index"): _INDEX_KIND,
    ("pandas.core.indexes.range", "RangeIndex"): _INDEX_KIND,
    # pandas 1 had a class per type.
    ("pandas.core.indexes.numeric", "Int64Index"): _INDEX_KIND,
    ("pandas.core.indexes.numeric", "UInt64Index"): _INDEX_KIND,
    ("pandas.core.indexes.numeric", "Float64Index"): _INDEX_KIND,
}
_TABLE |= {("torch", name): dtype for name, dtype in STORAGES.items()}
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}


def resolve(module: str, name: str) -> Any:
    """What a pickle's global stands for; None if it is not on the table."""
    return _TABLE.get((_RENAMED.get(module, module), name))
