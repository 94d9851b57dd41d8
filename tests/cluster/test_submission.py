"""`ray job submit --working-dir .` against a cluster started by hand, with nothing installed on it but dependencies."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
HOST = "127.0.0.2"  # 127.0.0.1 is silently replaced by the machine's own address
BIN = Path(sys.executable).parent


def _free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    try:
        for sock in sockets:
            sock.bind((HOST, 0))
        return [sock.getsockname()[1] for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A head node with a dashboard and token authentication, on loopback, ended by its pid."""
    folder = tmp_path_factory.mktemp("ray")
    token = folder / "token"
    token.write_text("5" * 64)
    token.chmod(0o600)
    names = [
        "port",
        "dashboard-port",
        "object-manager-port",
        "node-manager-port",
        "dashboard-agent-listen-port",
        "dashboard-agent-grpc-port",
        "runtime-env-agent-port",
        "metrics-export-port",
        "ray-client-server-port",
    ]
    ports = dict(zip(names, _free_ports(len(names)), strict=True))
    env = os.environ | {"HOME": str(folder), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    env["PATH"] = f"{BIN}{os.pathsep}{env['PATH']}"  # the environment with the dependencies is the nodes' own
    env.pop("RAY_ADDRESS", None)
    command = [BIN / "ray", "start", "--head", "--block", f"--node-ip-address={HOST}", f"--dashboard-host={HOST}"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    # The socket paths of Ray must stay below 107 characters.
    command += ["--num-cpus=2", "--object-store-memory=536870912", f"--temp-dir=/tmp/sv{os.getpid()}"]
    with (folder / "ray.log").open("w") as log:
        node = subprocess.Popen([str(part) for part in command], env=env, stdout=log, stderr=log)
    try:
        address = f"http://{HOST}:{ports['dashboard-port']}"
        for _ in range(120):
            listed = [str(BIN / "ray"), "job", "list", "--address", address]
            if subprocess.run(listed, env=env, capture_output=True, check=False).returncode == 0:
                break
            assert node.poll() is None, (folder / "ray.log").read_text()
            time.sleep(1)
        else:
            pytest.fail((folder / "ray.log").read_text())
        yield address, env
    finally:
        node.send_signal(signal.SIGTERM)
        node.wait(60)


def submit(cluster, *arguments):
    address, env = cluster
    command = [BIN / "ray", "job", "submit", "--address", address, "--working-dir", ROOT, "--", *arguments]
    return subprocess.run(
        [str(part) for part in command], env=env, capture_output=True, text=True, timeout=300, check=False
    )


def test_trivial(cluster):
    t = time.time()
    out = submit(cluster, "python", "-m", "pipelines", "--version")
    print(out.stdout, out.stderr, time.time() - t)
    assert out.returncode == 0
