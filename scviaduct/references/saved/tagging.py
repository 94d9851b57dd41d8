"""Values of a saved model as JSON, and back: exact, bounded, and with nothing in it that a reader would have to run.

What JSON has a word for is written plainly. Everything else is an object with the one key ``"!"``, whose value is a
list: the name of the kind, then its parts.
"""

from __future__ import annotations

import base64
import math
import re
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from scviaduct.errors import UnsupportedModelError
from scviaduct.references.saved.allowed import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MAX_DEPTH = 64
LARGE = 1024
"""Elements from which an array lies beside the weights instead of in the text."""
_TAG = "!"
_FACTORIES: Mapping[str, Any] = {"": None, "dict": dict, "list": list, "int": int, "str": str, "set": set}
_NUMBERS = re.compile(r"[<|](b1|[iu][1248]|f[248]|S[0-9]{1,6})")
_TEXT = re.compile(r"<U[0-9]{1,6}")
_TABLES = (Table, pd.DataFrame, pd.Series)


@dataclass(slots=True)
class Tagged:
    """Large arrays of numbers that tagged values refer to by position."""

    arrays: list[np.ndarray[Any, Any]] = field(default_factory=list)


def holds_table(value: Any) -> bool:
    """Whether a value is a table of pandas or holds one."""
    if isinstance(value, dict):
        return any(holds_table(part) for item in value.items() for part in item)
    if isinstance(value, list | tuple | set | frozenset):
        return any(holds_table(part) for part in value)
    return isinstance(value, _TABLES)


def tag(value: Any, told: Tagged, depth: int = 0) -> Any:
    """A value as what :mod:`json` writes.

    Raises
    ------
    UnsupportedModelError
        If it cannot be written down, or is nested too deeply.
    """
    if depth > MAX_DEPTH:
        raise _unwritten(f"a value of more than {MAX_DEPTH} levels")
    kind = type(value)
    if value is None or kind in (bool, str) or (kind is int and abs(value) < 1 << 63):
        return value
    if kind is float:
        return value if math.isfinite(value) else {_TAG: ["float", repr(value)]}
    if kind is list:
        return [tag(part, told, depth + 1) for part in value]
    if kind is dict and _TAG not in value and all(type(key) is str for key in value):
        return {key: tag(part, told, depth + 1) for key, part in value.items()}
    write = _WRITERS.get(kind)
    if write is None and isinstance(value, np.generic):
        write = _write_scalar
    if write is None and isinstance(value, pd.Index):
        write = _write_index
    if write is None:
        raise _unwritten(f"a {kind.__module__}.{kind.__qualname__}")
    return {_TAG: [*write(value, told, depth + 1)]}


def _unwritten(what: str) -> UnsupportedModelError:
    remedy = "A package keeps plain values and arrays: save the model without custom arguments, e.g. functions."
    return UnsupportedModelError(f"The model was saved with {what}, which cannot be written down.", remedy)


def _write_pairs(name: str, value: Mapping[Any, Any], told: Tagged, depth: int) -> list[Any]:
    return [name, *([tag(key, told, depth), tag(part, told, depth)] for key, part in value.items())]


def _write_defaultdict(value: Any, told: Tagged, depth: int) -> list[Any]:
    factory = next((name for name, known in _FACTORIES.items() if known is value.default_factory), None)
    if factory is None:
        raise _unwritten(f"a defaultdict of {value.default_factory!r:.80}")
    return ["defaultdict", factory, *_write_pairs("", value, told, depth)[1:]]


def _write_set(name: str, value: Any, told: Tagged, depth: int) -> list[Any]:
    return [name, *sorted((tag(part, told, depth) for part in value), key=repr)]


def _write_array(value: Any, told: Tagged, depth: int) -> list[Any]:
    shape = list(value.shape)
    if value.dtype.hasobject and value.dtype == object:
        return ["objects", shape, [tag(part, told, depth) for part in value.flat]]
    little = np.ascontiguousarray(value.astype(value.dtype.newbyteorder("<"), copy=False)).reshape(value.shape)
    code = little.dtype.str
    if _TEXT.fullmatch(code) and _is_even(texts := [str(part) for part in little.flat]):
        return ["text", code, shape, texts]
    if not _NUMBERS.fullmatch(code):
        raise _unwritten(f"an array of {value.dtype}")
    if little.size >= LARGE and little.dtype.kind in "biuf":
        told.arrays.append(little.copy())
        return ["beside", code, len(told.arrays) - 1]
    return ["array", code, shape, _encode(little.tobytes())]


