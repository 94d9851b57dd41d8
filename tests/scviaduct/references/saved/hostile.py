"""A corpus of hostile references, each a folder, and a process that reads them under watch.

``python hostile.py FOLDER`` reads every folder in FOLDER as a reference and prints
what came of each as JSON; with ``--plainly`` it opens their pickles as scvi-tools does.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import io
import json
import operator
import os
import pickle
import re
import runpy
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import timeit
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import torch

from scviaduct.references.manifest import FORMAT

CANARY = "canary"


class Calls:
    """Unpickles into ``function(*arguments)``, and its state."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call

    def __call__(self):
        raise AssertionError  # only for pickle, which asks that what it is to call can be called


def honest():
    """What scvi-tools saves, in small; it is read."""
    weights = OrderedDict({"z_encoder.weight": torch.arange(12.0).reshape(4, 3), "decoder.weight": torch.ones(2)})
    fields = {"X": {"data_registry": {}, "state_registry": {"n_vars": 3}, "summary_stats": {"n_vars": 3}}}
    registry = {"model_name": "SCVI", "scvi_version": "1.5.1", "setup_args": {}, "field_registries": fields}
    attributes = {"registry_": registry, "init_params_": {"kwargs": {}, "non_kwargs": {"n_latent": 4}}}
    attributes["history_"] = {"elbo": pd.DataFrame({"elbo": [1.0]})}
    return {"model_state_dict": weights, "var_names": np.array(["A", "B", "C"], object), "attr_dict": attributes}


# --- payloads: each makes the canary when it is unpickled plainly ----------------------------------------------------


def touch(folder):
    return f"touch {folder / CANARY}"


def code(folder):
    return f"open({str(folder / CANARY)!r}, 'w').close()"


def beside(folder, name, write):
    """A further file that a payload opens."""
    write(folder / name)
    return str(folder / name)


def pickled(folder):
    return beside(folder, "inner.bin", lambda path: path.write_bytes(pickle.dumps(Calls(os.system, touch(folder)))))


def array_of(folder):
    value = np.empty(1, object)
    value[0] = Calls(os.system, touch(folder))
    return beside(folder, "inner.npy", lambda path: np.save(path, value, allow_pickle=True))


def hub_of(folder):
    beside(folder, "hubconf.py", lambda path: path.write_text(f"def entry():\n    {code(folder)}\n"))
    return str(folder)


def script_of(folder):
    return beside(folder, "script.py", lambda path: path.write_text(code(folder)))


PAYLOADS = {
    "os.system": lambda f: Calls(os.system, touch(f)),
    "os.popen": lambda f: Calls(operator.methodcaller("read"), Calls(os.popen, touch(f))),
    "subprocess.run": lambda f: Calls(subprocess.check_call, touch(f).split()),
    "eval": lambda f: Calls(builtins.eval, code(f)),
    "exec": lambda f: Calls(builtins.exec, code(f)),
    "getattr": lambda f: Calls(Calls(builtins.getattr, Calls(importlib.import_module, "os"), "system"), touch(f)),
    "__import__": lambda f: Calls(operator.methodcaller("system", touch(f)), Calls(builtins.__import__, "os")),
    "open": lambda f: Calls(builtins.open, str(f / CANARY), "w"),
    "map": lambda f: Calls(builtins.list, Calls(builtins.map, os.system, [touch(f)])),
    "functools.partial": lambda f: Calls(functools.partial(os.system, touch(f))),
    "timeit": lambda f: Calls(timeit.timeit, code(f), "pass", timeit.default_timer, 1),
    "runpy": lambda f: Calls(runpy.run_path, script_of(f)),
    "a state": lambda f: Calls(
        Calls(functools.partial, print, state=(os.system, (touch(f),), {}, {})),
    ),
    "numpy.load": lambda f: Calls(operator.methodcaller("sum"), Calls(np.load, array_of(f), None, True)),
    "pandas.read_pickle": lambda f: Calls(pd.read_pickle, pickled(f)),
    "pandas.eval": lambda f: Calls(
        pd.eval, f"@f({touch(f)!r})", "pandas", "python", pd.api.extensions.no_default, {"f": os.system}
    ),
    "torch.load": lambda f: Calls(functools.partial(torch.load, legacy_of(f), weights_only=False)),
    "torch.hub": lambda f: Calls(torch.hub._load_local, hub_of(f), "entry"),
    "pickle.loads": lambda f: Calls(pickle.loads, pickle.dumps(Calls(os.system, touch(f)))),
}


