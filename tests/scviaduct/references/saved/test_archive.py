"""What is refused of a ``model.pt``, and that nothing in it has run by then.

Every payload leaves a canary (a file) when it runs; a control opens the same file as scvi-tools would, and sees it.
"""

from __future__ import annotations

import builtins
import copyreg
import importlib
import os
import pickle
import struct
import subprocess
import tarfile
import tracemalloc
import warnings
import zipfile
from collections import OrderedDict, defaultdict

import numpy as np
import pandas as pd
import pytest
import torch

from scviaduct.errors import UnsafeModelError
from scviaduct.references.saved.archive import read_archive, read_model_file

CELLS, GENES = 4, 3


def parts():
    """What scvi-tools saves, in small."""
    weights = OrderedDict({"weight": torch.arange(12.0).reshape(CELLS, GENES), "steps": torch.tensor(7)})
    history = {"elbo_train": pd.DataFrame({"elbo_train": [3.0, 2.0]}, index=pd.Index([0, 1], name="epoch"))}
    registry = {"model_name": "SCVI", "field_registries": defaultdict(dict), "n": np.float64(2.5)}
    attributes = {"registry_": registry, "history_": history, "train_indices_": np.arange(4), "is_trained_": True}
    return {"model_state_dict": weights, "var_names": np.array(["A", "B", "C"], object), "attr_dict": attributes}


def saved(path, value):
    torch.save(value, path)
    return path


def zipped(path, pickled=None, storages=(), root="model", **members):
    """An archive as ``torch.save`` lays it out, of any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{root}/data.pkl", pickle.dumps(parts(), 2) if pickled is None else pickled)
        archive.writestr(f"{root}/byteorder", "little")
        for i, data in enumerate(storages):
            archive.writestr(f"{root}/data/{i}", data)
        for name, data in members.items():
            archive.writestr(f"{root}/{name}", data)
    return path


def refused(path):
    with pytest.raises(UnsafeModelError) as caught:
        read_model_file(path)
    told = str(caught.value)
    assert told.startswith(f"'{path}' was refused, and nothing in it was executed: ")
    assert told.endswith("Take the model from its publisher again, or save it again with a current scvi-tools.")
    return told


class Calls:
    """Unpickles into ``function(*arguments)``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call

    def __call__(self):
        raise AssertionError  # only for pickle, which asks that what it is to call can be called


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


# --- calls -----------------------------------------------------------------------------------------------------------

PAYLOADS = {
    "posix.system": lambda path: Calls(os.system, f"touch {path}"),
    "builtins.eval": lambda path: Calls(builtins.eval, f"open({str(path)!r}, 'w').close()"),
    "builtins.exec": lambda path: Calls(builtins.exec, f"open({str(path)!r}, 'w').close()"),
    "subprocess.check_call": lambda path: Calls(subprocess.check_call, ["touch", str(path)]),
    "builtins.getattr": lambda path: Calls(
        Calls(builtins.getattr, Calls(importlib.import_module, "os"), "system"), f"touch {path}"
    ),
    "pandas.core.computation.eval.eval": lambda path: Calls(
        pd.eval, f"@f({str(path)!r})", "pandas", "python", pd.api.extensions.no_default, {"f": Calls(eval, "open")}
    ),
}
PLACES = {
    "alone": lambda payload: payload,
    "in the weights": lambda payload: parts() | {"model_state_dict": OrderedDict(weight=payload)},
    "as var_names": lambda payload: parts() | {"var_names": payload},
    "among the genes": lambda payload: parts() | {"var_names": np.array(["A", payload, "C"], object)},
    "in the history": lambda payload: parts() | {"attr_dict": {"history_": pd.DataFrame({"a": [payload]})}},
    "in the registry": lambda payload: parts() | {"attr_dict": {"registry_": {"fields": [({"x": payload},)]}}},
    "after everything": lambda payload: parts() | {"zzz": payload},
}


@pytest.mark.parametrize("name", ["posix.system", "builtins.eval", "builtins.exec", "subprocess.check_call"])
def test_the_canaries_sing(tmp_path, canary, name):
    torch.load(saved(tmp_path / "model.pt", PAYLOADS[name](canary)), weights_only=False)
    assert canary.exists()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", PAYLOADS)
