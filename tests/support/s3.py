"""Fixture with a real S3 server on loopback."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from pyarrow import fs

from mhmoe_ray.cluster.spawn import free_ports

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "secret"}


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, fs.FileSystem]]:
    """Start a local S3 server; yield a URI query and pyarrow's file system of the server.

    `s3://bucket/PATH?QUERY` is a path in its bucket `bucket`. The environment has the server's credentials meanwhile.
    """
    missing_packages = [name for name in ("moto", "flask", "flask_cors") if find_spec(name) is None]
    if missing_packages:
        pytest.skip(f"{', '.join(missing_packages)} not installed: see the dev extra")
    [port] = free_ports(1)
    log = tmp_path_factory.mktemp("s3") / "log"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("wb") as out, pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        patch.setenv("MOTO_RECORDER_FILEPATH", str(log.with_name("requests")))
        server = subprocess.Popen(command, stdout=out, stderr=out)
        try:
            _wait_until_listening(server, port, log)
            query = f"region=us-east-1&scheme=http&endpoint_override=127.0.0.1:{port}"
            system, _ = fs.FileSystem.from_uri(f"s3://bucket?{query}&allow_bucket_creation=true")
            system.create_dir("bucket")
            yield query, system
        finally:
            server.terminate()
            server.wait(30)


def _wait_until_listening(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Wait until the server listens on its port; raise an error with its log if it ends before."""
    while server.poll() is None:
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(log.read_text())
