import dataclasses
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from mhmoe_ray.cluster import dashboard, serve_client, serving
from mhmoe_ray.cluster.connect import Connection
from mhmoe_ray.cluster.jobs import with_packages
from mhmoe_ray.cluster.serve_removal import remove
from mhmoe_ray.errors import ServeError, SpecError
from tests.cli.run import assert_one_line, mhmoe
from tests.cluster.applications import (
    HOST,
    application_details,
    deploying_report,
    echo_config,
    is_port_free,
    json_server,
    request_application,
)
from tests.support.watch import LIMIT, wait_until

SOURCE = """
import os

from ray import serve


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Echo:
    async def __call__(self, request):
        return os.environ["WORD"]


def build(args):
    return Echo.bind()
"""


def test_without_packages_removes_only_our_uploaded_packages():
    runtime_env = {"env_vars": {"A": "b"}, "excludes": ["*.md"], "py_modules": ["s3://bucket/own.zip", "/home/ann/own"]}
    sent_env = with_packages(runtime_env)
    uris = [module if "://" in module else f"gcs://_ray_pkg_{i}.zip" for i, module in enumerate(sent_env["py_modules"])]
    original_env = serving.without_packages({**sent_env, "py_modules": uris})
    assert original_env == {**runtime_env, "py_modules": uris[:2]}, "a package that the spec names is missing"
    assert with_packages(original_env) == {**sent_env, "py_modules": uris[:2] + sent_env["py_modules"][2:]}
    assert serving.without_packages({}) == {}


@pytest.mark.ray
@pytest.mark.slow  # tests/cli/test_serve.py tests the environment in the deployed configuration
def test_replicas_run_in_the_environment_of_the_spec(connection, port, tmp_path):
    """Replicas also use it after an update, and on a cluster that we did not start, to which our packages are sent too.

    The application is not one of ours: it serves no run. So `mhmoe serve status` must not send it an API key, with
    which its operator could send requests to our applications.
    """
    (tmp_path / "own").mkdir()
    (tmp_path / "own/__init__.py").write_text(SOURCE)
    app = {"name": "a", "route_prefix": "/a", "import_path": "own:build", "args": {"checkpoint": "/etc"}}

    def answer(connection, word, runtime_env, modules):
        """Deploy the application in an environment, and return that environment as Serve got it.

        Assert that replicas answer with `word`, and that Serve got `modules` Python packages.
        """
        assert serving.deploy(connection, {**app, "runtime_env": runtime_env}, HOST, port) == f"http://{HOST}:{port}/a"
        serving.wait_until_running(connection, "a")
        assert request_application(port, "a").text == word
        [deployed] = serve_client.app_configs(serve_client.serve_details(connection))
        assert len(deployed["runtime_env"]["py_modules"]) == modules
        return deployed["runtime_env"]

    def environment_with(word):
        return {"py_modules": [str(tmp_path / "own")], "env_vars": {"WORD": word}}

    try:
        answer(connection, "here", environment_with("here"), 1)
        remote_connection = dataclasses.replace(connection, local=False)
        sent_env = answer(remote_connection, "there", environment_with("there"), 3)
        assert answer(remote_connection, "there", serving.without_packages(sent_env), 3) == sent_env
        with pytest.raises(SpecError, match=r"cluster.runtime_env: .*pip"):
            serving.deploy(remote_connection, {**app, "runtime_env": {"pip": 3}}, HOST, port)
        [status] = mhmoe(tmp_path, "serve", "status", "--json", MHMOE_API_KEY="secret").json()
        assert (status["name"], status["checkpoint"], status["stats"]) == ("a", None, None)
        assert_one_line(mhmoe(tmp_path, "serve", "update", "a"), 10, "it serves no checkpoint of a run")
    finally:
        remove(connection, "a")


