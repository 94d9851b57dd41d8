"""A pickle machine that builds the values of saved models and can do nothing else.

It resolves names through the table of :mod:`scviaduct.references.saved.allowed`; every operation that could allocate
what a stranger claims, or take a time that grows as a power of the file's length, is checked or missing.
"""

from __future__ import annotations

import pickle
import reprlib
from collections import OrderedDict, defaultdict
from itertools import chain
from typing import TYPE_CHECKING, Any, override

import numpy as np
import pandas as pd

from scviaduct.errors import ScviaductError
from scviaduct.references.saved.allowed import STORAGES, Storage, Table, resolve, set_state

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

MAX_OPERATIONS = 100_000_000
"""Operations of one pickle: a byte of it can make 64 bytes of objects. A model of a million peaks takes 6 million, one
that keeps a label for each of 40 million cells 80 million."""
MAX_NODES = 100_000_000
MAX_TEXT = 1 << 32
MAX_DEPTH = 100
_SCALARS = (str, bytes, int, float, bool, type(None), np.generic)

# The unpickler that is written in Python: the one written in C sets states unchecked, and takes 64 GiB for nine bytes
# (an entry of the memo at 2**32). The pickle of a model is read in 30 ms all the same.
_PurePython: Any = vars(pickle)["_Unpickler"]
_NEVER_WRITTEN = (
    pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER
)  # fmt: skip
"""Operations that go past :meth:`Unpickler.find_class` or allocate what they claim; ``torch.save`` writes none."""


class Unpickler(_PurePython):
    """Resolves names through the table, and storages through a function.

    Parameters
    ----------
    file
        Open for reading bytes.
    refuse
        Makes the error of a reason.
    storage
        Gives the flat tensor of a storage of a type, a key and a number of elements; None where there is none.
    """

    def __init__(
        self,
        file: Any,
        refuse: Callable[[str], ScviaductError],
        storage: Callable[[torch.dtype, str, int], torch.Tensor] | None = None,
    ) -> None:
        super().__init__(file, encoding="utf-8")
        self._refuse = refuse
        self._storage = storage
        self.operations = 0

    def read(self) -> Any:
        """Read the value.

        Raises
        ------
        ScviaductError
            As ``refuse`` makes it, whatever is wrong with the pickle.
        """
        try:
            value = self.load()
            check_size(value)
        except ScviaductError:
            raise
        # A pickle from a stranger can break the machine that reads it in any way; whatever it raises is a refusal.
        except Exception as error:
            told = f"{type(error).__name__}: {str(error)[:200]}"
            raise self._refuse(f"its pickle cannot be read ({told})") from error
        return value

    @override
    def find_class(self, module_name: str, global_name: str) -> Any:
        found = resolve(module_name, global_name)
        if found is not None:
            return found
        name = f"{module_name}.{global_name}"
        if module_name.partition(".")[0] in ("jax", "jaxlib", "flax"):
            raise self._refuse(f"it names {name}: it was trained with JAX, and scvi-tools of today reads PyTorch alone")
        raise self._refuse(f"it names {name}, which no scvi-tools model needs")

    @override
    def persistent_load(self, pid: Any) -> Storage:
        if self._storage is None:
            raise self._refuse("it refers to a storage, and has none")
        kind, storage_type, key, _location, numel = pid
        known = isinstance(key, str) and any(storage_type is dtype for dtype in STORAGES.values())
        if not known or kind != "storage" or not isinstance(numel, int):
            raise self._refuse(f"it refers to {reprlib.repr(pid)}")
        return Storage(self._storage(storage_type, key, numel))

    def _build(self) -> None:
        state = self.stack.pop()
        set_state(self.stack[-1], state)

    def _reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = _call(self.stack[-1], arguments)

    @override
    def _instantiate(self, klass: Any, args: Any) -> None:
        self.append(_call(klass, args))

    def _set_item(self) -> None:
        _check_keys(self.stack[-2:-1])
        _PurePython.load_setitem(self)

    def _set_items(self) -> None:
        _check_keys(self.stack[::2])
        _PurePython.load_setitems(self)

    def _dict(self) -> None:
        _check_keys(self.stack[::2])
        _PurePython.load_dict(self)

    def _add_items(self) -> None:
        _check_keys(self.stack)
        _PurePython.load_additems(self)

    def _frozen_set(self) -> None:
        _check_keys(self.stack)
        _PurePython.load_frozenset(self)

    dispatch = {
        code: operation for code, operation in _PurePython.dispatch.items() if bytes([code]) not in _NEVER_WRITTEN
    } | {
        pickle.BUILD[0]: _build,
        pickle.REDUCE[0]: _reduce,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        pickle.DICT[0]: _dict,
        pickle.ADDITEMS[0]: _add_items,
        pickle.FROZENSET[0]: _frozen_set,
    }


