import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from mhmoe_ray.cluster import jobs, spawn
from mhmoe_ray.cluster.connect import connect
from mhmoe_ray.cluster.local import RECORD, _last_line, find_local, start_local, stop_local
from mhmoe_ray.cluster.spawn import LocalCluster, spawn_ray
from mhmoe_ray.cluster.tokens import make_token, own_token, token_file
from mhmoe_ray.errors import ClusterError
from mhmoe_ray.remote import LOCAL_CLUSTER
from tests.checkpoint.huggingface.conftest import MIXTRAL, make_run
from tests.cli.conftest import write_spec
from tests.cli.run import Result, assert_one_line, command, mhmoe
from tests.data.texts import write_corpus
from tests.support.watch import newest_run, start_events, wait_until

# This code ignores SIGTERM. It also starts an orphan: a process in another session, whose parent has ended, and which
# ignores SIGTERM too.
STUBBORN = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0 and os.setsid() is None and os.fork() != 0:
    os._exit(0)
time.sleep(600)
"""


def _command_line(process) -> str:
    """Return the command line of a process, or "" if the process is gone."""
    return " ".join(_value_unless_gone(process.cmdline) or [])


def _processes_with_an_orphan(cluster: LocalCluster) -> set[psutil.Process]:
    """Return the cluster's processes if a stubborn one has a parent outside the cluster; else an empty set."""
    cluster_processes = {*spawn.process_tree(cluster.pid), *spawn.marked_processes_of(cluster.folder)}
    stubborn = [p for p in cluster_processes if "SIG_IGN" in _command_line(p)]
    return cluster_processes if any(_value_unless_gone(p.parent) not in cluster_processes for p in stubborn) else set()


def _listening_addresses(process) -> set[str]:
    """Return the IP addresses at which a process listens."""
    connections = _value_unless_gone(process.net_connections) or []
    return {c.laddr.ip.removeprefix("::ffff:") for c in connections if c.status == "LISTEN"}


def _value_unless_gone(read):
    """Return the result of a query of psutil, or None if it fails, as when the process is gone."""
    try:
        return read()
    except psutil.Error:
        return None


def _socket_files(process):
    """Return the paths of the Unix sockets of a process."""
    try:
        return [c.laddr for c in process.net_connections(kind="unix") if c.laddr]
    except psutil.Error:
        return []


def _is_private_folder(folder):
    """Return whether only the owner of a folder can enter it."""
    return folder.is_dir() and folder.stat().st_mode & 0o077 == 0


@pytest.mark.ray
def test_running_cluster_is_found_and_reused(local_cluster):
    assert find_local() == local_cluster
    assert start_local(4) == local_cluster  # the running cluster has 8 CPUs, which are enough


@pytest.mark.ray
def test_cluster_is_private_to_its_user(local_cluster):
    assert local_cluster.folder.stat().st_mode & 0o777 == 0o700
    assert local_cluster.log.stat().st_mode & 0o777 == 0o600
    assert token_file().stat().st_mode & 0o777 == 0o600
    members = [p for p in spawn.process_tree(local_cluster.pid) if _command_line(p)]
    assert len(members) > 5
    assert all(own_token().value not in _command_line(p) for p in members)
    assert set.union(*(_listening_addresses(p) for p in members)) == {"127.0.0.1"}
    # All Unix sockets must be files below folders that only their owner can enter. An abstract socket has no file, so
    # it would fail this test.
    socket_paths = {path for p in members for path in _socket_files(p)}
    assert any("raylet" in path for path in socket_paths)
    assert [path for path in socket_paths if not any(_is_private_folder(folder) for folder in Path(path).parents)] == []


