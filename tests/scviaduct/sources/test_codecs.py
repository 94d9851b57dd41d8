"""Local zarr matrices are decoded by zarrs, and give what zarr itself gives."""

from __future__ import annotations

import numpy as np
import pytest
import zarr
from zarr.storage import MemoryStore
from zarrs import ZarrsCodecPipeline

from scviaduct.sources.codecs import compiled_codecs


@pytest.fixture
def written(tmp_path):
    """A group with an array in some chunks, in a folder or in memory."""

    def write(store=None, **how):
        group = zarr.open_group(store or str(tmp_path / "a.zarr"), mode="w", zarr_format=how.pop("zarr_format", 3))
        values = np.arange(1000, dtype=how.pop("dtype", np.float32))
        group.create_array("values", shape=values.shape, dtype=values.dtype, chunks=(300,), **how)[:] = values
        return group, values

    return write


@pytest.mark.parametrize("how", [{}, {"zarr_format": 2}, {"shards": (600,)}, {"dtype": np.int32}, {"fill_value": 7}])
def test_a_local_array_is_decoded_by_zarrs(written, how):
    group, values = written(**how)
    with compiled_codecs(group):
        array = group["values"]
    assert isinstance(array.async_array.codec_pipeline, ZarrsCodecPipeline)
    np.testing.assert_array_equal(array[:], values)
    np.testing.assert_array_equal(array[290:911], values[290:911])


def test_outside_of_it_and_elsewhere_zarr_decodes(written):
    group, values = written(MemoryStore())
    with compiled_codecs(group):
        array = group["values"]
    assert not isinstance(array.async_array.codec_pipeline, ZarrsCodecPipeline)
    np.testing.assert_array_equal(array[:], values)
    group, _ = written()
    with compiled_codecs(group):
        pass
    assert not isinstance(group["values"].async_array.codec_pipeline, ZarrsCodecPipeline)
