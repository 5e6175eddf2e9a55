"""The `ray start` of a local cluster: its options, the environment that is withheld from it, and its processes.

A process belongs to a cluster if an environment variable of it, which children inherit, names the cluster's folder.
"""

import os
import random
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
from mhmoe_ray.serve.config import ENVIRONMENT

MARK = "MHMOE_CLUSTER"


def is_ours(pid: int, folder: Path) -> bool:
    """Return whether this process is the `ray start` that was given this folder.

    A process id alone does not show that, because another process may have it by now.
    """
    try:
        return str(folder) in " ".join(psutil.Process(pid).cmdline())  # a zombie has no command line
    except psutil.Error:
        return False


def family(pid: int) -> list[psutil.Process]:
    """Return a process and all of its descendants; an empty list if it is gone."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def marked(folder: Path) -> list[psutil.Process]:
    """Return the processes with this folder in their environment, except this one.

    It finds jobs that have outlived their parents. Ray's workers and dashboard modules overwrite their environment with
    a title, so only `family` finds them.
    """
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == str(folder):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def end(processes: Sequence[psutil.Process], *, patience: float, ask: bool = False) -> None:
    """Wait until these processes end, for at most `patience` seconds, then kill the rest.

    With `ask` they get SIGTERM first; otherwise they are left to end by themselves. psutil compares start times before
    it sends a signal, so it never hits another process with the same id.
    """
    for process in processes if ask else ():
        with suppress(psutil.Error):
            process.terminate()
    alive = _alive_after(patience, processes)
    for process in alive:
        with suppress(psutil.Error):
            process.kill()
    _alive_after(10, alive)


def _alive_after(seconds: float, processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Wait for processes to end, and return those that have not ended after that many seconds.

    A zombie, whose parent does not reap it, counts as ended: in a container the parent may be the first process, which
    never reaps.
    """
    deadline = time.monotonic() + seconds
    while True:
        _, alive = psutil.wait_procs(processes, timeout=0)
        alive = [process for process in alive if not _is_over(process)]
        if not alive or time.monotonic() > deadline:
            return alive
        time.sleep(0.05)


def _is_over(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


OBJECT_STORE_BYTES = 512 << 20
PORTS = range(20000, 30000)
"""Range of ports for the servers of local clusters.

It lies outside the ports of other clusters' workers (10002 to 19999) and those that the system assigns (from 32768).
"""

PRIVATE = {
    "RAY_AUTH_MODE": "token",
    # Makes Ray take 127.0.0.1 as the node's address and listen there only; --node-ip-address does not: Ray puts the
    # address of the network card in the place of a loopback one.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
"""Environment variables of a Ray cluster that only this machine can reach, and only with a token."""

_OF_ONE_MACHINE = {
    # Asks, from a process of its own in each run, whether nodes are to be taken away; there is only this one.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # How often a run asks its workers whether they are done or have failed; over a network Ray's 2 s are as well.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # A Python for each core before there is work: jobs have a runtime environment and would not use them.
    "RAY_prestart_worker_first_driver": "0",
}
"""Environment variables that leave out or speed up work of Ray for a cluster that no other node joins.

The user's own settings take precedence.
"""

# What ties a `ray start` to another cluster.
_FOREIGN = (
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "RAY_AUTH_TOKEN",
    "RAY_REDIS_ADDRESS",
    "RAY_JOB_CONFIG_JSON_ENV_VAR",
)

# API keys of whoever starts it: all that the cluster ever runs would have them in its environment.
_SECRET = ("MHMOE_API_KEY", "MHMOE_API_KEYS")


@dataclass(frozen=True)
class LocalCluster:
    pid: int
    """Process id of `ray start --block`; the other processes are its descendants."""
    address: str
    """URL of the dashboard."""
    gcs_address: str
    cpus: int
    """Number of logical CPUs, which may exceed the number of cores."""
    host: str
    """Name of the machine, because several machines may share a state folder."""
    folder: Path
    """Folder of Ray's files and the log of `ray start`."""

    @property
    def ray_folder(self) -> Path:
        return self.folder / "head"  # one level down, since Ray opens its temp-dir to everybody

    @property
    def log(self) -> Path:
        return self.folder / "ray_start.log"


def spawn_ray(cpus: int) -> LocalCluster:
    """Start Ray in a session of its own, without waiting for it.

    Raises:
        ClusterError: no ports are free.
    """
    gcs, board, client, *metrics = free_ports(5)
    folder = _make_folder()
    cluster = LocalCluster(0, f"http://127.0.0.1:{board}", f"127.0.0.1:{gcs}", cpus, socket.gethostname(), folder)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--temp-dir={cluster.ray_folder}", f"--num-cpus={cpus}", f"--object-store-memory={OBJECT_STORE_BYTES}"]
    command += [f"--port={gcs}", "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={board}"]
    command += [f"--ray-client-server-port={client}", "--dashboard-agent-listen-port=0"]
    # Of workers any that the system gives: two clusters would hand out the same ones of 10002 to 19999.
    command += ["--min-worker-port=0", "--max-worker-port=0"]
    if not _shared_memory_holds(OBJECT_STORE_BYTES):
        command += [f"--plasma-directory={folder}"]  # containers have 64 MB there; Ray would warn on every start
    ours = {k: v for k, v in os.environ.items() if k not in (*_FOREIGN, *_SECRET)}
    environment = {
        **_OF_ONE_MACHINE,
        **ours,
        MARK: str(folder),
        **PRIVATE,
        "RAY_AUTH_TOKEN_PATH": str(tokens.token_file()),
        # Away from Ray's fixed 44217 and 44227.
        "AUTOSCALER_METRIC_PORT": str(metrics[0]),
        "DASHBOARD_METRIC_PORT": str(metrics[1]),
        **ENVIRONMENT,
        # Otherwise a cluster with a running job takes half a minute to stop.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }
    # Not Popen, whose object complains when the process outlives it. The shell is there to change the directory: jobs
    # run in it and import from it, so it must not be that of whoever happened to start the cluster.
    shell = ["/bin/sh", "-c", 'cd "$0" && exec "$@"', str(folder), *command]
    log = (os.POSIX_SPAWN_OPEN, 1, str(cluster.log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    files = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0), log, (os.POSIX_SPAWN_DUP2, 1, 2)]
    pid = os.posix_spawn("/bin/sh", shell, environment, file_actions=files, setsid=True)
    return LocalCluster(**(vars(cluster) | {"pid": pid}))


def _make_folder() -> Path:
    """Create a folder with a short path.

    The path of a Unix socket may have 103 characters, and Ray's part takes up to 84.
    """
    base = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="mhmoe-", dir=base if len(base) <= 15 else "/tmp"))


def _shared_memory_holds(size: int) -> bool:
    try:
        shm = os.statvfs("/dev/shm")
    except OSError:
        return True  # no Linux: Ray looks elsewhere by itself
    return shm.f_bavail * shm.f_frsize >= size


def free_ports(count: int) -> list[int]:
    """Return ports from `PORTS` that are free at the moment.

    Raises:
        ClusterError: fewer ports than `count` are free.
    """
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
    raise ClusterError("local cluster", f"no free ports between {PORTS.start} and {PORTS.stop}", "end what uses them")