def legacy_of(folder):
    payload = Calls(os.system, touch(folder))
    return beside(folder, "inner.pt", lambda path: torch.save(payload, path, _use_new_zipfile_serialization=False))


def with_weights(payload):
    return honest() | {"model_state_dict": OrderedDict(weight=payload)}


def within_attributes(**attributes):
    return honest() | {"attr_dict": honest()["attr_dict"] | attributes}


def deep_in(payload):
    value = payload
    for i in range(20):
        value = {f"level {i}": [(value,)]}
    return within_attributes(registry_=value)


PLACES = {
    "at the top": lambda payload: payload,
    "in the weights": with_weights,
    "as a name of a weight": lambda payload: honest() | {"model_state_dict": OrderedDict({("a", payload): 1})},
    "in var_names": lambda payload: honest() | {"var_names": np.array(["A", payload, "C"], object)},
    "in the history": lambda payload: within_attributes(history_={"elbo": pd.DataFrame({"elbo": [payload]})}),
    "in the arguments": lambda payload: within_attributes(init_params_={"kwargs": {}, "non_kwargs": {"n": payload}}),
    "deep in the registry": deep_in,
    "in an attribute that nothing reads": lambda payload: within_attributes(zzz_=payload),
    "behind everything": lambda payload: honest() | {"zzz": payload},
    "in an index": lambda payload: within_attributes(x_=pd.Index(np.array([payload, "a"], object))),
    "in a default": lambda payload: within_attributes(x_=slice(payload, None)),
}


# --- folders ---------------------------------------------------------------------------------------------------------


def archive(path, data, root="model", **members):
    """A zip as ``torch.save`` lays it out, of any pickle."""
    with zipfile.ZipFile(path, "w") as out:
        out.writestr(f"{root}/data.pkl", data)
        for name, content in members.items():
            out.writestr(f"{root}/{name}", content)


def plain(folder):
    torch.save(honest(), folder / "model.pt")
    return folder / "model.pt"


def repacked(folder, change=lambda _: None, **options):
    """The honest archive again, its members changed by a function."""
    source = plain(folder).read_bytes()
    with warnings.catch_warnings(), zipfile.ZipFile(io.BytesIO(source)) as old:
        warnings.simplefilter("ignore", UserWarning)
        with zipfile.ZipFile(folder / "model.pt", "w") as new:
            for member in old.infolist():
                told = zipfile.ZipInfo(member.filename)
                change(told)
                new.writestr(told, old.read(member), **options)


def renamed(at, name):
    def change(member):
        if member.filename.endswith(at):
            member.filename = name

    return change


def patched(folder, signature, offset, layout, *values):
    """The honest archive with bytes changed behind the last header of a kind."""
    data = bytearray(plain(folder).read_bytes())
    struct.pack_into(layout, data, data.rindex(signature) + offset, *values)
    (folder / "model.pt").write_bytes(data)


def edited(folder, change):
    path = plain(folder)
    path.write_bytes(change(path.read_bytes()))


def payload_archive(folder):
    out = io.BytesIO()
    torch.save(honest() | {"zzz": Calls(os.system, touch(folder))}, out)
    return out.getvalue()


def linked(member):
    if member.filename.endswith("version"):
        member.external_attr = (stat.S_IFLNK | 0o777) << 16


def doubled(folder):
    """Two members called data.pkl: the last one is what most readers take."""
    repacked(folder)
    with warnings.catch_warnings(), zipfile.ZipFile(folder / "model.pt", "a") as out:
        warnings.simplefilter("ignore", UserWarning)
        name = next(name for name in out.namelist() if name.endswith("data.pkl"))
        out.writestr(name, pickle.dumps(Calls(os.system, touch(folder)), 2))


def misnamed(folder):
    """The pickle's own header has another name than the directory says."""
    data = bytearray(plain(folder).read_bytes())
    at = data.index(b"data.pkl")
    data[at : at + 8] = b"evil.pkl"
    (folder / "model.pt").write_bytes(data)


def overlapping(folder):
    """Two members of one place."""
    data = bytearray(plain(folder).read_bytes())
    first, second = data.index(b"PK\x01\x02"), data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 4)
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    (folder / "model.pt").write_bytes(data)


def tar(folder):
    with tarfile.open(folder / "model.pt", "w") as out:
        inner = folder / "pickle"
        inner.write_bytes(pickle.dumps(Calls(os.system, touch(folder)), 2))
        out.add(inner, "pickle")


