"""Tests of the ways to look at the local cluster with Ray's own tools: its dashboard and `ray status`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pexpect
import pytest

from mhmoe_ray.cluster import dashboard, tokens
from tests.cli.run import assert_one_line, command, mhmoe

pytestmark = pytest.mark.ray


@pytest.fixture
def browser_log(tmp_path, monkeypatch):
    """Make a script the browser, and return the file in which it writes the address that it opens."""
    script, log = tmp_path / "browser.sh", tmp_path / "opened"
    script.write_text(f'#!/bin/sh\nprintf %s "$1" > {log}\n')
    script.chmod(0o755)
    monkeypatch.setenv("BROWSER", f"{script} %s")
    return log


@pytest.mark.parametrize("words", [(), ("--no-open",)])
def test_dashboard_is_opened_from_a_terminal(local_cluster, tmp_path, browser_log, words):
    program, *arguments = command("cluster", "dashboard", *words)
    terminal = pexpect.spawn(program, arguments, cwd=tmp_path, encoding="utf-8", timeout=120)
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert (terminal.exitstatus, terminal.before.splitlines()[0]) == (0, local_cluster.address)
    assert tokens.own_token().value not in terminal.before
    assert (browser_log.read_text() if browser_log.exists() else None) == (None if words else local_cluster.address)


def test_command_that_is_printed_gives_the_token_that_the_page_takes(local_cluster, tmp_path, browser_log):
    result = mhmoe(tmp_path, "cluster", "dashboard")
    assert (result.code, result.out, browser_log.exists()) == (0, f"{local_cluster.address}\n", False)
    print_command = re.search("to print the token: (.*)", result.err)[1]
    token = subprocess.run(print_command, shell=True, capture_output=True, text=True, check=True).stdout
    # The dialog of Ray's page sends the token in this request, and the page needs the cookie of the answer.
    with httpx.Client(base_url=local_cluster.address) as client:
        assert client.get("/").status_code == 200
        assert client.get("/nodes?view=summary").status_code == 401
        bad_answer = client.post("/api/authenticate", headers={"Authorization": "Bearer bad"})
        assert (bad_answer.status_code, dict(bad_answer.cookies)) == (403, {})
        answer = client.post("/api/authenticate", headers={"Authorization": f"Bearer {token}"})
        assert "HttpOnly" in answer.headers["set-cookie"]
        assert client.get("/nodes?view=summary").status_code == 200


def test_dashboard_of_a_cluster_that_is_not_there_is_one_line(tmp_path):
    result = mhmoe(tmp_path, "cluster", "dashboard", MHMOE_HOME=str(tmp_path / "home"))
    assert_one_line(result, 5, "local cluster: none runs", "mhmoe cluster up")


def test_ray_status_that_is_printed_shows_the_node(local_cluster, tmp_path):
    status = mhmoe(tmp_path, "cluster", "status").out
    assert f"{local_cluster.address} (mhmoe cluster dashboard)" in status
    ray_command = status.splitlines()[-1]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    output = subprocess.run(ray_command, shell=True, env=environment, cwd=tmp_path, capture_output=True, text=True)
    [node], _ = dashboard.nodes(local_cluster.address, tokens.own_token())
    assert f" 1 node_{node['nodeId']}" in output.stdout, output