@pytest.mark.ray
def test_two_ranks_and_replicas_listen_on_loopback_only(local_cluster, tmp_path):
    """Rank 0 and each replica open a port that listens on all addresses by default."""
    write_corpus(tmp_path / "raw")
    write_spec(tmp_path, train={"steps": 10**6})
    (tmp_path / "served").mkdir()
    served_run = make_run(tmp_path / "served", MIXTRAL)
    port = spawn.free_ports(1)[0]
    limited_key = {"name": "ann", "sha256": "0" * 64, "requests_per_minute": 9}
    settings = (f"serve.port={port}", f"serve.keys={json.dumps([limited_key])}")
    words = ("--name", "listening", *(word for setting in settings for word in ("--set", setting)))
    try:
        assert mhmoe(tmp_path, "submit", "spec.yaml", "--detach").code == 0
        run = newest_run(tmp_path)
        deployed = mhmoe(tmp_path, "serve", "deploy", str(served_run.path), *words)
        assert deployed.code == 0, deployed.err
        wait_until(lambda: start_events(run), "two ranks")
        addresses = {}
        for process in spawn.process_tree(local_cluster.pid):
            # While an actor runs a method, the title of its process ends with a dot and the method's name.
            kind = re.sub(r"^(ray::[^. ]+)\.\w+", r"\1", _command_line(process)).split(" ")[0]
            addresses.setdefault(kind, set()).update(_listening_addresses(process))
        kinds = ("ray::RayTrainWorker", "ray::ServeReplica:listening:completions", "ray::ServeReplica:listening:limits")
        assert addresses.keys() >= set(kinds)
        assert {kind: ips for kind, ips in addresses.items() if not ips <= {"127.0.0.1"}} == {}
    finally:
        mhmoe(tmp_path, "serve", "down", "listening")
        mhmoe(tmp_path, "stop", "--now")