def torchscript(folder):
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
        warnings.simplefilter("ignore")
        torch.jit.script(Trap(str(folder / CANARY))).save(str(folder / "model.pt"))
    (folder / CANARY).unlink(missing_ok=True)


def raw(data):
    return lambda folder: archive(folder / "model.pt", data)


def doubling(opener, step, closer, levels=60):
    """A value of which each level holds the one below twice, through the memo."""
    lines = b"".join(step % {b"i": i, b"n": i + 1} for i in range(levels))
    return b"\x80\x02" + opener + lines + b"g%d\n" % levels + closer


def as_key(value):
    return b"}" + value + b"Ns."


LAUGHS = doubling(b"(lp0\n0", b"(g%(i)d\ng%(i)d\nlp%(n)d\n0", b".")
TUPLES = doubling(b"(tp0\n0", b"(g%(i)d\ng%(i)d\ntp%(n)d\n0", b"")
DEEP = b"\x80\x02" + b"(" * 200_000 + b"l" * 200_000 + b"."
BOMBS = {
    "a billion laughs": LAUGHS,
    "laughs in a dictionary": doubling(b"}p0\n0", b"}(K\x00g%(i)d\nK\x01g%(i)d\nup%(n)d\n0", b"."),
    "a key that is hashed for ever": TUPLES[:2] + b"}" + TUPLES[2:] + b"Ns.",
    "keys that are hashed for ever": TUPLES[:2] + b"}(" + TUPLES[2:] + b"Nu.",
    "a dictionary that is hashed for ever": TUPLES[:2] + b"(" + TUPLES[2:] + b"Nd.",
    "a set that is hashed for ever": TUPLES[:2] + b"\x8f(" + TUPLES[2:] + b"\x90.",
    "a frozen set that is hashed for ever": TUPLES[:2] + b"(" + TUPLES[2:] + b"\x91.",
    "pairs that are hashed for ever": TUPLES[:2] + b"ccollections\nOrderedDict\n(" + b"((" + TUPLES[2:] + b"NtltR.",
    "a name that is hashed for ever": TUPLES[:2]
    + b"cpandas.core.indexes.base\n_new_Index\n(cpandas.core.indexes.base\nIndex\n}(X\x04\x00\x00\x00dataN"
    + b"X\x04\x00\x00\x00name"
    + TUPLES[2:]
    + b"utR.",
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
    "many levels": DEEP,
    "bytes many times over": b"\x80\x03B\x00\x00\x10\x00"
    + bytes(1 << 20)
    + b"q\x000c__builtin__\nbytes\n("
    + b"h\x00" * 9999
    + b"tR.",
    "a long number": b"\x80\x02\x8b" + struct.pack("<i", 1 << 30) + b"\x01.",
    "a negative long number": b"\x80\x02\x8b" + struct.pack("<i", -1) + b".",
    "a number of digits": b"L" + b"9" * 100_000 + b"L\n.",
    "a text that is not there": b"\x80\x02X" + struct.pack("<I", 1 << 31) + b".",
    "an entry of the memo": b"\x80\x02Nr" + struct.pack("<I", 0xFFFFFFFF) + b".",
    "a protocol to come": b"\x80\x63N.",
    "nothing on the stack": b"\x80\x020.",
    "no end": b"\x80\x02N",
    "an interned text": b"\x80\x02X\x08\x00\x00\x00__dict__\x85R.",
    "a name through a name": b"\x80\x04\x8c\x0bcollections\x8c\x1bOrderedDict.__init__.__func__\x93.",
    "an extension": b"\x80\x02\x82\x01.",
    "a buffer": b"\x80\x05\x97.",
    "a persistent id in text": b"Pfile:///etc/passwd\n.",
    "a state of a class": b"ccollections\nOrderedDict\n}X\x08\x00\x00\x00__reduce__Nsb.",
    "a state of slots": b"\x80\x02}N}X\x01\x00\x00\x00aK\x01s\x86b.",
}

