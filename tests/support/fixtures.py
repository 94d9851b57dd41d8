"""Servers that tests fetch from. A test module asks for them with ``pytest_plugins = ["tests.support.fixtures"]``."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def hub_server():
    """One hub for the whole session; tests take ``hub``."""
    from tests.support.hub_server import HubServer

    server = HubServer()
    yield server
    server.close()


@pytest.fixture
def hub(hub_server, monkeypatch):
    """An empty hub that ``huggingface_hub`` talks to, without a token."""
    from tests.support.hub_server import use

    hub_server.reset()
    use(hub_server, monkeypatch)
    return hub_server


@pytest.fixture(scope="session")
def s3_session():
    """One S3 server for the whole session; tests take ``s3``."""
    from tests.support.s3_server import s3_server

    with s3_server() as server:
        yield server


@pytest.fixture
def s3(s3_session, monkeypatch):
    """An S3 server that the environment names, with credentials; its buckets stay until the session ends."""
    told = {"AWS_ENDPOINT_URL": s3_session.url, "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    told |= {"AWS_ACCESS_KEY_ID": "AKIDTESTS", "AWS_SECRET_ACCESS_KEY": "testsecret"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    return s3_session
