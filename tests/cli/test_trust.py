"""Tests of run directories that somebody else wrote: they run no code, open no server and get no token."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import ray
import requests

import mhmoe_ray as mh
from mhmoe_ray.cluster import serving, submissions
from mhmoe_ray.cluster.connect import connect, connect_recorded, forget, use
from mhmoe_ray.errors import ClusterError, SpecError, TokenError
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import Attempt, add_attempt, create_run
from mhmoe_ray.spec import KeySpec, load_deploy_spec
from tests.checkpoint.huggingface.conftest import MIXTRAL, TEXT, make_run
from tests.cli.run import assert_one_line, mhmoe
from tests.support.specs import tiny_spec

TOKEN = "token-of-the-user"
JOB = "foreign-1"


class HostileDashboard(BaseHTTPRequestHandler):
    """Handler that answers like Ray's dashboard, with a job that runs until it is stopped, and records all headers."""

    def do_GET(self):
        self.server.recorded_headers.append(str(self.headers))
        if self.server.required_token and self.server.required_token not in str(self.headers):
            self.send_error(401)
            return
        is_stopped = self.path.endswith("/stop") or self.server.is_stopped
        self.server.is_stopped = is_stopped
        status = "STOPPED" if is_stopped else "RUNNING"
        answers = {
            "/api/version": {"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": "s"},
            "/nodes?view=summary": {"data": {"summary": [], "nodeLogicalResources": {}}},
            f"/api/jobs/{JOB}/logs": {"logs": "a line of the job"},
            f"/api/jobs/{JOB}/stop": {"stopped": True},
            f"/api/jobs/{JOB}": {"status": status, "message": "", "end_time": None},
            "/api/serve/applications/": {"applications": {}, "http_options": None, "proxies": {}},
        }
        body = json.dumps(answers[self.path]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_):
        """Log nothing."""


@pytest.fixture
def dashboard():
    """Yield a server that stands at the address of a run directory; its attribute `recorded_headers` has all headers.

    It answers only requests with its attribute `required_token`, if that is set.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), HostileDashboard)
    server.recorded_headers, server.is_stopped, server.required_token = [], False, None
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def own_home(tmp_path, monkeypatch):
    """Give this user an empty state folder and a token."""
    monkeypatch.setenv("MHMOE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def running_run(tmp_path, own_home, dashboard):
    """Return a run whose directory says that it trains on the hostile dashboard's cluster and is served there."""
    run = create_run(tiny_spec(tmp_path))
    add_attempt(run, Attempt(JOB, dashboard.address, local=False))
    events.record(run, "submitted", attempt=1, job=JOB, address=dashboard.address)
    served = {"application": "mhmoe", "url": "http://127.0.0.1:9", "checkpoint": "step_00000001.1"}
    events.record(run, "served", address=dashboard.address, **served)
    return run


def test_commands_send_the_token_to_no_address_of_a_run_directory(tmp_path, running_run, dashboard):
    assert running_run.id in mhmoe(tmp_path, "list").out
    assert mhmoe(tmp_path, "status", "--json").json()["cluster"] == "the job is alive"
    assert mhmoe(tmp_path, "logs").out == "a line of the job\n"
    assert mhmoe(tmp_path, "report").code in (0, 7)
    assert mhmoe(tmp_path, "rm", running_run.id, "--yes").code == 7
    assert mhmoe(tmp_path, "stop", running_run.id).code == 0
    assert len(dashboard.recorded_headers) > 10
    assert not any(TOKEN in headers for headers in dashboard.recorded_headers)


def test_a_job_starts_only_on_a_cluster_that_the_user_named(tmp_path, running_run, dashboard):
    events.record(running_run, "stopped", reason="its job was ended")
    with pytest.raises(
        ClusterError, match=r"only the run directory names its address; .* give its address as an argument"
    ):
        mh.Run(running_run).resume()
    assert not dashboard.recorded_headers


def test_token_goes_to_addresses_that_the_user_gave(own_home, dashboard, monkeypatch):
    dashboard.required_token = TOKEN
    with pytest.raises(
        TokenError, match=r"only a run directory names its address, so no token is sent; .* cluster use"
    ):
        connect_recorded(dashboard.address)
    assert connect_recorded(dashboard.address, given_addresses=[dashboard.address]).token.value == TOKEN
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", dashboard.address)
    assert connect_recorded(dashboard.address).token.value == TOKEN
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    use("lab", dashboard.address)
    assert connect_recorded(dashboard.address).token.value == TOKEN
    forget("lab")
    with pytest.raises(TokenError, match="no token is sent"):
        connect_recorded(dashboard.address)
    # An address of an argument is remembered.
    assert connect(dashboard.address).token.value == TOKEN
    assert connect_recorded(dashboard.address).token.value == TOKEN
    assert (submissions.state_folder() / submissions.FILE).stat().st_mode & 0o777 == 0o600


