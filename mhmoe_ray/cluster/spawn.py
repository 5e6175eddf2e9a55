"""The `ray start` process of a local cluster: its options, its environment and its child processes.

A process belongs to a cluster if its environment variable `LOCAL_CLUSTER` names the cluster's folder; child processes
inherit the variable.
"""

import os
import random
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from mhmoe_ray.cluster import tokens
from mhmoe_ray.errors import ClusterError
from mhmoe_ray.remote import LOCAL_CLUSTER
from mhmoe_ray.serving.config import ENVIRONMENT


def is_ray_of(pid: int, folder: Path) -> bool:
    """Return whether the process with this id is the `ray start` process of the cluster in this folder."""
    # The id alone does not suffice, because the system may have given it to another process by now. A zombie has no
    # command line, so it does not count.
    try:
        return str(folder) in " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return False


def process_tree(pid: int) -> list[psutil.Process]:
    """Return a process and all of its descendants; an empty list if the process is gone."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def marked_processes_of(folder: Path) -> list[psutil.Process]:
    """Return the processes of the cluster in this folder, except this one; they include jobs whose parents have ended.

    The titles of Ray's workers and dashboard modules overwrite their environment; `process_tree` finds those.
    """
    marked_processes = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(LOCAL_CLUSTER) == str(folder):
                marked_processes.append(process)
        except (psutil.Error, OSError):
            continue
    return marked_processes


def end_processes(processes: Sequence[psutil.Process], *, timeout: float, terminate: bool = False) -> None:
    """Wait up to `timeout` seconds until processes have ended, then kill the rest; `terminate` sends SIGTERM first."""
    # psutil compares start times before it sends a signal, so it never hits another process with the same id.
    for process in processes if terminate else ():
        with suppress(psutil.Error):
            process.terminate()
    alive = _wait_for_end(timeout, processes)
    for process in alive:
        with suppress(psutil.Error):
            process.kill()
    _wait_for_end(10, alive)


def _wait_for_end(seconds: float, processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Wait up to `seconds` until processes have ended, and return those that still run."""
    # A zombie counts as ended. In a container its parent may be the first process, which never reaps it, so waiting for
    # it would take the whole timeout.
    deadline = time.monotonic() + seconds
    while True:
        _, alive = psutil.wait_procs(processes, timeout=0)
        alive = [process for process in alive if not _is_gone_or_zombie(process)]
        if not alive or time.monotonic() > deadline:
            return alive
        time.sleep(0.05)


def _is_gone_or_zombie(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


OBJECT_STORE_BYTES = 512 << 20
PORTS = range(20000, 30000)
"""Ports of local clusters, apart from those of other clusters' workers (10002 to 19999) and of Linux (from 32768)."""

PRIVATE = {
    "RAY_AUTH_MODE": "token",
    # This variable makes Ray use 127.0.0.1 as the address of the node and listen there only. The option
    # --node-ip-address cannot do that, because Ray replaces a loopback address by that of the network card.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
"""Environment variables that make a Ray cluster reachable from this machine only, and only with a token."""

_SINGLE_NODE_SETTINGS = {
    # Ray Train's watcher looks for nodes that are about to be preempted. It is one more process of each run, and
    # useless with one node.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # This is the interval at which a run asks its workers whether they are done or have failed. Ray's default of 2 s
    # saves network traffic, which does not matter on a single node.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Ray Train gives its controller this variable, unless the cluster has it (`RunTrainer`).
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
    # By default Ray looks for new log files ten times a second, unless there are many, and then twice. It measures its
    # processes every 5 s. Together this took a third of the time that an idle cluster takes.
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "15000",
    # By default Ray starts one Python process per logical CPU with the first job. There may be more logical CPUs than
    # cores, so the start of these processes would delay the job.
    "RAY_prestart_worker_first_driver": "0",
    # By default Ray waits a minute for its dashboard. `START_SECONDS` of local.py allows as much as this.
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "120",
}
"""Environment variables that adapt Ray to a cluster with a single node; the user's own values override them."""

_FOREIGN_VARIABLES = (
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "RAY_AUTH_TOKEN",
    "RAY_REDIS_ADDRESS",
    "RAY_JOB_CONFIG_JSON_ENV_VAR",
)
"""Environment variables that would connect a `ray start` to another cluster."""

_SECRET_VARIABLES = ("MHMOE_API_KEY", "MHMOE_API_KEYS")
"""Names of environment variables with the user's API keys, which every job of the cluster would otherwise inherit."""


@dataclass(frozen=True)
class LocalCluster:
    """Record of the local cluster, as a file in the state folder stores it."""

    pid: int
    """Process id of `ray start --block`; the cluster's other processes are its descendants."""
    address: str
    """URL of the cluster's dashboard."""
    gcs_address: str
    cpus: int
    """Number of logical CPUs, which may exceed the number of cores."""
    host: str
    """Name of the machine that runs the cluster, because several machines may share a state folder."""
    folder: Path
    """Folder with Ray's files and the log of `ray start`."""

    @property
    def ray_folder(self) -> Path:
        # Ray gives everybody access to its own folder, so that folder lies below a folder of mode 0700.
        return self.folder / "head"

    @property
    def log(self) -> Path:
        return self.folder / "ray_start.log"

    @property
    def ray_command(self) -> str:
        """Shell command `ray status` with the variables that connect Ray's own tools to this cluster."""
        variables = {"RAY_ADDRESS": self.gcs_address, **PRIVATE, "RAY_AUTH_TOKEN_PATH": str(tokens.token_file())}
        return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in variables.items()), "ray status"])