@pytest.mark.ray
@pytest.mark.slow  # test_serve_removal.py has the quick test of a removal beside a deployment
def test_concurrent_deployments_and_removals_do_not_undo_each_other(connection, port):
    """Two deployments at once start Serve, and both answer; two removals at once end it."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: serving.deploy(connection, echo_config(name, name), HOST, port), "ab"))
        for name in "ab":
            serving.wait_until_running(connection, name)
        assert [request_application(port, name).text for name in "ab"] == ["a", "b"]
        list(pool.map(lambda name: remove(connection, name), "ab"))
    assert not serve_client.serve_details(connection).get("http_options")


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("::1", "http://[::1]:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("node3", "http://node3:8000"),
    ],
)
def test_url_at_gives_the_url_to_reach_a_listening_host(host, url):
    assert dashboard.url_at(host, 8000) == url


@pytest.mark.parametrize(
    ("dashboard_url", "host", "expected"),
    [
        ("http://head:8265", "0.0.0.0", ("http://head:8000", True)),
        ("https://[2001:db8::1]:8265", "::", ("http://[2001:db8::1]:8000", True)),
        ("http://head:8265", "node3", ("http://node3:8000", True)),
        ("http://head:8265", "127.0.0.1", ("http://127.0.0.1:8000", False)),
        # The dashboard is reached through a tunnel, whose address says nothing about the address of Serve.
        ("http://127.0.0.1:8265", "0.0.0.0", ("http://127.0.0.1:8000", False)),
    ],
)
def test_public_url_of_a_server_on_another_machine_and_its_reachability(dashboard_url, host, expected):
    assert serving._public_url(Connection(dashboard_url, False, False, None), host, 8000) == expected
    assert serving._public_url(Connection("http://127.0.0.1:8265", False, True, None), host, 8000)[1]


def test_wait_until_running_reports_progress_and_missing_answers():
    """Starting a node and pulling its image may take half an hour, in which the dashboard may fail to answer."""
    answer, lines = deploying_report("waiting for the cluster to auto-scale"), []
    responses = {"/api/serve/applications/": answer}
    with json_server(responses) as (port, _):

        def say(line):
            lines.append(line)
            responses["/api/serve/applications/"] = None if len(lines) == 1 else answer
            answer["applications"]["a"]["status"] = "RUNNING"

        connection = Connection(f"http://{HOST}:{port}", False, True, None)
        running = serving.wait_until_running(connection, "a", say=say)
    assert running.url == f"http://{HOST}:8000/a"
    assert lines[0] == "waiting: application a is DEPLOYING: waiting for the cluster to auto-scale"
    assert [line.split(",")[0] for line in lines[1:]] == ["still following"]


def test_wait_until_running_raises_for_a_failed_or_removed_application():
    answer = deploying_report("No module named 'x'")
    answer["applications"]["a"]["status"] = "DEPLOY_FAILED"
    with json_server({"/api/serve/applications/": answer}) as (port, _):
        connection = Connection(f"http://{HOST}:{port}", False, True, None)
        with pytest.raises(ServeError, match="application a: No module named 'x'"):
            serving.wait_until_running(connection, "a")
        del answer["applications"]["a"]
        with pytest.raises(ServeError, match="it is gone from the cluster"):
            serving.wait_until_running(connection, "a")


def test_route_of_a_deploying_application_is_taken():
    with pytest.raises(ServeError, match="application b: a already answers at /a"):
        serving._check_route(deploying_report(""), {"name": "b", "route_prefix": "/a"})


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_api_key_is_not_sent_to_a_local_server_on_another_clusters_port(tmp_path, host):
    """The other cluster's dashboard is reached through a tunnel to this machine, as by `kubectl port-forward`.

    Its Serve listens on a port of its own machine; a server here that has the same port must not get the key.
    """
    config = {"import_path": "mhmoe_ray.serving.app:build", "args": {"checkpoint": "/mnt/runs/a-1/checkpoints/s"}}
    app = {"route_prefix": "/", "status": "RUNNING", "message": "", "deployments": {}, "deployed_app_config": config}
    with json_server({}) as (port, requests):
        responses = {
            "/api/version": {"ray_version": "2", "session_name": "elsewhere"},
            "/nodes?view=summary": {
                "data": {"summary": [{"raylet": {"sessionDir": "/tmp/elsewhere"}}], "nodeLogicalResources": {}}
            },
            "/api/serve/applications/": {
                "http_options": {"host": host, "port": port},
                "applications": {"mhmoe": app},
            },
        }
        with json_server(responses) as (dashboard_port, _):
            words = ("serve", "status", "--address", f"http://127.0.0.1:{dashboard_port}")
            [status] = mhmoe(tmp_path, *words, "--json", MHMOE_API_KEY="secret", MHMOE_HOME=str(tmp_path)).json()
            result = mhmoe(tmp_path, *words, MHMOE_API_KEY="secret", MHMOE_HOME=str(tmp_path), COLUMNS="30")
    assert requests == []
    assert result.out.splitlines()[1].split() == ["mhmoe", "RUNNING", status["url"]]
    assert (status["url"], status["reachable"]) == (f"http://127.0.0.1:{port}", False)
    assert f"{status['url']} is an address of the cluster's own machine; ask there, or forward its port" in result.out


def test_api_key_is_not_sent_through_a_proxy(monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    with json_server({}) as (proxy, proxy_requests), json_server({"/stats": {"model": "tiny"}}) as (port, requests):
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, f"http://{HOST}:{proxy}")
        application = serving.Application("mhmoe", f"http://localhost:{port}", True, "RUNNING", "", "/mnt/c", {})
        assert serving.application_stats(application, "secret") == {"model": "tiny"}
    assert (proxy_requests, requests) == ([], [("/stats", True)])


@pytest.mark.parametrize("key", ["ключ", "sécret", "sec\nret"])
def test_api_key_that_cannot_be_sent_is_explained_in_a_line_without_it(key):
    with json_server({"/stats": {"model": "tiny"}}) as (port, requests):
        application = serving.Application("mhmoe", f"http://{HOST}:{port}", True, "RUNNING", "", "/mnt/c", {})
        answer = serving.application_stats(application, key)
    assert answer == "the API key has a character that is not printable ASCII; correct MHMOE_API_KEY"
    assert requests == []


@pytest.mark.ray
def test_deployment_on_a_used_port_fails_and_leaves_nothing(connection):
    with socket.socket() as s:
        s.bind((HOST, 0))
        s.listen()
        used_port = s.getsockname()[1]
        with pytest.raises(ServeError, match=f"application a: .*Failed to bind .*; correct it, or its address {HOST}"):
            serving.deploy(connection, echo_config("a", "x"), HOST, used_port)
    # Serve must not keep the used port either: otherwise the next test, which uses another port, would fail.
    assert serving.applications(connection) == []


@pytest.mark.ray
@pytest.mark.slow
def test_deployments_keep_other_applications(connection, port, monkeypatch):
    """Serve has one configuration for all applications.

    A deployment must keep all other applications, also one that was added while this deployment uploaded its folders.
    """
    # Our packages are sent to a cluster that is not local, so this deployment has folders to upload.
    remote_connection = dataclasses.replace(connection, local=False)
    upload = serving.upload_runtime_env

    def upload_while_another_deploys(*args):
        monkeypatch.setattr(serving, "upload_runtime_env", upload)
        serving.deploy(remote_connection, echo_config("b", "other"), HOST, port)
        return upload(*args)

    monkeypatch.setattr(serving, "upload_runtime_env", upload_while_another_deploys)
    serving.deploy(connection, echo_config("a", "first"), HOST, port)
    for name in "ab":
        serving.wait_until_running(connection, name, LIMIT)
    assert [request_application(port, name).text for name in "ab"] == ["first", "other"]

    sent_env = application_details(connection, "b")["deployed_app_config"]["runtime_env"]
    serving.deploy(
        remote_connection, {**echo_config("b", "other"), "runtime_env": serving.without_packages(sent_env)}, HOST, port
    )
    assert application_details(connection, "b")["deployed_app_config"]["runtime_env"] == sent_env
    with pytest.raises(ServeError, match="application a: it serves no checkpoint of a run"):
        serving.deployed_config(connection, "a")

    serving.deploy(connection, echo_config("a", "second"), HOST, port)
    serving.deploy(connection, echo_config("c", "bad"), HOST, port)
    serving.wait_until_running(connection, "a", LIMIT)
    assert [request_application(port, name).text for name in "ab"] == ["second", "other"]

    with pytest.raises(ServeError, match=f"Serve already listens on {HOST}:{port}"):
        serving.deploy(connection, echo_config("d", "x"), HOST, port + 1)
    with pytest.raises(ServeError, match="application d: a already answers at /a"):
        serving.deploy(connection, {**echo_config("d", "x"), "route_prefix": "/a"}, HOST, port)

    with pytest.raises(ServeError, match="application c: ValueError: bad word; see its log"):
        serving.wait_until_running(connection, "c", LIMIT)
    applications = serving.applications(connection)
    assert [(a.name, a.status, a.url) for a in applications] == [
        ("a", "RUNNING", f"http://{HOST}:{port}/a"),
        ("b", "RUNNING", f"http://{HOST}:{port}/b"),
        ("c", "DEPLOY_FAILED", f"http://{HOST}:{port}/c"),
    ]

    options = {"ray_actor_options": {"num_cpus": 100}, "graceful_shutdown_timeout_s": 1}
    serving.deploy(connection, {**echo_config("big", "x"), "deployments": [{"name": "Echo", **options}]}, HOST, port)
    with pytest.raises(ServeError, match=r"not running after 2 s: .*; wait, or check that the cluster has the CPUs"):
        serving.wait_until_running(connection, "big", 2)

    for name in ("big", "c", "b"):
        remove(connection, name)
    with pytest.raises(ServeError, match="it is gone from the cluster"):
        serving.wait_until_running(connection, "b", 2)
    assert request_application(port, "a").text == "second"
    wait_until(
        lambda: request_application(port, "b").status_code == 404,
        "its route goes, which its proxies hear a little later",
    )
    with pytest.raises(ServeError, match="application b: there is no such application"):
        remove(connection, "b")

    remove(connection, "a")
    assert serving.applications(connection) == []
    wait_until(lambda: is_port_free(port), "nobody listens there any more")