def guarded_spec(run, site):
    """Return the spec of a run with settings that run the file sitecustomize.py of a folder and open the server."""
    spec = run.spec()
    cluster = spec.cluster.model_copy(update={"runtime_env": {"env_vars": {"PYTHONPATH": str(site)}}})
    keys = (KeySpec(name="stranger", sha256="0" * 64),)
    opened = {"host": "0.0.0.0", "keys": keys, "cors_origins": ("*",)}
    return spec.model_copy(update={"cluster": cluster, "serve": spec.serve.model_copy(update=opened)})


@pytest.fixture
def hostile_run(tmp_path):
    """Return a finished run that this user did not submit, and the file that its spec's code creates when it runs."""
    site, evidence = tmp_path / "site", tmp_path / "code-ran"
    site.mkdir()
    (site / "sitecustomize.py").write_text(f"open({str(evidence)!r}, 'w').close()\n")
    run = make_run(tmp_path, MIXTRAL)
    run.write_spec(guarded_spec(run, site))
    return run, evidence


@pytest.mark.ray
def test_foreign_run_neither_runs_code_nor_opens_a_server(tmp_path, local_cluster, hostile_run, unused_port):
    run, evidence = hostile_run
    (tmp_path / "text.txt").write_text("\n".join(TEXT))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the quick"}\n')
    for words in (["list"], ["status", run.id], ["logs", run.id], ["report", run.id]):
        mhmoe(tmp_path, *words)
    evaluated = mhmoe(tmp_path, "eval", run.id, "--text", "text.txt", "--json")
    assert (evaluated.code, "cluster.runtime_env=" in evaluated.err, "serve.host" in evaluated.err) == (0, True, False)
    batch = ("generate", run.id, "--input", "prompts.jsonl", "--set", "serve.max_tokens=4", "--output")
    answered = mhmoe(tmp_path, *batch, "answers")
    assert answered.code == 0, answered.err
    try:
        deployed = mhmoe(tmp_path, "serve", "deploy", run.id, "--name", "foreign", "--set", f"serve.port={unused_port}")
        assert deployed.code == 0, deployed.err
        warning = f"warning: you did not submit run {run.id}, so these settings of it are ignored: cluster.runtime_env="
        assert warning in deployed.err
        assert 'serve.host="0.0.0.0", serve.keys=[{"name": "stranger"' in deployed.err
        config, host, _ = serving.deployed_config(connect(), "foreign")
        assert (config["runtime_env"], host, config["args"]["serve"]["keys"]) == ({}, "127.0.0.1", [])
        assert config["args"]["serve"]["cors_origins"] == []
        answer = requests.get(f"http://127.0.0.1:{unused_port}/foreign/v1/models", timeout=60)
        assert answer.status_code == 200
    finally:
        mhmoe(tmp_path, "serve", "down", "foreign")
    assert not evidence.exists()
    # With the user's word, the same settings apply, so the checks above can fail.
    trusted = mhmoe(tmp_path, *batch, "other-answers", "--trust-run")
    assert (trusted.code, "warning" in trusted.err) == (0, False), trusted.err
    assert evidence.exists()


def test_settings_that_the_user_submitted_are_trusted_in_any_run(tmp_path, own_home):
    spec = guarded_spec(make_run(tmp_path, MIXTRAL), tmp_path)
    options = {"engine": "vllm", "vllm": {"worker_cls": "code.Worker"}}
    spec = spec.model_copy(update={"serve": spec.serve.model_copy(update=options)})
    assert set(submissions.unrecorded_settings(spec)) == set(submissions.GUARDED_KEYS)
    assert submissions.unrecorded_settings(tiny_spec(tmp_path)) == {}
    submissions.record_settings(spec)
    assert submissions.unrecorded_settings(spec) == {}
    # Together they were submitted; a part of them was not.
    closed_spec = spec.model_copy(
        update={"serve": spec.serve.model_copy(update={"keys": (), "cors_origins": (), "vllm": {}})}
    )
    assert set(submissions.unrecorded_settings(closed_spec)) == {"cluster.runtime_env", "serve.host"}
    assert "PYTHONPATH" not in (submissions.state_folder() / submissions.FILE).read_text()


def test_overrides_apply_to_the_defaults_of_ignored_keys(tmp_path, hostile_run, own_home):
    run, _ = hostile_run
    overrides = ["cluster.runtime_env.env_vars.OWN=1", "serve.port=8001"]
    spec = load_deploy_spec(run.spec_file, overrides, submissions.unrecorded_settings)
    assert (spec.cluster.runtime_env, spec.serve.host) == ({"env_vars": {"OWN": 1}}, "127.0.0.1")
    assert (spec.serve.port, spec.serve.keys, spec.serve.cors_origins) == (8001, (), ())


def test_foreign_run_is_resumed_only_if_it_is_trusted(tmp_path, hostile_run, own_home):
    run, _ = hostile_run
    result = mhmoe(tmp_path, "resume", run.id, "--until", "30")
    assert_one_line(result, SpecError.exit_code, f"run {run.id}", "you did not submit it", "`mhmoe resume --trust-run`")


def test_damaged_record_is_one_line(tmp_path, own_home, hostile_run):
    path = submissions.state_folder() / submissions.FILE
    path.write_text("{")
    with pytest.raises(ClusterError, match=f"{path}: it is damaged; remove it"):
        submissions.unrecorded_settings(hostile_run[0].spec())
