"""`ray job submit --working-dir .` against a cluster started by hand, with nothing installed on it but dependencies."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest

from scviaduct.store import Store

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
HOST = "127.0.0.2"  # 127.0.0.1 is silently replaced by the machine's own address


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
def dependencies(tmp_path_factory):
    """The bin folder of an environment that has everything but this project."""
    folder = tmp_path_factory.mktemp("nodes") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    (ours,) = [Path(path) for path in sys.path if path.endswith("site-packages")]
    (theirs,) = folder.glob("lib/python*/site-packages")
    for entry in ours.iterdir():
        if "scviaduct" not in entry.name:
            (theirs / entry.name).symlink_to(entry)
    return folder / "bin"


@pytest.fixture(scope="module")
def cluster(dependencies, tmp_path_factory):
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
    env["PATH"] = f"{dependencies}{os.pathsep}{env['PATH']}"
    env.pop("PYTHONPATH", None)
    env.pop("RAY_ADDRESS", None)
    ray = [str(dependencies / "python"), "-m", "ray.scripts.scripts"]
    command = [*ray, "start", "--head", "--block", f"--node-ip-address={HOST}", f"--dashboard-host={HOST}"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    # The socket paths of Ray must stay below 107 characters.
    command += ["--num-cpus=2", "--object-store-memory=536870912", f"--temp-dir=/tmp/sv{os.getpid()}"]
    with (folder / "ray.log").open("w") as log:
        node = subprocess.Popen([str(part) for part in command], env=env, stdout=log, stderr=log)
    try:
        address = f"http://{HOST}:{ports['dashboard-port']}"
        for _ in range(120):
            if (
                subprocess.run(
                    [*ray, "job", "list", "--address", address], env=env, capture_output=True, check=False
                ).returncode
                == 0
            ):
                break
            assert node.poll() is None, (folder / "ray.log").read_text()
            time.sleep(1)
        else:
            pytest.fail((folder / "ray.log").read_text())
        yield address, env, ray
    finally:
        node.send_signal(signal.SIGTERM)
        node.wait(60)


@pytest.fixture(scope="module")
def submit(cluster):
    """Submit the working directory with a command; what came out, and the job's own exit status."""
    address, env, ray = cluster

    def run(name, *arguments):
        command = [*ray, "job", "submit", "--address", address, "--submission-id", name]
        command += ["--working-dir", ROOT, "--", "python", "-m", "pipelines", *arguments]
        done = subprocess.run(
            [str(part) for part in command], env=env, capture_output=True, text=True, timeout=300, check=False
        )
        code = (
            "import sys; from ray.job_submission import JobSubmissionClient as Client;"
            f"print(Client({address!r}).get_job_info({name!r}).driver_exit_code)"
        )
        asked = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        return done, int(asked.stdout.splitlines()[-1])

    return run


def test_a_submitted_job_maps_with_the_code_of_the_working_directory(submit, pbmc, symphony, tmp_path):
    """The nodes have the dependencies only; the four packages travel with the job, to its actors and readers too."""
    store = tmp_path / "store"
    arguments = ["map", symphony, "--reference", pbmc.path, "--store", store, "--shard-cells", "500", "--actors", "2"]
    done, status = submit("map", *arguments, "--readers", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert status == 0
    assert "version 1 holds its 1,500 cells in 3 units" in done.stdout
    assert Store.open(store).space().count() == 1500


def test_the_programs_own_status_is_the_jobs_driver_exit_code(submit, pbmc, tmp_path):
    """``ray job submit`` itself gives 1 for any failure."""
    done, status = submit("wrong", "map", tmp_path / "absent.h5ad", "--reference", pbmc.path, "--store", tmp_path / "s")
    assert (done.returncode, status) == (1, 2)
    assert "absent.h5ad" in done.stdout
    assert "Traceback" not in done.stdout.partition("absent.h5ad")[0]