def test_calls_are_refused_by_name(tmp_path, canary, name, place):
    told = refused(saved(tmp_path / "model.pt", PLACES[place](PAYLOADS[name](canary))))
    # Pickles of protocol 2 hold the names of Python 2.
    assert f"it names {name}," in told.replace("__builtin__", "builtins").replace("commands", "subprocess")
    assert not canary.exists()


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (torch.load, ("x",)),
        (torch.jit.load, ("x",)),
        (np.load, ("x", None, True)),
        (pd.read_pickle, ("x",)),
        (pickle.loads, (b"N.",)),
        (bytearray, (10,)),
        (range, (10,)),
        (importlib.import_module, ("antigravity",)),
        (pd.DataFrame.to_pickle, (pd.DataFrame(), "x")),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_what_reaches_further_is_refused(tmp_path, function, arguments):
    assert "which no scvi-tools model needs" in refused(saved(tmp_path / "model.pt", Calls(function, *arguments)))


def named(module, name):
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def text(value):
    return pickle.SHORT_BINUNICODE + bytes([len(value.encode())]) + value.encode()


TOUCH = b"(X\x05\x00\x00\x00touch"
NAMES = {
    "a dotted name": (
        b"\x80\x04" + text("collections") + text("OrderedDict.__init__") + b"\x93.",
        "OrderedDict.__init__",
    ),
    "globals of ours": (named("torch._utils", "_rebuild_tensor_v2.__globals__") + b".", "__globals__"),
    "a module of a module": (named("torch", "os.system") + b"(tR.", "torch.os.system"),
    "a relative of an allowed one": (named("torch._utils", "_rebuild_qtensor") + b".", "_rebuild_qtensor"),
    "the untyped storage": (named("torch", "UntypedStorage") + b".", "torch.UntypedStorage"),
    "wide letters": (b"\x80\x04" + text("\uff4f\uff53") + text("system") + b"\x93.", "\uff4f\uff53.system"),
    "an invisible letter": (
        b"\x80\x04" + text("collections") + text("OrderedDict\u200b") + b"\x93.",
        "OrderedDict\u200b",
    ),
    "another case": (named("Collections", "OrderedDict") + b".", "Collections.OrderedDict"),
    "a space": (named("collections ", "OrderedDict") + b".", "collections .OrderedDict"),
    "no module": (named("", "OrderedDict") + b".", ".OrderedDict"),
    "what python 2 called it": (named("__builtin__", "apply") + b".", "__builtin__.apply"),
    "an instance": (TOUCH + b"iposix\nsystem\n.", "posix.system"),
    "an object": (b"(" + named("posix", "system") + TOUCH + b"o.", "posix.system"),
    "a new object": (named("pathlib", "Path") + b")\x81.", "pathlib.Path"),
    "named after the stop": (b"N" + named("posix", "system") + b".", "posix.system"),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_are_exact(tmp_path, case):
    pickled, told = NAMES[case]
    assert f"{told}, which no scvi-tools model needs" in refused(zipped(tmp_path / "model.pt", pickled))


def test_the_registry_of_extensions_is_not_asked(tmp_path, canary):
    copyreg.add_extension("posix", "system", 240)
    try:
        pickled = pickle.EXT1 + bytes([240]) + pickle.SHORT_BINUNICODE + bytes([6 + len(str(canary))])
        path = zipped(tmp_path / "model.pt", pickled + f"touch {canary}".encode() + b"\x85R.")
        pickle.loads(
            zipfile.ZipFile(path).read("model/data.pkl")
        )  # it is a payload, and it is in the cache from now on
        assert canary.exists()
        canary.unlink()
        refused(path)
        assert not canary.exists()
    finally:
        copyreg.remove_extension("posix", "system", 240)


# --- states ----------------------------------------------------------------------------------------------------------


class Raw:
    """Unpickles into ``function(*arguments)`` with a state."""

    def __init__(self, function, arguments, state):
        self.call = function, arguments, state

    def __reduce__(self):
        return self.call


DTYPE = (np.dtype, ("V8", False, True))
ARRAY = np.arange(2).__reduce__()[:2]
OBJECTS = (np.dtype, ("O8", False, True))
STATES = {
    "bytes as pointers": (Raw(*DTYPE, (3, "|", None, ("a",), {"a": (np.dtype(object), 0)}, 8, 1, 0)), "not plain"),
    "fields": (Raw(np.dtype, ("i8",), (3, "|", None, ("a",), {"a": (np.dtype(object), 0)}, 8, 1, 0)), "has fields"),
    "another byte order": (np.arange(2, dtype=">i8"), "byte order"),
    "a date": (np.array(["2020-01-01"], "M8[D]"), "not plain"),
    "a record": (np.zeros(2, [("a", "i4"), ("b", "f8")]), "not plain"),
    "a list of types": (Raw(np.dtype, ("i4,O",), None), "not plain"),
    "too little data": (Raw(*ARRAY, (1, (9,), np.dtype("i8"), False, b"12345678")), "size of its shape"),
    "too few objects": (Raw(*ARRAY, (1, (9,), np.dtype(object), False, [1])), "size of its shape"),
    "bytes for objects": (Raw(*ARRAY, (1, (1,), np.dtype(object), False, b"12345678")), "size of its shape"),
    "a negative shape": (Raw(*ARRAY, (1, (-2, -2), np.dtype("u1"), False, b"1234")), "without a shape"),
    "no shape": (Raw(*ARRAY, (1, None, np.dtype("u1"), False, b"1234")), "without a shape"),
}


@pytest.mark.parametrize("case", STATES)
def test_states_that_break_memory_are_refused(tmp_path, case):
    value, told = STATES[case]
    assert told in refused(saved(tmp_path / "model.pt", parts() | {"var_names": value}))


def test_an_array_is_filled_once(tmp_path):
    """What views the array (here an index) would look into memory that was given back."""
    state = pickle.dumps((1, (2,), np.dtype("i8"), False, bytes(16)), 2)[2:-1]
    array = named("numpy.core.multiarray", "_reconstruct") + b"(" + named("numpy", "ndarray") + b"K\x00\x85C\x01btR"
    assert read_archive(zipped(tmp_path / "once.pt", b"\x80\x03" + array + state + b"b.")).tolist() == [0, 0]
    assert "filled twice" in refused(zipped(tmp_path / "model.pt", b"\x80\x03" + array + state + b"b" + state + b"b."))


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        (named("collections", "OrderedDict"), "type"),
        (named("torch._utils", "_rebuild_tensor_v2"), "function"),
        (named("numpy", "ndarray"), "_Array"),
        (named("pandas.core.frame", "DataFrame"), "type"),
        (named("torch", "FloatStorage"), "dtype"),
        (b"}", "dict"),
    ],
    ids=["class", "function", "array", "table", "storage", "dict"],
)
@pytest.mark.parametrize(
    "state", [b"}X\x01\x00\x00\x00aK\x01s", b"N}X\x01\x00\x00\x00aK\x01s\x86"], ids=["dict", "slots"]
)
def test_what_is_on_the_table_takes_no_state(tmp_path, target, kind, state):
    assert f"a {kind} that is given a state" in refused(zipped(tmp_path / "model.pt", target + state + b"b."))
    assert read_model_file(saved(tmp_path / "honest.pt", parts())).var_names.tolist() == ["A", "B", "C"]