def spawn_ray(cpus: int) -> LocalCluster:
    """Start Ray with `cpus` logical CPUs in a process session of its own, without waiting until it is ready."""
    gcs, board, client, *metrics = free_ports(5)
    folder = _make_folder()
    cluster = LocalCluster(0, f"http://127.0.0.1:{board}", f"127.0.0.1:{gcs}", cpus, socket.gethostname(), folder)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--temp-dir={cluster.ray_folder}", f"--num-cpus={cpus}", f"--object-store-memory={OBJECT_STORE_BYTES}"]
    command += [f"--port={gcs}", "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={board}"]
    command += [f"--ray-client-server-port={client}", "--dashboard-agent-listen-port=0"]
    # 0 lets the system choose the ports. By default two clusters on one machine would both assign the ports from 10002
    # to 19999.
    command += ["--min-worker-port=0", "--max-worker-port=0"]
    if not _shared_memory_holds(OBJECT_STORE_BYTES):
        # Containers have 64 MB of shared memory by default. Ray would then warn on every start, unless it is given
        # another folder for its object store.
        command += [f"--plasma-directory={folder}"]
    inherited_environment = {k: v for k, v in os.environ.items() if k not in (*_FOREIGN_VARIABLES, *_SECRET_VARIABLES)}
    environment = {
        **_SINGLE_NODE_SETTINGS,
        **_interface_settings(),
        **inherited_environment,
        LOCAL_CLUSTER: str(folder),
        # All processes of a job need the address of their own cluster (train/job.py).
        "RAY_ADDRESS": cluster.gcs_address,
        **PRIVATE,
        "RAY_AUTH_TOKEN_PATH": str(tokens.token_file()),
        # Ray's defaults are the fixed ports 44217 and 44227, which only one cluster on a machine can use.
        "AUTOSCALER_METRIC_PORT": str(metrics[0]),
        "DASHBOARD_METRIC_PORT": str(metrics[1]),
        **ENVIRONMENT,
        # With Ray's default, a cluster with a running job takes half a minute to stop.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }
    # `posix_spawn` is used because a Popen object would warn when the process outlives it. The shell changes the
    # directory: jobs run in the directory of `ray start` and import from there, so it must not be the directory in
    # which the user started the cluster.
    shell = ["/bin/sh", "-c", 'cd "$0" && exec "$@"', str(folder), *command]
    log = (os.POSIX_SPAWN_OPEN, 1, str(cluster.log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    files = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0), log, (os.POSIX_SPAWN_DUP2, 1, 2)]
    pid = os.posix_spawn("/bin/sh", shell, environment, file_actions=files, setsid=True)
    return LocalCluster(**(vars(cluster) | {"pid": pid}))


def _interface_settings() -> dict[str, str]:
    """Return the variables with which gloo and NCCL connect ranks through loopback; they prefer a network card."""
    addresses_of = psutil.net_if_addrs()
    loopback = next((n for n, addresses in addresses_of.items() if "127.0.0.1" in [a.address for a in addresses]), None)
    return dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), loopback) if loopback else {}


def _make_folder() -> Path:
    # The path of a Unix socket may have 103 characters on macOS and 107 on Linux. The part of Ray's socket paths that
    # follows `base` has up to 84 characters, so `base` must be short.
    try:
        base = tempfile.gettempdir()
        return Path(tempfile.mkdtemp(prefix="mhmoe-", dir=base if len(base) <= 15 else "/tmp"))
    except OSError as e:
        reason = f"there is no folder for its files: {e.strerror or e}"
        raise ClusterError("local cluster", reason, "set TMPDIR to a writable one of 15 characters at most") from e


def _shared_memory_holds(size: int) -> bool:
    try:
        shm = os.statvfs("/dev/shm")
    except OSError:
        # There is no /dev/shm on systems other than Linux, where Ray chooses a folder itself.
        return True
    return shm.f_bavail * shm.f_frsize >= size


def free_ports(count: int) -> list[int]:
    """Return ports from `PORTS` that are free at the moment; fewer than `count` are a ClusterError."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as s:
            try:
                s.bind(("", port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise ClusterError(
        "local cluster",
        f"no free ports between {PORTS.start} and {PORTS.stop}",
        "end some of the servers that use them",
    )