@pytest.mark.ray
@pytest.mark.slow  # the fixture `lane_home` stops a cluster in each session
def test_stop_ends_every_process_of_one_cluster_and_none_of_another(local_cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("MHMOE_HOME", str(tmp_path))
    servers = [
        p for p in spawn.process_tree(local_cluster.pid) if _value_unless_gone(p.name) in ("gcs_server", "raylet")
    ]
    assert len(servers) == 2

    # Two commands that start a cluster at the same time must end up with one cluster.
    code = "from mhmoe_ray.cluster.local import start_local; print(start_local(2).pid)"
    commands = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    pids = {command.communicate()[0] for command in commands}
    second_cluster = find_local()
    assert second_cluster is not None
    assert pids == {f"{second_cluster.pid}\n"}
    assert second_cluster.address != local_cluster.address

    connection = connect()
    jobs.submit(connection, jobs.job_request(["-c", STUBBORN], "stubborn", local=True))
    orphan_processes = wait_until(
        lambda: _processes_with_an_orphan(second_cluster), "the job's child, whose parent is gone"
    )

    assert stop_local()
    assert spawn._wait_for_end(0, list(orphan_processes)) == []
    assert not second_cluster.folder.exists()
    assert not (tmp_path / RECORD).exists()
    assert find_local() is None
    assert not stop_local()
    assert all(p.is_running() for p in servers)
    monkeypatch.undo()
    assert find_local() == local_cluster


def _write_record(home: Path, **changes) -> LocalCluster:
    """Write to `home` the record of a local cluster that is not running, changed by `changes`; return the cluster."""
    folder = home / "mhmoe-test"
    folder.mkdir()
    record = {"pid": 2**22 - 1, "address": "http://127.0.0.1:1", "gcs_address": "127.0.0.1:2", "cpus": 1}
    record |= {"host": socket.gethostname(), "folder": str(folder)} | changes
    (home / RECORD).write_text(json.dumps(record))
    return LocalCluster(**(record | {"folder": folder}))


@pytest.mark.parametrize("pid", [2**22 - 1, os.getpid()], ids=["no such process", "somebody else's process"])
def test_stale_record_is_cleaned_up(pid, tmp_path, monkeypatch):
    monkeypatch.setenv("MHMOE_HOME", str(tmp_path))
    stale_cluster = _write_record(tmp_path, pid=pid)
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    leftover = subprocess.Popen(sleep, env=os.environ | {LOCAL_CLUSTER: str(stale_cluster.folder)})
    other_process = subprocess.Popen([*sleep, str(stale_cluster.folder)])
    try:
        assert find_local() is None
        assert not stale_cluster.folder.exists()
        assert not (tmp_path / RECORD).exists()
        assert leftover.wait(5) == -9 or leftover.returncode == 0  # the code is 0 if psutil has reaped the process
        assert other_process.poll() is None
    finally:
        for process in (leftover, other_process):
            process.kill()
            process.wait()


def test_damaged_record_counts_as_none(tmp_path, monkeypatch):
    monkeypatch.setenv("MHMOE_HOME", str(tmp_path))
    (tmp_path / RECORD).write_text('{"pid": 1}')
    assert find_local() is None
    assert not stop_local()


def test_cluster_of_another_machine_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("MHMOE_HOME", str(tmp_path))
    foreign_cluster = _write_record(tmp_path, host="elsewhere")
    for call in (find_local, stop_local, lambda: start_local(1)):
        with pytest.raises(ClusterError, match="it was started on elsewhere, which shares this home"):
            call()
    assert foreign_cluster.folder.exists()


def test_ranks_of_the_local_cluster_connect_through_the_loopback_interface():
    """The name of this machine may have the address of a network card, which gloo and NCCL would choose."""
    [interface] = set(spawn._interface_settings().values())
    assert "127.0.0.1" in [address.address for address in psutil.net_if_addrs()[interface]]


def test_api_keys_are_not_in_the_environment_of_the_cluster(tmp_path, monkeypatch):
    """Otherwise every process that the cluster starts would have the key in its environment."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nenv\n")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("MHMOE_HOME", str(tmp_path))
    for name in ("MHMOE_API_KEY", "MHMOE_API_KEYS", "OF_ITS_OWN"):
        monkeypatch.setenv(name, "of-this-test-alone")
    cluster = spawn_ray(1)
    os.waitpid(cluster.pid, 0)
    log_text = cluster.log.read_text()
    shutil.rmtree(cluster.folder)
    assert [line for line in log_text.splitlines() if "of-this-test-alone" in line] == ["OF_ITS_OWN=of-this-test-alone"]


@pytest.mark.ray
def test_failed_start_reports_its_reason_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("MHMOE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_ROTATION_MAX_BYTES", "many")
    with pytest.raises(ClusterError, match=r"Ray did not start: ValueError: invalid literal .* 'many'"):
        start_local(1)
    assert {p.name for p in (tmp_path / "home").iterdir()} == {"lock", "ray_token"}
    assert list(tmp_path.glob("mhmoe-*")) == []


@pytest.mark.ray
def test_late_dashboard_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("MHMOE_HOME", str(tmp_path))
    monkeypatch.setenv("RAY_DASHBOARD_STARTUP_TIMEOUT_S", "0")
    with pytest.raises(ClusterError, match="Ray did not start: its dashboard was not ready in time, as on a machine"):
        start_local(1)


@pytest.mark.parametrize(
    ("ending", "line"),
    [
        ("", "its dashboard was not ready in time, as on a machine that is too busy"),
        (", return code 1", "OSError: the port is taken"),
    ],
)
def test_objects_in_the_log_of_the_dashboard_are_no_reason(ending, line, tmp_path):
    """Ray repeats the last lines of this log, in which the dashboard lists its routes."""
    route = "INFO -- <ResourceRoute [GET] <PlainResource /nodes> -> <bound method x of <Y object at 0x7f63b6d9f9d0>>>"
    log = tmp_path / "log"
    log.write_text(f"ERROR -- Failed to start the dashboard {ending}\nOSError: the port is taken\n{route}\n{route}\n")
    assert _last_line(log) == line


def _run_without_writing(folder: Path, *words: str) -> Result:
    """Run `mhmoe` in an environment in which no file can get a byte, and folder/home as its state folder."""
    process = subprocess.run(
        command(*words),
        cwd=folder,
        env=os.environ | {"MHMOE_HOME": str(folder / "home")},
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
    )
    return Result(process.returncode, process.stdout, process.stderr)


@pytest.mark.parametrize(("verb", "code"), [("cluster up", 5), ("bench serve engines", 7)])
def test_machine_without_a_folder_for_temporary_files_is_one_line(verb, code, tmp_path, monkeypatch):
    """Python takes a folder for temporary files only if it can write a file there."""
    monkeypatch.setenv("MHMOE_HOME", str(tmp_path / "home"))
    make_token()
    result = _run_without_writing(tmp_path, *verb.split())
    assert_one_line(result, code, "No usable temporary directory", "set TMPDIR")


def test_token_that_cannot_be_written_is_one_line(tmp_path):
    assert_one_line(_run_without_writing(tmp_path, "cluster", "up"), 5, "File too large", "set MHMOE_HOME")
