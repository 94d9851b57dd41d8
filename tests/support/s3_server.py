"""An S3 server on this machine: moto's, in a thread."""

from __future__ import annotations

import io
import zipfile
from contextlib import contextmanager
from typing import TYPE_CHECKING

import boto3
from moto.server import ThreadedMotoServer

if TYPE_CHECKING:
    from collections.abc import Iterator


class S3Server:
    """A running server.

    Attributes
    ----------
    url
        What ``AWS_ENDPOINT_URL`` is set to.
    client
        Writes to it.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.client = boto3.client(
            "s3",
            endpoint_url=url,
            aws_access_key_id="AKIDTESTS",
            aws_secret_access_key="testsecret",
            region_name="us-east-1",
        )

    def put(self, bucket: str, files: dict[str, bytes], *, public: bool = False) -> None:
        """Make a bucket and put files into it, for everyone to read if public."""
        self.client.create_bucket(Bucket=bucket)
        for key, content in files.items():
            self.client.put_object(Bucket=bucket, Key=key, Body=content, ACL="public-read" if public else "private")


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Run one, on a free port of this machine."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield S3Server(f"http://{host}:{port}")
    finally:
        server.stop()


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip archive."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return made.getvalue()