def test_tables_are_not_built(tmp_path):
    """The parts of a table say where their rows lie; pandas believes them."""
    history = read_model_file(saved(tmp_path / "model.pt", parts())).attr_dict["history_"]
    assert not isinstance(history["elbo_train"], pd.DataFrame)


# --- bombs -----------------------------------------------------------------------------------------------------------

HALF = 1 << 29
BOMBS = {
    "an entry of the memo": b"\x80\x02Nr" + struct.pack("<I", 1 << 24) + b".",
    "bytes that are not there": b"\x80\x04\x8e" + struct.pack("<Q", HALF) + b".",
    "text that is not there": b"\x80\x04\x8d" + struct.pack("<Q", HALF) + b".",
    "a bytearray": b"\x80\x05\x96" + struct.pack("<Q", HALF) + b".",
    "bytes of a size": named("__builtin__", "bytes") + b"J" + struct.pack("<i", HALF) + b"\x85R.",
    "a wide type": named("numpy", "dtype") + b"X\x0a\x00\x00\x00V999999999\x85R.",
    "an array of a shape": named("numpy", "ndarray") + b"J" + struct.pack("<i", HALF) + b"\x85\x85R.",
    "an array made anew": named("numpy.core.multiarray", "_reconstruct")
    + b"("
    + named("numpy", "ndarray")
    + b"J"
    + struct.pack("<i", HALF)
    + b"\x85C\x01btR.",
    "a frame": b"\x80\x04\x95" + struct.pack("<Q", HALF) + b"N.",
}


