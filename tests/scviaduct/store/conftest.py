"""A store of synthetic cells."""

from __future__ import annotations

import pytest

from tests.scviaduct.store.synthetic import Lab


@pytest.fixture
def lab(tmp_path):
    return Lab.make(tmp_path / "store")
