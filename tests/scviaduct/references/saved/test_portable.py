"""A model as safetensors and JSON: exact for every family, the same bytes for the same model, nothing that runs."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections import OrderedDict, defaultdict

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from scviaduct.errors import PackageError, UnsupportedModelError
from scviaduct.families.vae import quiet
from scviaduct.references.saved.archive import SavedModel, read_model_file
from scviaduct.references.saved.portable import ATTRIBUTES, WEIGHTS, read_model, to_scvi_file, write_model
from tests.scviaduct.references.saved.seven import CLASSES, cells_of, latent_of, model_of, save_small, set_up


def same(one, other):
    """Whether two values are equal in kind, type, order and value, a NaN being equal to itself."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        factory = getattr(one, "default_factory", None) is getattr(other, "default_factory", None)
        return factory and same(list(one), list(other)) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, np.ndarray):
        equal = one.dtype == other.dtype and one.shape == other.shape
        return equal and same(one.ravel().tolist(), other.ravel().tolist())
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and same(one.numpy(), other.numpy())
    if isinstance(one, pd.Index):
        return one.equals(other) and one.name == other.name and one.dtype == other.dtype
    return one == other or (one != one and other != other)


def round_trip(folder, value, state=None):
    saved = SavedModel(state or {"w": torch.zeros(2)}, np.array(["A"], object), {"value": value})
    write_model(saved, folder)
    return read_model(folder).attr_dict["value"]