@pytest.mark.parametrize("case", BOMBS)
def test_bombs_take_no_memory(tmp_path, case):
    path = zipped(tmp_path / "model.pt", BOMBS[case])
    refused(path)  # imports what the first refusal imports
    tracemalloc.start()
    try:
        refused(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_reference_that_grows_as_it_is_written_out(tmp_path):
    twice = b"".join(b"(g%d\ng%d\nlp%d\n0" % (i, i, i + 1) for i in range(60))  # written out, 2**60 lists
    assert "it refers to (" in refused(zipped(tmp_path / "model.pt", b"(lp0\n0" + twice + b"(" + b"g60\n" * 5 + b"tQ."))


# --- tensors ---------------------------------------------------------------------------------------------------------


FLOATS = named("torch", "FloatStorage")


def storage(key="0", numel=12, kind="storage", of=FLOATS, width=5):
    """Pickle of a persistent id."""
    number = b"J" + struct.pack("<i", numel)
    items = [text(kind), of, text(key), text("cpu"), number][:width]
    return b"(" + b"".join(items) + b"tQ"


def tensor(offset=0, size=(3, 4), stride=(4, 1), **told):
    """Pickle of a tensor."""
    pack = lambda numbers: b"(" + b"".join(b"J" + struct.pack("<i", n) for n in numbers) + b"t"  # noqa: E731
    rest = b"J" + struct.pack("<i", offset) + pack(size) + pack(stride) + b"\x89" + named("collections", "OrderedDict")
    return b"\x80\x04" + named("torch._utils", "_rebuild_tensor_v2") + b"(" + storage(**told) + rest + b")RtR."


DATA = np.arange(12, dtype="<f4").tobytes()


def test_the_tensor_that_is_varied_below_is_read(tmp_path):
    found = read_archive(zipped(tmp_path / "model.pt", tensor(), [DATA]))
    assert found.tolist() == torch.arange(12.0).reshape(3, 4).tolist()


TENSORS = {
    "more rows": ({"size": (4, 4)}, "outside of its storage"),
    "one element more": ({"offset": 1}, "outside of its storage"),
    "a wide stride": ({"stride": (5, 1)}, "outside of its storage"),
    "a negative offset": ({"offset": -4}, "outside of its storage"),
    "a negative stride": ({"offset": 11, "stride": (-4, -1)}, "outside of its storage"),
    "a negative size": ({"size": (-3, -4)}, "outside of its storage"),
    "fewer strides": ({"stride": (4,)}, "outside of its storage"),
    "more strides": ({"stride": (4, 1, 1)}, "outside of its storage"),
    "sizes that overflow": (
        {"size": (1 << 30, 1 << 30, 1 << 30, 16), "stride": (1, 1, 1, 1)},
        "outside of its storage",
    ),
    "no steps": ({"size": (1 << 30, 1 << 30), "stride": (0, 0)}, "more elements than its storage"),
    "a storage that claims more": ({"numel": 13}, "has 48 bytes instead of 52"),
    "a storage that claims less": ({"numel": 11}, "has 48 bytes instead of 44"),
    "a storage that claims nothing": ({"numel": -12}, "has 48 bytes instead of -48"),
    "another type": ({"of": named("torch", "LongStorage")}, "has 48 bytes instead of 96"),
    "a storage that is missing": ({"key": "7"}, "cannot be read (KeyError"),
    "a storage elsewhere": ({"key": "../data.pkl"}, "a storage is called '../data.pkl'"),
    "no storage": ({"kind": "module"}, "it refers to ('module'"),
    "a type that is no storage": ({"of": named("collections", "OrderedDict")}, "it refers to ('storage'"),
    "a type by name": ({"of": text("FloatStorage")}, "it refers to ('storage'"),
    "half an id": ({"width": 3}, "cannot be read (ValueError"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_stay_in_their_storage(tmp_path, case):
    told, why = TENSORS[case]
    assert why in refused(zipped(tmp_path / "model.pt", tensor(**told), [DATA]))


def test_a_storage_has_one_type(tmp_path):
    one, other = tensor()[:-1], tensor(of=named("torch", "IntStorage"))[2:]
    assert "storage 0 is read as two types" in refused(zipped(tmp_path / "model.pt", one + other, [DATA]))


def test_an_id_in_text_is_refused(tmp_path):
    assert "cannot be read (ValueError" in refused(zipped(tmp_path / "model.pt", b"Pposix.system\n."))


# --- archives --------------------------------------------------------------------------------------------------------


def test_torchscript_runs_nothing(tmp_path, canary):
    """torch.load hands it to torch.jit.load, whatever it was told of weights only or of a pickle module."""

    class Trap(torch.nn.Module):
        def __init__(self, path: str):
            super().__init__()
            self.path = path
            self.made = torch.zeros(4)

        @torch.jit.export
        def __getstate__(self) -> str:
            return self.path

        @torch.jit.export
        def __setstate__(self, path: str) -> None:
            self.training = False
            self.path = path
            self.made = torch.from_file(path, shared=True, size=4)  # makes the file

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and is read all the same
        torch.jit.script(Trap(str(canary))).save(str(tmp_path / "model.pt"))
        torch.jit.load(str(tmp_path / "model.pt"))
        assert canary.exists()
        canary.unlink()
    assert "it is a TorchScript archive, which holds code" in refused(tmp_path / "model.pt")
    assert not canary.exists()


@pytest.mark.parametrize(
    "member", ["constants.pkl", "code/__torch__.py", "code/__torch__.py.debug_pkl", "attributes.pkl"]
)
def test_parts_of_torchscript_are_refused(tmp_path, member):
    assert f"holds code ({member})" in refused(zipped(tmp_path / "model.pt", **{member: b""}))


def as_tar(path):
    """As torch before 1.6 wrote it, and a payload in it."""
    with tarfile.open(path, "w") as tar:
        tar.add(saved(path.with_suffix(".inner"), parts()), "pickle")


def as_pickle(path):
    path.write_bytes(pickle.dumps(Calls(os.system, f"touch {path.with_name('canary')}"), 2))


def as_legacy(path):
    torch.save(Calls(os.system, f"touch {path.with_name('canary')}"), path, _use_new_zipfile_serialization=False)


def as_pickle_before_zip(path):
    """zipfile finds an archive at the end of anything, as it does in a tar."""
    as_pickle(path)
    honest = saved(path.with_suffix(".inner"), parts() | {"zzz": Calls(os.system, f"touch {path.with_name('canary')}")})
    path.write_bytes(path.read_bytes() + honest.read_bytes())


def as_text(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def empty_archive(path):
    zipfile.ZipFile(path, "w").close()


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (as_tar, "it is not a zip archive"),
        (as_pickle, "it is not a zip archive"),
        (as_legacy, "it is not a zip archive"),
        (as_pickle_before_zip, "it is not a zip archive"),
        (as_text, "it is not a zip archive"),
        (lambda path: path.write_bytes(b""), "it is not a zip archive"),
        (lambda path: path.mkdir(), "there is no such file"),
        (lambda path: None, "there is no such file"),
        (empty_archive, "it is not a zip archive"),
    ],
    ids=["tar", "pickle", "legacy", "pickle and zip", "git lfs", "empty", "folder", "none", "empty zip"],
)
def test_other_files_are_refused(tmp_path, canary, make, why):
    make(tmp_path / "model.pt")
    assert why in refused(tmp_path / "model.pt")
    assert not canary.exists()


def members(path, *names, **options):
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", **options) as archive:
        warnings.simplefilter("ignore", UserWarning)  # of two members of one name, which is the point
        for name in names:
            archive.writestr(name, pickle.dumps(parts(), 2))
    return path


MEMBERS = {
    "two of one name": (["model/data.pkl", "model/data.pkl"], "it holds two members of one name"),
    "two folders": (["model/data.pkl", "other/data.pkl"], "lie in 2 folders"),
    "no folder": (["data.pkl"], "it has no data.pkl"),
    "no pickle": (["model/other.pkl"], "it has no data.pkl"),
    "a dot": (["."], "it has no data.pkl"),
    "up": (["../data.pkl"], "a member is called '../data.pkl'"),
    "up from within": (["model/data.pkl", "model/data/../../../x"], "a member is called 'model/data/../../../x'"),
    "from the root": (["/etc/data.pkl"], "a member is called '/etc/data.pkl'"),
    "the other slash": (["model/data.pkl", "model/..\\..\\x"], "a member is called"),
}


@pytest.mark.parametrize("case", MEMBERS)
def test_members_lie_in_one_folder(tmp_path, case):
    names, why = MEMBERS[case]
    assert why in refused(members(tmp_path / "model.pt", *names))


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_members_are_refused(tmp_path, method):
    assert "is compressed" in refused(members(tmp_path / "model.pt", "model/data.pkl", compression=method))


CENTRAL = b"PK\x01\x02"


@pytest.mark.parametrize(
    ("offset", "layout", "value", "why"),
    [
        (8, "<H", 0x1, "is encrypted"),
        (20, "<II", (1 << 30, 1 << 30), "lies in another one"),
        (24, "<I", 1 << 30, "is compressed"),
        (6, "<H", 99, "it is not a whole zip archive"),
        (42, "<I", 7, "before its first member"),
    ],
    ids=["encrypted", "claims more than there is", "claims to grow", "of a later zip", "begins elsewhere"],
)
def test_headers_are_not_believed(tmp_path, offset, layout, value, why):
    data = bytearray(zipped(tmp_path / "model.pt").read_bytes())
    struct.pack_into(layout, data, data.index(CENTRAL) + offset, *(value if isinstance(value, tuple) else (value,)))
    (tmp_path / "model.pt").write_bytes(data)
    assert why in refused(tmp_path / "model.pt")


def test_big_endian_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps(parts(), 2))
        archive.writestr("model/byteorder", "big")
    assert "big-endian" in refused(tmp_path / "model.pt")


def test_a_file_that_is_too_large_is_not_opened(tmp_path):
    with (tmp_path / "model.pt").open("wb") as file:
        file.truncate((16 << 30) + 1)  # a hole: it takes no space
    assert "it has 17,179,869,185 bytes, more than 17,179,869,184" in refused(tmp_path / "model.pt")


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.999])
def test_truncated_files_are_refused(tmp_path, share):
    data = saved(tmp_path / "model.pt", parts()).read_bytes()
    (tmp_path / "model.pt").write_bytes(data[: int(len(data) * share) + 1])
    assert "it is not a whole zip archive" in refused(tmp_path / "model.pt")


