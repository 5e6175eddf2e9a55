"""Tests of the findings of `mhmoe doctor`, on this machine and on real clusters."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import get_args

import pytest

from mhmoe_kernels.cpp import build
from mhmoe_ray import ray_compat
from mhmoe_ray.cluster import dashboard, doctor
from mhmoe_ray.cluster.spawn import free_ports
from mhmoe_ray.spec.moe import MoESpec
from mhmoe_ray.storage import location
from tests.cli.run import mhmoe
from tests.support.watch import wait_until

NO_SERVER = "http://127.0.0.1:1"


def level_by_check(findings):
    """Return the level of each finding, such as ok or error, by the name of its check."""
    return {f.check: f.level for f in findings}


def test_machine_findings_are_ok_here():
    findings = {f.check: f for f in doctor.machine_findings()}
    for check in ("python", "ray", "torch", "collectives", "kernel reference", "kernel grouped"):
        assert findings[check].level == "ok", findings[check]
    assert all(f.fix for f in findings.values() if f.level != "ok")
    kernels = {name.removeprefix("kernel ") for name in findings if name.startswith("kernel ")}
    assert kernels == set(get_args(MoESpec.model_fields["kernel"].annotation)) - {"auto"}


def test_other_ray_is_a_warning_and_one_without_our_interfaces_an_error(monkeypatch):
    monkeypatch.setattr(ray_compat, "RAY_RELEASE", "3.1")
    [ray] = [f for f in doctor.machine_findings() if f.check == "ray"]
    assert (ray.level, "only 2.60 is tested" in ray.message) == ("warning", True)
    entry = ray_compat.PRIVATE_NAMES["state"]._replace(members={"get_moons": ""})
    monkeypatch.setitem(ray_compat.PRIVATE_NAMES, "state", entry)
    [ray] = [f for f in doctor.machine_findings() if f.check == "ray"]
    assert ray.level == "error"
    assert re.search(r"train/placement\.py needs .* has no get_moons", ray.message)


@pytest.mark.cpu
def test_unknown_cpu_level_is_an_error(monkeypatch, request):
    # The process caches the kernel's library, or the error of loading it. An earlier test may have loaded the library,
    # and later tests must not find the error of this test.
    build._library_or_error.cache_clear()
    request.addfinalizer(build._library_or_error.cache_clear)
    monkeypatch.setenv("MHMOE_CPU_LEVEL", "sse9")
    findings = {f.check: f for f in doctor.machine_findings()}
    assert (findings["torch"].level, findings["kernel cpp"].level) == ("error", "note")
    assert "MHMOE_CPU_LEVEL is 'sse9', but levels are generic, avx2" in findings["torch"].message


@pytest.mark.long
def test_storage_check_reports_failures_and_leaves_no_files(tmp_path):
    assert level_by_check(doctor.storage_findings(tmp_path / "new")) == {"storage": "ok"}
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    [finding] = doctor.storage_findings(tmp_path / "file" / "below")
    assert (finding.level, "Not a directory" in finding.message) == ("error", True)
    [finding] = doctor.storage_findings(
        location("s3://bucket/x?scheme=http&region=us-east-1&endpoint_override=127.0.0.1:9")
    )
    assert finding.level == "error"


def test_storage_with_an_impossible_name_is_an_error(tmp_path):
    [finding] = doctor.storage_findings(tmp_path / ("a" * 300))
    assert (finding.level, "File name too long" in finding.message) == ("error", True)


def test_run_directories_that_others_can_read_are_a_warning(tmp_path):
    (tmp_path / "tiny-1").mkdir(mode=0o755)
    (tmp_path / "tiny-1" / "run.json").touch()
    assert level_by_check(doctor.storage_findings(tmp_path))["run directories"] == "warning"
    (tmp_path / "tiny-1").chmod(0o700)
    assert "run directories" not in level_by_check(doctor.storage_findings(tmp_path))


def test_unreadable_folders_in_the_storage_are_ignored():
    with tempfile.TemporaryDirectory() as shared:
        Path(shared).chmod(0o777)
        for name, mode in (("closed", 0o000), ("for-a-group", 0o070)):
            (Path(shared) / name).mkdir()
            (Path(shared) / name).chmod(mode)
        (Path(shared) / "dangling").symlink_to("nowhere")
        user_id = os.geteuid()
        if user_id == 0:
            os.seteuid(65534)  # root could read the closed folders too
        try:
            assert level_by_check(doctor.storage_findings(Path(shared))) == {"storage": "ok"}
        finally:
            os.seteuid(user_id)


def test_doctor_exits_with_11_if_there_is_an_error(tmp_path):
    home = {"MHMOE_HOME": str(tmp_path / "home")}
    assert mhmoe(tmp_path, "doctor", **home).code == 0
    json_result = mhmoe(tmp_path, "doctor", "--address", NO_SERVER, "--json", **home)
    assert json_result.code == 11
    [error] = [finding for finding in json.loads(json_result.out) if finding["level"] == "error"]
    assert (error["what"], "nothing answers there" in error["found"]) == ("cluster", True)
    text_result = mhmoe(tmp_path, "doctor", "--address", NO_SERVER, **home)
    assert "error    cluster: cluster http://127.0.0.1:1: nothing answers there\n" in text_result.out
    assert "\n         check the address, and that the cluster runs\n" in text_result.out


@pytest.mark.ray
def test_local_cluster_has_no_problems(local_cluster):
    findings = list(doctor.reach_findings(None))
    assert level_by_check(findings) == {"cluster": "ok", "token": "ok", "clock": "ok", "nodes": "ok"}
    assert not [f for f in doctor.port_findings() if str(local_cluster.address.rpartition(":")[2]) in f.message]


@pytest.mark.ray
def test_open_dashboard_is_a_warning(tmp_path):
    """The dashboard of `ray start` needs no token by default, so everybody who can reach it can use it."""
    gcs_port, dashboard_port, client_port, *metric_ports = map(str, free_ports(5))
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    # The folder is directly in /tmp, because paths of Ray's sockets below it may have at most 103 characters.
    ray_folder = tempfile.TemporaryDirectory(dir="/tmp")
    command += [f"--temp-dir={ray_folder.name}", "--num-cpus=1", "--object-store-memory=80000000", f"--port={gcs_port}"]
    command += [
        "--dashboard-host=0.0.0.0",
        f"--dashboard-port={dashboard_port}",
        f"--ray-client-server-port={client_port}",
    ]
    command += ["--dashboard-agent-listen-port=0"]
    clean_environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "HOME"}
    environment = {
        **clean_environment,
        "AUTOSCALER_METRIC_PORT": metric_ports[0],
        "DASHBOARD_METRIC_PORT": metric_ports[1],
    }
    environment |= {"HOME": str(tmp_path), "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
    log = (tmp_path / "log").open("w")
    ray = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{dashboard_port}"
        wait_until(lambda: level_by_check(doctor.reach_findings(address)).get("cluster") == "ok", "the dashboard")
        [token] = [f for f in doctor.reach_findings(address) if f.check == "token"]
        assert token.level == "warning"
        assert "without asking for a token" in token.message
        findings = [f for f in doctor.port_findings() if f.check == "open dashboard"]
        assert [f.level for f in findings if f":{dashboard_port} " in f.message] == ["warning"]
    finally:
        ray.terminate()
        ray.wait()
        log.close()
        ray_folder.cleanup()


@pytest.mark.parametrize(
    ("ip", "loopback"),
    [("127.0.0.1", True), ("::1", True), ("::ffff:127.0.0.1", True), ("::ffff:10.0.0.1", False), ("0.0.0.0", False)],
)
def test_loopback_addresses_are_recognised_in_every_spelling(ip, loopback):
    assert dashboard.is_loopback_ip(ip) == loopback
