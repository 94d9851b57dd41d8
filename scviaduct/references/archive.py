"""Reading ``model.pt`` without running anything in it.

A file written by ``torch.save`` is a zip with a pickle in it, and a pickle can call anything that can be imported.
scvi-tools opens it with ``weights_only=False``; a restricted ``pickle_module`` is no boundary either, because a
TorchScript archive of the same name takes another way. So the zip is read here: only a plain ``torch.save`` archive is
taken, its pickle resolves names through an exact table, and tensors are built from their storages with checked bounds.
"""

from __future__ import annotations

import pickle
import reprlib
import struct
import zipfile
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, override

import torch

from scviaduct.errors import UnsafeModelError
from scviaduct.references.allowed import STORAGES, Storage, resolve, set_state

if TYPE_CHECKING:
    from pathlib import Path

MAX_BYTES = 16 << 30
"""Largest model file that is read; the largest on scvi-hub is below 1 GiB."""
_MAX_PICKLE = 1 << 30
_MAX_MEMBERS = 100_000
_BEGINNING = b"PK\x03\x04"
_TORCHSCRIPT = ("constants.pkl", "code/", "attributes.pkl")


@dataclass(frozen=True, slots=True)
class SavedModel:
    """What scvi-tools saved.

    Attributes
    ----------
    state_dict
        Parameter name to tensor, on the CPU.
    var_names
        Genes, in the order of the first layer; for a model of several modalities, a dictionary of them.
    attr_dict
        Everything else: ``registry_``, ``init_params_``, training history and so on.
    """

    state_dict: dict[str, torch.Tensor]
    var_names: Any
    attr_dict: dict[str, Any]


def read_model_file(path: Path) -> SavedModel:
    """Read a model that scvi-tools (0.15 or later) saved.

    Raises
    ------
    UnsafeModelError
        If the file is anything but a plain ``torch.save`` archive, or its pickle names something that is not on the
        table. Nothing in it was executed.
    """
    value = read_archive(path)
    if not isinstance(value, dict) or not {"model_state_dict", "var_names", "attr_dict"} <= value.keys():
        raise _refuse(path, "it does not hold what scvi-tools saves (model_state_dict, var_names, attr_dict)")
    state, attributes = value["model_state_dict"], value["attr_dict"]
    if not isinstance(state, dict) or not isinstance(attributes, dict):
        raise _refuse(path, "its model_state_dict or attr_dict is not a dictionary")
    # scvi-tools keeps Pyro's parameters, which no VAE has, in the place of a tensor.
    tensors = {str(key): tensor for key, tensor in state.items() if key != "pyro_param_store"}
    strange = next((key for key, tensor in tensors.items() if not isinstance(tensor, torch.Tensor)), None)
    if strange is not None:
        raise _refuse(path, f"its weights hold '{strange}', which is no tensor")
    return SavedModel(tensors, value["var_names"], attributes)


def read_archive(path: Path) -> Any:
    """Unpickle a ``torch.save`` archive with an exact table of names.

    Raises
    ------
    UnsafeModelError
        See :func:`read_model_file`.
    """
    if not path.is_file():
        raise _refuse(path, "there is no such file")
    if path.stat().st_size > MAX_BYTES:
        raise _refuse(path, f"it has {path.stat().st_size:,} bytes, more than {MAX_BYTES:,}")
    with path.open("rb") as file:
        if file.read(4) != _BEGINNING:  # zipfile would find an archive behind anything; torch looks here
            raise _refuse(path, "it is not a zip archive (but a bare pickle, a tar or anything else)")
    try:
        with zipfile.ZipFile(path) as archive:
            return _Archive(path, archive).load()
    # zipfile has no end of exceptions for broken headers: NotImplementedError, UnicodeDecodeError, struct.error, ...
    except (zipfile.BadZipFile, RuntimeError, ValueError, OSError, EOFError, struct.error) as error:
        raise _refuse(path, f"it is not a whole zip archive: {error}") from error


def _refuse(path: Path, reason: str) -> UnsafeModelError:
    return UnsafeModelError(
        f"'{path}' was refused, and nothing in it was executed: {reason}.",
        "Take the model from its publisher again, or save it again with a current scvi-tools.",
    )