def test_damage_is_refused_or_harmless(tmp_path):
    """Whatever bytes change, the answer is a model or this one refusal."""
    data = saved(tmp_path / "model.pt", parts()).read_bytes()
    rng = np.random.default_rng(0)
    outcomes = {True: 0, False: 0}
    for _ in range(400):
        damaged = bytearray(data)
        for at in rng.integers(0, len(data), rng.integers(1, 9)):
            damaged[at] = rng.integers(256)
        (tmp_path / "model.pt").write_bytes(damaged)
        try:
            read_model_file(tmp_path / "model.pt")
        except UnsafeModelError:
            outcomes[False] += 1
        else:
            outcomes[True] += 1
    assert min(outcomes.values()) > 20, outcomes  # both ways were taken


def test_damage_of_the_pickle_is_refused_or_harmless(tmp_path):
    """The same behind the archive's checksums."""
    pickled = pickle.dumps({key: value for key, value in parts().items() if key != "model_state_dict"}, 2)
    rng = np.random.default_rng(0)
    refusals = 0
    for _ in range(400):
        damaged = bytearray(pickled)
        for at in rng.integers(0, len(pickled), rng.integers(1, 4)):
            damaged[at] = rng.integers(256)
        try:
            read_archive(zipped(tmp_path / "model.pt", bytes(damaged)))
        except UnsafeModelError:
            refusals += 1
    assert 100 < refusals < 400


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ([1, 2], "does not hold what scvi-tools saves"),
        ({"model_state_dict": OrderedDict()}, "does not hold what scvi-tools saves"),
        (parts() | {"model_state_dict": [1]}, "is not a dictionary"),
        (parts() | {"attr_dict": None}, "is not a dictionary"),
        (parts() | {"model_state_dict": {"weight": [1.0]}}, "its weights hold 'weight', which is no tensor"),
    ],
)
def test_other_contents_are_refused(tmp_path, value, why):
    assert why in refused(saved(tmp_path / "model.pt", value))