def _write_scalar(value: Any, told: Tagged, depth: int) -> list[Any]:
    return ["scalar", *_write_array(np.asarray(value), told, depth)]


def _write_tensor(value: torch.Tensor, told: Tagged, depth: int) -> list[Any]:
    if value.dtype == torch.bfloat16:
        raise _unwritten("a tensor of bfloat16 among its attributes")
    return ["tensor", *_write_array(value.detach().cpu().numpy(), told, depth)]


def _write_index(value: Any, told: Tagged, depth: int) -> list[Any]:
    if isinstance(value, pd.RangeIndex):
        return ["range", value.start, value.stop, value.step, tag(value.name, told, depth)]
    if isinstance(value, pd.MultiIndex) or not isinstance(value.dtype, np.dtype):
        raise _unwritten(f"an index of {value.dtype}")
    return ["index", tag(value.name, told, depth), *_write_array(value.to_numpy(), told, depth)]


_WRITERS: Mapping[type, Callable[[Any, Tagged, int], list[Any]]] = {
    int: lambda value, _told, _depth: ["int", hex(value)],
    dict: lambda value, told, depth: _write_pairs("dict", value, told, depth),
    OrderedDict: lambda value, told, depth: _write_pairs("ordered", value, told, depth),
    defaultdict: _write_defaultdict,
    tuple: lambda value, told, depth: ["tuple", *(tag(part, told, depth) for part in value)],
    set: lambda value, told, depth: _write_set("set", value, told, depth),
    frozenset: lambda value, told, depth: _write_set("frozenset", value, told, depth),
    slice: lambda value, told, depth: ["slice", *(tag(p, told, depth) for p in (value.start, value.stop, value.step))],
    bytes: lambda value, _told, _depth: ["bytes", _encode(value)],
    np.ndarray: _write_array,
    torch.Tensor: _write_tensor,
    torch.nn.Parameter: _write_tensor,
}


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