def _counted(operation: Callable[[Any], None]) -> Callable[[Any], None]:
    def run(machine: Unpickler) -> None:
        machine.operations += 1
        if machine.operations > MAX_OPERATIONS:
            raise ValueError(f"more than {MAX_OPERATIONS:,} operations")
        operation(machine)

    return run


Unpickler.dispatch = {code: _counted(operation) for code, operation in Unpickler.dispatch.items()}


def _call(function: Any, arguments: Any) -> Any:
    """Call what is on the table; a dictionary is made of nothing, of its factory, or of pairs with plain keys."""
    if (function is dict or function is OrderedDict) and arguments:
        (pairs,) = arguments
        if type(pairs) is not list or not all(type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs):
            raise TypeError("a dictionary that is not made of pairs")
        _check_keys([key for key, _ in pairs])
    if function is defaultdict and len(arguments) > 1:
        raise TypeError("a defaultdict that is made of more than its factory")
    return function(*arguments)


def _check_keys(keys: Any) -> None:
    """Refuse keys whose hash takes a time of its own: a pair of a pair of ... of 60 pairs is 2**60 of them."""
    for key in keys:
        parts = key if type(key) is tuple else (key,)
        if not all(isinstance(part, _SCALARS) for part in parts):
            raise TypeError(f"a key that is a {type(key).__name__}")


def check_size(value: Any) -> None:
    """Refuse a value that is larger written out than it is in memory: lists of one list, many times over.

    Takes time in proportion to what is in memory: what a container holds is counted once, however often it is held.

    Raises
    ------
    ValueError
        If it has more parts, more text or more levels than a model could, or holds itself.
    """
    counted: dict[int, tuple[int, int]] = {}
    open_: dict[int, Any] = {}
    pending: list[tuple[Any, Any, int, int]] = [(value, iter(_parts(value) or ()), 1, 0)]
    while pending:
        container, parts, nodes, text = pending.pop()
        for part in parts:
            inner = None if id(part) in counted else _parts(part)
            if inner is not None:
                if id(part) in open_ or len(pending) >= MAX_DEPTH:
                    raise ValueError(f"a value of more than {MAX_DEPTH} levels")
                open_[id(part)] = part
                pending += [(container, chain((part,), parts), nodes, text), (part, iter(inner), 1, 0)]
                break
            more, longer = counted.get(id(part), (1, len(part) if isinstance(part, str | bytes) else 0))
            nodes, text = nodes + more, text + longer
        else:
            if nodes > MAX_NODES or text > MAX_TEXT:
                raise ValueError("a value that is too large when it is written out")
            counted[id(container)] = nodes, text
            open_.pop(id(container), None)


def _parts(value: Any) -> Any:
    """What a container holds; None for anything else."""
    if isinstance(value, dict):
        return (part for item in value.items() for part in item)
    if isinstance(value, list | tuple | set | frozenset):
        return value
    if isinstance(value, np.ndarray) and value.dtype.hasobject:
        return value.flat
    if isinstance(value, pd.Index) and value.dtype == object:
        return (*value, value.name)
    if isinstance(value, slice):
        return (value.start, value.stop, value.step)
    return () if isinstance(value, Table) else None
