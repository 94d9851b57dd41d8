"""Gzip-compressed arrays are read faster, and come out as h5py gives them."""

from __future__ import annotations

import h5py
import numpy as np
import pytest

from scviaduct.sources.deflated import Deflated, inflating


@pytest.fixture
def written(tmp_path):
    """A dataset of 1,000 values in chunks of 128, opened for reading."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        yield lambda values, **how: file.create_dataset("values", data=values, chunks=how.pop("chunks", (128,)), **how)


@pytest.mark.parametrize("kind", ["<i4", ">i4", "<f4", "<f8", "<u1", "<u2", "<i8", ">f2"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_slices_are_those_of_h5py(written, kind, shuffle):
    dataset = written(np.random.default_rng(0).integers(0, 99, 1000).astype(kind), compression="gzip", shuffle=shuffle)
    array = inflating(dataset)
    assert isinstance(array, Deflated)
    assert (array.shape, array.dtype) == (dataset.shape, dataset.dtype)
    for where in (
        slice(None),
        slice(0, 0),
        slice(5, 6),
        slice(127, 129),
        slice(128, 256),
        slice(990, 2000),
        slice(7, 3),
    ):
        np.testing.assert_array_equal(array[where], dataset[where])
        assert array[where].dtype == dataset[where].dtype


def test_levels_missing_chunks_and_chunks_without_filters(written):
    dataset = written(np.arange(1000), compression="gzip", compression_opts=9)
    dataset.id.write_direct_chunk((256,), np.full(128, 7, dataset.dtype).tobytes(), filter_mask=1)
    np.testing.assert_array_equal(inflating(dataset)[200:400], dataset[200:400])
    sparse = dataset.file.create_dataset(
        "sparse", (1000,), "i4", chunks=(100,), compression="gzip", fillvalue=3, maxshape=(None,)
    )
    sparse[550:560] = 1
    np.testing.assert_array_equal(inflating(sparse)[:], sparse[:])


@pytest.mark.parametrize(
    "how", [{}, {"compression": "lzf"}, {"compression": "gzip", "fletcher32": True}, {"scaleoffset": 0}]
)
def test_others_stay_as_they_are(written, how):
    dataset = written(np.arange(1000), **how)
    assert inflating(dataset) is dataset


def test_a_matrix_and_texts_stay_as_they_are(written):
    dataset = written(np.zeros((8, 8)), chunks=(4, 4), compression="gzip")
    assert inflating(dataset) is dataset
    texts = dataset.file.create_dataset("texts", data=["a", "b"], chunks=(2,), compression="gzip")
    assert inflating(texts) is texts


@pytest.mark.parametrize(
    ("spoilt", "told"),
    [
        (lambda raw: raw[:40] + bytes([raw[40] ^ 255]) + raw[41:], "the chunk at value 128 "),
        (lambda raw: raw[:-4] + b"\0\0\0\0", "the chunk at value 128 does not inflate: .*hecksum"),
        (lambda raw: raw[:20], "the chunk at value 128 inflates to .* bytes, not 1,024"),
    ],
)
def test_damage_is_an_error(written, spoilt, told):
    dataset = written(np.random.default_rng(0).integers(0, 99, 1000), compression="gzip")
    _, raw = dataset.id.read_direct_chunk((128,))
    dataset.id.write_direct_chunk((128,), spoilt(raw))
    with pytest.raises(OSError, match=told):
        inflating(dataset)[100:200]


def test_a_chunk_that_is_too_large_is_an_error(written):
    import zlib

    dataset = written(np.arange(1000), compression="gzip")
    dataset.id.write_direct_chunk((0,), zlib.compress(bytes(64 << 20)))
    with pytest.raises(OSError, match="inflates to 1,025 bytes, not 1,024"):
        inflating(dataset)[:10]