TRUNCATED = (0.001, 0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)
ARCHIVES = {
    "something before it": lambda f: edited(f, lambda data: b"#!/bin/sh\ntrue\n" + data),
    "a zip before it": lambda f: edited(f, lambda data: payload_archive(f) + data),
    "a zip behind it": lambda f: edited(f, lambda data: data + payload_archive(f)),
    "a comment": lambda f: edited(f, lambda data: data[:-2] + b"\x05\x00hello"),
    "a directory in the comment": lambda f: edited(f, lambda data: data[:-2] + b"\x16\x00PK\x05\x06" + bytes(18)),
    "two pickles of one name": doubled,
    "another name inside": misnamed,
    "members that overlap": overlapping,
    "compressed": lambda f: repacked(f, compress_type=zipfile.ZIP_DEFLATED),
    "encrypted": lambda f: patched(f, b"PK\x01\x02", 8, "<H", 1),
    "a claim of 4 GiB": lambda f: patched(f, b"PK\x01\x02", 20, "<II", 0xFFFFFFFE, 0xFFFFFFFE),
    "a claim in 64 bits": lambda f: patched(f, b"PK\x01\x02", 20, "<II", 0xFFFFFFFF, 0xFFFFFFFF),
    "a member elsewhere": lambda f: patched(f, b"PK\x01\x02", 42, "<I", 0x7FFFFFFF),
    "a directory elsewhere": lambda f: patched(f, b"PK\x05\x06", 16, "<I", 0x7FFFFFFF),
    "a longer directory": lambda f: patched(f, b"PK\x05\x06", 12, "<I", 0x7FFFFFFF),
    "65,535 members": lambda f: patched(f, b"PK\x05\x06", 8, "<HH", 0xFFFE, 0xFFFE),
    "an absolute name": lambda f: repacked(f, renamed("/version", "/etc/passwd")),
    "a name upwards": lambda f: repacked(f, renamed("/version", "model/../../x")),
    "a name with the other slash": lambda f: repacked(f, renamed("/version", "model\\..\\x")),
    "a link": lambda f: repacked(f, linked),
    "code": lambda f: archive(f / "model.pt", pickle.dumps(honest(), 2), **{"code/__torch__.py": "import os"}),
    "torchscript": torchscript,
    "a tar": tar,
    "torch before 1.6": lambda f: torch.save(
        Calls(os.system, touch(f)), f / "model.pt", _use_new_zipfile_serialization=False
    ),
    "a bare pickle": lambda f: (f / "model.pt").write_bytes(pickle.dumps(Calls(os.system, touch(f)))),
    "nothing": lambda f: (f / "model.pt").write_bytes(b""),
    **{
        f"cut at {share}": lambda f, share=share: edited(f, lambda data: data[: int(len(data) * share)])
        for share in TRUNCATED
    },
}


def storage(folder, numel, size, stride, kind="FloatStorage"):
    """A tensor over 12 floats that claims what it likes."""
    number = lambda n: b"J" + struct.pack("<i", n)  # noqa: E731
    several = lambda numbers: b"(" + b"".join(map(number, numbers)) + b"t"  # noqa: E731
    pid = b"(X\x07\x00\x00\x00storagectorch\n" + kind.encode() + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    view = number(0) + several(size) + several(stride) + b"\x89ccollections\nOrderedDict\n)R"
    data = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + pid + number(numel) + b"tQ" + view + b"tR."
    archive(folder / "model.pt", data, **{"data/0": np.arange(12, dtype="<f4").tobytes()})


def laughing(folder, put):
    """An honest model one of whose values is 2**60 lists when it is written out."""
    value = []
    for _ in range(60):
        value = [value, value]
    torch.save(put(value), folder / "model.pt")


def another_class(folder):
    value = honest()
    value["attr_dict"]["registry_"]["model_name"] = "TOTALVI"
    torch.save(value, folder / "model.pt")


def larger_network(folder):
    value = honest()
    value["attr_dict"]["init_params_"]["non_kwargs"]["n_hidden"] = 10**9
    torch.save(value, folder / "model.pt")


def another_method(folder):
    value = honest()
    value["attr_dict"]["registry_"] |= {"setup_method_name": "convert_legacy_save", "setup_args": {"overwrite": True}}
    torch.save(value, folder / "model.pt")


CONTENTS = {
    "a storage out of bounds": lambda f: storage(f, 12, (4, 4), (4, 1)),
    "a storage that claims": lambda f: storage(f, 1 << 30, (1,), (1,)),
    "steps of zero": lambda f: storage(f, 12, (1 << 30, 1 << 30), (0, 0)),
    "steps backwards": lambda f: storage(f, 12, (3, 4), (-4, 1)),
    "another type": lambda f: storage(f, 12, (3, 4), (4, 1), "DoubleStorage"),
    "a type that is none": lambda f: storage(f, 12, (3, 4), (4, 1), "jit"),
    "laughs as var_names": lambda f: laughing(f, lambda value: honest() | {"var_names": value}),
    "laughs among the genes": lambda f: laughing(f, PLACES["in var_names"]),
    "laughs in the registry": lambda f: laughing(f, lambda value: within_attributes(zzz_=value)),
    "one class with another's weights": another_class,
    "a network larger than its weights": larger_network,
    "a method that is no setup": another_method,
}


