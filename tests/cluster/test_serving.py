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
from tests.cluster.applications import HOST, answering, application_details, ask, building, echo, is_free
from tests.watch import LIMIT, wait_until

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


def test_what_was_sent_is_not_sent_again_beside_what_is_newer():
    runtime_env = {"env_vars": {"A": "b"}, "excludes": ["*.md"], "py_modules": ["s3://bucket/own.zip", "/home/ann/own"]}
    sent_env = with_packages(runtime_env)
    uris = [module if "://" in module else f"gcs://_ray_pkg_{i}.zip" for i, module in enumerate(sent_env["py_modules"])]
    original_env = serving.without_packages({**sent_env, "py_modules": uris})
    assert original_env == {**runtime_env, "py_modules": uris[:2]}, "what the spec names stays"
    assert with_packages(original_env) == {**sent_env, "py_modules": uris[:2] + sent_env["py_modules"][2:]}
    assert serving.without_packages({}) == {}


@pytest.mark.ray
def test_replicas_run_in_the_environment_of_the_spec(connection, port, tmp_path):
    """Replicas have that environment after an update too, and on a foreign cluster beside the packages that are sent
    there.

    These replicas are of a foreign application: it has no run, and is sent no key, with which its operator could send
    requests to ours.
    """
    (tmp_path / "own").mkdir()
    (tmp_path / "own/__init__.py").write_text(SOURCE)
    app = {"name": "a", "route_prefix": "/a", "import_path": "own:build", "args": {"checkpoint": "/etc"}}

    def answer(connection, word, runtime_env, modules):
        """Deploy in this environment, assert what the replicas answer, and return the environment as it was sent."""
        assert serving.deploy(connection, {**app, "runtime_env": runtime_env}, HOST, port) == f"http://{HOST}:{port}/a"
        serving.wait_until_running(connection, "a")
        assert ask(port, "a").text == word
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
def test_who_deploys_or_removes_at_once_does_not_undo_what_the_other_does(connection, port):
    """Serve does not run before the first deployment, and ends after the last removal."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: serving.deploy(connection, echo(name, name), HOST, port), "ab"))
        for name in "ab":
            serving.wait_until_running(connection, name)
        assert [ask(port, name).text for name in "ab"] == ["a", "b"]
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
def test_a_server_is_reached_where_it_listens(host, url):
    assert dashboard.url_at(host, 8000) == url


@pytest.mark.parametrize(
    ("board", "host", "expected"),
    [
        ("http://head:8265", "0.0.0.0", ("http://head:8000", True)),
        ("https://[2001:db8::1]:8265", "::", ("http://[2001:db8::1]:8000", True)),
        ("http://head:8265", "node3", ("http://node3:8000", True)),
        ("http://head:8265", "127.0.0.1", ("http://127.0.0.1:8000", False)),
        ("http://127.0.0.1:8265", "0.0.0.0", ("http://127.0.0.1:8000", False)),  # through a tunnel
    ],
)
def test_another_machines_server_is_reached_where_its_dashboard_is_or_not_at_all(board, host, expected):
    assert serving._public_url(Connection(board, False, False, None), host, 8000) == expected
    assert serving._public_url(Connection("http://127.0.0.1:8265", False, True, None), host, 8000)[1]


def test_an_application_is_waited_for_while_serve_is_at_it_and_a_line_says_so(monkeypatch):
    """A node that must start, and its image, may take half an hour, and a dashboard may answer late meanwhile."""
    monkeypatch.setattr(serving, "REPORT_SECONDS", 0)
    answer, lines = building("waiting for the cluster to auto-scale"), []
    board = {"/api/serve/applications/": answer}
    with answering(board) as (port, _):

        def say(line):
            lines.append(line)
            board["/api/serve/applications/"] = None if len(lines) == 1 else answer
            answer["applications"]["a"]["status"] = "RUNNING"

        connection = Connection(f"http://{HOST}:{port}", False, True, None)
        running = serving.wait_until_running(connection, "a", say=say)
    assert running.url == f"http://{HOST}:8000/a"
    assert lines[0].startswith("application a is DEPLOYING for ")
    assert lines[0].endswith(" s: waiting for the cluster to auto-scale")
    assert [line.split(",")[0] for line in lines[1:]] == ["still following"]


def test_what_serve_gives_up_is_waited_for_no_longer():
    answer = building("No module named 'x'")
    answer["applications"]["a"]["status"] = "DEPLOY_FAILED"
    with answering({"/api/serve/applications/": answer}) as (port, _):
        connection = Connection(f"http://{HOST}:{port}", False, True, None)
        with pytest.raises(ServeError, match="application a: No module named 'x'"):
            serving.wait_until_running(connection, "a")
        del answer["applications"]["a"]
        with pytest.raises(ServeError, match="it is gone from the cluster"):
            serving.wait_until_running(connection, "a")


def test_a_route_is_taken_while_its_application_is_built():
    with pytest.raises(ServeError, match="application b: a already answers at /a"):
        serving._check_route(building(""), {"name": "b", "route_prefix": "/a"})


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_key_does_not_go_to_what_listens_here_on_another_clusters_port(tmp_path, host):
    """The dashboard is reached through a tunnel, as by `kubectl port-forward`."""
    config = {"import_path": "mhmoe_ray.serve.app:build", "args": {"checkpoint": "/mnt/runs/a-1/checkpoints/s"}}
    app = {"route_prefix": "/", "status": "RUNNING", "message": "", "deployments": {}, "deployed_app_config": config}
    with answering({}) as (port, requests):
        board = {
            "/api/version": {"ray_version": "2", "session_name": "elsewhere"},
            "/nodes?view=summary": {
                "data": {"summary": [{"raylet": {"sessionDir": "/tmp/elsewhere"}}], "nodeLogicalResources": {}}
            },
            "/api/serve/applications/": {
                "http_options": {"host": host, "port": port},
                "applications": {"mhmoe": app},
            },
        }
        with answering(board) as (dashboard_port, _):
            words = ("serve", "status", "--address", f"http://127.0.0.1:{dashboard_port}")
            [status] = mhmoe(tmp_path, *words, "--json", MHMOE_API_KEY="secret", MHMOE_HOME=str(tmp_path)).json()
            result = mhmoe(tmp_path, *words, MHMOE_API_KEY="secret", MHMOE_HOME=str(tmp_path))
    assert requests == []
    assert (status["url"], status["reachable"]) == (f"http://127.0.0.1:{port}", False)
    assert f"{status['url']} is of the cluster's own machine; ask it there, or forward its port" in result.out


def test_a_key_goes_to_no_proxy_on_its_way_to_this_machine(monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    with answering({}) as (proxy, proxy_requests), answering({"/stats": {"model": "tiny"}}) as (port, requests):
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, f"http://{HOST}:{proxy}")
        application = serving.Application("mhmoe", f"http://localhost:{port}", True, "RUNNING", "", "/mnt/c")
        assert serving.application_stats(application, "secret") == {"model": "tiny"}
    assert (proxy_requests, requests) == ([], [("/stats", True)])


@pytest.mark.ray
def test_port_that_is_taken(connection):
    with socket.socket() as s:
        s.bind((HOST, 0))
        s.listen()
        used_port = s.getsockname()[1]
        with pytest.raises(ServeError, match=f"application a: .*Failed to bind .*; correct it, or its address {HOST}"):
            serving.deploy(connection, echo("a", "x"), HOST, used_port)
    assert serving.applications(connection) == []  # and Serve is not left with that port: the next test takes another


@pytest.mark.ray
@pytest.mark.slow
def test_two_applications(connection, port, monkeypatch):
    """Serve has one configuration for all applications.

    Each deployment must keep the applications of others, and those that were added while its folders were sent.
    """
    remote_connection = dataclasses.replace(connection, local=False)  # this one is sent our packages
    send = serving._upload_runtime_env

    def send_while_another_deploys(*args):
        monkeypatch.setattr(serving, "_upload_runtime_env", send)
        serving.deploy(remote_connection, echo("b", "other"), HOST, port)
        return send(*args)

    monkeypatch.setattr(serving, "_upload_runtime_env", send_while_another_deploys)
    serving.deploy(connection, echo("a", "first"), HOST, port)
    for name in "ab":
        serving.wait_until_running(connection, name, LIMIT)
    assert [ask(port, name).text for name in "ab"] == ["first", "other"]

    sent_env = application_details(connection, "b")["deployed_app_config"]["runtime_env"]
    serving.deploy(
        remote_connection, {**echo("b", "other"), "runtime_env": serving.without_packages(sent_env)}, HOST, port
    )
    assert application_details(connection, "b")["deployed_app_config"]["runtime_env"] == sent_env
    with pytest.raises(ServeError, match="application a: it serves no checkpoint of a run"):
        serving.deployed_config(connection, "a")

    serving.deploy(connection, echo("a", "second"), HOST, port)
    serving.deploy(connection, echo("c", "bad"), HOST, port)
    serving.wait_until_running(connection, "a", LIMIT)
    assert [ask(port, name).text for name in "ab"] == ["second", "other"]

    with pytest.raises(ServeError, match=f"Serve already listens on {HOST}:{port}"):
        serving.deploy(connection, echo("d", "x"), HOST, port + 1)
    with pytest.raises(ServeError, match="application d: a already answers at /a"):
        serving.deploy(connection, {**echo("d", "x"), "route_prefix": "/a"}, HOST, port)

    with pytest.raises(ServeError, match="application c: ValueError: bad word; see its log"):
        serving.wait_until_running(connection, "c", LIMIT)
    applications = serving.applications(connection)
    assert [(a.name, a.status, a.url) for a in applications] == [
        ("a", "RUNNING", f"http://{HOST}:{port}/a"),
        ("b", "RUNNING", f"http://{HOST}:{port}/b"),
        ("c", "DEPLOY_FAILED", f"http://{HOST}:{port}/c"),
    ]

    options = {"ray_actor_options": {"num_cpus": 100}, "graceful_shutdown_timeout_s": 1}
    serving.deploy(connection, {**echo("big", "x"), "deployments": [{"name": "Echo", **options}]}, HOST, port)
    with pytest.raises(ServeError, match=r"not running after 2 s: .*; wait, or check that the cluster has the CPUs"):
        serving.wait_until_running(connection, "big", 2)

    for name in ("big", "c", "b"):
        remove(connection, name)
    with pytest.raises(ServeError, match="it is gone from the cluster"):
        serving.wait_until_running(connection, "b", 2)
    assert ask(port, "a").text == "second"
    wait_until(lambda: ask(port, "b").status_code == 404, "its route goes, which its proxies hear a little later")
    with pytest.raises(ServeError, match="application b: there is no such application"):
        remove(connection, "b")

    remove(connection, "a")
    assert serving.applications(connection) == []
    wait_until(lambda: is_free(port), "nobody listens there any more")
