"""A state of training as a file: what went in comes out, and nothing that runs."""

from __future__ import annotations

import json
import pickle
import random
from collections import OrderedDict

import numpy as np
import pytest
import torch

from scviaduct.errors import PackageError
from scviaduct.references.states import read_state, write_state


def test_nested_values_come_back_as_they_were(tmp_path):
    weights = torch.arange(6.0).reshape(2, 3)
    state = {
        "state_dict": OrderedDict(a=weights, b=weights[0], flag=torch.tensor([True, False])),
        "optimizer": {0: {"step": torch.tensor(3.0), "betas": (0.9, 0.999)}, "params": [0, 1], "foreach": None},
        "infinite": float("inf"),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "python": random.getstate(),
        "scalar": np.float32(0.5),
        "empty": {"dict": {}, "list": [], "tuple": ()},
    }
    write_state(state, tmp_path / "deep" / "state.safetensors")
    found = read_state(tmp_path / "deep" / "state.safetensors")
    assert type(found["state_dict"]) is OrderedDict
    assert all(torch.equal(found["state_dict"][key], value) for key, value in state["state_dict"].items())
    assert found["optimizer"][0]["betas"] == (0.9, 0.999)
    assert (found["optimizer"]["params"], found["optimizer"]["foreach"]) == ([0, 1], None)
    assert found["python"] == state["python"]
    assert found["numpy"][1].dtype == np.uint32
    np.random.set_state(found["numpy"])  # noqa: NPY002
    random.setstate(found["python"])
    assert (found["infinite"], found["scalar"], found["empty"]) == (float("inf"), 0.5, state["empty"])
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["state.safetensors"]


def test_what_is_not_plain_is_refused_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "state.safetensors"
    write_state({"epoch": 1}, path)
    with pytest.raises(TypeError, match=r"holds a builtins\.object"):
        write_state({"epoch": 2, "odd": object()}, path)
    assert read_state(path) == {"epoch": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"\0" * 40, pickle.dumps({"a": 1}), json.dumps({"a": 1}).encode()])
def test_a_file_of_another_kind(tmp_path, content):
    path = tmp_path / "state.safetensors"
    path.write_bytes(content)
    with pytest.raises(PackageError, match=r"holds no state of a training .*Start over: --restart\."):
        read_state(path)