# --- old and portable models, metadata, data -------------------------------------------------------------------------


def legacy(folder, attributes, weights=None, names="A\nB\nC\n"):
    torch.save(OrderedDict(w=torch.ones(2)) if weights is None else weights, folder / "model_params.pt")
    (folder / "attr.pkl").write_bytes(attributes)
    (folder / "var_names.csv").write_text(names)


def portable(folder, document, header=None):
    told = json.dumps(header or {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(len(told).to_bytes(8, "little") + told + bytes(8))
    (folder / "model.json").write_text(document if isinstance(document, str) else json.dumps(document))


def document(**attributes):
    return {"format": 1, "state_dict": ["w"], "var_names": None, "attr_dict": attributes}


def upwards(folder):
    told = {"format": FORMAT, "digest": "", "name": "x", "files": {"../x": {}}, "notes": [], "provenance": {}}
    (folder / "manifest.json").write_text(json.dumps(told | {"family": "", "facts": {}, "template_latent": []}))


OTHERS = {
    "attr.pkl that calls": lambda f: legacy(f, pickle.dumps({"a": Calls(os.system, touch(f))})),
    "attr.pkl that laughs": lambda f: legacy(f, LAUGHS),
    "attr.pkl of levels": lambda f: legacy(f, DEEP),
    "attr.pkl that refers": lambda f: legacy(f, b"Pfile:///etc/passwd\n."),
    "attr.pkl that is empty": lambda f: legacy(f, b""),
    "weights that call": lambda f: legacy(f, pickle.dumps({}), weights={"w": Calls(os.system, touch(f))}),
    "attributes that are none": lambda f: legacy(f, pickle.dumps({})),
    "json of levels": lambda f: portable(f, "[" * 200_000),
    "json that names a call": lambda f: portable(f, document(a={"!": ["os.system", touch(f)]})),
    "json with a factory": lambda f: portable(f, document(a={"!": ["defaultdict", "eval"]})),
    "json that claims": lambda f: portable(f, document(a={"!": ["array", "<f8", [1 << 39], ""]})),
    "json of pointers": lambda f: portable(f, document(a={"!": ["array", "|O", [1], "AAAAAAAAAAA="]})),
    "weights that claim": lambda f: portable(
        f, document(), {"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
    ),
    "a pickle called safetensors": lambda f: (
        portable(f, document()),
        (f / "model.safetensors").write_bytes(pickle.dumps(Calls(os.system, touch(f)))),
    ),
    "metadata of levels": lambda f: (
        plain(f),
        (f / "_scvi_required_metadata.json").write_text("[" * 200_000),
    ),
    "a manifest upwards": upwards,
    "a manifest of levels": lambda f: (f / "manifest.json").write_text("[" * 200_000),
}


def data(folder, change):
    """An honest model, and data changed by a function."""
    plain(folder)
    with h5py.File(folder / "secret.h5", "w") as file:
        file["x"] = np.full((3, 2), 42.0)
    (folder / "passwd").write_bytes(b"root:x:0:0:root:/root:/bin/sh\n" * 4)
    with h5py.File(folder / "adata.h5ad", "w") as file:
        change(file, folder)


def virtual(file, _folder):
    layout = h5py.VirtualLayout((3, 2), "f8")
    layout[:] = h5py.VirtualSource("secret.h5", "x", (3, 2))
    file.create_virtual_dataset("X", layout)


def circle(file, _folder):
    file.create_group("uns")["again"] = file["/"]


DATA = {
    "a link to another file": lambda file, _: file.__setitem__("X", h5py.ExternalLink("secret.h5", "x")),
    "a link in a group": lambda file, _: file.create_group("uns/a").__setitem__(
        "b", h5py.ExternalLink("secret.h5", "x")
    ),
    "a soft link": lambda file, _: file.__setitem__("X", h5py.SoftLink("/X")),
    "a virtual matrix": virtual,
    "storage in another file": lambda file, f: file.create_dataset(
        "X", (3,), "f8", external=[(str(f / "passwd"), 0, 24)]
    ),
    "a matrix of a petabyte": lambda file, _: file.create_dataset("X", (1 << 25, 1 << 25), "f8", chunks=(1, 1 << 16)),
    "a group in itself": circle,
}


def write_corpus(folder):
    """Make every hostile folder.

    Returns
    -------
    tuple of list of str
        Names of all; and of those whose pickle runs when it is opened plainly.
    """
    cases = {
        f"{name}, at the top": (lambda f, make=make: torch.save(make(f), f / "model.pt"))
        for name, make in PAYLOADS.items()
    }
    singing = [name for name in cases if not name.startswith("pandas.eval")]  # it calls functions of numpy alone
    for place, put in PLACES.items():
        cases[f"os.system, {place}"] = lambda f, put=put: torch.save(put(PAYLOADS["os.system"](f)), f / "model.pt")
        singing += [f"os.system, {place}"]
    cases |= {name: raw(value) for name, value in BOMBS.items()} | ARCHIVES | CONTENTS | OTHERS
    cases |= {name: lambda f, change=change: data(f, change) for name, change in DATA.items()}
    singing += ["torchscript", "torch before 1.6"]
    for name, make in cases.items():
        here = folder / slug(name)
        here.mkdir()
        make(here)
        if (here / CANARY).exists():
            raise AssertionError(name)
    return [slug(name) for name in cases], [slug(name) for name in singing]


def slug(name):
    """A name without what a shell would read."""
    return re.sub(r"\W+", "-", name)


# --- reading under watch ---------------------------------------------------------------------------------------------

WATCHED = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.", "socket.", "ctypes.", "pickle.", "exec")
ALSO = ("compile", "import", "os.mkdir", "os.rename", "os.remove", "os.symlink", "os.link", "shutil.", "webbrowser.")


LIMIT = 10
"""Seconds that a case may take; each takes milliseconds."""


def read(folder):
    """Read a folder as a reference is read: manifest, model, data."""
    from scviaduct.references.manifest import read_manifest
    from scviaduct.references.saved.contained import check_contained
    from scviaduct.references.saved.repair import read_saved

    if (folder / "manifest.json").exists():
        read_manifest(folder)
    saved, _ = read_saved(folder)
    if (folder / "adata.h5ad").exists():
        check_contained(folder / "adata.h5ad")
    return saved


def watch(folder, found):
    """Record what happens in this process from now on, but for reading files in a folder."""
    before = set(sys.modules)

    def hook(event, arguments):
        if event == "open":
            path, mode, flags = arguments
            writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
            if writes or not str(path).startswith(str(folder)):
                found.append(f"open {path} {mode}")
        elif (event == "import" and arguments[0] not in before) or (
            event != "import" and event.startswith(WATCHED + ALSO)
        ):
            found.append(f"{event} {str(arguments)[:100]}")

    sys.addaudithook(hook)


class TooLongError(BaseException):
    """A case took more time than any may: it is not caught by what reads."""


def too_long(*_):
    raise TooLongError


def read_watched(folder):
    """Read every folder; what came of each."""
    from scviaduct.errors import ScviaductError

    control = folder.parent / "control"
    control.mkdir()
    plain(control)
    data(control, lambda file, _: file.create_dataset("X", data=np.ones((3, 2))))
    read(control)  # imports what reading imports
    "".encode("cp437")  # zipfile does, for names of old archives
    for first in ("a bare pickle", "json of levels", "attr.pkl that is empty", "a soft link", "a manifest of levels"):
        try:
            read(folder / slug(first))
        except ScviaductError as error:
            str(error)
    signal.signal(signal.SIGALRM, too_long)
    happened = []
    watch(folder, happened)
    results = {}
    for here in sorted(folder.iterdir()):
        happened.clear()
        signal.alarm(LIMIT)
        try:
            read(here)
            outcome = ("read", "")
        except ScviaductError as error:
            outcome = (type(error).__name__, str(error)[:300])
        except TooLongError:
            outcome = ("TooLongError", "")
        finally:
            signal.alarm(0)
        results[here.name] = [*outcome, list(happened), (here / CANARY).exists()]
    return results


def read_plainly(folder, names):
    """Open the pickles of some folders as scvi-tools does; which canaries there are then."""
    results = {}
    for here in sorted(folder.iterdir()):
        if here.name not in names:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                torch.load(here / "model.pt", weights_only=False)
            except Exception as error:  # noqa: BLE001 - what is left of a payload may be anything
                results[here.name] = str(error)[:200]
        results[here.name] = (here / CANARY).exists() or results.get(here.name)
    return results


if __name__ == "__main__":
    place = Path(sys.argv[1])
    print(json.dumps(read_plainly(place, json.loads(sys.argv[3])) if "--plainly" in sys.argv else read_watched(place)))