# --- honest files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_honest_parts_come_back(tmp_path, protocol):
    torch.save(parts(), tmp_path / "model.pt", pickle_protocol=protocol)
    found, expected = read_model_file(tmp_path / "model.pt"), parts()
    assert {key: value.tolist() for key, value in found.state_dict.items()} == {
        key: value.tolist() for key, value in expected["model_state_dict"].items()
    }
    assert found.var_names.tolist() == ["A", "B", "C"]
    assert found.attr_dict["registry_"] == expected["attr_dict"]["registry_"]
    assert found.attr_dict["train_indices_"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "value",
    [
        *(
            torch.arange(6).to(dtype)
            for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8)
        ),
        torch.arange(6) > 2,
        torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1)[1:, :, ::2],
        torch.empty(0, 3),
        torch.tensor(1.5),
    ],
    ids=lambda value: f"{value.dtype}{tuple(value.shape)}",
)
def test_tensors_come_back(tmp_path, value):
    found = read_archive(saved(tmp_path / "model.pt", value))
    assert found.dtype == value.dtype
    assert torch.equal(found, value)


@pytest.mark.parametrize(
    "value",
    [
        np.array([["T cell", "B"], ["x", None]], object),
        np.array(["T cell", "é"]),
        np.array([b"ab", b"c"]),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array([True, False]),
        np.zeros((0, 3), np.float32),
        np.array(7),
    ],
    ids=["objects", "text", "bytes", "fortran", "bool", "empty", "scalar"],
)
def test_arrays_come_back(tmp_path, value):
    found = read_archive(saved(tmp_path / "model.pt", value))
    assert type(found) is np.ndarray
    assert found.dtype == value.dtype
    assert found.shape == value.shape
    assert np.array_equal(found, value)


