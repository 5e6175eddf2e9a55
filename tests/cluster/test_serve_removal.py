"""Tests of the removal of applications from Ray Serve.

Running replicas finish their requests, and replicas that are starting end at once.
"""

import threading
from concurrent.futures import ThreadPoolExecutor, as_completed

import pytest
import requests

from mhmoe_ray.cluster import serve_client, serve_removal, serving
from mhmoe_ray.cluster.connect import Connection
from mhmoe_ray.cluster.serve_removal import remove
from mhmoe_ray.errors import ServeError
from tests.cluster.applications import (
    HOST,
    application_details,
    deploying_report,
    echo_config,
    is_port_free,
    json_server,
    replica_states,
    request_application,
)
from tests.support.watch import LIMIT, wait_until


@pytest.mark.long
def test_remove_waits_for_a_deletion_in_progress_unless_it_is_deployed_again():
    """The server is simulated. Serve reports no deployments of an application that it is deleting."""
    answer, lines = deploying_report(""), []
    answer["applications"] |= {
        "b": answer["applications"]["a"],
        "a": {**answer["applications"]["a"], "status": "DELETING"},
    }
    responses = {"/api/serve/applications/": answer}
    with json_server(responses) as (port, _):

        def say(line):
            lines.append(line)
            responses["/api/serve/applications/"] = None if len(lines) == 1 else answer
            if len(lines) == 2:
                answer["applications"].pop("a", None)

        connection = Connection(f"http://{HOST}:{port}", False, True, None)
        remove(connection, "a", say)
        assert [line.split(",")[0] for line in lines] == [
            "waiting until application a finishes its requests",
            "still following",
        ]
        with pytest.raises(ServeError, match="application a: there is no such application"):
            remove(connection, "a")
        answer["applications"]["a"] = {**answer["applications"]["b"], "status": "DELETING"}
        with pytest.raises(ServeError, match="application a: it was deployed again meanwhile"):
            remove(connection, "a", lambda line: answer["applications"]["a"].update(status="DEPLOYING"))


def test_application_deployed_by_a_program_is_not_removed():
    answer = deploying_report("")
    answer["applications"]["a"] |= {"source": "imperative", "deployed_app_config": None}
    message = "application a: a program deployed it by serve.run"
    with json_server({"/api/serve/applications/": answer}) as (port, _), pytest.raises(ServeError, match=message):
        remove(Connection(f"http://{HOST}:{port}", False, True, None), "a")


@pytest.mark.ray
def test_remove_lets_requests_finish_and_cancels_starting_replicas(connection, port, tmp_path, monkeypatch):
    """Serve alone would give the replica that waits for resources the deployment's grace period of an hour too."""
    monkeypatch.setattr(serve_removal, "CANCEL_SECONDS", 2 * LIMIT)
    two_replicas = {"name": "Echo", "num_replicas": 2, "graceful_shutdown_timeout_s": 3600}
    # Two replicas need 10 CPUs and the cluster has 8, so the second one waits for resources.
    two_replicas |= {"ray_actor_options": {"num_cpus": 5}}
    begin_file, end_file, answers = tmp_path / "began", tmp_path / "until", []
    url = f"http://{HOST}:{port}/a?began={begin_file}&until={end_file}"
    serving.deploy(connection, {**echo_config("a", "x"), "deployments": [two_replicas]}, HOST, port)
    try:
        wait_until(lambda: replica_states(connection, "a") == ["RUNNING", "STARTING"], "one replica of two")
        wait_until(lambda: request_application(port, "a").text == "x", "an answer")
        request_thread = threading.Thread(target=lambda: answers.append(requests.get(url, timeout=LIMIT).text))
        request_thread.start()
        wait_until(begin_file.exists, "a request under way")
        removal_thread = threading.Thread(target=remove, args=(connection, "a"), daemon=True)
        removal_thread.start()
        wait_until(lambda: application_details(connection, "a")["status"] == "DELETING", "its removal")
        end_file.touch()
        request_thread.join(LIMIT)
        assert answers == ["x"]
        removal_thread.join(LIMIT)
        assert not removal_thread.is_alive()
    finally:
        end_file.touch()
    assert serving.applications(connection) == []
    wait_until(lambda: is_port_free(port), "nobody listens there any more")


@pytest.mark.ray
@pytest.mark.slow  # test_remove_lets_requests_finish... is the quick test of a removal
def test_concurrent_removals_during_an_update_without_room_succeed(connection, port, monkeypatch):
    """The replica of the previous version runs, and there is no room for that of the update.

    Serve alone would give the new replica the deployment's grace period of an hour.
    """
    monkeypatch.setattr(serve_removal, "CANCEL_SECONDS", 2 * LIMIT)
    app = echo_config("a", "x")

    def deploy(cpus):
        options = {"name": "Echo", "graceful_shutdown_timeout_s": 3600, "max_surge_percent": 100}
        serving.deploy(
            connection, {**app, "deployments": [{**options, "ray_actor_options": {"num_cpus": cpus}}]}, HOST, port
        )

    deploy(0.1)
    serving.wait_until_running(connection, "a")
    deploy(100)
    wait_until(lambda: replica_states(connection, "a") == ["RUNNING", "STARTING"], "one of the update")
    with ThreadPoolExecutor(2) as pool:
        for removal in as_completed([pool.submit(remove, connection, "a") for _ in range(2)], LIMIT):
            # The removal that ends second may find no application any more.
            error = removal.exception()
            assert error is None or (isinstance(error, ServeError) and error.reason == "there is no such application")
    assert serving.applications(connection) == []


@pytest.mark.ray
@pytest.mark.slow  # test_remove_lets_requests_finish... is the quick test of a removal
def test_remove_cancels_a_replica_that_starts_meanwhile(connection, port, tmp_path, monkeypatch):
    """The replica starts at the worst moment: just after Serve has reported that there are no replicas."""
    gate = tmp_path / "gate"
    unplaceable = {"name": "Echo", "graceful_shutdown_timeout_s": 3600, "ray_actor_options": {"num_cpus": 100}}
    app = echo_config("a", "x")
    app["args"]["gate"] = str(gate)
    serving.deploy(connection, {**app, "deployments": [unplaceable]}, HOST, port)
    assert replica_states(connection, "a") == []

    def details_before_the_replica_starts(*args):
        details = serve_client.serve_details(*args)
        if not gate.exists():
            gate.touch()
            wait_until(lambda: replica_states(connection, "a") == ["STARTING"], "a replica without room")
        return details

    monkeypatch.setattr(serve_removal, "CANCEL_SECONDS", 2 * LIMIT)
    monkeypatch.setattr(serve_removal, "serve_details", details_before_the_replica_starts)
    removal_thread = threading.Thread(target=remove, args=(connection, "a"), daemon=True)
    removal_thread.start()
    removal_thread.join(LIMIT)
    assert not removal_thread.is_alive()
    assert serving.applications(connection) == []
