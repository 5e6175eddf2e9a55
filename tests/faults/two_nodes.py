"""Two nodes of a Ray cluster in network and mount namespaces of their own, with an S3 server and no common folder.

A bridge joins the network namespaces of the nodes with this machine, on which the S3 server and the client run. Each
node has a folder of its own at the same path. Only root can create namespaces.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from pyarrow import fs

from mhmoe_ray.serving.config import ENVIRONMENT as SERVE_ENVIRONMENT
from tests.support.s3 import CREDENTIALS

BRIDGE, HOST = "mhmoe-br", "10.231.78.1"
ADDRESSES = {"mhmoe-a": "10.231.78.2", "mhmoe-b": "10.231.78.3"}
HEAD = ADDRESSES["mhmoe-a"]
S3_PORT = 5118
S3_QUERY = f"region=us-east-1&scheme=http&endpoint_override={HOST}:{S3_PORT}"
DASHBOARD = f"http://{HEAD}:8265"


def run(command: str) -> None:
    subprocess.run(command.split(), check=True)


@contextmanager
def network() -> Iterator[None]:
    """Create the bridge and the network namespaces; skip the test where this user cannot."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("network namespaces need root and iproute2")
    with ExitStack() as stack:
        run(f"ip link add {BRIDGE} type bridge")
        stack.callback(run, f"ip link delete {BRIDGE}")
        run(f"ip address add {HOST}/24 dev {BRIDGE}")
        run(f"ip link set {BRIDGE} up")
        for name, address in ADDRESSES.items():
            run(f"ip netns add {name}")
            stack.callback(run, f"ip netns delete {name}")
            run(f"ip link add {name} type veth peer name eth0 netns {name}")
            run(f"ip link set {name} master {BRIDGE} up")
            run(f"ip -n {name} address add {address}/24 dev eth0")
            for interface in ("lo", "eth0"):
                run(f"ip -n {name} link set {interface} up")
        yield


@contextmanager
def s3_server(folder: Path) -> Iterator[fs.FileSystem]:
    """Run an S3 server that the nodes reach; yield pyarrow's file system of it, with a bucket `bucket`."""
    command = [sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(S3_PORT)]
    with (folder / "s3.log").open("wb") as log, pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            system, _ = fs.FileSystem.from_uri(f"s3://bucket?{S3_QUERY}&allow_bucket_creation=true")
            for _ in range(100):
                with suppress(OSError):
                    system.create_dir("bucket")
                    break
                time.sleep(0.2)
            yield system
        finally:
            server.terminate()
            server.wait(30)


class RayNode:
    """A node of the cluster; its private folder is a file system that only its processes see."""

    def __init__(self, name: str, private_folder: Path, token_file: Path, cpus: int) -> None:
        private_folder.mkdir(exist_ok=True)
        address = ADDRESSES[name]
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        ray += ["--node-ip-address", address, "--num-cpus", str(cpus), "--object-store-memory", "100000000"]
        head = ["--head", "--port", "6379", "--dashboard-host", address, "--temp-dir", f"{private_folder}/ray"]
        ray += head if address == HEAD else ["--address", f"{HEAD}:6379"]
        mount = f'mount -t tmpfs tmpfs {private_folder} && mkdir {private_folder}/home && exec "$@"'
        command = ["ip", "netns", "exec", name, "unshare", "--mount", "sh", "-c", mount, "sh", *ray]
        environment = {**os.environ, **CREDENTIALS, **SERVE_ENVIRONMENT, "HOME": f"{private_folder}/home"}
        environment |= {"RAY_AUTH_MODE": "token"}
        environment |= {"RAY_AUTH_TOKEN_PATH": str(token_file), "RAY_enable_worker_prestart": "0"}
        # The host name, by which gloo finds its interface, is that of this machine on both nodes.
        environment["GLOO_SOCKET_IFNAME"] = "eth0"
        environment.pop("RAY_ADDRESS", None)
        with token_file.with_name(f"{name}.log").open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def kill(self) -> None:
        """Kill all processes of the node at once, as a power failure does."""
        processes = psutil.Process(self.process.pid).children(recursive=True)
        for process in (*processes, self.process):
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.send_signal(signal.SIGKILL)
        self.process.wait(30)
        psutil.wait_procs(processes, 30)