@pytest.mark.parametrize(
    "value",
    [
        np.float32(1.5),
        np.int64(-3),
        np.bool_(True),
        np.str_("x"),
        slice(1, None, 2),
        b"\x00\xff",
        {"a": (1, None)},
        1 << 70,
    ],
    ids=repr,
)
def test_values_come_back(tmp_path, value):
    found = read_archive(saved(tmp_path / "model.pt", value))
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("value", [pd.Index(["a", "b"], name="gene"), pd.Index([3, 1]), pd.RangeIndex(2, 8, 3)])
def test_indexes_come_back(tmp_path, value):
    found = read_archive(saved(tmp_path / "model.pt", value))
    pd.testing.assert_index_equal(found, value, exact="equiv")


@pytest.mark.parametrize("name", ["pancreas_scvi_0.16.1_resaved", "scanvi_1.0.3_synthetic"])
def test_published_models_are_read_as_torch_reads_them(shared_data, name):
    path = shared_data / "models" / name / "model.pt"
    found, expected = read_model_file(path), torch.load(path, weights_only=False, map_location="cpu")
    state = {key: value for key, value in expected["model_state_dict"].items() if key != "pyro_param_store"}
    assert found.state_dict.keys() == state.keys()
    assert all(torch.equal(found.state_dict[key], value) for key, value in state.items())
    assert list(found.var_names) == list(expected["var_names"])
    assert found.attr_dict.keys() == expected["attr_dict"].keys()
    assert found.attr_dict["init_params_"] == expected["attr_dict"]["init_params_"]
    assert str(found.attr_dict["registry_"]) == str(expected["attr_dict"]["registry_"])