class _Archive:
    """The members of a ``torch.save`` zip, checked before any is read."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self._path = path
        self._archive = archive
        self._root = self._check()
        self._storages: dict[str, torch.Tensor] = {}

    def _check(self) -> str:
        members = self._archive.infolist()
        if not members or len(members) > _MAX_MEMBERS:
            raise _refuse(self._path, f"it has {len(members)} members")
        names = [member.filename for member in members]
        if len(set(names)) != len(names):
            raise _refuse(self._path, "it holds two members of one name")
        roots = {name.split("/")[0] for name in names}
        if len(roots) != 1:
            raise _refuse(self._path, f"its members lie in {len(roots)} folders instead of one")
        root = roots.pop()
        inner = [name.removeprefix(f"{root}/") for name in names]
        script = [name for name in inner if name.startswith(_TORCHSCRIPT)]
        if script:
            raise _refuse(self._path, f"it is a TorchScript archive, which holds code ({script[0]})")
        for member in members:
            self._check_member(member)
        if f"{root}/data.pkl" not in names:
            raise _refuse(self._path, "it has no data.pkl")
        if "byteorder" in inner and self._archive.read(f"{root}/byteorder") != b"little":
            raise _refuse(self._path, "it was written on a big-endian machine")
        if sum(member.file_size for member in members) > self._path.stat().st_size:
            raise _refuse(self._path, "its members claim more bytes than the file has")
        return root

    def _check_member(self, member: zipfile.ZipInfo) -> None:
        name = member.filename
        if name.startswith("/") or "\\" in name or ".." in PurePosixPath(name).parts:
            raise _refuse(self._path, f"a member is called '{name}'")
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise _refuse(self._path, f"member '{name}' is compressed")
        if member.flag_bits & 0x1:
            raise _refuse(self._path, f"member '{name}' is encrypted")

    def load(self) -> Any:
        member = self._archive.getinfo(f"{self._root}/data.pkl")
        if member.file_size > _MAX_PICKLE:
            raise _refuse(self._path, f"its pickle has {member.file_size:,} bytes")
        try:
            with self._archive.open(member) as file:
                return _Unpickler(file, self).load()
        except UnsafeModelError:
            raise
        # A pickle from a stranger can break the machine that reads it in any way; whatever it raises is a refusal.
        except Exception as error:
            raise _refuse(self._path, f"its pickle cannot be read ({type(error).__name__}: {error})") from error

    def refuse(self, reason: str) -> UnsafeModelError:
        return _refuse(self._path, reason)

    def storage(self, dtype: torch.dtype, key: str, numel: int) -> torch.Tensor:
        """Storage of a tensor, as a flat tensor of its own memory."""
        if key not in self._storages:
            if not key.isdigit():
                raise self.refuse(f"a storage is called '{key}'")
            data = self._archive.read(f"{self._root}/data/{key}")
            if len(data) != numel * dtype.itemsize:
                raise self.refuse(f"storage {key} has {len(data):,} bytes instead of {numel * dtype.itemsize:,}")
            flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
            self._storages[key] = flat
        if self._storages[key].dtype != dtype:
            raise self.refuse(f"storage {key} is read as two types")
        return self._storages[key]


# The unpickler that is written in Python: the one written in C sets states unchecked, and takes 64 GiB for nine bytes
# (an entry of the memo at 2**32). The pickle of a model is read in 30 ms all the same.
_PurePython: Any = vars(pickle)["_Unpickler"]
_NEVER_WRITTEN = (
    pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER
)  # fmt: skip
"""Operations that go past :meth:`_Unpickler.find_class` or allocate what they claim; ``torch.save`` writes none."""


class _Unpickler(_PurePython):
    """Resolves names through the table, and storages through the archive."""

    def __init__(self, file: Any, archive: _Archive) -> None:
        super().__init__(file, encoding="utf-8")
        self._zip = archive

    @override
    def find_class(self, module_name: str, global_name: str) -> Any:
        found = resolve(module_name, global_name)
        if found is None:
            raise self._zip.refuse(f"it names {module_name}.{global_name}, which no scvi-tools model needs")
        return found

    @override
    def persistent_load(self, pid: Any) -> Storage:
        kind, storage_type, key, _location, numel = pid
        if kind != "storage" or storage_type not in STORAGES.values() or not isinstance(numel, int):
            raise self._zip.refuse(f"it refers to {reprlib.repr(pid)}")
        return Storage(self._zip.storage(storage_type, str(key), numel))

    def _build(self) -> None:
        state = self.stack.pop()
        set_state(self.stack[-1], state)

    dispatch = {
        code: operation for code, operation in _PurePython.dispatch.items() if bytes([code]) not in _NEVER_WRITTEN
    } | {pickle.BUILD[0]: _build}
