"""The local cluster: a Ray cluster on this machine, which outlives the command that starts it.

Only its owner can use it: it has a token, it listens on loopback only, and its files lie below a folder of mode 0700.
It uses none of Ray's default ports, so several local clusters, of several users or state folders, can run side by side.
"""

import os
import re
import shutil
import socket
import time
from dataclasses import asdict
from pathlib import Path

from mhmoe_ray.cluster import dashboard, spawn, tokens
from mhmoe_ray.cluster.spawn import LocalCluster, spawn_ray
from mhmoe_ray.cluster.tokens import state_folder, state_lock, write_state
from mhmoe_ray.errors import ClusterError, TokenError
from mhmoe_ray.parsing import parse_object
from mhmoe_ray.storage import read_file

RECORD = "cluster.json"
"""Name of the file in the state folder that records the local cluster."""
START_SECONDS = 120
"""Timeout for the start of Ray, which takes 5 to 10 seconds on an idle machine."""
ANSWER_SECONDS = 30
"""Timeout for the first answer of a local cluster whose process is alive."""


def start_local(cpus: int) -> LocalCluster:
    """Return the local cluster; start it with `cpus` logical CPUs if it does not run. A failure is a ClusterError."""
    with state_lock():
        running = _find()
        if running:
            return running
        tokens.make_token()
        cluster = spawn_ray(cpus)
        try:
            _write(cluster)
            _wait_until_ready(cluster)
        except BaseException:
            # End the cluster after any failure, including Ctrl-C. Otherwise a cluster could stay behind that no command
            # finds.
            _end(cluster)
            raise
        return cluster


def find_local() -> LocalCluster | None:
    """Return the local cluster if it runs; None otherwise.

    It is a ClusterError if the dashboard of a live process does not answer, or if the cluster was started on another
    machine that shares this state folder.
    """
    if not (state_folder() / RECORD).exists():
        return None
    with state_lock():
        return _find()


def recorded_address() -> str | None:
    """Return the address that the local cluster had when it started, without a check whether it still runs."""
    cluster = _read()
    return cluster.address if cluster else None


def stop_local() -> bool:
    """Stop the local cluster, with every job on it, and remove its files; return whether it was running."""
    with state_lock():
        cluster = _read()
        if cluster is None:
            return False
        was_running = _runs_here(cluster)
        _end(cluster)
        return was_running


def _find() -> LocalCluster | None:
    """Return the local cluster if it answers; remove a dead one's files. The caller holds the state folder's lock."""
    cluster = _read()
    if cluster is None:
        return None
    if not _runs_here(cluster):
        # The machine was rebooted, or somebody killed the cluster. The files and the record that it left behind are
        # removed here.
        _end(cluster)
        return None
    # Ask again for a while, because a dashboard on a busy machine answers late.
    deadline = time.monotonic() + ANSWER_SECONDS
    while True:
        try:
            _check_ready(cluster)
            return cluster
        except TokenError:
            raise
        except ClusterError as e:
            if time.monotonic() > deadline:
                raise ClusterError("local cluster", e.reason, "restart it: mhmoe cluster down") from e
            time.sleep(0.5)


def _runs_here(cluster: LocalCluster) -> bool:
    """Return whether the cluster's `ray start` process is alive; a cluster of another machine is a ClusterError."""
    if spawn.is_ray_of(cluster.pid, cluster.folder):
        return True
    if cluster.host != socket.gethostname():
        fix = f"stop it there, or set MHMOE_HOME; if that machine is gone, remove {state_folder() / RECORD}"
        raise ClusterError("local cluster", f"it was started on {cluster.host}, which shares this home", fix)
    return False


def _wait_until_ready(cluster: LocalCluster) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        if os.waitpid(cluster.pid, os.WNOHANG)[0]:
            raise ClusterError(
                "local cluster", f"Ray did not start: {_last_line(cluster.log)}", "repair that and retry"
            )
        try:
            return _check_ready(cluster)
        except ClusterError as e:
            if time.monotonic() > deadline:
                reason = f"{e.reason} after {START_SECONDS} s; its last log line is: {_last_line(cluster.log)}"
                raise ClusterError("local cluster", reason, "try again when the machine is less busy") from e
            time.sleep(0.1)


def _check_ready(cluster: LocalCluster) -> None:
    """Raise a ClusterError until Ray has written its address, the last step of its start, and its jobs API answers."""
    if not (cluster.ray_folder / "ray_current_cluster").exists():
        raise ClusterError("local cluster", "Ray is still starting", "wait")
    dashboard.ray_version(cluster.address, tokens.own_token())


def _last_line(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    # After this line, which names a return code if the dashboard has ended, Ray repeats the dashboard's own log.
    if re.search(r"Failed to start the dashboard\s*$", text, re.MULTILINE):
        return "its dashboard was not ready in time, as on a machine that is too busy"
    lines = [line.strip() for line in text.split("\n") if line.strip() and " object at 0x" not in line]
    return lines[-1] if lines else "its log is empty"


def _end(cluster: LocalCluster) -> None:
    """Shut Ray down (`ray stop` would end every Ray on the machine), kill the other processes, and remove the files."""
    members = spawn.process_tree(cluster.pid) if spawn.is_ray_of(cluster.pid, cluster.folder) else []
    # After SIGTERM, `ray start` normally ends its child processes within seconds. Those that still run are then killed,
    # because they would hold ports and memory.
    spawn.end_processes(members[:1], terminate=True, timeout=15)
    spawn.end_processes(members[1:], timeout=1)
    spawn.end_processes(spawn.marked_processes_of(cluster.folder), timeout=0)
    if cluster.folder.name.startswith("mhmoe-"):
        shutil.rmtree(cluster.folder, ignore_errors=True)
    (state_folder() / RECORD).unlink(missing_ok=True)


def _write(cluster: LocalCluster) -> None:
    write_state(RECORD, asdict(cluster) | {"folder": str(cluster.folder)})


def _read() -> LocalCluster | None:
    try:
        record = parse_object(read_file(state_folder() / RECORD))
        return LocalCluster(**(record | {"folder": Path(record["folder"])}))
    except (OSError, ValueError, KeyError, TypeError):
        return None