@pytest.fixture(scope="module")
def read_seven(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seven")
    return {name: read_model_file(save_small(name, folder / name) / "model.pt") for name in CLASSES}


# --- families --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_a_model_comes_back_as_it_was(tmp_path, read_seven, name):
    saved = read_seven[name]
    write_model(saved, tmp_path)
    found = read_model(tmp_path)
    assert same(dict(found.state_dict), saved.state_dict)
    assert same(found.var_names, saved.var_names)
    assert same(found.attr_dict, {k: v for k, v in saved.attr_dict.items() if not k.endswith("history_")})
    assert {"registry_", "init_params_", "train_indices_"} <= found.attr_dict.keys()


@pytest.mark.parametrize("name", CLASSES)
def test_scvi_tools_sets_up_what_comes_back(tmp_path, read_seven, name):
    write_model(read_seven[name], tmp_path)
    found = set_up(name, read_model(tmp_path))
    assert np.array_equal(latent_of(found), latent_of(model_of(name)))


@pytest.mark.parametrize("name", CLASSES)
def test_scvi_tools_loads_the_file_written_for_it(tmp_path, read_seven, name):
    write_model(read_seven[name], tmp_path)
    to_scvi_file(read_model(tmp_path), tmp_path / "model.pt")
    with quiet():
        found = CLASSES[name].load(str(tmp_path), cells_of(name), accelerator="cpu")
    assert np.array_equal(latent_of(found), latent_of(model_of(name)))
    assert read_model_file(tmp_path / "model.pt").var_names is not None


@pytest.mark.parametrize("name", CLASSES)
def test_one_model_has_the_same_bytes(tmp_path, read_seven, name):
    folders = [tmp_path / "once", tmp_path / "again"]
    for folder in folders:
        folder.mkdir()
    write_model(read_seven[name], folders[0])
    write_model(read_model(folders[0]), folders[1])
    for file in (WEIGHTS, ATTRIBUTES):
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()


@pytest.mark.parametrize("name", ["pancreas_scvi_0.16.1_resaved", "scanvi_1.0.3_synthetic"])
def test_published_models_come_back(shared_data, tmp_path, name):
    saved = read_model_file(shared_data / "models" / name / "model.pt")
    write_model(saved, tmp_path)
    found = read_model(tmp_path)
    assert same(dict(found.state_dict), saved.state_dict)
    assert same(found.attr_dict["registry_"], saved.attr_dict["registry_"])


def test_reading_takes_no_pickle(tmp_path, read_seven):
    write_model(read_seven["SCVI"], tmp_path)
    code = """
import pickle, sys, torch
class Broken:
    def __init__(self, *_, **__):
        raise AssertionError('a pickle was read')
from pathlib import Path
from scviaduct.references.saved.portable import read_model
pickle.Unpickler = pickle._Unpickler = pickle.load = pickle.loads = torch.load = Broken
assert len(read_model(Path(sys.argv[1])).state_dict) > 10
assert not {'scvi', 'anndata', 'lightning'} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        *(torch.arange(6).to(dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int8)),
        torch.arange(6) > 2,
        torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1)[1:, :, ::2],
        torch.empty(0, 3),
        torch.tensor(7),
        torch.nn.Parameter(torch.ones(2)).detach(),
    ],
    ids=lambda value: f"{value.dtype}{tuple(value.shape)}",
)
def test_weights_come_back(tmp_path, value):
    write_model(SavedModel({"a": value}, None, {}), tmp_path)
    found = read_model(tmp_path).state_dict["a"]
    assert found.dtype == value.dtype
    assert torch.equal(found, value)


def test_weights_may_share_memory_and_keep_their_order(tmp_path):
    whole = torch.arange(12.0)
    state = {"z": whole[2:6], "whole": whole, "a": whole.reshape(3, 4).T}
    write_model(SavedModel(state, None, {}), tmp_path)
    found = read_model(tmp_path).state_dict
    assert list(found) == ["z", "whole", "a"]
    assert same(dict(found), state)


@pytest.mark.parametrize("state", [{"a": torch.zeros(2, dtype=torch.complex64)}, {"attr_dict/0": torch.zeros(2)}])
def test_weights_that_have_no_place_are_refused(tmp_path, state):
    with pytest.raises(UnsupportedModelError, match="cannot be written down"):
        write_model(SavedModel(state, None, {}), tmp_path)


# --- values ----------------------------------------------------------------------------------------------------------

VALUES = [
    None,
    True,
    0,
    -(1 << 80),
    1.0,
    -0.0,
    1e-310,
    math.nan,
    -math.inf,
    "é\ud800\0",
    b"\x00\xff",
    [1, (2, [3])],
    {"!": 1},
    {"a": {"b": ()}},
    {1: "a", "1": "b", None: "c", (1, "x"): "d", 1.5: "e"},
    {"z": 1, "a": 2},
    OrderedDict(b=1, a=2),
    defaultdict(dict, {"a": {1: 2}}),
    defaultdict(None, {"a": 1}),
    {3, 1, 2},
    frozenset({1, 2}),
    slice(1, None, -2),
    np.float32(0.1),
    np.float64("nan"),
    np.int64(-3),
    np.bool_(True),
    np.str_("x"),
    np.array([["T cell", 1, None], [math.nan, True, ("x",)]], object),
    np.array(["T cell", "é", ""]),
    np.array([b"ab", b"c"]),
    np.array([True, False]),
    np.arange(6.0, dtype=np.float16).reshape(2, 3),
    np.asfortranarray(np.arange(6).reshape(2, 3)),
    np.zeros((0, 3), np.float32),
    np.array(7, np.uint8),
    np.array([], object),
    np.arange(5000),
    np.arange(5000.0).reshape(50, 100)[:, ::2],
    pd.Index(["a", None], name="gene"),
    pd.Index([3, 1]),
    pd.RangeIndex(2, 8, 3, name="i"),
    torch.arange(4),
    torch.tensor([True, False]),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: f"{type(value).__name__}-{str(value)[:20]!a}")
def test_values_come_back(tmp_path, value):
    assert same(round_trip(tmp_path, value), value)


def test_the_order_of_a_set_does_not_change_the_bytes(tmp_path):
    one, other = set(range(0, 24, 8)), set(range(16, -1, -8))
    assert list(one) != list(other)  # they collide, so that the first one in comes first
    texts = [round_trip(tmp_path, value) and (tmp_path / ATTRIBUTES).read_bytes() for value in (one, other)]
    assert texts[0] == texts[1]


def test_large_arrays_lie_beside_the_weights(tmp_path):
    round_trip(tmp_path, {"a": np.arange(100_000), "b": np.arange(3)})
    assert (tmp_path / ATTRIBUTES).stat().st_size < 1000
    assert (tmp_path / WEIGHTS).stat().st_size > 800_000


def nested(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (print, "a builtins.builtin_function_or_method"),
        (torch.nn.ReLU(), "a torch.nn.modules.activation.ReLU"),
        (np.array(["2020-01-01"], "M8[D]"), "an array of datetime64"),
        (np.zeros(2, [("a", "i4")]), "an array of"),
        (pd.MultiIndex.from_tuples([("a", 1)]), "an index of"),
        (defaultdict(lambda: 1), "a defaultdict of"),
        (torch.zeros(2, dtype=torch.bfloat16), "a tensor of bfloat16"),
        (nested(70), "more than 64 levels"),
    ],
    ids=["function", "module", "dates", "records", "levels", "factory", "bfloat16", "depth"],
)
def test_what_cannot_be_written_is_refused(tmp_path, value, why):
    with pytest.raises(UnsupportedModelError, match=why):
        round_trip(tmp_path, value)


def test_tables_are_left_out_unless_they_are_needed(tmp_path, read_seven):
    saved = read_seven["SCVI"]
    table = {"donors": [pd.DataFrame({"age": [40]})]}
    write_model(SavedModel(saved.state_dict, saved.var_names, saved.attr_dict | {"extra_": table}), tmp_path)
    assert "extra_" not in read_model(tmp_path).attr_dict
    with pytest.raises(UnsupportedModelError, match="'registry_' holds a table"):
        write_model(SavedModel(saved.state_dict, saved.var_names, {"registry_": table}), tmp_path)


# --- strangers' files ------------------------------------------------------------------------------------------------


@pytest.fixture
def honest(tmp_path):
    round_trip(tmp_path, np.arange(2000))
    return tmp_path


def rewritten(folder, **changes):
    told = json.loads((folder / ATTRIBUTES).read_text())
    (folder / ATTRIBUTES).write_text(json.dumps(told | changes))


def tagged(*parts):
    return {"attr_dict": {"value": {"!": list(parts)}}}


STRANGE = {
    "an unknown tag": tagged("posix.system", "true"),
    "a tag that is no name": tagged(["int"], 1),
    "a tag without parts": {"attr_dict": {"value": {"!": []}}},
    "a tag with company": {"attr_dict": {"value": {"!": ["tuple"], "a": 1}}},
    "a tag that is a text": {"attr_dict": {"value": {"!": "tuple"}}},
    "a factory by name": tagged("defaultdict", "eval"),
    "a pointer": tagged("array", "|O", [1], "AAAAAAAAAAA="),
    "a record": tagged("array", "i4,O", [1], "AAAAAAAAAAA="),
    "a void": tagged("array", "|V999999999", [0], ""),
    "more elements than there are": tagged("array", "<i4", [1 << 30], ""),
    "a negative shape": tagged("array", "<i4", [-1, -1], "AAAA"),
    "a deep shape": tagged("array", "<i4", [0] * 40, ""),
    "no base64": tagged("array", "<i4", [1], "AAA\u00e9"),
    "wide texts": tagged("text", "<U999999", [2000], ["a"] * 2000),
    "one wide text": tagged("text", "<U1", [5000], ["a" * 100_000, *["b"] * 4999]),
    "texts that are none": tagged("text", "<U1", [1], [7]),
    "objects that are not there": tagged("objects", [1 << 30], []),
    "an array beside that is not": tagged("beside", "<i8", 1),
    "an array beside of another type": tagged("beside", "<f8", 0),
    "an array beside from behind": tagged("beside", "<i8", -1),
    "a scalar that is an array": tagged("scalar", "array", "<i4", [1], "AAAAAA=="),
    "a scalar that is an object": tagged("scalar", "objects", [], [[1]]),
    "a number by another name": tagged("float", "1e9"),
    "a number of letters": tagged("int", "0xfffg"),
    "a long number": tagged("int", "0x" + "f" * 5000),
    "a range without end": tagged("range", 0, 1e9, 1, None),
    "a name that is a list": tagged("index", [1], "text", "<U1", [1], ["a"]),
    "a key that is a list": tagged("dict", [[1], 2]),
    "a key twice": tagged("dict", ["a", 1], ["a", 2]),
    "half a pair": tagged("dict", ["a"]),
    "a list in a set": tagged("set", [1]),
    "attributes that are a list": {"attr_dict": []},
    "attributes that are tagged": {"attr_dict": {"!": ["tuple"]}},
    "another format": {"format": 2},
    "a format that is a list": {"format": [[]]},
    "weights that are missing": {"state_dict": ["w", "v"]},
    "weights twice": {"state_dict": ["w", "w"]},
    "weights that are none": {"state_dict": {"w": 1}},
    "names that are lists": {"state_dict": [["w"]]},
}


@pytest.mark.parametrize("case", STRANGE)
def test_strange_attributes_are_refused(honest, case):
    assert read_model(honest).attr_dict["value"].shape == (2000,)
    rewritten(honest, **STRANGE[case])
    with pytest.raises(PackageError):
        read_model(honest)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "[" * 100_000,
        '{"format": NaN}',
        '{"format": 1}',
        '{"format": ' + "9" * 5000 + "}",
        "\ufeff{}",
        '{"format": 1, "state_dict": ["w"], "var_names": null, "attr_dict": ' + '{"a":' * 200 + "1" + "}" * 201,
    ],
    ids=["empty", "list", "cut", "deep", "nan", "bare", "long", "mark", "nested"],
)
def test_strange_json_is_refused(honest, text):
    (honest / ATTRIBUTES).write_text(text, encoding="utf-8")
    with pytest.raises(PackageError, match=ATTRIBUTES):
        read_model(honest)


def test_text_that_is_not_utf8_is_refused(honest):
    (honest / ATTRIBUTES).write_bytes(b'{"format": "\xff"}')
    with pytest.raises(PackageError, match="UnicodeDecodeError"):
        read_model(honest)


def test_too_much_text_is_not_read(honest):
    with (honest / ATTRIBUTES).open("r+b") as file:
        file.truncate((256 << 20) + 1)  # a hole
    with pytest.raises(PackageError, match="268,435,457 bytes"):
        read_model(honest)


@pytest.mark.parametrize("file", [WEIGHTS, ATTRIBUTES])
def test_a_missing_file_is_told(honest, file):
    (honest / file).unlink()
    with pytest.raises(PackageError, match=file):
        read_model(honest)


def with_header(header, data=b""):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        b"\x80\x02cposix\nsystem\n(X\x04\x00\x00\x00truetR.",
        with_header({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, bytes(8)),
        with_header({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 8]}}, bytes(8)),
        with_header({"w": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}, bytes(16)),
        with_header({"w": {"dtype": "O", "shape": [1], "data_offsets": [0, 8]}}, bytes(8)),
        with_header({"w": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}, bytes(8)),
        with_header(
            {
                "w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "v": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            },
            bytes(8),
        ),
    ],
    ids=["empty", "long header", "pickle", "cut", "wide", "hole", "objects", "complex", "overlap"],
)
def test_strange_weights_are_refused(honest, data):
    (honest / WEIGHTS).write_bytes(data)
    with pytest.raises(PackageError, match=WEIGHTS):
        read_model(honest)


def test_a_bool_is_0_or_1(tmp_path):
    write_model(SavedModel({"a": torch.tensor([True, False])}, None, {}), tmp_path)
    data = bytearray((tmp_path / WEIGHTS).read_bytes())
    data[-2:] = b"\x07\x00"
    (tmp_path / WEIGHTS).write_bytes(data)
    assert read_model(tmp_path).state_dict["a"].view(torch.uint8).tolist() == [1, 0]


def test_weights_that_the_text_does_not_name_are_refused(honest):
    save_file({"w": torch.zeros(2), "x": torch.zeros(2), "attr_dict/0": torch.arange(2000)}, honest / WEIGHTS)
    with pytest.raises(PackageError, match="names other weights"):
        read_model(honest)


def test_what_is_written_is_not_changed(tmp_path, read_seven):
    saved = read_seven["TOTALVI"]
    before = copy.deepcopy(saved.attr_dict["registry_"])
    write_model(saved, tmp_path)
    assert same(saved.attr_dict["registry_"], before)
    assert "history_" in saved.attr_dict
