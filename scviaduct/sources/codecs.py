"""Which codecs decode a zarr matrix."""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Any

import zarr
from zarr.storage import LocalStore

if TYPE_CHECKING:
    from collections.abc import Iterator

_COMPILED = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "threading.max_workers": 1}
"""zarrs decodes 1.5 times as fast as zarr's own codecs. One thread: readers are processes."""


@contextlib.contextmanager
def compiled_codecs(group: Any) -> Iterator[None]:
    """Arrays of a zarr group that are opened in here are decoded by zarrs, if they lie in a local folder.

    An array with a codec that zarrs lacks is decoded by zarr itself, and so is one behind an fsspec URL: zarrs reads
    stores itself, and fsspec's credentials are not known to it. The values are the same.

    Parameters
    ----------
    group
        zarr group, or a group of h5py, for which nothing changes.
    """
    if not (isinstance(group, zarr.Group) and isinstance(group.store, LocalStore)):
        yield
        return
    with zarr.config.set(_COMPILED), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Array is unsupported by ZarrsCodecPipeline", UserWarning)
        yield
