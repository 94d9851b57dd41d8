"""Reading ``model.pt`` without running anything in it.

A file written by ``torch.save`` is a zip with a pickle in it, and a pickle can call anything that can be imported.
scvi-tools opens it with ``weights_only=False``; a restricted ``pickle_module`` is no boundary either, because a
TorchScript archive of the same name takes another way. So the zip is read here: only a plain ``torch.save`` archive is
taken, its pickle resolves names through an exact table, and tensors are built from their storages with checked bounds.
"""

from __future__ import annotations

import io
import stat
import struct
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import torch

from scviaduct.errors import UnsafeModelError
from scviaduct.references.saved.unpickler import Unpickler

if TYPE_CHECKING:
    from pathlib import Path

MAX_BYTES = 16 << 30
"""Largest model file that is read; the largest on scvi-hub is below 1 GiB."""
_MAX_PICKLE = 1 << 30
_MAX_MEMBERS = 100_000
_BEGINNING = b"PK\x03\x04"
_HEADER, _FULL = 30, 0xFFFFFFFF
_END = struct.Struct("<4sHHHHIIH")
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
    _check_file(path, MAX_BYTES)
    with path.open("rb") as file:
        if file.read(4) != _BEGINNING:  # zipfile would find an archive behind anything; torch looks here
            raise _refuse(path, "it is not a zip archive (but a bare pickle, a tar or anything else)")
    try:
        with zipfile.ZipFile(path) as archive:
            return _Archive(path, archive).load()
    # zipfile has no end of exceptions for broken headers: NotImplementedError, UnicodeDecodeError, struct.error, ...
    except (zipfile.BadZipFile, RuntimeError, ValueError, OSError, EOFError, struct.error) as error:
        raise _refuse(path, f"it is not a whole zip archive: {error}") from error


def read_pickle(path: Path) -> Any:
    """Read a bare pickle (``attr.pkl`` of scvi-tools before 0.15) with an exact table of names.

    Raises
    ------
    UnsafeModelError
        If it names something that is not on the table, or is no pickle. Nothing in it was executed.
    """
    _check_file(path, _MAX_PICKLE)
    with path.open("rb") as file:
        return Unpickler(file, partial(_refuse, path)).read()


def _check_file(path: Path, largest: int) -> None:
    if not path.is_file():
        raise _refuse(path, "there is no such file")
    if path.stat().st_size > largest:
        raise _refuse(path, f"it has {path.stat().st_size:,} bytes, more than {largest:,}")


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
        self._check_layout(members)
        if f"{root}/data.pkl" not in names:
            raise _refuse(self._path, "it has no data.pkl")
        if "byteorder" in inner and self._archive.read(f"{root}/byteorder") != b"little":
            raise _refuse(self._path, "it was written on a big-endian machine")
        return root

    def _check_layout(self, members: list[zipfile.ZipInfo]) -> None:
        """One file to every reader: nothing before the first member, none in another, and one directory behind them."""
        if min(member.header_offset for member in members) != 0 or self._archive.comment:
            raise _refuse(self._path, "it holds something before its first member or behind its last")
        start = self._archive.start_dir
        members = sorted(members, key=lambda member: member.header_offset)
        ends = [*(member.header_offset for member in members[1:]), start]
        for member, end in zip(members, ends, strict=True):
            if member.header_offset + _HEADER + len(member.orig_filename) + member.file_size > end:
                raise _refuse(self._path, f"member '{member.filename}' lies in another one")
            with self._archive.open(member):  # compares its name with that in its own header
                pass
        with self._path.open("rb") as file:
            file.seek(-_END.size, 2)
            signature, _, _, _, entries, size, offset, _ = _END.unpack(file.read())
            room = file.tell() - _END.size - start
        # Each number may be in the record of 64 bits instead, which torch always writes.
        whole = entries in (len(members), 0xFFFF) and offset in (start, _FULL) and (size <= room or size == _FULL)
        if signature != b"PK\x05\x06" or not whole:
            raise _refuse(self._path, "it has two directories")

    def _check_member(self, member: zipfile.ZipInfo) -> None:
        name = member.filename
        if name.startswith("/") or "\\" in name or ".." in PurePosixPath(name).parts:
            raise _refuse(self._path, f"a member is called '{name}'")
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise _refuse(self._path, f"member '{name}' is compressed")
        if member.flag_bits & 0x1:
            raise _refuse(self._path, f"member '{name}' is encrypted")
        if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
            raise _refuse(self._path, f"member '{name}' is a link or a device")

    def load(self) -> Any:
        member = self._archive.getinfo(f"{self._root}/data.pkl")
        if member.file_size > _MAX_PICKLE:
            raise _refuse(self._path, f"its pickle has {member.file_size:,} bytes")
        # From memory: a member of a zip is read in Python, byte by byte, which takes twice as long.
        return Unpickler(io.BytesIO(self._archive.read(member)), self.refuse, self.storage).read()

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
