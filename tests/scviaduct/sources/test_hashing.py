"""Hashes of cell keys are those of pandas: digests in committed stores are made of them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scviaduct.sources.hashing import hash_keys
from scviaduct.store.staging import keys_digest


def of_pandas(words):
    return pd.util.hash_array(np.array(words, object), categorize=False)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), min_size=1))
def test_hashes_are_those_of_pandas(words):
    np.testing.assert_array_equal(hash_keys(pa.array(words, pa.string())), of_pandas(words))


@pytest.mark.parametrize("length", [0, 7, 8, 9, 16, 255, 256, 1_000])
def test_any_length_is_hashed(length):
    words = ["x" * length, "é" * length]
    np.testing.assert_array_equal(hash_keys(pa.array(words)), of_pandas(words))


def test_slices_chunks_and_other_types_are_hashed_the_same():
    words = [f"cell-{i}" for i in range(50)]
    plain, wanted = pa.array(words), of_pandas(words)
    np.testing.assert_array_equal(hash_keys(plain.slice(3, 20)), wanted[3:23])
    np.testing.assert_array_equal(hash_keys(pa.chunked_array([plain.slice(0, 7), plain.slice(7)])), wanted)
    np.testing.assert_array_equal(hash_keys(plain.cast(pa.large_string())), wanted)
    np.testing.assert_array_equal(hash_keys(pa.array([None, "a"], pa.string())), of_pandas([None, "a"]))
    assert hash_keys(pa.array([], pa.string())).shape == (0,)


def test_the_digest_of_a_set_of_keys_is_fixed():
    assert keys_digest(pa.chunked_array([["b", "a"], ["cell-1"]])) == keys_digest(
        pa.chunked_array([["a", "cell-1", "b"]])
    )
    assert keys_digest(pa.chunked_array([["a", "b", "cell-1"]])) == "f1e12940cf55cf4d39b341bc8ee87764"
