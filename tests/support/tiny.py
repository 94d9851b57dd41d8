"""Tiny references. A test module asks for them with ``pytest_plugins = ["tests.support.tiny"]``."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def tiny(shared_data, tmp_path_factory):
    """The reference of a family, trained when first asked for; further arguments are settings of the model."""
    from tests.support.references import make

    folder, there = tmp_path_factory.mktemp("tiny"), {}

    def get(family, **settings):
        key = "-".join([family, *(f"{name}-{value}" for name, value in settings.items())])
        if key not in there:
            (folder / key).mkdir()
            there[key] = make(family, settings, shared_data, folder / key)
        return there[key]

    return get