def untag(value: Any, told: Tagged, depth: int = 0) -> Any:
    """The value that :func:`tag` wrote.

    Raises
    ------
    ValueError, TypeError, LookupError
        If it is nothing that :func:`tag` writes.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"a value of more than {MAX_DEPTH} levels")
    if isinstance(value, list):
        return [untag(part, told, depth + 1) for part in value]
    if not isinstance(value, dict):
        return value
    if _TAG not in value:
        return {key: untag(part, told, depth + 1) for key, part in value.items()}
    if len(value) != 1 or not isinstance(value[_TAG], list) or not value[_TAG]:
        raise ValueError("a tag that is not alone")
    name, *parts = value[_TAG]
    if not isinstance(name, str) or name not in _READERS:
        raise ValueError(f"an unknown tag {str(name)[:40]!r}")
    return _READERS[name](parts, told, depth + 1)


def _read_pairs(make: Any, parts: list[Any], told: Tagged, depth: int) -> Any:
    found = make()
    for key, part in parts:
        found[_key(untag(key, told, depth))] = untag(part, told, depth)
    if len(found) != len(parts):
        raise ValueError("a dictionary with one key twice")
    return found


def _key(value: Any) -> Any:
    parts = value if type(value) is tuple else (value,)
    if not all(isinstance(part, str | int | float | bool | bytes | None | np.generic) for part in parts):
        raise TypeError("a key that is not plain")
    return value


def _read_defaultdict(parts: list[Any], told: Tagged, depth: int) -> Any:
    factory, *pairs = parts
    return _read_pairs(lambda: defaultdict(_FACTORIES[factory]), pairs, told, depth)


def _read_tuple(parts: list[Any], told: Tagged, depth: int) -> tuple[Any, ...]:
    return tuple(untag(part, told, depth) for part in parts)


def _read_slice(parts: list[Any], told: Tagged, depth: int) -> slice:
    start, stop, step = _read_tuple(parts, told, depth)
    return slice(start, stop, step)


def _read_int(parts: list[Any], _told: Tagged, _depth: int) -> int:
    (text,) = parts
    if not re.fullmatch(r"-?0x[0-9a-f]{1,1024}", text):
        raise ValueError("a number that is none")
    return int(text, 16)


def _read_float(parts: list[Any], _told: Tagged, _depth: int) -> float:
    (text,) = parts
    if text not in ("nan", "inf", "-inf"):
        raise ValueError("a number that is none")
    return float(text)


def _read_bytes(parts: list[Any], _told: Tagged, _depth: int) -> bytes:
    (text,) = parts
    return base64.b64decode(text, validate=True)


def _read_array(parts: list[Any], _told: Tagged, _depth: int) -> np.ndarray[Any, Any]:
    code, shape, text = parts
    if not _NUMBERS.fullmatch(code):
        raise ValueError("an array of a type that is not plain")
    data, dtype = base64.b64decode(text, validate=True), np.dtype(code)
    if len(data) != _size(shape) * dtype.itemsize:
        raise ValueError("an array whose data has not the size of its shape")
    flat = np.frombuffer(data, np.uint8).astype(bool) if code == "|b1" else np.frombuffer(data, dtype)
    return flat.reshape(shape).copy()


def _read_beside(parts: list[Any], told: Tagged, _depth: int) -> np.ndarray[Any, Any]:
    code, position = parts
    if type(position) is not int or not 0 <= position < len(told.arrays):
        raise ValueError("an array that is not beside the weights")
    found = told.arrays[position]
    if found.dtype.str != code:
        raise ValueError("an array of another type than is told")
    return found.copy()


def _read_texts(parts: list[Any], _told: Tagged, _depth: int) -> np.ndarray[Any, Any]:
    code, shape, texts = parts
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts) or len(texts) != _size(shape):
        raise ValueError("texts of another number than is told")
    if not _TEXT.fullmatch(code) or not _is_even(texts, int(code[2:])):
        raise ValueError("texts of another width than is told")
    return np.array(texts, code).reshape(shape)


def _is_even(texts: list[str], width: int = 0) -> bool:
    """Whether texts fill an array of theirs: numpy gives each the width of the longest, or of what a file claims."""
    longest = max(width, *(len(text) for text in texts)) if texts else width
    return longest * len(texts) <= 64 * sum(len(text) for text in texts) + (1 << 20)


def _read_objects(parts: list[Any], told: Tagged, depth: int) -> np.ndarray[Any, Any]:
    shape, values = parts
    if not isinstance(values, list) or len(values) != _size(shape):
        raise ValueError("an array whose data has not the size of its shape")
    found = np.empty(len(values), object)
    for i, value in enumerate(values):
        found[i] = untag(value, told, depth)
    return found.reshape(shape)


def _size(shape: Any) -> int:
    if not isinstance(shape, list) or len(shape) > 32 or not all(type(n) is int and 0 <= n < 1 << 40 for n in shape):
        raise ValueError("an array without a shape")
    return math.prod(shape)


def _read_any_array(parts: list[Any], told: Tagged, depth: int) -> np.ndarray[Any, Any]:
    name, *rest = parts
    found: np.ndarray[Any, Any] = _ARRAYS[name](rest, told, depth)
    return found


def _read_scalar(parts: list[Any], told: Tagged, depth: int) -> Any:
    array = _read_any_array(parts, told, depth)
    if array.shape != () or array.dtype == object:
        raise ValueError("a scalar that is an array")
    return array[()]


def _read_range(parts: list[Any], told: Tagged, depth: int) -> pd.RangeIndex:
    start, stop, step, name = parts
    if not all(type(bound) is int and abs(bound) < 1 << 62 for bound in (start, stop, step)):
        raise ValueError("a range without bounds")
    return pd.RangeIndex(start, stop, step, name=_key(untag(name, told, depth)))


def _read_index(parts: list[Any], told: Tagged, depth: int) -> Any:
    name, *rest = parts
    array = _read_any_array(rest, told, depth)
    if array.ndim != 1:
        raise ValueError("an index that is not made of an array of one dimension")
    return pd.Index(array, dtype=array.dtype, name=_key(untag(name, told, depth)))


_ARRAYS: Mapping[str, Callable[[list[Any], Tagged, int], Any]] = {
    "array": _read_array,
    "beside": _read_beside,
    "text": _read_texts,
    "objects": _read_objects,
}
_READERS: Mapping[str, Callable[[list[Any], Tagged, int], Any]] = {
    **_ARRAYS,
    "int": _read_int,
    "float": _read_float,
    "dict": lambda parts, told, depth: _read_pairs(dict, parts, told, depth),
    "ordered": lambda parts, told, depth: _read_pairs(OrderedDict, parts, told, depth),
    "defaultdict": _read_defaultdict,
    "tuple": _read_tuple,
    "set": lambda parts, told, depth: {_key(part) for part in _read_tuple(parts, told, depth)},
    "frozenset": lambda parts, told, depth: frozenset(_key(part) for part in _read_tuple(parts, told, depth)),
    "slice": _read_slice,
    "bytes": _read_bytes,
    "scalar": _read_scalar,
    "tensor": lambda parts, told, depth: torch.from_numpy(_read_any_array(parts, told, depth)),
    "range": _read_range,
    "index": _read_index,
}
